"""A loss whose arguments were checked, and what is O(N) in it: denominators, upstream gradients, reductions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from swl.backends import Backend, Rows
from swl.backends.protocol import Target
from swl.ops.checks import F64, real_array, require_shape, size_of
from swl.options import Options

__all__ = ["ChunkedProbabilities", "Problem", "RowStats", "problem"]


class RowStats(NamedTuple):
    """Per-row by-products of a loss, each of the target's leading shape ``(...)``.

    The log of the partition function is ``lse = row_max + log_sum``; the two stay apart because at ``|z| = 1e8`` their
    float32 sum has no bits left for the logarithm.
    """

    row_max: Any
    """max_c z_c."""
    log_sum: Any
    """log Σ_c exp(z_c − row_max), in nats."""
    log_prob: Any
    """log p_t, or Σ_c q_c·log p_c for probabilities, in nats, without weights or smoothing; 0 for an ignored row."""
    entropy: Any
    """−Σ_c p_c·log p_c, in nats."""
    argmax: Any
    """The class with the largest logit, the first of equals; int64."""


class ChunkedProbabilities:
    """Target probabilities that a callable gives a chunk at a time, in place of an array ``(N, C)``."""

    def __init__(self, give: Callable[[slice, slice], Any], rows: slice, classes: slice) -> None:
        self.give, self.rows, self.classes = give, rows, classes

    def __getitem__(self, index: Any) -> ChunkedProbabilities:
        rows, classes = index if isinstance(index, tuple) else (index, slice(None))
        return ChunkedProbabilities(self.give, _within(self.rows, rows), _within(self.classes, classes))

    def array(self, problem: Problem) -> Any:
        """Ask for the chunk, and check what came."""
        shape = self.rows.stop - self.rows.start, self.classes.stop - self.classes.start
        return problem.checked_probabilities(self.give(self.rows, self.classes), shape)


def _within(outer: slice, inner: slice) -> slice:
    size = outer.stop - outer.start
    start, stop, _ = inner.indices(size)
    return slice(outer.start + start, outer.start + stop)


class Problem(NamedTuple):
    """A loss whose arguments were checked: the form in which `cross_entropy` and the fused head share it."""

    backend: Backend
    options: Options
    target: Target
    leading: tuple[int, ...]  # (...) of the rows
    n_rows: int
    acc: np.dtype[Any]
    sample_weight: Any  # (N,), acc; or None
    denominator: Any  # what the mean divides by, a float or a 0-d array; None for the other reductions

    def row_scale(self, dout: Any) -> Any:
        """Fold upstream gradient, row weights and denominator into what a backward kernel takes: (N,) or (1,)."""
        xp, options = self.backend.xp, self.options
        if isinstance(dout, (int, float)):
            scale: Any = dout
        else:
            scale = real_array(self.backend, "dout", dout).astype(self.acc, copy=False)  # 1/N is nothing in float16
            legal = self.leading if options.reduction == "none" else ()
            if scale.ndim != 0:
                require_shape("dout", scale, legal, f"one value per loss of reduction={options.reduction!r}")
                scale = scale.reshape(self.n_rows)
        if self.denominator is not None:
            scale = scale * inverse(xp, self.denominator)
        if self.sample_weight is not None:
            scale = scale * self.sample_weight
        if isinstance(scale, (int, float)):  # asarray would copy from the host, which a CUDA graph cannot repeat
            return xp.full(1, scale, dtype=self.acc)
        return xp.asarray(scale, dtype=self.acc).reshape(-1)

    def reduce(self, loss: Any) -> Any:
        """Reduce the rows' losses ``(N,)``."""
        if self.sample_weight is not None:
            loss = loss * self.sample_weight
        if self.options.reduction == "none":
            return loss.reshape(self.leading)
        total = self.backend.total(loss)
        if self.denominator is not None:
            total = total * inverse(self.backend.xp, self.denominator)
        return self.backend.xp.asarray(total, dtype=self.acc)

    def stats(self, rows: Rows) -> RowStats:
        """Give the by-products the shape of the target."""
        return RowStats(*(getattr(rows, name).reshape(self.leading) for name in RowStats._fields))

    def checked_probabilities(self, values: Any, shape: tuple[int, ...]) -> Any:
        """Check target probabilities, or a chunk of them."""
        q = real_array(self.backend, "target of probabilities", values)
        require_shape("target of probabilities", q, shape, "(rows, classes) of what was asked for")
        return q

    def finish(self) -> None:
        """Raise the errors of a device now, if the caller asked for that."""
        if self.options.check:
            self.backend.check()


def inverse(xp: Any, denominator: Any) -> Any:
    """1/denominator, and 0 where nothing counts."""
    if isinstance(denominator, float):
        return 1.0 / denominator if denominator else 0.0
    return xp.where(denominator != 0, 1.0 / xp.where(denominator != 0, denominator, 1.0), 0.0)


def problem(
    backend: Backend, target: Any, leading: tuple[int, ...], C: int, acc: np.dtype[Any], options: Options
) -> Problem:
    """Check target and options against logits of shape ``(*leading, C)``."""
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

    ids = probs = row_weight = None
    counted: Any = float(n_rows)  # Σ m
    if isinstance(target, ChunkedProbabilities):
        probs = target
    elif (target := backend.asarray(target)).shape == leading:
        if target.dtype.kind not in "iu":
            raise TypeError(f"target of class ids must be of an integer dtype, got {target.dtype}")
        ids, row_weight, counted = backend.prepare_ids(target.reshape(n_rows), C, int(options.ignore_index), weight)
    elif target.shape == (*leading, C):
        probs = real_array(backend, "target of probabilities", target).reshape(n_rows, C)
    else:
        raise ValueError(
            f"target must have shape {leading} (class ids) or {(*leading, C)} (probabilities) "
            f"for {C} classes, got {target.shape}"
        )
    denominator = None
    if options.reduction == "mean":
        denominator = options.denominator
        if denominator is None:
            denominator = counted if sample_weight is None else _weighted_count(xp, sample_weight, ids, row_weight)
        elif isinstance(denominator, (int, float)) or backend.xp is np:
            denominator = float(denominator)
        else:
            denominator = backend.asarray(denominator)

    eps = float(options.label_smoothing)  # kernels are compiled for one type of each number
    spec = Target(
        ids=ids,
        probs=probs,
        weight=weight,
        row_weight=row_weight,
        hot=1.0 - eps,
        rest=eps / C,
        softcap=float(options.softcap or 0.0),
        z_loss=float(options.z_loss),
    )
    return Problem(backend, options, spec, leading, n_rows, acc, sample_weight, denominator)


def _weighted_count(xp: Any, sample_weight: Any, ids: Any, row_weight: Any) -> Any:
    """Σ_n s_n·m_n, in float64."""
    if row_weight is not None:
        sample_weight = sample_weight * row_weight
    elif ids is not None:
        sample_weight = xp.where(ids >= 0, sample_weight, 0)
    total = sample_weight.sum(dtype=F64)
    return float(total) if xp is np else total
