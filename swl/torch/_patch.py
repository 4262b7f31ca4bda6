"""Route the loss of someone else's code through swl."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from swl.errors import BackendUnavailable
from swl.torch._cross_entropy import cross_entropy

__all__ = ["Report", "patch"]


class Report:
    """What `patch` has seen so far; printing it says so in words."""

    def __init__(self) -> None:
        self.covered = 0
        """Calls that swl computed."""
        self.fell_through: Counter[str] = Counter()
        """Calls left to torch, by reason."""

    def __str__(self) -> str:
        lines = [f"torch.nn.functional.cross_entropy: {self.covered} by swl, {self.fell_through.total()} by torch"]
        return "\n".join(lines + [f"  {count} × {reason}" for reason, count in self.fell_through.most_common()])


@contextmanager
def patch() -> Iterator[Report]:
    """Route ``torch.nn.functional.cross_entropy``, and with it `torch.nn.CrossEntropyLoss`, through swl.

    What `swl.torch.cross_entropy` refuses falls through to torch and is counted. A reference that someone took before, as by
    ``from torch.nn.functional import cross_entropy``, is not reached. The patch is of the process, not of the thread.

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
        try:
            loss = cross_entropy(*args, **kwargs)
        except (TypeError, ValueError, NotImplementedError, BackendUnavailable) as error:
            report.fell_through[str(error)] += 1
            return original(*args, **kwargs)
        report.covered += 1
        return loss

    F.cross_entropy = routed
    try:
        yield report
    finally:
        F.cross_entropy = original
