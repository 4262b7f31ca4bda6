"""Softmax-cross-entropy on the CPU: the kernels that the backend calls.

`sweep` is every operation of the backend, its flags saying which, so that fused and separate calls run the same
instructions on each row and agree to the last bit. Optional arrays that are absent come with size 0.
"""

# mypy: ignore-errors
# Numba compiles and types this file itself: the values are vectors and views that Python's types know nothing of.

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import carray, njit
from numba.extending import register_jitable

from swl.backends.numba import few_classes as _cpu_few_classes
from swl.backends.numba import few_classes as few
from swl.backends.numba import gemm_tile as _gemm_tile
from swl.backends.numba import rows as _cpu_rows
from swl.backends.numba import simd as _simd
from swl.backends.numba.cache import kept
from swl.backends.numba.few_classes import EXPONENT, FEW, SCALE, TARGET_MASS, Z_PULL
from swl.backends.numba.few_classes import room_size as few_room
from swl.backends.numba.gemm_tile import address_of
from swl.backends.numba.rows import (
    ENTROPY,
    INNER,
    LOG_PROB,
    LOG_SUM,
    LOSS,
    MASS,
    ROW_MAX,
    TARGET_DOT,
    Extras,
    Late,
    Pull,
    backward,
    forward,
    logits_at,
    statistics,
    target_vector,
    weigh,
)
from swl.backends.numba.rows import room_size as row_room
from swl.backends.numba.simd import (
    BYTES,
    address_in,
    cut,
    fill_zero,
    first_lane,
    from_row,
    in_lanes,
    item,
    lanes,
    move,
    part,
    read_only,
    row_of,
    scalar,
    set_item,
    store_tail,
    whole,
)
from swl.backends.protocol import IGNORED, Target

PART = 128
"""Numbers that are summed by themselves: the rounding errors of a long sum grow with its parts, not its numbers."""

HOT, REST, SOFTCAP, Z_LOSS, TEMPERATURE = range(5)
NUMBERS = ("hot", "rest", "softcap", "z_loss", "temperature")
"""The numbers of a `Target`, as `sweep` takes them: one vector of float64."""
PLAIN = np.array([getattr(Target(), name) for name in NUMBERS])
"""Those of a loss without options."""

FORWARD, BACKWARD, STATS, STREAM = 1, 2, 4, 8
"""What `sweep` is to do; and that the gradient goes past the caches."""


def _kernel(function: Any) -> Any:
    """Compile at first use and keep the result on disk."""
    return kept(function, __file__, *_simd.SOURCES, _cpu_rows.__file__, _cpu_few_classes.__file__, _gemm_tile.__file__)


@njit(**INNER)
def _loss(M: Any, S: Any, d: Any, A: Any, m: Any, lam: Any) -> Any:
    """A·S − d + λ·m·(M + S)²."""
    lse = M + S
    return A * S - d + (lam * m * lse * lse if lam > 0 else scalar(lam, 0))


@njit(**INNER)
def _z_pull(M: Any, S: Any, m: Any, lam: Any) -> Any:
    """2λ·m·(M + S), by which z-loss has p multiplied in the gradient."""
    return scalar(lam, 2) * lam * m * (M + S) if lam > 0 else scalar(lam, 0)


@njit(**INNER)
def plain_logits(numbers: Any) -> bool:
    """Tell whether z is the logits, or their sum with the bias."""
    return numbers[SOFTCAP] == 0 and numbers[TEMPERATURE] == 1


@njit(**INNER)
def _no_loss(rows: Any, n: int) -> None:
    """Write 0 to all numbers of an ignored row."""
    for field in range(LOSS, MASS + 1):
        rows[field, n] = 0


@njit(**INNER)
def _slot(room: Any, C: int, low: Any, slot: int) -> Any:
    """View the scratch of one of two rows: exponentials, and bases of blocks."""
    exps, bases = row_room(C, lanes(low))
    start = slot * (exps + bases)
    return part(room, start, exps), part(room, start + exps, bases)


@njit(**INNER)
def _sweep_rows(
    logits: Any, out: Any, first: int, ids: Any, probs: Any, weight: Any, row_weight: Any, bias: Any,
    row_scale: Any, rows: Any, argmax: Any, numbers: Any, first_class: int, flags: int, room: Any,
) -> None:  # fmt: skip
    """Do what `sweep` does a row at a time, in scratch for two rows."""
    C = logits.shape[1]
    hot, rest, softcap, z_loss = numbers[HOT], numbers[REST], numbers[SOFTCAP], numbers[Z_LOSS]
    of_ids = ids.size > 0
    zero = rows.dtype.type(0.0)
    one, low, lam = scalar(zero, 1), scalar(zero, -np.inf), scalar(zero, z_loss)
    dense = not of_ids or rest > 0
    plain = not dense and bias.size == 0 and plain_logits(numbers)
    scale_step = 1 if row_scale.size > 1 else 0
    stream = flags & STREAM != 0
    w, b = whole(weight), whole(bias)
    late = plain and stream  # each gradient is written during the next row's forward pass
    waiting, last, last_hit, last_y, last_pull = False, 0, -1, zero, Pull(zero, zero, zero)
    cap = scalar(zero, softcap)
    cap_rest = scalar(zero, softcap - np.float64(cap))
    tau = scalar(zero, numbers[TEMPERATURE])
    for i in range(logits.shape[0]):
        n = first + i
        slot = i % 2 if late else 0
        row = row_of(logits, i)
        e, bases = _slot(room, C, low, slot)
        q = row_of(probs, 0 if of_ids else i)
        extras = Extras(dense, q, w, b, scalar(zero, hot), scalar(zero, rest), cap, cap_rest, tau)
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
                _no_loss(rows, n)
            if not flags & STATS:
                if flags & BACKWARD:
                    fill_zero(row_of(out, i))
                continue

        if not plain:
            M, S, d, A = forward(row, extras, low, e, bases, None)
        elif waiting:
            exps, factors = _slot(room, C, low, last % 2)
            behind = Late(row_of(out, last), exps, factors, last_pull)
            M, S, d, A = forward(row, None, low, e, bases, behind)
            if last_hit >= 0:
                g = target_vector(row, None, low, behind.exps, behind.factors, last_pull, last_hit, last_y)
                at = last_hit - last_hit % lanes(low)
                store_tail(behind.out, at, min(lanes(low), C - at), g)
            waiting = False
        elif flags & BACKWARD:
            M, S, d, A = forward(row, None, low, e, bases, None)
        else:
            M, S, d, A = forward(row, None, low, None, None, None)
        if flags & FORWARD:
            if of_ids and not weight.size:
                A = scalar(zero, rest * C + (hot if hit >= 0 else 0.0))  # exactly 1 over all classes
            elif hit >= 0:
                A += y_hit
            u_hit = zero
            if hit >= 0:
                u_hit = first_lane(logits_at(row, extras, hit, hit + 1, low)) - M
                if y_hit != 0:
                    d += y_hit * u_hit
            rows[ROW_MAX, n], rows[LOG_SUM, n] = M, S
            if counts:
                rows[TARGET_DOT, n], rows[MASS, n] = d, A
                rows[LOSS, n] = _loss(M, S, d, A, m, lam)
            if flags & STATS:
                expected, dot, mass, argmax[n] = statistics(row, extras, low, M, S)
                if of_ids:
                    dot, mass = u_hit, one if hit >= 0 else zero
                rows[ENTROPY, n], rows[LOG_PROB, n] = S - expected, dot - mass * S if mass != 0 else zero
        if flags & BACKWARD:
            if not counts:
                fill_zero(row_of(out, i))
                continue
            M, S, A = rows[ROW_MAX, n], rows[LOG_SUM, n], rows[MASS, n]
            scale = row_scale[n * scale_step]
            pull = Pull(A, _z_pull(M, S, m, lam), scale)
            weigh(bases, C, M, S)
            if late and i + 1 < logits.shape[0] and (not of_ids or ids[n + 1] != IGNORED):
                waiting, last, last_hit, last_y, last_pull = True, i, hit, y_hit, pull
            elif plain:
                backward(row, row_of(out, i), None, low, e, bases, pull, hit, y_hit, stream)
            else:
                backward(row, row_of(out, i), extras, low, e, bases, pull, hit, y_hit, stream)


@njit(**INNER)
def _sweep_few(
    logits: Any, out: Any, first: int, ids: Any, row_weight: Any, row_scale: Any, rows: Any, argmax: Any, z_loss: float,
    first_class: int, flags: int, all_room: Any,
) -> None:  # fmt: skip
    """Do what `sweep` does for class ids without options that reach the other classes, a vector of rows at a time."""
    N, C = logits.shape
    room = whole(all_room)
    zero = rows.dtype.type(0.0)
    one, low, lam = scalar(zero, 1), scalar(zero, -np.inf), scalar(zero, z_loss)
    step = lanes(zero)
    per_row = 1 if row_scale.size > 1 else 0
    for start in range(0, N, step):
        count = min(step, N - start)
        memory = cut(from_row(logits, start), 0, count * C)
        rows_here = cut(room, few.room_size(C, step) - C * step, C * step)
        group = in_lanes(memory, rows_here, zero)
        move(memory, group, zero)
        few.clear(room, low)
        few.sums(group, C, count, low, room)
        for i in range(count):
            n = first + start + i
            m = row_weight[n] if row_weight.size else one
            if flags & FORWARD:
                M, S = few.sum_up(room, low, i)
                d, A, u_hit, hit = zero, zero, zero, ids[n] - first_class
                if 0 <= hit < C:
                    A, u_hit = m, item(group, i * C + hit) - M
                    if m != 0:
                        d = m * u_hit
                if ids[n] != IGNORED:
                    rows[LOSS, n] = _loss(M, S, d, A, m, lam)
                    rows[ROW_MAX, n], rows[LOG_SUM, n], rows[TARGET_DOT, n], rows[MASS, n] = M, S, d, A
                else:
                    _no_loss(rows, n)
                if flags & STATS:
                    expected, _, _, argmax[n] = statistics(row_of(logits, start + i), None, low, M, S)
                    rows[ROW_MAX, n], rows[LOG_SUM, n] = M, S
                    rows[ENTROPY, n], rows[LOG_PROB, n] = S - expected, u_hit - S if 0 <= hit < C else zero
            if flags & BACKWARD:
                M, S, A = rows[ROW_MAX, n], rows[LOG_SUM, n], rows[MASS, n]
                set_item(room, EXPONENT * step + i, item(room, few.MAXIMUM * step + i) - M - S)
                set_item(room, TARGET_MASS * step + i, A)
                set_item(room, Z_PULL * step + i, _z_pull(M, S, m, lam))
                set_item(room, SCALE * step + i, row_scale[n * per_row])
        if flags & BACKWARD:
            memory = cut(from_row(out, start), 0, count * C)
            group = in_lanes(memory, rows_here, zero)
            few.gradients(group, C, count, low, room)
            for i in range(count):
                n = first + start + i
                column = ids[n] - first_class
                if ids[n] == IGNORED:
                    fill_zero(cut(group, i * C, C))
                elif 0 <= column < C:
                    m = row_weight[n] if row_weight.size else one
                    set_item(group, i * C + column, few.target_gradient(room, low, i, column, m))
            move(group, memory, zero)


@_kernel
def sweep(
    logits: Any, out: Any, first: int, ids: Any, probs: Any, weight: Any, row_weight: Any, bias: Any,
    row_scale: Any, rows: Any, argmax: Any, numbers: Any, first_class: int, flags: int, room: Any,
) -> None:  # fmt: skip
    """Run the operations that `flags` names over some rows, the one at `first` and those that follow it.

    `logits`, `out` and `probs` hold just these rows, C-ordered; everything else is whole. `logits` and `out` are of one dtype of
    memory (`swl.backends.numba.simd`), all else of the arithmetic's. `numbers` are those that `NUMBERS` names; `room` is scratch
    of `sweep_room` numbers.
    """
    if logits.shape[1] <= FEW and ids.size and numbers[REST] == 0 and not bias.size and plain_logits(numbers):
        _sweep_few(
            logits, out, first, ids, row_weight, row_scale, rows, argmax, numbers[Z_LOSS], first_class, flags, room
        )  # fmt: skip
        return
    _sweep_rows(
        logits, out, first, ids, probs, weight, row_weight, bias, row_scale, rows, argmax, numbers, first_class, flags,
        room,
    )  # fmt: skip


@register_jitable
def sweep_room(C: int, itemsize: int) -> int:
    """Count the numbers of scratch that `sweep` needs for rows of C classes."""
    step = BYTES // itemsize
    exps, bases = row_room(C, step)
    return max(2 * (exps + bases), few_room(C, step) if C <= FEW else 0)


@_kernel
def total(x: Any) -> float:
    """Sum in float64, in an order that never changes."""
    total = 0.0
    for start in range(0, x.size, PART):
        stop = min(start + PART, x.size)
        full = stop - (stop - start) % 4
        a, b, c, d = 0.0, 0.0, 0.0, 0.0
        for n in range(start, full, 4):
            a, b, c, d = a + x[n], b + x[n + 1], c + x[n + 2], d + x[n + 3]
        for n in range(full, stop):
            a += x[n]
        total += (a + b) + (c + d)
    return total


@_kernel
def prepare_ids(ids: Any, n_classes: int, ignore_index: int, weight: Any, clean: Any, row_weight: Any) -> Any:
    """Write the ids as `Target.ids`, and m; return the first bad row or −1, and Σ m."""
    count = 0
    for n in range(ids.size):
        t = np.int64(ids[n])
        m = 0.0
        if t == ignore_index:
            clean[n] = IGNORED
        elif 0 <= t < n_classes:
            clean[n] = t
            m = weight[t] if weight.size else 1.0
            count += 1
        else:
            return n, 0.0
        if weight.size:
            row_weight[n] = m
    return -1, total(row_weight) if weight.size else float(count)


@_kernel
def plain_loss(logits: Any, ids: Any, ignore_index: int, out: Any, room: Any) -> Any:
    """Do `_plain_loss` of class ids."""
    none = carray(address_in(room, 0), (1, 0), room.dtype)
    return _plain_loss(logits, ids, none, ignore_index, out, room)


@_kernel
def plain_loss_of_rows(logits: Any, probs: Any, out: Any, room: Any) -> Any:
    """Do `_plain_loss` of probabilities."""
    return _plain_loss(logits, carray(address_in(room, 0), 0, np.int64), probs, 0, out, room)


@register_jitable
def _plain_loss(logits: Any, ids: Any, probs: Any, ignore_index: int, out: Any, room: Any) -> Any:
    """Return Σ loss and Σ m; write the gradient of the mean unless `out` has no rows. One of `ids` and `probs` has no numbers.

    −1 in place of Σ m, with nothing written, says that an id is bad, or that `out` overlaps the logits and is not the same array.
    `room` is scratch of `plain_room` numbers, in which all arrays lie that `sweep` has from elsewhere.
    """
    N, C = logits.shape
    between = abs(address_of(out) - address_of(logits))
    if 0 < between < out.size * out.itemsize:
        return 0.0, -1.0
    at_rows, at_scale, at_room, size = _plain_layout(N, C, logits.itemsize)
    clean, argmax = carray(address_in(room, 0), ids.size, np.int64), carray(address_in(room, 0), 0, np.int64)
    rows, loss = carray(address_in(room, at_rows), (5, N), room.dtype), carray(address_in(room, at_rows), N, room.dtype)
    none = carray(address_in(room, 0), 0, room.dtype)
    bad, count = prepare_ids(ids, C, ignore_index, none, clean, none)
    if bad >= 0:
        return 0.0, -1.0
    if not ids.size:
        count = float(N)
    scale, flags = none, FORWARD
    if out.size:
        scale, flags = carray(address_in(room, at_scale), 1, room.dtype), FORWARD | BACKWARD
        scale[0] = 1.0 / count if count > 0 else 0.0
    sweep(
        read_only(logits), out, 0, clean, read_only(probs), none, none, none, scale, rows, argmax,
        PLAIN, 0, flags, carray(address_in(room, at_room), size - at_room, room.dtype),
    )  # fmt: skip
    return total(loss), count


@register_jitable
def _plain_layout(N: int, C: int, itemsize: int) -> tuple[int, int, int, int]:
    """Lay out the scratch of `plain_loss`, in numbers: N ids of 8 bytes, `Rows`, the scale, and scratch for `sweep`."""
    step = BYTES // itemsize
    rows = N * (8 // itemsize)
    scale = rows + (MASS + 1) * N
    room = (scale // step + 1) * step
    return rows, scale, room, room + sweep_room(C, itemsize)


@lru_cache(64)
def plain_room(N: int, C: int, itemsize: int) -> int:
    """Count the numbers of scratch that `plain_loss` needs."""
    return _plain_layout(N, C, itemsize)[3]


@_kernel
def convert(source: Any, target: Any) -> None:
    """Copy row by row between the arithmetic's dtype and memory's (`swl.backends.numba.simd`); both C-ordered, one float32."""
    for n in range(source.shape[0]):
        move(row_of(source, n), row_of(target, n), np.float32(1))
