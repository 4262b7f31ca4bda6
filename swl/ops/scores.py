"""What is read off scores: probabilities, and the share of rows that are right."""

from __future__ import annotations

import math

import numpy as np

from swl.backends import resolve
from swl.ops.checks import acc_dtype, any_array, float_array, require_integer
from swl.options import shown
from swl.typing import Array, ArrayLike

__all__ = ["accuracy", "softmax"]


def softmax(x: ArrayLike, axis: int = -1) -> Array:
    """Return ``exp(x)/Σ exp(x)`` along an axis, of the dtype of `x`.

    Parameters
    ----------
    x : array, floating, with at least one axis
    axis : int

    Returns
    -------
    array, of the shape of `x`
        A row that holds NaN or ``+inf``, or ``−inf`` alone, is NaN.

    Examples
    --------
    >>> import numpy as np, swl
    >>> swl.softmax(np.log([[1., 3.], [1000., 1000.]]))
    array([[0.25, 0.75],
           [0.5 , 0.5 ]])
    """
    backend = resolve(None, {"x": x})
    with backend.scope(x=x), np.errstate(invalid="ignore", under="ignore"):
        x = float_array(backend, "x", x)
        if not x.ndim:
            raise ValueError("x must have at least one axis, got shape ()")
        if not isinstance(axis, int | np.integer) or not -x.ndim <= axis < x.ndim:
            raise ValueError(
                f"axis must be an integer in [{-x.ndim}, {x.ndim}) for x of shape {x.shape}, got {shown(axis)}"
            )
        if not x.size:
            return x.copy()
        z = x.astype(acc_dtype(x.dtype))
        e = backend.xp.exp(z - z.max(axis=axis, keepdims=True))
        return (e / e.sum(axis=axis, keepdims=True)).astype(x.dtype, copy=False)


def accuracy(scores: ArrayLike, target: ArrayLike, *, ignore_index: int = -100) -> Array:
    """Return the share of rows whose largest score is at the class of the target.

    Parameters
    ----------
    scores : array, shape (..., C)
        Logits or probabilities.
    target : array, shape (...) of class ids, or (..., C) of probabilities or one-hot, whose largest counts
    ignore_index : int
        Class id whose rows do not count.

    Returns
    -------
    float, or a 0-d array of a device
        NaN where no row counts.

    Raises
    ------
    TypeError, ValueError
        If the two do not fit.

    Examples
    --------
    >>> import numpy as np, swl
    >>> swl.accuracy(np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]]), np.array([1, 0, 0]))
    0.6666666666666666
    """
    require_integer("ignore_index", ignore_index, -math.inf)
    backend = resolve(None, {"scores": scores, "target": target})
    with backend.scope(scores=scores, target=target):
        scores, target = any_array(backend, "scores", scores), any_array(backend, "target", target)
        if not scores.ndim or not scores.shape[-1]:
            raise ValueError(f"scores must have shape (..., C) with at least one class, got {scores.shape}")
        best = scores.argmax(axis=-1)
        if target.shape == scores.shape:
            hits, counts = (best == target.argmax(axis=-1)).sum(), best.size
        elif target.shape != best.shape:
            legal = f"{best.shape} (class ids) or {scores.shape} (probabilities)"
            raise ValueError(f"target must have shape {legal}, got {target.shape}")
        elif target.dtype.kind not in "iu":
            raise TypeError(f"target of class ids must be of an integer dtype, got {target.dtype}")
        else:
            counts = target != ignore_index
            hits, counts = ((best == target) & counts).sum(), counts.sum()
        if backend.xp is np:
            return int(hits) / int(counts) if counts else float("nan")
        return hits / backend.xp.asarray(counts, np.float64)  # nothing waits for a device
