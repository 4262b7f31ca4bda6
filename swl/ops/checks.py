"""Checks of arrays at the boundary; each error names the argument, what came and what is legal."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from swl.backends import Backend
from swl.backends.registry import on_device
from swl.options import shown
from swl.typing import Array, DTypeLike, Seed

__all__ = [
    "acc_dtype",
    "affine_parameters",
    "any_array",
    "check_needs",
    "flatten_inputs",
    "float_array",
    "float_dtype",
    "generator",
    "is_float",
    "is_real",
    "places_apart",
    "real_array",
    "require_integer",
    "require_plain",
    "require_shape",
    "size_of",
]

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
_NATIVE_FLOATS = frozenset((np.dtype(np.float16), F32, F64))


def acc_dtype(dtype: Any) -> np.dtype[Any]:
    """Return the dtype that arithmetic on `dtype` uses: float64 for float64, else float32."""
    return F64 if dtype == F64 else F32


def is_float(dtype: Any) -> bool:
    """Tell whether the kernels take `dtype` for logits, inputs and parameters."""
    return dtype in _NATIVE_FLOATS or getattr(dtype, "name", "") == "bfloat16"


def is_real(dtype: Any) -> bool:
    """Tell whether numbers of `dtype` are real, so that a kernel's dtype can hold them but for rounding."""
    return is_float(dtype) or dtype.kind in "iub"


def float_dtype(name: str, dtype: DTypeLike) -> np.dtype[Any]:
    """Return a floating dtype that was given as an argument."""
    found: np.dtype[Any] | None = None
    with contextlib.suppress(TypeError):
        found = np.dtype(dtype)
    if found is None or not is_float(found):
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {shown(dtype)}")
    return found


def generator(rng: Seed) -> np.random.Generator:
    """Return the generator that an argument ``rng`` stands for."""
    try:
        return np.random.default_rng(rng)
    except (TypeError, ValueError):
        raise TypeError(f"rng must be a numpy.random.Generator, a seed or None, got {shown(rng)}") from None


def require_integer(name: str, value: Any, least: float) -> int:
    """Return an integer argument that is at least so large."""
    if isinstance(value, bool | np.bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {shown(value)} of type {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {shown(value)}")
    return int(value)


def require_plain(name: str, x: Array) -> None:
    """Refuse what looks like an array of numbers and would lose a part of its meaning, or has none."""
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a masked array, whose mask would be lost: give {name}.filled(value), and rows that do not count "
            "a sample_weight of 0 or the id ignore_index"
        )
    if x is None or isinstance(x, str | bytes):
        raise TypeError(f"{name} must be an array of numbers, got {shown(x)}")
    if getattr(x, "requires_grad", False) and not hasattr(x, "__cuda_array_interface__"):
        raise TypeError(
            f"{name} is a torch tensor that requires a gradient, which would end here: swl.torch has functions that torch "
            f"differentiates; {name}.detach() is the value alone"
        )


def any_array(backend: Backend, name: str, x: Array) -> Array:
    """Bring `x` to the backend."""
    require_plain(name, x)
    try:
        return backend.asarray(x)
    except ValueError as error:  # CuPy's of a dtype that it does not have, NumPy's of nested lists without one shape
        if on_device(x):  # it has a dtype and a shape, but lies where kernels cannot read it
            raise
        raise TypeError(f"{name} must be an array of numbers: {error}") from error


def float_array(backend: Backend, name: str, x: Array) -> Array:
    """Bring `x` to the backend and check that it is of a floating dtype that swl computes with."""
    x = any_array(backend, name, x)
    if not is_float(x.dtype):
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    return x


def real_array(backend: Backend, name: str, x: Array) -> Array:
    """Bring `x` to the backend and check that it holds real numbers of any dtype."""
    x = any_array(backend, name, x)
    if not is_real(x.dtype):
        raise TypeError(f"{name} must hold real numbers, got {x.dtype}")
    return x


def require_shape(name: str, x: Array, legal: tuple[int, ...], meaning: str) -> None:
    """Raise the ValueError that names argument, shape and legal shape, unless they agree."""
    if x.shape != legal:
        raise ValueError(f"{name} must have shape {legal} ({meaning}), got {x.shape}")


def places_apart(x: Array) -> bool:
    """Tell whether every element of an array has memory of its own."""
    reach = x.itemsize
    for step, n in sorted((abs(step), n) for step, n in zip(x.strides, x.shape, strict=True) if n > 1):
        if step < reach:
            break
        reach += step * (n - 1)
    else:
        return True
    starts = np.zeros(1, np.int64)  # strides that interlock, which are rare: look at every element
    for step, n in zip(x.strides, x.shape, strict=True):
        starts = np.add.outer(starts, step * np.arange(n)).reshape(-1)
    return bool((np.diff(np.sort(starts)) >= x.itemsize).all())


def size_of(shape: Iterable[int]) -> int:
    """Count the elements of an array of this shape."""
    return math.prod(shape)


def affine_parameters(backend: Backend, W: Array, b: Array) -> tuple[Array, Array]:
    """Bring the parameters of an affine map to the backend and check them."""
    W = float_array(backend, "W", W)
    if W.ndim != 2:
        raise ValueError(f"W must have shape (D, K), got {W.shape}")
    if b is not None:
        b = float_array(backend, "b", b)
        require_shape("b", b, (W.shape[1],), "the columns of W")
    return W, b


def flatten_inputs(x: Array, D: int) -> tuple[Array, tuple[int, ...]]:
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
    try:
        wanted = frozenset((needs,) if isinstance(needs, str) else needs)
    except TypeError:
        raise TypeError(f"needs must be a collection of 'dx', 'dW' and 'db', got {shown(needs)}") from None
    if not wanted <= {"dx", "dW", "db"}:
        raise ValueError(f"needs may name 'dx', 'dW' and 'db' only, got {sorted(map(str, wanted))}")
    return wanted
