"""Working memory of the compiled kernels: each thread's own, used again by every call and grown where one needs more.

Kernels allocate nothing. What compiled code allocates is freed after the last use that Numba knows of, and Numba does not know that
a view (`swl.backends.numba.simd.views.Row`) uses it. The memory of a kernel's arguments outlives the call.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from swl.backends.host.memory import MEMORY

__all__ = ["LINE", "scratch"]

LINE = 64
"""Bytes of a cache line: where the memory begins."""

KEPT = 1 << 22
"""Bytes that a thread keeps for each dtype, at most; a call that needs more gets memory of its own."""


class _Own(threading.local):
    def __init__(self) -> None:
        self.rooms: dict[Any, Any] = {}


_own = _Own()


def scratch(size: int, dtype: Any) -> Any:
    """Return a vector of at least `size` numbers, at a cache line.

    What is in it is lost between two kernels: a signal handler may run there, and call kernels itself. None runs within one.
    """
    room = _own.rooms.get(dtype)
    if room is None or room.size < size:
        room = _aligned(size, dtype)
        if room.nbytes <= KEPT:
            _own.rooms[dtype] = room
    return room


def _aligned(size: int, dtype: Any) -> Any:
    memory = MEMORY.allocate(np.empty, size + LINE // dtype.itemsize, dtype)
    skipped = -memory.ctypes.data % LINE // dtype.itemsize
    return memory[skipped : skipped + size]
