"""Layers one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from swl.nn.base import Layer
from swl.typing import Array, ArrayLike, LayerLike

__all__ = ["Sequential", "gradients_of", "leaves", "parameters_of"]


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

    def __init__(self, *layers: LayerLike) -> None:
        if not layers:
            raise ValueError("Sequential needs at least one layer")
        for i, layer in enumerate(layers):
            if isinstance(layer, type):
                raise TypeError(
                    f"layer {i} must be a layer, got the class {layer.__name__}: write {layer.__name__}(...)"
                )
            if not (callable(getattr(layer, "forward", None)) and callable(getattr(layer, "backward", None))):
                raise TypeError(f"layer {i} must have the methods forward and backward, got {layer!r}")
            if _is_loss(layer) and i != len(layers) - 1:
                raise ValueError(f"a loss must be the last of the {len(layers)} layers, got {layer!r} as layer {i}")
        seen = [id(leaf) for leaf in leaves(layers)]
        if len(set(seen)) != len(seen):
            raise ValueError("a layer keeps its last forward pass, so it may not occur twice in a Sequential")
        self.layers = layers
        self.is_loss = _is_loss(layers[-1])
        self._body = layers[:-1] if self.is_loss else layers

    def __call__(self, x: Array, t: Array = None) -> Any:
        """Compute ``forward(x, t)``, and without a target the scores of a network that ends with a loss: ``predict(x)``."""
        return self.predict(x) if self.is_loss and t is None else self.forward(x, t)

    def forward(self, x: ArrayLike, t: ArrayLike | None = None) -> Array:
        """Compute the output of the last layer; if that is a loss, the loss for target `t`."""
        self._check_target(t)
        for layer in self._body:
            x = layer.forward(x)
        return self.layers[-1].forward(x, t) if self.is_loss else x

    def backward(self, dout: ArrayLike = 1) -> Array:
        """Compute the gradient of the input; each layer then holds its parameters' gradients.

        Parameters
        ----------
        dout : as the last layer's ``backward`` takes it
            Gradient of what follows; may be left out where the last layer is a loss.
        """
        for layer in reversed(self.layers):
            dout = layer.backward(dout)
        return dout

    def forward_backward(self, x: ArrayLike, t: ArrayLike, dout: ArrayLike = 1) -> tuple[Array, Array]:
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

    def predict(self, x: ArrayLike) -> Array:
        """Compute the scores, without softmax and without touching what `backward` needs.

        A layer that has no ``predict`` is called by its ``forward``.
        """
        for layer in self.layers:
            x = getattr(layer, "predict", layer.forward)(x)
        return x

    def parameters(self) -> dict[str, Array]:
        """Give all parameters, the very arrays, under names like ``"0.W"``: the layer's place and its own name."""
        return {f"{i}.{name}": p for i, layer in enumerate(self.layers) for name, p in parameters_of(layer).items()}

    def gradients(self) -> dict[str, Array]:
        """Give the gradients of the last `backward` under the names of their parameters."""
        return {f"{i}.{name}": g for i, layer in enumerate(self.layers) for name, g in gradients_of(layer).items()}

    @property
    def grads(self) -> list[Array]:
        """The gradients of all layers in order, in arrays that each `backward` overwrites."""
        return [g for layer in self.layers for g in getattr(layer, "grads", None) or gradients_of(layer).values()]

    def summary(self) -> str:
        """Return a table of the layers with the shapes of their parameters, and how many numbers these are.

        Examples
        --------
        >>> import swl
        >>> net = swl.Sequential(swl.Affine.init(64, 20, rng=0), swl.ReLU(), swl.Affine.init(20, 10, rng=1))
        >>> print(net.summary())
        layer                parameters
        0  Affine(64, 20)    1,300  W (64, 20), b (20,)
        1  ReLU()                0
        2  Affine(20, 10)      210  W (20, 10), b (10,)
                             1,510  float32
        """
        rows, total, dtypes = [], 0, {}
        for i, layer in enumerate(self.layers):
            found = parameters_of(layer)
            count = sum(p.size for p in found.values())
            shapes = ", ".join(f"{name} {p.shape}" for name, p in found.items())
            rows.append((f"{i}  {layer!r}", count, shapes))
            total += count
            dtypes.update(dict.fromkeys(str(p.dtype) for p in found.values()))
        rows.append(("", total, ", ".join(dtypes)))
        left, right = max(len(name) for name, _, _ in rows), len(f"{total:,}")
        lines = [f"{name:<{left}}  {count:>{right},}  {shapes}".rstrip() for name, count, shapes in rows]
        return "\n".join([f"{'layer':<{left}}  parameters", *lines])

    def _check_target(self, t: Array) -> None:
        if self.is_loss and t is None:
            raise TypeError("the last layer is a loss: forward needs the target t (predict needs none)")
        if not self.is_loss and t is not None:
            raise TypeError(f"t was given, but the last layer is no loss: {self.layers[-1]!r}")

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, i: int) -> LayerLike:
        return self.layers[i]

    def __repr__(self) -> str:
        return f"Sequential({', '.join(map(repr, self.layers))})"


def _is_loss(layer: LayerLike) -> bool:
    return bool(getattr(layer, "is_loss", hasattr(layer, "forward_backward")))


def leaves(layers: Iterable[LayerLike]) -> Iterator[LayerLike]:
    """Go through layers, and those within a Sequential among them."""
    for layer in layers:
        if isinstance(layer, Sequential):
            yield from leaves(layer.layers)
        else:
            yield layer


def parameters_of(layer: LayerLike) -> dict[str, Array]:
    """Return the parameters of a layer of any origin, by name."""
    if hasattr(layer, "parameters"):
        return dict(layer.parameters())
    return {name: p for name in ("W", "b") if (p := getattr(layer, name, None)) is not None}


def gradients_of(layer: LayerLike) -> dict[str, Array]:
    """Return the gradients of the last `backward` of a layer of any origin, by the names of its parameters."""
    if hasattr(layer, "gradients"):
        return dict(layer.gradients())
    return {name: getattr(layer, "d" + name) for name in parameters_of(layer)}
