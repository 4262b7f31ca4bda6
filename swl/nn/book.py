"""Layers of the two books that the others do not cover, under the books' names and with their arguments."""

from __future__ import annotations

from typing import Any, Unpack

import numpy as np

from swl.backends import resolve
from swl.nn.affine import Affine
from swl.nn.base import Layer
from swl.nn.embedding import Embedding
from swl.nn.losses import SoftmaxWithLoss
from swl.ops import checks
from swl.options import OptionKwargs, require_number
from swl.typing import Array, ArrayLike, Seed

__all__ = ["BatchNormalization", "Dropout", "MatMul", "TimeAffine", "TimeEmbedding", "TimeSoftmaxWithLoss"]


class Dropout(Layer):
    """Set a random share of the inputs to 0 in training; at inference multiply all by the share that is kept.

    As in the book, ``y = x·m`` with ``m = 1`` where a uniform number is above the ratio, and ``y = (1 − ratio)·x``
    without ``train_flg``. `predict` is the latter.

    Parameters
    ----------
    dropout_ratio : float
        In [0, 1).
    rng : numpy.random.Generator or int, optional
        Of the masks, which are drawn on the host.

    Examples
    --------
    >>> import numpy as np, swl
    >>> layer = swl.Dropout(0.5, rng=0)
    >>> layer.forward(np.ones(6))
    array([1., 0., 0., 0., 1., 1.])
    >>> layer.backward(np.full(6, 3.))
    array([3., 0., 0., 0., 3., 3.])
    >>> layer.forward(np.ones(2), train_flg=False)
    array([0.5, 0.5])
    """

    def __init__(self, dropout_ratio: float = 0.5, *, rng: Seed = None) -> None:
        require_number("dropout_ratio", dropout_ratio, "in [0, 1)", lambda v: 0 <= v < 1)
        self.dropout_ratio = float(dropout_ratio)
        self.rng = checks.generator(rng)

    def forward(self, x: ArrayLike, train_flg: bool = True) -> Array:
        """Compute the output and keep what `backward` needs."""
        backend = resolve(None, {"x": x})
        with backend.scope(x=x):
            x = checks.float_array(backend, "x", x)
            if train_flg:
                mask = backend.asarray((self.rng.random(x.shape) > self.dropout_ratio).astype(x.dtype))
            else:
                mask = backend.asarray(np.full(x.shape, 1 - self.dropout_ratio, x.dtype))
            self._saved = backend, mask
            return x * mask

    def predict(self, x: ArrayLike) -> Array:
        """Compute ``(1 − ratio)·x``, and keep nothing."""
        backend = resolve(None, {"x": x})
        with backend.scope(x=x):
            x = checks.float_array(backend, "x", x)
            return x * x.dtype.type(1 - self.dropout_ratio)

    def backward(self, dout: ArrayLike) -> Array:
        """Compute ``dx = dout·m`` in a new array."""
        backend, mask = self._last_forward()
        with backend.scope(x=mask, dout=dout):
            dout = checks.float_array(backend, "dout", dout)
            checks.require_shape("dout", dout, mask.shape, "the shape of x")
            return dout * mask

    def __repr__(self) -> str:
        return f"Dropout({self.dropout_ratio:g})"


class BatchNormalization(Layer):
    """Bring each feature to mean 0 and variance 1 over the batch, then to ``γ·x̂ + β`` (Ioffe and Szegedy, 2015).

    ``x̂ = (x − μ)/√(σ² + ε)``, with μ and σ² of the batch in training, and their running means at inference, which is
    what `predict` does.

    Parameters
    ----------
    gamma, beta : array, shape (D,), floating
        Kept, not copied.
    momentum : float
        Of the running means: ``running ← momentum·running + (1 − momentum)·batch``.
    running_mean, running_var : array, shape (D,), optional
        Where the running means begin; by default at 0, as in the book.
    eps : float
        ε; the book's.

    Attributes
    ----------
    gamma, beta, dgamma, dbeta : array
    running_mean, running_var : array, or None before the first forward

    Notes
    -----
    Inputs of more than two axes are taken as ``(N, D)``, say ``(N, C, H, W)`` as ``(N, C·H·W)``. The running means are no
    parameters, so a `state_dict` does not hold them.

    Examples
    --------
    >>> import numpy as np, swl
    >>> layer = swl.BatchNormalization(np.array([2.]), np.array([1.]))
    >>> layer.forward(np.array([[1.], [3.]])).round(3)
    array([[-1.],
           [ 3.]])
    """

    names = ("gamma", "beta")

    def __init__(
        self,
        gamma: ArrayLike,
        beta: ArrayLike,
        momentum: float = 0.9,
        running_mean: ArrayLike | None = None,
        running_var: ArrayLike | None = None,
        *,
        eps: float = 1e-6,
    ) -> None:
        require_number("momentum", momentum, "in [0, 1]", lambda v: 0 <= v <= 1)
        require_number("eps", eps, "above 0", lambda v: 0 < v < float("inf"))
        backend = resolve(None, {"gamma": gamma, "beta": beta})
        with backend.scope(gamma=gamma, beta=beta):
            arrays = [checks.float_array(backend, name, value) for name, value in (("gamma", gamma), ("beta", beta))]
        if arrays[0].ndim != 1:
            raise ValueError(f"gamma must have shape (D,), got {arrays[0].shape}")
        checks.require_shape("beta", arrays[1], arrays[0].shape, "the shape of gamma")
        self.gamma, self.beta = arrays
        if (running_mean is None) != (running_var is None):
            raise TypeError("running_mean and running_var must both be given, or neither")
        self.running_mean: Array = running_mean
        self.running_var: Array = running_var
        for name in ("running_mean", "running_var") if running_mean is not None else ():
            with backend.scope(gamma=arrays[0]):
                found = checks.float_array(backend, name, getattr(self, name))
            checks.require_shape(name, found, arrays[0].shape, "the shape of gamma")
            setattr(self, name, found)
        self.momentum, self.eps = float(momentum), float(eps)
        self.dgamma: Any = None
        self.dbeta: Any = None

    def forward(self, x: ArrayLike, train_flg: bool = True) -> Array:
        """Compute the output and keep what `backward` needs."""
        y, self._saved = self._compute(x, train_flg)
        return y

    def predict(self, x: ArrayLike) -> Array:
        """Compute the output with the running means, and keep nothing."""
        return self._compute(x, False)[0]

    def _compute(self, x: Array, train_flg: bool) -> tuple[Array, Array]:
        backend = resolve(None, {"gamma": self.gamma})
        with backend.scope(gamma=self.gamma, x=x):
            x = checks.float_array(backend, "x", x)
            if x.ndim < 2 or checks.size_of(x.shape[1:]) != self.gamma.size:
                raise ValueError(f"x must have shape (N, {self.gamma.size}), or axes of that product, got {x.shape}")
            x2 = x.reshape(len(x), -1).astype(checks.acc_dtype(x.dtype), copy=False)
            if self.running_mean is None:
                self.running_mean, self.running_var = backend.xp.zeros(x2.shape[1]), backend.xp.zeros(x2.shape[1])
            if train_flg:
                mean = x2.mean(axis=0)
                centred = x2 - mean
                variance = (centred**2).mean(axis=0)
                keep = self.momentum
                self.running_mean = keep * self.running_mean + (1 - keep) * mean
                self.running_var = keep * self.running_var + (1 - keep) * variance
            else:
                mean, variance = (r.astype(x2.dtype) for r in (self.running_mean, self.running_var))
                centred = x2 - mean
            deviation = (variance + self.eps) ** 0.5
            normal = centred / deviation
            y = (self.gamma * normal + self.beta).astype(x.dtype, copy=False)
            return y.reshape(x.shape), (backend, x, normal, deviation, train_flg)

    def backward(self, dout: ArrayLike) -> Array:
        """Compute ``dx`` in a new array, and leave ``dgamma = Σ_n dout·x̂`` and ``dbeta = Σ_n dout`` on the layer.

        ``dx = γ/√(σ² + ε)·(dout − mean(dout) − x̂·mean(dout·x̂))``, without the means after an inference.
        """
        backend, x, normal, deviation, train_flg = self._last_forward()
        with backend.scope(x=x, dout=dout):
            dout = checks.float_array(backend, "dout", dout)
            checks.require_shape("dout", dout, x.shape, "the shape of x")
            d = dout.reshape(normal.shape).astype(normal.dtype, copy=False)
            self.dgamma, self.dbeta = (part.sum(axis=0).astype(self.gamma.dtype) for part in (d * normal, d))
            if train_flg and len(d):
                d = d - d.mean(axis=0) - normal * (d * normal).mean(axis=0)
            dx = self.gamma * d / deviation
            self._publish()
            return dx.astype(x.dtype, copy=False).reshape(x.shape)

    def __repr__(self) -> str:
        return f"BatchNormalization({self.gamma.size})"


class MatMul(Affine):
    """The product ``y = x·W``: an `Affine` without a bias."""

    def __init__(self, W: ArrayLike) -> None:
        super().__init__(W)


class TimeAffine(Affine):
    """The affine map of every time step: an `Affine`, which takes inputs ``(N, T, D)`` as they are."""


class TimeEmbedding(Embedding):
    """The rows of every time step: an `Embedding`, which takes ids ``(N, T)`` as they are."""


class TimeSoftmaxWithLoss(SoftmaxWithLoss):
    """The mean loss over time steps ``(N, T, V)``, those with the target −1 aside: a `SoftmaxWithLoss` with that id to ignore.

    Parameters
    ----------
    **options
        Those of `SoftmaxWithLoss`.
    """

    def __init__(self, **options: Unpack[OptionKwargs]) -> None:
        options.setdefault("ignore_index", -1)
        super().__init__(**options)
