"""Laws that need no oracle, and the edge cases of the numerics, each by its name."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import oracle
import pytest
from cases import BFLOAT16, CONTIGUOUS, FLOATS, INTEGERS, Case, acc_dtype, cases, repeat_first
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_close
from test_cross_entropy import check, same_bits

import swl
from swl.ops.cross_entropy import forward
from swl.options import Options

each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def loss_and_grad(backend: Any, z: Any, target: Any, **options: Any) -> tuple[Any, Any]:
    """Run NumPy arrays through the backend and back."""
    options = {k: backend.array(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    loss, grad = swl.cross_entropy_value_and_grad(backend.array(z), backend.array(target), **options)
    return backend.numpy(loss), backend.numpy(grad)


# ------------------------------------------------------------------------------------------------ edges of the options

EDGES = [(dtype, factor) for dtype in FLOATS[:2] for factor in (1.0, 1.5)]
"""How far inside the legal range an option is."""


def edge(dtype: Any, factor: float) -> tuple[float, float]:
    least = float(np.finfo(dtype).tiny) / float(np.finfo(dtype).eps)
    return least * factor, 1 / least / factor


@pytest.mark.parametrize(("dtype", "factor"), EDGES)
def test_a_softcap_at_the_edges_of_its_range(backend: Any, dtype: Any, factor: float) -> None:
    """Of the size of the logits it is a softcap as any; far above them none; far below them all logits are equal."""
    least, most = edge(dtype, factor)
    eps = float(np.finfo(dtype).eps)
    r = np.array([[0.0, 0.1, -0.1, 0.5, -2.0, 4.0, -30.0]])
    t = np.array([1])
    for softcap in (least, most):
        z = (r * softcap).astype(dtype)
        loss, grad = loss_and_grad(backend, z, t, softcap=softcap)
        want = oracle.cross_entropy(z, t, softcap=softcap)
        np.testing.assert_allclose(loss, want.loss, rtol=32 * eps)
        np.testing.assert_allclose(grad, want.grad, rtol=32 * eps, atol=32 * eps)
    z = np.random.default_rng(0).normal(size=(3, 300)).astype(dtype)
    t = np.array([0, 7, 299])
    loss, grad = loss_and_grad(backend, z, t, softcap=most)
    loss_without, grad_without = loss_and_grad(backend, z, t)
    np.testing.assert_allclose(loss, loss_without, rtol=8 * eps)
    np.testing.assert_allclose(grad, grad_without, rtol=32 * eps, atol=eps)
    loss, grad = loss_and_grad(backend, z, t, softcap=least)
    np.testing.assert_allclose(loss, math.log(300), rtol=8 * eps)
    assert not grad.any()


@pytest.mark.parametrize(("dtype", "factor"), EDGES)
def test_other_numbers_at_the_edges_of_their_range(backend: Any, dtype: Any, factor: float) -> None:
    least, most = edge(dtype, factor)
    C = 30
    z, t = np.random.default_rng(0).normal(size=(3, C)).astype(dtype), np.array([0, 7, 29])
    masked = z.copy()
    masked[:, 3] = -np.inf
    for options in (
        {"z_loss": least},
        {"z_loss": most},
        {"denominator": least},
        {"denominator": most},
        {"label_smoothing": C * least},
        {"label_smoothing": 1 - 2**-20 * factor},
    ):
        loss, grad = loss_and_grad(backend, z, t, **options)
        want = oracle.cross_entropy(z, t, **options)
        assert_close("loss", loss, want.loss, want.loss_scale, dtype)
        assert_close("grad", grad, want.grad, want.grad_scale, dtype)
        if "label_smoothing" in options:  # however small: it gives a masked class mass
            assert loss_and_grad(backend, masked, t, **options)[0] == np.inf


# ------------------------------------------------------------------------------------------------ laws


@pytest.mark.parametrize("C", [1, 2, 7, 10, 64, 1000, 50257])
@each_dtype
def test_equal_logits_of_any_size_give_exactly_log_c(backend: Any, dtype: Any, C: int) -> None:
    largest = 6e4 if dtype == np.float16 else 1e8
    losses = []
    for size in (0, 1e4, largest, -1e4, -largest):
        loss, grad = loss_and_grad(backend, np.full((2, C), size, dtype), np.array([0, C - 1]), reduction="none")
        losses.append(loss)
        assert_close("loss", loss, np.full(2, math.log(C)), math.log(C), acc_dtype(dtype), roundings=1)
        hot = np.arange(C) == np.array([[0], [C - 1]])
        assert_close("grad", grad, 1 / C - hot, 1, acc_dtype(dtype), dtype)
    for other in losses[1:]:
        same_bits("loss", losses[0], other)


@given(
    case=cases(dtypes=[np.dtype(np.float32), np.dtype(np.float64)]), shift=st.sampled_from([1024.0, -4096.0, 65536.0])
)
def test_shift_invariance_is_bitwise_where_the_shift_is_exact(backend: Any, case: Case, shift: float) -> None:
    for option in ("softcap", "z_loss", "temperature"):
        case.options.pop(option, None)
    case.logits = np.clip(np.round(16 * case.logits) / 16, -64, 64).astype(case.dtype)
    logits, target, options, dout = case.on(backend)
    loss, grad = swl.cross_entropy_value_and_grad(logits, target, dout=dout, **options)
    case.logits = case.logits + case.dtype.type(shift)
    shifted, *_ = case.on(backend)
    loss_shifted, grad_shifted = swl.cross_entropy_value_and_grad(shifted, target, dout=dout, **options)
    same_bits("loss", backend.numpy(loss), backend.numpy(loss_shifted))
    same_bits("grad", backend.numpy(grad), backend.numpy(grad_shifted))


@given(case=cases(dtypes=[np.dtype(np.float32), np.dtype(np.float64)]), temperature=st.sampled_from([0.25, 2.0, 64.0]))
def test_a_temperature_that_divides_exactly_is_that_of_divided_logits(
    backend: Any, case: Case, temperature: float
) -> None:
    case.options["temperature"] = temperature
    logits, target, options, dout = case.on(backend)
    loss, grad = swl.cross_entropy_value_and_grad(logits, target, dout=dout, **options)
    del options["temperature"]
    case.logits = case.logits / case.dtype.type(temperature)
    divided, *_ = case.on(backend)
    want_loss, want = swl.cross_entropy_value_and_grad(divided, target, dout=dout, **options)
    np.testing.assert_allclose(backend.numpy(loss), backend.numpy(want_loss), rtol=1e-6, atol=1e-6)
    want = backend.numpy(want)
    np.testing.assert_allclose(backend.numpy(grad) * temperature, want, rtol=1e-5, atol=1e-6 * abs(want).max(initial=1))


@given(case=cases())
def test_gradients_of_a_row_sum_to_zero(backend: Any, case: Case) -> None:
    """Without z-loss and softcap; smoothing and weights keep it so, because A is the mass of y."""
    for option in ("softcap", "z_loss"):
        case.options.pop(option, None)
    logits, target, options, dout = case.on(backend)
    grad = backend.numpy(swl.cross_entropy_value_and_grad(logits, target, dout=dout, **options)[1])
    scale = case.answer().grad_scale.sum(axis=-1)
    got = grad.astype(np.float64)
    rounding = 0.0 if case.dtype == case.acc else np.abs(got).sum(axis=-1) * oracle._eps(case.dtype)
    rounding = rounding + got.shape[-1] * oracle._tiny(case.dtype)
    assert np.all(np.abs(got.sum(axis=-1)) <= 32 * oracle._eps(case.acc) * scale + rounding)


@given(case=cases(), data=st.data())
def test_permuting_classes_permutes_gradients(backend: Any, case: Case, data: Any) -> None:
    C = case.logits.shape[-1]
    order = np.random.default_rng(data.draw(st.integers(0, 99))).permutation(C)
    other = Case(case.logits[..., order], case.target, case.layout, dict(case.options), case.dout)
    if "weight" in other.options:
        other.options["weight"] = other.options["weight"][order]
    if case.target.shape == case.logits.shape:
        other.target = case.target[..., order]
    else:
        ignored = case.target == case.options.get("ignore_index", -100)
        ids = np.where(ignored, 0, case.target).astype(np.int64)
        other.target = np.where(ignored, -7, np.argsort(order)[ids])
        other.options["ignore_index"] = -7
    logits, target, options, dout = case.on(backend)
    loss, grad = swl.cross_entropy_value_and_grad(logits, target, dout=dout, **options)
    logits, target, options, dout = other.on(backend)
    loss_2, grad_2 = swl.cross_entropy_value_and_grad(logits, target, dout=dout, **options)
    want = case.answer()
    grad, grad_2 = backend.numpy(grad).astype(np.float64), backend.numpy(grad_2)
    assert_close("loss", backend.numpy(loss_2), backend.numpy(loss), want.loss_scale, case.acc)
    assert_close("grad", grad_2, grad[..., order], want.grad_scale[..., order], case.acc, case.dtype)


@given(case=cases())
def test_an_option_that_is_off_is_bitwise_its_absence(backend: Any, case: Case) -> None:
    off = {
        "weight": None,
        "ignore_index": -100,
        "label_smoothing": 0.0,
        "sample_weight": None,
        "z_loss": 0.0,
        "softcap": None,
        "denominator": None,
        "check": None,
    }
    logits, target, options, dout = case.on(backend)
    loss, grad = swl.cross_entropy_value_and_grad(logits, target, dout=dout, **options)
    loss_2, grad_2 = swl.cross_entropy_value_and_grad(
        logits, target, dout=dout, out=None, stats=False, **{**off, **options}
    )
    same_bits("loss", backend.numpy(loss), backend.numpy(loss_2))
    same_bits("grad", backend.numpy(grad), backend.numpy(grad_2))


@each_dtype
def test_weights_of_one_are_bitwise_no_weights(backend: Any, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    z, t = (3 * rng.standard_normal((7, 33))).astype(dtype), rng.integers(0, 33, 7)
    loss, grad = loss_and_grad(backend, z, t)
    for ones in ({"weight": np.ones(33, np.float32)}, {"sample_weight": np.ones(7, np.float32)}):
        loss_1, grad_1 = loss_and_grad(backend, z, t, **ones)
        same_bits("loss", loss, loss_1)
        same_bits("grad", grad, grad_1)


@given(case=cases())
def test_the_same_call_gives_the_same_bits_and_leaves_its_inputs_alone(backend: Any, case: Case) -> None:
    logits, target, options, dout = case.on(backend)
    arrays = [logits, target, *(v for v in options.values() if hasattr(v, "shape")), *([dout] if np.ndim(dout) else [])]
    before = [backend.numpy(a).tobytes() for a in arrays]
    first = swl.cross_entropy_value_and_grad(logits, target, dout=dout, **options)
    second = swl.cross_entropy_value_and_grad(logits, target, dout=dout, **options)
    for a, b in zip(first, second, strict=True):
        assert backend.numpy(a).tobytes() == backend.numpy(b).tobytes()
    assert before == [backend.numpy(a).tobytes() for a in arrays]


@given(case=cases(dtypes=[np.dtype(np.float64)]))
def test_gradient_agrees_with_differences_of_the_loss(backend: Any, case: Case) -> None:
    """Along one random direction, by central differences of the library's own forward pass."""
    case.logits = np.clip(case.logits, -5, 5)
    case.options["reduction"] = "sum"
    case.options.pop("denominator", None)
    direction = np.random.default_rng(0).standard_normal(case.logits.shape)
    logits, target, options, _ = case.on(backend)
    grad = backend.numpy(swl.cross_entropy_value_and_grad(logits, target, **options)[1])
    h = 1e-5

    def loss(step: float) -> float:
        moved = backend.array(case.logits + step * direction)
        return float(backend.numpy(swl.cross_entropy(moved, target, **options)))

    slope = (loss(h) - loss(-h)) / (2 * h)
    bound = np.abs(grad * direction).sum()
    assert abs(slope - (grad * direction).sum()) <= 1e-6 * (1 + bound)


@given(case=cases(dtypes=[np.dtype(np.float64)]), factor=st.sampled_from([0.0, -3.0, 0.5, 65536.0]))
def test_gradient_is_linear_in_dout(backend: Any, case: Case, factor: float) -> None:
    logits, target, options, dout = case.on(backend)
    one = backend.numpy(swl.cross_entropy_value_and_grad(logits, target, dout=dout, **options)[1])
    scaled = backend.numpy(swl.cross_entropy_value_and_grad(logits, target, dout=dout * factor, **options)[1])
    least = np.finfo(case.acc).tiny / np.finfo(case.acc).eps  # what is not a normal number may be written as 0
    assert_close("grad", scaled, factor * one, np.abs(factor) * np.maximum(np.abs(one), least), case.acc)


def test_dout_per_row_is_honoured_row_by_row(backend: Any) -> None:
    """A gradient scaled by the first row's dout would pass every test with a constant dout."""
    rng = np.random.default_rng(0)
    z, t, dout = rng.standard_normal((4, 5)), np.array([0, 1, 2, 3]), np.array([1.0, -2.0, 0.0, 4.0])
    _, one = loss_and_grad(backend, z, t, reduction="none")
    _, many = loss_and_grad(backend, z, t, reduction="none", dout=dout)
    np.testing.assert_allclose(many, dout[:, None] * one, rtol=1e-15)


@given(case=cases(dtypes=[np.dtype(np.float64)]))
def test_the_reductions_agree_with_one_another(backend: Any, case: Case) -> None:
    case.options.pop("denominator", None)
    logits, target, options, _ = case.on(backend)
    loss = {}
    for reduction in ("none", "sum", "mean"):
        options["reduction"] = reduction
        loss[reduction] = backend.numpy(swl.cross_entropy(logits, target, **options))
    mean_of = {**options, "denominator": 12.5}
    with_denominator = backend.numpy(swl.cross_entropy(logits, target, **mean_of))
    scale = np.abs(loss["none"]).sum()
    assert_close("sum", loss["sum"], loss["none"].sum(), scale, case.acc)
    assert_close("denominator", with_denominator, loss["sum"] / 12.5, scale / 12.5, case.acc)


def test_micro_batches_with_one_denominator_add_up_to_the_batch(backend: Any) -> None:
    rng = np.random.default_rng(0)
    z, t, w = rng.standard_normal((8, 5)), np.array([0, -100, 2, 3, 4, -100, -100, 1]), rng.random(5)
    loss, grad = loss_and_grad(backend, z, t, weight=w)
    total = float(w[t[t >= 0]].sum())
    parts = [loss_and_grad(backend, z[i : i + 3], t[i : i + 3], weight=w, denominator=total) for i in (0, 3, 6)]
    np.testing.assert_allclose(sum(part[0] for part in parts), loss, rtol=1e-14)
    np.testing.assert_allclose(np.concatenate([part[1] for part in parts]), grad, rtol=1e-14)


def test_a_denominator_may_be_a_zero_dimensional_array(backend: Any) -> None:
    z, t = np.random.default_rng(0).standard_normal((3, 4)), np.array([0, 1, 2])
    loss, grad = loss_and_grad(backend, z, t, denominator=8.0)
    loss_2, grad_2 = loss_and_grad(backend, z, t, denominator=np.array(8.0))
    np.testing.assert_allclose(loss_2, loss, rtol=1e-15)
    np.testing.assert_allclose(grad_2, grad, rtol=1e-15)


# ------------------------------------------------------------------------------------------------ infinities and NaN


@each_dtype
def test_minus_inf_on_another_class_is_a_mask(backend: Any, dtype: Any) -> None:
    """Probability 0, gradient exactly 0; the rest is as if the class were not there."""
    rng = np.random.default_rng(0)
    for C in (5, 40, 3000):
        z = rng.standard_normal((4, C)).astype(dtype)
        t = np.array([0, 1, 2, 3])
        kept = np.arange(C) % 3 != 1
        kept[:4] = True
        masked = np.where(kept, z, -np.inf).astype(dtype)
        loss, grad = loss_and_grad(backend, masked, t, reduction="none")
        few = Case(np.ascontiguousarray(z[:, kept]), t, CONTIGUOUS, {"reduction": "none"})
        want = few.answer()
        assert_close("loss", loss, want.loss, want.loss_scale, few.acc)
        assert_close("grad", grad[:, kept], want.grad, want.grad_scale, few.acc, dtype)
        assert np.all(grad[:, ~kept] == 0)


@pytest.mark.parametrize("kind", ["ids", "probabilities"])
@each_dtype
def test_a_masked_class_without_target_mass_with_every_option(backend: Any, dtype: Any, kind: str) -> None:
    rng = np.random.default_rng(0)
    z = rng.standard_normal((3, 9)).astype(dtype)
    z[:, 4:7] = -np.inf
    t: Any = np.array([0, 8, 3])
    if kind == "probabilities":
        t = rng.random((3, 9))
        t[:, 4:7] = 0
    options = {"weight": rng.random(9).astype(np.float32), "z_loss": 0.1, "reduction": "none"}
    case = Case(z, t, CONTIGUOUS, options)
    logits, target, options, _ = case.on(backend)
    loss, grad, stats = swl.cross_entropy_value_and_grad(logits, target, stats=True, **options)
    check(backend, case, loss, grad, stats)
    assert np.all(backend.numpy(grad)[:, 4:7] == 0)
    assert np.all(np.isfinite(backend.numpy(stats.entropy)))


@pytest.mark.parametrize("first", [True, False])
def test_a_whole_block_of_masks(backend: Any, first: bool) -> None:
    """30000 masked classes in a row, before or after those that count."""
    z = np.full((2, 40_000), -np.inf, np.float32)
    rng = np.random.default_rng(0)
    kept = slice(30_000, None) if first else slice(0, 10_000)
    z[:, kept] = rng.standard_normal((2, 10_000))
    t = np.array([kept.start, kept.start + 9_999])
    loss, grad = loss_and_grad(backend, z, t, reduction="none")
    few = Case(z[:, kept].copy(), t - kept.start, options={"reduction": "none"})
    want = few.answer()
    assert_close("loss", loss, want.loss, want.loss_scale, few.acc)
    assert_close("grad", grad[:, kept], want.grad, want.grad_scale, few.acc)
    assert np.count_nonzero(grad) <= 20_000


@pytest.mark.parametrize("kind", ["ids", "probabilities", "smoothing"])
@each_dtype
def test_minus_inf_at_the_target_gives_an_infinite_loss_in_that_row_alone(backend: Any, dtype: Any, kind: str) -> None:
    rng = np.random.default_rng(0)
    z = rng.standard_normal((3, 21)).astype(dtype)
    z[1, 2] = -np.inf
    ids = np.array([0, 5 if kind == "smoothing" else 2, 1])
    t = np.eye(21, dtype=np.float32)[ids] if kind == "probabilities" else ids
    smoothing = 0.1 if kind == "smoothing" else 0.0
    loss, grad = loss_and_grad(backend, z, t, reduction="none", label_smoothing=smoothing)
    assert loss[1] == np.inf
    assert np.all(np.isfinite(loss[[0, 2]]))
    want = oracle.cross_entropy(z, t, reduction="none", label_smoothing=smoothing)
    assert_close("grad", grad, want.grad, want.grad_scale, acc_dtype(dtype), dtype)


@pytest.mark.parametrize("bad", ["nan first", "nan last", "+inf", "+inf at the target", "two +inf", "-inf only"])
@pytest.mark.parametrize("kind", ["ids", "probabilities"])
@pytest.mark.parametrize("C", [3, 17, 128, 5000])
@each_dtype
def test_a_bad_row_is_nan_and_no_other(backend: Any, dtype: Any, C: int, kind: str, bad: str) -> None:
    rng = np.random.default_rng(0)
    z = rng.standard_normal((5, C)).astype(dtype)
    ids = np.array([0, 1, 2, 1, 0])
    where = {"nan first": 0, "nan last": C - 1, "+inf": 1, "+inf at the target": 2, "two +inf": [0, C - 1]}
    if bad == "-inf only":
        z[2] = -np.inf
    else:
        z[2, where[bad]] = np.nan if bad.startswith("nan") else np.inf
    t = np.eye(C, dtype=np.float32)[ids] if kind == "probabilities" else ids
    good = [0, 1, 3, 4]
    for options in ({}, {"label_smoothing": 0.1, "z_loss": 0.1}):
        loss, grad = loss_and_grad(backend, z, t, reduction="none", **options)
        want = oracle.cross_entropy(z, t, reduction="none", **options)
        assert np.isnan(loss[2])
        assert np.all(np.isnan(grad[2]))
        assert_close("loss", loss[good], want.loss[good], want.loss_scale[good], acc_dtype(dtype))
        assert_close("grad", grad[good], want.grad[good], want.grad_scale[good], acc_dtype(dtype), dtype)


@each_dtype
def test_a_softcap_makes_infinite_logits_finite(backend: Any, dtype: Any) -> None:
    z = np.array([[np.inf, -np.inf, 0.5], [-np.inf, -np.inf, -np.inf]]).astype(dtype)
    case = Case(z, np.array([2, 0]), CONTIGUOUS, {"softcap": 4.0, "reduction": "none"})
    logits, target, options, _ = case.on(backend)
    loss, grad = swl.cross_entropy_value_and_grad(logits, target, **options)
    check(backend, case, loss, grad)
    assert np.all(np.isfinite(backend.numpy(loss)))
    assert np.all(backend.numpy(grad)[np.isinf(z.astype(np.float64))] == 0)


@pytest.mark.parametrize("what", [np.nan, np.inf, -np.inf])
@each_dtype
def test_an_ignored_row_counts_for_nothing_whatever_its_logits(backend: Any, dtype: Any, what: float) -> None:
    rng = np.random.default_rng(0)
    z = rng.standard_normal((3, 40)).astype(dtype)
    t = np.array([5, -100, 7])
    options = {
        "weight": rng.random(40).astype(np.float32),
        "label_smoothing": 0.1,
        "z_loss": 0.1,
        "sample_weight": np.array([1, 5, 2], np.float32),
    }
    clean_loss, clean_grad = loss_and_grad(backend, z, t, **options)
    z[1] = what
    loss, grad = loss_and_grad(backend, z, t, **options)
    same_bits("loss", loss, clean_loss)
    same_bits("grad", grad[[0, 2]], clean_grad[[0, 2]])
    assert np.all(grad[1] == 0)
    loss, stats = swl.cross_entropy(backend.array(z), backend.array(t), stats=True, reduction="none")
    assert backend.numpy(loss)[1] == 0
    assert backend.numpy(stats.log_prob)[1] == 0


# ------------------------------------------------------------------------------------------------ nothing to count


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options", [{}, {"weight": True}, {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0}], ids=str
)
@each_dtype
def test_all_rows_ignored_gives_zero(backend: Any, dtype: Any, options: Any, reduction: str) -> None:
    z = np.random.default_rng(0).standard_normal((2, 3, 5)).astype(dtype)
    options = {**options, "reduction": reduction}
    if "weight" in options:
        options["weight"] = np.ones(5, np.float32)
    loss, grad = loss_and_grad(backend, z, np.full((2, 3), -100), **options)
    assert loss.shape == ((2, 3) if reduction == "none" else ())
    assert np.all(loss == 0)
    assert grad.shape == z.shape
    assert grad.dtype == dtype
    assert np.all(grad == 0)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (0, 3, 5)])
@pytest.mark.parametrize("kind", ["ids", "probabilities"])
@each_dtype
def test_no_rows_give_zero(backend: Any, dtype: Any, kind: str, shape: tuple[int, ...]) -> None:
    target = np.zeros(shape if kind == "probabilities" else shape[:-1], np.int64)
    for reduction in ("mean", "sum"):
        loss, grad = loss_and_grad(backend, np.zeros(shape, dtype), target, reduction=reduction)
        assert loss.shape == ()
        assert loss == 0
        assert grad.shape == shape
    loss, stats = swl.cross_entropy(
        backend.array(np.zeros(shape, dtype)), backend.array(target), reduction="none", stats=True
    )
    assert backend.numpy(loss).shape == shape[:-1]
    assert all(backend.numpy(x).shape == shape[:-1] for x in stats)


def test_classes_of_weight_zero_only_give_zero(backend: Any) -> None:
    z, w = np.random.default_rng(0).standard_normal((2, 3)), np.array([0.0, 0.0, 1.0])
    loss, grad = loss_and_grad(backend, z, np.array([0, 1]), weight=w)
    assert loss == 0
    assert np.all(grad == 0)


# ------------------------------------------------------------------------------------------------ 16-bit logits


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16], ids=str)
@pytest.mark.parametrize("size", [5, 40, 80, 160])
def test_16_bit_logits_of_any_size_see_one_rounding(backend: Any, dtype: Any, size: float) -> None:
    """p − y is formed in float32 and rounded once, from the same logits in both sweeps."""
    rng = np.random.default_rng(size)
    z = rng.uniform(-size, size, (16, 252)).astype(dtype)
    z[:, 7] = z.max(axis=1)  # a tie, so that p is not a one-hot
    case = Case(z, rng.integers(0, 252, 16), CONTIGUOUS, {"reduction": "none"}, rng.standard_normal(16).astype("f"))
    logits, target, options, dout = case.on(backend)
    loss, grad = swl.cross_entropy_value_and_grad(logits, target, dout=dout, **options)
    check(backend, case, loss, grad)
    again = forward(logits, target, Options(reduction="none")).backward(dout)
    same_bits("grad", backend.numpy(again), backend.numpy(grad))


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16], ids=str)
def test_the_mean_over_very_many_16_bit_rows(backend: Any, dtype: Any) -> None:
    """1/N in float16 is subnormal from N = 16384 on and 0 soon after; a loss scale makes up for it in float32."""
    N = 70_000
    rng = np.random.default_rng(0)
    case = Case(rng.standard_normal((N, 3)).astype(dtype), rng.integers(0, 3, N), dout=float(N))
    logits, target, options, dout = case.on(backend)
    loss, grad = swl.cross_entropy_value_and_grad(logits, target, dout=dout, **options)
    check(backend, case, loss, grad)


# ------------------------------------------------------------------------------------------------ broadcast operands


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", ["ids", "probabilities"])
@each_dtype
def test_stride_0_logits_and_targets(backend: Any, dtype: Any, kind: str, axis: int) -> None:
    rng = np.random.default_rng(0)
    z = rng.standard_normal((6, 45)).astype(dtype)
    t: Any = np.full(6, 3) if kind == "ids" else rng.random((6, 45)).astype(np.float32)
    case = Case(np.repeat(z.take([0], axis), z.shape[axis], axis), t, CONTIGUOUS, {"reduction": "none"})
    logits = repeat_first(backend, z, axis)
    assert 0 in logits.strides
    target = repeat_first(backend, t, 0)
    case.target = np.repeat(t[:1], 6, axis=0)
    sample_weight, dout = (repeat_first(backend, np.full(6, value), 0) for value in (0.5, 3.0))
    case.options["sample_weight"], case.dout = np.full(6, 0.5), np.full(6, 3.0)
    weight = repeat_first(backend, np.full(45, 0.25, np.float32), 0)
    case.options["weight"] = np.full(45, 0.25, np.float32)
    loss, grad = swl.cross_entropy_value_and_grad(
        logits, target, dout=dout, reduction="none", sample_weight=sample_weight, weight=weight
    )
    check(backend, case, loss, grad)


# ------------------------------------------------------------------------------------------------ smoothing and weights


def test_smoothing_mass_is_weighted_class_by_class(backend: Any) -> None:
    """By hand: y_c = (1−ε)·w_t·[c = t] + (ε/C)·w_c, over Σ w_t."""
    z, w, eps = np.log(np.array([[1.0, 2.0, 5.0]])), np.array([1.0, 2.0, 6.0]), 0.3
    log_p = np.log(np.array([1, 2, 5]) / 8)
    y = np.array([0.1 * 1, 0.7 * 2 + 0.1 * 2, 0.1 * 6])
    loss, grad = loss_and_grad(backend, z, np.array([1]), weight=w, label_smoothing=eps)
    np.testing.assert_allclose(loss, -(y * log_p).sum() / 2, rtol=1e-14)
    np.testing.assert_allclose(grad, [(y.sum() * np.array([1, 2, 5]) / 8 - y) / 2], rtol=1e-13)


def test_the_mean_divides_by_the_weights_of_the_rows_that_count(backend: Any) -> None:
    z, w, s = np.zeros((4, 2)), np.array([3.0, 5.0]), np.array([1.0, 2.0, 4.0, 8.0])
    for t, total in [(np.array([0, 1, -100, 0]), 1 * 3 + 2 * 5 + 8 * 3)]:
        loss, grad = loss_and_grad(backend, z, t, weight=w, sample_weight=s)
        np.testing.assert_allclose(loss, math.log(2), rtol=1e-15)
        np.testing.assert_allclose(grad[1], np.array([5, -5]) * 2 / 2 / total, rtol=1e-15)
    q = np.full((4, 2), 0.5)
    loss, _ = loss_and_grad(backend, z, q, weight=w, sample_weight=s)
    np.testing.assert_allclose(loss, 4 * math.log(2), rtol=1e-15)  # A = 4; over probabilities the mean divides by Σ s


def test_z_loss_by_hand(backend: Any) -> None:
    """λ·lse², its gradient 2λ·lse·p."""
    z = np.log(np.array([[1.0, 3.0]]))
    loss, grad = loss_and_grad(backend, z, np.array([0]), z_loss=0.5)
    np.testing.assert_allclose(loss, np.log(4) + 0.5 * np.log(4) ** 2, rtol=1e-15)
    np.testing.assert_allclose(grad, [[0.25 - 1 + np.log(4) * 0.25, 0.75 + np.log(4) * 0.75]], rtol=1e-14)


@pytest.mark.parametrize(
    "options", [{}, {"weight": 0.7}, {"weight": 0.7, "label_smoothing": 0.1, "softcap": 1e30}], ids=str
)
@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
def test_z_loss_of_one_class_is_right_to_rounding(backend: Any, dtype: Any, options: dict[str, Any]) -> None:
    """A·p − y is 0; from (A + 2λ·w·z)·p − y the few digits of λ beside A would be left."""
    z = np.concatenate([-np.logspace(-3, 3, 40), np.logspace(-3, 3, 40)]).astype(dtype)[:, None]
    weight = dtype.type(options.get("weight", 1.0))
    given = options | {"weight": np.array([weight])}
    _, grad = loss_and_grad(backend, z, np.zeros(80, int), z_loss=1e-4, reduction="sum", **given)
    expected = 2e-4 * float(weight) * z.astype(np.float64)
    np.testing.assert_allclose(grad, expected, rtol=4 * np.finfo(dtype).eps)


@pytest.mark.parametrize("softcap", [1000.0, 999.3])
def test_the_slope_of_the_softcap_keeps_its_digits_near_the_cap(backend: Any, softcap: float) -> None:
    """Within 4 units in the last place up to 8κ. The other class has all probability, so that the gradient is −∂z/∂r."""
    z = np.empty((2000, 2), np.float32)
    z[:, 0], z[:, 1] = np.linspace(-8, 0.9, 2000) * softcap, 8 * softcap
    _, grad = loss_and_grad(backend, z, np.zeros(2000, int), softcap=softcap, reduction="sum")
    e = np.exp(-2 * np.abs(z[:, 0].astype(np.float64)) / softcap)
    slope = 4 * e / (1 + e) ** 2
    assert (np.abs(-grad[:, 0] - slope) <= 4 * np.spacing(slope.astype(np.float32))).all()


def test_far_beyond_the_softcap_the_slope_ends_at_zero(host_backend: Any) -> None:
    z = np.array([[-np.inf, 8], [-1e30, 8], [-300, 8], [-50, 8], [-40, 8], [np.nan, 8]], np.float32)
    _, grad = loss_and_grad(host_backend, z, np.zeros(6, int), softcap=1.0, reduction="sum")
    assert (grad[:3, 0] == 0).all()
    assert -1.4e-43 < grad[3, 0] <= 0
    np.testing.assert_allclose(grad[4, 0], -4 * np.exp(-80.0) / (1 + np.exp(-2.0)), rtol=1e-6)  # (p − 1)·slope
    assert np.isnan(grad[5]).all()


@pytest.mark.parametrize("dtype", [d for d in INTEGERS if d.kind == "u"], ids=str)
def test_an_ignore_index_that_the_ids_cannot_hold_ignores_nothing(backend: Any, dtype: Any) -> None:
    """−100 in unsigned ids: no row is ignored, above all not one that equals it modulo 2**bits."""
    C = 300
    z = np.random.default_rng(0).standard_normal((2, C))
    t = np.array([3, 156], dtype)  # 156 = −100 modulo 256
    loss, _ = loss_and_grad(backend, z, t)
    want, _ = loss_and_grad(backend, z, t.astype(np.int64))
    assert loss == want


def test_what_the_user_asks_numpy_to_raise_is_not_raised_by_a_loss(host_backend: Any) -> None:
    """Overflow when a gradient is rounded, probabilities that underflow, NaN: all are what the equations say."""
    z = host_backend.array([[6e4, -6e4, 0.0], [np.nan, np.inf, 1.0], [0.0, -90.0, -np.inf]], np.float16)
    with np.errstate(all="raise"):
        loss, grad = swl.cross_entropy_value_and_grad(z, np.array([1, 0, 0]), reduction="sum", dout=1e6)
        assert np.isnan(loss)
        assert np.isinf(grad[0]).any()
        swl.cross_entropy_value_and_grad(z, np.array([1, 0, 0]), label_smoothing=0.1, softcap=3.0, stats=True)
