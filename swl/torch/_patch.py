"""Route the loss of someone else's code through swl."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function

from swl.errors import BackendUnavailable
from swl.torch._cross_entropy import cross_entropy
from swl.torch._loss import PLAIN

__all__ = ["Report", "patch"]


class Report:
    """What `patch` has seen so far; printing it says so in words."""

    def __init__(self) -> None:
        self.covered = 0
        """Calls that swl computed; one for each time that `torch.compile` traced one."""
        self.fell_through: Counter[str] = Counter()
        """Calls left to torch, by reason."""

    def __str__(self) -> str:
        lines = [f"torch.nn.functional.cross_entropy: {self.covered} by swl, {self.fell_through.total()} by torch"]
        return "\n".join(lines + [f"  {count} × {reason}" for reason, count in self.fell_through.most_common()])


_reports: list[Report] = []
"""Those of the patches that are in force, the innermost last."""


@torch._dynamo.assume_constant_result
def _count(reason: str | None) -> None:
    """Count a call: of compiled code when it is traced, lest it be traced again for every count."""
    if reason is None:
        _reports[-1].covered += 1
    else:
        _reports[-1].fell_through[reason] += 1


def _not_ours(*args: Any, **kwargs: Any) -> str | None:
    """Say which argument leaves a call to torch, whatever the others are."""
    for t in (*args, *kwargs.values()):
        if isinstance(t, torch.Tensor):
            if type(t) not in PLAIN:
                return f"a {type(t).__name__}, a subclass of Tensor"
            if t.device.type not in ("cpu", "cuda"):
                return f"a tensor on {t.device}"
    for t in (*args[:2], *(kwargs[name] for name in ("input", "target") if name in kwargs)):
        if not isinstance(t, torch.Tensor):
            return f"a {type(t).__name__}, which is no Tensor"
    return None


@contextmanager
def patch() -> Iterator[Report]:
    """Route ``torch.nn.functional.cross_entropy``, and with it `torch.nn.CrossEntropyLoss`, through swl.

    What swl does not compute is left to torch as it came and is counted: subclasses of tensors, such as DTensor, other
    devices, whatever is no tensor, and options that `swl.torch.cross_entropy` refuses. A reference that someone took before,
    as by ``from torch.nn.functional import cross_entropy``, is not reached. The patch is of the process, not of the thread.

    Yields
    ------
    Report

    Examples
    --------
    >>> import torch, swl.torch
    >>> with swl.torch.patch() as report:
    ...     loss = torch.nn.CrossEntropyLoss()(torch.zeros(2, 4), torch.tensor([0, 3]))
    ...     loss = torch.nn.functional.cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3]), label_smoothing=1.0)
    >>> print(report)
    torch.nn.functional.cross_entropy: 1 by swl, 1 by torch
      1 × label_smoothing must be in [0, 1), got 1.0
    """
    F, report = torch.nn.functional, Report()
    original = F.cross_entropy

    @functools.wraps(original)
    def routed(*args: Any, **kwargs: Any) -> Any:
        reason, tensors = _not_ours(*args, **kwargs), (*args, *kwargs.values())
        if not torch.compiler.is_compiling() and has_torch_function(tensors):  # which is to see torch's own function
            _count(reason)
            return handle_torch_function(original, tensors, *args, **kwargs)
        if reason is None:
            try:
                loss = cross_entropy(*args, **kwargs)
            except (TypeError, ValueError, NotImplementedError, BackendUnavailable) as error:
                reason = str(error)
            else:
                _count(None)
                return loss
        _count(reason)
        return original(*args, **kwargs)

    F.cross_entropy = routed
    _reports.append(report)
    try:
        yield report
    finally:
        F.cross_entropy = original
        _reports.remove(report)
