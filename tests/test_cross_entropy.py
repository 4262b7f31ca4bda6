"""The loss and its gradient, on every backend, against the float64 oracle and against torch."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from cases import CONTIGUOUS, FLOATS, INTEGERS, LAYOUTS, PROBABILITIES, Case, acc_dtype, cases, place
from hypothesis import given, settings
from hypothesis import strategies as st
from needs import TORCH
from oracle import assert_close

import swl
from swl.ops.cross_entropy import forward
from swl.options import Options


def check(backend: Any, case: Case, loss: Any, grad: Any, stats: Any = None) -> None:
    want = case.answer()
    loss, grad = backend.numpy(loss), backend.numpy(grad)
    assert loss.dtype == case.acc
    assert grad.dtype == case.dtype
    assert_close("loss", loss, want.loss, want.loss_scale, case.acc)
    assert_close("grad", grad, want.grad, want.grad_scale, case.acc, case.dtype)
    if stats is None:
        return
    for name in ("row_max", "log_sum", "log_prob", "entropy"):
        got = backend.numpy(getattr(stats, name))
        assert got.dtype == case.acc, name
        assert_close(name, got, getattr(want, name), want.row_scale, case.acc)
    argmax = backend.numpy(stats.argmax)
    assert argmax.dtype == np.int64
    if not {"softcap", "temperature"} & case.options.keys():  # rounding may make two logits equal
        np.testing.assert_array_equal(argmax, want.argmax)


@settings(max_examples=300)
@given(case=cases())
def test_loss_gradient_and_stats_agree_with_the_oracle(backend: Any, case: Case) -> None:
    logits, target, options, dout = case.on(backend)
    loss, grad, stats = swl.cross_entropy_value_and_grad(logits, target, dout=dout, stats=True, **options)
    check(backend, case, loss, grad, stats)


@given(case=cases())
def test_forward_and_backward_are_bitwise_the_fused_pass(backend: Any, case: Case) -> None:
    logits, target, options, dout = case.on(backend)
    fused_loss, fused, fused_stats = swl.cross_entropy_value_and_grad(logits, target, dout=dout, stats=True, **options)
    plain_loss, plain = swl.cross_entropy_value_and_grad(logits, target, dout=dout, **options)
    loss, stats = swl.cross_entropy(logits, target, stats=True, **options)
    two_sweeps = forward(logits, target, Options.checked(options))
    first, second = two_sweeps.backward(dout), two_sweeps.backward(dout)
    for name, a, b in [
        ("loss with stats", fused_loss, loss),
        ("loss without stats", fused_loss, plain_loss),
        ("loss forward only", fused_loss, swl.cross_entropy(logits, target, **options)),
        ("gradient without stats", fused, plain),
        ("gradient of two sweeps", fused, first),
        ("gradient of a second backward", first, second),
        *((field, getattr(fused_stats, field), getattr(stats, field)) for field in stats._fields),
    ]:
        same_bits(name, backend.numpy(a), backend.numpy(b))


@given(case=cases(dtypes=FLOATS[:3:2]), other=st.booleans())
def test_out_is_written_in_place_and_may_be_the_logits(backend: Any, case: Case, other: bool) -> None:
    logits, target, options, dout = case.on(backend)
    loss, grad = swl.cross_entropy_value_and_grad(logits, target, dout=dout, **options)
    grad = backend.numpy(grad)

    layout = case.layout if other else CONTIGUOUS
    out = place(backend, np.full_like(case.logits, np.nan), layout, writeable=True)
    loss_out, returned = swl.cross_entropy_value_and_grad(logits, target, dout=dout, out=out, **options)
    assert returned is out
    same_bits("loss with out=", backend.numpy(loss_out), backend.numpy(loss))
    same_bits("gradient with out=", backend.numpy(out), grad)

    logits = place(backend, case.logits, case.layout, writeable=True)
    loss_in, returned = swl.cross_entropy_value_and_grad(logits, target, dout=dout, out=logits, **options)
    assert returned is logits
    same_bits("loss in place", backend.numpy(loss_in), backend.numpy(loss))
    same_bits("gradient in place", backend.numpy(logits), grad)


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_out_leaves_what_lies_between_its_elements_alone(backend: Any, layout: Any) -> None:
    """A view with gaps: only the elements of the view are written."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((5, 37)).astype(np.float32)
    store = np.ascontiguousarray(layout.store(np.ones_like(logits)))
    base = backend.array(store, writeable=True)
    swl.cross_entropy_value_and_grad(backend.array(logits), backend.array(np.arange(5)), out=layout.view(base))
    gaps = np.isnan(store)
    np.testing.assert_array_equal(np.isnan(backend.numpy(base)), gaps)


def same_bits(name: str, a: Any, b: Any) -> None:
    """Hold two arrays to the same bits; a NaN agrees with any NaN."""
    assert a.dtype == b.dtype, name
    assert a.shape == b.shape, name
    a, b = (x.astype(np.float64) for x in (a, b))
    same = (a == b) & (np.signbit(a) == np.signbit(b)) | np.isnan(a) & np.isnan(b)
    assert same.all(), f"{name}: {np.count_nonzero(~same)} of {a.size} differ, by up to {np.nanmax(np.abs(a - b))}"


@pytest.mark.parametrize("kind", ["ids", "probabilities"])
def test_every_operand_may_be_read_only(backend: Any, kind: str) -> None:
    rng = np.random.default_rng(5)
    target = rng.integers(0, 7, 3) if kind == "ids" else rng.random((3, 7), np.float32)
    options = {"weight": rng.random(7, np.float32), "sample_weight": rng.random(3, np.float32), "reduction": "none"}
    case = Case(rng.standard_normal((3, 7), np.float32), target, CONTIGUOUS, options, rng.random(3, np.float32))
    fixed = {name: backend.array(v) if isinstance(v, np.ndarray) else v for name, v in options.items()}
    loss, grad = swl.cross_entropy_value_and_grad(
        backend.array(case.logits), backend.array(target), dout=backend.array(case.dout), **fixed
    )
    check(backend, case, loss, grad)


# ------------------------------------------------------------------------------------------------ targets


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_class_ids_of_every_integer_dtype(backend: Any, dtype: Any) -> None:
    rng = np.random.default_rng(1)
    case = Case(rng.standard_normal((6, 5)), np.array([4, 0, 1, 2, 3, 4], dtype))
    logits, target, *_ = case.on(backend)
    check(backend, case, *swl.cross_entropy_value_and_grad(logits, target, stats=True))


@pytest.mark.parametrize(
    ("logits_dtype", "dtype"),
    [*((FLOATS[0], dtype) for dtype in PROBABILITIES), *((dtype, dtype) for dtype in FLOATS[1:])],
    ids=str,
)
def test_one_hot_of_every_dtype_equals_class_ids(backend: Any, logits_dtype: Any, dtype: Any) -> None:
    rng = np.random.default_rng(2)
    ids = rng.integers(0, 11, (3, 4))
    z = backend.array(rng.standard_normal((3, 4, 11)).astype(logits_dtype))
    hot = backend.array(np.arange(11) == ids[..., None], dtype)
    for options in ({}, {"label_smoothing": 0.2}, {"softcap": 3.0, "z_loss": 0.1}):
        by_id = swl.cross_entropy_value_and_grad(z, backend.array(ids), stats=True, **options)
        by_row = swl.cross_entropy_value_and_grad(z, hot, stats=True, **options)
        for name, a, b in [("loss", by_id[0], by_row[0]), ("grad", by_id[1], by_row[1])]:
            a, b = backend.numpy(a), backend.numpy(b)
            assert_close(name, b, a, 1 + np.abs(a.astype(np.float64)), acc_dtype(logits_dtype), logits_dtype)
        for name in by_id[2]._fields:
            a, b = backend.numpy(getattr(by_id[2], name)), backend.numpy(getattr(by_row[2], name))
            assert_close(name, b, a, 4, acc_dtype(logits_dtype))


@pytest.mark.parametrize("C", [2, 32, 1000])
def test_a_target_row_need_not_sum_to_one(backend: Any, C: int) -> None:
    """Targets of mass 0 and 3: the formula holds for any row y."""
    rng = np.random.default_rng(3)
    q = rng.random((3, C)) * np.array([[0.0], [1.0], [3.0]])
    case = Case(rng.standard_normal((3, C)), q, CONTIGUOUS, {"z_loss": 0.1, "label_smoothing": 0.1})
    logits, target, options, _ = case.on(backend)
    check(backend, case, *swl.cross_entropy_value_and_grad(logits, target, stats=True, **options))


# ------------------------------------------------------------------------------------------------ large rows


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("C", [8191, 8192, 8193, 16385, 50257])
@pytest.mark.parametrize("kind", ["ids", "probabilities"])
def test_rows_longer_than_any_block(backend: Any, dtype: Any, C: int, kind: str) -> None:
    """The maximum near the end: whoever sums block by block has to rescale."""
    rng = np.random.default_rng(C)
    z = 3 * rng.standard_normal((3, C)) + np.linspace(0, 20, C)
    z[1] = z[1, ::-1]
    ids, q = np.array([0, C - 1, -100]), rng.dirichlet(np.ones(C), 3).astype(np.float32)
    target = ids if kind == "ids" else q
    case = Case(z.astype(dtype), target, CONTIGUOUS, {"label_smoothing": 0.1, "reduction": "none"})
    case.dout = rng.standard_normal(3).astype(case.acc)
    logits, target, options, dout = case.on(backend)
    check(backend, case, *swl.cross_entropy_value_and_grad(logits, target, dout=dout, stats=True, **options))


@pytest.mark.parametrize("where", [0, 1, 4095, 4096, 12287, 16383, 16384, 20000])
def test_one_huge_logit_anywhere(backend: Any, where: int) -> None:
    """p is a one-hot: everything before a new maximum has to be scaled down to 0."""
    z = np.zeros((2, 20001), np.float32)
    z[0, where] = 1e4
    target = np.array([where, 7])
    loss, grad, stats = swl.cross_entropy_value_and_grad(
        backend.array(z), backend.array(target), reduction="none", stats=True
    )
    assert backend.numpy(stats.log_sum)[0] == 0
    assert backend.numpy(loss)[0] == 0
    assert not backend.numpy(grad)[0].any()


def test_many_rows(backend: Any) -> None:
    """More rows than any chunk of work has, few of them alike."""
    rng = np.random.default_rng(4)
    case = Case(
        rng.standard_normal((4099, 10)).astype(np.float32),
        rng.integers(-1, 10, 4099),
        CONTIGUOUS,
        {"ignore_index": -1, "sample_weight": rng.random(4099).astype(np.float32)},
    )
    logits, target, options, _ = case.on(backend)
    check(backend, case, *swl.cross_entropy_value_and_grad(logits, target, stats=True, **options))


# ------------------------------------------------------------------------------------------------ large arrays


def test_offsets_past_two_to_the_31(host_backend: Any) -> None:
    """Rows 2³⁰ elements apart, of which only the pages in use exist: an offset of 32 bits would miss them."""
    rng = np.random.default_rng(0)
    case = Case(rng.standard_normal((4, 40)).astype(np.float16), np.arange(4), options={"reduction": "none"})
    z, out = (np.zeros((4, 2**30), np.float16)[:, -40:] for _ in range(2))
    z[...] = case.logits
    loss, grad = swl.cross_entropy_value_and_grad(z, case.target, out=out, **case.options)
    check(host_backend, case, loss, grad)


def _need_memory(backend: Any, needed: int) -> None:
    """Skip where the machine would run out."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if backend.is_host and free < needed:
        pytest.skip(f"{backend.name} needs {needed >> 30} GiB here, {free >> 30} are free")


@pytest.mark.slow
def test_more_elements_than_two_to_the_31(backend: Any) -> None:
    """2³¹ + 2¹⁶ float16 logits, 4.3 GB: each row has a target and a high logit of its own, so that each loss is known."""
    _need_memory(backend, 8 * 2**30)
    N, C = 32769, 65536
    rows = np.arange(N)
    xp = backend.ops.xp
    z = xp.zeros((N, C), np.float16)
    z[xp.asarray(rows), xp.asarray(rows)] = 10
    loss = backend.numpy(swl.cross_entropy(z, backend.array(rows), reduction="none"))
    np.testing.assert_allclose(loss, np.log(np.exp(10) + C - 1) - 10, rtol=1e-5)


@pytest.mark.slow
def test_a_row_of_more_classes_than_two_to_the_31(backend: Any) -> None:
    """One row of 2³¹ + 8 float16 logits; its target and its maximum lie at the end."""
    _need_memory(backend, (64 if backend.name == "numpy" else 16) * 2**30)  # NumPy holds z, u, q and y of a row
    C = 2**31 + 8
    z = backend.ops.xp.zeros((1, C), np.float16)
    z[0, -3] = 20
    loss, stats = swl.cross_entropy(z, backend.array([C - 3]), stats=True)
    want = np.log(np.exp(20) + C - 1) - 20
    np.testing.assert_allclose(backend.numpy(loss), want, rtol=1e-4)
    assert backend.numpy(stats.argmax)[0] == C - 3


# ------------------------------------------------------------------------------------------------ torch


@given(case=cases(dtypes=[np.dtype(np.float64), np.dtype(np.float32)]))
def test_agrees_with_torch(backend: Any, case: Case) -> None:
    """torch has weight, label_smoothing, ignore_index and the reductions; its mean over nothing is NaN, ours 0."""
    torch = pytest.importorskip("torch", reason=TORCH)
    options = {k: v for k, v in case.options.items() if k in ("weight", "label_smoothing", "ignore_index", "reduction")}
    case = Case(case.logits, case.target, case.layout, options)
    *leading, C = case.logits.shape
    ids = case.target.shape == tuple(leading)
    want = case.answer()
    if options["reduction"] == "mean" and not np.any(want.grad_scale):
        return  # nothing counts
    z = torch.tensor(case.logits.astype(np.float64).reshape(-1, C), requires_grad=True)
    t = torch.from_numpy(
        case.target.astype(np.int64).reshape(-1) if ids else case.target.astype(np.float64).reshape(-1, C)
    )
    w = torch.from_numpy(options["weight"].astype(np.float64)) if "weight" in options else None
    theirs = torch.nn.functional.cross_entropy(z, t, **{**options, "weight": w})
    theirs.sum().backward()

    logits, target, options, _ = case.on(backend)
    loss, grad = swl.cross_entropy_value_and_grad(logits, target, **options)
    assert_close(
        "loss", backend.numpy(loss), theirs.detach().numpy().reshape(want.loss.shape), want.loss_scale, case.acc
    )
    assert_close("grad", backend.numpy(grad), z.grad.numpy().reshape(case.logits.shape), want.grad_scale, case.acc)
