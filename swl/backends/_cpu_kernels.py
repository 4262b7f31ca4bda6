"""Softmax-cross-entropy on the CPU: one row at a time, in vectors.

`sweep` is every operation of the backend, its flags saying which, so that fused and separate calls run the same
instructions on each row and agree to the last bit. A row comes from memory once: blocks of `BLOCK` classes are read, their
maximum taken and their exponentials summed while the block is still in L1; the gradient finds the row in L2.

Optional arrays that are absent come with size 0. Options are looked at once per vector, where the branch is always
predicted, so that they combine freely and cost no copies of the code.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from swl.backends._simd import (
    exp_nonpositive,
    exp_scaled,
    exp_unit,
    first_equal,
    first_lane,
    first_nan,
    fma,
    keep,
    lanes,
    load,
    load_tail,
    max_lanes,
    maximum,
    scalar,
    set_lane,
    splat,
    store,
    store_tail,
    sum_lanes,
    tanh,
    zero_where_zero,
)
from swl.targets import IGNORED

BLOCK = 4096
"""Classes between two looks at the running maximum (docs/performance.md)."""

FORWARD, BACKWARD, STATS = 1, 2, 4
LOSS, ROW_MAX, LOG_SUM, TARGET_DOT, MASS, ENTROPY, LOG_PROB = range(7)

_kernel: dict[str, Any] = {"nogil": True, "error_model": "numpy", "cache": True}
_inner: dict[str, Any] = {"error_model": "numpy", "forceinline": True}


@njit(**_inner)
def _at(row: Any, j: int, stop: int, fill: Any) -> Any:
    """Load the lanes ``row[j : stop]``, with `fill` in those past `stop`."""
    if j + lanes(fill) <= stop:
        return load(row, j, fill)
    return load_tail(row, j, stop - j, fill)


@njit(**_inner)
def _logits(row: Any, bias: Any, kappa: Any, j: int, stop: int) -> Any:
    """z = κ·tanh((r + bias)/κ), or r + bias without a softcap; −inf past the end."""
    zero = kappa - kappa
    z = _at(row, j, stop, scalar(zero, -np.inf))
    if bias.size:
        z = z + _at(bias, j, stop, zero)
    if kappa > 0:
        k = splat(kappa)
        z = k * tanh(z / k)
        if j + lanes(kappa) > stop:
            z = keep(z, stop - j, scalar(zero, -np.inf))
    return z


@njit(**_inner)
def _dense(probs: Any, weight: Any, hot: Any, rest: Any, j: int, stop: int) -> Any:
    """The part of y that any class may have: w·((1−ε)·q + ε/C), q = 0 for class ids; 0 past the end."""
    zero = hot - hot
    y = splat(rest)
    if probs.size:
        y = fma(splat(hot), _at(probs, j, stop, zero), y)
    if weight.size:
        y = y * _at(weight, j, stop, zero)
    if j + lanes(hot) > stop:
        y = keep(y, stop - j, zero)
    return y


@njit(**_inner)
def _exp(x: Any) -> Any:
    return first_lane(exp_nonpositive(splat(x)))


@njit(**_inner)
def _forward(row: Any, probs: Any, weight: Any, bias: Any, hot: Any, rest: Any, kappa: Any, dense: bool) -> Any:
    """M, S and the dense part's d and A; a block at a time, all relative to the maximum so far."""
    zero = hot - hot
    low = scalar(zero, -np.inf)
    unit = exp_unit(hot)
    step = lanes(hot)
    C = row.size
    M, s, d, A = low, zero, zero, zero
    for start in range(0, C, BLOCK):
        stop = min(start + BLOCK, C)
        top = splat(low)
        for j in range(start, stop, step):
            top = maximum(top, _logits(row, bias, kappa, j, stop))
        new = max(M, max_lanes(top))
        if new > M:
            if M > low:
                s *= _exp(M - new)
                d += A * (M - new)
            M = new
        base = splat(M if M > low else zero)  # a block of −inf only adds exp(−inf) = 0
        sums = splat(zero)
        if not dense:
            for j in range(start, stop, step):
                sums = sums + exp_scaled(_logits(row, bias, kappa, j, stop) - base)
        else:
            dots = splat(zero)
            masses = splat(zero)
            for j in range(start, stop, step):
                u = _logits(row, bias, kappa, j, stop) - base
                sums = sums + exp_scaled(u)
                y = _dense(probs, weight, hot, rest, j, stop)
                dots = dots + zero_where_zero(y, y * u)
                masses = masses + y
            d += sum_lanes(dots)
            A += sum_lanes(masses)
        s += sum_lanes(sums) * unit
    if M == low:
        s = scalar(zero, np.nan)  # nothing but −inf, or NaN
    if s != s and M < np.inf:
        M = scalar(zero, np.nan)
    return M, scalar(zero, np.log(np.float64(s))), d, A  # a float32 logarithm may be off by an ulp


@njit(**_inner)
def _backward(
    row: Any, out: Any, probs: Any, weight: Any, bias: Any, hot: Any, rest: Any, kappa: Any, dense: bool,
    M: Any, S: Any, pull: Any, scale: Any, hit: int, y_hit: Any,
) -> None:  # fmt: skip
    """∂L/∂r = (pull·p − y)·scale·(1 − (z/κ)²), p = exp(z − M − S)."""
    zero = hot - hot
    step = lanes(hot)
    C = row.size
    m, s, c = splat(M), splat(S), splat(scale)
    coefficient = splat(pull * exp_unit(hot))
    minus = splat(scalar(zero, -1))
    for j in range(0, C, step):
        z = _logits(row, bias, kappa, j, C)
        y = splat(zero)
        if dense:
            y = _dense(probs, weight, hot, rest, j, C)
        if 0 <= hit - j < step:
            y = y + set_lane(splat(zero), hit - j, y_hit)
        g = fma(coefficient, exp_scaled(z - m - s), y * minus) * c
        if kappa > 0:
            t = z / splat(kappa)
            g = g * fma(t * minus, t, splat(scalar(zero, 1)))
        if j + step <= C:
            store(out, j, g)
        else:
            store_tail(out, j, C - j, g)


@njit(**_inner)
def _statistics(row: Any, probs: Any, bias: Any, kappa: Any, M: Any, S: Any) -> Any:
    """Σ p·u, Σ q·u, Σ q and argmax."""
    zero = kappa - kappa
    step = lanes(kappa)
    C = row.size
    m, s = splat(M), splat(S)
    expected, dots, masses = splat(zero), splat(zero), splat(zero)
    best = C
    nan = C
    for j in range(0, C, step):
        z = _logits(row, bias, kappa, j, C)
        u = z - m
        p = exp_nonpositive(u - s)
        expected = expected + zero_where_zero(p, p * u)
        if probs.size:
            q = _at(probs, j, C, zero)
            dots = dots + zero_where_zero(q, q * u)
            masses = masses + q
        if best == C and first_equal(z, m) < step:
            best = j + first_equal(z, m)
        if nan == C and first_nan(z, z) < step:
            nan = j + first_nan(z, z)
    return sum_lanes(expected), sum_lanes(dots), sum_lanes(masses), nan if nan < C else best if best < C else 0


@njit(**_kernel)
def sweep(
    logits: Any, out: Any, begin: int, end: int, ids: Any, probs: Any, weight: Any, row_weight: Any, bias: Any,
    row_scale: Any, rows: Any, argmax: Any, hot: float, rest: float, softcap: float, z_loss: float,
    first_class: int, flags: int,
) -> None:  # fmt: skip
    """Run the operations that `flags` names over the rows ``[begin, end)``."""
    C = logits.shape[1]
    of_ids = ids.size > 0
    zero = rows.dtype.type(0.0)
    one = scalar(zero, 1)
    hot_, rest_, kappa, lam = scalar(zero, hot), scalar(zero, rest), scalar(zero, softcap), scalar(zero, z_loss)
    dense = not of_ids or rest > 0
    scale_step = 1 if row_scale.size > 1 else 0
    for n in range(begin, end):
        row = logits[n]
        q = probs[0 if of_ids else n]
        hit = -1  # the column of the target class, where it is one of ours
        m = one
        counts = True
        if of_ids:
            counts = ids[n] != IGNORED
            if counts and 0 <= ids[n] - first_class < C:
                hit = ids[n] - first_class
            if row_weight.size:
                m = row_weight[n]
        if not counts:
            if flags & BACKWARD:
                out[n, :] = 0
            if flags & FORWARD:
                rows[LOSS : MASS + 1, n] = 0
            if not flags & STATS:
                continue
        y_hit = hot_ * m

        if flags & FORWARD:
            M, S, d, A = _forward(row, q, weight, bias, hot_, rest_, kappa, dense)
            if of_ids and dense and not weight.size:
                A = scalar(zero, rest * C)  # summed here in float64: with no smoothing-free class A is exactly 1
            u_hit = zero
            if hit >= 0:
                u_hit = first_lane(_logits(row, bias, kappa, hit, hit + 1)) - M
                A = scalar(zero, rest * C + hot) if of_ids and not weight.size else A + y_hit
                if y_hit != 0:
                    d += y_hit * u_hit
            rows[ROW_MAX, n], rows[LOG_SUM, n] = M, S
            if counts:
                lse = M + S
                rows[TARGET_DOT, n], rows[MASS, n] = d, A
                rows[LOSS, n] = A * S - d + (lam * m * lse * lse if lam > 0 else zero)
            if flags & STATS:
                expected, dot, mass, best = _statistics(row, q, bias, kappa, M, S)
                rows[ENTROPY, n] = S - expected
                if of_ids:
                    dot, mass = u_hit, one if hit >= 0 else zero
                rows[LOG_PROB, n] = dot - mass * S if mass != 0 else zero
                argmax[n] = best
        if flags & BACKWARD and counts:
            M, S, A = rows[ROW_MAX, n], rows[LOG_SUM, n], rows[MASS, n]
            pull = A + (scalar(zero, 2) * lam * m * (M + S) if lam > 0 else zero)
            scale = row_scale[n * scale_step]
            _backward(row, out[n], q, weight, bias, hot_, rest_, kappa, dense, M, S, pull, scale, hit, y_hit)


@njit(**_kernel)
def prepare_ids(ids: Any, n_classes: int, ignore_index: int, weight: Any, clean: Any, row_weight: Any) -> Any:
    """Write the ids as `Target.ids`, and m; return the first bad row or −1, and Σ m."""
    total = 0.0
    for n in range(ids.size):
        t = np.int64(ids[n])
        m = 0.0
        if t == ignore_index:
            clean[n] = IGNORED
        elif 0 <= t < n_classes:
            clean[n] = t
            m = weight[t] if weight.size else 1.0
        else:
            return n, total
        if weight.size:
            row_weight[n] = m
        total += m
    return -1, total
