"""Activations: layers without parameters."""

from __future__ import annotations

import numpy as np

from swl.backends import resolve
from swl.nn.base import Layer
from swl.ops import checks
from swl.typing import Array, ArrayLike

__all__ = ["ReLU", "Relu", "Sigmoid"]


class ReLU(Layer):
    """The rectifier ``y = max(x, 0)``; a NaN stays a NaN.

    Examples
    --------
    >>> import numpy as np, swl
    >>> layer = swl.ReLU()
    >>> layer.forward(np.array([-1., 2.]))
    array([0., 2.])
    >>> layer.backward(np.array([5., 7.]))
    array([0., 7.])
    """

    def _run(self, x: Array) -> tuple[Array, Array]:
        backend = resolve(None, {"x": x})
        with backend.scope(x=x):
            x = checks.float_array(backend, "x", x)
            with np.errstate(invalid="ignore"):  # NumPy's bfloat16 warns of NaN
                return backend.xp.maximum(x, x.dtype.type(0)), (backend, x.dtype, x <= 0)

    def backward(self, dout: ArrayLike) -> Array:
        """Compute ``dx = dout·[x > 0]`` in a new array, exactly 0 where ``x <= 0`` whatever `dout` is there."""
        backend, dtype, mask = self._last_forward()
        with backend.scope(x=mask, dout=dout):
            dout = checks.float_array(backend, "dout", dout)
            checks.require_shape("dout", dout, mask.shape, "the shape of x")
            dx = backend.xp.where(mask, dout.dtype.type(0), dout)
            return dx.astype(dtype, copy=False)


Relu = ReLU  # the book's spelling


class Sigmoid(Layer):
    """The logistic function ``y = 1/(1 + e⁻ˣ)``, accurate in both tails and without overflow.

    With ``e = exp(−|x|)``: ``y = (1 if x >= 0 else e)/(1 + e)`` and ``∂y/∂x = e/(1 + e)²``.

    Examples
    --------
    >>> import numpy as np, swl
    >>> layer = swl.Sigmoid()
    >>> layer.forward(np.array([0., -1000.]))
    array([0.5, 0. ])
    >>> layer.backward(np.array([4., 4.]))
    array([1., 0.])
    """

    def _run(self, x: Array) -> tuple[Array, Array]:
        backend = resolve(None, {"x": x})
        with backend.scope(x=x):
            x = checks.float_array(backend, "x", x)
            xp, acc = backend.xp, checks.acc_dtype(x.dtype)  # 16-bit input computes in float32
            e = xp.exp(-xp.abs(x.astype(acc, copy=False)))
            y = xp.where(x < 0, e, acc.type(1)) / (1 + e)
            return y.astype(x.dtype, copy=False), (backend, x.dtype, e / (1 + e) ** 2)

    def backward(self, dout: ArrayLike) -> Array:
        """Compute ``dx = dout·∂y/∂x`` in a new array."""
        backend, dtype, slope = self._last_forward()
        with backend.scope(x=slope, dout=dout):
            dout = checks.float_array(backend, "dout", dout)
            checks.require_shape("dout", dout, slope.shape, "the shape of x")
            return (dout * slope).astype(dtype, copy=False)
