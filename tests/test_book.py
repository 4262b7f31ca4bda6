"""The two-layer network of *Deep Learning from Scratch* runs with only its imports changed.

The class follows the book's interface (dict of parameters, ordered dict of layers, ``params[k] -= lr * grads[k]``).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest

import swl
from swl import Affine, Relu, SoftmaxWithLoss, numerical_gradient
from swl.backends.registry import _REGISTRY

HOSTS = [name for name, (_, home) in _REGISTRY.items() if home == "host"]


class TwoLayerNet:
    def __init__(self, input_size: int, hidden_size: int, output_size: int, weight_init_std: float = 0.01) -> None:
        randn = np.random.RandomState(1).randn  # the book uses NumPy's old generator
        self.params: dict[str, Any] = {}
        self.params["W1"] = weight_init_std * randn(input_size, hidden_size)
        self.params["b1"] = np.zeros(hidden_size)
        self.params["W2"] = weight_init_std * randn(hidden_size, output_size)
        self.params["b2"] = np.zeros(output_size)
        self.layers: OrderedDict[str, Any] = OrderedDict()
        self.layers["Affine1"] = Affine(self.params["W1"], self.params["b1"])
        self.layers["Relu1"] = Relu()
        self.layers["Affine2"] = Affine(self.params["W2"], self.params["b2"])
        self.lastLayer = SoftmaxWithLoss()

    def predict(self, x: Any) -> Any:
        for layer in self.layers.values():
            x = layer.forward(x)
        return x

    def loss(self, x: Any, t: Any) -> Any:
        return self.lastLayer.forward(self.predict(x), t)

    def accuracy(self, x: Any, t: Any) -> float:
        y = np.argmax(self.predict(x), axis=1)
        if t.ndim != 1:
            t = np.argmax(t, axis=1)
        return np.sum(y == t) / float(x.shape[0])

    def numerical_gradient(self, x: Any, t: Any) -> dict[str, Any]:
        def loss_W(W: Any) -> Any:  # noqa: N802 - the book's name
            return self.loss(x, t)

        return {key: numerical_gradient(loss_W, self.params[key]) for key in ("W1", "b1", "W2", "b2")}

    def gradient(self, x: Any, t: Any) -> dict[str, Any]:
        self.loss(x, t)
        dout: Any = 1
        dout = self.lastLayer.backward(dout)
        layers = list(self.layers.values())
        layers.reverse()
        for layer in layers:
            dout = layer.backward(dout)
        return {
            "W1": self.layers["Affine1"].dW,
            "b1": self.layers["Affine1"].db,
            "W2": self.layers["Affine2"].dW,
            "b2": self.layers["Affine2"].db,
        }


def digits(one_hot: bool) -> tuple[Any, Any, Any, Any]:
    datasets = pytest.importorskip("sklearn.datasets")
    x, t = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, t = x[order] / 16, t[order]
    if one_hot:
        t = np.eye(10, dtype=int)[t]
    return x[:1500], t[:1500], x[1500:], t[1500:]


@pytest.mark.parametrize("one_hot", [True, False], ids=["one-hot", "ids"])
@pytest.mark.parametrize("name", HOSTS)
def test_its_gradient_check(name: str, one_hot: bool) -> None:
    x, t, _, _ = digits(one_hot)
    with swl.use_backend(name):
        network = TwoLayerNet(input_size=64, hidden_size=12, output_size=10)
        numerical, backprop = network.numerical_gradient(x[:3], t[:3]), network.gradient(x[:3], t[:3])
    for key in numerical:
        assert np.average(np.abs(backprop[key] - numerical[key])) < 1e-9
        assert np.abs(backprop[key]).max() > 1e-3


@pytest.mark.parametrize("one_hot", [True, False], ids=["one-hot", "ids"])
@pytest.mark.parametrize("name", HOSTS)
def test_it_trains(name: str, one_hot: bool) -> None:
    x_train, t_train, x_test, t_test = digits(one_hot)
    rng = np.random.default_rng(0)
    with swl.use_backend(name):
        network = TwoLayerNet(input_size=64, hidden_size=50, output_size=10)
        first = float(network.loss(x_train, t_train))
        for _ in range(1000):
            batch_mask = rng.choice(len(x_train), 100)
            grad = network.gradient(x_train[batch_mask], t_train[batch_mask])
            for key in ("W1", "b1", "W2", "b2"):
                network.params[key] -= 0.5 * grad[key]
        assert first == pytest.approx(np.log(10), abs=0.01)
        assert float(network.loss(x_train, t_train)) < 0.1
        assert network.accuracy(x_test, t_test) > 0.94


def test_its_parameters_may_live_on_any_backend(backend: Any) -> None:
    """The same loop with ``swl.asarray`` around what `randn` gave, as a device needs it."""
    x, t, _, _ = digits(one_hot=False)
    network = TwoLayerNet(64, 50, 10)
    losses = []
    for here in ("numpy", backend.name):
        with swl.use_backend(here):
            params = {key: swl.asarray(value.copy()) for key, value in network.params.items()}
            layers = [Affine(params["W1"], params["b1"]), Relu(), Affine(params["W2"], params["b2"])]
            last = SoftmaxWithLoss()
            for step in range(3):
                y = x[step * 100 : step * 100 + 100]
                for layer in layers:
                    y = layer.forward(y)
                loss = last.forward(y, t[step * 100 : step * 100 + 100])
                dout = last.backward()
                for layer in reversed(layers):
                    dout = layer.backward(dout)
                for key, g in (("W1", layers[0].dW), ("b1", layers[0].db), ("W2", layers[2].dW), ("b2", layers[2].db)):
                    params[key] -= 0.5 * g
            losses.append(float(loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert losses[0] < 2.31
