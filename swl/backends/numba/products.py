"""Matrix products on the threads of the pool.

NumPy's OpenBLAS has threads of its own, which go on spinning for milliseconds after a product and then fight with long
kernels that follow. So a large product is cut into tiles, the tiles are shared out to the pool, and each is multiplied on one
thread: by the compiled kernel where the processor is of the kind it is written for, else by BLAS. The bits do not depend on the
number of threads, nor on what other threads do.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import numpy as np

from swl.backends.host.blas import matmul, one_thread_each
from swl.backends.host.memory import MEMORY
from swl.backends.host.threads import PIECES, POOL
from swl.backends.numba import gemm as _gemm
from swl.backends.numba.gemm import gemm, takes
from swl.backends.numba.gemm_tile import LINE, ROWS, VECTORS
from swl.backends.numba.halves import round_into, widened

__all__ = ["product"]

TILES, NARROWEST = 16, 384
"""Most tiles of a product by BLAS, and rows or columns of the narrowest one (docs/performance.md)."""
LARGE, WIDE, ADDED = 500_000_000, 2_000_000, 100_000
"""Multiply-adds, or numbers of the result, from which a product is shared out to the pool; fewer numbers where it is added to
what is there, which BLAS's own threads would not help with (docs/performance.md).
"""
SHARED, NARROW = 30_000_000, 128
"""Multiply-adds from which a product by BLAS is shared out, and rows or columns of its narrowest tile below `LARGE`."""
AREA, LEAST = 1 << 21, 32
"""Numbers of a part by the compiled kernel, about, and rows and steps along the inner axis from which it is used."""
LANES = VECTORS * LINE // 4
"""Columns of the kernel's tile, of float32."""

_ACC = (np.dtype(np.float32), np.dtype(np.float64))


def product(a: Any, b: Any, out: Any, bias: Any = None, add: int = 0) -> None:
    """``out = a @ b``, or ``out = a @ b + bias``, or ``out += a @ b``; rounded once to the dtype of `out`.

    `add` is 0 or the columns that each thread adds at a time, in memory of its own, where the sum is not taken in place.
    """
    m, n = out.shape
    k = a.shape[1]
    same = k > 0 and a.dtype == b.dtype == out.dtype and out.dtype in _ACC
    large = m * n * k >= LARGE or m * n >= (ADDED if add else WIDE)
    shared = large or m * n * k >= SHARED
    if same and not add and not shared:
        matmul(a, b, out)
        if bias is not None:
            out += bias
        return
    columns_first = out.strides[0] == out.itemsize < out.strides[1]  # the gradient of weights stored as (C, D)
    if large and columns_first and bias is None and _suits(n, m, k):
        product(b.T, a.T, out.T, add=add)
        return
    acc = np.result_type(*(x.dtype if x.dtype in _ACC else np.float32 for x in (a, b)))
    compiled = large and _suits(m, n, k)
    direct = compiled and takes(a.dtype, acc) and takes(b.dtype, acc)
    in_place = out.dtype == acc if direct else same and not add
    if direct and takes(out.dtype, acc) and bias is None and not add:
        in_place = True  # the kernel rounds, too
    if direct:
        rows, columns = _grid(m, n, POOL.threads)
        high, wide = ROWS, LANES
    else:
        high = wide = 1
        narrowest = NARROWEST if large else NARROW
        parts = -(-n // add) if add else 1 << (min(TILES, max(1, max(m, n) // narrowest)).bit_length() - 1)
        rows, columns = (1, parts) if n >= m or add else (parts, 1)  # a power of two shares out evenly
        # a 16-bit operand that all tiles share is converted once, the other one tile by tile
        a, b = (_acc(a), b) if rows == 1 else (a, _acc(b))

    multiply = np.matmul if shared else matmul  # the threads that share it are held to one each below

    def tile(i: int, j: int) -> None:
        across, down = _part(m, rows, i, high), _part(n, columns, j, wide)
        new = MEMORY.allocate
        left, right, here = a[across], b[:, down], out[across, down]
        y = here if in_place else new(np.empty, here.shape, acc)
        if not direct:
            left, right = (new(_acc(x).astype, acc, copy=False) for x in (left, right))
        if compiled:
            gemm(left, right, y, add=in_place and add > 0)
        else:
            multiply(left, right, y)
        if bias is not None:
            y += bias[down]
        if in_place:
            return
        if add and y.dtype == here.dtype:
            here += y
            return
        if add:
            y += _acc(here)
        round_into(y, here)

    def tiles(begin: int, end: int) -> None:
        for index in range(begin, end):
            tile(*divmod(index, columns))

    if not shared:
        tiles(0, rows * columns)
        return
    with nullcontext() if compiled else one_thread_each(POOL.threads):
        POOL.run(tiles, rows * columns)


def _acc(x: Any) -> Any:
    """Bring a matrix to the dtype that arithmetic uses."""
    return x if x.dtype in _ACC else widened(x)


def _part(total: int, parts: int, i: int, unit: int) -> slice:
    """Give part `i`; all but the last end at multiples of `unit`, as the kernel's tiles do."""
    begin, end = (total * edge // parts // unit * unit for edge in (i, i + 1))
    return slice(begin, end if i + 1 < parts else total)


def _suits(m: int, n: int, k: int) -> bool:
    """Tell whether a product is one for the kernel, whose tiles, always computed whole, reach beyond a side by little."""
    return _gemm.USABLE and min(m, k) >= LEAST and -m % ROWS <= m // 8 and -n % LANES <= n // 8


def _grid(m: int, n: int, threads: int) -> tuple[int, int]:
    """Cut a result into as many parts for each thread, of about twice as many columns as rows: that needs the least packing."""
    parts = threads * max(1, min(PIECES, round(m * n / (AREA * threads))))
    rows = min(
        (r for r in range(1, parts + 1) if parts % r == 0), key=lambda r: abs(math.log(2 * parts * m / n / r**2))
    )
    return max(1, min(rows, m // ROWS)), max(1, min(parts // rows, n // LANES))
