"""Products within a CUDA graph: cuBLAS can be captured, but CuPy (14) refuses to call it while a stream captures."""

from __future__ import annotations

import ctypes
import functools
import importlib
from typing import Any

__all__ = ["captured_gemm"]


@functools.cache
def _library() -> Any:
    """Return CuPy's module of cuBLAS as a library: its symbols are also those of cuBLAS, to which it is linked."""
    library = ctypes.CDLL(importlib.import_module("cupy_backends.cuda.libs.cublas").__file__)
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.cublasSetStream_v2.argtypes = (pointer, pointer)
    library.cublasGemmEx.argtypes = (
        *(pointer, number, number, number, number, number),  # handle, transa, transb, m, n, k
        *(pointer, pointer, number, number, pointer, number, number),  # alpha; A, its type and distance; B likewise
        *(pointer, pointer, number, number, number, number),  # beta; C, its type and distance; compute type, algorithm
    )
    return library


def captured_gemm(stream: int, handle: int, *arguments: int) -> None:
    """Call ``cublasGemmEx(handle, …)`` on a stream that captures.

    Raises
    ------
    RuntimeError
        If cuBLAS reports an error.
    """
    cublas = _library()
    for name, given in (("cublasSetStream_v2", (handle, stream)), ("cublasGemmEx", (handle, *arguments))):
        status = getattr(cublas, name)(*given)
        if status:
            raise RuntimeError(f"{name} failed while a stream was captured: status {status} of cublasStatus_t")
