"""Record launches with their memory, and repeat them in a program built with a sanitizer (shim/replay.h)."""

from __future__ import annotations

import ctypes
import struct
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cpu_kernels
import numpy as np
import stand_in

from swl.backends.cupy.structs import Argument

ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-sanitize=vptr")
THREAD = ("-fsanitize=thread", "-DSHIM_THREADS")


class Recording:
    """Launches, by the library that they ran in."""

    def __init__(self) -> None:
        self.launches: dict[tuple[str, ...], bytearray] = defaultdict(bytearray)  # by the kernels of the library
        self.libraries: dict[tuple[str, ...], Any] = {}
        self.kernels: set[str] = set()
        self._regions: list[tuple[int, int]] = []

    def __call__(self, library: Any, name: str, sizes: Any, args: Any, report: Any) -> None:
        """Observe a launch, before (`report` None) and after."""
        if report is None:
            arrays = [a for a in stand_in._pointed_to(args) if isinstance(a, stand_in.ndarray) and a.size]
            self._regions = _merged(sorted(map(_bounds, arrays)))
            self._before = [_memory(r) for r in self._regions]
            return
        out = self.launches[tuple(library.names)]
        self.libraries[tuple(library.names)] = library
        out += struct.pack("8q", library.names.index(name), *sizes)
        out += struct.pack("q", len(self._regions))
        for region, before in zip(self._regions, self._before, strict=True):
            out += struct.pack("2q", region[0] % 16, len(before)) + before + _memory(region)
        out += struct.pack("q", len(args))
        for arg in args:
            if isinstance(arg, Argument):
                offsets = {arg.dtype.fields[f][1]: v for f, v in arg.values.items() if isinstance(v, stand_in.ndarray)}
                out += struct.pack("3q", 3, arg.nbytes, len(offsets)) + arg.tobytes()
                for offset, array in offsets.items():
                    out += struct.pack("2q", offset, self._place(array))
            elif isinstance(arg, stand_in.ndarray):
                out += struct.pack("2q", 1, self._place(arg))
            else:
                out += struct.pack("q", 2 if isinstance(arg, np.uint64) else 0) + arg.tobytes().ljust(8, b"\0")
        self.kernels.add(name)

    def _place(self, array: Any) -> int:
        """Give region and offset of an array as one number; -1 for one without elements."""
        ptr = array.data.ptr
        found = (i << 40 | (ptr - low) for i, (low, high) in enumerate(self._regions) if low <= ptr < high)
        return next(found, -1)


def _bounds(x: Any) -> tuple[int, int]:
    return np.lib.array_utils.byte_bounds(x._host)


def _merged(bounds: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for low, high in bounds:
        if merged and low < merged[-1][1]:
            merged[-1] = merged[-1][0], max(high, merged[-1][1])
        else:
            merged.append((low, high))
    return merged


def _memory(region: tuple[int, int]) -> bytes:
    return ctypes.string_at(region[0], region[1] - region[0])


@contextmanager
def recording() -> Iterator[Recording]:
    """Record the launches made inside."""
    made = Recording()
    stand_in.observers.append(made)
    try:
        yield made
    finally:
        stand_in.observers.remove(made)


def replay(library: Any, launches: bytes, flags: tuple[str, ...], mode: int, folder: Path) -> str:
    """Repeat launches in a program built with `flags`; give what it has to complain about, or nothing."""
    program = cpu_kernels.build(
        library.source, library.names, ("-O1", "-g1", *flags), suffix="", extra='#include "replay.h"\n'
    )
    file = folder / "launches"
    file.write_bytes(launches)
    # the address space of a thread sanitizer does not fit where the kernel has spread the program's own too far
    command = ["setarch", "--addr-no-randomize", str(program), str(file), str(mode)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return "the launches do not end: a barrier or shuffle that not all threads reach"
    lines = done.stderr.splitlines()
    # AddressSanitizer says so of every program with fibers; its shadow of their stacks is right nevertheless
    complaint = "\n".join(line for line in lines if "ASan doesn't fully support makecontext" not in line)
    return complaint or (f"ended with {done.returncode}" if done.returncode else "")
