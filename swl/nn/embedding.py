"""A table of rows as a layer."""

from __future__ import annotations

import numpy as np

from swl.backends import active, get, resolve
from swl.nn.base import Layer, bring
from swl.ops import checks
from swl.typing import Array, ArrayLike, DTypeLike, Seed

__all__ = ["Embedding"]


class Embedding(Layer):
    """A row of numbers for each id: ``y = W[x]``.

    Parameters
    ----------
    W : array, shape (V, D), floating
        Kept, not copied.

    Attributes
    ----------
    W, dW : array
        The table and its gradient, which is added up in one fixed order, in float32 or better.
    backend : str
        As of `Affine`.

    Notes
    -----
    On a host an id outside ``[0, V)`` is a ValueError. On a device, which nothing here waits for, it wraps around.

    Examples
    --------
    >>> import numpy as np, swl
    >>> layer = swl.Embedding(np.array([[1., 2.], [3., 4.]]))
    >>> layer.forward(np.array([1, 1, 0]))
    array([[3., 4.],
           [3., 4.],
           [1., 2.]])
    >>> layer.backward(np.ones((3, 2)))
    >>> layer.dW
    array([[1., 1.],
           [2., 2.]])
    """

    names = ("W",)

    def __init__(self, W: ArrayLike) -> None:
        self.backend = resolve(None, {"W": W}).name
        backend = get(self.backend)
        self.W, _ = checks.affine_parameters(backend, bring(backend, "W", W), None)
        self.dW: Array = None

    @classmethod
    def init(cls, V: int, D: int, *, rng: Seed = None, dtype: DTypeLike = np.float32) -> Embedding:
        """Draw ``W ~ N(0, 1)`` on the host, and place it on the active backend."""
        for name, size in (("V", V), ("D", D)):
            checks.require_integer(name, size, 1)
        W = checks.generator(rng).standard_normal((V, D)).astype(checks.float_dtype("dtype", dtype))
        return cls(get(active()).asarray(W))

    def _run(self, x: Array) -> tuple[Array, Array]:
        backend = get(self.backend)
        with backend.scope(W=self.W, x=x):
            x = bring(backend, "x", x)
            if x.dtype.kind not in "iu":
                raise TypeError(f"x must hold ids of an integer dtype, got {x.dtype}")
            V = self.W.shape[0]
            if backend.xp is np and x.size and not (x.min() >= 0 and x.max() < V):
                bad = x[(x < 0) | (x >= V)].flat[0]
                raise ValueError(f"x must hold ids in [0, {V}), got {bad}")
            return self.W[x], x

    def backward(self, dout: ArrayLike) -> None:
        """Leave ``dW``, where row v is the sum of `dout` over the places with id v, on the layer; ids have no gradient."""
        x = self._last_forward()
        backend = get(self.backend)
        xp, (V, D) = backend.xp, self.W.shape
        with backend.scope(W=self.W, dout=dout):
            dout = checks.float_array(backend, "dout", dout)
            checks.require_shape("dout", dout, (*x.shape, D), "the shape of forward's result")
            self.dW = xp.zeros((V, D), self.W.dtype)
            if x.size:
                self._add_up(x, dout)
        self._publish()

    def _add_up(self, x: Array, dout: Array) -> None:
        """Add up the rows of each id, in the order of their places."""
        backend = get(self.backend)
        xp, (V, D) = backend.xp, self.W.shape
        ids = x.reshape(-1)
        order = xp.argsort(ids, kind="stable")  # the places of each id one after the other
        starts = xp.searchsorted(ids[order], xp.arange(V + 1))
        rows = backend.empty((ids.size + 1, D), checks.acc_dtype(dout.dtype))
        rows[:-1], rows[-1] = dout.reshape(-1, D)[order], 0  # the last is where ids that do not occur may start
        sums = xp.add.reduceat(rows, starts[:-1], axis=0)
        self.dW[...] = xp.where((starts[1:] > starts[:-1])[:, None], sums, sums.dtype.type(0))

    def __repr__(self) -> str:
        return f"Embedding({self.W.shape[0]}, {self.W.shape[1]})"
