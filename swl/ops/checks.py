"""Checks of arrays at the boundary; each error names the argument, what came and what is legal."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from swl.backends import Backend
from swl.backends.registry import on_device

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
_NATIVE_FLOATS = frozenset((np.dtype(np.float16), F32, F64))


def acc_dtype(dtype: Any) -> np.dtype[Any]:
    """Return the dtype that arithmetic on `dtype` uses: float64 for float64, else float32."""
    return F64 if dtype == F64 else F32


def is_float(dtype: Any) -> bool:
    """Tell whether the kernels take `dtype` for logits, inputs and parameters."""
    return dtype in _NATIVE_FLOATS or getattr(dtype, "name", "") == "bfloat16"


def _array(backend: Backend, name: str, x: Any) -> Any:
    """Bring `x` to the backend."""
    try:
        return backend.asarray(x)
    except ValueError as error:  # CuPy's of a dtype that it does not have, NumPy's of nested lists without one shape
        if on_device(x):  # it has a dtype and a shape, but lies where kernels cannot read it
            raise
        raise TypeError(f"{name} must be an array of numbers: {error}") from error


def float_array(backend: Backend, name: str, x: Any) -> Any:
    """Bring `x` to the backend and check that it is of a floating dtype that swl computes with."""
    x = _array(backend, name, x)
    if not is_float(x.dtype):
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    return x


def real_array(backend: Backend, name: str, x: Any) -> Any:
    """Bring `x` to the backend and check that it holds real numbers of any dtype."""
    x = _array(backend, name, x)
    if not (is_float(x.dtype) or x.dtype.kind in "iub"):
        raise TypeError(f"{name} must hold real numbers, got {x.dtype}")
    return x


def require_shape(name: str, x: Any, legal: tuple[int, ...], meaning: str) -> None:
    """Raise the ValueError that names argument, shape and legal shape, unless they agree."""
    if x.shape != legal:
        raise ValueError(f"{name} must have shape {legal} ({meaning}), got {x.shape}")


def size_of(shape: Iterable[int]) -> int:
    """Count the elements of an array of this shape."""
    return math.prod(shape)


def affine_parameters(backend: Backend, W: Any, b: Any) -> tuple[Any, Any]:
    """Bring the parameters of an affine map to the backend and check them."""
    W = float_array(backend, "W", W)
    if W.ndim != 2:
        raise ValueError(f"W must have shape (D, K), got {W.shape}")
    if b is not None:
        b = float_array(backend, "b", b)
        require_shape("b", b, (W.shape[1],), "the columns of W")
    return W, b


def flatten_inputs(x: Any, D: int) -> tuple[Any, tuple[int, ...]]:
    """Bring ``(..., D)``, or ``(N, ...)`` with trailing axes of product D, to ``(rows, D)``; also give the leading shape.

    Raises
    ------
    ValueError
        If neither reading fits.
    """
    shape = x.shape
    if shape and shape[-1] == D:
        leading = shape[:-1]
    elif len(shape) > 1 and size_of(shape[1:]) == D:
        leading = shape[:1]
    else:
        raise ValueError(f"x must have shape (..., {D}), or (N, ...) with trailing axes of product {D}, got {shape}")
    return x if len(shape) == 2 and len(leading) == 1 else x.reshape(size_of(leading), D), leading


def check_needs(needs: Iterable[str]) -> frozenset[str]:
    """Check a ``needs=`` argument."""
    wanted = frozenset((needs,) if isinstance(needs, str) else needs)
    if not wanted <= {"dx", "dW", "db"}:
        raise ValueError(f"needs may name 'dx', 'dW' and 'db' only, got {sorted(wanted)}")
    return wanted
