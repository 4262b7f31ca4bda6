"""Memory for large results that outlives them.

A fresh array of 100 MB costs as much in page faults as the kernel that fills it. So blocks of memory go back to a pool when the
array that was made of them, and every view of it, is gone; the next result of that size takes the same pages. A block belongs
to one array at a time: it returns by the finaliser of that array's base.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
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

    __slots__ = ("__array_interface__", "__weakref__", "_memory", "_pool")

    def __init__(self, pool: HostPool, memory: Any) -> None:
        self._pool, self._memory = pool, memory
        address: int = memory.ctypes.data
        start = -address % _ALIGN
        self.__array_interface__ = {
            "version": 3, "shape": (memory.size - start,), "typestr": "|u1", "data": (address + start, False),
        }  # fmt: skip

    def __del__(self) -> None:
        if hasattr(self, "_memory"):  # else an interrupt came before it was there
            self._pool.give_back(self._memory)


class _InUse(weakref.ref[_Block]):
    """Counts a block for as long as it lives; no interrupt can come between its end and the count's."""

    __slots__ = ("size",)

    size: int


class HostPool:
    """Blocks of memory by size, the most recently returned first.

    A finaliser or a signal handler may run anywhere, in another thread or amid the pool's own lines, and use the pool. So there
    is no lock: each step is one atomic operation on a dict or a set, and whoever removes a block from `_free` has it.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self._free: dict[tuple[int, int], Any] = {}  # by size and identity, oldest first
        self._in_use: set[_InUse] = set()

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return an uninitialised C-ordered array."""
        dtype = np.dtype(dtype)
        size = dtype.itemsize * math.prod(shape)
        if size < SMALLEST:
            return self.allocate(np.empty, shape, dtype)
        block = _Block(self, self._take(size + _ALIGN))
        in_use = _InUse(block, self._in_use.discard)
        in_use.size = block._memory.size
        self._in_use.add(in_use)
        return np.asarray(block)[:size].view(dtype).reshape(shape)

    def allocate(self, make: Callable[..., Any], /, *args: Any, **named: Any) -> Any:
        """Return ``make(*args, **named)``; where memory is short, let go of what is free and try once more."""
        try:
            return make(*args, **named)
        except MemoryError:
            self.clear()
        return make(*args, **named)

    def _take(self, size: int) -> Any:
        for key in reversed(list(self._free)):
            if size <= key[0] <= size + size // 8:  # nearly as large: no waste, no shortage
                memory = self._free.pop(key, None)
                if memory is not None:
                    return memory
        return self.allocate(np.empty, size, np.uint8)

    def give_back(self, memory: Any) -> None:
        """Keep a block for later."""
        self._free[memory.size, id(memory)] = memory
        blocks = list(self._free)
        beyond = sum(size for size, _ in blocks) - self.limit
        for block in blocks:
            if beyond <= 0:
                return
            self._free.pop(block, None)
            beyond -= block[0]

    def clear(self) -> None:
        """Give what is free back to the system."""
        self._free.clear()

    def use(self) -> MemoryUse:
        """Count the bytes."""
        in_use = sum(block.size for block in self._in_use.copy())
        return MemoryUse(in_use, sum(size for size, _ in list(self._free)))


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
