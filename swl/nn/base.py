"""What layers are made of: the base class, and the parameters of an affine map, which two layers have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np

from swl.backends import Backend, active, get, resolve, scope
from swl.ops import checks
from swl.ops.arrays import beside, to_numpy
from swl.ops.loss import Loss, Problem
from swl.options import Options
from swl.typing import Array, ArrayLike, DTypeLike, Seed

__all__ = ["Layer", "LossLayer", "WithAffineParameters", "bring", "describe"]


def bring(backend: Backend, name: str, x: Array) -> Array:
    """Bring `x` to a layer's backend: host to device is a copy, device to host an error that says so."""
    if type(x) is np.ndarray and backend.xp is np:
        return x
    if hasattr(x, "dtype"):
        resolve(backend.name, {name: x})
    return checks.any_array(backend, name, x)


def _as_stored(x: Array, p: Array) -> Array:
    """Undo what ``numpy.savez`` does to bfloat16, which it stores as two nameless bytes."""
    return x.view(p.dtype) if x.dtype.kind == "V" and x.dtype.itemsize == p.dtype.itemsize else x


def describe(options: Options) -> list[str]:
    """Say which options differ from their defaults, as a call would; of an array its dtype and shape."""
    given = Options()._asdict()

    def one(value: Any) -> str:
        return f"<{value.dtype} {value.shape}>" if getattr(value, "shape", ()) else repr(value)

    return [f"{name}={one(value)}" for name, value in options._asdict().items() if value is not given[name]]


class Layer:
    """What the layers share: they say in `_run` how to compute, and get forward and predict from it."""

    names: ClassVar[tuple[str, ...]] = ()
    """Attributes that hold parameters; the gradient of ``W`` is the attribute ``dW``."""
    _saved: Any = None  # what forward leaves for backward
    _grads: list[Any] | None = None  # the arrays of `grads`, once somebody has asked for them

    def __call__(self, *args: Any) -> Any:
        """Compute ``forward(*args)``."""
        return self.forward(*args)

    def _run(self, x: Array) -> tuple[Array, Array]:
        """Compute the output, and what `backward` needs."""
        raise NotImplementedError

    def forward(self, x: ArrayLike) -> Array:
        """Compute the output and keep what `backward` needs."""
        y, self._saved = self._run(x)
        return y

    def predict(self, x: ArrayLike) -> Array:
        """Compute the output and keep nothing: a later `backward` still belongs to the last `forward`."""
        return self._run(x)[0]

    def parameters(self) -> dict[str, Array]:
        """Give the parameters by name: the very arrays, to be updated in place."""
        return {name: p for name in self.names if (p := getattr(self, name)) is not None}

    def gradients(self) -> dict[str, Array]:
        """Give the gradients of the last `backward` under the names of their parameters.

        Raises
        ------
        RuntimeError
            If there was no `backward` yet.
        """
        found = {}
        for name in self.names:
            if getattr(self, name) is not None:
                found[name] = getattr(self, "d" + name)
                if found[name] is None:
                    raise RuntimeError(f"{type(self).__name__} has no gradients: call backward first")
        return found

    @property
    def params(self) -> list[Array]:
        """The parameters in order, the very arrays: a list, as the second book's layers have it."""
        return list(self.parameters().values())

    @property
    def grads(self) -> list[Array]:
        """Their gradients, as the second book's layers have them: the same arrays always, which each `backward` overwrites.

        ``dW`` and ``db`` are new arrays after each `backward`; these are copies of them, made once someone has asked.
        """
        if self._grads is None:
            self._grads = [beside(p, np.zeros(p.shape, p.dtype)) for p in self.params]
            self._publish()
        return list(self._grads)

    def _publish(self) -> None:
        """Copy new gradients to where `grads` has them; each `backward` of a layer with parameters ends with this."""
        for g, name in zip(self._grads or (), self.parameters(), strict=False):
            gradient = getattr(self, "d" + name)
            if gradient is not None:
                with scope(g=g):
                    g[...] = gradient

    def state_dict(self) -> dict[str, Array]:
        """Give a snapshot of the parameters: NumPy copies by name, which later training does not touch.

        Examples
        --------
        >>> import swl
        >>> layer = swl.Affine.init(4, 2)
        >>> best = layer.state_dict()  # numpy.savez("best.npz", **best) saves it
        >>> layer.load_state_dict(best)
        """
        return {name: to_numpy(p) for name, p in self.parameters().items()}

    def load_state_dict(self, state: Mapping[str, ArrayLike]) -> None:
        """Copy `state` into the parameters, in place; all of it is checked before anything is written.

        Parameters
        ----------
        state : mapping of names to arrays
            A `state_dict`, or what `numpy.load` gives of a saved one. Values are rounded to the parameters' dtypes.

        Raises
        ------
        TypeError, ValueError
            If names or shapes are not those of the parameters, or values are not real numbers.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a mapping of names to arrays, got {type(state).__name__}")
        parameters = self.parameters()
        missing, unknown = sorted(parameters.keys() - set(state)), sorted(set(state) - parameters.keys())
        if missing or unknown:
            raise ValueError(f"state must name exactly the parameters: missing are {missing}, unknown are {unknown}")
        values = {}
        for name, p in parameters.items():
            checks.require_plain(f"state[{name!r}]", state[name])
            values[name] = _as_stored(np.asarray(state[name]), p)
            if not checks.is_real(values[name].dtype):
                raise TypeError(f"state[{name!r}] must hold real numbers, got {values[name].dtype}")
            checks.require_shape(f"state[{name!r}]", values[name], p.shape, "the shape of the parameter")
            if not getattr(p.flags, "writeable", True):
                raise ValueError(f"parameter {name!r} is read-only")
        for name, p in parameters.items():
            with scope(p=p):
                p[...] = beside(p, values[name].astype(p.dtype))

    def _last_forward(self) -> Any:
        if self._saved is None:
            raise RuntimeError(f"{type(self).__name__}.backward was called before forward")
        return self._saved

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_saved", "_grads")}

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class LossLayer(Layer):
    """What the layers that end a network share: they say in `begin` what the loss is, and get the rest from it."""

    options: Options
    t: ArrayLike | None = None
    """The target of the last forward, or None."""
    loss: ArrayLike | None = None
    """The loss of the last forward, or None."""

    def begin(self, x: ArrayLike, t: ArrayLike) -> Problem:
        """Check a batch; its `denominator` is then known, and `finish` does the rest."""
        raise NotImplementedError

    def finish(self, problem: Problem, t: ArrayLike, dout: ArrayLike = 1) -> tuple[Array, Array]:
        """Compute a batch that was begun; returns as `forward_backward`."""
        done, gradients = problem.forward_backward(dout)
        return self._keep(done, t), self._give(gradients)

    def forward(self, x: ArrayLike, t: ArrayLike) -> Array:  # type: ignore[override]
        """Compute the loss and keep what `backward` needs."""
        return self._keep(self.begin(x, t).forward(), t)

    def backward(self, dout: ArrayLike = 1) -> Array:
        """Compute the gradient of the input, ``dout·∂loss/∂x``, in a new array.

        Parameters
        ----------
        dout : number or 0-d array; under ``reduction="none"`` also shape (...)
            Gradient of whatever comes after the loss.

        Raises
        ------
        RuntimeError
            Before the first `forward`.
        """
        return self._give(self._last_forward().backward(dout))

    def forward_backward(self, x: ArrayLike, t: ArrayLike, dout: ArrayLike = 1) -> tuple[Array, Array]:
        """Compute loss and gradient in one sweep; bitwise the same as `forward`, then `backward`.

        Returns
        -------
        loss, dx : arrays
        """
        return self.finish(self.begin(x, t), t, dout)

    def _keep(self, done: Loss, t: Array) -> Array:
        self._saved, self.t, self.loss = done, t, done.value
        return self.loss

    def _give(self, gradients: Array) -> Array:
        """Leave the parameters' gradients on the layer and return the input's."""
        return gradients

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "t": None, "loss": None}


class WithAffineParameters(Layer):
    """A layer with the parameters ``W (D, K)`` and ``b (K,)``, which it keeps as they are given."""

    names = ("W", "b")

    def __init__(self, W: ArrayLike, b: ArrayLike | None = None, *, asked: str | None = None) -> None:
        self.backend = resolve(asked, {"W": W}).name
        self.dW: Array = None
        self.db: Array = None
        self._place(W, b)

    @classmethod
    def init(cls, D: int, K: int, *, rng: Seed = None, dtype: DTypeLike = np.float32, **options: Any) -> Self:
        """Draw ``W ~ N(0, 2/D)`` (He et al., 2015), set ``b = 0``, and place both on the active backend.

        Parameters
        ----------
        D, K : int
            Sizes of input and output.
        rng : numpy.random.Generator or int, optional
            Generator or seed. The numbers are drawn on the host, so they are the same on every backend.
        dtype : floating dtype
        **options
            What the layer takes beside its parameters.

        Examples
        --------
        >>> import swl
        >>> swl.Affine.init(784, 50, rng=0)
        Affine(784, 50)
        """
        for name, size in (("D", D), ("K", K)):
            checks.require_integer(name, size, 1)
        dtype = checks.float_dtype("dtype", dtype)
        W = checks.generator(rng).standard_normal((D, K)) * math.sqrt(2 / D)
        backend = get(active())
        return cls(backend.asarray(W.astype(dtype)), backend.asarray(np.zeros(K, dtype)), **options)

    @property
    def W(self) -> Array:  # noqa: N802 - the book's name
        """The weights ``(D, K)``."""
        return self._W

    @W.setter
    def W(self, W: ArrayLike) -> None:  # noqa: N802 - the book's name
        self._place(W, self._b)

    @property
    def b(self) -> Array:
        """The bias ``(K,)``, or None."""
        return self._b

    @b.setter
    def b(self, b: ArrayLike) -> None:
        self._place(self._W, b)

    def _place(self, W: Array, b: Array) -> None:
        backend = get(self.backend)
        with backend.scope(W=W, b=b):
            b = None if b is None else bring(backend, "b", b)
            self._W, self._b = checks.affine_parameters(backend, bring(backend, "W", W), b)

    @property
    def x(self) -> Array:
        """The input of the last `forward`."""
        return None if self._saved is None else self._input(self._saved)

    def _input(self, saved: Any) -> Any:
        return saved.x
