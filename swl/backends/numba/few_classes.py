"""Rows of few classes on the CPU: a row in each lane of a vector, a class at a time.

A vector along a row of ten classes would be empty for the most part, and its maximum, its sum and its logarithm would be one
chain of dependent steps a row. Across rows, they are the same steps for a vector of rows.
"""

# mypy: ignore-errors
# Numba compiles and types this file itself: the values are vectors and views that Python's types know nothing of.

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numba.extending import register_jitable

from swl.backends.numba.rows import INNER, logarithm
from swl.backends.numba.simd import (
    exp_nonpositive,
    exp_parts,
    exp_unit,
    gather,
    item,
    lanes,
    load,
    maximum,
    product_from,
    scalar,
    scatter,
    splat,
    store,
)

FEW = 64
"""Classes up to which this is faster (docs/performance.md)."""

MAXIMUM, SUM, EXPONENT, TARGET_MASS, Z_PULL, SCALE, LEAST, EXPS = range(8)
"""What the room holds: a vector with a number for each row, and from `EXPS` on two for each class: its exponentials, and the rows
themselves where they are not of the lanes' dtype.
"""


@register_jitable
def room_size(C: int, step: int) -> int:
    """Count what the room holds, in vectors of `step` numbers."""
    return step * (EXPS + 2 * C)


@njit(**INNER)
def clear(room: Any, low: Any) -> None:
    """Put 0 where a vector has no row: of what a call before left there, products may be subnormal, which takes long."""
    for vector in (EXPONENT, TARGET_MASS, Z_PULL, SCALE):
        store(room, vector * lanes(low), splat(scalar(low, 0)))


@njit(**INNER)
def sums(group: Any, C: int, count: int, low: Any, room: Any) -> None:
    """Compute M and Σ exp(z − M) of `count` rows; keep exp(z − M) of each class, in units of `exp_unit`."""
    step = lanes(low)
    top = splat(low)
    for c in range(C):
        z = gather(group, c, C, count, low)
        store(room, (EXPS + c) * step, z)
        top = maximum(top, z)
    store(room, MAXIMUM * step, top)
    base = maximum(top, splat(scalar(low, np.finfo(low).min)))  # −inf − (−inf) would be NaN
    total = splat(scalar(low, 0))
    for c in range(C):
        p, power = exp_parts(load(room, (EXPS + c) * step, low) - base)
        store(room, (EXPS + c) * step, p * power)
        total = total + p * power
    store(room, SUM * step, total * splat(exp_unit(low)))


@njit(**INNER)
def gradients(group: Any, C: int, count: int, low: Any, room: Any) -> None:
    """Write (A + z)·p·scale of every class, p = exp(z − M)·exp(exponent); leave p per exponential in place of the exponent."""
    step = lanes(low)
    k = splat(exp_unit(low)) * exp_nonpositive(load(room, EXPONENT * step, low))
    pull = load(room, TARGET_MASS * step, low) + load(room, Z_PULL * step, low)
    c = pull * k * load(room, SCALE * step, low)
    least = splat(scalar(low, np.finfo(low).tiny)) / maximum(c, splat(scalar(low, 0)) - c)
    store(room, EXPONENT * step, k)
    store(room, LEAST * step, least)
    for j in range(C):
        scatter(group, j, C, count, product_from(load(room, (EXPS + j) * step, low), c, least))


@njit(**INNER)
def target_gradient(room: Any, low: Any, i: int, hit: int, y_hit: Any) -> Any:
    """((A·p − y) + z·p)·scale of the target class of row i; see `swl.backends.numba.rows.Pull`."""
    step = lanes(low)
    e = item(room, (EXPS + hit) * step + i)
    p = e * item(room, EXPONENT * step + i)
    if e < item(room, LEAST * step + i):
        p = scalar(low, 0)
    mass, z = item(room, TARGET_MASS * step + i), item(room, Z_PULL * step + i)
    return ((mass * p - y_hit) + z * p) * item(room, SCALE * step + i)


@njit(**INNER)
def sum_up(room: Any, low: Any, i: int) -> Any:
    """M and S of row i."""
    step = lanes(low)
    return logarithm(item(room, MAXIMUM * step + i), item(room, SUM * step + i))
