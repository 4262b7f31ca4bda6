"""Numbers of 16 bits brought to float32 and rounded back by compiled kernels, a vector at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from swl.backends.host.memory import MEMORY
from swl.backends.numba import kernels

__all__ = ["BITS", "bits_of", "read_only", "round_into", "widened", "widened_rows"]

BITS = {"float16": np.dtype(np.uint16), "bfloat16": np.dtype(np.int16)}
"""The dtype as which the kernels know each of them (`swl.backends.numba.simd`)."""


def bits_of(dtype: Any) -> Any:
    """Return the dtype as which the kernels know a 16-bit one, None for any other."""
    return BITS.get(dtype.name) if dtype.isnative else None


def read_only(x: Any) -> Any:
    """View an operand as read-only: a type of its own to Numba, which would compile once for each mixture of the two."""
    x = x.view()
    x.flags.writeable = False
    return x


def widened(x: Any) -> Any:
    """Copy a matrix to float32, to rows or columns that lie one after another, whichever it has."""
    bits = bits_of(x.dtype)
    if bits is None:
        return MEMORY.allocate(x.astype, np.float32)
    if x.strides[0] == x.itemsize:
        return widened_rows(x.T, bits).T
    return widened_rows(x, bits)


def widened_rows(x: Any, bits: Any) -> Any:
    """Copy a matrix to rows of float32."""
    z = MEMORY.allocate(np.empty, x.shape, np.float32)
    kernels.convert(read_only(MEMORY.allocate(np.ascontiguousarray, x).view(bits)), z)
    return z


def round_into(y: Any, out: Any) -> None:
    """Round rows of float32 to where they go."""
    bits = bits_of(out.dtype)
    if bits is None:
        out[...] = y
    elif out.flags.c_contiguous and out.flags.aligned:
        kernels.convert(read_only(y), out.view(bits))
    else:
        rounded = MEMORY.allocate(np.empty, y.shape, bits)
        kernels.convert(read_only(y), rounded)
        out[...] = rounded.view(out.dtype)
