"""The layers, with the names of the book *Deep Learning from Scratch*: ``x W b dW db dout y t``.

A layer is whatever has ``forward`` and ``backward``. Those here derive from `Layer`, which adds ``predict`` (forward
without a trace), parameters by name, and copies and pickles that leave the last forward pass behind.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Unpack

import numpy as np

from swl.backends import NOTHING, active, get, resolve
from swl.nn.base import Layer, WithAffineParameters, bring, describe
from swl.nn.fused_head import AffineSoftmaxWithLoss
from swl.ops import checks
from swl.ops import loss as passes
from swl.ops.arrays import beside
from swl.options import OptionKwargs, Options

__all__ = [
    "Affine",
    "AffineSoftmaxWithLoss",
    "Embedding",
    "Layer",
    "ReLU",
    "Relu",
    "Sequential",
    "Sigmoid",
    "SoftmaxWithLoss",
]


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

    def __init__(self, W: Any, b: Any = None, *, needs_dx: bool = True) -> None:
        super().__init__(W, b)
        self.needs_dx = bool(needs_dx)

    def forward(self, x: Any) -> Any:
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

    def _run(self, x: Any) -> tuple[Any, passes.AffinePass]:
        backend = get(self.backend)
        with backend.scope(W=self._W, x=x):
            done = passes.AffinePass.of(backend, bring(backend, "x", x), self._W)
            return done.forward(self._b), done

    def backward(self, dout: Any) -> Any:
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
        return dx

    def __repr__(self) -> str:
        D, K = self._W.shape
        return f"Affine({D}, {K})" if self._b is not None else f"Affine({D}, {K}, no bias)"


_NEEDS = {
    (dx, db): tuple(name for name, wanted in (("dx", dx), ("dW", True), ("db", db)) if wanted)
    for dx in (False, True)
    for db in (False, True)
}


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

    def _run(self, x: Any) -> tuple[Any, Any]:
        backend = resolve(None, {"x": x})
        with backend.scope(x=x):
            x = checks.float_array(backend, "x", x)
            with np.errstate(invalid="ignore") if x.dtype.kind == "V" else NOTHING:  # NumPy's bfloat16 warns of NaN
                return backend.xp.maximum(x, x.dtype.type(0)), (backend, x.dtype, x <= 0)

    def backward(self, dout: Any) -> Any:
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

    def _run(self, x: Any) -> tuple[Any, Any]:
        backend = resolve(None, {"x": x})
        with backend.scope(x=x):
            x = checks.float_array(backend, "x", x)
            xp, acc = backend.xp, checks.acc_dtype(x.dtype)  # 16-bit input computes in float32
            e = xp.exp(-xp.abs(x.astype(acc, copy=False)))
            y = xp.where(x < 0, e, acc.type(1)) / (1 + e)
            return y.astype(x.dtype, copy=False), (backend, x.dtype, e / (1 + e) ** 2)

    def backward(self, dout: Any) -> Any:
        """Compute ``dx = dout·∂y/∂x`` in a new array."""
        backend, dtype, slope = self._last_forward()
        with backend.scope(x=slope, dout=dout):
            dout = checks.float_array(backend, "dout", dout)
            checks.require_shape("dout", dout, slope.shape, "the shape of x")
            return (dout * slope).astype(dtype, copy=False)


class SoftmaxWithLoss(Layer):
    """Softmax and cross-entropy as the last layer.

    Parameters
    ----------
    **options
        Those of `swl.cross_entropy`: ``weight, ignore_index, reduction, label_smoothing, sample_weight, z_loss,
        softcap, denominator, backend, check``.

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
        self.t: Any = None
        self.loss: Any = None
        self._y: Any = None
        self._placed: dict[Any, Options] = {}

    def _inputs(self, x: Any, t: Any) -> tuple[Any, Any, Options]:
        """Bring target and options to where the scores are."""
        options = self.options
        plain = options.weight is None and options.sample_weight is None
        if plain and type(x) is type(t) is np.ndarray:
            return x, t, options  # the function brings the two where they belong
        backend = resolve(options.backend, {"x": x})
        with backend.scope(x=x, t=t):
            if type(x) is not np.ndarray or backend.xp is not np:
                x = backend.asarray(x)
            t = bring(backend, "t", t)
            if plain:
                return x, t, options
            home = backend.name, str(getattr(x, "device", ""))
            if home not in self._placed:
                arrays = {"weight": options.weight, "sample_weight": options.sample_weight}
                here = {name: bring(backend, name, a) for name, a in arrays.items() if a is not None}
                self._placed[home] = options._replace(**here)
            return x, t, self._placed[home]

    def forward(self, x: Any, t: Any) -> Any:  # type: ignore[override]
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
        x, t, options = self._inputs(x, t)
        if (small := passes.at_once(x, t, options, False, None, 1.0)) is not None:
            return self._keep(passes.SmallPass(x, t, options, *small), t)
        return self._keep(passes.cross_entropy_forward(x, t, options), t)

    def backward(self, dout: Any = 1) -> Any:
        """Compute the gradient of the scores, ``dout·∂loss/∂x``, in a new array.

        Parameters
        ----------
        dout : number or 0-d array; under ``reduction="none"`` also shape (...)
            Gradient of whatever comes after the loss.

        Raises
        ------
        RuntimeError
            Before the first `forward`.
        """
        return self._last_forward().backward(dout)

    def forward_backward(self, x: Any, t: Any, dout: Any = 1) -> tuple[Any, Any]:
        """Compute loss and gradient in one sweep; bitwise the same as `forward`, then `backward`.

        Returns
        -------
        loss, dx : arrays
        """
        x, t, options = self._inputs(x, t)
        dout = beside(x, dout) if type(dout) is np.ndarray else dout
        if (small := passes.at_once(x, t, options, False, None, dout)) is not None:
            loss, dx = small
            return self._keep(passes.SmallPass(x, t, options, loss), t), dx
        done, dx = passes.one_sweep(x, t, options, dout)
        return self._keep(done, t), dx

    def predict(self, x: Any) -> Any:
        """Give the scores back as they are: inference needs no softmax."""
        return x

    def _keep(self, done: passes.Pass | passes.SmallPass, t: Any) -> Any:
        self._saved, self._y, self.t, self.loss = done, None, t, done.loss
        return self.loss

    @property
    def y(self) -> Any:
        """The probabilities of the last forward, computed when first asked for."""
        if self._y is None and self._saved is not None:
            self._y = self._saved.probabilities()
        return self._y

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "t": None, "loss": None, "_y": None, "_placed": {}}

    def __repr__(self) -> str:
        return f"SoftmaxWithLoss({', '.join(describe(self.options))})"


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

    def __init__(self, W: Any) -> None:
        self.backend = resolve(None, {"W": W}).name
        backend = get(self.backend)
        self.W, _ = checks.affine_parameters(backend, bring(backend, "W", W), None)
        self.dW: Any = None

    @classmethod
    def init(cls, V: int, D: int, *, rng: Any = None, dtype: Any = np.float32) -> Embedding:
        """Draw ``W ~ N(0, 1)`` on the host, and place it on the active backend."""
        for name, size in (("V", V), ("D", D)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        return cls(get(active()).asarray(np.random.default_rng(rng).standard_normal((V, D)).astype(dtype)))

    def _run(self, x: Any) -> tuple[Any, Any]:
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

    def backward(self, dout: Any) -> None:
        """Leave ``dW``, where row v is the sum of `dout` over the places with id v, on the layer; ids have no gradient."""
        x = self._last_forward()
        backend = get(self.backend)
        xp, (V, D) = backend.xp, self.W.shape
        with backend.scope(W=self.W, dout=dout):
            dout = checks.float_array(backend, "dout", dout)
            checks.require_shape("dout", dout, (*x.shape, D), "the shape of forward's result")
            self.dW = xp.zeros((V, D), self.W.dtype)
            if not x.size:
                return
            ids = x.reshape(-1)
            order = xp.argsort(ids, kind="stable")  # the places of each id one after the other
            starts = xp.searchsorted(ids[order], xp.arange(V + 1))
            rows = backend.empty((ids.size + 1, D), checks.acc_dtype(dout.dtype))
            rows[:-1], rows[-1] = dout.reshape(-1, D)[order], 0  # the last is where ids that do not occur may start
            sums = xp.add.reduceat(rows, starts[:-1], axis=0)
            self.dW[...] = xp.where((starts[1:] > starts[:-1])[:, None], sums, sums.dtype.type(0))

    def __repr__(self) -> str:
        return f"Embedding({self.W.shape[0]}, {self.W.shape[1]})"


class Sequential(Layer):
    """Layers one after the other; the last may be a loss.

    Parameters
    ----------
    *layers : objects with ``forward`` and ``backward``
        The library's layers, other `Sequential` objects, or your own. The parameters of your own are what their
        ``parameters()`` and ``gradients()`` give, or else their attributes ``W``, ``b``, ``dW``, ``db``. A layer with
        ``forward_backward`` is a loss.

    Examples
    --------
    >>> import numpy as np, swl
    >>> net = swl.Sequential(
    ...     swl.Affine.init(64, 20, rng=0), swl.ReLU(), swl.Affine.init(20, 10, rng=1), swl.SoftmaxWithLoss()
    ... )
    >>> x, t = np.zeros((3, 64), np.float32), np.array([1, 2, 3])
    >>> loss = net.forward(x, t)
    >>> dx = net.backward()
    >>> {name: g.shape for name, g in net.gradients().items()}
    {'0.W': (64, 20), '0.b': (20,), '2.W': (20, 10), '2.b': (10,)}
    >>> net.predict(x).shape
    (3, 10)
    """

    def __init__(self, *layers: Any) -> None:
        if not layers:
            raise ValueError("Sequential needs at least one layer")
        for i, layer in enumerate(layers):
            if not (callable(getattr(layer, "forward", None)) and callable(getattr(layer, "backward", None))):
                raise TypeError(f"layer {i} must have the methods forward and backward, got {layer!r}")
            if _is_loss(layer) and i != len(layers) - 1:
                raise ValueError(f"a loss must be the last of the {len(layers)} layers, got {layer!r} as layer {i}")
        leaves = [id(leaf) for leaf in _leaves(layers)]
        if len(set(leaves)) != len(leaves):
            raise ValueError("a layer keeps its last forward pass, so it may not occur twice in a Sequential")
        self.layers = layers
        self.is_loss = _is_loss(layers[-1])
        self._body = layers[:-1] if self.is_loss else layers

    def forward(self, x: Any, t: Any = None) -> Any:
        """Compute the output of the last layer; if that is a loss, the loss for target `t`."""
        self._check_target(t)
        for layer in self._body:
            x = layer.forward(x)
        return self.layers[-1].forward(x, t) if self.is_loss else x

    def backward(self, dout: Any = 1) -> Any:
        """Compute the gradient of the input; each layer then holds its parameters' gradients.

        Parameters
        ----------
        dout : as the last layer's ``backward`` takes it
            Gradient of what follows; may be left out where the last layer is a loss.
        """
        for layer in reversed(self.layers):
            dout = layer.backward(dout)
        return dout

    def forward_backward(self, x: Any, t: Any, dout: Any = 1) -> tuple[Any, Any]:
        """Compute ``forward(x, t)`` and ``backward(dout)``, the loss and its gradient in one sweep.

        Returns
        -------
        loss, dx : arrays

        Raises
        ------
        TypeError
            If the last layer is not a loss.
        """
        if not self.is_loss:
            raise TypeError(f"forward_backward needs a loss as the last layer, got {self.layers[-1]!r}")
        self._check_target(t)
        for layer in self._body:
            x = layer.forward(x)
        loss, dout = self.layers[-1].forward_backward(x, t, dout)
        for layer in reversed(self._body):
            dout = layer.backward(dout)
        return loss, dout

    def predict(self, x: Any) -> Any:
        """Compute the scores, without softmax and without touching what `backward` needs.

        A layer that has no ``predict`` is called by its ``forward``.
        """
        for layer in self.layers:
            x = getattr(layer, "predict", layer.forward)(x)
        return x

    def parameters(self) -> dict[str, Any]:
        """Give all parameters, the very arrays, under names like ``"0.W"``: the layer's place and its own name."""
        return {f"{i}.{name}": p for i, layer in enumerate(self.layers) for name, p in _parameters(layer).items()}

    def gradients(self) -> dict[str, Any]:
        """Give the gradients of the last `backward` under the names of their parameters."""
        return {f"{i}.{name}": g for i, layer in enumerate(self.layers) for name, g in _gradients(layer).items()}

    def _check_target(self, t: Any) -> None:
        if self.is_loss and t is None:
            raise TypeError("the last layer is a loss: forward needs the target t (predict needs none)")
        if not self.is_loss and t is not None:
            raise TypeError(f"t was given, but the last layer is no loss: {self.layers[-1]!r}")

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, i: int) -> Any:
        return self.layers[i]

    def __repr__(self) -> str:
        return f"Sequential({', '.join(map(repr, self.layers))})"


def _is_loss(layer: Any) -> bool:
    return bool(getattr(layer, "is_loss", hasattr(layer, "forward_backward")))


def _leaves(layers: Iterable[Any]) -> Iterator[Any]:
    for layer in layers:
        if isinstance(layer, Sequential):
            yield from _leaves(layer.layers)
        else:
            yield layer


def _parameters(layer: Any) -> dict[str, Any]:
    """Parameters of a layer of any origin."""
    if hasattr(layer, "parameters"):
        return dict(layer.parameters())
    return {name: p for name in ("W", "b") if (p := getattr(layer, name, None)) is not None}


def _gradients(layer: Any) -> dict[str, Any]:
    if hasattr(layer, "gradients"):
        return dict(layer.gradients())
    return {name: getattr(layer, "d" + name) for name in _parameters(layer)}
