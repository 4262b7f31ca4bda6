"""The k largest scores of each row, found over ranges of classes one after the other."""

from __future__ import annotations

from typing import Any

import numpy as np

from swl.backends.protocol import joined
from swl.typing import Array

__all__ = ["Best", "largest"]


class Best:
    """The k best classes of some rows so far: the largest score first, the lower id first among equals.

    A NaN ranks as +inf.
    """

    def __init__(self, xp: Any, k: int) -> None:
        self.xp, self.k = xp, k
        self.ids: Array = None  # (N, up to k)
        self.scores: Array = None  # likewise

    def add(self, scores: Array, first: int) -> None:
        """Take in the scores ``(N, n)`` of the classes from `first` on, which lie behind those taken in before."""
        xp = self.xp
        scores = xp.where(xp.isnan(scores), scores.dtype.type(np.inf), scores)
        at = largest(xp, scores, min(self.k, scores.shape[1]))
        ids, scores = at + first, xp.take_along_axis(scores, at, axis=1)
        if self.ids is not None:
            ids, scores = (joined(xp, both, axis=1) for both in ((self.ids, ids), (self.scores, scores)))
            at = largest(xp, scores, min(self.k, scores.shape[1]))
            ids, scores = (xp.take_along_axis(a, at, axis=1) for a in (ids, scores))
        self.ids, self.scores = ids, scores


def largest(xp: Any, z: Array, k: int) -> Array:
    """Find where the k largest of each row are: largest first, the first of equals first."""
    if xp is not np:
        return xp.argsort(-z, axis=1)[:, :k]  # CuPy's sort is stable, and leaves no count for the host to wait for
    N, C = z.shape
    if not N or not k:
        return np.zeros((N, k), np.int64)
    smallest = np.partition(z, C - k, axis=1)[:, C - k, None].copy()  # the k-th largest; the copy frees the rest
    keep, equal = z > smallest, z == smallest
    spare = k - keep.sum(axis=1, keepdims=True)
    equal &= np.cumsum(equal, axis=1, dtype=np.int32) <= spare
    keep |= equal
    ids = np.nonzero(keep)[1].reshape(-1, k)
    order = np.argsort(-np.take_along_axis(z, ids, axis=1), axis=1, kind="stable")
    return np.take_along_axis(ids, order, axis=1)
