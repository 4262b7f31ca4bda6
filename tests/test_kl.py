"""Distillation against float64, on every backend: each divergence, in chunks of any size, with its gradients."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import oracle
import pytest
from cases import FLOATS, acc_dtype
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_close
from test_fused import ALL, unit

import swl

DIRECTIONS = ("forward", "reverse", "jsd")


def divergence(direction: str, z: Any, zt: Any) -> tuple[Any, Any]:
    """Give each row's loss and its gradient in z, in the arithmetic of the arguments, which may be complex."""
    p, q = (np.exp(a - a.real.max(axis=1, keepdims=True, initial=-np.inf)) for a in (z, zt))
    p, q = p / p.sum(axis=1, keepdims=True), q / q.sum(axis=1, keepdims=True)

    def kl(a: Any, b: Any) -> Any:
        some = (a != 0) & (b != 0)
        return (np.where(some, a * np.log(np.where(some, a, 1) / np.where(some, b, 1)), 0)).sum(axis=1)

    m = (p + q) / 2
    return {"forward": kl(q, p), "reverse": kl(p, q), "jsd": (kl(p, m) + kl(q, m)) / 2}[direction]


def by_complex_step(direction: str, z: Any, zt: Any) -> Any:
    """Differentiate the losses to the last digits, without an equation of their gradient."""
    g = np.zeros_like(z)
    for c in range(z.shape[1]):
        step = np.zeros(z.shape[1], complex)
        step[c] = 1e-30j
        g[:, c] = divergence(direction, z + step, zt.astype(complex)).imag / 1e-30
    return g


@given(seed=st.integers(0, 2**32 - 1), data=st.data())
@settings(max_examples=40)
def test_it_is_the_definition(backend: Any, seed: int, data: Any) -> None:
    draw, rng = data.draw, np.random.default_rng(seed)
    dtype, teachers = draw(st.sampled_from(FLOATS)), draw(st.sampled_from(FLOATS))
    direction, reduction = draw(st.sampled_from(DIRECTIONS)), draw(st.sampled_from(["mean", "sum", "none"]))
    leading = draw(st.sampled_from([(), (1,), (5,), (2, 3), (0,), (150,)]))
    D, E, C, N = draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.integers(1, 12)), int(np.prod(leading))
    x, W, b = (rng.standard_normal(shape).astype(dtype) for shape in ((*leading, D), (D, C), (C,)))
    tx, tW, tb = (rng.standard_normal(shape).astype(teachers) for shape in ((*leading, E), (E, C), (C,)))
    if C > 1 and draw(st.booleans()):
        b[0] = tb[0] = -np.inf  # masked by both
    tau, needs = draw(st.sampled_from([1.0, 0.7, 2.0])), draw(st.sets(st.sampled_from(ALL)))
    weight = rng.random(leading) * (rng.random(leading) < 0.8) if draw(st.booleans()) else None
    dout = rng.standard_normal(leading) if reduction == "none" else -0.7
    options = {"direction": direction, "temperature": tau, "reduction": reduction}
    options["memory_budget"] = draw(st.sampled_from([1, 10**9]))
    if weight is not None:
        options["sample_weight"] = backend.array(weight)
    arrays = [backend.array(a) for a in (x, W, tx, tW, b, tb)]
    loss = swl.linear_kl(*arrays, **options)
    got, gradients = swl.linear_kl_value_and_grad(
        *arrays, dout=backend.array(dout) if reduction == "none" else dout, needs=needs, **options
    )
    np.testing.assert_array_equal(backend.numpy(loss), backend.numpy(got))

    x, W, b, tx, tW, tb = (a.astype(np.float64) for a in (x, W, b, tx, tW, tb))
    x, tx = x.reshape(N, D), tx.reshape(N, E)
    z, zt = (x @ W + b) / tau, (tx @ tW + tb) / tau
    s = np.ones(N) if weight is None else weight.reshape(N)
    divisor = (s.sum() or 1.0) if reduction == "mean" else 1.0
    each = divergence(direction, z, zt) * s
    size = 4 + sum(np.abs(np.where(np.isinf(a), 0, a)).max(axis=1, initial=0) for a in (z, zt))
    size = size + np.abs(x) @ np.abs(W).max(axis=1) / tau + np.abs(tx) @ np.abs(tW).max(axis=1) / tau
    want = each.reshape(leading) if reduction == "none" else each.sum() / divisor
    scale = (s * size).reshape(leading) if reduction == "none" else (s * size).sum() / divisor
    acc = acc_dtype(dtype)
    rough = acc if acc_dtype(teachers) == acc else np.float32  # a float32 teacher's logits have float32's errors
    assert got.dtype == acc
    assert_close("loss", backend.numpy(got), want, scale, rough)

    scaled = (np.broadcast_to(dout, leading).reshape(N) * s / divisor / tau)[:, None]
    g = by_complex_step(direction, z, zt) * scaled
    of_g = np.abs(scaled) * size[:, None] + 0 * g
    if not backend.is_host and np.dtype(dtype).itemsize == 2:
        of_g = of_g + unit(g, dtype) / (32 * oracle._eps(acc))
    wants = {"dx": ((g @ W.T).reshape(*leading, D), (of_g @ np.abs(W).T).reshape(*leading, D))}
    wants |= {"dW": (x.T @ g, np.abs(x).T @ of_g), "db": (g.sum(axis=0), of_g.sum(axis=0))}
    for name, gradient in zip(ALL, gradients, strict=True):
        if name not in needs:
            assert gradient is None
            continue
        assert gradient.dtype == dtype
        assert_close(name, backend.numpy(gradient), *wants[name], rough, dtype)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_student_like_its_teacher_has_no_loss(backend: Any, direction: str) -> None:
    rng = np.random.default_rng(0)
    x, W = (backend.array(rng.standard_normal(shape), np.float32) for shape in ((9, 4), (4, 30)))
    loss, (dx, _, _) = swl.linear_kl_value_and_grad(x, W, x, W, direction=direction, reduction="none")
    assert np.abs(backend.numpy(loss)).max() < 1e-6
    assert np.abs(backend.numpy(dx)).max() < 1e-6


def test_masks_of_one_side(backend: Any) -> None:
    x, W, mask = np.ones((2, 1)), np.zeros((1, 4)), np.array([0.0, 0.0, -np.inf, -np.inf])
    x, W, mask = (backend.array(a) for a in (x, W, mask))
    jsd = (np.log(4 / 3) + 0.5 * np.log(2 / 3) + 0.5 * np.log(2)) / 2
    want = {"forward": (np.log(2), np.inf), "reverse": (np.inf, np.log(2)), "jsd": (jsd, jsd)}
    for direction, (teacher, student) in want.items():
        got = swl.linear_kl(x, W, x, W, teacher_b=mask, direction=direction)
        assert backend.numpy(got) == pytest.approx(teacher)
        got = swl.linear_kl(x, W, x, W, mask, direction=direction)
        assert backend.numpy(got) == pytest.approx(student)


def test_bad_arguments_are_named(host_backend: Any) -> None:
    x, W = np.ones((2, 3)), np.ones((3, 4))
    for wrong, kind, message in [
        ({"direction": "back"}, ValueError, "direction is 'back'; legal are 'forward', 'reverse' and 'jsd'"),
        ({"teacher_W": np.ones((3, 5))}, ValueError, "W has 4 classes, but teacher_W has 5"),
        ({"teacher_W": np.ones(3)}, ValueError, r"the teacher's W must have shape \(D, K\), got \(3,\)"),
        ({"teacher_x": np.ones((2, 4))}, ValueError, r"the teacher's x must have shape \(\.\.\., 3\)"),
        ({"teacher_x": np.ones((3, 3))}, ValueError, r"teacher_x must have the leading shape of x, \(2,\), got \(3,\)"),
        ({"temperature": np.nan}, ValueError, "temperature must be finite and above 0"),
        ({"softcap": 3.0}, TypeError, "unknown option 'softcap'; legal options are temperature"),
        ({"sample_weight": np.ones(3)}, ValueError, r"sample_weight must have shape \(2,\)"),
        ({"memory_budget": 0}, ValueError, "memory_budget must be above 0 bytes, got 0"),
    ]:
        with pytest.raises(kind, match=message):
            swl.linear_kl(**{"x": x, "W": W, "teacher_x": x, "teacher_W": W, **wrong})


def test_no_more_memory_than_the_budget() -> None:
    rng = np.random.default_rng(0)
    N, D, C, budget = 1024, 64, 8192, 16 << 20
    x, W = (rng.standard_normal(shape).astype(np.float32) for shape in ((N, D), (D, C)))

    def peak() -> int:
        swl.empty_cache()
        tracemalloc.start()
        result = swl.linear_kl_value_and_grad(x, W, x, W, memory_budget=budget, backend="numba")
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most - sum(g.nbytes for g in result[1] if g is not None)

    peak()
    assert peak() <= 1.05 * budget + (4 << 20)  # and what each thread keeps as scratch
