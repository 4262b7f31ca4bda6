"""Tensors as the arrays of a backend and back, without copies."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from swl.backends import Backend, get, host_backend
from swl.backends import device as device_backend
from swl.backends.host.threads import POOL
from swl.backends.protocol import TF32
from swl.errors import BackendUnavailable

__all__ = ["Bridge", "Cuda", "Host", "bridge", "host_scalar", "share_memory_pool"]

POOL.limit("torch.get_num_threads", torch.get_num_threads)


class Bridge(Protocol):
    """The way between the tensors of a device and the arrays of a backend."""

    @property
    def backend(self) -> Backend:
        """Which runs on the tensors."""

    @property
    def on_host(self) -> bool:
        """Whether the values of an array can be looked at without waiting for a device."""

    def array(self, t: Tensor) -> Any:
        """See a tensor as an array: the same memory."""

    def tensor(self, a: Any) -> Tensor:
        """See an array as a tensor: the same memory."""

    def scope(self) -> AbstractContextManager[object]:
        """Within it, the backend works on torch's current stream."""


class Host:
    """CPU tensors, as NumPy arrays."""

    on_host = True
    _scope = nullcontext()

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def array(self, t: Tensor) -> Any:
        t = t.detach()
        if t.is_neg():
            t = t.resolve_neg()
        array = np.asarray(_Memory(t))
        return array.view(_bfloat16()) if t.dtype is torch.bfloat16 else array

    def tensor(self, a: Any) -> Tensor:
        a = np.asarray(a)
        if a.dtype.name == "bfloat16":
            return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(a)

    def scope(self) -> AbstractContextManager[object]:
        return self._scope


_CODES = {getattr(torch, np.dtype(code).name): np.dtype(code).str for code in "dfeqihbQIHB?"} | {
    torch.bfloat16: np.dtype(np.int16).str
}  # NumPy has no bfloat16 of its own


class _Memory:
    """The memory of a tensor, for NumPy to see; `Tensor.numpy` would pin it, and FSDP resizes what it shards."""

    __slots__ = ("__array_interface__", "owner")

    def __init__(self, t: Tensor) -> None:
        code = _CODES.get(t.dtype)
        if code is None:
            raise TypeError(f"tensors of real numbers are needed, got one of {t.dtype}")
        self.owner = t
        size = t.element_size()
        self.__array_interface__ = {
            "version": 3,
            "data": (t.data_ptr(), False),
            "typestr": code,
            "shape": tuple(t.shape),
            "strides": None if t.is_contiguous() else tuple([size * s for s in t.stride()]),
        }


def _bfloat16() -> Any:
    try:
        return np.dtype(importlib.import_module("ml_dtypes").bfloat16)
    except ImportError as error:
        raise BackendUnavailable(
            "bfloat16 tensors on the CPU need the package ml_dtypes, which is not installed; pip install ml_dtypes"
        ) from error


class Cuda:
    """CUDA tensors, as CuPy arrays by way of DLPack, on torch's current stream for their device."""

    on_host = False

    def __init__(self, device: int) -> None:
        self.backend = get(device_backend())
        self.device = device

    def array(self, t: Tensor) -> Any:
        t = t.detach()
        return self.backend.xp.from_dlpack(t.resolve_neg() if t.is_neg() else t)

    def tensor(self, a: Any) -> Tensor:
        return torch.from_dlpack(a)

    @contextmanager
    def scope(self) -> Iterator[None]:
        stream = _Stream(torch.cuda.current_stream(self.device).cuda_stream)
        asked = TF32.set(_tf32())
        try:
            with self.backend.xp.cuda.Device(self.device), self.backend.scope(stream):
                yield
        finally:
            TF32.reset(asked)


def _tf32() -> bool:
    """Tell whether torch was told to multiply float32 on a CUDA device in TF32: by its newer setting where it has that."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return bool(matmul.fp32_precision == "tf32")
    return torch.get_float32_matmul_precision() != "highest"


class _Stream:
    """A stream of torch's as CuPy takes it; torch's own class says as much only in newer versions."""

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


_hosts: dict[str, Host] = {}


def bridge(t: Tensor) -> Bridge:
    """Choose by the tensor's device: CPU tensors get the active host backend, CUDA tensors get CuPy's.

    Raises
    ------
    TypeError
        For any other device.
    BackendUnavailable
        For a CUDA tensor where CuPy cannot run.
    """
    if t.is_cpu:
        name = host_backend()  # SWL_BACKEND=cupy says nothing of tensors: their device does
        found = _hosts.get(name)
        if found is None:
            found = _hosts[name] = Host(get(name))
        return found
    if t.is_cuda:
        return Cuda(t.device.index)
    raise TypeError(f"tensors must be on a CPU or a CUDA device, got one on {t.device}")


_CPU = torch.device("cpu")


def host_scalar(value: float, dtype: torch.dtype) -> Tensor:
    """Return a 0-d tensor on the CPU, whatever torch's default device is."""
    return torch.scalar_tensor(value, dtype=dtype, device=_CPU)


def share_memory_pool() -> None:
    """Make CuPy take its memory from torch's caching allocator, so that the two do not hoard memory from each other.

    Raises
    ------
    BackendUnavailable
        If CuPy cannot run here.

    Notes
    -----
    Process-wide, and for arrays made from now on. Blocks belong to torch's current stream of the time of allocation.
    """
    cupy = get(device_backend()).xp

    def malloc(size: int, device: int) -> int:
        stream = torch.cuda.current_stream(device).cuda_stream
        return int(torch.cuda.caching_allocator_alloc(size, device, stream))

    def free(pointer: int, device: int) -> None:
        torch.cuda.caching_allocator_delete(pointer)

    cupy.cuda.set_allocator(cupy.cuda.PythonFunctionAllocator(malloc, free).malloc)
