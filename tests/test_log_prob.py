"""Log-probabilities and entropies of a head whose logits are not stored, on every backend, against their definition."""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass
from typing import Any

import numpy as np
import oracle
import pytest
from cases import FLOATS, LAYOUTS, acc_dtype, place
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_close
from test_fused import ALL, BOTH, ROWS, budgets, unit

import swl


@dataclass
class Call:
    x: Any
    W: Any
    b: Any
    target: Any
    layout: Any
    options: dict[str, Any]
    dlog_prob: Any
    dentropy: Any

    def on(self, backend: Any) -> tuple[list[Any], dict[str, Any]]:
        arrays = [place(backend, self.x, self.layout), place(backend, self.W, self.layout), backend.array(self.target)]
        return [*arrays, None if self.b is None else backend.array(self.b)], self.options

    def upstream(self, backend: Any) -> dict[str, Any]:
        given = {"dlog_prob": self.dlog_prob, "dentropy": self.dentropy}
        return {name: backend.array(d) if isinstance(d, np.ndarray) else d for name, d in given.items()}


@st.composite
def calls(draw: Any) -> Call:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from(FLOATS))
    leading = draw(st.sampled_from([(), (1,), (7,), (2, 3), (0,), (70,)]))
    D, C, N = draw(st.integers(1, 9)), draw(st.integers(1, 70)), int(np.prod(leading))
    size = draw(st.sampled_from([0.3, 1.0, 3.0]))
    x, W = ((size * rng.standard_normal(shape)).astype(dtype) for shape in ((*leading, D), (D, C)))
    b = rng.standard_normal(C).astype(dtype) if draw(st.booleans()) else None
    target = np.where(rng.random(leading) < 0.2, -100, rng.integers(0, C, leading))
    if b is not None and C > 1 and draw(st.booleans()):  # a mask; not on a target, whose log-probability is −∞
        b[rng.integers(0, C)] = -np.inf
        target = np.where(np.isinf(b.astype(np.float64))[target.clip(0)], -100, target)
    options = {
        "memory_budget": draw(budgets(N, D, C)),
        "temperature": draw(st.sampled_from([1.0, 0.7, 2.5])),
    }

    def upstream(*others: Any) -> Any:
        return draw(st.sampled_from([1.0, -0.5, *others, rng.standard_normal(leading)]))

    layout = draw(st.sampled_from(LAYOUTS[:2]))
    return Call(x, W, b, target, layout, options, upstream(), upstream(None))


def reference(call: Call) -> tuple[Any, Any, Any, Any, Any]:
    """Give log_prob, entropy, the gradient of the raw logits, and scales for a row and for a logit, in float64."""
    D, C = call.W.shape
    x, W = call.x.astype(np.float64).reshape(-1, D), call.W.astype(np.float64)
    b = np.zeros(C) if call.b is None else call.b.astype(np.float64)
    tau, t = call.options["temperature"], np.asarray(call.target).reshape(-1)
    z = (x @ W + b) / tau
    u = z - z.max(axis=1, keepdims=True, initial=-np.inf)
    log_p = u - np.log(np.exp(u).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    p_log_p = np.where(p > 0, p * np.where(p > 0, log_p, 0), 0)
    counts = t >= 0
    H = np.where(counts, -p_log_p.sum(axis=1), 0)
    hit = (np.arange(C) == t[:, None]).astype(float)
    log_prob = np.where(hit > 0, log_p, 0).sum(axis=1)
    a, h = (
        np.broadcast_to(0.0 if d is None else d, call.target.shape).reshape(-1, 1) * counts[:, None]
        for d in (call.dlog_prob, call.dentropy)
    )
    g = (a * (hit - p) - h * (p_log_p + p * H[:, None])) / tau
    rounding = (np.abs(x) @ np.abs(W) + np.abs(np.where(np.isinf(b), 0, b))).max(axis=1, initial=0) / tau  # of a logit
    row = 1 + rounding + np.abs(np.where(np.isinf(u), 0, u)).max(axis=1, initial=0)
    row = row * (2 + np.abs(H))
    return log_prob, H, g, row, (np.abs(a) * (hit + p) + np.abs(h) * p * row[:, None]) * row[:, None] / tau


@given(call=calls(), needs=st.sets(st.sampled_from(ALL)))
def test_any_budget_gives_the_definition(backend: Any, call: Call, needs: set[str]) -> None:
    dtype, acc, shape = call.x.dtype, acc_dtype(call.x.dtype), call.target.shape
    log_prob, H, g, row, scale = reference(call)
    arrays, options = call.on(backend)
    result = swl.linear_log_prob_value_and_grad(*arrays, **call.upstream(backend), needs=needs, **options)
    assert len(result) == (2 if call.dentropy is None else 3)
    alone = swl.linear_log_prob(*arrays, entropy=True, **options)
    for found in (result[:-1], alone):
        for name, got, want in zip(("log_prob", "entropy"), found, (log_prob, H), strict=False):
            assert got.dtype == acc
            assert_close(name, backend.numpy(got), want.reshape(shape), row.reshape(shape), acc)
    x, W = call.x.astype(np.float64).reshape(-1, len(call.W)), call.W.astype(np.float64)
    rounded = unit(g, dtype) / (32 * oracle._eps(acc)) if not backend.is_host and dtype.itemsize == 2 else 0
    wants = g @ W.T, x.T @ g, g.sum(axis=0)
    scales = (scale + rounded) @ np.abs(W).T, np.abs(x).T @ (scale + rounded), (scale + rounded).sum(axis=0)
    for name, got, want, s in zip(ALL, result[-1], wants, scales, strict=True):
        if name not in needs or (name == "db" and call.b is None):
            assert got is None
            continue
        like = {"dx": call.x, "dW": call.W, "db": call.b}[name]
        assert got.dtype == dtype
        assert_close(name, backend.numpy(got), want.reshape(like.shape), s.reshape(like.shape), acc, dtype)


@given(call=calls())
@settings(max_examples=10)
def test_without_entropy_it_is_the_cross_entropy_to_the_bit(backend: Any, call: Call) -> None:
    arrays, options = call.on(backend)
    log_prob, gradients = swl.linear_log_prob_value_and_grad(*arrays, **options)
    loss, others = swl.linear_cross_entropy_value_and_grad(*arrays, dout=-1.0, reduction="none", **options)
    np.testing.assert_array_equal(backend.numpy(log_prob), 0 - backend.numpy(loss))
    for got, want in zip(gradients, others, strict=True):
        if got is not None:
            np.testing.assert_array_equal(backend.numpy(got), backend.numpy(want))


@pytest.mark.parametrize("budget", [ROWS, BOTH, 10**6])
def test_a_row_that_is_ignored_or_bad_spoils_no_other(backend: Any, budget: int) -> None:
    rng = np.random.default_rng(0)
    x, W = rng.standard_normal((150, 5)), rng.standard_normal((5, 30))
    t = rng.integers(0, 30, 150)
    t[:4], x[1], x[7] = 9, np.nan, np.nan
    given_ = np.where(np.isin(np.arange(150), [1, 2]), np.inf, 1.0)

    def run(x: Any) -> list[Any]:
        arrays = (backend.array(a) for a in (x, W, t))
        upstream = {"dlog_prob": backend.array(given_), "dentropy": backend.array(given_)}
        log_prob, H, (dx, _, _) = swl.linear_log_prob_value_and_grad(
            *arrays, **upstream, ignore_index=9, memory_budget=budget
        )
        return [backend.numpy(a) for a in (log_prob, H, dx)]

    got, want = run(x), run(np.nan_to_num(x))
    others = np.arange(150) != 7
    for a, b in zip(got, want, strict=True):
        assert not a[:4].any()
        assert np.isnan(a[7]).all()
        np.testing.assert_array_equal(a[others], b[others])
        assert np.isfinite(b).all()


def test_bad_arguments_are_named(host_backend: Any) -> None:
    x, W, t = np.ones((2, 3)), np.ones((3, 4)), np.zeros(2, int)
    for wrong, message in [
        ({"target": np.ones((2, 4))}, r"target must have shape \(2,\), one class id per row of x, got probabilities"),
        ({"target": np.array([0, 4])}, r"target\[1\] is 4; legal are class ids in \[0, 4\)"),
        ({"temperature": 0.0}, "temperature must be finite and above 0, got 0.0"),
        ({"dentropy": np.ones(3)}, r"dentropy must have shape \(2,\) .*, got \(3,\)"),
        ({"dlog_prob": np.ones((2, 1))}, r"dlog_prob must have shape \(2,\) .*, got \(2, 1\)"),
        ({"memory_budget": 0}, "memory_budget must be above 0 bytes, got 0"),
        ({"needs": "dy"}, "needs may name"),
    ]:
        with pytest.raises(ValueError, match=message):
            swl.linear_log_prob_value_and_grad(x, W, **{"target": t, **wrong})
    with pytest.raises(TypeError, match="dentropy must be an array of numbers, got 'much'"):
        swl.linear_log_prob_value_and_grad(x, W, t, dentropy="much")


def test_no_more_memory_than_the_budget() -> None:
    rng = np.random.default_rng(0)
    N, D, C, budget = 512, 64, 8192, 8 << 20
    x, W = (rng.standard_normal(shape).astype(np.float32) for shape in ((N, D), (D, C)))
    t = rng.integers(0, C, N)

    def peak(**upstream: Any) -> int:
        swl.empty_cache()
        tracemalloc.start()
        result = swl.linear_log_prob_value_and_grad(x, W, t, memory_budget=budget, backend="numba", **upstream)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most - sum(g.nbytes for g in result[-1] if g is not None)

    peak(dentropy=1.0)
    assert peak(dentropy=1.0) <= 1.05 * budget + (4 << 20)  # and what each thread keeps as scratch
