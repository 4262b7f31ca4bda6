"""Targets of every kind, brought to the one form that kernels take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from swl.backends import Backend
from swl.ops.checks import any_array, real_array, require_shape, size_of
from swl.typing import Array

__all__ = ["CheckedTarget", "ChunkedProbabilities", "check_target"]


class CheckedTarget(NamedTuple):
    """A target whose dtype, shape and ids were checked; the fields are those of `swl.backends.protocol.Target`."""

    ids: Array = None
    probs: Array = None
    row_weight: Array = None
    count: Array = 0.0  # Σ_n m_n: a float on a host, a 0-d array on a device


class ChunkedProbabilities:
    """Target probabilities that a callable gives a chunk at a time, in place of an array ``(N, C)``."""

    def __init__(self, give: Callable[[slice, slice], Any], rows: slice, classes: slice) -> None:
        self.give, self.rows, self.classes = give, rows, classes

    def __getitem__(self, index: Any) -> ChunkedProbabilities:
        rows, classes = index if isinstance(index, tuple) else (index, slice(None))
        return ChunkedProbabilities(self.give, _within(self.rows, rows), _within(self.classes, classes))

    def array(self, backend: Backend) -> Array:
        """Ask for the chunk, and check what came."""
        shape = self.rows.stop - self.rows.start, self.classes.stop - self.classes.start
        q = real_array(backend, "target of probabilities", self.give(self.rows, self.classes))
        require_shape("target of probabilities", q, shape, "(rows, classes) of what was asked for")
        return q


def _within(outer: slice, inner: slice) -> slice:
    size = outer.stop - outer.start
    start, stop, _ = inner.indices(size)
    return slice(outer.start + start, outer.start + stop)


def check_target(
    backend: Backend, target: Array, leading: tuple[int, ...], C: int, ignore_index: int, weight: Array
) -> CheckedTarget:
    """Check a target against logits of shape ``(*leading, C)``.

    Parameters
    ----------
    target : array, shape (...) of any integer dtype, or (..., C) of any real dtype; or `ChunkedProbabilities`
    weight : array, shape (C,), or None
        The class weights, of the arithmetic's dtype.

    Raises
    ------
    TypeError, ValueError
        Naming what came and what is legal.
    """
    n_rows = size_of(leading)
    if isinstance(target, ChunkedProbabilities):
        return CheckedTarget(probs=target, count=float(n_rows))
    target = any_array(backend, "target", target)
    if target.shape == leading:
        if target.dtype.kind not in "iu":
            raise TypeError(f"target of class ids must be of an integer dtype, got {target.dtype}")
        ids, row_weight, count = backend.prepare_ids(target.reshape(n_rows), C, int(ignore_index), weight)
        return CheckedTarget(ids, None, row_weight, count)
    if target.shape == (*leading, C):
        if C == 1 and target.dtype.kind in "iub" and backend.xp is np and not (target == 1).all():
            raise ValueError(
                f"target has shape {target.shape}, dtype {target.dtype} and zeros, and logits have one class, whose probability "
                f"is 1: class ids have shape {leading}; for two classes give logits of two, say of 0 and the score"
            )
        probs = real_array(backend, "target of probabilities", target).reshape(n_rows, C)
        return CheckedTarget(probs=probs, count=float(n_rows))
    same = target.dtype.kind in "iu" and target.size == n_rows
    hint = f"; target.reshape({-1 if len(leading) == 1 else leading}) has the shape of class ids" if same else ""
    raise ValueError(
        f"target must have shape {leading} (class ids) or {(*leading, C)} (probabilities) "
        f"for {C} classes, got {target.shape}{hint}"
    )


def weighted_count(xp: Any, target: CheckedTarget, sample_weight: Array) -> Array:
    """Return Σ_n s_n·m_n, summed in float64."""
    if target.row_weight is not None:
        sample_weight = sample_weight * target.row_weight
    elif target.ids is not None:
        sample_weight = xp.where(target.ids >= 0, sample_weight, 0)
    total = sample_weight.sum(dtype=np.float64)
    return float(total) if xp is np else total
