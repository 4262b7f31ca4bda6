"""The ways between host and device that are taken only where someone asked for them."""

from __future__ import annotations

import numpy as np

from swl.backends import resolve
from swl.typing import Array


def to_numpy(x: Array) -> Array:
    """Copy an array of any backend to NumPy; waits for the device."""
    if not hasattr(x, "get"):
        return np.array(x)
    with x.device:  # CuPy takes the stream that is current on the device that is
        return x.get()


def beside(array: Array, values: Array) -> Array:
    """Bring NumPy `values` to where `array` is."""
    if isinstance(array, np.ndarray | np.generic):
        return values
    backend = resolve(None, {"array": array})
    with backend.scope(array=array):
        return backend.asarray(values)
