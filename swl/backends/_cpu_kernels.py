"""Softmax-cross-entropy on the CPU: one row at a time, in vectors.

`sweep` is every operation of the backend, its flags saying which, so that fused and separate calls run the same
instructions on each row and agree to the last bit. A row comes from memory once: blocks of `BLOCK` classes are read, their
maximum taken and their exponentials summed while the block is still in L1; the gradient finds the row in L2.

Optional arrays that are absent come with size 0. Options are looked at once per vector, where the branch is always
predicted, so that they combine freely; rows without any run the same source compiled without them.
"""

# mypy: ignore-errors
# Numba compiles and types this file itself: the values are vectors and views that Python's types know nothing of.

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from swl.backends import _simd
from swl.backends._cache import kept
from swl.backends._simd import (
    drop_below,
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
    prefetch,
    row_of,
    scalar,
    set_lane,
    splat,
    store,
    store_stream,
    store_tail,
    sum_lanes,
    tanh,
    to_line,
    whole,
    zero_where_zero,
)
from swl.targets import IGNORED

BLOCK = 4096
"""Classes between two looks at the running maximum (docs/performance.md)."""

FORWARD, BACKWARD, STATS, STREAM = 1, 2, 4, 8
LOSS, ROW_MAX, LOG_SUM, TARGET_DOT, MASS, ENTROPY, LOG_PROB = range(7)

_SOURCES = hashlib.blake2b(
    b"".join(Path(file).read_bytes() for file in (_simd.__file__, __file__)), digest_size=6
).hexdigest()


def _kernel(function: Any) -> Any:
    """Compile at first use and keep the result on disk.

    Numba takes a kept result for fresh by the time stamp of this file alone, which a wheel may share with the last version,
    and knows nothing of `_simd`. So what the sources say is part of the name.
    """
    function.__qualname__ += "_" + _SOURCES
    return kept(function, nogil=True, error_model="numpy")


_inner: dict[str, Any] = {"error_model": "numpy", "forceinline": True}


class _Extras(NamedTuple):
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


@njit(**_inner)
def _at(row: Any, j: int, stop: Any, fill: Any) -> Any:
    """Load a vector from j on: whole where `stop` is None, else with `fill` in the lanes past `stop`."""
    if stop is None:
        return load(row, j, fill)
    return load_tail(row, j, stop - j, fill)


@njit(**_inner)
def _logits(row: Any, extras: Any, j: int, stop: Any, low: Any) -> Any:
    """Z = κ·tanh((r + bias)/κ), or r + bias without a softcap; `low` = −inf past the end."""
    z = _at(row, j, stop, low)
    if extras is not None:
        if extras.bias.size:
            z = z + _at(extras.bias, j, stop, scalar(low, 0))
        if extras.softcap > 0:
            k = splat(extras.softcap)
            z = k * tanh(z / k)
            if stop is not None:
                z = keep(z, stop - j, low)
    return z


@njit(**_inner)
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


@njit(**_inner)
def _add_up(row: Any, extras: Any, j: int, stop: Any, low: Any, base: Any, exps: Any, sums: Any) -> Any:
    """Add a vector to Σ exp u (in units of `exp_unit`), Σ y·u and Σ y; leave exp u in `exps` if that is not None."""
    total, dots, masses = sums
    u = _logits(row, extras, j, stop, low) - base
    e = exp_scaled(u)
    if exps is not None:
        store(exps, j, e)  # past the end too: it has room for whole vectors
    total = total + e
    if extras is not None and extras.dense:
        y = _dense(extras, j, stop)
        dots = dots + zero_where_zero(y, y * u)
        masses = masses + y
    return total, dots, masses


@njit(**_inner)
def _exp(x: Any) -> Any:
    return first_lane(exp_nonpositive(splat(x)))


class _Late(NamedTuple):
    """A row without extras whose gradient is still to be written."""

    out: Any
    exps: Any
    factors: Any
    scale: Any


@njit(**_inner)
def _factor(k: Any, scale: Any) -> Any:
    """Give the factor of a block's exponentials, and the least one whose gradient is a normal number.

    What comes out below that is written as 0: subnormal numbers would slow this loop, and every product that reads them, tens of
    times.
    """
    return splat(k), splat(scalar(k, np.finfo(k).tiny) / abs(k * scale))


@njit(**_inner)
def _late_gradient(late: _Late, factor: Any, j: int, low: Any) -> Any:
    """∂L/∂z = pull·p·scale of a vector, the target class's part left out."""
    k, least = factor
    return fma(k, drop_below(load(late.exps, j, low), least), splat(scalar(low, 0))) * splat(late.scale)


@njit(**_inner)
def _write(late: _Late, factor: Any, begin: int, end: int, low: Any) -> None:
    """Write the gradient of the classes ``[begin, end)`` of one block."""
    for j in range(begin, end, lanes(low)):
        store_tail(late.out, j, min(lanes(low), end - j), _late_gradient(late, factor, j, low))


@njit(**_inner)
def _forward(row: Any, extras: Any, low: Any, exps: Any, bases: Any, late: Any) -> Any:
    """M, S and the dense part's d and A; a block at a time, all relative to the maximum so far.

    Unless they are None, `exps` gets exp(z − base) of each class, in units of `exp_unit`, and `bases` each block's base.
    Unless `late` is None, that row's gradient is written, a vector for each one summed here: memory takes the stores while the
    exponentials keep the arithmetic busy.
    """
    zero = scalar(low, 0)
    step = lanes(low)
    M, s, d, A = low, zero, zero, zero
    for start in range(0, row.size, BLOCK):
        stop = min(start + BLOCK, row.size)
        full = stop - (stop - start) % step
        top = splat(low)
        for j in range(start, full, step):
            top = maximum(top, _logits(row, extras, j, None, low))
        if full < stop:
            top = maximum(top, _logits(row, extras, full, stop, low))
        new = max_lanes(top)
        if new > M:
            if low < M:
                s *= _exp(M - new)
                d += A * (M - new)
            M = new
        base = M if low < M else zero  # a block of −inf only adds exp(−inf) = 0
        if exps is not None:
            bases[start // BLOCK] = base
        sums = splat(zero), splat(zero), splat(zero)
        done = start
        if late is not None:
            factor = _factor(late.factors[start // BLOCK], late.scale)
            lead = to_line(late.out, start)
            done = max(start, full - step)
            for j in range(start, done, step):
                prefetch(row, j + BLOCK, low)
                sums = _add_up(row, extras, j, None, low, splat(base), exps, sums)
                store_stream(late.out, j + lead, _late_gradient(late, factor, j + lead, low))
            _write(late, factor, start, min(start + lead, stop), low)
            _write(late, factor, done + lead, stop, low)
        for j in range(done, full, step):
            prefetch(row, j + BLOCK, low)
            sums = _add_up(row, extras, j, None, low, splat(base), exps, sums)
        if full < stop:
            sums = _add_up(row, extras, full, stop, low, splat(base), exps, sums)
        s += sum_lanes(sums[0]) * exp_unit(low)
        d += sum_lanes(sums[1])
        A += sum_lanes(sums[2])
    if s != s and np.inf > M:
        M = scalar(zero, np.nan)
    elif low == M:
        s = scalar(zero, np.nan)  # nothing but −inf
    return M, scalar(zero, np.log(np.float64(s))), d, A  # a float32 logarithm may be off by an ulp


@njit(**_inner)
def _gradient(row: Any, extras: Any, j: int, stop: Any, low: Any, exps: Any, factor: Any, scale: Any, hot: Any) -> Any:
    """∂L/∂r = (pull·exp − y)·scale·(1 − (z/κ)²); `hot` is the target class's part of −y."""
    minus_y = hot
    if extras is not None and extras.dense:
        minus_y = minus_y - _dense(extras, j, stop)
    k, least = factor
    g = fma(k, drop_below(load(exps, j, low), least), minus_y) * scale
    if extras is not None and extras.softcap > 0:
        t = _logits(row, extras, j, stop, low) / splat(extras.softcap)
        g = g * (splat(scalar(low, 1)) - t * t)
    return g


@njit(**_inner)
def _weigh(bases: Any, C: int, M: Any, S: Any, pull: Any) -> None:
    """Turn each block's base into pull·exp(base − M − S), in units of `exp_unit`: times exp(z − base) it is pull·p."""
    for i in range((C + BLOCK - 1) // BLOCK):
        bases[i] = pull * exp_unit(pull) * _exp(bases[i] - M - S)


@njit(**_inner)
def _target_vector(row: Any, extras: Any, low: Any, exps: Any, factors: Any, scale: Any, hit: int, y_hit: Any) -> Any:
    """Compute the gradient of the vector in which the target class stands."""
    at = hit - hit % lanes(low)
    end = min(at + lanes(low), row.size)
    hot = set_lane(splat(scalar(low, 0)), hit - at, -y_hit)
    factor = _factor(factors[at // BLOCK], scale)
    return _gradient(row, extras, at, end, low, exps, factor, splat(scale), hot)


@njit(**_inner)
def _backward(
    row: Any, out: Any, extras: Any, low: Any, exps: Any, factors: Any, scale: Any, hit: int, y_hit: Any, stream: bool
) -> None:
    """Write the gradient of a row from what `_forward` and `_weigh` left; `out` may be `row` itself."""
    step = lanes(low)
    C = row.size
    c, zero = splat(scale), splat(scalar(low, 0))
    g_hit = zero
    if hit >= 0:  # before the row is written over
        g_hit = _target_vector(row, extras, low, exps, factors, scale, hit, y_hit)
    for start in range(0, C, BLOCK):
        stop = min(start + BLOCK, C)
        k = _factor(factors[start // BLOCK], scale)
        begin = start
        if stream:
            begin = min(start + to_line(out, start), stop)
            if begin > start:
                g = _gradient(row, extras, start, begin, low, exps, k, c, zero)
                store_tail(out, start, begin - start, g)
        full = stop - (stop - begin) % step
        if stream:
            for j in range(begin, full, step):
                store_stream(out, j, _gradient(row, extras, j, None, low, exps, k, c, zero))
        else:
            for j in range(begin, full, step):
                store(out, j, _gradient(row, extras, j, None, low, exps, k, c, zero))
        if full < stop:
            g = _gradient(row, extras, full, stop, low, exps, k, c, zero)
            store_tail(out, full, stop - full, g)
    if hit >= 0:
        at = hit - hit % step
        store_tail(out, at, min(step, C - at), g_hit)


@njit(**_inner)
def _statistics(row: Any, extras: Any, low: Any, M: Any, S: Any) -> Any:
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
        z = _logits(row, extras, j, stop, low)
        u = z - m
        p = exp_nonpositive(u - s)
        expected = expected + zero_where_zero(p, p * u)
        if extras.probs.size:
            q = _at(extras.probs, j, stop, zero)
            dots = dots + zero_where_zero(q, q * u)
            masses = masses + q
        if best == C and first_equal(z, m) < step:
            best = j + first_equal(z, m)
        if nan == C and first_nan(z, z) < step:
            nan = j + first_nan(z, z)
    return sum_lanes(expected), sum_lanes(dots), sum_lanes(masses), nan if nan < C else best if best < C else 0


@njit(**_inner)
def _sweep(
    logits: Any, out: Any, first: int, ids: Any, probs: Any, weight: Any, row_weight: Any, bias: Any,
    row_scale: Any, rows: Any, argmax: Any, hot: float, rest: float, softcap: float, z_loss: float,
    first_class: int, flags: int, exps: Any, all_bases: Any,
) -> None:  # fmt: skip
    """Do what `sweep` does, with room for two rows' exponentials and their blocks' bases."""
    C = logits.shape[1]
    of_ids = ids.size > 0
    zero = rows.dtype.type(0.0)
    one, low, lam = scalar(zero, 1), scalar(zero, -np.inf), scalar(zero, z_loss)
    dense = not of_ids or rest > 0
    plain = not dense and softcap == 0 and bias.size == 0
    scale_step = 1 if row_scale.size > 1 else 0
    stream = flags & STREAM != 0
    w, b = whole(weight), whole(bias)
    late = plain and stream  # each gradient is written during the next row's forward pass
    waiting, last, last_hit, last_y, last_scale = False, 0, -1, zero, zero
    for i in range(logits.shape[0]):
        n = first + i
        slot = i % 2 if late else 0
        row, e, bases = row_of(logits, i), row_of(exps, slot), all_bases[slot]
        q = row_of(probs, 0 if of_ids else i)
        extras = _Extras(dense, q, w, b, scalar(zero, hot), scalar(zero, rest), scalar(zero, softcap))
        hit = -1  # the column of the target class, where it is one of ours
        m = one
        counts = True
        if of_ids:
            counts = ids[n] != IGNORED
            if counts and 0 <= ids[n] - first_class < C:
                hit = ids[n] - first_class
            if row_weight.size:
                m = row_weight[n]
        y_hit = scalar(zero, hot) * m
        if not counts:
            if flags & FORWARD:
                rows[LOSS : MASS + 1, n] = 0
            if not flags & STATS:
                if flags & BACKWARD:
                    out[i, :] = 0
                continue

        if not plain:
            M, S, d, A = _forward(row, extras, low, e, bases, None)
        elif waiting:
            behind = _Late(row_of(out, last), row_of(exps, last % 2), all_bases[last % 2], last_scale)
            M, S, d, A = _forward(row, None, low, e, bases, behind)
            if last_hit >= 0:
                g = _target_vector(row, None, low, behind.exps, behind.factors, last_scale, last_hit, last_y)
                at = last_hit - last_hit % lanes(low)
                store_tail(behind.out, at, min(lanes(low), C - at), g)
            waiting = False
        elif flags & BACKWARD:
            M, S, d, A = _forward(row, None, low, e, bases, None)
        else:
            M, S, d, A = _forward(row, None, low, None, None, None)
        if flags & FORWARD:
            if of_ids and not weight.size:
                A = scalar(zero, rest * C + (hot if hit >= 0 else 0.0))  # exactly 1 over all classes
            elif hit >= 0:
                A += y_hit
            u_hit = zero
            if hit >= 0:
                u_hit = first_lane(_logits(row, extras, hit, hit + 1, low)) - M
                if y_hit != 0:
                    d += y_hit * u_hit
            rows[ROW_MAX, n], rows[LOG_SUM, n] = M, S
            if counts:
                lse = M + S
                rows[TARGET_DOT, n], rows[MASS, n] = d, A
                rows[LOSS, n] = A * S - d + (lam * m * lse * lse if lam > 0 else zero)
            if flags & STATS:
                expected, dot, mass, best = _statistics(row, extras, low, M, S)
                rows[ENTROPY, n] = S - expected
                if of_ids:
                    dot, mass = u_hit, one if hit >= 0 else zero
                rows[LOG_PROB, n] = dot - mass * S if mass != 0 else zero
                argmax[n] = best
        if flags & BACKWARD:
            if not counts:
                out[i, :] = 0
                continue
            M, S, A = rows[ROW_MAX, n], rows[LOG_SUM, n], rows[MASS, n]
            pull = A + (scalar(zero, 2) * lam * m * (M + S) if lam > 0 else zero)
            scale = row_scale[n * scale_step]
            _weigh(bases, C, M, S, pull)
            if late and i + 1 < logits.shape[0] and (not of_ids or ids[n + 1] != IGNORED):
                waiting, last, last_hit, last_y, last_scale = True, i, hit, y_hit, scale
            elif plain:
                _backward(row, row_of(out, i), None, low, e, bases, scale, hit, y_hit, stream)
            else:
                _backward(row, row_of(out, i), extras, low, e, bases, scale, hit, y_hit, stream)


@_kernel
def sweep(
    logits: Any, out: Any, first: int, ids: Any, probs: Any, weight: Any, row_weight: Any, bias: Any,
    row_scale: Any, rows: Any, argmax: Any, hot: float, rest: float, softcap: float, z_loss: float,
    first_class: int, flags: int,
) -> None:  # fmt: skip
    """Run the operations that `flags` names over some rows, the one at `first` and those that follow it.

    `logits`, `out` and `probs` hold just these rows, C-ordered and of the arithmetic's dtype; everything else is whole.
    """
    room = logits.shape[1] + lanes(rows.dtype.type(0))
    exps, bases = np.empty((2, room), rows.dtype), np.empty((2, 1 + room // BLOCK), rows.dtype)
    _sweep(
        logits, out, first, ids, probs, weight, row_weight, bias, row_scale, rows, argmax, hot, rest, softcap, z_loss,
        first_class, flags, exps, bases,
    )  # fmt: skip


@_kernel
def convert(source: Any, target: Any) -> None:
    """Copy row by row between the arithmetic's dtype and memory's (`swl.backends._simd`); both C-ordered, one float32."""
    one = np.float32(1)
    step = lanes(one)
    C = source.shape[1]
    full = C - C % step
    for n in range(source.shape[0]):
        a, b = row_of(source, n), row_of(target, n)
        for j in range(0, full, step):
            store(b, j, load(a, j, one))
        if full < C:
            store_tail(b, full, C - full, load_tail(a, full, C - full, one))


@_kernel
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
