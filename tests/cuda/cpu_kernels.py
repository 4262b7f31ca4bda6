"""Compile CUDA C for the CPU with the shim, and launch kernels on NumPy memory.

One shared library per source and list of kernels, kept under a hash of everything that went into it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

SHIM = Path(__file__).parent / "shim"
CXX = os.environ.get("CXX") or "g++"
# no contraction of a·b + c: the device compiler is told the same, so the source alone decides on the bits
BASE_FLAGS = ("-x", "c++", "-std=c++17", "-ffp-contract=off", "-w", "-pthread")
FORWARD, REVERSE, THREADS = 0, 1, 2


class Report(ctypes.Structure):
    """What one launch did; the layout of shim::Report."""

    _fields_ = [
        ("bytes_read", ctypes.c_int64),
        ("bytes_written", ctypes.c_int64),
        ("wide_accesses", ctypes.c_int64),
        ("narrow_accesses", ctypes.c_int64),
        ("error", ctypes.c_char * 256),
    ]


class Parameter(NamedTuple):
    """One parameter of a kernel: what `letter` in cuda_shim.h says, without its p."""

    pointer: bool
    letter: str


def missing_compiler() -> str | None:
    """Say why kernels cannot be compiled here, or None if they can."""
    if shutil.which(CXX) is None:
        return f"needs a C++ compiler: {CXX} is not on the PATH (apt install g++, or set CXX)"
    return None


def cache_folder() -> Path:
    """Where compiled libraries are kept between runs."""
    root = os.environ.get("SWL_SHIM_CACHE")
    folder = Path(root) if root else Path(tempfile.gettempdir()) / f"swl-shim-{os.getuid()}"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def unit(source: str, names: Sequence[str], extra: str = "") -> str:
    """Give the C++ translation unit of a CUDA source: the shim, the source, its kernels, the scheduler."""
    table = ",\n".join(f"  kernel(&{name})" for name in names)
    return (
        f'#include "cuda_shim.h"\n{source}\n'
        f"namespace shim {{\nconst std::vector<Kernel> kernels = {{\n{table}\n}};\n}}\n"
        f'#include "scheduler.h"\n{extra}'
    )


def build(source: str, names: Sequence[str], flags: Sequence[str], suffix: str = ".so", extra: str = "") -> Path:
    """Compile the kernels `names` of a CUDA source; give the file, made now or before."""
    text = unit(source, names, extra)
    digest = hashlib.sha256()
    for part in (CXX, *BASE_FLAGS, *flags, text, *(p.read_text() for p in sorted(SHIM.iterdir()))):
        digest.update(part.encode() + b"\0")
    target = cache_folder() / (digest.hexdigest()[:24] + suffix)
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:  # so that two processes cannot meet
            made = Path(scratch) / target.name
            command = [CXX, *BASE_FLAGS, *flags, f"-I{SHIM}", "-", "-o", str(made)]
            done = subprocess.run(command, input=text, text=True, capture_output=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr[:4000]}")
            made.replace(target)
    return target


class Library:
    """Compiled kernels, by name."""

    def __init__(self, source: str, names: Sequence[str], optimise: str = "-O2") -> None:
        self.names, self.source = list(names), source
        self._library = ctypes.CDLL(str(build(source, names, (optimise, "-fPIC", "-shared"))))
        self._library.shim_signature.restype = ctypes.c_char_p
        self.signatures = {name: self._signature(i) for i, name in enumerate(self.names)}

    def _signature(self, index: int) -> tuple[Parameter, ...]:
        letters = self._library.shim_signature(index).decode().split()
        return tuple(Parameter(one[0] == "p", one.removeprefix("p")) for one in letters)

    def launch(self, name: str, sizes: Sequence[int], values: Sequence[Any], mode: int) -> Report:
        """Run one launch; `sizes` are grid, block and bytes of shared memory, `values` ctypes objects.

        Raises
        ------
        RuntimeError
            If the kernel broke a rule: the message is the shim's.
        """
        report = Report()
        args = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        failed = self._library.shim_launch(
            self.names.index(name), (ctypes.c_int64 * 7)(*sizes), args, mode, ctypes.byref(report)
        )
        if failed:
            raise RuntimeError(f"{name}{tuple(sizes)}: {report.error.decode(errors='replace')}")
        return report
