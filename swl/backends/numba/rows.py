"""One row of a softmax-cross-entropy on the CPU, in vectors.

A row comes from memory once: each block of `BLOCK` classes is read, its maximum taken and its exponentials summed and kept; the
gradient finds them in L1 or L2. Options are looked at once per vector, where the branch is always predicted, so that they
combine freely; rows without any run the same source compiled without them.
"""

# mypy: ignore-errors
# Numba compiles and types this file itself: the values are vectors and views that Python's types know nothing of.

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numba.extending import register_jitable

from swl.backends.numba.simd import (
    drop_below,
    exp_nonpositive,
    exp_parts,
    exp_unit,
    first_equal,
    first_lane,
    first_nan,
    fma,
    item,
    keep,
    lanes,
    load,
    load_tail,
    max_lanes,
    maximum,
    normal,
    prefetch,
    product_from,
    scalar,
    set_item,
    set_lane,
    splat,
    store,
    store_stream,
    store_tail,
    sum_lanes,
    tanh,
    to_line,
    zero_where_zero,
)

BLOCK = 4096
"""Classes between two looks at the running maximum (docs/performance.md)."""

GUESS, SLACK = 1024, 4
"""Classes whose maximum the first block is summed relative to; and how far a block's maximum may lie above what it was summed
relative to: exp(SLACK) costs no bit of the sum.
"""

AHEAD = 2048
"""Classes ahead of the arithmetic that memory is asked for."""

LOSS, ROW_MAX, LOG_SUM, TARGET_DOT, MASS, ENTROPY, LOG_PROB = range(7)
"""The rows of the array that a sweep fills, a column for each row of the logits; see `swl.backends.Rows`."""

INNER: dict[str, Any] = {"error_model": "numpy", "forceinline": True}


@register_jitable
def room_size(C: int, step: int) -> tuple[int, int]:
    """Count what a row needs of scratch: numbers for its exponentials, read in whole vectors from any class on, and for the bases
    of its blocks.
    """
    return (C // step + 2) * step, (C // BLOCK // step + 1) * step


class Extras(NamedTuple):
    """The options that make a row more than its logits and one class id. Where there are none, the inner functions get None
    instead and are compiled without all of it.
    """

    dense: bool  # y has mass everywhere: probabilities or smoothing
    probs: Any  # q, this row's; size 0: class ids
    weight: Any
    bias: Any
    hot: Any
    rest: Any
    softcap: Any
    softcap_rest: Any  # κ = softcap + softcap_rest: twice the digits
    temperature: Any  # τ


@njit(**INNER)
def _at(row: Any, j: int, stop: Any, fill: Any) -> Any:
    """Load a vector from j on: whole where `stop` is None, else with `fill` in the lanes past `stop`."""
    if stop is None:
        return load(row, j, fill)
    return load_tail(row, j, stop - j, fill)


@njit(**INNER)
def _raw_at(row: Any, extras: Any, j: int, stop: Any, low: Any) -> Any:
    """R = (logits + bias)/τ; `low` = −inf past the end."""
    r = _at(row, j, stop, low)
    if extras is not None and extras.bias.size:
        r = r + _at(extras.bias, j, stop, scalar(low, 0))
    if extras is not None and extras.temperature != scalar(low, 1):
        r = r / splat(extras.temperature)
    return r


@njit(**INNER)
def logits_at(row: Any, extras: Any, j: int, stop: Any, low: Any) -> Any:
    """Z = κ·tanh(r/κ) of that r, or r itself without a softcap; `low` = −inf past the end."""
    z = _raw_at(row, extras, j, stop, low)
    if extras is not None and extras.softcap > 0:
        k = splat(extras.softcap)
        z = k * tanh(z / k)
        if stop is not None:
            z = keep(z, stop - j, low)
    return z


@njit(**INNER)
def _slope(r: Any, extras: Any) -> Any:
    """∂z/∂r = 1 − (z/κ)² = 4e/(1 + e)², e = exp(−2|r|/κ): near ±κ the difference would have no digits left.

    The quotient's rounding, and that of κ, are made good to first order: at |r|/κ = 8 they would be 8 units in the last place of e.
    An e that is no normal number is 0.
    """
    k = extras.softcap
    zero, one, two, four = splat(scalar(k, 0)), splat(scalar(k, 1)), splat(scalar(k, 2)), splat(scalar(k, 4))
    size = maximum(r, zero - r)
    q = size / splat(k)
    missing = fma(zero - q, splat(extras.softcap_rest), fma(zero - q, splat(k), size))  # |r| − q·κ
    p, power = exp_parts(zero - two * q)
    unit = exp_unit(k)
    e = drop_below(p * power, splat(scalar(k, np.finfo(k).tiny) / unit)) * splat(unit)
    e = e - zero_where_zero(e, e * (missing * splat(scalar(k, 2) / k)))  # at |r| = ∞ the product is NaN, and e is 0
    return four * e / fma(e, two + e, one)


@njit(**INNER)
def _dense(extras: Any, j: int, stop: Any) -> Any:
    """Give the part of y that any class may have: w·((1−ε)·q + ε/C), q = 0 for class ids; 0 past the end."""
    zero = scalar(extras.rest, 0)
    y = splat(extras.rest)
    if extras.probs.size:
        y = fma(splat(extras.hot), _at(extras.probs, j, stop, zero), y)
    if extras.weight.size:
        y = y * _at(extras.weight, j, stop, zero)
    if stop is not None:
        y = keep(y, stop - j, zero)
    return y


@njit(**INNER)
def _add_up(row: Any, extras: Any, j: int, stop: Any, low: Any, base: Any, exps: Any, sums: Any) -> Any:
    """Add a vector to max z, Σ exp u (in units of `exp_unit`), Σ y·u and Σ y; leave exp u in `exps` if that is not None."""
    top, total, dots, masses = sums
    z = logits_at(row, extras, j, stop, low)
    u = z - base
    p, power = exp_parts(u)
    if exps is not None:
        store(exps, j, p * power)  # past the end too: it has room for whole vectors
    total = fma(p, power, total)
    if extras is not None and extras.dense:
        y = _dense(extras, j, stop)
        dots = dots + zero_where_zero(y, y * u)
        masses = masses + y
    return maximum(top, z), total, dots, masses


@njit(**INNER)
def exp_of(x: Any) -> Any:
    return first_lane(exp_nonpositive(splat(x)))


class Pull(NamedTuple):
    """What makes the gradient of a row: ∂L/∂z = ((A·p − y) + z·p)·scale.

    Where A·p is y, what z adds would have few digits in (A + z)·p − y. Where y is 0 the two are the same.
    """

    mass: Any  # A
    z: Any  # 2λ·m·(M + S)
    scale: Any


class Late(NamedTuple):
    """A row without extras whose gradient is still to be written."""

    out: Any
    exps: Any
    factors: Any
    pull: Pull


@njit(**INNER)
def factor_of(k: Any, pull: Pull) -> Any:
    """Give a block's A·p, z·p and (A + z)·p·scale per exponential, and the least exponential whose gradient is a normal number; `k`
    is p per exponential.

    What comes out below that is written as 0: subnormal numbers would slow this loop, and every product that reads them, tens of
    times.

    Rounding brings no product below it either. `least` is (tiny + 2u)/|c|, where u is the spacing of subnormal numbers. If it is
    normal, it is rounded by 2⁻²⁴ of itself at most (float64: 2⁻⁵³), so `least`·|c| ≥ tiny + 1.5u. If it is subnormal, it is rounded
    by u/2 at most, and `least`·|c| ≥ tiny up to |c| = 4. For larger |c| no exponential is in (0, tiny/2).
    """
    c = (pull.mass + pull.z) * k * pull.scale
    tiny = scalar(k, np.finfo(k).tiny * (1 + 2 * np.finfo(k).eps))
    return splat(pull.mass * k), splat(pull.z * k), splat(c), splat(tiny / abs(c))


@njit(**INNER)
def _late_gradient(late: Late, factor: Any, j: int, low: Any) -> Any:
    """∂L/∂z = (A + z)·p·scale of a vector, the target class's part left out."""
    _, _, c, least = factor
    return normal(product_from(load(late.exps, j, low), c, least))


@njit(**INNER)
def _write(late: Late, factor: Any, begin: int, end: int, low: Any) -> None:
    """Write the gradient of the classes ``[begin, end)`` of one block."""
    for j in range(begin, end, lanes(low)):
        store_tail(late.out, j, min(lanes(low), end - j), _late_gradient(late, factor, j, low))


@njit(**INNER)
def _maximum(row: Any, extras: Any, start: int, stop: int, low: Any) -> Any:
    """Find the largest logit of the classes ``[start, stop)``."""
    step = lanes(low)
    full = stop - (stop - start) % step
    top = splat(low)
    for j in range(start, full, step):
        top = maximum(top, logits_at(row, extras, j, None, low))
    if full < stop:
        top = maximum(top, logits_at(row, extras, full, stop, low))
    return max_lanes(top)


@njit(**INNER)
def _block(row: Any, extras: Any, start: int, stop: int, low: Any, base: Any, exps: Any, late: Any) -> Any:
    """Give max z, Σ exp u, Σ y·u and Σ y of the classes ``[start, stop)``, u = z − base; see `forward` for the rest."""
    zero = scalar(low, 0)
    step = lanes(low)
    full = stop - (stop - start) % step
    sums = splat(low), splat(zero), splat(zero), splat(zero)
    done = start
    if late is not None:
        factor = factor_of(item(late.factors, start // BLOCK), late.pull)
        lead = to_line(late.out, start)
        done = max(start, full - step)
        for j in range(start, done, step):
            prefetch(row, j + AHEAD, low)
            sums = _add_up(row, extras, j, None, low, splat(base), exps, sums)
            store_stream(late.out, j + lead, _late_gradient(late, factor, j + lead, low))
        _write(late, factor, start, min(start + lead, stop), low)
        _write(late, factor, done + lead, stop, low)
    for j in range(done, full, step):
        prefetch(row, j + AHEAD, low)
        sums = _add_up(row, extras, j, None, low, splat(base), exps, sums)
    if full < stop:
        sums = _add_up(row, extras, full, stop, low, splat(base), exps, sums)
    return max_lanes(sums[0]), sum_lanes(sums[1]) * exp_unit(low), sum_lanes(sums[2]), sum_lanes(sums[3])


@njit(**INNER)
def logarithm(M: Any, s: Any) -> Any:
    """M, and S = log s; NaN where the row holds a NaN or +inf, or nothing but −inf."""
    if s != s and np.inf > M:
        M = scalar(s, np.nan)
    elif -np.inf == M:
        s = scalar(s, np.nan)
    return M, scalar(s, np.log(np.float64(s)))  # a float32 logarithm may be off by an ulp


@njit(**INNER)
def forward(row: Any, extras: Any, low: Any, exps: Any, bases: Any, late: Any) -> Any:
    """M, S and the dense part's d and A, a block at a time.

    A block is summed relative to the maximum so far, the first one to that of its first classes, and once more where its own
    maximum exceeds that by more than `SLACK`. Unless they are None, `exps` gets exp(z − base) of each class, in units of
    `exp_unit`, and `bases` each block's base. Unless `late` is None, that row's gradient is written, a vector for each one
    summed here: memory takes the stores while the exponentials keep the arithmetic busy.
    """
    zero = scalar(low, 0)
    M, s, d, A = low, zero, zero, zero
    for start in range(0, row.size, BLOCK):
        stop = min(start + BLOCK, row.size)
        base = M
        if low == base:
            base = _maximum(row, extras, start, min(start + GUESS, stop), low)
            if low == base:
                base = _maximum(row, extras, start, stop, low)
                if low == base:
                    base = zero  # −inf only adds exp(−inf) = 0
        new, total, dot, mass = _block(row, extras, start, stop, low, base, exps, late)
        if new > base + scalar(low, SLACK):
            base = new
            new, total, dot, mass = _block(row, extras, start, stop, low, base, exps, None)
        if exps is not None:
            set_item(bases, start // BLOCK, base)
        if new > M:
            if low < M:
                s *= exp_of(M - new)
                d += A * (M - new)
            M = new
        if base < M:
            total *= exp_of(base - M)
            dot += mass * (base - M)
        s += total
        d += dot
        A += mass
    M, S = logarithm(M, s)
    return M, S, d, A


@njit(**INNER)
def _gradient(row: Any, extras: Any, j: int, stop: Any, low: Any, exps: Any, factor: Any, scale: Any, hot: Any) -> Any:
    """∂L/∂r = ((A·p − y) + z·p)·scale·∂z/∂r; `hot` is the target class's part of −y, None for vectors without it."""
    mass, z, c, least = factor
    e = load(exps, j, low)
    if extras is None and hot is None:
        return normal(product_from(e, c, least))
    e = drop_below(e, least)
    minus_y = splat(scalar(low, 0)) if hot is None else hot
    if extras is not None and extras.dense:
        minus_y = minus_y - _dense(extras, j, stop)
    g = fma(z, e, fma(mass, e, minus_y)) * scale
    if extras is not None and extras.softcap > 0:
        g = g * _slope(_raw_at(row, extras, j, stop, low), extras)
    return g


@njit(**INNER)
def weigh(bases: Any, C: int, M: Any, S: Any) -> None:
    """Turn each block's base into exp(base − M − S), in units of `exp_unit`: times exp(z − base) it is p."""
    for i in range((C + BLOCK - 1) // BLOCK):
        set_item(bases, i, exp_unit(M) * exp_of(item(bases, i) - M - S))


@njit(**INNER)
def target_vector(row: Any, extras: Any, low: Any, exps: Any, factors: Any, pull: Pull, hit: int, y_hit: Any) -> Any:
    """Compute the gradient of the vector in which the target class stands."""
    at = hit - hit % lanes(low)
    end = min(at + lanes(low), row.size)
    hot = set_lane(splat(scalar(low, 0)), hit - at, -y_hit)
    factor = factor_of(item(factors, at // BLOCK), pull)
    return _gradient(row, extras, at, end, low, exps, factor, splat(pull.scale), hot)


@njit(**INNER)
def backward(
    row: Any, out: Any, extras: Any, low: Any, exps: Any, factors: Any, pull: Pull, hit: int, y_hit: Any, stream: bool
) -> None:
    """Write the gradient of a row from what `forward` and `weigh` left; `out` may be `row` itself."""
    step = lanes(low)
    C = row.size
    c = splat(pull.scale)
    g_hit = splat(scalar(low, 0))
    if hit >= 0:  # before the row is written over
        g_hit = target_vector(row, extras, low, exps, factors, pull, hit, y_hit)
    for start in range(0, C, BLOCK):
        stop = min(start + BLOCK, C)
        k = factor_of(item(factors, start // BLOCK), pull)
        begin = min(start + to_line(out, start), stop)  # stores across two lines take twice as long
        if begin > start:
            g = _gradient(row, extras, start, begin, low, exps, k, c, None)
            store_tail(out, start, begin - start, g)
        full = stop - (stop - begin) % step
        if stream:
            for j in range(begin, full, step):
                store_stream(out, j, _gradient(row, extras, j, None, low, exps, k, c, None))
        else:
            for j in range(begin, full, step):
                store(out, j, _gradient(row, extras, j, None, low, exps, k, c, None))
        if full < stop:
            g = _gradient(row, extras, full, stop, low, exps, k, c, None)
            store_tail(out, full, stop - full, g)
    if hit >= 0:
        at = hit - hit % step
        store_tail(out, at, min(step, C - at), g_hit)


@njit(**INNER)
def statistics(row: Any, extras: Any, low: Any, M: Any, S: Any) -> Any:
    """Σ p·u, Σ q·u, Σ q and argmax."""
    zero = scalar(low, 0)
    step = lanes(low)
    C = row.size
    m, s = splat(M), splat(S)
    expected, dots, masses = splat(zero), splat(zero), splat(zero)
    best = C
    nan = C
    for j in range(0, C, step):
        stop = min(j + step, C)
        z = logits_at(row, extras, j, stop, low)
        u = z - m
        p = exp_nonpositive(u - s)
        expected = expected + zero_where_zero(p, p * u)
        if extras is not None and extras.probs.size:
            q = _at(extras.probs, j, stop, zero)
            dots = dots + zero_where_zero(q, q * u)
            masses = masses + q
        if best == C and first_equal(z, m) < step:
            best = j + first_equal(z, m)
        if nan == C and first_nan(z, z) < step:
            nan = j + first_nan(z, z)
    return sum_lanes(expected), sum_lanes(dots), sum_lanes(masses), nan if nan < C else best if best < C else 0
