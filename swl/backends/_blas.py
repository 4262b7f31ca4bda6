"""Matrix products on the threads of the pool.

NumPy's OpenBLAS has threads of its own, which go on spinning for milliseconds after a product and then fight with long
kernels that follow. So a large product is cut into tiles, the tiles are shared out to the pool, and each is multiplied by BLAS
on one thread. The tiles do not depend on the number of threads, nor do the bits. A small product is left to BLAS as it is.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from swl.backends._threads import POOL

TILES, NARROWEST = 16, 384
"""Most tiles of a product, and rows or columns of the narrowest one (docs/performance.md)."""
LARGE, WIDE, ADDED = 500_000_000, 2_000_000, 100_000
"""Multiply-adds, or numbers of the result, from which a product is shared out to the pool; fewer numbers where it is added to
what is there, which BLAS's own threads would not help with (docs/performance.md).
"""


class _Control:
    """The number of threads of NumPy's own OpenBLAS."""

    def __init__(self, library: ctypes.CDLL, prefix: str, suffix: str) -> None:
        self.get: Callable[[], int] = getattr(library, f"{prefix}openblas_get_num_threads{suffix}")
        self.set: Callable[[int], None] = getattr(library, f"{prefix}openblas_set_num_threads{suffix}")
        self.path = library._name


@functools.cache
def control() -> _Control | None:
    """Find the OpenBLAS in NumPy's wheel; None for a NumPy with another BLAS."""
    package = Path(np.__file__).parent
    for folder in (package.parent / "numpy.libs", package / ".libs", package / ".dylibs"):
        for path in sorted(folder.glob("*openblas*")):
            library = ctypes.CDLL(str(path))  # loaded already: NumPy is
            for prefix in ("scipy_", ""):
                for suffix in ("64_", "_64", ""):
                    if hasattr(library, f"{prefix}openblas_set_num_threads{suffix}"):
                        return _Control(library, prefix, suffix)
    return None


_lock = threading.Lock()
_users = 0
_theirs = 1


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Hold BLAS to the calling thread; the user's own setting is back when the last of several calls has left."""
    global _users, _theirs
    blas = control()
    if blas is None:
        yield
        return
    with _lock:
        if _users == 0:
            _theirs = blas.get()
            if _theirs != 1:
                blas.set(1)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0 and _theirs != 1:
                blas.set(_theirs)


def acc(x: Any) -> Any:
    """Bring an operand to the dtype that arithmetic uses."""
    return x if x.dtype in _ACC else x.astype(np.float32)


_ACC = (np.dtype(np.float32), np.dtype(np.float64))


def product(a: Any, b: Any, out: Any, bias: Any = None, add: int = 0) -> None:
    """``out = a @ b``, or ``out = a @ b + bias``, or ``out += a @ b``; rounded once to the dtype of `out`.

    `add` is 0 or the columns that each thread adds at a time, in memory of its own.
    """
    m, n = out.shape
    k = a.shape[1]
    direct = not add and k > 0 and a.dtype == b.dtype == out.dtype and out.dtype in _ACC
    large = m * n * k >= LARGE or m * n >= (ADDED if add else WIDE)
    if direct and not large:
        np.matmul(a, b, out=out)
        if bias is not None:
            out += bias
        return
    by_columns = n >= m or add > 0
    # a 16-bit operand that all tiles share is converted once, the other one tile by tile
    if by_columns:
        a = acc(a)
    else:
        b = acc(b)

    def tile(begin: int, end: int) -> None:
        rows, columns = (slice(None), slice(begin, end)) if by_columns else (slice(begin, end), slice(None))
        here = out[rows, columns]
        if direct:
            np.matmul(a[rows], b[:, columns], out=here)
            if bias is not None:
                here += bias[columns]
            return
        y = np.matmul(acc(a[rows]), acc(b[:, columns]))
        if bias is not None:
            y += bias[columns]
        if add and y.dtype == here.dtype:
            here += y
            return
        if add:
            y += here
        here[...] = y

    size = n if by_columns else m
    count = 1 << (min(TILES, max(1, size // NARROWEST)).bit_length() - 1)  # a power of two shares out evenly
    if add:
        count = -(-n // add)
    edges = [size * i // count for i in range(count + 1)]

    def tiles(begin: int, end: int) -> None:
        for i in range(begin, end):
            tile(edges[i], edges[i + 1])

    if not large:
        tiles(0, count)
        return
    with one_thread_each():
        POOL.run(tiles, count)
