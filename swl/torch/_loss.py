"""Cross-entropy of tensors: checks in torch's terms, and the sweeps over whatever memory layout the logits have."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from swl.backends import Rows
from swl.backends.protocol import joined
from swl.ops.checks import F64
from swl.ops.cross_entropy import SMALL
from swl.ops.loss import Problem, problem
from swl.options import DEFAULTS, Options, require_magnitudes
from swl.torch._bridge import Bridge, bridge, host_scalar
from swl.torch._options import ACC, as_arrays, autocast_dtype

__all__ = [
    "FLOATS",
    "PLAIN",
    "Loss",
    "at_once",
    "batched",
    "check",
    "logits_rows",
    "out_dtype",
    "require_tensors",
    "restored",
    "route",
    "rows_shape",
]

FLOATS = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16))
_INTEGERS = frozenset(
    (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
)
_AS_IT_IS = (torch.float32, torch.float64)
"""The dtypes that need no conversion."""

PER_SAMPLE = 256
"""Positions of a sample from which a class dimension that is not the innermost is read in place, a sample at a time;
below, one copy with the classes innermost is cheaper than so many small sweeps."""


# ------------------------------------------------------------------------------------------------ checks


def require_tensors(function: str, **given: Any) -> None:
    """Refuse an array of another library, whose dtypes and devices may look like torch's; None is no array."""
    for name, x in given.items():
        if x is not None and not isinstance(x, Tensor):
            kind = type(x)
            got = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
            raise TypeError(
                f"{name} must be a torch.Tensor, got {got}: torch.as_tensor makes one; "
                f"swl.{function} takes arrays of other libraries"
            )


def check(input: Tensor, target: Tensor, options: Options) -> bool:
    """Check dtypes, devices and shapes in torch's terms; tell whether the target holds probabilities."""
    if input.dtype not in FLOATS:
        raise TypeError(f"input must be float16, bfloat16, float32 or float64, got {input.dtype}")
    shape = input.shape
    if not shape:
        raise ValueError("input must have shape (C,), (N, C) or (N, C, d1, ..., dK), got ()")
    C = shape[0] if len(shape) == 1 else shape[1]
    if not C:
        raise ValueError(f"input must have at least one class, got shape {tuple(shape)}")
    if options is not DEFAULTS:
        require_magnitudes(ACC[input.dtype], C, **options.numbers())
    rows = rows_shape(input)
    probabilities = target.shape == shape
    if probabilities:
        if target.dtype not in FLOATS:
            raise TypeError(f"target of probabilities, having the shape of input, must be floating, got {target.dtype}")
        if options.ignore_index >= 0:
            raise ValueError(f"ignore_index={options.ignore_index} is for class ids, but target holds probabilities")
    elif target.shape != rows:
        raise ValueError(
            f"target must have shape {tuple(rows)} (class ids) or {tuple(shape)} (probabilities) "
            f"for input of shape {tuple(shape)}, got {tuple(target.shape)}"
        )
    elif target.dtype not in _INTEGERS:
        raise TypeError(f"target of class ids must be of an integer dtype, got {target.dtype}")
    weight, sample_weight, denominator = options.arrays().values()
    if weight is not None and weight.shape != (C,):
        raise ValueError(f"weight must have shape {(C,)}, one per class, got {tuple(weight.shape)}")
    if sample_weight is not None and sample_weight.shape != rows:
        raise ValueError(f"sample_weight must have shape {tuple(rows)}, one per row, got {tuple(sample_weight.shape)}")
    for name, t in (("target", target), ("weight", weight), ("sample_weight", sample_weight)):
        if t is not None and t.device != input.device:
            raise TypeError(f"input is on {input.device} but {name} on {t.device}; all tensors must be on one device")
    if denominator is not None and denominator.device != input.device:
        raise TypeError(f"input is on {input.device} but denominator on {denominator.device}")
    return probabilities


def out_dtype(input: Tensor, target: Tensor, probabilities: bool) -> torch.dtype:
    """Say the dtype of the loss as torch has it: that of logits and probabilities; under autocast at least float32."""
    dtype = torch.promote_types(input.dtype, target.dtype) if probabilities else input.dtype
    if dtype is not torch.float64 and autocast_dtype(input.device) is not None:
        return torch.float32
    return dtype


PLAIN = (Tensor, torch.nn.Parameter)
"""Types of tensors that have memory of their own."""


def route(*given: Tensor | None) -> Literal["at hand", "traced", "transformed"]:
    """Say what the tensors allow.

    ``"at hand"``: they have memory to compute on here and now. ``"traced"``, as by `torch.compile`, by `torch.jit.trace` or
    with fake tensors: they need an operation that torch's dispatcher knows. ``"transformed"``, by `torch.func` or for
    forward-mode differentiation: they need torch's own operations, of which torch knows all derivatives and batching rules.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return "traced"
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "transformed"
    if torch._C._len_torch_dispatch_stack():
        return "traced"
    for t in given:
        if t is not None and (type(t) not in PLAIN or t.is_meta):
            return "traced"
    return "at hand"


def batched(grad_output: Tensor) -> bool:
    """Tell whether an upstream gradient stands for many, as under ``is_grads_batched``: an operation then runs for each."""
    known = torch._C._functorch
    return known.is_legacy_batchedtensor(grad_output) or known.is_batchedtensor(grad_output)


# ------------------------------------------------------------------------------------------------ layouts


def rows_shape(x: Tensor) -> torch.Size:
    """Return the shape of the rows of logits ``(C,)`` or ``(N, C, d1, ..., dK)``: without ``C``."""
    return x.shape[:1] + x.shape[2:] if x.ndim > 1 else x.shape[:0]


def logits_rows(x: Tensor) -> Tensor:
    """See ``(N, C, d1, ..., dK)`` as ``(rows, C)``; a copy where the dimensions do not merge."""
    if x.ndim == 2:
        return x
    if x.ndim == 1:
        return x.unsqueeze(0)
    return x.movedim(1, -1).reshape(x.numel() // x.shape[1], x.shape[1])


def restored(rows: Tensor, x: Tensor) -> Tensor:
    """See a matrix ``(rows, C)`` in the shape of `x`."""
    if x.ndim == 2:
        return rows
    if x.ndim == 1:
        return rows.squeeze(0)
    return rows.view(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)


def _per_sample(x: Tensor) -> bool:
    """Whether to sweep a sample at a time, for classes that are neither innermost nor few enough to copy."""
    if x.ndim < 3 or not x.numel() or x.shape[0] == 1:
        return False
    inner = math.prod(x.shape[2:])
    merges = x.stride(0) == inner * x.stride(-1) and x.stride(1) * x.shape[1] <= x.stride(-1)
    return inner >= PER_SAMPLE and not merges


def _samples(x: Tensor) -> list[Tensor]:
    return [sample.reshape(x.shape[1], -1).T for sample in x]


# ------------------------------------------------------------------------------------------------ sweeps


def at_once(input: Tensor, target: Tensor, ignore_index: int, gradient: bool) -> tuple[float, Tensor | None] | None:
    """Compute the mean loss of a small problem without options on a CPU, and its gradient; None where it is something else.

    Nothing was checked before: whatever is unusual is left to the general way, which also tells what is wrong.
    """
    if not (input.is_cpu and target.is_cpu) or input.numel() > SMALL or target.dtype is not torch.int64:
        return None
    if input.dtype not in _AS_IT_IS or target.is_neg():
        return None
    here = bridge(input)
    logits = here.array(input)
    out = np.empty(logits.shape, logits.dtype) if gradient else None
    done = here.backend.plain_loss(logits, here.array(target), ignore_index, out)
    if done is None:
        return None
    total, count = done
    return total / count if count else math.nan, None if out is None else torch.from_numpy(out)


class Loss(NamedTuple):
    """A loss whose arguments were checked; its sweeps take the logits as a tensor."""

    bridge: Bridge
    problem: Problem
    shape: torch.Size  # of the rows

    @classmethod
    def of(cls, input: Tensor, target: Tensor, options: Options, probabilities: bool) -> Loss:
        """Bring target and options to the backend."""
        here = bridge(input)
        array = here.array
        rows = logits_rows(target) if probabilities else target.reshape(-1)
        C = input.shape[0] if input.ndim == 1 else input.shape[1]
        n = input.numel() // C
        if options.sample_weight is not None:
            options = options._replace(sample_weight=options.sample_weight.reshape(-1))
        with here.scope():
            source = Pieces(here, input)
            p = problem(here.backend, source, array(rows), (n,), C, ACC[input.dtype], as_arrays(here, options))
        return cls(here, p, rows_shape(input))

    def forward(self, stats: bool = False) -> Rows:
        """Sweep for the rows of the loss."""
        return self.problem.source.forward(self.problem, stats)

    def both(self, stats: bool = False) -> tuple[Rows, Any]:
        """Sweep for the rows of the loss and, for an upstream gradient of 1, the gradients."""
        return self.problem.source.forward_backward(self.problem, 1.0, stats)

    def backward(self, grad_output: Tensor, rows: Rows) -> Any:
        """Sweep for the gradients."""
        return self.problem.source.backward(self.problem, self.dout(grad_output), rows)

    def kept(self, rows: Rows) -> Tensor:
        """Return what a backward sweep needs of the rows as one tensor (3, N)."""
        xp = self.problem.backend.xp
        return self.bridge.tensor(joined(xp, [field[None] for field in (rows.row_max, rows.log_sum, rows.mass)]))

    def rows(self, kept: Tensor) -> Rows:
        """Undo `kept`."""
        row_max, log_sum, mass = self.bridge.array(kept)[:3]
        return Rows(row_max, row_max, log_sum, row_max, mass)

    def row_scale(self, grad_output: Tensor) -> Tensor:
        """Fold upstream gradient, row weights and denominator into one factor per row, or one for all."""
        return self.bridge.tensor(self.problem.row_scale(self.dout(grad_output)))

    def dout(self, grad_output: Tensor) -> Any:
        """Bring the upstream gradient to the arithmetic's dtype: 16 bits times 1/N would be rounded to 16 bits."""
        g = grad_output.reshape(-1) if self.problem.options.reduction == "none" else grad_output
        return self.bridge.array(g.to(torch.float64 if self.problem.acc == F64 else torch.float32))

    def reduce(self, loss: Any, dtype: torch.dtype) -> Tensor:
        """Reduce the rows' losses as torch does: the mean of nothing is NaN."""
        p = self.problem
        if p.sample_weight is not None:
            loss = loss * p.sample_weight
        if p.options.reduction == "none":
            return self.bridge.tensor(loss).to(dtype).view(self.shape)
        total = p.backend.total(loss)
        if self.bridge.on_host:
            value = float(total)
            if p.denominator is not None:
                value = value / p.denominator if p.denominator else math.nan
            return host_scalar(value, dtype)
        return self.bridge.tensor(total if p.denominator is None else total / p.denominator).to(dtype)


class Pieces(NamedTuple):
    """Logits of any layout: one matrix, or a matrix for each sample where the classes are not innermost."""

    bridge: Bridge
    input: Tensor

    @property
    def home(self) -> dict[str, Any]:
        return {}  # a bridge's scope says where

    def forward(self, p: Problem, stats: bool) -> Rows:
        return self._joined(p, [p.backend.cross_entropy_forward(z, t, stats) for z, t, _, _ in self._pieces(p)])

    def forward_backward(self, p: Problem, dout: Any, stats: bool) -> tuple[Rows, Tensor]:
        whole, outs = self._gradient(p)
        parts = [
            p.backend.cross_entropy_forward_backward(z, t, scale, out, stats)
            for z, t, out, scale in self._pieces(p, outs, p.row_scale(dout))
        ]
        return self._joined(p, parts), whole

    def backward(self, p: Problem, dout: Any, rows: Rows) -> Tensor:
        whole, outs = self._gradient(p)
        start = 0
        for z, t, out, scale in self._pieces(p, outs, p.row_scale(dout)):
            stop = start + z.shape[0]
            p.backend.cross_entropy_backward(z, t, rows.cut(start, stop), scale, out)
            start = stop
        return whole

    def probabilities(self, p: Problem, rows: Rows) -> Any:
        raise NotImplementedError("torch asks for no probabilities")

    def _gradient(self, p: Problem) -> tuple[Tensor, list[Tensor]]:
        """Make memory for a gradient: as the caller gets it, and in pieces."""
        input = self.input
        if _per_sample(input):
            whole = self._empty(p, input.shape)
            return whole, _samples(whole)
        C = input.shape[0] if input.ndim == 1 else input.shape[1]
        rows = self._empty(p, (p.n_rows, C))
        return restored(rows, input), [rows]

    def _empty(self, p: Problem, shape: tuple[int, ...]) -> Tensor:
        """Make memory for a gradient: on a host from the backend, whose large blocks outlive the tensors made of them."""
        if not self.bridge.on_host:
            return torch.empty(shape, dtype=self.input.dtype, device=self.input.device)
        return self.bridge.tensor(p.backend.empty(tuple(shape), self.bridge.array(self.input).dtype))

    def _pieces(self, p: Problem, outs: list[Tensor] | None = None, scale: Any = None) -> Iterator[Any]:
        """Go through the logits: matrix, target, gradient and factors of each piece."""
        array, input = self.bridge.array, self.input.detach()
        pieces, start = _samples(input) if _per_sample(input) else [logits_rows(input)], 0
        for k, piece in enumerate(pieces):
            stop = start + piece.shape[0]
            target = p.target if len(pieces) == 1 else p.target.rows(start, stop)
            here = scale if scale is None or scale.shape[0] == 1 else scale[start:stop]
            yield array(piece), target, outs and array(outs[k]), here
            start = stop

    def _joined(self, p: Problem, parts: list[Rows]) -> Rows:
        return Rows.joined(p.backend.xp, parts)
