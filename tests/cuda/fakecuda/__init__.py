"""Real CuPy on a machine without a GPU: a driver, runtime, NVRTC and cuBLAS whose devices are this process.

`install` before CuPy is imported; what the driver does is told and chosen by the functions here. `strict` says what is
forbidden that CuPy would let through.
"""

from __future__ import annotations

import ctypes
import glob
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np

from . import build

lib: Any = None
"""The fake driver, once it is loaded."""
_reason: str | None = None


class _Finder:
    """Loads the fake when CuPy is first imported, and puts the two modules of `build.MODULES` in the wheel's place."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name == "cupy" and lib is None:
            missing()
        if name not in build.MODULES or lib is None:
            return None
        file = str(build.cupys_modules() / f"{name}{build.SUFFIX}")
        return importlib.util.spec_from_file_location(
            name, file, loader=importlib.machinery.ExtensionFileLoader(name, file)
        )


def install() -> str | None:
    """Have CuPy run on the fake from its first import on; return why that cannot be, as far as can be told cheaply."""
    if any(type(finder).__name__ == "_Finder" for finder in sys.meta_path):
        return None
    if "cupy" in sys.modules:
        return "needs CuPy on a fake driver, but CuPy was imported before"
    try:
        ctypes.CDLL("libcuda.so.1")
        return "needs CuPy on a fake driver, which makes way for the real one that is here"
    except OSError:
        pass
    try:
        build.check()
    except build.Unavailable as error:
        return str(error)
    sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]
    return None


def missing() -> str | None:
    """Build and load the fake, now or before; return why it cannot be had, or None."""
    global lib, _reason
    if lib is None and _reason is None:
        try:
            lib = _load(build.driver())
        except build.Unavailable as error:
            _reason = str(error)
    return _reason


def _load(folder: Path) -> Any:
    cache = build.folder() / "kernels"
    cache.mkdir(exist_ok=True)
    os.environ["CUPY_CACHE_DIR"] = str(cache)
    os.environ.setdefault("CUPY_ACCELERATORS", "")
    numba.config.DISABLE_CUDA = (
        True  # Numba's own CUDA target, which torch's test machinery asks for, is not for the fake
    )
    os.environ.setdefault("CUDA_PATH", str(folder))
    names = sorted(p.name for p in folder.glob("lib*.so*"))
    names.sort(key=lambda name: name != "libfakecuda.so")
    found, *_ = [ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL) for name in names]
    blas = glob.glob(str(Path(np.__file__).parents[1] / "numpy.libs" / "libscipy_openblas64_*.so"))
    if not blas:
        raise build.Unavailable("needs CuPy on a fake driver, which multiplies with the OpenBLAS of NumPy's wheel")
    products = ctypes.CDLL(blas[0])
    gemms = (getattr(products, f"scipy_cblas_{t}gemm64_") for t in "sd")
    found.fakecuda_gemm(*(ctypes.cast(gemm, ctypes.c_void_p) for gemm in gemms))
    for function, result in (("signature", ctypes.c_char_p), ("logged", ctypes.c_char_p)):
        getattr(found, f"fakecuda_{function}").restype = result
    found.fakecuda_signature.argtypes = (ctypes.c_void_p,)
    found.fakecuda_device_of.argtypes = (ctypes.c_void_p,)
    found.fakecuda_poison.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    command = f"{build.CXX} -O1 -fPIC -w -fpermissive -fno-strict-aliasing -fvisibility=hidden -fno-gnu-unique"
    headers = build.digest(*sorted((folder / "include").iterdir()), build.HERE / "driver/nvrtc.cpp")
    found.fakecuda_compiler(
        command.encode(), str(folder / "include").encode(), str(build.folder()).encode(), headers.encode()
    )
    version = 13000 if build.cupy()[0].endswith("13x") else 12090
    found.fakecuda_set(b"version", version)
    return found


# ------------------------------------------------------------------------------------------------ what tests choose


@contextmanager
def settings(**chosen: int) -> Iterator[None]:
    """Choose what the devices are and in which order they work; the names are those of Settings in driver/state.h."""
    before = {name: lib.fakecuda_set(name.encode(), value) for name, value in chosen.items()}
    try:
        yield
    finally:
        for name, value in before.items():
            lib.fakecuda_set(name.encode(), value)


def forgive() -> None:
    """Let the devices go on after a kernel's error, which a real one never does, and give up captures."""
    lib.fakecuda_forgive()


class Work(NamedTuple):
    """Something a device did: where, on which stream, and what it moved and multiplied, as far as the driver knows."""

    what: str
    device: int
    stream: int
    read: int
    written: int
    multiply_adds: int
    arithmetic: str


@contextmanager
def recorded() -> Iterator[list[Work]]:
    """List all work given to the devices within the block: new memory, copies, kernels, products, graphs."""
    works: list[Work] = []
    lib.fakecuda_log(1)
    try:
        yield works
    finally:
        for line in lib.fakecuda_logged().decode().splitlines():
            what, *numbers, arithmetic = line.split("\t")
            works.append(Work(what, *map(int, numbers), arithmetic))
        lib.fakecuda_log(0)


class Traffic(ctypes.Structure):
    """Bytes that kernels moved; the layout of FakeTraffic in include/fake_abi.h."""

    _fields_ = [(name, ctypes.c_longlong) for name in ("bytes_read", "bytes_written", "wide", "narrow")]


def traffic() -> Traffic:
    """Return what has moved since the last call."""
    moved = Traffic()
    lib.fakecuda_traffic(ctypes.byref(moved))
    return moved
