"""Layers: what they compute, what they keep, and the promises of their names, on every backend."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest

import swl

D, K = 6, 4


def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def make_net(backend: Any, loss: Any = None, dtype: Any = np.float64) -> swl.Sequential:
    r = rng()
    W1, b1 = (
        backend.array(r.normal(size=(D, 5)), dtype, writeable=True),
        backend.array(r.normal(size=5), dtype, writeable=True),
    )
    W2, b2 = (
        backend.array(r.normal(size=(5, K)), dtype, writeable=True),
        backend.array(r.normal(size=K), dtype, writeable=True),
    )
    return swl.Sequential(swl.Affine(W1, b1), swl.ReLU(), swl.Affine(W2, b2), *([] if loss is None else [loss]))


def close(backend: Any, got: Any, want: Any, rtol: float = 1e-12) -> None:
    np.testing.assert_allclose(backend.numpy(got), want, rtol=rtol, atol=1e-13)


# ------------------------------------------------------------------------------------------------ Affine


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, D), (D,), (2, 3, D), (0, D), (4, 2, 3)], ids=str)
def test_affine_is_the_equation(backend: Any, shape: tuple[int, ...], bias: bool) -> None:
    r = rng()
    x, W, b = r.normal(size=shape), r.normal(size=(D, K)), r.normal(size=K)
    x2 = x.reshape(-1, D) if x.size else x
    leading = (4,) if shape == (4, 2, 3) else shape[:-1]
    layer = swl.Affine(backend.array(W), backend.array(b) if bias else None)
    y = layer.forward(backend.array(x))
    close(backend, y, (x2 @ W + (b if bias else 0)).reshape(*leading, K))
    dout = r.normal(size=(*leading, K))
    d2 = dout.reshape(-1, K) if dout.size else dout
    dx = layer.backward(backend.array(dout))
    close(backend, dx, (d2 @ W.T).reshape(shape))
    close(backend, layer.dW, x2.T @ d2)
    if bias:
        close(backend, layer.db, d2.sum(axis=0))
    else:
        assert layer.db is None
        assert list(layer.gradients()) == ["W"]


def test_affine_keeps_the_very_arrays(backend: Any) -> None:
    W, b = backend.array(np.eye(2), writeable=True), backend.array(np.zeros(2), writeable=True)
    layer = swl.Affine(W, b)
    assert layer.W is W
    assert layer.b is b
    b += 3
    close(backend, layer.forward(backend.array([[1.0, 2.0]])), [[4, 5]])


def test_affine_keeps_its_input_as_it_came(backend: Any) -> None:
    x = backend.array(np.ones((4, 2, 3)))
    layer = swl.Affine(backend.array(np.ones((D, K))))
    assert layer.x is None
    layer.forward(x)
    assert layer.x is x


def test_a_new_parameter_may_be_assigned_and_is_checked(backend: Any) -> None:
    layer = swl.Affine(backend.array(np.eye(2)), backend.array(np.zeros(2)))
    layer.W = 2 * np.eye(2)  # a host array, as from a file
    layer.b = np.ones(2)
    assert type(layer.W) is type(backend.array([1.0]))
    close(backend, layer.forward(backend.array([[1.0, 2.0]])), [[3, 5]])
    with pytest.raises(ValueError, match=r"b must have shape \(2,\)"):
        layer.b = np.ones(3)
    with pytest.raises(ValueError, match=r"b must have shape \(3,\)"):
        layer.W = np.ones((2, 3))
    close(backend, layer.W, 2 * np.eye(2))


@pytest.mark.parametrize(
    ("W", "b", "error", "words"),
    [
        (np.ones(3), None, ValueError, r"W must have shape \(D, K\), got \(3,\)"),
        (np.ones((2, 3), int), None, TypeError, "W must be float16.*got int64"),
        (np.ones((2, 3)), np.ones((1, 3)), ValueError, r"b must have shape \(3,\)"),
        (np.ones((2, 3)), np.ones(3, bool), TypeError, "b must be float16.*got bool"),
    ],
)
def test_affine_refuses_bad_parameters(backend: Any, W: Any, b: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        swl.Affine(W, b)


def test_affine_refuses_bad_inputs(backend: Any) -> None:
    layer = swl.Affine(np.ones((D, K)))
    with pytest.raises(ValueError, match=r"x must have shape \(..., 6\).*got \(3, 5\)"):
        layer.forward(backend.array(np.ones((3, 5))))
    layer.forward(backend.array(np.ones((3, D))))
    with pytest.raises(ValueError, match=r"dout must have shape \(3, 4\).*got \(3, 5\)"):
        layer.backward(backend.array(np.ones((3, 5))))


def test_a_failed_forward_leaves_the_last_one_in_force(backend: Any) -> None:
    layer = swl.Affine(np.ones((D, K)))
    x = backend.array(rng().normal(size=(3, D)))
    layer.forward(x)
    with pytest.raises(ValueError, match="x must have shape"):
        layer.forward(backend.array(np.ones((3, 5))))
    assert layer.x is x


def test_a_first_layer_may_spare_dx(backend: Any) -> None:
    r = np.random.default_rng(0)
    x, dout = backend.array(r.normal(size=(5, 4))), backend.array(r.normal(size=(5, 3)))
    W, b = backend.array(r.normal(size=(4, 3))), backend.array(np.zeros(3))
    full, spared = swl.Affine(W, b), swl.Affine(W, b, needs_dx=False)
    for layer in (full, spared):
        layer.forward(x)
    assert full.backward(dout) is not None
    assert spared.backward(dout) is None
    for name in ("dW", "db"):
        np.testing.assert_array_equal(backend.numpy(getattr(full, name)), backend.numpy(getattr(spared, name)))
    net = swl.Sequential(swl.Affine.init(4, 3, rng=0, needs_dx=False), swl.ReLU(), swl.Affine.init(3, 2, rng=0))
    net.forward(x)
    assert net.backward(backend.array(np.ones((5, 2)))) is None


def test_init_is_he_and_the_same_on_every_backend(backend: Any) -> None:
    layer = swl.Affine.init(2000, 50, rng=1)
    W = backend.numpy(layer.W)
    assert layer.backend == backend.name
    assert W.dtype == np.float32
    assert abs(float(W.std()) / np.sqrt(2 / 2000) - 1) < 0.01
    with swl.use_backend("numpy"):
        np.testing.assert_array_equal(W, swl.Affine.init(2000, 50, rng=np.random.default_rng(1)).W)
    assert not backend.numpy(layer.b).any()
    assert backend.numpy(swl.Affine.init(3, 2, dtype=np.float64).W).dtype == np.float64
    with pytest.raises(ValueError, match="D must be at least 1"):
        swl.Affine.init(0, 3)


def test_a_layer_belongs_to_the_backend_it_was_made_under(backend: Any) -> None:
    layer = swl.Affine(np.ones((D, K)))
    with swl.use_backend("numpy"):
        y = layer.forward(np.ones((2, D)))  # host to device is a copy
    assert type(y) is type(backend.array([1.0]))


# ------------------------------------------------------------------------------------------------ activations


@pytest.mark.parametrize(
    "dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name
)
def test_relu(backend: Any, dtype: Any) -> None:
    x = np.array([[-1.0, 0.0, 2.0], [np.nan, -np.inf, np.inf]]).astype(dtype)
    layer = swl.ReLU()
    y = layer.forward(backend.array(x))
    assert y.dtype == dtype
    np.testing.assert_array_equal(backend.numpy(y).astype(float), [[0, 0, 2], [np.nan, 0, np.inf]])
    dout = np.array([[np.nan, np.inf, 5.0], [6.0, 7.0, 8.0]]).astype(dtype)
    dx = layer.backward(backend.array(dout))
    assert dx.dtype == dtype
    np.testing.assert_array_equal(backend.numpy(dx).astype(float), [[0, 0, 5], [6, 0, 8]])


def test_relu_writes_to_none_of_its_inputs(backend: Any) -> None:
    x, dout = (backend.array(rng().normal(size=(3, 4)), writeable=True) for _ in range(2))
    before = backend.numpy(x).copy()
    layer = swl.ReLU()
    layer.forward(x)[...] = 0
    layer.backward(dout)[...] = 0
    np.testing.assert_array_equal(backend.numpy(x), before)
    np.testing.assert_array_equal(backend.numpy(dout), before)


@pytest.mark.parametrize(
    "dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name
)
def test_sigmoid_is_accurate_in_both_tails(backend: Any, dtype: Any) -> None:
    x = np.array([-1e4, -700, -40, -9, -1, -1e-3, 0, 1e-3, 1, 9, 40, 700, 1e4]).astype(dtype)
    exact = x.astype(np.longdouble)
    with np.errstate(over="ignore"):
        y = 1 / (1 + np.exp(-exact))
        slope = y / (1 + np.exp(exact))
    layer = swl.Sigmoid()
    got = layer.forward(backend.array(x))
    dx = layer.backward(backend.array(np.full(x.shape, 2.0, dtype)))
    assert got.dtype == dtype
    assert dx.dtype == dtype
    eps = {2: 2.0**-8 if np.dtype(dtype).name == "bfloat16" else 2.0**-11, 4: 2e-7, 8: 4e-16}[np.dtype(dtype).itemsize]
    tiny = float(ml_dtypes.finfo(dtype).tiny)
    np.testing.assert_allclose(backend.numpy(got).astype(float), y.astype(float), rtol=2 * eps, atol=tiny)
    np.testing.assert_allclose(backend.numpy(dx).astype(float), 2 * slope.astype(float), rtol=4 * eps, atol=tiny)


@pytest.mark.parametrize("layer", [swl.ReLU, swl.Sigmoid])
def test_activations_refuse_integers_and_other_shapes(backend: Any, layer: Any) -> None:
    with pytest.raises(TypeError, match=r"x must be float16.*got int64"):
        layer().forward(backend.array([1, 2]))
    used = layer()
    used.forward(backend.array([[1.0, 2.0]]))
    with pytest.raises(ValueError, match=r"dout must have shape \(1, 2\)"):
        used.backward(backend.array([1.0, 2.0]))


def test_the_book_spells_it_relu() -> None:
    assert swl.Relu is swl.ReLU


# ------------------------------------------------------------------------------------------------ SoftmaxWithLoss

OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0},
    {"weight": np.array([1.0, 2.0, 0.5, 3.0]), "ignore_index": 2},
    {"reduction": "sum", "sample_weight": np.array([1.0, 0.0, 2.0])},
    {"reduction": "none"},
    {"denominator": 7.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["ids", "one-hot"])
def test_softmax_with_loss(backend: Any, options: dict[str, Any], kind: str) -> None:
    r = rng()
    z, t = r.normal(size=(3, K)) * 3, np.array([1, 2, 0])
    if kind == "one-hot":
        t = np.eye(K)[t]
    dout = r.normal(size=3) if options.get("reduction") == "none" else 2.5
    want = oracle.cross_entropy(z, t, dout=dout, **options)
    layer = swl.SoftmaxWithLoss(**options)
    loss = layer.forward(backend.array(z), t)  # the target may lie on the host
    close(backend, loss, want.loss, 1e-10)
    assert layer.loss is loss
    up = backend.array(dout) if np.ndim(dout) else dout
    dx = layer.backward(up)
    close(backend, dx, want.grad, 1e-10)
    again = layer.backward(up)
    np.testing.assert_array_equal(backend.numpy(again), backend.numpy(dx))
    assert again is not dx
    fused = swl.SoftmaxWithLoss(**options)
    loss2, dx2 = fused.forward_backward(backend.array(z), backend.array(t), up)
    np.testing.assert_array_equal(backend.numpy(loss2), backend.numpy(loss))
    np.testing.assert_array_equal(backend.numpy(dx2), backend.numpy(dx))
    np.testing.assert_array_equal(backend.numpy(fused.backward(up)), backend.numpy(dx))
    np.testing.assert_array_equal(backend.numpy(fused.t), t)
    capped = z if "softcap" not in options else 5 * np.tanh(z / 5)
    e = np.exp(capped - capped.max(axis=1, keepdims=True))
    close(backend, fused.y, e / e.sum(axis=1, keepdims=True))


def test_the_probabilities_are_computed_when_asked_for_and_once(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from swl.ops.loss import Loss

    calls = []
    plain = Loss.probabilities
    monkeypatch.setattr(Loss, "probabilities", lambda self: calls.append(1) or plain(self))
    layer = swl.SoftmaxWithLoss()
    assert layer.y is None
    z = backend.array(rng().normal(size=(3, K)))
    layer.forward(z, np.array([0, 1, 2]))
    layer.backward()
    assert not calls
    assert layer.y is layer.y
    assert len(calls) == 1
    layer.forward(backend.array(np.zeros((3, K))), np.array([0, 1, 2]))
    close(backend, layer.y, np.full((3, K), 1 / K))


def test_the_probabilities_of_masks_and_nan(backend: Any) -> None:
    z = np.array([[0.0, -np.inf, 0.0], [np.nan, 1.0, 2.0], [-np.inf, -np.inf, -np.inf], [1e8, 1e8, -1e8]])
    layer = swl.SoftmaxWithLoss(reduction="none")
    layer.forward(backend.array(z), np.array([0, 0, -100, 0]))
    nan = [np.nan] * 3
    np.testing.assert_allclose(backend.numpy(layer.y), [[0.5, 0, 0.5], nan, nan, [0.5, 0.5, 0]])


def test_a_target_may_be_overwritten_after_forward(backend: Any) -> None:
    x, t = backend.array(np.eye(4, 3)), backend.array(np.array([0, 1, 2, 1]), writeable=True)
    layer = swl.SoftmaxWithLoss()
    layer.forward(x, t)
    first = backend.numpy(layer.backward())
    t[...] = 0
    np.testing.assert_array_equal(backend.numpy(layer.backward()), first)
    np.testing.assert_array_equal(backend.numpy(layer.backward(2)), 2 * first)


@pytest.mark.parametrize("t", [1, np.int8(1), np.array(1), np.array([0.0, 1, 0, 0]), [0, 1, 0, 0]], ids=repr)
def test_one_row(backend: Any, t: Any) -> None:
    z = rng().normal(size=K)
    layer = swl.SoftmaxWithLoss()
    loss = layer.forward(backend.array(z), t)
    want = oracle.cross_entropy(z[None], np.array([1]))
    assert loss.shape == ()
    close(backend, loss, want.loss)
    close(backend, layer.backward(), want.grad[0])
    assert layer.y.shape == (K,)


def test_options_are_checked_at_construction_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="label_smoothing"):
        swl.SoftmaxWithLoss(label_smoothing=1.0)
    with pytest.raises(TypeError, match="unknown option 'smoothing'"):
        swl.SoftmaxWithLoss(smoothing=0.1)  # type: ignore[call-arg]
    layer = swl.SoftmaxWithLoss(label_smoothing=0.1)
    monkeypatch.setattr("swl.options.Options.checked", None)
    layer.forward(np.zeros((1, 3)), np.array([0]))


def test_the_loss_refuses_what_the_function_refuses(backend: Any) -> None:
    layer = swl.SoftmaxWithLoss()
    with pytest.raises(ValueError, match=r"target must have shape \(2,\)"):
        layer.forward(backend.array(np.zeros((2, 3))), np.array([0, 1, 2]))
    if backend.is_host:
        with pytest.raises(ValueError, match=r"target\[1\] is 3"):
            layer.forward(np.zeros((2, 3)), np.array([0, 3]))
    layer.forward(backend.array(np.zeros((2, 3))), np.array([0, 1]))
    with pytest.raises(ValueError, match="dout must have shape"):
        layer.backward(backend.array(np.ones(2)))


def test_its_repr_names_the_options_that_are_on() -> None:
    assert repr(swl.SoftmaxWithLoss(label_smoothing=0.1)) == "SoftmaxWithLoss(label_smoothing=0.1)"


# ------------------------------------------------------------------------------------------------ every layer

X, T = rng().normal(size=(3, D)), np.array([0, 1, 3])
EVERY: dict[str, Any] = {
    "Affine": lambda: swl.Affine(np.ones((D, K)), np.ones(K)),
    "ReLU": swl.ReLU,
    "Sigmoid": swl.Sigmoid,
    "SoftmaxWithLoss": swl.SoftmaxWithLoss,
    "Sequential": lambda: swl.Sequential(swl.Affine(np.ones((D, K))), swl.ReLU(), swl.SoftmaxWithLoss()),
}
every_layer = pytest.mark.parametrize("name", EVERY)


def inputs(backend: Any, layer: Any) -> tuple[Any, ...]:
    return (backend.array(X), T) if hasattr(layer, "forward_backward") else (backend.array(X),)


def upstream(backend: Any, y: Any) -> Any:
    return 2.0 if y.ndim == 0 else backend.array(np.random.default_rng(2).normal(size=y.shape))


@every_layer
def test_backward_before_forward(backend: Any, name: str) -> None:
    layer = EVERY[name]()
    with pytest.raises(RuntimeError, match="backward was called before forward"):
        layer.backward(backend.array(np.ones((3, K))))


@every_layer
def test_gradients_before_backward(backend: Any, name: str) -> None:
    layer = EVERY[name]()
    if layer.parameters():
        with pytest.raises(RuntimeError, match="call backward first"):
            layer.gradients()
    else:
        assert layer.gradients() == {}


@every_layer
def test_a_second_backward_gives_the_same_numbers_in_other_arrays(backend: Any, name: str) -> None:
    layer = EVERY[name]()
    dout = upstream(backend, layer.forward(*inputs(backend, layer)))
    first = {"x": layer.backward(dout), **layer.gradients()}
    kept = {key: backend.numpy(g).copy() for key, g in first.items()}
    second = {"x": layer.backward(dout), **layer.gradients()}
    for key in kept:
        np.testing.assert_array_equal(backend.numpy(second[key]), kept[key])
        second[key][...] = -1
        np.testing.assert_array_equal(backend.numpy(first[key]), kept[key])


@every_layer
def test_results_of_one_forward_survive_the_next(backend: Any, name: str) -> None:
    layer = EVERY[name]()
    x, *t = inputs(backend, layer)
    y = layer.forward(x, *t)
    kept = backend.numpy(y).copy()
    layer.forward(backend.array(X[::-1]), *t)
    np.testing.assert_array_equal(backend.numpy(y), kept)


@every_layer
def test_predict_leaves_no_trace(backend: Any, name: str) -> None:
    layer = EVERY[name]()
    dout = upstream(backend, layer.forward(*inputs(backend, layer)))
    want = backend.numpy(layer.backward(dout)).copy()
    layer.predict(backend.array(-X[:2]))
    np.testing.assert_array_equal(backend.numpy(layer.backward(dout)), want)


@every_layer
def test_a_copy_shares_nothing_and_starts_afresh(backend: Any, name: str) -> None:
    layer = EVERY[name]()
    y = layer.forward(*inputs(backend, layer))
    twin = copy.deepcopy(layer)
    with pytest.raises(RuntimeError, match="before forward"):
        twin.backward(1)
    for key, p in twin.parameters().items():
        assert p is not layer.parameters()[key]
    np.testing.assert_array_equal(backend.numpy(twin.forward(*inputs(backend, twin))), backend.numpy(y))


@every_layer
def test_a_layer_can_be_pickled(name: str) -> None:
    with swl.use_backend("numpy"):
        layer = EVERY[name]()
    x = (X, T) if hasattr(layer, "forward_backward") else (X,)
    y = layer.forward(*x)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(layer)).forward(*x), y)


# ------------------------------------------------------------------------------------------------ Sequential


def test_sequential_is_its_layers_in_turn(backend: Any) -> None:
    net = make_net(backend, swl.SoftmaxWithLoss(label_smoothing=0.1))
    P = {name: backend.numpy(p) for name, p in net.parameters().items()}
    assert list(P) == ["0.W", "0.b", "2.W", "2.b"]
    hidden = X @ P["0.W"] + P["0.b"]
    scores = np.maximum(hidden, 0) @ P["2.W"] + P["2.b"]
    want = oracle.cross_entropy(scores, T, label_smoothing=0.1, dout=3.0)
    x = backend.array(X)
    close(backend, net.forward(x, T), want.loss)
    dx = net.backward(3.0)
    dh = (want.grad @ P["2.W"].T) * (hidden > 0)
    close(backend, dx, dh @ P["0.W"].T)
    gradients = {"0.W": X.T @ dh, "0.b": dh.sum(0), "2.W": np.maximum(hidden, 0).T @ want.grad, "2.b": want.grad.sum(0)}
    for name, g in net.gradients().items():
        close(backend, g, gradients[name])
    close(backend, net.predict(x), scores)
    loss, dx2 = net.forward_backward(x, T, 3.0)
    close(backend, loss, want.loss)
    np.testing.assert_array_equal(backend.numpy(dx2), backend.numpy(dx))


def test_sequential_without_a_loss(backend: Any) -> None:
    net = make_net(backend)
    y = net.forward(backend.array(X))
    np.testing.assert_array_equal(backend.numpy(net.predict(backend.array(X))), backend.numpy(y))
    assert net.backward(backend.array(np.ones((3, K)))).shape == (3, D)
    with pytest.raises(TypeError, match="forward_backward needs a loss"):
        net.forward_backward(X, T)
    with pytest.raises(TypeError, match="no loss"):
        net.forward(X, T)


def test_sequential_in_sequential(backend: Any) -> None:
    body = swl.Sequential(swl.Affine(np.ones((D, K))), swl.ReLU())
    head = swl.Sequential(swl.Affine(np.ones((K, K))), swl.SoftmaxWithLoss())
    net = swl.Sequential(body, head)
    assert list(net.parameters()) == ["0.0.W", "1.0.W"]
    loss, _ = net.forward_backward(backend.array(X), T)
    close(backend, loss, np.log(K))
    assert net.predict(backend.array(X)).shape == (3, K)
    assert len(net) == 2
    assert net[0] is body


def test_sequential_refuses_what_cannot_work() -> None:
    relu, loss = swl.ReLU(), swl.SoftmaxWithLoss()
    with pytest.raises(ValueError, match="at least one layer"):
        swl.Sequential()
    with pytest.raises(TypeError, match="layer 1 must have the methods forward and backward"):
        swl.Sequential(relu, "relu")
    with pytest.raises(ValueError, match="a loss must be the last of the 2 layers"):
        swl.Sequential(loss, relu)
    with pytest.raises(ValueError, match="may not occur twice"):
        swl.Sequential(relu, swl.Sequential(swl.ReLU(), relu))
    with pytest.raises(TypeError, match="needs the target t"):
        swl.Sequential(relu, loss).forward(X)


class Shift:
    """A layer as the book writes one, which knows nothing of swl."""

    def __init__(self, b: Any) -> None:
        self.b = b
        self.db: Any = None

    def forward(self, x: Any) -> Any:
        return x + self.b

    def backward(self, dout: Any) -> Any:
        self.db = dout.sum(axis=0)
        return dout


def test_a_layer_of_ones_own() -> None:
    with swl.use_backend("numpy"):
        net = swl.Sequential(swl.Affine(np.ones((D, K))), Shift(np.arange(4.0)), swl.SoftmaxWithLoss())
    net.forward(X, T)
    net.backward()
    assert list(net.parameters()) == ["0.W", "1.b"]
    np.testing.assert_allclose(net.gradients()["1.b"], net[2].backward().sum(axis=0))
    np.testing.assert_array_equal(net.predict(X), X @ np.ones((D, K)) + np.arange(4))


# ------------------------------------------------------------------------------------------------ state


def test_a_state_is_a_snapshot_in_numpy(backend: Any) -> None:
    net = make_net(backend)
    state = net.state_dict()
    kept = {name: value.copy() for name, value in state.items()}
    for p in net.parameters().values():
        p += 1
    for name, value in state.items():
        assert type(value) is np.ndarray
        np.testing.assert_array_equal(value, kept[name])
    before = net.parameters()
    net.load_state_dict(state)
    for name, p in net.parameters().items():
        assert p is before[name]
        np.testing.assert_array_equal(backend.numpy(p), kept[name])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name)
def test_a_state_goes_through_a_file(backend: Any, dtype: Any) -> None:
    net, other = make_net(backend, dtype=dtype), make_net(backend, dtype=dtype)
    for p in other.parameters().values():
        p[...] = backend.array(np.zeros(p.shape, dtype))
    file = io.BytesIO()
    np.savez(file, **net.state_dict())
    file.seek(0)
    other.load_state_dict(np.load(file))
    for name, p in net.parameters().items():
        np.testing.assert_array_equal(backend.numpy(other.parameters()[name]), backend.numpy(p))


def test_a_state_that_does_not_fit_changes_nothing(backend: Any) -> None:
    net = make_net(backend)
    kept = net.state_dict()
    ones = {name: np.ones_like(value) for name, value in kept.items()}
    for bad, words in [
        ({**ones, "3.W": np.ones(2)}, r"unknown are \['3.W'\]"),
        ({name: ones[name] for name in ("0.W", "0.b")}, r"missing are \['2.W', '2.b'\]"),
        ({**ones, "2.b": np.ones(K + 1)}, r"state\['2.b'\] must have shape \(4,\)"),
    ]:
        with pytest.raises(ValueError, match=words):
            net.load_state_dict(bad)
        for name, p in net.parameters().items():
            np.testing.assert_array_equal(backend.numpy(p), kept[name])


def test_a_read_only_parameter_is_named_before_anything_is_written() -> None:
    net = swl.Sequential(swl.Affine(np.ones((2, 2))), swl.Affine(np.ones((2, 2))))
    net[1].W.flags.writeable = False
    with pytest.raises(ValueError, match=r"parameter '1.W' is read-only"):
        net.load_state_dict({"0.W": np.zeros((2, 2)), "1.W": np.zeros((2, 2))})
    assert net[0].W.all()


# ------------------------------------------------------------------------------------------------ the books' layers


def test_the_books_layers_compute_on_every_backend_what_numpy_does(backend: Any) -> None:
    r = rng()
    x, gamma, beta = r.normal(size=(6, 3)), r.normal(size=3), r.normal(size=3)
    dout = r.normal(size=(6, 3))
    found = []
    for name, put in (("numpy", np.asarray), (backend.name, backend.array)):
        with swl.use_backend(name):
            norm = swl.BatchNormalization(put(gamma), put(beta))
            drop = swl.Dropout(0.5, rng=0)
            y = norm.forward(put(x))
            z = drop.forward(y)
            dx = norm.backward(drop.backward(put(dout)))
            outcome = [
                y,
                z,
                dx,
                norm.dgamma,
                norm.dbeta,
                norm.predict(put(x)),
                drop.predict(y),
                swl.softmax(y),
                *norm.grads,
            ]
            found.append([a if name == "numpy" else backend.numpy(a) for a in outcome])
            t = np.arange(6) % 3
            assert float(swl.accuracy(y, put(t))) == (found[-1][0].argmax(axis=1) == t).mean()
    for want, got in zip(*found, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)
