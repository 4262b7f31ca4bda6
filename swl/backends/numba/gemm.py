"""Matrix products on one thread, compiled: nearer to the processor's limit than OpenBLAS, and they add to what is there.

Both operands are copied, a part at a time, to panels that the tile of the result reads one after another
(`swl.backends.numba.gemm_tile`). A part of `a` and a panel of `b` stay in the second cache, and are used up before the next ones::

    for each part of the inner axis:
        for each block of rows:     pack a's part, ROWS a panel
            for each panel of b:    pack it, a tile's columns
                for each panel of a:    tile of out (+)= panelᵀ·panel

While a tile is computed, a few lines of the next panel of `b` are fetched. A number of the result is one sum over each part of the
inner axis, in order, and the sum of these, wherever its tile lies: the bits do not depend on how the result is cut.
"""

# mypy: ignore-errors
# Numba compiles and types most of this file itself: the values are addresses that Python's types know nothing of.

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import numpy as np
from numba import config, njit

from swl.backends.host.memory import MEMORY
from swl.backends.numba import gemm_tile as _gemm_tile
from swl.backends.numba import simd as _simd
from swl.backends.numba.cache import kept
from swl.backends.numba.gemm_tile import (
    AHEAD,
    LINE,
    ROWS,
    SQUARE,
    UNROLL,
    VECTORS,
    address_of,
    copy,
    get,
    multiply_tile,
    put,
    put_step,
    row_at,
    size_of,
    steps_in,
    transpose,
)
from swl.backends.numba.halves import bits_of
from swl.backends.numba.scratch import scratch
from swl.backends.numba.simd import move

__all__ = ["USABLE", "gemm", "takes"]

DEEP = 512
"""Steps along the inner axis that are packed at a time, at most."""
BLOCK = 1 << 20
"""Bytes of a packed part of `a`: half of a second cache."""


def _has(feature: str) -> bool:
    as_it_is = config.CPU_NAME is None and config.CPU_FEATURES is None and config.ENABLE_AVX
    if not as_it_is or config.DISABLE_JIT:  # Numba compiles for another processor, or not at all
        return False
    try:
        return bool(llvm.get_host_cpu_features().get(feature))
    except RuntimeError:  # LLVM does not know this kind of processor
        return False


USABLE = _has("avx512f")
"""Whether this processor has the registers that the tile is made for. Elsewhere the kernel is right, but BLAS is faster."""
PAIRS = USABLE and _has("avx512bf16")
"""Whether it multiplies bfloat16 by pairs."""
if PAIRS:
    llvm.initialize_native_asmparser()


@njit(error_model="numpy", nogil=True)
def _pack(panel, like, source, across, along, n, k, width, panels):
    """Copy n lines of k numbers of `like` to panels [line // width][along][line % width], 0 where there is nothing.

    Neighbours in a line are `along` bytes apart, those of two lines `across`; the panel is filled up to a multiple of UNROLL.
    """
    size, unit = size_of(panel), steps_in(panel)
    steps = (k + unit - 1) // unit
    deep = (steps + UNROLL - 1) // UNROLL * UNROLL
    each = deep * width * size  # bytes of a panel
    step = along * unit
    full, whole = n // width, k // unit
    done = whole
    if across == size_of(like):
        for j in range(whole):
            s, p = source + j * step, panels + j * width * size
            for _ in range(full):
                for i in range(0, width, SQUARE):
                    copy(panel, like, s + i * across, along, p + i * size)
                s += width * across
                p += each
    elif along == size_of(like):
        done = whole // SQUARE * SQUARE
        for f in range(full):
            for i in range(0, width, SQUARE):
                s, p = source + (f * width + i) * across, panels + f * each + i * size
                for j in range(0, done, SQUARE):
                    transpose(panel, like, s + j * step, across, p + j * width * size, width * size)
    else:
        done = 0
    for line in range((n + width - 1) // width * width):  # what is left: ends of lines, and lines that are not there
        s, p = source + line * across, panels + line // width * each + line % width * size
        for j in range(done if line < full * width else 0, deep):
            put_step(panel, like, s + j * step, along, k - j * unit if line < n else 0, p + j * width * size)


@njit(error_model="numpy")
def _even(total, most, unit):
    """Size of the parts when `total` is cut into as few of at most `most` as can be, all about the same: a multiple of `unit`."""
    parts = max(1, (total + most - 1) // most)
    return max(1, (total + parts * unit - 1) // (parts * unit)) * unit


def _gemm(
    room, panel, half, a_like, a, a_rows, a_columns, b_like, b, b_rows, b_columns, out, out_rows, sums, sums_rows, rounds,
    m, n, k, add,
):  # fmt: skip
    """``out = a·b`` or ``out += a·b``; addresses and steps in bytes, those along the columns of `out` being its numbers' size.

    If it `rounds`, to the type of `half`, `out` is not added to: parts of the inner axis add up in `sums`.
    """
    zero = room.dtype.type(0)
    size, unit = size_of(panel), steps_in(panel)
    width = VECTORS * LINE // size
    left = address_of(room)
    right = left + BLOCK
    edge = right + DEEP * VECTORS * LINE  # a tile of which only a part lies within the result
    most = _even(k, DEEP * unit, unit)
    block = _even(m, BLOCK // (DEEP * size), ROWS)
    for k0 in range(0, k, most):
        deep = min(most, k - k0)
        steps = ((deep + unit - 1) // unit + UNROLL - 1) // UNROLL * UNROLL
        fetched = max(1, steps // (UNROLL * AHEAD))  # lines of the next panel while a tile is computed
        adds = add or k0 > 0
        ends = rounds and k0 + deep == k
        y, y_rows = (sums, sums_rows) if rounds else (out, out_rows)
        for m0 in range(0, m, block):
            rows = min(block, m - m0)
            _pack(panel, a_like, a + m0 * a_rows + k0 * a_columns, a_rows, a_columns, rows, deep, ROWS, left)
            for n0 in range(0, n, width):
                columns = min(width, n - n0)
                here = b + k0 * b_rows + n0 * b_columns
                _pack(panel, b_like, here, b_columns, b_rows, columns, deep, width, right)
                # the next panel of b, as lines of memory, and how far it has been fetched
                coming = here + width * b_columns
                lines, line_step, length = deep, b_rows, min(width, n - n0 - width) * size_of(b_like)
                i_next, j_next = 0, 0
                if b_columns != size_of(b_like):
                    lines, line_step, length = (
                        length // size_of(b_like),
                        b_columns,
                        deep * size_of(b_like) if length > 0 else 0,
                    )
                for r0 in range(0, rows, ROWS):
                    ahead, ahead_step = left, 0
                    if j_next < length:
                        ahead, ahead_step = coming + i_next * line_step + j_next, line_step
                        i_next += fetched
                        if i_next >= lines:
                            i_next, j_next = 0, j_next + AHEAD * LINE
                    place, step = y + (m0 + r0) * y_rows + n0 * size, y_rows
                    whole = r0 + ROWS <= rows and columns == width and not (ends and k0 == 0)
                    to, to_step, to_add = (place, step, adds) if whole else (edge, width * size, False)
                    multiply_tile(panel, left + r0 * steps * size, right, steps, to, to_step, to_add, ahead, ahead_step)
                    there = min(ROWS, rows - r0)
                    if not whole and (adds or not ends):
                        for i in range(there):
                            for j in range(columns):
                                x, p = get(zero, edge + (i * width + j) * size), place + i * step + j * size
                                put(p, get(zero, p) + x if adds else x)
                    if ends:
                        if k0 > 0:
                            to, to_step = place, step
                        for i in range(there):
                            target = out + (m0 + r0 + i) * out_rows + n0 * size_of(half)
                            move(row_at(zero, to + i * to_step, columns), row_at(half, target, columns), zero)


_kernel = kept(_gemm, __file__, _gemm_tile.__file__, *_simd.SOURCES)
_NO_SUMS = np.empty((0, 0), np.float32)
PANELS = BLOCK + DEEP * VECTORS * LINE + ROWS * VECTORS * LINE
"""Bytes of scratch: a block of `a`, a panel of `b`, and a tile that reaches beyond the result."""


def takes(dtype: Any, acc: Any) -> bool:
    """Tell whether `gemm` takes arrays of a dtype in the arithmetic of another."""
    return dtype == acc or (acc == np.float32 and bits_of(dtype) is not None)


def gemm(a: Any, b: Any, out: Any, add: bool = False) -> None:
    """``out = a·b`` or ``out += a·b`` for arrays of any layout, in the arithmetic of float32 or, if all are of it, float64.

    Each array may be of 16 bit as well; an `out` of 16 bit is rounded once, and not added to. The inner axis is not empty, and
    `out` overlaps neither operand. It is written in place where numbers of a row or of a column are neighbours.
    """
    if out.strides[1] != out.itemsize:
        a, b, out = b.T, a.T, out.T
    target = out
    if out.strides[1] != out.itemsize or not out.flags.aligned:
        target, add_to, add = MEMORY.allocate(np.empty, out.shape, out.dtype), add, False
    a, b = (x if x.flags.aligned else MEMORY.allocate(x.copy) for x in (a, b))
    (m, k), n = a.shape, b.shape[1]
    acc = np.dtype(np.float64 if out.itemsize == 8 else np.float32)
    likes = [(bits_of(x.dtype) or x.dtype).type(0) for x in (a, b, out)]
    half = min(reversed(likes), key=lambda like: like.itemsize)  # of the result where it is of 16 bit
    pairs = PAIRS and type(likes[0]) is type(likes[1]) is np.int16
    rounds = out.itemsize == 2
    sums = MEMORY.allocate(np.empty, (m, n), acc) if rounds and k > DEEP else _NO_SUMS
    _kernel(
        scratch(PANELS // acc.itemsize, acc), np.int32(0) if pairs else acc.type(0), half,
        likes[0], a.ctypes.data, *a.strides, likes[1], b.ctypes.data, *b.strides, target.ctypes.data, target.strides[0],
        sums.ctypes.data, sums.strides[0], rounds, m, n, k, add,
    )  # fmt: skip
    if target is not out:
        np.add(out, target, out=out) if add_to else np.copyto(out, target)
