"""One loss, one way through: a `Problem` was checked and can be computed, a `Loss` was computed and has a backward.

The functions, the layers, torch, JAX and the distributed head hold these two. Where the logits are is a `Source`: stored in an
array (`swl.ops.cross_entropy`), formed from inputs and weights in chunks (`swl.ops.linear_cross_entropy`), spread over ranks
(`swl.distributed.head`).
"""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple, Protocol

import numpy as np

from swl.backends import Backend, Rows, Target
from swl.ops.checks import real_array, require_shape, size_of
from swl.ops.targets import CheckedTarget, check_target, weighted_count
from swl.options import DEFAULTS, Options, require_magnitudes
from swl.typing import Array

__all__ = ["Loss", "Problem", "RowStats", "Source", "inverse", "problem"]


class RowStats(NamedTuple):
    """Per-row by-products of a loss, each of the target's leading shape ``(...)``.

    The log of the partition function is ``lse = row_max + log_sum``; the two stay apart because at ``|z| = 1e8`` their
    float32 sum has no bits left for the logarithm.
    """

    row_max: Array
    """max_c z_c."""
    log_sum: Array
    """log Σ_c exp(z_c − row_max), in nats."""
    log_prob: Array
    """log p_t, or Σ_c q_c·log p_c for probabilities, in nats, without weights or smoothing; 0 for an ignored row."""
    entropy: Array
    """−Σ_c p_c·log p_c, in nats."""
    argmax: Array
    """The class with the largest logit, the first of equals; int64."""


class Source(Protocol):
    """Where the logits of a loss are, and how they are swept. Gradients are of what the logits are made of."""

    @property
    def home(self) -> dict[str, Array]:
        """The array, by name, that says on which device the work is done."""

    def forward(self, p: Problem, stats: bool) -> Rows:
        """Compute the rows of the loss."""

    def forward_backward(self, p: Problem, dout: Array, stats: bool) -> tuple[Rows, Array]:
        """Compute rows and gradients in one sweep; bitwise as `forward`, then `backward`."""

    def backward(self, p: Problem, dout: Array, rows: Rows) -> Array:
        """Compute the gradients from the rows of an earlier `forward`; any number of times."""

    def probabilities(self, p: Problem, rows: Rows) -> Array:
        """Compute softmax(z), shape (..., C), of the arithmetic's dtype."""


class Problem(NamedTuple):
    """A loss whose arguments were checked."""

    backend: Backend
    source: Source
    options: Options
    target: Target
    leading: tuple[int, ...]  # (...) of the rows
    n_rows: int
    acc: np.dtype[Any]  # of the arithmetic
    sample_weight: Array  # (N,), acc; or None
    denominator: Array  # what the mean divides by, a float or a 0-d array; None for the other reductions

    def forward(self, stats: bool = False) -> Loss:
        """Compute the loss."""
        with self.backend.scope(**self.source.home):
            rows = self.source.forward(self, stats)
            self._finish()
            return Loss(self.reduce(rows.loss), self, rows)

    def forward_backward(self, dout: Array = 1.0, stats: bool = False) -> tuple[Loss, Array]:
        """Compute the loss and its gradients in one sweep."""
        with self.backend.scope(**self.source.home, dout=dout):
            rows, gradients = self.source.forward_backward(self, dout, stats)
            self._finish()
            return Loss(self.reduce(rows.loss), self, rows), gradients

    def row_scale(self, dout: Array, name: str = "dout") -> Array:
        """Fold upstream gradient, row weights and denominator into what a backward kernel takes: (N,) or (1,)."""
        xp, options = self.backend.xp, self.options
        if isinstance(dout, (int, float)):
            try:
                scale: Array = float(dout)
            except OverflowError as error:
                raise ValueError(f"{name} is an integer beyond the largest float") from error
        else:
            scale = real_array(self.backend, name, dout).astype(self.acc, copy=False)  # 1/N is nothing in float16
            legal = self.leading if options.reduction == "none" else ()
            if scale.ndim != 0:
                require_shape(name, scale, legal, f"one value per loss of reduction={options.reduction!r}")
                scale = scale.reshape(self.n_rows)
        if options.temperature != 1:
            scale = scale / options.temperature  # ∂z/∂r
        if self.denominator is not None:
            scale = scale * inverse(xp, self.denominator)
        if self.sample_weight is not None:
            scale = scale * self.sample_weight
        if isinstance(scale, (int, float)):  # asarray would copy from the host, which a CUDA graph cannot repeat
            return xp.full(1, scale, dtype=self.acc)
        return xp.asarray(scale, dtype=self.acc).reshape(-1)

    def reduce(self, loss: Array) -> Array:
        """Reduce the rows' losses ``(N,)``."""
        if self.sample_weight is not None:
            loss = loss * self.sample_weight
        if self.options.reduction == "none":
            return loss.reshape(self.leading)
        total = self.backend.total(loss)
        if self.denominator is not None:
            total = total * inverse(self.backend.xp, self.denominator)
        return self.backend.xp.asarray(total, dtype=self.acc)

    def _finish(self) -> None:
        """Raise the errors of a device now, if the caller asked for that."""
        if self.options.check:
            self.backend.check()


class Loss:
    """A loss that was computed: its value, and a backward that may be called any number of times."""

    __slots__ = ("problem", "rows", "value")

    def __init__(self, value: Any, problem: Problem, rows: Rows) -> None:
        self.value, self.problem, self.rows = value, problem, rows

    def backward(self, dout: Array = 1.0) -> Array:
        """Compute ``dout · ∂loss`` with respect to what the logits are made of."""
        p = self.problem
        with p.backend.scope(**p.source.home, dout=dout):
            return p.source.backward(p, dout, self.rows)

    def probabilities(self) -> Array:
        """Compute softmax(z), shape (..., C), of the arithmetic's dtype."""
        p = self.problem
        with p.backend.scope(**p.source.home):
            return p.source.probabilities(p, self.rows)

    def stats(self) -> RowStats:
        """Return the by-products of a sweep that was asked for them."""
        return RowStats(*(getattr(self.rows, name).reshape(self.problem.leading) for name in RowStats._fields))


def _denominator(backend: Backend, given: Array) -> Array:
    """Bring a denominator that was given to a float, on a device to a 0-d array if it is one."""
    if isinstance(given, numbers.Real):
        return float(given)
    array = real_array(backend, "denominator", given)
    require_shape("denominator", array, (), "a number")
    return float(array) if backend.xp is np else array


def inverse(xp: Any, denominator: Array) -> Array:
    """Return 1/denominator, and 0 where nothing counts."""
    if isinstance(denominator, float):
        return 1.0 / denominator if denominator else 0.0
    return xp.where(denominator != 0, 1.0 / xp.where(denominator != 0, denominator, 1.0), 0.0)


def problem(
    backend: Backend,
    source: Source,
    target: Array,
    leading: tuple[int, ...],
    C: int,
    acc: np.dtype[Any],
    options: Options,
    bias: Array = None,
) -> Problem:
    """Check target and options against logits of shape ``(*leading, C)``; a `CheckedTarget` is taken as it is."""
    xp = backend.xp
    n_rows = size_of(leading)
    weight, sample_weight = options.weight, options.sample_weight
    if weight is not None:
        weight = real_array(backend, "weight", weight)
        require_shape("weight", weight, (C,), "one per class")
        weight = xp.ascontiguousarray(weight, dtype=acc)
    if sample_weight is not None:
        sample_weight = real_array(backend, "sample_weight", sample_weight)
        require_shape("sample_weight", sample_weight, leading, "one per row")
        sample_weight = sample_weight.reshape(n_rows).astype(acc, copy=False)
    if not isinstance(target, CheckedTarget):
        target = check_target(backend, target, leading, C, options.ignore_index, weight)
    denominator = None
    if options.reduction == "mean":
        denominator = options.denominator
        if denominator is None:
            denominator = target.count if sample_weight is None else weighted_count(xp, target, sample_weight)
        else:
            denominator = _denominator(backend, denominator)
    numbers: dict[str, Any] = options.numbers()
    if options is not DEFAULTS:
        given = denominator if isinstance(denominator, float) and options.denominator is not None else None
        require_magnitudes(acc, C, denominator=given, **numbers)
    eps = numbers.pop("label_smoothing")
    spec = Target(
        ids=target.ids,
        probs=target.probs,
        weight=weight,
        row_weight=target.row_weight,
        hot=1.0 - eps,
        rest=eps / C,
        bias=None if bias is None else xp.ascontiguousarray(bias, dtype=acc),
        **numbers,
    )
    return Problem(backend, source, options, spec, leading, n_rows, acc, sample_weight, denominator)
