"""Models as both books write them run with only their imports changed, and compute what float64 NumPy does.

Written from the books' published interfaces: lists ``params`` and ``grads`` whose arrays stay the same, in-place updates,
layers over time steps, ``train_flg``.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest

import swl
from swl import (
    SGD,
    Affine,
    BatchNormalization,
    Dropout,
    Relu,
    Sigmoid,
    SoftmaxWithLoss,
    TimeAffine,
    TimeEmbedding,
    TimeSoftmaxWithLoss,
    numerical_gradient,
)
from swl.backends.registry import _REGISTRY

HOSTS = [name for name, (_, home) in _REGISTRY.items() if home == "host"]


@pytest.fixture(params=HOSTS, autouse=True)
def _on(request: pytest.FixtureRequest) -> Any:
    with swl.use_backend(request.param):
        yield


# ------------------------------------------------------------------------------------------------ the second book


class TwoLayerNet:
    """Affine, Sigmoid, Affine, SoftmaxWithLoss; collects the lists once, when it is made."""

    def __init__(self, input_size: int, hidden_size: int, output_size: int) -> None:
        randn = np.random.RandomState(1).randn
        self.layers = [
            Affine(0.1 * randn(input_size, hidden_size), np.zeros(hidden_size)),
            Sigmoid(),
            Affine(0.1 * randn(hidden_size, output_size), np.zeros(output_size)),
        ]
        self.loss_layer = SoftmaxWithLoss()
        self.params: list[Any] = []
        self.grads: list[Any] = []
        for layer in self.layers:
            self.params += layer.params
            self.grads += layer.grads

    def predict(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def forward(self, x: Any, t: Any) -> Any:
        return self.loss_layer.forward(self.predict(x), t)

    def backward(self, dout: Any = 1) -> Any:
        dout = self.loss_layer.backward(dout)
        for layer in reversed(self.layers):
            dout = layer.backward(dout)
        return dout


class Trainer:
    """Batches in order; gradients are clipped where they lie; parameters that are one array are updated once."""

    def __init__(self, model: Any, optimizer: Any) -> None:
        self.model, self.optimizer, self.loss_list = model, optimizer, []

    def fit(self, x: Any, t: Any, max_epoch: int, batch_size: int, max_grad: float | None = None) -> None:
        for _ in range(max_epoch):
            for i in range(len(x) // batch_size):
                rows = slice(i * batch_size, (i + 1) * batch_size)
                loss = self.model.forward(x[rows], t[rows])
                self.model.backward()
                params, grads = self.unique()
                if max_grad is not None:
                    norm = np.sqrt(sum(np.sum(g**2) for g in grads))
                    for g in grads:
                        g *= min(1.0, max_grad / (norm + 1e-6))
                self.optimizer.update(params, grads)
                self.loss_list.append(float(loss))

    def unique(self) -> tuple[list[Any], list[Any]]:
        params: list[Any] = []
        grads: list[Any] = []
        for p, g in zip(self.model.params, self.model.grads, strict=True):
            for q, h in zip(params, grads, strict=True):
                if q is p:
                    h += g
                    break
            else:
                params.append(p)
                grads.append(g)
        return params, grads


def spiral() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    t = rng.permutation(np.arange(90) % 3)
    r = rng.random(90)
    angle = 4 * r + 2 * np.pi / 3 * t
    return np.stack([r * np.sin(angle), r * np.cos(angle)], axis=1), np.eye(3, dtype=int)[t]


def probabilities(z: Any) -> Any:
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("max_grad", [None, 0.05])
def test_the_second_books_trainer_and_network(max_grad: float | None) -> None:
    x, t = spiral()
    model = TwoLayerNet(2, 10, 3)
    lists = list(map(id, model.params + model.grads))
    trainer = Trainer(model, SGD(lr=1.0))
    W1, b1, W2, b2 = (p.copy() for p in model.params)
    trainer.fit(x, t, max_epoch=40, batch_size=30, max_grad=max_grad)
    assert lists == list(map(id, model.params + model.grads))
    assert model.params[0] is model.layers[0].W
    losses = []
    for _ in range(40):
        for i in range(3):
            xs, ts = x[i * 30 : i * 30 + 30], t[i * 30 : i * 30 + 30]
            h = 1 / (1 + np.exp(-(xs @ W1 + b1)))
            y = probabilities(h @ W2 + b2)
            losses.append(-np.log(y[ts == 1]).mean())
            d = (y - ts) / 30
            e = (d @ W2.T) * h * (1 - h)
            grads = [xs.T @ e, e.sum(axis=0), h.T @ d, d.sum(axis=0)]
            rate = 1.0 if max_grad is None else min(1.0, max_grad / (np.sqrt(sum((g**2).sum() for g in grads)) + 1e-6))
            for p, g in zip((W1, b1, W2, b2), grads, strict=True):
                p -= rate * g
    np.testing.assert_allclose(trainer.loss_list, losses, rtol=1e-9)
    assert losses[-1] < losses[0] - 0.02


def test_the_second_books_language_model_over_time() -> None:
    """Embedding, affine map and loss of all time steps at once; steps whose target is −1 do not count; shared gradients."""
    rng = np.random.default_rng(0)
    V, D, N, T = 7, 4, 3, 5
    table, W, b = rng.normal(size=(V, D)), rng.normal(size=(D, V)), rng.normal(size=V)
    ids, ts = rng.integers(0, V, (N, T)), rng.integers(0, V, (N, T))
    ts[0, 2:] = -1
    layers = [TimeEmbedding(table.copy()), TimeAffine(W.copy(), b.copy())]
    loss_layer = TimeSoftmaxWithLoss()
    params, grads = [], []
    for layer in layers:
        params += layer.params
        grads += layer.grads
    for _ in range(3):
        xs = ids
        for layer in layers:
            xs = layer.forward(xs)
        loss = loss_layer.forward(xs, ts)
        dout = loss_layer.backward()
        for layer in reversed(layers):
            dout = layer.backward(dout)
        assert dout is None
        z = table[ids] @ W + b
        y = probabilities(z)
        counts = ts != -1
        assert float(loss) == pytest.approx(
            -np.log(np.take_along_axis(y, np.maximum(ts, 0)[..., None], 2))[counts].mean()
        )
        d = (y - np.eye(V)[np.maximum(ts, 0)]) * counts[..., None] / counts.sum()
        dtable = np.zeros((V, D))
        np.add.at(dtable, ids, d @ W.T)
        for got, want in zip(grads, (dtable, np.einsum("ntd,ntv->dv", table[ids], d), d.sum(axis=(0, 1))), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-14)
        for p, g, q in zip(params, grads, (table, W, b), strict=True):
            q -= 0.5 * g
            p -= 0.5 * g
    assert layers[1].params[0] is layers[1].W


def test_new_gradients_stay_new_and_lists_stay_the_same() -> None:
    layer = Affine(np.ones((2, 2)), np.zeros(2))
    (gW, gb), (pW, pb) = layer.grads, layer.params
    assert pW is layer.W
    assert pb is layer.b
    layer.backward(layer.forward(np.ones((1, 2))))
    first = layer.dW
    np.testing.assert_array_equal(gW, first)
    layer.backward(layer.forward(np.full((1, 2), 2.0)))
    assert layer.dW is not first
    assert gW is layer.grads[0]
    np.testing.assert_array_equal(gW, layer.dW)
    np.testing.assert_array_equal(gb, layer.db)
    np.testing.assert_array_equal(first, np.full((2, 2), 2.0))
    assert swl.ReLU().params == swl.ReLU().grads == []
    net = swl.Sequential(layer, swl.SoftmaxWithLoss())
    assert [id(g) for g in net.grads] == [id(gW), id(gb)]
    fused = swl.AffineSoftmaxWithLoss(np.ones((2, 3)))
    (g,) = fused.grads
    fused.forward_backward(np.ones((1, 2)), np.array([1]))
    np.testing.assert_array_equal(g, fused.dW)


# ------------------------------------------------------------------------------------------------ the first book


class Extended:
    """The network of chapter 6: layers by name, batch normalisation and dropout, which are told of training."""

    def __init__(self, sizes: list[int], ratio: float) -> None:
        randn = np.random.RandomState(1).randn
        self.params: dict[str, Any] = {}
        self.layers: OrderedDict[str, Any] = OrderedDict()
        for i in range(1, len(sizes)):
            W = self.params[f"W{i}"] = randn(sizes[i - 1], sizes[i]) * np.sqrt(2 / sizes[i - 1])
            b = self.params[f"b{i}"] = np.zeros(sizes[i])
            self.layers[f"Affine{i}"] = Affine(W, b)
            if i < len(sizes) - 1:
                gamma, beta = np.ones(sizes[i]), np.zeros(sizes[i])
                self.params[f"gamma{i}"], self.params[f"beta{i}"] = gamma, beta
                self.layers[f"BatchNorm{i}"] = BatchNormalization(gamma, beta)
                self.layers[f"Activation{i}"] = Relu()
                if ratio:
                    self.layers[f"Dropout{i}"] = Dropout(ratio)
        self.last_layer = SoftmaxWithLoss()

    def predict(self, x: Any, train_flg: bool = False) -> Any:
        for key, layer in self.layers.items():
            told = "Dropout" in key or "BatchNorm" in key
            x = layer.forward(x, train_flg) if told else layer.forward(x)
        return x

    def loss(self, x: Any, t: Any, train_flg: bool = False) -> Any:
        return self.last_layer.forward(self.predict(x, train_flg), t)

    def gradient(self, x: Any, t: Any) -> dict[str, Any]:
        self.loss(x, t, train_flg=True)
        dout = self.last_layer.backward(1)
        for layer in reversed(self.layers.values()):
            dout = layer.backward(dout)
        found = {}
        for key, layer in self.layers.items():
            names = {"Affine": ("W", "b"), "BatchNorm": ("gamma", "beta")}.get(key[:-1], ())
            found |= {f"{name}{key[-1]}": getattr(layer, "d" + name) for name in names}
        return found


def test_chapter_6_with_batch_normalisation_has_the_gradient_of_the_differences() -> None:
    rng = np.random.default_rng(0)
    x, t = rng.normal(size=(5, 4)), rng.integers(0, 3, 5)
    network = Extended([4, 6, 3], ratio=0)
    backprop = network.gradient(x, t)
    for key, p in network.params.items():
        numerical = numerical_gradient(lambda _: network.loss(x, t, train_flg=True), p)
        np.testing.assert_allclose(backprop[key], numerical, rtol=1e-6, atol=1e-8)


def test_chapter_6_with_dropout_trains() -> None:
    x, t = spiral()
    network = Extended([2, 30, 30, 3], ratio=0.15)
    first = float(network.loss(x, t, train_flg=True))
    for _ in range(150):
        for key, g in network.gradient(x, t).items():
            network.params[key] -= 0.3 * g
    assert float(network.loss(x, t)) < first / 3
    assert swl.accuracy(network.predict(x), t) > 0.85


class Convolution:
    """A reader's own layer, by sliding windows; stride 1 without padding."""

    def __init__(self, W: Any, b: Any) -> None:
        self.W, self.b = W, b
        self.dW: Any = None
        self.db: Any = None

    def forward(self, x: Any) -> Any:
        self.windows = np.lib.stride_tricks.sliding_window_view(x, self.W.shape[2:], axis=(2, 3))
        return np.einsum("nchwij,fcij->nfhw", self.windows, self.W) + self.b[:, None, None]

    def backward(self, dout: Any) -> Any:
        self.dW, self.db = np.einsum("nchwij,nfhw->fcij", self.windows, dout), dout.sum(axis=(0, 2, 3))
        k = self.W.shape[2] - 1
        padded = np.pad(dout, ((0, 0), (0, 0), (k, k), (k, k)))
        around = np.lib.stride_tricks.sliding_window_view(padded, self.W.shape[2:], axis=(2, 3))
        return np.einsum("nfhwij,fcij->nchw", around, self.W[:, :, ::-1, ::-1])


def test_chapter_7_an_affine_layer_after_images() -> None:
    """A convolution of the reader's own, then Relu, Dropout and Affine over ``(N, C, H, W)``."""
    rng = np.random.default_rng(0)
    x, t = rng.normal(size=(3, 2, 5, 5)), rng.integers(0, 4, 3)
    conv = Convolution(rng.normal(size=(3, 2, 3, 3)), rng.normal(size=3))
    layers = [conv, Relu(), Dropout(0.5), Affine(rng.normal(size=(27, 4)), rng.normal(size=4))]
    last = SoftmaxWithLoss()

    def loss() -> Any:
        y = x
        for layer in layers:
            y = layer.forward(y, False) if isinstance(layer, Dropout) else layer.forward(y)
        return last.forward(y, t)

    loss()
    dout: Any = last.backward(1)
    for layer in reversed(layers):
        dout = layer.backward(dout)
    assert dout.shape == x.shape
    for got, p in ((conv.dW, conv.W), (conv.db, conv.b), (layers[3].dW, layers[3].W), (dout, x)):
        np.testing.assert_allclose(got, numerical_gradient(lambda _: loss(), p), rtol=1e-6, atol=1e-8)


# ------------------------------------------------------------------------------------------------ what is new


def test_dropout_keeps_a_share_in_training_and_scales_at_inference() -> None:
    layer, x = Dropout(0.3, rng=0), np.ones((100, 100))
    y = layer.forward(x)
    assert set(np.unique(y)) == {0.0, 1.0}
    assert y.mean() == pytest.approx(0.7, abs=0.02)
    np.testing.assert_array_equal(layer.backward(np.full_like(x, 2)), 2 * y)
    np.testing.assert_array_equal(layer.forward(x, train_flg=False), layer.predict(x))
    np.testing.assert_array_equal(layer.predict(x), np.full_like(x, 0.7))
    np.testing.assert_array_equal(Dropout(0.3, rng=0).forward(x), y)
    with pytest.raises(ValueError, match=r"dropout_ratio must be in \[0, 1\), got 1"):
        Dropout(1)


def test_batch_normalisation_by_hand_and_at_inference() -> None:
    rng = np.random.default_rng(0)
    x, gamma, beta = rng.normal(3, 2, size=(50, 2, 2)), rng.normal(size=4), rng.normal(size=4)
    layer = BatchNormalization(gamma, beta, momentum=0.8)
    x2 = x.reshape(50, 4)
    want = gamma * (x2 - x2.mean(axis=0)) / np.sqrt(x2.var(axis=0) + 1e-6) + beta
    np.testing.assert_allclose(layer.forward(x).reshape(50, 4), want, rtol=1e-10)
    np.testing.assert_allclose(layer.running_mean, 0.2 * x2.mean(axis=0))
    np.testing.assert_allclose(layer.running_var, 0.2 * x2.var(axis=0))
    want = gamma * (x2 - layer.running_mean) / np.sqrt(layer.running_var + 1e-6) + beta
    np.testing.assert_allclose(layer.predict(x).reshape(50, 4), want, rtol=1e-10)
    np.testing.assert_array_equal(layer.forward(x, train_flg=False), layer.predict(x))
    assert (
        BatchNormalization(np.ones(4, np.float32), np.zeros(4, np.float32)).forward(x.astype("f4")).dtype == np.float32
    )
    with pytest.raises(ValueError, match=r"x must have shape \(N, 4\).*got \(50, 3\)"):
        layer.forward(np.ones((50, 3)))
    with pytest.raises(ValueError, match=r"beta must have shape \(4,\)"):
        BatchNormalization(gamma, beta[:2])


def test_networks_are_called() -> None:
    net = swl.Sequential(Affine(np.eye(2)), SoftmaxWithLoss())
    x, t = np.array([[1.0, 0.0]]), np.array([0])
    np.testing.assert_array_equal(net(x), x)
    assert float(net(x, t)) == pytest.approx(np.log(1 + np.exp(-1)))
    np.testing.assert_array_equal(Relu()(np.array([-1.0, 2.0])), [0, 2])
    body = swl.Sequential(Affine(np.eye(2)))
    body(x)
    body.backward(x)  # a call keeps what backward needs


def test_representations_say_what_was_given() -> None:
    shown = [
        (SGD(0.1, 0.9), "SGD(lr=0.1, momentum=0.9, weight_decay=0.0)"),
        (swl.AdamW(), "AdamW(lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.01)"),
        (Dropout(0.25), "Dropout(0.25)"),
        (BatchNormalization(np.ones(3), np.zeros(3)), "BatchNormalization(3)"),
        (Sigmoid(), "Sigmoid()"),
    ]
    for thing, text in shown:
        assert repr(thing) == text
    for name in swl.__all__:
        kind = getattr(swl, name)
        assert not isinstance(kind, type) or kind.__repr__ is not object.__repr__, f"{name} has no repr of its own"


def test_softmax_and_accuracy() -> None:
    z = np.random.default_rng(0).normal(size=(2, 3, 4)) * 30
    np.testing.assert_allclose(swl.softmax(z), probabilities(z))
    np.testing.assert_allclose(swl.softmax(z, axis=1), np.swapaxes(probabilities(np.swapaxes(z, 1, 2)), 1, 2))
    assert swl.softmax(np.array([1.0, 1.0], np.float16)).dtype == np.float16
    np.testing.assert_array_equal(swl.softmax(np.array([1000.0, -np.inf])), [1, 0])
    assert np.isnan(swl.softmax(np.full(2, -np.inf))).all()
    assert swl.softmax(np.ones((0, 3))).shape == (0, 3)
    t = np.array([[3, -100, 0], [1, 2, 3]])
    want = np.mean([z[i, j].argmax() == t[i, j] for i in range(2) for j in range(3) if t[i, j] >= 0])
    assert swl.accuracy(z, t) == want
    assert swl.accuracy(z, np.eye(4)[z.argmax(axis=-1)]) == 1
    assert np.isnan(swl.accuracy(z[0, :1], np.array([-100])))
    for call, words in (
        (lambda: swl.softmax(z, axis=3), r"axis must be an integer in \[-3, 3\).*got 3"),
        (lambda: swl.accuracy(z, t[:1]), r"target must have shape \(2, 3\) .*got \(1, 3\)"),
        (lambda: swl.accuracy(np.ones(()), t), r"scores must have shape \(..., C\)"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_a_check_of_every_element_takes_two_evaluations_each() -> None:
    class Counting(Affine):
        calls = 0

        def forward(self, x: Any) -> Any:
            Counting.calls += 1
            return super().forward(x)

    layer = Counting(np.random.default_rng(0).normal(size=(4, 3)), np.zeros(3))
    report = swl.check_gradients(layer, np.random.default_rng(1).normal(size=(2, 4)))
    assert report.compared == {"x": 8, "W": 12, "b": 3}
    assert Counting.calls == 1 + 2 * (8 + 12 + 3)


def test_a_check_of_a_large_array_finds_one_wrong_element() -> None:
    """Every element takes part, in groups; the one that is wrong is named."""

    class Wrong(Affine):
        def backward(self, dout: Any) -> Any:
            dx = super().backward(dout)
            self.dW[17, 5] *= 1.0001
            return dx

    rng = np.random.default_rng(0)
    W, x = rng.normal(size=(40, 30)), rng.normal(size=(3, 40))
    assert swl.check_gradients(Affine(W), x).compared == {"x": 120, "W": 150}
    with pytest.raises(AssertionError, match=r"gradient of W at \[17, 5\]: backward gives"):
        swl.check_gradients(Wrong(W), x)
