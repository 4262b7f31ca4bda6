"""The threads of NumPy's own BLAS."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

__all__ = ["control", "one_thread_each"]


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
