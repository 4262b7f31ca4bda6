"""The threads of NumPy's own BLAS."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from swl.backends.host.memory import MEMORY

__all__ = ["THREADED", "control", "matmul", "one_thread_each"]

THREADED = 1 << 18
"""Multiply-adds from which OpenBLAS shares a product among threads of its own. The bits depend on how many they are, and any thread
may change that for all.
"""

BUFFER = 33 << 20
"""Bytes, about, that OpenBLAS takes and keeps for each thread that is in it; where it gets none it ends the process."""


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


_lock = threading.RLock()  # a signal handler may come amid the lines that hold it, and go through all of them
_holders: set[object] = set()
_theirs = 1
_served = 1  # threads at a time for which OpenBLAS has its buffers


@contextmanager
def one_thread_each(threads: int) -> Iterator[None]:
    """Hold BLAS to the thread that calls it, of `threads`; the user's own setting is back when the last user has left."""
    global _theirs
    blas = control()
    if blas is None:
        yield
        return
    me = object()
    try:
        _holders.add(me)  # first: whoever comes and goes amid the next lines leaves the setting to us
        with _lock:
            now = blas.get()
            if now != 1:
                _theirs = now
                blas.set(1)
        _make_room(threads + len(_holders) - 1)
        yield
    finally:
        try:
            _leave(blas, me)
        finally:
            _leave(blas, me)  # an interrupt may have cut the first short


def matmul(a: Any, b: Any, out: Any = None) -> Any:
    """Multiply two matrices as `numpy.matmul`, but to the same bits whatever other threads do: on the calling thread alone."""
    if a.shape[0] * a.shape[1] * b.shape[1] < THREADED:
        return np.matmul(a, b, out=out)
    with one_thread_each(1):
        return np.matmul(a, b, out=out)


def _make_room(threads: int) -> None:
    """See that there is memory for OpenBLAS's buffers: here its lack is a MemoryError, after the pool has let go of its own."""
    global _served
    if threads > _served:
        MEMORY.allocate(_map, (threads - _served) * BUFFER)
        _served = threads


def _map(size: int) -> None:
    """Take memory from the system as OpenBLAS does, not from what the C library has at hand, and give it back."""
    try:
        mmap.mmap(-1, size).close()
    except OSError as error:
        raise MemoryError(f"Unable to allocate {size >> 20} MiB for the threads of BLAS") from error


def _leave(blas: _Control, me: object) -> None:
    """Restore the user's setting unless someone else still holds BLAS."""
    global _theirs
    _holders.discard(me)
    with _lock:
        theirs = _theirs
        if not _holders and theirs != 1:
            blas.set(theirs)
            _theirs = 1


def _begin_anew() -> None:
    """After a fork, forget the threads that stayed with the parent, and what they held."""
    global _lock
    _lock = threading.RLock()
    if _holders:
        _holders.clear()
        blas = control()
        if blas is not None:
            _leave(blas, None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
