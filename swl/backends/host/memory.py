"""Memory for large results that outlives them.

A fresh array of 100 MB costs as much in page faults as the kernel that fills it. So blocks of memory go back to a pool when the
array that was made of them, and every view of it, is gone; the next result of that size takes the same pages. A block belongs
to one array at a time: it returns by the finaliser of that array's base.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from typing import Any, NamedTuple

import numpy as np

__all__ = ["MEMORY", "MemoryUse", "empty_cache", "memory_use"]

SMALLEST = 1 << 20
"""Bytes from which an array comes from the pool: below, the C library keeps pages itself."""
LIMIT = 1 << 30
"""Bytes that a pool keeps for later at most; beyond, the oldest blocks go back to the system."""
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

    def __init__(self, pool: HostPool, memory: Any) -> None:
        self._pool, self._memory = pool, memory
        address: int = memory.ctypes.data
        start = -address % _ALIGN
        self.__array_interface__ = {
            "version": 3, "shape": (memory.size - start,), "typestr": "|u1", "data": (address + start, False),
        }  # fmt: skip

    def __del__(self) -> None:
        self._pool.give_back(self._memory)


class HostPool:
    """Blocks of memory by size, the most recently returned first.

    A finaliser may run anywhere: in another thread, or amid the pool's own lines. So it only leaves the memory in a queue, which
    needs no lock, and whoever holds the lock puts it where it belongs.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self._free: list[Any] = []  # oldest first
        self._returned: deque[Any] = deque()
        self._in_use = self._kept = 0
        self.unlock()

    def unlock(self) -> None:
        """Begin with a new lock: after a fork, the thread that held the old one is with the parent."""
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Give an uninitialised C-ordered array."""
        dtype = np.dtype(dtype)
        size = dtype.itemsize * math.prod(shape)
        if size < SMALLEST:
            return np.empty(shape, dtype)
        memory = self._take(size + _ALIGN)
        return np.asarray(_Block(self, memory))[:size].view(dtype).reshape(shape)

    def _take(self, size: int) -> Any:
        with self._lock:
            self._sort_in()
            for i in range(len(self._free) - 1, -1, -1):
                if size <= self._free[i].size <= size + size // 8:  # nearly as large: no waste, no shortage
                    memory = self._free.pop(i)
                    self._kept -= memory.size
                    break
            else:
                memory = np.empty(size, np.uint8)
            self._in_use += memory.size
            return memory

    def give_back(self, memory: Any) -> None:
        """Keep a block for later."""
        self._returned.append(memory)
        if self._lock.acquire(blocking=False):  # else its holder, or the next one, does this
            try:
                self._sort_in()
            finally:
                self._lock.release()

    def _sort_in(self) -> None:
        while self._returned:
            memory = self._returned.popleft()
            self._in_use -= memory.size
            self._kept += memory.size
            self._free.append(memory)
        while self._kept > self.limit:
            self._kept -= self._free.pop(0).size

    def clear(self) -> None:
        """Give what is free back to the system."""
        with self._lock:
            self._sort_in()
            self._free.clear()
            self._kept = 0

    def use(self) -> MemoryUse:
        """Count the bytes."""
        with self._lock:
            self._sort_in()
            return MemoryUse(self._in_use, self._kept)


MEMORY = HostPool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=MEMORY.unlock)


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
