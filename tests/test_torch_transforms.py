"""Whatever torch makes of a loss of swl.torch, by a transform, in forward mode or twice, it makes of what eager mode gives."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="swl.torch needs torch")

import swl.torch  # noqa: E402 - after the check that torch is there

func, forward_ad = torch.func, torch.autograd.forward_ad
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),  # by forward mode, at its first use
    pytest.mark.filterwarnings("ignore:invalid value encountered in matmul"),  # NumPy's word on a NaN in the inputs
]

INF, NAN = math.inf, math.nan


class Problem(NamedTuple):
    """A loss as a function of all that it can be differentiated in."""

    loss: Callable[..., Any]
    inputs: tuple[Any, ...]
    target: Any  # ids; None where the target is one of the inputs
    upstream: Any  # for the loss
    directions: tuple[Any, ...]  # in which to differentiate forward, and a second time

    def scalar(self, *inputs: Any) -> Any:
        return (self.loss(*inputs) * self.upstream).sum()


@st.composite
def problems(draw: Any) -> Problem:
    on = st.booleans()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def uniform(*shape: int) -> Any:
        return torch.rand(*shape, generator=generator, dtype=torch.float64).to(dtype)

    N, C, D = draw(st.integers(1, 5)), draw(st.integers(1, 7)), 3
    fused, ids, soft = draw(on), draw(on), None
    reduction = draw(st.sampled_from(["mean", "sum", "none"]))
    possible = {
        "weight": uniform(C) * (uniform(C) < 0.8),
        "sample_weight": uniform(N),
        "label_smoothing": 0.2,
        "z_loss": 0.1,
        "softcap": draw(st.sampled_from([0.5, 2.0, 30.0])),
        "temperature": draw(st.sampled_from([0.5, 3.0])),
    }
    options: dict[str, Any] = {"reduction": reduction, **{k: v for k, v in possible.items() if draw(on)}}
    if reduction == "mean" and draw(on):
        options["denominator"] = draw(st.sampled_from([3.0, torch.tensor(0.5)]))

    masked = uniform(C) < draw(st.sampled_from([0.0, 0.0, 0.4]))
    ignored = torch.zeros(N, dtype=torch.bool)
    rows = normal(N, D if fused else C) * draw(st.sampled_from([0.1, 1.0, 10.0]))
    if ids:
        ignored = uniform(N) < draw(st.sampled_from([0.0, 0.5, 1.0]))
        target = torch.where(ignored, -100, torch.randint(0, C, (N,), generator=generator))
    else:
        target = None
        soft = uniform(N, C) * (uniform(N, C) < 0.7) * torch.where(masked, draw(st.sampled_from([0.0, 1.0])), 1.0)
        soft = soft.to(dtype)
    junk = draw(st.sampled_from([None, NAN, INF, -INF]))
    if junk is not None:
        where = ignored if draw(on) else torch.arange(N) == 0  # rows that do not count, or one that perhaps does
        rows[where, 0] = junk
    inputs: tuple[Any, ...] = (rows,)
    if fused:
        inputs += (normal(C, D), torch.where(masked, -INF, normal(C)).to(dtype))
        budget = draw(st.sampled_from([2**20, 200]))

        def loss(x: Any, W: Any, b: Any, t: Any = target) -> Any:
            return swl.torch.linear_cross_entropy(x, W, t, linear_bias=b, memory_budget=budget, **options)
    else:
        rows[:, masked] = -INF

        def loss(z: Any, t: Any = target) -> Any:
            return swl.torch.cross_entropy(z, t, **options)

    if soft is not None:
        inputs += (soft,)
    upstream = normal(N) if reduction == "none" else normal(1)[0]
    return Problem(loss, inputs, target, upstream, tuple(normal(*t.shape) for t in inputs))


def eager(p: Problem) -> tuple[Any, Any]:
    inputs = [t.clone().requires_grad_() for t in p.inputs]
    loss = p.loss(*inputs)
    return loss.detach(), torch.autograd.grad(loss, inputs, p.upstream)


def close(got: Any, want: Any, wide: float = 1) -> None:
    """Compare to rounding; NaN agrees with NaN, infinity with infinity only."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    finite = want[want.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    tolerance = wide * (1e-11 if want.dtype is torch.float64 else 2e-5)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * max(1.0, largest), equal_nan=True)


def all_close(got: Any, want: Any, wide: float = 1) -> None:
    for a, b in zip(got, want, strict=True):
        close(a, b, wide)


# ------------------------------------------------------------------------------------------------ once


def by_grad(p: Problem) -> tuple[Any, Any]:
    grads, _ = func.grad_and_value(p.scalar, tuple(range(len(p.inputs))))(*p.inputs)
    return p.loss(*p.inputs), grads


def by_vjp(p: Problem) -> tuple[Any, Any]:
    loss, pull_back = func.vjp(p.loss, *p.inputs)
    return loss, pull_back(p.upstream)


def by_jacrev(p: Problem) -> tuple[Any, Any]:
    """With an upstream gradient of one loss at a time: where they are added up in a row, it is one that depends on it."""
    jacobians = func.jacrev(p.scalar, tuple(range(len(p.inputs))))(*p.inputs)
    return p.loss(*p.inputs), jacobians


def by_vmap(p: Problem) -> tuple[Any, Any]:
    """Over a batch of two problems that are the same."""
    twice = [torch.stack((t, t)) for t in p.inputs]
    losses = func.vmap(p.loss)(*twice)
    grads = func.vmap(func.grad(p.scalar, tuple(range(len(p.inputs)))))(*twice)
    if p.target is not None:
        close(func.vmap(p.loss)(*twice, torch.stack((p.target, p.target)))[1], losses[1])
    for t in (losses, *grads):
        close(t[0], t[1])
    return losses[0], tuple(g[1] for g in grads)


def by_functional_call(p: Problem) -> tuple[Any, Any]:
    names = [f"input_{k}" for k in range(len(p.inputs))]

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, t in zip(names, p.inputs, strict=True):
                self.register_parameter(name, torch.nn.Parameter(torch.zeros_like(t)))

        def forward(self) -> Any:
            return p.loss(*(getattr(self, name) for name in names))

    module, given = Module(), dict(zip(names, p.inputs, strict=True))
    loss = func.functional_call(module, given)
    grads = func.grad(lambda given: (func.functional_call(module, given) * p.upstream).sum())(given)
    return loss, tuple(grads[name] for name in names)


def by_differentiable_backward(p: Problem) -> tuple[Any, Any]:
    inputs = [t.clone().requires_grad_() for t in p.inputs]
    loss = p.loss(*inputs)
    return loss.detach(), tuple(
        g.detach() for g in torch.autograd.grad(loss, inputs, p.upstream, create_graph=True, materialize_grads=True)
    )


def by_custom_operation(p: Problem) -> tuple[Any, Any]:
    """Which `torch.compile` puts into its graphs."""
    with (
        mock.patch.object(swl.torch._cross_entropy, "route", return_value="traced"),
        mock.patch.object(swl.torch._linear, "route", return_value="traced"),
    ):
        return eager(p)


WAYS = [by_grad, by_vjp, by_jacrev, by_vmap, by_functional_call, by_differentiable_backward, by_custom_operation]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@given(p=problems())
def test_every_transform_gives_what_eager_gives(way: Any, p: Problem) -> None:
    loss, grads = eager(p)
    loss_2, grads_2 = way(p)
    close(loss_2, loss)
    all_close(grads_2, grads)


# ------------------------------------------------------------------------------------------------ forward mode, and twice


@given(p=problems())
def test_forward_mode_gives_what_eager_gives(p: Problem) -> None:
    """Where the gradient is finite: of others, 0·∞ in the sum over the inputs says no more than NaN."""
    loss, grads = eager(p)
    want = sum((g * v).sum() for g, v in zip(grads, p.directions, strict=True))
    if not want.isfinite():
        return
    value, tangent = func.jvp(p.scalar, p.inputs, p.directions)
    close(tangent, want, 10)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, v) for t, v in zip(p.inputs, p.directions, strict=True)]
        dual = forward_ad.unpack_dual(p.scalar(*duals))
    close(dual.primal, value)
    close(dual.tangent, tangent)
    if loss.isfinite().all():
        close(value, (loss * p.upstream).sum())


@given(p=problems())
def test_second_derivatives_are_those_of_eagers_first(p: Problem) -> None:
    """By three routes, beside a difference of eager gradients."""
    p = p._replace(inputs=tuple(t.double() for t in p.inputs), directions=tuple(t.double() for t in p.directions))
    _, grads = eager(p)
    h = 1e-5
    moved = [eager(p._replace(inputs=tuple(t + s * v for t, v in zip(p.inputs, p.directions, strict=True))))[1]
             for s in (-h, h)]  # fmt: skip
    want = [(b - a) / (2 * h) for a, b in zip(*moved, strict=True)]
    if not all(t.isfinite().all() for t in (*grads, *want)):
        return
    every = tuple(range(len(p.inputs)))
    inputs = [t.clone().requires_grad_() for t in p.inputs]
    first = torch.autograd.grad(p.scalar(*inputs), inputs, create_graph=True, materialize_grads=True)
    along = sum((g * v).sum() for g, v in zip(first, p.directions, strict=True))
    twice = torch.autograd.grad(along, inputs, materialize_grads=True) if along.requires_grad else want
    forward_over_reverse = func.jvp(func.grad(p.scalar, every), p.inputs, p.directions)[1]

    def directional(*inputs: Any) -> Any:
        return func.jvp(p.scalar, inputs, p.directions)[1]

    reverse_over_forward = func.grad(directional, every)(*p.inputs)
    all_close(twice, want, 1e5)
    all_close(forward_over_reverse, twice, 10)
    all_close(reverse_over_forward, twice, 10)


# ------------------------------------------------------------------------------------------------ what each fault was


Z, W = torch.zeros(2, 3), torch.ones(3, 3)
LOSSES = {
    "cross_entropy": swl.torch.cross_entropy,
    "linear_cross_entropy": lambda x, t, **options: swl.torch.linear_cross_entropy(x, W, t, **options),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


@each_loss
@pytest.mark.parametrize("bad", [-1, 3, -101, 2**40, -(2**63)])
def test_an_id_out_of_range_is_an_error_under_every_transform(loss: Any, bad: int) -> None:
    t = torch.tensor([0, bad])
    one = functools.partial(loss, t=t) if loss is not swl.torch.cross_entropy else lambda x: loss(x, t)
    pair = lambda x, t: loss(x[None], t[None])  # noqa: E731
    calls: list[Callable[[], Any]] = [
        lambda: one(Z),
        lambda: func.grad(one)(Z),
        lambda: func.vjp(one, Z),
        lambda: func.jacrev(one)(Z),
        lambda: func.jvp(one, (Z,), (Z,)),
        lambda: func.hessian(one)(Z),
        lambda: func.vmap(pair)(Z, t),
        lambda: func.vmap(func.grad(pair), (0, None))(Z, t[1]),
        lambda: func.functionalize(one)(Z),
        lambda: func.vmap(func.vmap(pair))(Z[None], t[None]),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=rf"target\[[01]\] is {bad}; legal are class ids in \[0, 3\)"):
            call()


@each_loss
def test_an_id_that_cannot_be_looked_at_makes_its_row_nan(loss: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no other, without a gradient of its own: as on a device."""
    for module in (swl.torch._cross_entropy, swl.torch._linear):
        monkeypatch.setattr(module, "check_values", lambda *_: None)
    for bad in (-1, 3, -101):
        t = torch.tensor([0, bad])
        rows = func.vmap(lambda x, t: loss(x[None], t[None], reduction="sum"))(Z, t)
        assert rows.isnan().tolist() == [False, True]
        grad = func.grad(lambda x, t=t: loss(x, t))(Z + torch.eye(2, 3))
        assert not grad[1].any()
        assert grad.isfinite().all()


def test_ids_of_fake_tensors_are_not_looked_at() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        z, t = mode.from_tensor(Z), mode.from_tensor(torch.tensor([0, 7]))
        assert func.grad(lambda z: swl.torch.cross_entropy(z, t))(z).shape == (2, 3)


@each_loss
def test_an_ignore_index_that_no_id_can_be_under_a_transform(loss: Any) -> None:
    t = torch.tensor([0, 2])
    for ignore_index in (-(2**70), 2**70):
        close(func.vmap(lambda z, i=ignore_index: loss(z, t, ignore_index=i))(Z[None])[0], loss(Z, t))


@each_loss
@pytest.mark.parametrize("way", ["eager", "vmap", "custom operation"])
@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("softcap", 1e-46, ValueError),
        ("softcap", 1e300, ValueError),
        ("softcap", 10**400, ValueError),
        ("softcap", torch.ones(2), TypeError),
        ("temperature", 1e-46, ValueError),
        ("z_loss", 1e-46, ValueError),
        ("z_loss", 1e300, ValueError),
        ("z_loss", torch.ones(2), TypeError),
        ("z_loss", "0.1", TypeError),
        ("label_smoothing", 1e-46, ValueError),
        ("label_smoothing", Decimal("0.1"), TypeError),
        ("label_smoothing", torch.ones(2), TypeError),
        ("denominator", 1e-300, ValueError),
        ("denominator", 10**400, ValueError),
        ("denominator", "3", TypeError),
        ("denominator", torch.tensor(-2.0), ValueError),
        ("denominator", torch.tensor(NAN), ValueError),
        ("reduction", torch.ones(2), ValueError),
        ("ignore_index", 1.0, TypeError),
    ],
)
def test_bad_options_are_named_in_every_way(
    loss: Any, way: str, option: str, value: Any, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    t = torch.tensor([0, 2])
    if way == "custom operation":
        for module in (swl.torch._cross_entropy, swl.torch._linear):
            monkeypatch.setattr(module, "route", lambda *_: "traced")

    def one(z: Any) -> Any:
        return loss(z, t, **{option: value})

    with pytest.raises(error, match=option):
        func.vmap(one)(Z[None]) if way == "vmap" else one(Z)


@each_loss
def test_a_fraction_is_a_number_in_every_way(loss: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    t = torch.tensor([0, 2])
    options = {name: Fraction(1, 3) for name in ("softcap", "z_loss", "label_smoothing", "denominator")}

    def one(z: Any) -> Any:
        return loss(z, t, **options)

    want = loss(Z, t, **dict.fromkeys(options, 1 / 3))
    close(one(Z), want)
    close(func.vmap(one)(Z[None])[0], want)
    for module in (swl.torch._cross_entropy, swl.torch._linear):
        monkeypatch.setattr(module, "route", lambda *_: "traced")
    close(one(Z), want)


def test_a_mask_under_soft_targets_in_a_transform() -> None:
    z, q = torch.tensor([[0.0, 1.0, -INF]]), torch.tensor([[0.5, 0.5, 0.0]])
    want = torch.tensor([[0.5, 0.5, 0.0]])
    grads, loss = func.grad_and_value(swl.torch.cross_entropy)(z, q)
    close(loss, swl.torch.cross_entropy(z, q))
    close(grads, z.softmax(1) - want)
    assert grads[0, 2] == 0
    d_target = func.grad(swl.torch.cross_entropy, 1)(z, q)
    assert d_target[0, 2] == 0
    close(d_target[:, :2], -z.log_softmax(1)[:, :2])


def test_a_row_of_infinity_and_masks_is_nan_in_every_way() -> None:
    z, q = torch.tensor([[INF, 1.0, -INF], [0.0, NAN, -INF]]), torch.tensor([[0.5, 0.5, 0.0]] * 2)
    leaves = z.clone().requires_grad_(), q.clone().requires_grad_()
    for grad in (
        *torch.autograd.grad(swl.torch.cross_entropy(*leaves), leaves),
        *func.grad(swl.torch.cross_entropy, (0, 1))(z, q),
    ):
        assert grad.isnan().all()


def test_nan_logits_of_an_ignored_row_in_a_transform() -> None:
    z, t = torch.tensor([[0.0, 1.0], [NAN, INF]]), torch.tensor([0, -100])
    for reduction in ("mean", "sum"):
        grads = func.grad(lambda z, r=reduction: swl.torch.cross_entropy(z, t, reduction=r))(z)
        assert grads.isfinite().all()
        assert not grads[1].any()


def test_the_slope_of_a_softcap_has_no_cancellation_in_a_transform() -> None:
    r = torch.tensor([[8.0, -8.0, 7.0, 0.1, 1e-6]])
    t = torch.tensor([3])
    got = func.grad(lambda r: swl.torch.cross_entropy(r, t, softcap=1.0))(r)
    want = func.grad(lambda r: swl.torch.cross_entropy(r, t, softcap=1.0))(r.double())
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=0)
