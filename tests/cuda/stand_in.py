"""A stand-in for the CuPy that the backend uses, over NumPy memory and kernels compiled for the CPU. It is stricter.

Let through are only names and keyword arguments that are listed here, each of which CuPy has (a test holds the list
against CuPy itself). An error is raised for

- a NumPy array where CuPy wants its own, and an array of this module where NumPy would convert it silently;
- waiting for the device inside swl (``.get()``, ``float(x)``, ``bool(x)``, printing …), other than in ``check``;
- copying from the host inside swl, other than in ``asarray``: in a CUDA graph it would repeat the captured numbers;
- a kernel argument whose dtype is not that of the C++ parameter;
- work on an array of a device that is not the current one, which with CuPy runs on the wrong device or not at all;
- launch geometry or shared memory that the oldest supported device (compute capability 7.5) forbids.

New memory is full of NaN or of 0xAA bytes, and on the current device. `recorded` tells which work ran on which device and
stream.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import cpu_kernels
import numpy as np

from swl.backends.cupy.structs import Argument

__version__ = "14.2.0"

ORDER = cpu_kernels.FORWARD  # of fibers and blocks; tests set it
OPTIMISE = "-O2"
ATTRIBUTES = {"MultiProcessorCount": 132, "MaxSharedMemoryPerBlockOptin": 227 * 1024}  # of an H100; tests set them


class Forbidden(AssertionError):  # noqa: N818 - reads as what it says
    """Something that would not work, or not work well, with CuPy on a device."""


# ------------------------------------------------------------------------------------------------ waiting

_OUTSIDE = ("swl.cli", "swl.demos.train", "swl.nn.gradcheck", "swl.distributed")  # may look at results, as a user may
_MAY_WAIT = frozenset(
    ("check", "info", "state_dict", "perplexity", "_number")
)  # the last puts values into error messages


def _caller_in_swl(but: frozenset[str]) -> str | None:
    """Name the innermost function of swl's that is running, unless it is one of `but` or may wait."""
    frame = sys._getframe(2)
    while frame is not None:
        module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        # who calls a helper decides, or who holds a comprehension or lambda
        if module.startswith("swl.") and module != "swl.ops.arrays" and not name.startswith("<"):
            return None if name in but or module.startswith(_OUTSIDE) else f"{module}.{name}"
        frame = frame.f_back
    return None


def _waits(what: str) -> None:
    caller = _caller_in_swl(_MAY_WAIT)
    if caller:
        raise Forbidden(f"{what} waits for the device, in {caller}")


# ------------------------------------------------------------------------------------------------ devices, streams


N_DEVICES = 2


class _Current(threading.local):
    def __init__(self) -> None:
        self.device = 0
        self.streams: list[list[Any]] = [[Stream.null] for _ in range(N_DEVICES)]


class Device:
    def __init__(self, device: int | Device | None = None) -> None:
        self.id = _current.device if device is None else getattr(device, "id", device)
        if not 0 <= self.id < N_DEVICES:
            raise RuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
        self._before: list[int] = []

    def __enter__(self) -> Device:
        self._before.append(_current.device)
        _current.device = self.id
        return self

    def __exit__(self, *_: object) -> None:
        _current.device = self._before.pop()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and other.id == self.id

    def __hash__(self) -> int:
        return self.id

    def use(self) -> None:
        _current.device = self.id

    def synchronize(self) -> None:
        _waits("Device.synchronize()")

    @property
    def attributes(self) -> dict[str, int]:
        return ATTRIBUTES

    @property
    def compute_capability(self) -> str:
        return "90"


class _BaseStream:
    """Keeps, as CuPy does, one stack of streams for each device and thread."""

    def __init__(self, ptr: int, device_id: int = -1) -> None:
        self.ptr, self.device_id = ptr, device_id

    def __enter__(self) -> _BaseStream:
        if self.device_id not in (-1, _current.device):
            raise RuntimeError(
                f"The device that the stream is created on ({self.device_id}) "
                f"does not match with the current device ({_current.device})"
            )
        _current.streams[_current.device].append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _current.streams[_current.device].pop()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BaseStream) and other.ptr == self.ptr

    def __hash__(self) -> int:
        return self.ptr

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.ptr

    def synchronize(self) -> None:
        if _caller_in_swl(frozenset(("__init__",))):
            _waits("Stream.synchronize()")


class Stream(_BaseStream):
    null: Stream
    _pointers = itertools.count(0x5000, 16)

    def __init__(self, null: bool = False, non_blocking: bool = False) -> None:
        if null:
            super().__init__(0)
        else:
            super().__init__(next(self._pointers), _current.device)

    @classmethod
    def from_external(cls, obj: Any) -> Stream:
        version, ptr = obj.__cuda_stream__()
        if version != 0:
            raise TypeError(f"__cuda_stream__() returned unsupported version {version}, only version 0 is supported")
        self = cls(null=True)
        self.ptr, self._keep = ptr, obj
        return self


Stream.null = Stream(null=True)
_current = _Current()


class ExternalStream(_BaseStream):
    """Deprecated by CuPy: a caller may have one, but nothing here may make one."""


def get_current_stream(device_id: int = -1) -> Any:
    return _current.streams[_current.device if device_id == -1 else device_id][-1]


class Work(NamedTuple):
    """Something a device did: where, and on which stream."""

    what: str
    device: int
    stream: int


_recordings: list[list[Work]] = []


@contextmanager
def recorded() -> Iterator[list[Work]]:
    """List all work within the block: allocations, copies from the host, CuPy's kernels, swl's kernels and cuBLAS."""
    works: list[Work] = []
    _recordings.append(works)
    try:
        yield works
    finally:
        _recordings.remove(works)


def _works(what: str, *operands: Any) -> None:
    """Record work on the current device, where all operands that are arrays must be."""
    here = _current.device
    for x in operands:
        if isinstance(x, ndarray | _Address) and x._device != here:
            raise Forbidden(f"{what} of an array on device {x._device}, but {here} is current")
    for works in _recordings:
        works.append(Work(what, here, get_current_stream().ptr))


# ------------------------------------------------------------------------------------------------ arrays


class _Address(int):
    """An address in the memory of a device."""

    _device: int


class _MemoryPointer:
    def __init__(self, ptr: int, device: int) -> None:
        self.ptr = _Address(ptr)
        self.ptr._device = device


def _forbidden_method(name: str) -> Callable[..., Any]:
    def method(self: ndarray, *args: Any, **kwargs: Any) -> Any:
        _waits(f"ndarray.{name}")
        return getattr(self._host, name)(*args, **kwargs)

    return method


class ndarray:  # noqa: N801 - CuPy's name
    """An array in the memory of a device: NumPy memory that NumPy cannot see."""

    __array_priority__ = 100
    __array_ufunc__ = None

    def __init__(self, host: np.ndarray[Any, Any], device: int | None = None) -> None:
        self._host = host
        self._device = _current.device if device is None else device

    shape = property(lambda self: self._host.shape)
    dtype = property(lambda self: self._host.dtype)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    nbytes = property(lambda self: self._host.nbytes)
    itemsize = property(lambda self: self._host.itemsize)
    strides = property(lambda self: self._host.strides)
    device = property(lambda self: Device(self._device))
    data = property(lambda self: _MemoryPointer(self._host.__array_interface__["data"][0], self._device))
    T = property(lambda self: ndarray(self._host.T, self._device))

    @property
    def flags(self) -> Any:  # CuPy's flags know no "writeable"
        flags = self._host.flags
        return SimpleNamespace(c_contiguous=flags.c_contiguous, f_contiguous=flags.f_contiguous, owndata=flags.owndata)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        host = dict(self._host.__array_interface__)
        where = {"data": (self.data.ptr, False), "version": 3, "stream": 1}
        return {key: host[key] for key in ("shape", "typestr", "strides")} | where

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self._device

    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("the emulated device hands out no DLPack capsules")

    def __len__(self) -> int:
        return len(self._host)

    def __iter__(self) -> Any:
        return (self[i] for i in range(len(self)))

    # what waits for the device: legal for a user, an error inside swl
    def get(self) -> np.ndarray[Any, Any]:
        _waits("ndarray.get()")
        return self._host.copy()

    item = _forbidden_method("item")
    tolist = _forbidden_method("tolist")
    __float__ = _forbidden_method("__float__")
    __int__ = _forbidden_method("__int__")
    __index__ = _forbidden_method("__index__")
    __bool__ = _forbidden_method("__bool__")
    __repr__ = _forbidden_method("__repr__")
    __str__ = _forbidden_method("__str__")
    __format__ = _forbidden_method("__format__")

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()` explicitly.")

    # methods
    def _viewed(self, what: str, host: np.ndarray[Any, Any]) -> ndarray:
        """Give NumPy's view of the memory, or the copy that it had to make, which CuPy's kernels make on a device."""
        if np.may_share_memory(host, self._host) or not host.size:
            return ndarray(host, self._device)
        return _new(what, host, self)

    def reshape(self, *shape: Any) -> ndarray:
        return self._viewed("reshape", self._host.reshape(*shape))

    def astype(self, dtype: Any, copy: bool = True) -> ndarray:
        if not copy and self._host.dtype == dtype:
            return self
        with np.errstate(all="ignore"):
            return _new("astype", self._host.astype(dtype), self)

    def copy(self) -> ndarray:
        return _new("copy", self._host.copy(), self)

    def fill(self, value: Any) -> None:
        _scalar_only(value)
        _works("fill", self)
        self._host.fill(value)

    def view(self, dtype: Any = None) -> ndarray:
        return ndarray(self._host.view(dtype), self._device)

    def ravel(self) -> ndarray:
        return self._viewed("ravel", self._host.ravel())

    def transpose(self, *axes: Any) -> ndarray:
        return ndarray(self._host.transpose(*axes), self._device)

    def swapaxes(self, axis1: int, axis2: int) -> ndarray:
        return ndarray(self._host.swapaxes(axis1, axis2), self._device)

    def squeeze(self, axis: Any = None) -> ndarray:
        return ndarray(self._host.squeeze(axis), self._device)

    def _reduced(self, name: str, axis: Any, dtype: Any, keepdims: bool) -> ndarray:
        kwargs = {"dtype": dtype} if name in ("sum", "mean") else {}
        with np.errstate(all="ignore"):
            return _new(name, getattr(self._host, name)(axis=axis, keepdims=keepdims, **kwargs), self)

    def sum(self, axis: Any = None, dtype: Any = None, keepdims: bool = False) -> ndarray:
        return self._reduced("sum", axis, dtype, keepdims)

    def mean(self, axis: Any = None, dtype: Any = None, keepdims: bool = False) -> ndarray:
        return self._reduced("mean", axis, dtype, keepdims)

    def max(self, axis: Any = None, keepdims: bool = False) -> ndarray:
        return self._reduced("max", axis, None, keepdims)

    def min(self, axis: Any = None, keepdims: bool = False) -> ndarray:
        return self._reduced("min", axis, None, keepdims)

    def all(self, axis: Any = None, keepdims: bool = False) -> ndarray:
        return self._reduced("all", axis, None, keepdims)

    def any(self, axis: Any = None, keepdims: bool = False) -> ndarray:
        return self._reduced("any", axis, None, keepdims)

    def argmax(self, axis: Any = None) -> ndarray:
        return _new("argmax", self._host.argmax(axis=axis), self)

    # indexing
    def __getitem__(self, key: Any) -> ndarray:
        keys = key if isinstance(key, tuple) else (key,)
        if any(isinstance(k, ndarray) for k in keys):
            return _new("take", self._host[_index(key)], self, *keys)
        return ndarray(np.asarray(self._host[_index(key)]), self._device)

    def __setitem__(self, key: Any, value: Any) -> None:
        _works("assignment", self, value, *(key if isinstance(key, tuple) else (key,)))
        with np.errstate(all="ignore"):
            self._host[_index(key)] = _operand(value)


def _binary(name: str) -> Callable[[ndarray, Any], Any]:
    def method(self: ndarray, other: Any) -> Any:
        with np.errstate(all="ignore"):
            result = getattr(self._host, name)(_operand(other))
        return result if result is NotImplemented else _new(name, result, self, other)

    return method


def _in_place(name: str) -> Callable[[ndarray, Any], Any]:
    def method(self: ndarray, other: Any) -> Any:
        _works(name, self, other)
        with np.errstate(all="ignore"):
            getattr(self._host, name)(_operand(other))
        return self

    return method


def _unary(name: str) -> Callable[[ndarray], Any]:
    return lambda self: _new(name, getattr(self._host, name)(), self)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"):
    setattr(ndarray, f"__{_name}__", _binary(f"__{_name}__"))
    setattr(ndarray, f"__r{_name}__", _binary(f"__r{_name}__"))
    setattr(ndarray, f"__i{_name}__", _in_place(f"__i{_name}__"))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(ndarray, f"__{_name}__", _binary(f"__{_name}__"))
for _name in ("neg", "pos", "abs", "invert"):
    setattr(ndarray, f"__{_name}__", _unary(f"__{_name}__"))
ndarray.__hash__ = None  # type: ignore[assignment]


def _aligned(shape: Any, dtype: Any) -> np.ndarray[Any, Any]:
    """Give memory as CuPy's pool does, on a boundary of 512 bytes."""
    dtype = np.dtype(dtype)
    n = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(n + 512, np.uint8)
    start = -raw.__array_interface__["data"][0] % 512
    return raw[start : start + n].view(dtype).reshape(shape)


def _new(what: str, value: Any, *operands: Any) -> ndarray:
    """Wrap a result that NumPy got from the operands in new memory, which CuPy takes on the current device."""
    _works(what, *operands)
    value = np.asarray(value)
    if value.dtype.kind in "OUSVM" and value.dtype.name != "bfloat16":
        raise ValueError(f"Unsupported dtype {value.dtype}")
    turned = value.ndim > 1 and value.flags.f_contiguous and not value.flags.c_contiguous
    host = _aligned(value.shape[::-1], value.dtype).T if turned else _aligned(value.shape, value.dtype)
    host[...] = value
    return ndarray(host)


def _scalar_only(value: Any) -> None:
    if not isinstance(value, int | float | bool | np.generic):
        raise TypeError(f"Unsupported type {type(value)}")


def _operand(value: Any) -> Any:
    """Give NumPy's view of an operand: an array of a device, or a scalar."""
    if isinstance(value, ndarray):
        return value._host
    _scalar_only(value)
    return value


def _index(key: Any) -> Any:
    def one(k: Any) -> Any:
        if isinstance(k, ndarray):
            if k.dtype == bool and _caller_in_swl(_MAY_WAIT):
                _waits("indexing with a mask, whose result has a size that only the device knows,")
            return k._host
        if isinstance(k, np.ndarray):
            raise TypeError("Unsupported type <class 'numpy.ndarray'> as an index")
        return k

    return tuple(map(one, key)) if isinstance(key, tuple) else one(key)


def _poisoned(shape: Any, dtype: Any) -> ndarray:
    _works("empty")
    host = _aligned(shape, dtype)
    if host.dtype.kind == "f" or host.dtype.name == "bfloat16":
        host.fill(np.nan)
    elif host.size:
        host.reshape(-1).view(np.uint8).fill(0xAA)
    return ndarray(host)


# ------------------------------------------------------------------------------------------------ functions


def _no_copy_in_swl(x: Any) -> None:
    caller = _caller_in_swl(frozenset(("asarray",)))
    if caller:
        raise Forbidden(f"copying {type(x).__name__} from the host, in {caller}: a CUDA graph would repeat its value")


def asarray(a: Any, dtype: Any = None) -> ndarray:
    if isinstance(a, ndarray):
        return a if dtype is None else a.astype(dtype, copy=False)
    if hasattr(a, "__cuda_array_interface__"):
        interface = a.__cuda_array_interface__
        holder = SimpleNamespace(__array_interface__={**interface, "version": 3}, keep=a)
        return asarray(ndarray(np.asarray(holder), interface["data"][0]._device), dtype)
    _no_copy_in_swl(a)
    return _new("copy from the host", np.asarray(a, dtype=dtype))


def from_dlpack(array: Any) -> ndarray:
    if isinstance(array, ndarray):
        return array
    raise BufferError("the emulated device takes no DLPack capsules")


def empty(shape: Any = (), dtype: Any = float) -> ndarray:
    return _poisoned(shape, dtype)


def zeros(shape: Any, dtype: Any = float) -> ndarray:
    return full(shape, 0, dtype)


def ones(shape: Any, dtype: Any = float) -> ndarray:
    return full(shape, 1, dtype)


def full(shape: Any, fill_value: Any, dtype: Any = None) -> ndarray:
    _scalar_only(fill_value)
    return _new("full", np.full(shape, fill_value, dtype))


def _like(name: str) -> Callable[..., ndarray]:
    def function(a: ndarray, /, dtype: Any = None) -> ndarray:
        if name == "empty_like":
            return empty(a.shape, dtype or a.dtype)
        return full(a.shape, 0 if name == "zeros_like" else 1, dtype or a.dtype)

    return function


empty_like, zeros_like, ones_like = _like("empty_like"), _like("zeros_like"), _like("ones_like")


def ascontiguousarray(a: Any, dtype: Any = None) -> ndarray:
    if not isinstance(a, ndarray):
        _no_copy_in_swl(a)
        a = asarray(a)
    if a.ndim == 0 or (a._host.flags.c_contiguous and (dtype is None or a.dtype == dtype)):
        return asarray(a, dtype) if a.ndim else asarray(a, dtype).reshape(1)
    return _new("ascontiguousarray", np.ascontiguousarray(a._host, dtype=dtype), a)


def arange(start: Any, stop: Any = None, step: Any = 1, dtype: Any = None) -> ndarray:
    return _new("arange", np.arange(start, stop, step, dtype) if stop is not None else np.arange(start, dtype=dtype))


def _elementwise(name: str, n: int) -> Callable[..., ndarray]:
    def function(*args: Any, out: ndarray | None = None) -> ndarray:
        if len(args) != n:
            raise TypeError(f"{name} takes {n} arguments")
        if not any(isinstance(a, ndarray) for a in args):
            raise TypeError(f"Unsupported type {type(args[0])}: {name} wants an array of the device")
        with np.errstate(all="ignore"):
            value = getattr(np, name)(*(_operand(a) for a in args))
        if out is None:
            return _new(name, value, *args)
        _works(name, *args, out)
        out._host[...] = value
        return out

    return function


exp, log, tanh, sqrt, abs, isnan, isfinite, expm1, log1p = (
    _elementwise(name, 1) for name in ("exp", "log", "tanh", "sqrt", "abs", "isnan", "isfinite", "expm1", "log1p")
)
maximum, minimum = _elementwise("maximum", 2), _elementwise("minimum", 2)


def where(condition: ndarray, x: Any, y: Any) -> ndarray:
    if not isinstance(condition, ndarray):
        raise TypeError(f"Unsupported type {type(condition)}")
    return _new("where", np.where(condition._host, _operand(x), _operand(y)), condition, x, y)


def matmul(x1: ndarray, x2: ndarray, /, out: ndarray | None = None) -> ndarray:
    acc = np.float64 if np.float64 in (x1.dtype, x2.dtype) else np.float32
    value = np.matmul(x1._host.astype(acc), _operand(x2).astype(acc))
    if out is None:
        return _new("matmul", value.astype(result_type(x1, x2)), x1, x2)
    _works("matmul", x1, x2, out)
    out._host[...] = value
    return out


def concatenate(tup: Sequence[ndarray], axis: int = 0) -> ndarray:
    return _new("concatenate", np.concatenate([a._host for a in tup], axis=axis), *tup)


def stack(tup: Sequence[ndarray], axis: int = 0) -> ndarray:
    return _new("stack", np.stack([a._host for a in tup], axis=axis), *tup)


def take_along_axis(a: ndarray, indices: ndarray, axis: int) -> ndarray:
    return _new("take_along_axis", np.take_along_axis(a._host, indices._host, axis), a, indices)


class add:  # noqa: N801 - CuPy's name
    @staticmethod
    def reduceat(array: ndarray, indices: ndarray, axis: int = 0) -> ndarray:
        return _new("add.reduceat", np.add.reduceat(array._host, indices._host, axis=axis), array, indices)


def searchsorted(a: ndarray, v: ndarray) -> ndarray:
    return _new("searchsorted", np.searchsorted(a._host, v._host), a, v)


def argsort(a: ndarray, axis: int = -1, kind: str | None = None) -> ndarray:
    if kind not in (None, "stable"):
        raise ValueError("kind can only be None or 'stable'")
    return _new("argsort", np.argsort(a._host, axis=axis, kind="stable"), a)  # CuPy's default, and its only kind


def argpartition(a: ndarray, kth: int, axis: int = -1) -> ndarray:
    return _new("argpartition", np.argpartition(a._host, kth, axis=axis), a)


def broadcast_to(array: ndarray, shape: Any) -> ndarray:
    return ndarray(np.broadcast_to(array._host, shape), array._device)


def result_type(*args: Any) -> np.dtype[Any]:
    return np.result_type(*(a.dtype if isinstance(a, ndarray) else a for a in args))


def may_share_memory(a: ndarray, b: ndarray) -> bool:
    return np.may_share_memory(a._host, b._host)


shares_memory = may_share_memory


def asnumpy(a: ndarray) -> np.ndarray[Any, Any]:
    return a.get()


float16, float32, float64 = np.float16, np.float32, np.float64
int8, int32, int64, uint64, bool_ = np.int8, np.int32, np.int64, np.uint64, np.bool_
inf, nan, newaxis = np.inf, np.nan, None


# ------------------------------------------------------------------------------------------------ kernels

_LETTER_OF = {
    "float32": "f",
    "float64": "d",
    "float16": "h",
    "bfloat16": "b",
    "int32": "i",
    "int64": "l",
    "uint64": "u",
}
_C_TYPE = {"f": ctypes.c_float, "d": ctypes.c_double, "i": ctypes.c_int, "l": ctypes.c_longlong}

observers: list[Callable[..., None]] = []
"""Called with (library, name, sizes, args, report) after every launch, and before it with None for the report."""


class RawModule:
    """CUDA source, compiled for the CPU when its first kernel is asked for."""

    def __init__(
        self, *, code: str, options: tuple[str, ...] = (), backend: str = "nvrtc", name_expressions: Sequence[str]
    ) -> None:
        if not (isinstance(options, tuple) and backend == "nvrtc"):
            raise TypeError("options must be a tuple, backend 'nvrtc'")
        self._code, self._names = code, tuple(name_expressions)
        self._library: cpu_kernels.Library | None = None

    def get_function(self, name: str) -> RawKernel:
        if name not in self._names:
            raise KeyError(name)
        if self._library is None:
            self._library = cpu_kernels.Library(self._code, self._names, OPTIMISE)
        return RawKernel(self._library, name)


class RawKernel:
    def __init__(self, library: cpu_kernels.Library, name: str) -> None:
        self._library, self._name = library, name
        self._parameters = library.signatures[name]
        self._device = _current.device
        self.max_dynamic_shared_size_bytes = 48 * 1024

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], *, shared_mem: int = 0
    ) -> None:
        if self._device != _current.device:
            raise Forbidden(f"{self._name} was loaded on device {self._device}, but {_current.device} is current")
        sizes = _legal_geometry(self._name, grid, block, shared_mem, self.max_dynamic_shared_size_bytes)
        if len(args) != len(self._parameters):
            raise Forbidden(f"{self._name} has {len(self._parameters)} parameters, got {len(args)} arguments")
        values = [
            _argument(f"argument {i} of {self._name}", parameter, arg)
            for i, (parameter, arg) in enumerate(zip(self._parameters, args, strict=True))
        ]
        _works(self._name, *_pointed_to(args))
        for observe in observers:
            observe(self._library, self._name, sizes, args, None)
        report = self._library.launch(self._name, sizes, values, ORDER)
        for observe in observers:
            observe(self._library, self._name, sizes, args, report)


def _legal_geometry(name: str, grid: Any, block: Any, shared: int, most_shared: int) -> tuple[int, ...]:
    grid, block = (tuple(x) + (1,) * (3 - len(x)) for x in (grid, block))
    threads = block[0] * block[1] * block[2]
    problems = [
        *(f"{what} has a {type(v).__name__}" for what in (grid, block) for v in what if type(v) is not int),
        *["grid beyond (2³¹−1, 65535, 65535)"] * bool(grid[0] > 2**31 - 1 or max(grid[1:]) > 65535),
        *["an empty grid or block"] * bool(min(grid + block) < 1),
        *["a block of more than 1024 threads"] * (threads > 1024),
        *["a block beyond (1024, 1024, 64)"] * (max(block[:2]) > 1024 or block[2] > 64),
        *["warps that are not full"] * (threads % 32 != 0),
        *[f"{shared} bytes of shared memory, {most_shared} allowed"] * (shared > most_shared),
        *["an opt-in beyond the device's shared memory"]
        * (most_shared > max(48 * 1024, ATTRIBUTES["MaxSharedMemoryPerBlockOptin"])),
    ]
    if problems:
        raise Forbidden(f"{name}, grid {grid}, block {block}: {'; '.join(problems)}")
    return (*grid, *block, shared)


def _pointed_to(args: Sequence[Any]) -> Iterator[Any]:
    """Give the arguments of a launch, with the values of a struct in its place."""
    for arg in args:
        yield from arg.values.values() if isinstance(arg, Argument) else (arg,)


_C_LETTER = {"void": "v", "i64": "l", "float": "f", "double": "d", "__half": "h", "__nv_bfloat16": "b"}


def _argument(what: str, parameter: cpu_kernels.Parameter, arg: Any) -> Any:
    """Check an argument against the C++ parameter; give it as CuPy would pass it."""
    if parameter.letter[0] == "s":  # its layout is checked when the kernel is compiled
        if not isinstance(arg, Argument) or arg.size != 1 or f"s{arg.nbytes}" != parameter.letter:
            raise Forbidden(f"{what} is a struct of {parameter.letter[1:]} bytes, got {arg!r} of {type(arg).__name__}")
        for field, value in arg.values.items():
            c_type = arg.struct.c_type(field, arg.type_argument)
            if c_type.endswith("*") and value is not None:
                letter = _C_LETTER[c_type.removeprefix("const ").removesuffix("*")]
                _argument(f"{field} of {what}", cpu_kernels.Parameter(True, letter), value)
        return (ctypes.c_char * arg.nbytes).from_buffer_copy(arg.tobytes())
    if parameter.pointer:
        if isinstance(arg, np.uint64) and arg == 0:
            return ctypes.c_void_p(None)
        if not isinstance(arg, ndarray):
            raise Forbidden(f"{what} is a pointer, got {type(arg).__name__}")
        if parameter.letter != "v" and _LETTER_OF.get(arg.dtype.name) != parameter.letter:
            raise Forbidden(f"{what} points to {parameter.letter!r}, got {arg.dtype}")
        return ctypes.c_void_p(arg.data.ptr)
    if not isinstance(arg, np.generic) or _LETTER_OF.get(arg.dtype.name) != parameter.letter:
        raise Forbidden(f"{what} is {parameter.letter!r}, got {arg!r} of {type(arg).__name__}")
    return _C_TYPE[parameter.letter](arg.item())


# ------------------------------------------------------------------------------------------------ cuBLAS

_HANDLE = 0xB1A5
_math_modes: dict[int, int] = {}


def getMathMode(handle: int) -> int:  # noqa: N802 - cuBLAS's name
    return _math_modes.get(handle, 0)


def setMathMode(handle: int, mode: int) -> None:  # noqa: N802 - cuBLAS's name
    _math_modes[handle] = mode


_R = {0: np.float32, 1: np.float64, 2: np.float16, 14: "bfloat16"}


def _matrix(ptr: int, kind: int, rows: int, columns: int, ld: int) -> np.ndarray[Any, Any]:
    """Give NumPy's view of a matrix by columns."""
    dtype = np.dtype(_R[kind])
    if ptr % dtype.itemsize or ld < max(1, rows):
        raise Forbidden(f"gemmEx: a matrix of {rows} rows at {ptr:#x} with leading dimension {ld}")
    n = (ld * (columns - 1) + rows) * dtype.itemsize
    raw = np.frombuffer((ctypes.c_char * n).from_address(ptr), np.uint8)
    flat = raw.view(dtype)
    return np.lib.stride_tricks.as_strided(flat, (rows, columns), (dtype.itemsize, ld * dtype.itemsize))


def gemmEx(  # noqa: N802 - cuBLAS's name
    handle: int,
    transa: int,
    transb: int,
    m: int,
    n: int,
    k: int,
    alpha: int,
    A: int,
    Atype: int,
    lda: int,
    B: int,
    Btype: int,
    ldb: int,
    beta: int,
    C: int,
    Ctype: int,
    ldc: int,
    computeType: int,
    algo: int,
) -> None:
    """C = α·op(A)·op(B) + β·C by columns; α and β are host pointers of the compute type."""
    if handle != _HANDLE + _current.device or algo != -1 or Atype != Btype:
        raise Forbidden(f"gemmEx: handle {handle}, algorithm {algo}, types {Atype} and {Btype}")
    if not all(isinstance(address, _Address) for address in (A, B, C)):
        raise Forbidden("gemmEx: an address that is not of an array")
    _works(f"gemmEx of {np.dtype(_R[Atype]).name} into {np.dtype(_R[Ctype]).name}", A, B, C)
    acc = {68: np.float32, 70: np.float64, 77: np.float32}[computeType]
    if Atype in (2, 14) and not _math_modes.get(handle, 0) & 16:
        raise Forbidden("gemmEx: parts of a 16-bit result may be added in 16 bit")
    if computeType == 77 and Atype != 0:
        raise Forbidden(f"gemmEx: TF32 of type {Atype}")
    if (computeType == 70) != (Atype == 1) or Ctype not in (Atype, 1 if computeType == 70 else 0):
        raise Forbidden(f"gemmEx: types {Atype}, {Ctype} with compute type {computeType}")
    if min(m, n, k) < 1 or max(m, n, k, lda, ldb, ldc) > 2**31 - 1:
        raise Forbidden(f"gemmEx: sizes {m}, {n}, {k}")
    one, add = (np.frombuffer((ctypes.c_char * acc().itemsize).from_address(p), acc)[0] for p in (alpha, beta))
    a = _matrix(A, Atype, *((k, m) if transa else (m, k)), lda).astype(acc)
    b = _matrix(B, Btype, *((n, k) if transb else (k, n)), ldb).astype(acc)
    if computeType == 77:  # 10 bits behind the point, as tensor cores have them
        a, b = ((x.view(np.uint32) + 0xFFF + (x.view(np.uint32) >> 13 & 1) & 0xFFFFE000).view(acc) for x in (a, b))
    c = _matrix(C, Ctype, m, n, ldc)
    with np.errstate(all="ignore"):
        value = one * ((a.T if transa else a) @ (b.T if transb else b))
        c[...] = value if add == 0 else value + add * c.astype(acc)


class _Runtime:
    CUDARuntimeError = RuntimeError
    driverGetVersion = staticmethod(lambda: 12090)  # noqa: N815 - CUDA's names
    runtimeGetVersion = staticmethod(lambda: 12090)  # noqa: N815
    getDeviceCount = staticmethod(lambda: N_DEVICES)  # noqa: N815
    pointerGetAttributes = staticmethod(lambda ptr: SimpleNamespace(device=ptr._device))  # noqa: N815
    getDeviceProperties = staticmethod(lambda _: {"name": b"emulated on the CPU"})  # noqa: N815


cuda = SimpleNamespace(
    Device=Device,
    Stream=Stream,
    ExternalStream=ExternalStream,
    get_current_stream=get_current_stream,
    runtime=_Runtime,
    cublas=SimpleNamespace(gemmEx=gemmEx, getMathMode=getMathMode, setMathMode=setMathMode),
    device=SimpleNamespace(get_cublas_handle=lambda: _HANDLE + _current.device),  # each device has its own
)

_core = SimpleNamespace(get_compute_type=lambda _dtype: 0)
