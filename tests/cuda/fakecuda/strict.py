"""What CuPy lets through and a device, or a CUDA graph, would not: each is an error here.

- waiting for the device inside swl, other than where that is said to happen;
- copying from the host inside swl, other than in ``asarray``: a CUDA graph would repeat the captured numbers;
- a kernel argument whose dtype or layout is not that of the C++ parameter.

New memory is full of NaN. `observers` see every launch of a `cupy.RawModule`.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

import fakecuda

# ------------------------------------------------------------------------------------------------ waits and copies

# may look at results, as a user may
_OUTSIDE = ("swl.cli", "swl.demos.train", "swl.nn.gradcheck", "swl.nn.differences", "swl.distributed")
_MAY_WAIT = frozenset(("check", "info", "state_dict", "perplexity", "_number"))  # the last is for error messages
_MAY = {0: _MAY_WAIT | {"__init__"}, 1: frozenset(("asarray",))}  # by Ask in driver/state.h

waits: list[str] = []
"""What made the host wait for a device, by the names of CUDA's functions."""


def _caller_in_swl() -> tuple[str, str] | None:
    """Name module and function of swl's innermost frame, if any; who calls a helper decides, or holds a lambda."""
    frame = sys._getframe(2)
    while frame is not None:
        module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if module.startswith("swl.") and module != "swl.ops.arrays" and not name.startswith("<"):
            return module, name
        frame = frame.f_back
    return None


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p)
def _judge(ask: int, what: bytes) -> int:
    """Tell the driver whether to refuse."""
    if ask == 0:
        waits.append(what.decode())
    caller = _caller_in_swl()
    return int(caller is not None and not caller[0].startswith(_OUTSIDE) and caller[1] not in _MAY[ask])


@contextmanager
def unwatched() -> Iterator[None]:
    """Let the tests wait and copy, wherever they are called from."""
    fakecuda.lib.fakecuda_judge(None)
    try:
        yield
    finally:
        fakecuda.lib.fakecuda_judge(_judge)


# ------------------------------------------------------------------------------------------------ memory


def poisoned(size: int) -> Any:
    """Return memory of CuPy's pool, filled with NaN."""
    import cupy

    memory = cupy.get_default_memory_pool().malloc(size)
    if size:
        fakecuda.lib.fakecuda_poison(memory.ptr, size, cupy.cuda.get_current_stream().ptr)
    return memory


# ------------------------------------------------------------------------------------------------ kernels


class Forbidden(AssertionError):  # noqa: N818 - reads as what it says
    """Something that would not work, or not work well, on a device, and that CuPy does not see."""


_LETTER = {
    "float32": "f",
    "float64": "d",
    "float16": "h",
    "bfloat16": "b",
    "int32": "i",
    "int64": "l",
    "uint64": "u",
}


class Launch(NamedTuple):
    module: Any
    name: str
    sizes: tuple[int, ...]
    args: tuple[Any, ...]
    done: bool


observers: list[Callable[[Launch], None]] = []
"""Called with every launch, before and after it ran."""


class RawModule:
    """`cupy.RawModule`, whose kernels check their arguments."""

    def __init__(self, *, code: str, options: tuple[str, ...] = (), name_expressions: Any = (), **others: Any) -> None:
        self.code, self.options, self.names = code, options, tuple(name_expressions)
        self._module = _RawModule(code=code, options=options, name_expressions=name_expressions, **others)

    def get_function(self, name: str) -> Any:
        return _Checked(self, self._module.get_function(name), name)


class _Checked:
    def __init__(self, module: RawModule, kernel: Any, name: str) -> None:
        signature = fakecuda.lib.fakecuda_signature(kernel.kernel.ptr).decode().split()
        self.__dict__.update(_module=module, _kernel=kernel, _name=name, _signature=signature)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._kernel, name, value)

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], *, shared_mem: int = 0
    ) -> None:
        if len(args) != len(self._signature):
            raise Forbidden(f"{self._name} has {len(self._signature)} parameters, got {len(args)} arguments")
        for i, (parameter, arg) in enumerate(zip(self._signature, args, strict=True)):
            wrong = mismatch(parameter, arg)
            if wrong:
                raise Forbidden(f"argument {i} of {self._name} {wrong}")
        dims = tuple(v for what in (grid, block) for v in (*what, 1, 1, 1)[:3])
        if any(type(v) is not int for v in dims):
            raise Forbidden(f"{self._name}: grid {grid} and block {block} must be of int")
        if min(dims) < 1:
            raise Forbidden(f"{self._name}: an empty grid {grid} or block {block}")
        if dims[3] * dims[4] * dims[5] % 32:
            raise Forbidden(f"{self._name}: block {block} has a warp that is not full")
        launch = Launch(self._module, self._name, (*dims, shared_mem), args, False)
        for observe in observers:
            observe(launch)
        self._kernel(grid, block, args, shared_mem=shared_mem)
        for observe in observers:
            observe(launch._replace(done=True))


def mismatch(parameter: str, arg: Any) -> str:
    """Say how an argument differs from a C++ parameter, as fake_letter of device.h describes it, or nothing."""
    import cupy

    if parameter[0] == "p":
        if isinstance(arg, np.uint64) and arg == 0:
            return ""
        if not isinstance(arg, cupy.ndarray):
            return f"is a pointer, got {type(arg).__name__}"
        letter = _LETTER.get(arg.dtype.name)
        return "" if parameter == "pv" or parameter[1:] == letter else f"points to {parameter[1:]!r}, got {arg.dtype}"
    if parameter[0] == "{":
        size, members = re.fullmatch(r"\{(\d+);(.*),\}", parameter).groups()
        if not isinstance(arg, np.ndarray) or arg.dtype.names is None or arg.size != 1:
            return f"is a struct, got {type(arg).__name__}"
        fields = [arg.dtype.fields[name][:2] for name in arg.dtype.names]
        theirs = [f"{_LETTER.get(dtype.name)}@{offset}" for dtype, offset in fields]
        ours = re.sub(r"p\w+@", "u@", members).split(",")
        return "" if (int(size), ours) == (arg.dtype.itemsize, theirs) else f"is {parameter}, got {arg.dtype}"
    same = isinstance(arg, np.generic) and _LETTER.get(arg.dtype.name) == parameter
    return "" if same else f"is {parameter!r}, got {arg!r} of {type(arg).__name__}"


# ------------------------------------------------------------------------------------------------ all of it


_RawModule: Any = None


def enforce() -> None:
    """Make CuPy as strict as this module says, for good."""
    global _RawModule
    import cupy

    if _RawModule is None:
        _RawModule, cupy.RawModule = cupy.RawModule, RawModule
        RawModule.__doc__ = _RawModule.__doc__
        cupy.cuda.set_allocator(poisoned)
        fakecuda.lib.fakecuda_judge(_judge)
        device = cupy.cuda.device  # keeps what devices can do; here tests change that
        device._get_attributes = device._get_attributes.__wrapped__
