"""The fused head, on every backend: any budget gives the answer of the float64 oracle, and a plan says what is held."""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass
from typing import Any

import numpy as np
import oracle
import pytest
from cases import BFLOAT16, CONTIGUOUS, FLOATS, LAYOUTS, Case, Layout, acc_dtype, cases, place
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_close
from test_cross_entropy import same_bits

import swl

ALL = ("dx", "dW", "db")
PLAIN = [np.dtype(np.float32), np.dtype(np.float64)]
ROUNDINGS = 64

# ------------------------------------------------------------------------------------------------ cases


@dataclass
class Head:
    """A call of the fused head: the target and the options of `loss`, whose logits are x·W + b."""

    loss: Case
    x: Any
    W: Any
    b: Any
    x_layout: Layout
    w_layout: Layout
    budget: int

    def on(self, backend: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """Bring everything to the backend: the arrays, then budget and options, and dout."""
        _, target, options, dout = self.loss.on(backend)
        x, W = place(backend, self.x, self.x_layout), place(backend, self.W, self.w_layout)
        b = None if self.b is None else backend.array(self.b)
        return (x, W, target, b), {"memory_budget": self.budget, **options}, dout

    def answer(self) -> Answer:
        D, C = self.W.shape
        x, W = self.x.astype(np.float64).reshape(-1, D), self.W.astype(np.float64)
        b = np.zeros(C) if self.b is None else self.b.astype(np.float64)
        size = (np.abs(x) @ np.abs(W) + np.abs(b)).max(axis=1, initial=0)  # of the logits' rounding errors
        shape = (*self.x.shape[:-1], C)
        ones = {**vars(self.loss), "logits": (x @ W + b).reshape(shape), "dout": 1.0}
        want, loss = (Case(**{**ones, "dout": dout}).answer() for dout in (self.loss.dout, 1.0))
        grad = want.grad.reshape(-1, C)
        scale = want.grad_scale.reshape(-1, C) * (1 + 2 * size[:, None])
        per_row = (loss.grad_scale.reshape(-1, C).sum(axis=1) * size).reshape(shape[:-1])
        return Answer(
            want,
            want.loss_scale + (per_row if want.loss.shape == per_row.shape else per_row.sum()),
            want.row_scale * (1 + 2 * size.reshape(shape[:-1])),
            {
                "dx": ((grad @ W.T).reshape(self.x.shape), (scale @ np.abs(W).T).reshape(self.x.shape)),
                "dW": (x.T @ grad, np.abs(x).T @ scale),
                "db": (grad.sum(axis=0), scale.sum(axis=0)),
            },
            {
                "dx": (unit(grad, self.loss.dtype) @ np.abs(W).T).reshape(self.x.shape),
                "dW": np.abs(x).T @ unit(grad, self.loss.dtype),
                "db": unit(grad, self.loss.dtype).sum(axis=0),
            },
        )


@dataclass
class Answer:
    want: oracle.Answer
    loss_scale: Any
    row_scale: Any
    gradients: dict[str, tuple[Any, Any]]
    one_rounding: dict[str, Any]
    """Of the gradients, where that of the logits was rounded once to the dtype of the operands."""


def unit(x: Any, dtype: Any) -> Any:
    """Give the largest error of rounding to `dtype`."""
    return oracle._eps(dtype) / 2 * np.abs(x) + oracle._tiny(dtype) / 4


@st.composite
def heads(draw: Any, dtypes: Any = FLOATS) -> Head:
    loss = draw(cases(dtypes=dtypes))
    loss.layout = CONTIGUOUS
    if loss.target.shape == loss.logits.shape:  # how a target is stored is tested with stored logits
        loss.target = loss.target.astype(loss.acc)
    *leading, C = loss.logits.shape
    rng, D = np.random.default_rng(draw(st.integers(0, 2**32 - 1))), draw(st.integers(1, 9))
    size = draw(st.sampled_from([0.3, 1.0, 3.0]))
    x, W = ((size * rng.standard_normal(shape)).astype(loss.dtype) for shape in ((*leading, D), (D, C)))
    b = rng.standard_normal(C).astype(loss.dtype) if draw(st.booleans()) else None
    layout = st.sampled_from(LAYOUTS[:2])
    return Head(loss, x, W, b, draw(layout), draw(layout), draw(budgets(int(np.prod(leading)), D, C)))


@st.composite
def budgets(draw: Any, N: int, D: int, C: int, chunks: int = 40) -> int:
    """From a few bytes, but for no more chunks than a test has patience for, to more than it all takes."""
    budget = int(2.0 ** draw(st.floats(2, 3 + np.log2(8 * max(N, 1) * C + 4 * D))))
    while swl.plan(N, D, C, memory_budget=budget).chunks > chunks:
        budget *= 2
    return budget


def check(backend: Any, head: Head, needs: Any, loss: Any, gradients: Any, stats: Any = None) -> None:
    answer, acc = head.answer(), head.loss.acc
    assert backend.numpy(loss).dtype == acc
    assert_close("loss", backend.numpy(loss), answer.want.loss, answer.loss_scale, acc, roundings=ROUNDINGS)
    for name, got in zip(ALL, gradients, strict=True):
        if name not in needs or (name == "db" and head.b is None):
            assert got is None, name
            continue
        want, scale = answer.gradients[name]
        if not backend.is_host and head.loss.dtype.itemsize == 2:  # whose products all take 16-bit operands
            scale = scale + answer.one_rounding[name] / (ROUNDINGS * oracle._eps(acc))
        assert got.dtype == head.loss.dtype, name
        assert_close(name, backend.numpy(got), want, scale, acc, head.loss.dtype, roundings=ROUNDINGS)
    if stats is None:
        return
    for name in ("row_max", "log_sum", "log_prob", "entropy"):
        got = backend.numpy(getattr(stats, name))
        assert_close(name, got, getattr(answer.want, name), answer.row_scale, acc, roundings=ROUNDINGS)
    argmax = backend.numpy(stats.argmax)
    assert argmax.dtype == np.int64
    C = head.W.shape[1]
    z = head.x.astype(np.float64) @ head.W.astype(np.float64) + (0 if head.b is None else head.b.astype(np.float64))
    best = np.take_along_axis(z.reshape(-1, C), argmax.reshape(-1, 1), axis=1).reshape(argmax.shape)
    if not {"softcap", "temperature"} & head.loss.options.keys():  # rounding may make two logits equal
        assert_close("score of argmax", best, z.max(axis=-1), answer.row_scale, acc)


# ------------------------------------------------------------------------------------------------ the answer


@given(head=heads(), needs=st.sets(st.sampled_from(ALL)))
def test_any_budget_gives_the_answer_of_the_oracle(backend: Any, head: Head, needs: set[str]) -> None:
    arrays, options, dout = head.on(backend)
    got = swl.linear_cross_entropy_value_and_grad(*arrays, dout=dout, needs=needs, stats=True, **options)
    check(backend, head, needs, *got)


@given(head=heads())
def test_the_forward_sweep_alone(backend: Any, head: Head) -> None:
    arrays, options, _ = head.on(backend)
    loss, stats = swl.linear_cross_entropy(*arrays, stats=True, **options)
    check(backend, head, (), loss, (None, None, None), stats)
    same_bits("loss without stats", backend.numpy(loss), backend.numpy(swl.linear_cross_entropy(*arrays, **options)))


@given(head=heads(dtypes=PLAIN), data=st.data())
def test_any_two_budgets_give_the_same_answer(backend: Any, head: Head, data: Any) -> None:
    answer, acc = head.answer(), head.loss.acc
    first = second = None
    for _ in range(2):
        arrays, options, dout = head.on(backend)
        loss, gradients = swl.linear_cross_entropy_value_and_grad(*arrays, dout=dout, **options)
        first, second = second, [backend.numpy(a) for a in (loss, *gradients) if a is not None]
        head.budget = data.draw(budgets(head.x.size // head.W.shape[0], *head.W.shape))
    scales = [answer.loss_scale, *(answer.gradients[name][1] for name in ALL)]
    for a, b, scale in zip(first, second, scales, strict=False):
        assert_close("result", a, b, scale, acc, roundings=ROUNDINGS)


@given(head=heads(dtypes=PLAIN))
@settings(max_examples=25)
def test_it_is_the_unfused_head(backend: Any, head: Head) -> None:
    arrays, options, dout = head.on(backend)
    x, W, target, b = arrays
    loss, gradients = swl.linear_cross_entropy_value_and_grad(*arrays, dout=dout, **options)
    options.pop("memory_budget")
    other, dlogits = swl.cross_entropy_value_and_grad(swl.affine(x, W, b), target, dout=dout, **options)
    dx, dW, db = swl.affine_backward(dlogits, x, W)
    answer = head.answer()
    assert_close("loss", backend.numpy(loss), backend.numpy(other), answer.loss_scale, head.loss.acc, roundings=128)
    for name, got, want in zip(ALL, gradients, (dx, dW, db), strict=True):
        if got is not None:
            scale = answer.gradients[name][1]
            assert_close(name, backend.numpy(got), backend.numpy(want), scale, head.loss.acc, roundings=128)


@given(head=heads())
@settings(max_examples=20)
def test_the_same_call_gives_the_same_bits(backend: Any, head: Head) -> None:
    runs = []
    for _ in range(2):
        arrays, options, dout = head.on(backend)
        loss, gradients, stats = swl.linear_cross_entropy_value_and_grad(*arrays, dout=dout, stats=True, **options)
        runs.append([backend.numpy(a) for a in (loss, *gradients, *stats) if a is not None])
    for a, b in zip(*runs, strict=True):
        same_bits("result", a, b)


def call(
    backend: Any, target: Any, *, N: int = 150, D: int = 5, C: int = 30, dtype: Any = np.float32, **options: Any
) -> Any:
    rng = np.random.default_rng(3)
    x, W, b = (backend.array(rng.standard_normal(shape), dtype) for shape in ((N, D), (D, C), (C,)))
    target = target if callable(target) else backend.array(target)
    loss, gradients = swl.linear_cross_entropy_value_and_grad(x, W, target, b, **options)
    return backend.numpy(loss), [None if g is None else backend.numpy(g) for g in gradients]


ROWS, BOTH = 12_000, 2_000  # bytes that cut 150 × 30 logits of 5 inputs into chunks of rows, and of rows and classes


def test_the_budgets_of_these_tests_cut_as_they_should() -> None:
    rows, both = (swl.plan(150, 5, 30, memory_budget=budget) for budget in (ROWS, BOTH))
    assert rows.rows < 150
    assert rows.classes == 30
    assert both.rows < 150
    assert both.classes < 30


@pytest.mark.parametrize("budget", [ROWS, BOTH, 10**6])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "softcap": 3.0, "z_loss": 0.1}], ids=["plain", "all"])
def test_a_callable_gives_the_target_chunk_by_chunk(backend: Any, budget: int, options: dict[str, Any]) -> None:
    q = np.random.default_rng(0).dirichlet(np.ones(30), 150).astype(np.float32)
    asked = np.zeros(q.shape, int)

    def give(rows: slice, classes: slice) -> Any:
        asked[rows, classes] += 1
        return backend.array(q[rows, classes])

    loss, gradients = call(backend, give, memory_budget=budget, **options)
    want, others = call(backend, q, memory_budget=budget, **options)
    same_bits("loss", loss, want)
    for got, other in zip(gradients, others, strict=True):
        same_bits("gradient", got, other)
    assert (asked == (2 if budget == BOTH else 1)).all()  # once per sweep


def test_a_callable_that_gives_something_else_is_named(backend: Any) -> None:
    with pytest.raises(ValueError, match=r"target of probabilities must have shape \(150, 30\).*got \(150, 1\)"):
        call(backend, lambda rows, classes: backend.array(np.ones((150, 1))))
    with pytest.raises(TypeError, match="target of probabilities must hold real numbers, got complex64"):
        call(backend, lambda rows, classes: backend.array(np.ones((150, 30)), np.complex64))


@pytest.mark.parametrize("budget", [ROWS, BOTH, 10**6])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_no_rows_and_only_ignored_rows_are_exactly_zero(backend: Any, budget: int, dtype: Any) -> None:
    for N in (0, 150):
        loss, gradients = call(backend, np.full(N, -100), N=N, dtype=dtype, memory_budget=budget)
        assert loss == 0
        assert [g.shape for g in gradients] == [(N, 5), (5, 30), (30,)]
        assert all(g.dtype == dtype and not g.astype(float).any() for g in gradients)


def test_no_rows_have_empty_stats(backend: Any) -> None:
    x, W = backend.array(np.ones((0, 3))), backend.array(np.ones((3, 4)))
    for target in (np.zeros(0, int), np.ones((0, 4))):
        loss, stats = swl.linear_cross_entropy(x, W, backend.array(target), stats=True, reduction="none")
        assert loss.shape == (0,)
        assert all(a.shape == (0,) for a in stats)
        assert stats.argmax.dtype == np.int64


@pytest.mark.parametrize("budget", [BOTH, 10**6])
def test_masks_and_nan_stay_in_their_rows(backend: Any, budget: int) -> None:
    """A bias of −inf masks a class; a NaN input makes its own row NaN and no other."""
    rng = np.random.default_rng(0)
    x, W, b, t = rng.standard_normal((12, 5)), rng.standard_normal((5, 30)), np.zeros(30), np.arange(12)
    b[20:] = -np.inf
    x[3] = np.nan
    arrays = [backend.array(a) for a in (x, W, t, b)]
    loss, (dx, dW, _), stats = swl.linear_cross_entropy_value_and_grad(
        *arrays, reduction="none", stats=True, memory_budget=budget
    )
    loss, dx, dW = backend.numpy(loss), backend.numpy(dx), backend.numpy(dW)
    want = oracle.cross_entropy(x @ W + b, t, reduction="none")
    keep = np.arange(12) != 3
    assert np.isnan(loss[3])
    assert np.isnan(dx[3]).all()
    np.testing.assert_allclose(loss[keep], want.loss[keep], rtol=1e-12)
    np.testing.assert_allclose(dx[keep], (want.grad @ W.T)[keep], rtol=1e-10)
    for name in ("log_prob", "entropy", "argmax"):
        got = backend.numpy(getattr(stats, name))
        np.testing.assert_allclose(got[keep], getattr(want, name)[keep], rtol=1e-10)
    assert not np.isfinite(dW).any(axis=0)[:20].any()
    other = swl.linear_cross_entropy(
        *(backend.array(a) for a in (x[keep], W, np.full(11, 25), b)), memory_budget=budget
    )
    assert backend.numpy(other) == np.inf  # the target is masked


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # NumPy's word on ∞ − ∞
@pytest.mark.parametrize("budget", [BOTH, 20_000, 10**6])
@pytest.mark.parametrize("dout", [np.inf, -np.inf, np.nan])
def test_ignored_rows_have_no_gradient_whatever_comes_after(backend: Any, budget: int, dout: float) -> None:
    rng = np.random.default_rng(0)
    x, W, t = rng.standard_normal((150, 5)), rng.standard_normal((5, 30)), rng.integers(0, 30, 150)
    ignored = rng.random(150) < 0.5
    for upstream, reduction in ((dout, "mean"), (dout, "sum"), (np.where(ignored, dout, 1.0), "none")):
        g = backend.array(upstream) if isinstance(upstream, np.ndarray) else upstream
        _, (dx, _, _) = swl.linear_cross_entropy_value_and_grad(
            *map(backend.array, (x, W, np.where(ignored, -100, t))),
            dout=g,
            reduction=reduction,
            memory_budget=budget,
        )
        dx = backend.numpy(dx)
        assert not dx[ignored].any()
        assert np.isfinite(dx[~ignored]).all() == (reduction == "none")


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize("budget", [BOTH, 20_000, 10**6])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0}], ids=str)
def test_ignored_rows_have_no_gradient_whatever_the_bias(backend: Any, budget: int, options: Any) -> None:
    rng = np.random.default_rng(0)
    x, W = rng.standard_normal((150, 5)), rng.standard_normal((5, 30))
    for what in (np.nan, np.inf):
        arrays = x, W, np.full(150, -100), np.full(30, what)
        loss, gradients = swl.linear_cross_entropy_value_and_grad(
            *map(backend.array, arrays), memory_budget=budget, **options
        )
        assert backend.numpy(loss) == 0
        assert not any(backend.numpy(g).any() for g in gradients)


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16], ids=str)
def test_a_16_bit_gradient_adds_up_in_float32(backend: Any, dtype: Any) -> None:
    """4096 equal rows: added up in 16 bit, a row's share would soon be less than half the spacing of the sum."""
    N, C = 4096, 4
    x, W, t = np.ones((N, 1), dtype), np.zeros((1, C), dtype), np.zeros(N, int)
    b = np.zeros(C, dtype)
    _, (_, dW, db) = swl.linear_cross_entropy_value_and_grad(
        *(backend.array(a) for a in (x, W, t, b)), reduction="sum", memory_budget=8192
    )
    assert dW.dtype == db.dtype == dtype
    for got in (dW, db):
        np.testing.assert_array_equal(backend.numpy(got).astype(float).reshape(-1), [-3072, 1024, 1024, 1024])


def test_mixed_dtypes_compute_in_the_widest(backend: Any) -> None:
    rng = np.random.default_rng(0)
    x, W, b = rng.standard_normal((3, 2)).astype(np.float32), np.ones((2, 5), np.float32), rng.standard_normal(5)
    t = np.array([0, 4, 2])
    loss, (dx, dW, db) = swl.linear_cross_entropy_value_and_grad(*(backend.array(a) for a in (x, W, t, b)))
    assert [a.dtype for a in (loss, dx, dW, db)] == [np.float64, np.float32, np.float32, np.float64]
    want = oracle.cross_entropy(np.float32(x @ W) + b, t)
    np.testing.assert_allclose(backend.numpy(db), want.grad.sum(axis=0), rtol=1e-6)


# ------------------------------------------------------------------------------------------------ work and memory


def test_a_gradient_that_is_not_needed_costs_no_product(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    products: list[str] = []
    kind = type(backend.ops)
    forward, backward = kind.affine_forward, kind.affine_backward

    def count_forward(self: Any, x: Any, W: Any, b: Any, out: Any) -> None:
        products.append("logits")
        forward(self, x, W, b, out)

    def count_backward(
        self: Any, dout: Any, x: Any, W: Any, dx: Any, dW: Any, db: Any, accumulate: bool = False
    ) -> None:
        products.extend(name for name, a in (("dx", dx), ("dW", dW)) if a is not None)
        backward(self, dout, x, W, dx, dW, db, accumulate)

    monkeypatch.setattr(kind, "affine_forward", count_forward)
    monkeypatch.setattr(kind, "affine_backward", count_backward)
    for needs in ((), ("db",), ("dx",), ("dW", "db"), ALL):
        products.clear()
        _, gradients = call(backend, np.zeros(150, int), needs=needs)
        assert products == ["logits", *(name for name in ("dx", "dW") if name in needs)]
        assert [name for name, g in zip(ALL, gradients, strict=True) if g is not None] == [n for n in ALL if n in needs]
        assert len(products) == swl.plan(150, 5, 30, needs=needs).products


def test_a_transposed_weight_is_used_as_it_is(host_backend: Any) -> None:
    rng = np.random.default_rng(0)
    stored = rng.standard_normal((4000, 256), np.float32)  # (C, D), as torch has it
    x, t = rng.standard_normal((4, 256), np.float32), np.arange(4)
    swl.linear_cross_entropy_value_and_grad(x, stored.T, t, needs=("dx",), memory_budget=20_000)  # compiles
    tracemalloc.start()
    _, (dx, _, _) = swl.linear_cross_entropy_value_and_grad(x, stored.T, t, needs=("dx",), memory_budget=20_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < stored.nbytes / 4
    _, (dx_2, dW, _) = swl.linear_cross_entropy_value_and_grad(x, stored.T, t, memory_budget=20_000)
    assert dW.strides == stored.T.strides
    np.testing.assert_allclose(dx, dx_2, rtol=1e-5, atol=1e-7)


SIZE = st.integers(0, 3000)


@given(
    N=SIZE,
    D=SIZE,
    C=SIZE,
    needs=st.sets(st.sampled_from(ALL)),
    dtype=st.sampled_from(FLOATS),
    budget=st.integers(1, 10**7),
)
@settings(max_examples=300)
def test_a_plan_keeps_its_budget_and_covers_everything(
    N: int, D: int, C: int, needs: set[str], dtype: Any, budget: int
) -> None:
    plan = swl.plan(N, D, C, dtype=dtype, needs=needs, memory_budget=budget)
    assert plan.itemsize == acc_dtype(dtype).itemsize
    if budget >= plan.itemsize * (4 * D + 1):
        assert plan.bytes <= budget
    down, across = -(-N // plan.rows), -(-C // plan.classes)
    assert plan.chunks == down * across
    assert min(plan.rows, plan.classes) >= 1
    # no chunk more than is needed: one row or class fewer in each would not do with the same number
    assert not N * C or plan.rows * down < N + down or plan.classes < C
    assert plan.products == 1 + len(needs - {"db"}) + (plan.classes < C and bool(needs))
    if budget >= plan.itemsize * N * C:
        assert plan.chunks <= 1


def test_a_plan_says_what_it_is() -> None:
    assert swl.plan(4, 2, 3, dtype="float64").itemsize == 8
    assert swl.plan(4, 2, 3, needs="dW").products == 2
    assert str(swl.plan(1024, 768, 50257, memory_budget=64 * 2**20)).splitlines()[1].startswith("  chunks  ")
    with pytest.raises(ValueError, match="N must be at least 0, got -1"):
        swl.plan(-1, 2, 3)
    with pytest.raises(ValueError, match="needs may name"):
        swl.plan(1, 2, 3, needs=("dq",))


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("budget", [0, -5])
def test_a_budget_is_positive(backend: Any, budget: Any) -> None:
    with pytest.raises(ValueError, match=rf"memory_budget must be above 0 bytes, got {budget}"):
        call(backend, np.zeros(150, int), memory_budget=budget)


@pytest.mark.parametrize("budget", [1.5, True, "1 GiB", None])
def test_a_budget_is_an_integer(backend: Any, budget: Any) -> None:
    with pytest.raises(TypeError, match="memory_budget must be a number of bytes, an integer, got"):
        call(backend, np.zeros(150, int), memory_budget=budget)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": np.ones((2, 4))}, ValueError, r"x must have shape \(..., 3\)"),
        ({"W": np.ones(3)}, ValueError, r"W must have shape \(D, K\), got \(3,\)"),
        ({"W": np.ones((3, 0)), "b": None}, ValueError, "W must have at least one column"),
        ({"W": np.ones((3, 5), int)}, TypeError, "W must be float16.*got int64"),
        ({"b": np.ones(4)}, ValueError, r"b must have shape \(5,\)"),
        ({"target": np.zeros(3, int)}, ValueError, r"target must have shape \(2,\) .* or \(2, 5\)"),
        ({"target": np.zeros(2)}, TypeError, "target of class ids must be of an integer dtype"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_arrays_are_named(backend: Any, change: dict[str, Any], error: type[Exception], words: str) -> None:
    good = {"x": np.ones((2, 3)), "W": np.ones((3, 5)), "target": np.zeros(2, int), "b": np.ones(5)}
    x, W, target, b = (None if a is None else backend.array(a) for a in {**good, **change}.values())
    with pytest.raises(error, match=words):
        swl.linear_cross_entropy(x, W, target, b)


def test_bad_options_are_named(backend: Any) -> None:
    with pytest.raises(ValueError, match="needs may name 'dx', 'dW' and 'db' only"):
        call(backend, np.zeros(150, int), needs=("dX",))
    with pytest.raises(TypeError, match="unknown option 'smoothing'"):
        call(backend, np.zeros(150, int), smoothing=0.1)
    with pytest.raises(ValueError, match=r"dout must have shape \(\)"):
        call(backend, np.zeros(150, int), dout=backend.array(np.ones(150)))
    with pytest.raises(ValueError, match=r"dout must have shape \(150,\)"):
        call(backend, np.zeros(150, int), dout=backend.array(np.ones(149)), reduction="none")


def test_a_class_id_out_of_range_is_an_error_on_a_host(host_backend: Any) -> None:
    ids = np.zeros(150, int)
    ids[7] = 30
    with pytest.raises(ValueError, match=r"target\[7\] is 30; legal are class ids in \[0, 30\)"):
        call(host_backend, ids, memory_budget=BOTH)


@pytest.mark.parametrize("budget", [ROWS, BOTH, 10**6])
def test_a_class_id_out_of_range_is_nan_on_a_device(backend: Any, budget: int) -> None:
    if backend.is_host:
        return  # an error, as the test before says
    ids = np.zeros(150, int)
    ids[7] = 30
    loss, (dx, _, _) = call(backend, ids, memory_budget=budget, reduction="none")
    np.testing.assert_array_equal(np.isnan(loss), np.arange(150) == 7)
    assert not dx[7].any()
    with pytest.raises(ValueError, match=r"target\[7\] is 30"):
        swl.check()
