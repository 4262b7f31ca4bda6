"""The affine map as a layer."""

from __future__ import annotations

import numpy as np

from swl.backends import get
from swl.nn.base import WithAffineParameters, bring
from swl.ops.affine import Operands
from swl.options import shown
from swl.typing import Array, ArrayLike

__all__ = ["Affine"]


class Affine(WithAffineParameters):
    """The affine map ``y = x·W + b``.

    Parameters
    ----------
    W : array, shape (D, K), floating
    b : array, shape (K,), floating, optional
        Both are kept, not copied, so an in-place update outside is an update here. Only under an active device backend
        are host arrays copied to the device.

    needs_dx : bool
        See the attribute.

    Attributes
    ----------
    W, b : array
        The parameters. A new array may be assigned; it is checked and brought to the layer's backend.
    dW, db : array or None
        Their gradients, new arrays after each `backward`.
    x : array or None
        The input of the last `forward`.
    needs_dx : bool
        Whether `backward` computes the gradient of the input. The first layer of a network may spare it.
    backend : str
        Name of the backend the layer belongs to: ``"cupy"`` if `W` is a CUDA array, else the one active at
        construction.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what came and what is legal.

    Examples
    --------
    >>> import numpy as np, swl
    >>> layer = swl.Affine(np.eye(2), np.array([10., 20.]))
    >>> layer.forward(np.array([[1., 2.]]))
    array([[11., 22.]])
    >>> layer.backward(np.array([[1., 1.]]))
    array([[1., 1.]])
    >>> layer.dW
    array([[1., 1.],
           [2., 2.]])
    """

    def __init__(self, W: ArrayLike, b: ArrayLike | None = None, *, needs_dx: bool = True) -> None:
        super().__init__(W, b)
        if not isinstance(needs_dx, bool | np.bool):
            raise TypeError(f"needs_dx must be True or False, got {shown(needs_dx)}")
        self.needs_dx = bool(needs_dx)

    def forward(self, x: ArrayLike) -> Array:
        """Compute ``y = x·W + b``.

        Parameters
        ----------
        x : array, shape (..., D) or (N, ...) with trailing axes of product D
            Integers are converted to the dtype of `W`.

        Returns
        -------
        array, shape (..., K) or (N, K)
        """
        y, self._saved = self._run(x)
        return y

    def _run(self, x: Array) -> tuple[Array, Operands]:
        backend = get(self.backend)
        with backend.scope(W=self._W, x=x):
            done = Operands.of(backend, bring(backend, "x", x), self._W)
            return done.forward(self._b), done

    def backward(self, dout: ArrayLike) -> Array:
        """Compute ``dx = dout·Wᵀ``, and leave ``dW = xᵀ·dout`` and ``db = Σ_n dout`` on the layer.

        Parameters
        ----------
        dout : array, of the shape of `forward`'s result
            Gradient of what follows.

        Returns
        -------
        array, of the shape of `x`, or None without `needs_dx`

        Raises
        ------
        RuntimeError
            Before the first `forward`.
        """
        done = self._last_forward()
        needs = _NEEDS[self.needs_dx, self._b is not None]
        with done.backend.scope(W=done.W, dout=dout):
            dx, self.dW, self.db = done.backward(dout, needs)
        self._publish()
        return dx

    def __repr__(self) -> str:
        D, K = self._W.shape
        return f"Affine({D}, {K})" if self._b is not None else f"Affine({D}, {K}, no bias)"


_NEEDS = {
    (dx, db): tuple(name for name, wanted in (("dx", dx), ("dW", True), ("db", db)) if wanted)
    for dx in (False, True)
    for db in (False, True)
}
