"""The affine map and its gradients, on every backend, against float64 sums and against torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
from cases import FLOATS, LAYOUTS, acc_dtype, place, repeat_first
from hypothesis import given
from hypothesis import strategies as st
from needs import TORCH
from oracle import assert_close

import swl

SHAPES = st.tuples(
    st.integers(0, 9),
    st.one_of(st.integers(1, 20), st.sampled_from([64, 129])),
    st.one_of(st.integers(1, 20), st.sampled_from([65, 130])),
)
LEADING = st.sampled_from(["(N, D)", "(D,)", "(2, N, D)", "(N, 1, D)", "(N, d, D/d)"])


@st.composite
def affine_cases(draw: Any) -> Any:
    dtype = draw(st.sampled_from(FLOATS))
    N, D, K = draw(SHAPES)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(LEADING)
    leading = {"(D,)": (), "(2, N, D)": (2, N), "(N, 1, D)": (N, 1)}.get(kind, (N,))
    x = rng.standard_normal((*leading, D)).astype(dtype)
    if kind == "(N, d, D/d)" and D % 2 == 0 and D > 2:
        x = x.reshape(N, 2, D // 2)
    W = rng.standard_normal((D, K)).astype(dtype)
    b = rng.standard_normal(K).astype(dtype) if draw(st.booleans()) else None
    dout = rng.standard_normal((*leading, K)).astype(dtype)
    return x, W, b, dout, [draw(st.sampled_from(LAYOUTS)) for _ in range(3)]


@given(case=affine_cases())
def test_forward_and_gradients_agree_with_float64(backend: Any, case: Any) -> None:
    x, W, b, dout, layouts = case
    N, (D, K) = dout.size // W.shape[1], W.shape
    args = x.reshape(N, D), W, b, dout.reshape(N, K)
    want, scale = oracle.affine(*args), oracle.affine_scale(*args)
    xs, Ws, dys = (place(backend, a, layout) for a, layout in zip((x, W, dout), layouts, strict=True))
    y = swl.affine(xs, Ws, None if b is None else backend.array(b))
    dx, dW, db = swl.affine_backward(dys, xs, Ws)
    shapes = (dout.shape, x.shape, W.shape, (K,))
    for name, got, shape in zip(want._fields, (y, dx, dW, db), shapes, strict=True):
        got = backend.numpy(got)
        assert got.dtype == x.dtype, name
        assert got.shape == shape, name
        ideal, size = getattr(want, name).reshape(shape), getattr(scale, name).reshape(shape)
        assert_close(name, got, ideal, size, acc_dtype(x.dtype), x.dtype)


@given(case=affine_cases(), needs=st.sets(st.sampled_from(["dx", "dW", "db"])))
def test_only_the_needed_gradients_are_formed_and_they_are_the_same(backend: Any, case: Any, needs: set[str]) -> None:
    x, W, _, dout, layouts = case
    xs, Ws, dys = (place(backend, a, layout) for a, layout in zip((x, W, dout), layouts, strict=True))
    everything = swl.affine_backward(dys, xs, Ws)
    some = swl.affine_backward(dys, xs, Ws, needs=needs)
    for name, full, part in zip(("dx", "dW", "db"), everything, some, strict=True):
        if name in needs:
            assert backend.numpy(part).tobytes() == backend.numpy(full).tobytes(), name
        else:
            assert part is None, name


@given(case=affine_cases())
def test_the_operation_adds_to_gradients(backend: Any, case: Any) -> None:
    """``accumulate`` adds to what is there, in float32 or better."""
    x, W, _, dout, _ = case
    N, (D, K) = dout.size // W.shape[1], W.shape
    rng = np.random.default_rng(0)
    acc = acc_dtype(W.dtype)
    start_x, start_W, start_b = (rng.standard_normal(shape).astype(acc) for shape in ((N, D), (D, K), K))
    dx, dW, db = (backend.array(a, writeable=True) for a in (start_x, start_W, start_b))
    args = x.reshape(N, D), W, None, dout.reshape(N, K)
    backend.ops.affine_backward(*(backend.array(a) for a in (args[3], args[0], W)), dx, dW, db, accumulate=True)
    want, scale = oracle.affine(*args), oracle.affine_scale(*args)
    assert_close("dx", backend.numpy(dx), start_x + want.dx, np.abs(start_x) + scale.dx, acc)
    assert_close("dW", backend.numpy(dW), start_W + want.dW, np.abs(start_W) + scale.dW, acc)
    assert_close("db", backend.numpy(db), start_b + want.db, np.abs(start_b) + scale.db, acc)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_odd_sizes(backend: Any, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    x, W, b = (rng.standard_normal(shape).astype(dtype) for shape in ((252, 123), (123, 507), (507,)))
    y = swl.affine(backend.array(x), backend.array(W), backend.array(b))
    args = x, W, b, np.zeros((252, 507))
    assert_close("y", backend.numpy(y), oracle.affine(*args).y, oracle.affine_scale(*args).y, acc_dtype(dtype), dtype)


@pytest.mark.parametrize("dtype", FLOATS[2:], ids=str)
def test_16_bit_sums_are_formed_in_float32(backend: Any, dtype: Any) -> None:
    """4096 ones and a bias of 1: a 16-bit sum would have stopped at 256 or 2048 and lost the bias before."""
    x, W, b = np.ones((2, 4096), dtype), np.full((4096, 3), 2.0**-12, dtype), np.ones(3, dtype)
    assert np.all(backend.numpy(swl.affine(backend.array(x), backend.array(W), backend.array(b))) == 2)
    dout = np.ones((4096, 3), dtype)
    _, _, db = swl.affine_backward(backend.array(dout), backend.array(np.ones((4096, 2), dtype)), backend.array(W[:2]))
    assert np.all(backend.numpy(db) == 4096)


@pytest.mark.parametrize("axis", [0, 1])
def test_stride_0_operands(backend: Any, axis: int) -> None:
    rng = np.random.default_rng(0)
    x, W, dout = rng.standard_normal((4, 6)), rng.standard_normal((6, 5)), rng.standard_normal((4, 5))
    operands = [repeat_first(backend, a, axis) for a in (x, W, dout)]
    x, W, dout = (np.repeat(a.take([0], axis), a.shape[axis], axis) for a in (x, W, dout))
    want = oracle.affine(x, W, None, dout)
    np.testing.assert_allclose(backend.numpy(swl.affine(*operands[:2])), want.y, rtol=1e-12)
    for name, got in zip(("dx", "dW", "db"), swl.affine_backward(operands[2], *operands[:2]), strict=True):
        np.testing.assert_allclose(backend.numpy(got), getattr(want, name), rtol=1e-12)


def test_no_rows(backend: Any) -> None:
    x, W, b = (backend.array(np.ones(shape)) for shape in ((0, 3), (3, 2), (2,)))
    assert swl.affine(x, W, b).shape == (0, 2)
    dx, dW, db = swl.affine_backward(backend.array(np.ones((0, 2))), x, W)
    assert dx.shape == (0, 3)
    np.testing.assert_array_equal(backend.numpy(dW), np.zeros((3, 2)))
    np.testing.assert_array_equal(backend.numpy(db), np.zeros(2))


def test_nan_and_inf_travel_as_in_numpy(backend: Any) -> None:
    """``out`` of the product is overwritten, never multiplied by 0: what it held before must not show."""
    x, W = np.array([[np.nan, 1.0], [1.0, 2.0], [np.inf, 1.0]]), np.array([[1.0], [1.0]])
    y = backend.numpy(swl.affine(backend.array(x), backend.array(W)))
    np.testing.assert_array_equal(y, [[np.nan], [3.0], [np.inf]])
    out = backend.array(np.full((3, 1), np.nan), writeable=True)
    backend.ops.affine_forward(backend.array(np.ones((3, 2))), backend.array(W), None, out)
    np.testing.assert_array_equal(backend.numpy(out), np.full((3, 1), 2.0))


def test_integer_inputs_take_the_dtype_of_the_weights(backend: Any) -> None:
    x, W = np.array([[1, 2], [3, 255]], np.uint8), np.array([[1.0], [2.0]], np.float32)
    y = swl.affine(backend.array(x), backend.array(W))
    assert y.dtype == np.float32
    np.testing.assert_array_equal(backend.numpy(y), [[5.0], [513.0]])


def test_the_same_call_gives_the_same_bits(backend: Any) -> None:
    rng = np.random.default_rng(0)
    x, W, b = (backend.array(rng.standard_normal(shape, np.float32)) for shape in ((300, 200), (200, 400), (400,)))
    dout = backend.array(rng.standard_normal((300, 400), np.float32))
    first, second = ((swl.affine(x, W, b), *swl.affine_backward(dout, x, W)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert backend.numpy(a).tobytes() == backend.numpy(b).tobytes()


@given(case=affine_cases())
def test_agrees_with_torch(backend: Any, case: Any) -> None:
    torch = pytest.importorskip("torch", reason=TORCH)
    x, W, b, dout, _ = case
    x, W, dout = (a.astype(np.float64) for a in (x.reshape(*dout.shape[:-1], -1) if dout.size else x, W, dout))
    if not dout.size:
        return  # torch refuses to flatten nothing
    xt, Wt = torch.tensor(x, requires_grad=True), torch.tensor(W, requires_grad=True)
    bt = None if b is None else torch.from_numpy(b.astype(np.float64))
    yt = torch.nn.functional.linear(xt, Wt.T, bt)
    yt.backward(torch.from_numpy(dout))
    y = swl.affine(backend.array(x), backend.array(W), None if b is None else backend.array(b.astype(np.float64)))
    dx, dW, _ = swl.affine_backward(backend.array(dout), backend.array(x), backend.array(W))
    for got, want in [(y, yt.detach()), (dx, xt.grad), (dW, Wt.grad)]:
        np.testing.assert_allclose(backend.numpy(got), want.numpy(), rtol=1e-11, atol=1e-11)
