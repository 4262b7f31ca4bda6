"""AffineSoftmaxWithLoss: the unfused layers' numbers, gradients, top-k and promises, on every backend."""

from __future__ import annotations

import pickle
import tracemalloc
from typing import Any

import numpy as np
import pytest
from cases import FLOATS, acc_dtype
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cross_entropy import same_bits

import swl

N, D, C = 150, 5, 30
BUDGETS = [2_000, 12_000, 10**6]  # chunks of rows and classes, of rows, none
each_budget = pytest.mark.parametrize("budget", BUDGETS)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1, "softcap": 2.0, "z_loss": 0.1, "weight": np.arange(C) / C},
]


def arrays(backend: Any, dtype: Any = np.float64) -> list[Any]:
    rng = np.random.default_rng(3)
    found = [backend.array(rng.standard_normal(shape), dtype, writeable=True) for shape in ((N, D), (D, C), (C,))]
    return [*found, backend.array(rng.integers(0, C, N))]


def close(backend: Any, got: Any, want: Any, tol: float = 1e-12) -> None:
    np.testing.assert_allclose(backend.numpy(got), backend.numpy(want), rtol=tol, atol=tol)


# ------------------------------------------------------------------------------------------------ loss and gradients


@each_budget
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "all"])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_affine_then_softmax_with_loss(backend: Any, budget: int, options: dict[str, Any], bias: bool) -> None:
    x, W, b, t = arrays(backend)
    b = b if bias else None
    head = swl.AffineSoftmaxWithLoss(W, b, memory_budget=budget, **options)
    net = swl.Sequential(swl.Affine(W, b), swl.SoftmaxWithLoss(**options))
    close(backend, head.forward(x, t), net.forward(x, t))
    for dout in (1, -2.5):
        close(backend, head.backward(dout), net.backward(dout))
        close(backend, head.dW, net[0].dW)
        if bias:
            close(backend, head.db, net[0].db)
        else:
            assert head.db is None
    loss, dx = head.forward_backward(x, t, 3)
    close(backend, loss, net[1].loss)
    close(backend, dx, net.backward(3))
    close(backend, head.dW, net[0].dW)
    assert head.loss is loss
    assert head.t is t
    assert head.x is x


@each_budget
def test_a_second_backward_gives_the_same_bits(backend: Any, budget: int) -> None:
    x, W, b, t = arrays(backend, np.float32)
    head = swl.AffineSoftmaxWithLoss(W, b, memory_budget=budget)
    for run in (lambda: head.forward(x, t), lambda: head.forward_backward(x, t)):
        run()
        first = head.backward(2), head.dW, head.db
        second = head.backward(2), head.dW, head.db
        for one, other in zip(first, second, strict=True):
            assert one is not other
            same_bits("gradient", backend.numpy(one), backend.numpy(other))


@each_budget
def test_a_vector_of_upstream_gradients(backend: Any, budget: int) -> None:
    x, W, b, t = arrays(backend)
    dout = backend.array(np.random.default_rng(0).standard_normal(N))
    head = swl.AffineSoftmaxWithLoss(W, b, memory_budget=budget, reduction="none")
    net = swl.Sequential(swl.Affine(W, b), swl.SoftmaxWithLoss(reduction="none"))
    close(backend, head.forward(x, t), net.forward(x, t))
    close(backend, head.backward(dout), net.backward(dout))
    close(backend, head.dW, net[0].dW)


@pytest.mark.parametrize("budget", BUDGETS[:2])
def test_its_gradients_are_those_of_the_differences(backend: Any, budget: int) -> None:
    _, W, b, t = arrays(backend)
    head = swl.AffineSoftmaxWithLoss(W, b, memory_budget=budget, label_smoothing=0.1)
    net = swl.Sequential(swl.Affine.init(4, D, rng=0, dtype=np.float64), swl.Sigmoid(), head)
    inputs = backend.array(np.random.default_rng(0).standard_normal((70, 4)))
    assert swl.check_gradients(net, inputs, t[:70], projections=2).worst < 1e-6


def test_it_is_the_last_layer_of_a_sequential(backend: Any) -> None:
    x, W, b, t = arrays(backend)
    body = swl.Affine(backend.array(np.eye(D), writeable=True))
    net = swl.Sequential(body, swl.ReLU(), swl.AffineSoftmaxWithLoss(W, b, memory_budget=BUDGETS[0]))
    same = swl.Sequential(swl.Affine(body.W), swl.ReLU(), swl.Affine(W, b), swl.SoftmaxWithLoss())
    loss, dx = net.forward_backward(x, t)
    want, dx_2 = same.forward_backward(x, t)
    close(backend, loss, want)
    close(backend, dx, dx_2)
    assert list(net.parameters()) == ["0.W", "2.W", "2.b"]
    for name, g in net.gradients().items():
        close(backend, g, same.gradients()[name])
    close(backend, net.predict(x), same.predict(x))
    swl.SGD(lr=0.1).update(net.parameters(), net.gradients())
    assert float(net.forward(x, t)) < float(loss)
    with pytest.raises(ValueError, match="a loss must be the last"):
        swl.Sequential(net[2], body)


def test_host_arrays_come_to_the_layer(backend: Any) -> None:
    rng = np.random.default_rng(0)
    x, t, weight = rng.standard_normal((4, D)), np.array([0, 1, 2, 3]), np.ones(C)
    head = swl.AffineSoftmaxWithLoss.init(D, C, rng=1, dtype=np.float64, weight=weight, label_smoothing=0.1)
    assert head.backend == backend.name
    assert repr(head) == "AffineSoftmaxWithLoss(5, 30, weight=<float64 (30,)>, label_smoothing=0.1)"
    loss = head.forward(x, t)
    assert type(head.backward()) is type(loss) or backend.is_host
    assert type(head.dW) is type(backend.array([1.0]))
    with swl.use_backend("numpy"):
        W = swl.Affine.init(D, C, rng=1, dtype=np.float64).W
        want = swl.cross_entropy(x @ W, t, label_smoothing=0.1)
    close(backend, loss, want)


@each_budget
def test_a_callable_target(backend: Any, budget: int) -> None:
    x, W, b, _ = arrays(backend)
    q = np.random.default_rng(0).dirichlet(np.ones(C), N)
    head = swl.AffineSoftmaxWithLoss(W, b, memory_budget=budget)
    loss = head.forward(x, lambda rows, classes: backend.array(q[rows, classes]))
    dx = head.backward()
    close(backend, loss, head.forward(x, backend.array(q)))
    close(backend, dx, head.backward())


def test_state_and_copies(backend: Any) -> None:
    x, W, b, t = arrays(backend)
    head = swl.AffineSoftmaxWithLoss(W, b, memory_budget=1234, softcap=3.0)
    assert head.W is W
    assert head.b is b
    loss = head.forward(x, t)
    state = head.state_dict()
    assert {name: a.shape for name, a in state.items()} == {"W": (D, C), "b": (C,)}
    W *= 0
    assert float(head.forward(x, t)) != float(loss)
    head.load_state_dict(state)
    close(backend, head.forward(x, t), loss, 0)
    if backend.is_host:
        other = pickle.loads(pickle.dumps(head))
        assert (other.memory_budget, other.options, other.t, other.loss) == (1234, head.options, None, None)
        with pytest.raises(RuntimeError, match=r"AffineSoftmaxWithLoss.backward was called before forward"):
            other.backward()
        close(backend, other.forward(x, t), loss, 0)


def test_what_it_refuses(backend: Any) -> None:
    _, W, b, t = arrays(backend)
    with pytest.raises(ValueError, match="memory_budget must be above 0"):
        swl.AffineSoftmaxWithLoss(W, b, memory_budget=0)
    with pytest.raises(TypeError, match="unknown option 'smoothing'"):
        swl.AffineSoftmaxWithLoss(W, b, smoothing=0.1)
    with pytest.raises(ValueError, match=r"b must have shape \(30,\)"):
        swl.AffineSoftmaxWithLoss(W, b[:3])
    head = swl.AffineSoftmaxWithLoss(W, b)
    with pytest.raises(RuntimeError, match="before forward"):
        head.backward()
    with pytest.raises(RuntimeError, match="has no gradients"):
        head.gradients()
    with pytest.raises(ValueError, match=r"x must have shape \(..., 5\)"):
        head.forward(backend.array(np.ones((3, 4))), t)


# ------------------------------------------------------------------------------------------------ scores and top-k


@each_budget
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_predict_gives_the_scores_of_affine(backend: Any, budget: int, dtype: Any) -> None:
    x, W, b, _ = arrays(backend, dtype)
    for bias in (b, None):
        head = swl.AffineSoftmaxWithLoss(W, bias, memory_budget=budget, softcap=2.0)
        got, want = head.predict(x), swl.Affine(W, bias).forward(x)
        assert got.dtype == want.dtype
        np.testing.assert_allclose(
            backend.numpy(got).astype(float),
            backend.numpy(want).astype(float),
            rtol=1e-2 if dtype.itemsize == 2 else 1e-5,
            atol=1e-5,
        )
    assert head.predict(x[0]).shape == (C,)
    assert head.predict(x[:0]).shape == (0, C)


@given(data=st.data())
@settings(max_examples=40)
def test_top_k_is_the_sorted_log_softmax(backend: Any, data: Any) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    n, c = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 70))
    dtype = data.draw(st.sampled_from(FLOATS))
    # small integers, so that scores are exact and often equal
    x, W, b = (rng.integers(-2, 3, shape).astype(dtype) for shape in ((n, 2), (2, c), (c,)))
    b = np.where(rng.random(c) < 0.2, -np.inf, b).astype(dtype)
    b[rng.integers(c)] = 0
    k, softcap = data.draw(st.integers(1, c)), data.draw(st.sampled_from([None, 4.0]))
    temperature = data.draw(st.sampled_from([1.0, 0.5]))
    budget = data.draw(st.integers(40, 20_000))
    head = swl.AffineSoftmaxWithLoss(
        backend.array(W),
        backend.array(b),
        softcap=softcap,
        temperature=temperature,
        label_smoothing=0.1,
        memory_budget=budget,
    )
    ids, log_probs = (backend.numpy(a) for a in head.top_k(backend.array(x), k))
    assert ids.shape == log_probs.shape == (n, k)
    assert ids.dtype == np.int64
    assert log_probs.dtype == acc_dtype(dtype)
    z = (x.astype(float) @ W.astype(float) + b.astype(float)) / temperature
    order = np.argsort(-z, axis=1, kind="stable")[:, :k]
    if softcap is not None:
        z = softcap * np.tanh(z / softcap)
        order = np.argsort(-z.astype(acc_dtype(dtype)), axis=1, kind="stable")[:, :k]
    want = z - z.max(axis=1, keepdims=True)
    want -= np.log(np.exp(want).sum(axis=1, keepdims=True))
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_allclose(log_probs, np.take_along_axis(want, order, axis=1), rtol=1e-5, atol=1e-5)


@each_budget
def test_top_k_of_rows_that_are_nan(backend: Any, budget: int) -> None:
    x, W, b, _ = arrays(backend)
    x, W, b = (backend.numpy(a).copy() for a in (x, W, b))
    want_ids, want = swl.AffineSoftmaxWithLoss(backend.array(W), backend.array(b)).top_k(backend.array(x), 3)
    x[2, 0], b[7] = np.nan, b[7]
    head = swl.AffineSoftmaxWithLoss(backend.array(W), backend.array(b), memory_budget=budget)
    ids, log_probs = (backend.numpy(a) for a in head.top_k(backend.array(x), 3))
    keep = np.arange(N) != 2
    assert np.isnan(log_probs[2]).all()
    assert ((ids >= 0) & (ids < C)).all()
    np.testing.assert_array_equal(ids[keep], backend.numpy(want_ids)[keep])
    np.testing.assert_allclose(log_probs[keep], backend.numpy(want)[keep], rtol=1e-9)


def test_top_k_keeps_leading_axes(backend: Any) -> None:
    x, W, b, _ = arrays(backend)
    head = swl.AffineSoftmaxWithLoss(W, b)
    ids, log_probs = head.top_k(x.reshape(2, 75, D), np.int64(4))
    assert ids.shape == log_probs.shape == (2, 75, 4)
    assert head.top_k(x[0], 4)[0].shape == (4,)


def test_top_k_refuses_what_is_no_count(backend: Any) -> None:
    x, W, b, _ = arrays(backend)
    head = swl.AffineSoftmaxWithLoss(W, b)
    for k in (0, 31):
        with pytest.raises(ValueError, match=rf"k must be in \[1, 30\], the number of classes, got {k}"):
            head.top_k(x, k)
    for k in (2.0, True, None):
        with pytest.raises(TypeError, match="k must be an integer, got"):
            head.top_k(x, k)


@pytest.mark.parametrize("softcap", [1e-46, 1e300])
def test_top_k_refuses_a_softcap_that_float32_has_not(backend: Any, softcap: float) -> None:
    W = np.ones((5, 30), np.float32)
    head = swl.AffineSoftmaxWithLoss(backend.array(W, writeable=True), softcap=softcap)
    with pytest.raises(ValueError, match=r"softcap must be.*float32"):
        head.top_k(backend.array(np.ones((2, 5), np.float32)), 1)


@pytest.mark.parametrize("budget", [200_000, 2_000_000])
def test_top_k_stays_within_its_budget(budget: int) -> None:
    rng = np.random.default_rng(0)
    x, W = rng.standard_normal((300, 16), np.float32), rng.standard_normal((16, 5000), np.float32)
    with swl.use_backend("numba"):
        head = swl.AffineSoftmaxWithLoss(W, memory_budget=budget)
    head.top_k(x, 8)
    tracemalloc.start()
    head.top_k(x, 8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < budget + 300 * 8 * 12 + 50_000  # the result, and O(N)
