"""Softmax and cross-entropy as the last layer."""

from __future__ import annotations

from typing import Any, Unpack

import numpy as np

from swl.backends import resolve, scope
from swl.nn.base import LossLayer, bring, describe
from swl.ops import checks
from swl.ops.arrays import beside
from swl.ops.cross_entropy import check, forward, forward_backward
from swl.ops.loss import Loss, Problem
from swl.options import OptionKwargs, Options
from swl.typing import Array, ArrayLike

__all__ = ["SoftmaxWithLoss"]


class SoftmaxWithLoss(LossLayer):
    """Softmax and cross-entropy as the last layer.

    Parameters
    ----------
    **options
        The fields of `swl.options.Options`.

    Attributes
    ----------
    y : array, shape (..., C), or None
        The probabilities of the last forward, computed when first asked for.
    t : array or None
        The target of the last forward.
    loss : 0-d array, or shape (...) under ``reduction="none"``, or None

    Examples
    --------
    >>> import numpy as np, swl
    >>> layer = swl.SoftmaxWithLoss()
    >>> layer.forward(np.zeros((1, 4)), np.array([3]))
    array(1.38629436)
    >>> layer.backward()
    array([[ 0.25,  0.25,  0.25, -0.75]])
    >>> layer.y
    array([[0.25, 0.25, 0.25, 0.25]])
    """

    def __init__(self, **options: Unpack[OptionKwargs]) -> None:
        self.options = Options.checked(options)
        self._y: Any = None
        self._placed: dict[Any, Options] = {}

    def _inputs(self, x: Array, t: Array) -> tuple[Array, Array, Options]:
        """Bring target and options to where the scores are."""
        options = self.options
        plain = options.weight is None and options.sample_weight is None
        if plain and type(x) is type(t) is np.ndarray:
            return x, t, options  # the function brings the two where they belong
        backend = resolve(options.backend, {"x": x})
        with backend.scope(x=x, t=t):
            if type(x) is not np.ndarray or backend.xp is not np:
                x = checks.any_array(backend, "x", x)
            t = bring(backend, "t", t)
            if plain:
                return x, t, options
            home = backend.name, str(getattr(x, "device", ""))
            if home not in self._placed:
                arrays = {"weight": options.weight, "sample_weight": options.sample_weight}
                here = {name: bring(backend, name, a) for name, a in arrays.items() if a is not None}
                self._placed[home] = options._replace(**here)
            return x, t, self._placed[home]

    def begin(self, x: ArrayLike, t: ArrayLike) -> Problem:
        """Check a batch; `finish` computes it."""
        x, t, options = self._inputs(x, t)
        with scope(x=x):
            return check(x, t, options)

    def forward(self, x: ArrayLike, t: ArrayLike) -> Array:  # type: ignore[override]
        """Compute the loss.

        Parameters
        ----------
        x : array, shape (..., C), or one row (C,)
            The scores (logits).
        t : array, shape (...) of class ids, or (..., C) of probabilities or one-hot
            A host array is brought to the device of `x`.

        Returns
        -------
        0-d array, or shape (...) under ``reduction="none"``
        """
        return self._keep(forward(*self._inputs(x, t), keep=True), t)

    def forward_backward(self, x: ArrayLike, t: ArrayLike, dout: ArrayLike = 1) -> tuple[Array, Array]:
        """Compute loss and gradient in one sweep; bitwise the same as `forward`, then `backward`."""
        x, t, options = self._inputs(x, t)
        dout = beside(x, dout) if type(dout) is np.ndarray else dout
        done, dx = forward_backward(x, t, options, dout, keep=True)
        return self._keep(done, t), dx

    def predict(self, x: ArrayLike) -> Array:
        """Return the scores as they are: inference needs no softmax."""
        return x

    def _keep(self, done: Loss, t: Array) -> Array:
        self._y = None
        return super()._keep(done, t)

    @property
    def y(self) -> Array:
        """The probabilities of the last forward, computed when first asked for."""
        if self._y is None and self._saved is not None:
            self._y = self._saved.probabilities()
        return self._y

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_y": None, "_placed": {}}

    def __repr__(self) -> str:
        return f"SoftmaxWithLoss({', '.join(describe(self.options))})"
