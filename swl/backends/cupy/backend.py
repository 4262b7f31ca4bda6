"""The CUDA backend: chooses variant and launch geometry for ``kernels/*.cu``, and calls cuBLAS, through CuPy.

Nothing here waits for the device except `CupyBackend.check`, and memory comes from CuPy's pool alone, so that a
training step can be captured in a CUDA graph once each of its kernels has run. Work goes to CuPy's current device and
stream, which `CupyBackend.scope` chooses for a whole call: CuPy's own operations, between the kernels, know no other way.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

from swl.backends import Backend
from swl.backends.cupy.affine import AffineMaps
from swl.backends.cupy.cross_entropy import CrossEntropy
from swl.errors import BackendUnavailable

__all__ = ["CupyBackend", "load"]

_DLPACK_CUDA = 2  # kDLCUDA of dlpack.h
_AT_ONCE = 1 << 22  # numbers of a range of `by_rows`


def load() -> Backend:
    """Give the backend.

    Raises
    ------
    BackendUnavailable
        Without CuPy, driver or device; the message says which, and what to do.
    """
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        raise BackendUnavailable(
            f"backend 'cupy' needs CuPy, which cannot be imported ({error}); "
            "pip install cupy-cuda13x, or cupy-cuda12x for a driver of CUDA 12 (nvidia-smi shows which)"
        ) from error
    driver = cupy.cuda.runtime.driverGetVersion()
    if not driver:
        raise BackendUnavailable(
            f"backend 'cupy' finds no NVIDIA driver (CuPy {cupy.__version__} is installed); "
            "install the driver, or in a container start it with the GPU passed through"
        )
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise BackendUnavailable(
            f"backend 'cupy' cannot use the driver of CUDA {_version(driver)} ({error}); install the CuPy of that "
            f"CUDA: pip install cupy-cuda{driver // 1000}x, or a newer driver"
        ) from error
    if not count:
        raise BackendUnavailable("backend 'cupy' finds no CUDA device; check nvidia-smi and CUDA_VISIBLE_DEVICES")
    return CupyBackend(cupy)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


class CupyBackend(AffineMaps, CrossEntropy):
    """See `swl.backends.Backend` for what each operation means."""

    name = "cupy"

    # -------------------------------------------------------------------------------------------- where work goes

    def scope(self, stream: Any = None, /, **arrays: Any) -> AbstractContextManager[object]:
        found: tuple[str, Any] | None = None
        for name, x in arrays.items():
            device = self._device_of(x)
            if device is not None and found is None:
                found = name, device
            elif device is not None and found is not None and device.id != found[1].id:
                raise TypeError(
                    f"{found[0]} is on cuda:{found[1].id} but {name} is on cuda:{device.id}; "
                    "all arrays of a call must be on one device"
                )
        here = self.xp.cuda.Device() if found is None else found[1]
        return here if stream is None else _on(here, self._stream(stream, here))

    def _device_of(self, x: Any) -> Any:
        """Give the device of an array of any library; None for whatever is not on a device."""
        xp = self.xp
        if isinstance(x, xp.ndarray):
            return x.device
        kind, index = x.__dlpack_device__() if hasattr(x, "__dlpack_device__") else (0, 0)
        if kind == _DLPACK_CUDA:
            return xp.cuda.Device(index)
        if not hasattr(x, "__cuda_array_interface__"):
            return None
        pointer = x.__cuda_array_interface__["data"][0]
        # the driver knows whose the memory is; an array without elements has none
        return xp.cuda.Device(xp.cuda.runtime.pointerGetAttributes(pointer).device) if pointer else xp.cuda.Device()

    def _stream(self, stream: Any, device: Any) -> Any:
        """Bring what a caller gave as `stream` to CuPy's form."""
        cuda = self.xp.cuda
        if not isinstance(stream, cuda.Stream | cuda.ExternalStream):
            if not hasattr(stream, "__cuda_stream__"):
                raise TypeError(
                    "stream must be a cupy.cuda.Stream, or an object with __cuda_stream__ such as a torch.cuda.Stream, "
                    f"got {stream!r} of type {type(stream).__name__}"
                )
            stream = cuda.Stream.from_external(stream)
        if stream.device_id not in (-1, device.id):  # -1: not known
            raise TypeError(f"stream is of cuda:{stream.device_id}, but the arrays are on cuda:{device.id}")
        return stream

    # -------------------------------------------------------------------------------------------- arrays

    def owns(self, x: Any) -> bool:
        return isinstance(x, self.xp.ndarray)

    def rounded(self, a: Any, dtype: Any) -> Any:
        return a.astype(dtype, copy=False)

    def asarray(self, x: Any, dtype: Any = None) -> Any:
        xp = self.xp
        if not isinstance(x, xp.ndarray):
            if getattr(x, "__dlpack_device__", lambda: (0, 0))()[0] == _DLPACK_CUDA:  # tells the producer our stream
                x = xp.from_dlpack(x)
            elif hasattr(x, "__cuda_array_interface__"):
                with self._device_of(x):  # or CuPy copies it to the current device
                    x = _Interface(x)
                    here = xp.cuda.get_current_stream()
                    if x.stream not in (None, here.ptr or 1):  # 1 is the null stream
                        here.wait_event(xp.cuda.Stream.from_external(x).record())
                    x = xp.asarray(x)
            else:
                x = xp.asarray(np.asarray(x, dtype=dtype))
        if x.data.ptr % x.itemsize or any(step % x.itemsize for step in x.strides):
            _refuse_misaligned(x)
        if dtype is None or x.dtype == dtype:
            return x
        with x.device:
            return x.astype(dtype)

    # -------------------------------------------------------------------------------------------- the host's side

    def plain_loss(self, logits: Any, target: Any, ignore_index: int, out: Any | None) -> tuple[Any, float] | None:
        return None

    def total(self, x: Any) -> Any:
        return x.sum(dtype=np.float64)

    def by_rows(self, work: Callable[[int, int], object], n_rows: int, row_size: int) -> None:
        step = max(1, _AT_ONCE // max(row_size, 1))
        for begin in range(0, n_rows, step):
            work(begin, min(begin + step, n_rows))

    def check(self) -> None:
        for device in list(self._devices.values()):
            with self.xp.cuda.Device(device.index) as on:
                on.synchronize()
                found, row, value, n_classes, ignore_index = device.error.get().astype(np.int64).tolist()
                if found:
                    device.error.fill(0)
                    on.synchronize()
                    raise ValueError(
                        f"target[{row}] is {value}; legal are class ids in [0, {n_classes}) "
                        f"and ignore_index={ignore_index}"
                    )

    def info(self) -> dict[str, str]:
        runtime = self.xp.cuda.runtime
        found = {
            "cupy": self.xp.__version__,
            "driver": f"CUDA {_version(runtime.driverGetVersion())}",
            "runtime": f"CUDA {_version(runtime.runtimeGetVersion())}",
        }
        for index in range(runtime.getDeviceCount()):
            name = runtime.getDeviceProperties(index)["name"].decode()
            capability = self.xp.cuda.Device(index).compute_capability
            found[f"device {index}"] = f"{name}, compute capability {capability[:-1]}.{capability[-1]}"
        return found


class _Interface:
    """An object's ``__cuda_array_interface__`` without its stream, for which CuPy would make the host wait."""

    def __init__(self, x: Any) -> None:
        self._keep, self.__cuda_array_interface__ = x, dict(x.__cuda_array_interface__)
        self.stream = self.__cuda_array_interface__.pop("stream", None)

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.stream


@contextmanager
def _on(device: Any, stream: Any) -> Iterator[None]:
    with device, stream:
        yield


def _refuse_misaligned(x: Any) -> None:
    """Raise for elements off the multiples of their size, which no kernel can read, unless they do not exist."""
    steps = [step for n, step in zip(x.shape, x.strides, strict=True) if n > 1]
    if x.size and any(where % x.itemsize for where in (x.data.ptr, *steps)):
        raise ValueError(
            f"a device reads {x.dtype} at multiples of {x.itemsize} bytes only, got an array of shape {x.shape} with "
            f"strides {x.strides} at address {x.data.ptr:#x}; copy it on the host first"
        )
