"""The affine map ``y = x·W + b`` as functions, and the checked operands that layers hold."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from swl.backends import Backend, resolve
from swl.ops.checks import (
    acc_dtype,
    affine_parameters,
    check_needs,
    flatten_inputs,
    float_array,
    real_array,
    require_shape,
)
from swl.ops.chunks import cuts, plan
from swl.typing import Array, ArrayLike, Stream

__all__ = ["Operands", "affine", "affine_backward", "empty_like_weights"]


class Operands(NamedTuple):
    """Inputs and weights of a product, checked, and all that a backward pass needs."""

    backend: Backend
    x: Array  # as it came, on the backend
    x2: Array  # (N, D), of a floating dtype
    W: Array
    leading: tuple[int, ...]  # (...) of the result

    @classmethod
    def of(cls, backend: Backend, x: Array, W: Array) -> Operands:
        """Check the inputs against weights that were checked before."""
        x = x2 = real_array(backend, "x", x)
        if x.dtype.kind in "iub":
            x2 = x.astype(W.dtype)
        x2, leading = flatten_inputs(x2, W.shape[0])
        return cls(backend, x, x2, W, leading)

    def dtype(self, b: Array) -> Any:
        """Return the common dtype of the operands and a bias, which may be None."""
        x2, W = self.x2, self.W
        if x2.dtype == W.dtype and (b is None or b.dtype == W.dtype):
            return W.dtype
        return self.backend.xp.result_type(*(a for a in (x2, W, b) if a is not None))

    def forward(self, b: Array, memory_budget: int | None = None) -> Array:
        """Compute ``y = x·W + b``; in chunks if the temporaries are to stay within a budget in bytes."""
        backend, _, x2, W, leading = self
        dtype = self.dtype(b)
        (N, D), C = x2.shape, W.shape[1]
        y = backend.empty((N, C), dtype)
        if memory_budget is None:
            backend.affine_forward(x2, W, b, y)
        else:
            cut = plan(N, D, C, dtype=acc_dtype(dtype), needs=(), memory_budget=memory_budget)
            for r0, r1 in cuts(N, cut.rows):
                for c0, c1 in cuts(C, cut.classes):
                    bias = None if b is None else b[c0:c1]
                    backend.affine_forward(x2[r0:r1], W[:, c0:c1], bias, y[r0:r1, c0:c1])
        return y if len(leading) == 1 else y.reshape(*leading, W.shape[1])

    def backward(self, dout: Array, needs: Collection[str] = ("dx", "dW", "db")) -> tuple[Array, Array, Array]:
        """Compute ``dx, dW, db``, each in an array of its own or None; any number of times."""
        backend, x, x2, W, leading = self
        K = W.shape[1]
        dout = float_array(backend, "dout", dout)
        require_shape("dout", dout, (*leading, K), "the shape of the affine map's result")
        dx = backend.empty(x2.shape, x2.dtype) if "dx" in needs else None
        dW = backend.empty(W.shape, W.dtype) if "dW" in needs else None
        db = backend.empty((K,), W.dtype) if "db" in needs else None
        backend.affine_backward(dout if dout.ndim == 2 else dout.reshape(x2.shape[0], K), x2, W, dx, dW, db)
        return (dx if dx is None or x.ndim == 2 else dx.reshape(x.shape)), dW, db


def empty_like_weights(backend: Backend, W: Array, dtype: Any) -> Array:
    """Return an array for the gradient of `W`: a (C, D) matrix seen as (D, C) gets its gradient likewise."""
    return backend.empty(W.shape[::-1], dtype).T if W.strides[0] < W.strides[1] else backend.empty(W.shape, dtype)


def affine(x: ArrayLike, W: ArrayLike, b: ArrayLike | None = None, *, stream: Stream | None = None) -> Array:
    """Compute the affine map ``y = x·W + b``.

    Parameters
    ----------
    x : array, shape (..., D) or (N, ...) with trailing axes of product D
        Inputs; integers are converted to the dtype of `W`. Any strides.
    W : array, shape (D, K), floating
    b : array, shape (K,), floating, optional
    stream : cupy.cuda.Stream, or an object with ``__cuda_stream__``, optional
        Where the work goes, for arrays on a device; by default to CuPy's current stream for that device.

    Returns
    -------
    array, shape (..., K)
        Of the common dtype of the operands. 16-bit operands are multiplied and summed in float32 and rounded once.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what came and what is legal.

    Examples
    --------
    >>> import numpy as np, swl
    >>> swl.affine(np.array([[1., 2.]]), np.eye(2), np.array([10., 20.]))
    array([[11., 22.]])
    """
    backend = resolve(None, {"x": x, "W": W, "b": b})
    with backend.scope(stream, x=x, W=W, b=b):
        W, b = affine_parameters(backend, W, b)
        return Operands.of(backend, x, W).forward(b)


def affine_backward(
    dout: ArrayLike,
    x: ArrayLike,
    W: ArrayLike,
    *,
    needs: Iterable[str] = ("dx", "dW", "db"),
    stream: Stream | None = None,
) -> tuple[Array | None, Array | None, Array | None]:
    """Compute the gradients of an affine map: ``dx = dout·Wᵀ``, ``dW = xᵀ·dout``, ``db = Σ_n dout``.

    Parameters
    ----------
    dout : array, shape (..., K), floating
        Gradient of what follows with respect to ``y``.
    x, W : arrays
        The operands of the forward call.
    needs : iterable of {"dx", "dW", "db"}
        The gradients to compute.
    stream : as for `affine`

    Returns
    -------
    dx, dW, db : array or None
        Of the shapes of `x`, `W` and ``(K,)``; `dW` and `db` of the dtype of `W`, `dx` of the dtype of `x` (of `W` where
        `x` holds integers). None for a gradient not in `needs`.

    Examples
    --------
    >>> import numpy as np, swl
    >>> dx, dW, db = swl.affine_backward(np.ones((1, 2)), np.array([[1., 2.]]), np.eye(2), needs=("dW", "db"))
    >>> dx is None, dW.tolist(), db.tolist()
    (True, [[1.0, 1.0], [2.0, 2.0]], [1.0, 1.0])
    """
    backend = resolve(None, {"x": x, "W": W, "dout": dout})
    with backend.scope(stream, x=x, W=W, dout=dout):
        W, _ = affine_parameters(backend, W, None)
        return Operands.of(backend, x, W).backward(dout, check_needs(needs))
