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
    size_of,
    transpose,
)
from swl.backends.numba.scratch import scratch

__all__ = ["USABLE", "gemm"]

DEEP = 512
"""Steps along the inner axis that are packed at a time, at most."""
BLOCK = 1 << 20
"""Bytes of a packed part of `a`: half of a second cache."""


def _usable() -> bool:
    as_it_is = config.CPU_NAME is None and config.CPU_FEATURES is None and config.ENABLE_AVX
    if not as_it_is or config.DISABLE_JIT:  # Numba compiles for another processor, or not at all
        return False
    try:
        return bool(llvm.get_host_cpu_features().get("avx512f"))
    except RuntimeError:  # LLVM does not know this kind of processor
        return False


USABLE = _usable()
"""Whether this processor has the registers that the tile is made for. Elsewhere the kernel is right, but BLAS is faster."""


@njit(error_model="numpy", nogil=True)
def _pack(zero, source, across, along, n, k, width, panels):
    """Copy n lines of k numbers to panels [line // width][along][line % width], 0 where there is nothing.

    Neighbours in a line are `along` bytes apart, those of two lines `across`; k is filled up to a multiple of UNROLL.
    """
    size = size_of(zero)
    deep = (k + UNROLL - 1) // UNROLL * UNROLL
    panel = deep * width * size
    full = n // width
    if across == size:
        for j in range(k):
            s, p = source + j * along, panels + j * width * size
            for _ in range(full):
                for i in range(0, width, SQUARE):
                    copy(zero, s + i * size, p + i * size)
                s += width * size
                p += panel
    elif along == size:
        squares = k // SQUARE * SQUARE
        for f in range(full):
            for i in range(0, width, SQUARE):
                s, p = source + (f * width + i) * across, panels + f * panel + i * size
                for j in range(0, squares, SQUARE):
                    transpose(zero, s + j * size, across, p + j * width * size, width * size)
                for j in range(squares, k):
                    for r in range(SQUARE):
                        put(p + (j * width + r) * size, get(zero, s + r * across + j * size))
    else:
        for line in range(full * width):
            p = panels + line // width * panel + line % width * size
            for j in range(k):
                put(p + j * width * size, get(zero, source + line * across + j * along))
    if full * width < n:
        for i in range(width):
            line = full * width + i
            for j in range(k):
                number = get(zero, source + line * across + j * along) if line < n else zero
                put(panels + full * panel + (j * width + i) * size, number)
    for f in range((n + width - 1) // width):
        for i in range(k * width, deep * width):
            put(panels + f * panel + i * size, zero)


@njit(error_model="numpy")
def _even(total, most, unit):
    """Size of the parts when `total` is cut into as few of at most `most` as can be, all about the same: a multiple of `unit`."""
    parts = max(1, (total + most - 1) // most)
    return max(1, (total + parts * unit - 1) // (parts * unit)) * unit


def _gemm(room, a, a_rows, a_columns, b, b_rows, b_columns, out, out_rows, m, n, k, add):
    """``out = a·b`` or ``out += a·b``; addresses and steps in bytes, those along the columns of `out` being its numbers' size."""
    zero = room.dtype.type(0)
    size = size_of(zero)
    width = VECTORS * LINE // size
    left = address_of(room)
    right = left + BLOCK
    edge = right + DEEP * VECTORS * LINE  # a tile of which only a part lies within the result
    most = _even(k, DEEP, 1)
    block = _even(m, BLOCK // (DEEP * size), ROWS)
    for k0 in range(0, k, most):
        deep = min(most, k - k0)
        steps = (deep + UNROLL - 1) // UNROLL * UNROLL
        fetched = max(1, steps // (UNROLL * AHEAD))  # lines of the next panel while a tile is computed
        adds = add or k0 > 0
        for m0 in range(0, m, block):
            rows = min(block, m - m0)
            _pack(zero, a + m0 * a_rows + k0 * a_columns, a_rows, a_columns, rows, deep, ROWS, left)
            for n0 in range(0, n, width):
                columns = min(width, n - n0)
                here = b + k0 * b_rows + n0 * b_columns
                _pack(zero, here, b_columns, b_rows, columns, deep, width, right)
                # the next panel of b, as lines of memory, and how far it has been fetched
                coming = here + width * b_columns
                lines, length, line_step, i_next, j_next = deep, min(width, n - n0 - width) * size, b_rows, 0, 0
                if b_columns != size:
                    lines, length, line_step = length // size, deep * size if length > 0 else 0, b_columns
                for r0 in range(0, rows, ROWS):
                    ahead, ahead_step = left, 0
                    if j_next < length:
                        ahead, ahead_step = coming + i_next * line_step + j_next, line_step
                        i_next += fetched
                        if i_next >= lines:
                            i_next, j_next = 0, j_next + AHEAD * LINE
                    place, step = out + (m0 + r0) * out_rows + n0 * size, out_rows
                    whole = r0 + ROWS <= rows and columns == width
                    to, to_step, to_add = (place, step, adds) if whole else (edge, width * size, False)
                    multiply_tile(zero, left + r0 * steps * size, right, steps, to, to_step, to_add, ahead, ahead_step)
                    if not whole:
                        for i in range(min(ROWS, rows - r0)):
                            for j in range(columns):
                                x, p = get(zero, edge + (i * width + j) * size), place + i * step + j * size
                                put(p, get(zero, p) + x if adds else x)


_kernel = kept(_gemm, __file__, _gemm_tile.__file__)
PANELS = BLOCK + DEEP * VECTORS * LINE + ROWS * VECTORS * LINE
"""Bytes of scratch: a block of `a`, a panel of `b`, and a tile that reaches beyond the result."""


def gemm(a: Any, b: Any, out: Any, add: bool = False) -> None:
    """``out = a·b`` or ``out += a·b`` for arrays of any layout, all of float32 or all of float64.

    The inner axis is not empty, and `out` overlaps neither operand. It is written in place where numbers of a row or of a column
    are neighbours.
    """
    dtype = out.dtype
    if out.strides[1] != dtype.itemsize:
        a, b, out = b.T, a.T, out.T
    target = out
    if out.strides[1] != dtype.itemsize or not out.flags.aligned:
        target, add_to, add = MEMORY.allocate(np.empty, out.shape, dtype), add, False
    a, b = (x if x.flags.aligned else MEMORY.allocate(x.copy) for x in (a, b))
    (m, k), n = a.shape, b.shape[1]
    _kernel(
        scratch(PANELS // dtype.itemsize, dtype), a.ctypes.data, *a.strides, b.ctypes.data, *b.strides,
        target.ctypes.data, target.strides[0], m, n, k, add,
    )  # fmt: skip
    if target is not out:
        np.add(out, target, out=out) if add_to else np.copyto(out, target)
