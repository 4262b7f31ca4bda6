"""Record launches with their memory, and repeat them in a program built with a sanitizer (fakecuda/replay.cpp)."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import fake
import numpy as np
from fakecuda import build, strict

from swl.backends.cupy.plans import CLUSTER
from swl.backends.cupy.structs import Argument

ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-sanitize=vptr")
THREAD = ("-fsanitize=thread", "-DFAKE_THREADS")


class Region(NamedTuple):
    """A piece of memory before and after."""

    low: int
    before: bytes
    after: bytes


class Call(NamedTuple):
    """A launch: its kernel, geometry, and of each argument the bytes and the pointers in them."""

    name: str
    sizes: tuple[int, ...]
    args: list[tuple[bytes, dict[int, int]]]


class Record(NamedTuple):
    """Launches that may run at the same time, and the memory that they may touch."""

    regions: list[Region]
    calls: list[Call]

    def beside(self, other: Record) -> Record:
        """Return both at once; what comes out is then not known."""
        regions = {r.low: r._replace(after=b"") for r in (*other.regions, *self.regions)}
        return Record([*regions.values()], [*self.calls, *other.calls])

    def packed(self, names: list[str]) -> bytes:
        """Write it as replay.cpp reads it."""
        out = struct.pack("q", len(self.regions))
        for low, before, after in self.regions:
            out += struct.pack("2q", low % 16, len(before)) + before + struct.pack("q", len(after)) + after
        out += struct.pack("q", len(self.calls))
        for name, sizes, args in self.calls:
            out += struct.pack("9q", names.index(name), *sizes, len(args))
            for value, pointers in args:
                out += struct.pack("q", len(value)) + value + struct.pack("q", len(pointers))
                for at, pointer in pointers.items():
                    out += struct.pack("2q", at, self._place(pointer))
        return out

    def _place(self, pointer: int) -> int:
        """Return region and offset of an address as one number; -1 for one of no element."""
        found = (
            i << 40 | (pointer - r.low) for i, r in enumerate(self.regions) if 0 <= pointer - r.low < len(r.before)
        )
        return next(found, -1)


class Recording:
    """Launches, by the kernels of the module that they are of."""

    def __init__(self) -> None:
        self.records: dict[tuple[str, ...], list[Record]] = {}
        self.sources: dict[tuple[str, ...], str] = {}
        self._alive: list[list[Any]] = []  # so that no launch gets the memory of another's temporaries

    def __call__(self, launch: strict.Launch) -> None:
        """Observe a launch, before and after."""
        with strict.unwatched():
            fake.cupy().cuda.Device().synchronize()
        arrays = [x for arg in launch.args for x in _pointers(arg).values() if x.size]
        self._alive.append(arrays)
        if not launch.done:
            self._before = [(low, _memory(low, high)) for low, high in _merged(sorted(map(_bounds, arrays)))]
            return
        regions = [Region(low, before, _memory(low, low + len(before))) for low, before in self._before]
        args = [(_bytes(arg), {at: x.data.ptr for at, x in _pointers(arg).items()}) for arg in launch.args]
        names = launch.module.names
        self.sources[names] = launch.module.code
        self.records.setdefault(names, []).append(Record(regions, [Call(launch.name, launch.sizes, args)]))

    @property
    def kernels(self) -> set[str]:
        """Return the kernels that were launched."""
        return {call.name for records in self.records.values() for record in records for call in record.calls}


def _pointers(arg: Any) -> dict[int, Any]:
    """Return the arrays that an argument points to, by where in it their addresses lie."""
    array = fake.cupy().ndarray
    if isinstance(arg, Argument):
        return {arg.dtype.fields[f][1]: v for f, v in arg.values.items() if isinstance(v, array)}
    return {0: arg} if isinstance(arg, array) else {}


def _bytes(arg: Any) -> bytes:
    return arg.tobytes() if isinstance(arg, np.ndarray | np.generic) else bytes(8)


def _bounds(x: Any) -> tuple[int, int]:
    steps = [(n - 1) * step for n, step in zip(x.shape, x.strides, strict=True)]
    return x.data.ptr + sum(min(s, 0) for s in steps), x.data.ptr + sum(max(s, 0) for s in steps) + x.itemsize


def _merged(bounds: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for low, high in bounds:
        if merged and low < merged[-1][1]:
            merged[-1] = merged[-1][0], max(high, merged[-1][1])
        else:
            merged.append((low, high))
    return merged


def _memory(low: int, high: int) -> bytes:
    return ctypes.string_at(low, high - low)


@contextmanager
def recording() -> Iterator[Recording]:
    """Record the launches made inside."""
    made = Recording()
    strict.observers.append(made)
    try:
        yield made
    finally:
        strict.observers.remove(made)


def replay(source: str, names: Iterable[str], records: list[Record], flags: tuple[str, ...], reverse: int = 0) -> str:
    """Repeat launches in a program built with `flags`; return what it has to complain about, or nothing."""
    include = (f"-I{build.HERE}", f"-I{build.driver() / 'include'}")
    common = (
        build.CXX,
        "-std=c++17",
        "-w",
        "-g1",
        "-O1",
        "-ffp-contract=off",
        "-pthread",
        "-ftls-model=initial-exec",
        *flags,
        *include,
    )
    headers = sorted(p for p in build.HERE.rglob("*") if p.suffix in (".h", ".cpp"))
    names = sorted(names)

    def program(to: Path) -> None:
        build.run(*common, build.HERE / "replay.cpp", "-o", to / "replay", "-ldl")

    def library(to: Path) -> None:
        table = "".join(
            f'fake_kernel("{name}", &{name}, {CLUSTER if name.startswith("ce_cluster") else 1}), ' for name in names
        )
        (to / "kernels.cpp").write_text(
            f'#include "device.h"\n{source}\n#define FAKE_API extern "C" __attribute__((visibility("default")))\n'
            f"FAKE_API const FakeKernel* fake_kernels() {{ static const FakeKernel all[] = {{ {table}{{}} }}; return all; }}\n"
            "FAKE_API int fake_flags[3]; int fake_flags[3] = {1};\n"
        )
        build.run(*common, "-shared", "-fPIC", to / "kernels.cpp", "-o", to / "kernels.so")

    run = build.kept(f"replay-{build.digest(common, *headers)}", program)
    kernels = build.kept(f"replayed-{build.digest(common, *headers, source, names)}", library)
    file = kernels / f"launches.{os.getpid()}"
    file.write_bytes(b"".join(record.packed(names) for record in records))
    # the address space of a thread sanitizer does not fit where the kernel has spread the program's own too far
    command = ["setarch", "--addr-no-randomize", run / "replay", kernels / "kernels.so", file, str(reverse)]
    options = {
        "ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0",
        "TSAN_OPTIONS": "report_thread_leaks=0",
    }
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **options}
        )
    except subprocess.TimeoutExpired:
        return "the launches do not end: a barrier or shuffle that not all threads reach"
    finally:
        file.unlink()
    return done.stderr or (f"ended with {done.returncode}" if done.returncode else "")
