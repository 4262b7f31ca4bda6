"""Memory for large results that outlives them.

A fresh array of 100 MB costs as much in page faults as the kernel that fills it. So blocks of memory go back to a pool when the
array that was made of them, and every view of it, is gone; the next result of that size takes the same pages. A block belongs
to one array at a time: it returns by the finaliser of that array's base.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import numpy as np

__all__ = ["MEMORY", "MemoryUse", "empty_cache", "memory_use"]

SMALLEST = 1 << 20
"""Bytes from which an array comes from the pool: below, the C library keeps pages itself."""
LIMIT = 1 << 30
"""Bytes that the pool keeps for later at most; beyond, the oldest blocks go back to the system."""
_ALIGN = 64


class MemoryUse(NamedTuple):
    """What `memory_use` reports, in bytes."""

    in_use: int
    """Held by results that are alive."""
    kept: int
    """Free, and kept for later."""


class _Block:
    """The base of a pooled array: hands its memory back when the last view of it dies."""

    __slots__ = ("__array_interface__", "_memory", "_pool")

    def __init__(self, pool: HostPool, memory: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._pool, self._memory = pool, memory
        start = -memory.ctypes.data % _ALIGN
        self.__array_interface__ = {
            "version": 3, "shape": (memory.size - start,), "typestr": "|u1", "data": (memory.ctypes.data + start, False),
        }  # fmt: skip

    def __del__(self) -> None:
        self._pool.give_back(self._memory)


class HostPool:
    """Blocks of memory by size, the most recently returned first."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a finaliser may run anywhere, in here too
        self._free: list[Any] = []  # oldest first
        self._in_use = 0

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Give an uninitialised C-ordered array."""
        dtype = np.dtype(dtype)
        size = dtype.itemsize
        for n in shape:
            size *= n
        if size < SMALLEST:
            return np.empty(shape, dtype)
        size += _ALIGN
        memory = self._take(size)
        if memory is None:
            memory = np.empty(size, np.uint8)
        with self._lock:
            self._in_use += memory.size
        block = _Block(self, memory, shape, dtype)
        return np.asarray(block)[: size - _ALIGN].view(dtype).reshape(shape)

    def _take(self, size: int) -> Any:
        with self._lock:
            for i in range(len(self._free) - 1, -1, -1):
                if size <= self._free[i].size <= size + size // 8:  # nearly as large: no waste, no shortage
                    return self._free.pop(i)
        return None

    def give_back(self, memory: Any) -> None:
        """Keep a block for later."""
        with self._lock:
            self._in_use -= memory.size
            self._free.append(memory)
            while sum(block.size for block in self._free) > LIMIT:
                self._free.pop(0)

    def clear(self) -> None:
        """Give what is free back to the system."""
        with self._lock:
            self._free.clear()

    def use(self) -> MemoryUse:
        """Count the bytes."""
        with self._lock:
            return MemoryUse(self._in_use, sum(block.size for block in self._free))


MEMORY = HostPool()


def empty_cache() -> None:
    """Give the memory that the Numba backend keeps for later results back to the system.

    Examples
    --------
    >>> import swl
    >>> swl.empty_cache()
    >>> swl.memory_use().kept
    0
    """
    MEMORY.clear()


def memory_use() -> MemoryUse:
    """Tell how many bytes the Numba backend's large results hold, and how many it keeps for later ones."""
    return MEMORY.use()
