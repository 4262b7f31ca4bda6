"""swl.torch against torch itself: values, gradients, dtypes, and what torch's machinery asks of an operation."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as torch's own documentation calls it
from needs import COMPILER, GPU

import swl
import swl.torch

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def close(a: Any, b: Any, exact: Any = None) -> None:
    """Compare with torch; in 16 bits with float64, and there be as near to it as torch is."""
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    tolerance = TOLERANCE[b.dtype]
    if exact is None or b.dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
    elif b.numel():
        allowed = (b.double() - exact).abs().max() + tolerance * exact.abs().max()
        assert (a.double() - exact).abs().max() <= allowed


def leaf(t: Any, double: bool = False) -> Any:
    return (t.detach().double() if double and t.is_floating_point() else t.detach().clone()).requires_grad_(
        t.requires_grad
    )


# ------------------------------------------------------------------------------------------------ torch's own samples

SAMPLES = {
    "nn.functional.cross_entropy": swl.torch.cross_entropy,
    "nn.functional.linear": swl.torch.affine,
    "nn.functional.linear_cross_entropy": swl.torch.linear_cross_entropy,
}


@pytest.fixture(scope="module")
def op_db() -> Any:
    pytest.importorskip("expecttest", reason="torch's sample inputs need expecttest")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's test machinery imports what is deprecated
        from torch.testing._internal.common_methods_invocations import op_db
    return [op for op in op_db if op.name in SAMPLES]


def gradients(f: Any, sample: Any, upstream: Any = None, double: bool = False) -> list[Any]:
    """Give the value and the gradients of an upstream gradient that is the same for the same shape."""

    def own(t: Any) -> Any:
        return leaf(t, double) if isinstance(t, torch.Tensor) else t

    args = [own(a) for a in (sample.input, *sample.args)]
    kwargs = {name: own(value) for name, value in sample.kwargs.items()}
    if double:
        kwargs.pop("options", None)
    out = f(*args, **kwargs)
    wanted = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor) and a.requires_grad]
    if upstream is None:
        upstream = torch.rand_like(out) + 0.5
    return [out, upstream, *torch.autograd.grad(out, wanted, upstream.to(out.dtype))]


@pytest.mark.filterwarnings("ignore:linear_cross_entropy. ``options`` ignored")  # torch's word on its own samples
@pytest.mark.parametrize("name", SAMPLES)
def test_torchs_sample_inputs(name: str, op_db: Any, record_property: Any) -> None:
    ran: Counter[str] = Counter()
    for op in (op for op in op_db if op.name == name):
        for dtype in FLOATS:
            for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
                got, upstream, *grads = gradients(SAMPLES[name], sample)
                want = gradients(op.op, sample, upstream)
                exact = gradients(op.op, sample, upstream, double=True)
                for triple in zip((got, *grads), want[:1] + want[2:], exact[:1] + exact[2:], strict=True):
                    close(*triple)
                ran[f"{op.variant_test_name or 'plain'} {dtype}"] += 1
    record_property("ran", dict(ran))
    print(name, sum(ran.values()), dict(ran))
    assert sum(ran.values()) >= 60


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.uint8])
def test_other_dtypes_are_refused(dtype: Any) -> None:
    x, w = torch.ones(2, 3, dtype=dtype), torch.ones(4, 3, dtype=dtype)
    with pytest.raises(TypeError, match=r"input must be float16.*got torch\."):
        swl.torch.affine(x, w)
    with pytest.raises(TypeError, match=r"input must be float16.*got torch\."):
        swl.torch.cross_entropy(x, torch.tensor([0, 1]))


# ------------------------------------------------------------------------------------------------ derivatives

IDS = torch.tensor([0, 1, -100, 4, 2, 2])
OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 2.0}


def double(*shape: int) -> Any:
    return torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)), requires_grad=True
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction: str) -> None:
    x, q, W, b = double(6, 5), double(6, 5), double(5, 5), double(5)
    w, s = torch.rand(5, dtype=torch.float64) + 0.5, torch.rand(6, dtype=torch.float64)

    def ids(x: Any) -> Any:
        return swl.torch.cross_entropy(x, IDS, w, reduction=reduction, sample_weight=s, **OPTIONS)

    def probabilities(x: Any, q: Any) -> Any:
        return swl.torch.cross_entropy(x, q, w, reduction=reduction, sample_weight=s, **OPTIONS)

    def fused(x: Any, W: Any, q: Any, b: Any) -> Any:
        return swl.torch.linear_cross_entropy(x, W, q, linear_bias=b, weight=w, reduction=reduction, **OPTIONS)

    for f, args in ((ids, (x,)), (probabilities, (x, q)), (fused, (x, W, q, b)), (swl.torch.affine, (x, W, b))):
        assert torch.autograd.gradcheck(f, args, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(f, args)
    assert torch.autograd.gradcheck(lambda x: swl.torch.cross_entropy(x, IDS, denominator=3.0), (x,))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by forward mode, at its first use
def test_transforms_and_forward_mode() -> None:
    x, t, W = torch.randn(3, 6, 5), torch.randint(0, 5, (3, 6)), torch.randn(5, 5)
    ours, theirs = swl.torch.cross_entropy, F.cross_entropy
    func = torch.func
    close(func.vmap(ours)(x, t), func.vmap(theirs)(x, t))
    close(func.vmap(func.grad(ours))(x, t), func.vmap(func.grad(theirs))(x, t))
    close(func.hessian(lambda x: ours(x, t[0]))(x[0]), func.hessian(lambda x: theirs(x, t[0]))(x[0]))
    close(
        func.jvp(lambda x: ours(x, t[0]), (x[0],), (x[1],))[1], func.jvp(lambda x: theirs(x, t[0]), (x[0],), (x[1],))[1]
    )
    fused = func.grad(swl.torch.linear_cross_entropy, 1)(x[0], W, t[0])
    close(fused, func.grad(F.linear_cross_entropy, 1)(x[0], W, t[0]))
    close(func.vmap(swl.torch.affine, (0, None))(x, W), F.linear(x, W))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x[0], x[1])
        a, b = (torch.autograd.forward_ad.unpack_dual(f(dual, t[0])).tangent for f in (ours, theirs))
    close(a, b)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_again(dtype: Any, reduction: str) -> None:
    x = torch.randn(4, 7).to(dtype).requires_grad_()
    W = torch.randn(7, 7).to(dtype).requires_grad_()
    t = torch.tensor([1, 2, 3, 0])
    for loss, of in (
        (swl.torch.cross_entropy(x, t, reduction=reduction), [x]),
        (swl.torch.linear_cross_entropy(x, W, t, reduction=reduction), [x, W]),
    ):
        g = torch.full_like(loss, 0.5)  # a power of two: scaling is exact
        first = torch.autograd.grad(loss, of, g, retain_graph=True)
        again = torch.autograd.grad(loss, of, g, retain_graph=True)
        whole = torch.autograd.grad(loss, of, 2 * g)
        for a, b, c in zip(first, again, whole, strict=True):
            close(a, b)
            close(2 * a, c)
    assert x.grad is None


def test_gradients_do_not_share_memory_with_what_autograd_keeps() -> None:
    x, t = torch.randn(4, 7, requires_grad=True), torch.tensor([1, 2, 3, 0])
    loss = swl.torch.cross_entropy(x, t)
    loss.backward(retain_graph=True)
    want = x.grad.clone()
    x.grad.zero_()
    loss.backward()
    close(x.grad, want)


@pytest.mark.parametrize("factor", [float("inf"), float("nan"), -2.0])
@pytest.mark.parametrize("C", [7, 5000])
def test_ignored_rows_have_no_gradient_whatever_comes_after(factor: float, C: int) -> None:
    x, t = torch.randn(70, C, requires_grad=True), torch.full((70,), 3)
    t[10:] = -100
    (swl.torch.cross_entropy(x, t) * factor).backward()
    assert not x.grad[10:].any()
    want = torch.autograd.grad(F.cross_entropy(x, t) * factor, x)[0]
    assert torch.equal(torch.isfinite(x.grad[:10]), torch.isfinite(want[:10]))


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # NumPy's word on ∞ − ∞
@pytest.mark.parametrize("factor", [float("inf"), float("nan"), -2.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("budget", [2**20, 20_000, 600])
@pytest.mark.parametrize("where", ["host", "device"])
def test_ignored_rows_of_the_fused_head_have_no_gradient_whatever_comes_after(
    factor: float, reduction: str, budget: int, where: str, request: pytest.FixtureRequest
) -> None:
    if where == "device":
        send_to_the_fake_device(request)
    x, W, b = torch.randn(70, 5, requires_grad=True), torch.randn(90, 5), torch.randn(90)
    t = torch.full((70,), 3)
    t[10:] = -100
    loss = swl.torch.linear_cross_entropy(x, W, t, linear_bias=b, reduction=reduction, memory_budget=budget)
    up = torch.full_like(loss, factor)
    again = torch.autograd.grad(loss, x, up, create_graph=True)[0]
    once = torch.autograd.grad(loss, x, up)[0]
    for grad in (once, again):
        assert not grad[10:].any()
        assert grad[:10].isfinite().all() == (factor == -2)


def test_no_gradient_work_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    x, t = torch.randn(4, 7, requires_grad=True), torch.tensor([1, 2, 3, 0])
    want = swl.torch.cross_entropy(x, t).detach()
    backend = type(swl.torch._bridge.bridge(x).backend)

    def never(*_: Any) -> None:
        raise AssertionError("gradient work")

    plain_loss = backend.plain_loss

    def without_gradient(self: Any, logits: Any, ids: Any, ignore_index: int, out: Any) -> Any:
        return plain_loss(self, logits, ids, ignore_index, None) if out is None else never()

    monkeypatch.setattr(backend, "plain_loss", without_gradient)
    monkeypatch.setattr(backend, "cross_entropy_forward_backward", never)
    monkeypatch.setattr(backend, "cross_entropy_backward", never)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss = swl.torch.cross_entropy(x, t)
            swl.torch.linear_cross_entropy(x, torch.randn(9, 7), t)
        assert not loss.requires_grad
        close(loss, want)
    with pytest.raises(AssertionError, match="gradient work"):
        swl.torch.cross_entropy(x, t)


# ------------------------------------------------------------------------------------------------ shapes, layouts, dtypes

LAYOUTS = {
    "contiguous": lambda *shape: torch.randn(shape),
    "channels last": lambda n, c, *d: torch.randn(n, *d, c).movedim(-1, 1),
    "every other": lambda *shape: torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2],
    "expanded": lambda n, *rest: torch.randn(1, *rest).expand(n, *rest),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 4), (2, 5, 17, 16), (1, 3, 20, 20), (2, 3, 1, 2)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_layouts(layout: str, shape: tuple[int, ...], reduction: str) -> None:
    x = LAYOUTS[layout](*shape).requires_grad_()
    t = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    t[0] = -100
    for target in (t, torch.rand(shape)):
        ours, theirs = (f(x, target, reduction=reduction) for f in (swl.torch.cross_entropy, F.cross_entropy))
        close(ours, theirs)
        g = torch.rand(ours.shape)
        close(torch.autograd.grad(ours, x, g)[0], torch.autograd.grad(theirs, x, g)[0])


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_mean_of_nothing_is_nan(dtype: Any) -> None:
    for x, t in (
        (torch.randn(3, 5).to(dtype), torch.full((3,), -100)),
        (torch.randn(0, 5).to(dtype), torch.zeros(0, dtype=torch.int64)),
        (torch.randn(0, 5).to(dtype), torch.zeros(0, 5).to(dtype)),
    ):
        x.requires_grad_()
        W = torch.randn(5, 5).to(dtype)
        for ours, theirs in (
            (swl.torch.cross_entropy(x, t), F.cross_entropy(x, t)),
            (swl.torch.linear_cross_entropy(x, W, t), F.linear_cross_entropy(x, W, t)),
        ):
            assert ours.isnan()
            assert ours.dtype == theirs.dtype
            grad = torch.autograd.grad(ours, x)[0]
            assert torch.equal(grad, torch.autograd.grad(theirs, x)[0])
            assert not grad.any()


@pytest.mark.parametrize("dtype", FLOATS)
def test_autocast(dtype: Any) -> None:
    x, W, t = torch.randn(4, 5).to(dtype), torch.randn(5, 5).to(dtype), torch.tensor([0, 1, 2, 3])
    W.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        assert swl.torch.cross_entropy(x, t).dtype == F.cross_entropy(x, t).dtype
        assert swl.torch.affine(x, W).dtype == F.linear(x, W).dtype
        ours, theirs = swl.torch.linear_cross_entropy(x, W, t), F.linear_cross_entropy(x, W, t)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    a, b = (torch.autograd.grad(loss, W)[0] for loss in (ours, theirs))
    assert a.dtype == b.dtype
    torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@contextlib.contextmanager
def default(setter: Any, value: Any, before: Any) -> Any:
    setter(value)
    try:
        yield
    finally:
        setter(before)


DEFAULTS = {
    "with a device": lambda: torch.device("meta"),
    "set_default_device": lambda: default(torch.set_default_device, "meta", None),
    "set_default_dtype": lambda: default(torch.set_default_dtype, torch.float64, torch.float32),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by forward mode, at its first use
@pytest.mark.parametrize("of", DEFAULTS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_results_are_on_the_device_of_the_input(of: str, reduction: str) -> None:
    """And of its dtype: whatever torch's defaults are, nothing changes."""
    x, W, b = torch.randn(6, 5), torch.randn(5, 5), torch.randn(5)
    w, s, ids = torch.rand(5), torch.rand(6), torch.randint(0, 4, (6, 2))
    options = {"reduction": reduction, "ignore_index": -100}
    modules = (
        swl.torch.CrossEntropyLoss(w, **options),
        swl.torch.LinearCrossEntropyLoss(5, 5, bias=True, **options),
        swl.torch.LinearCrossEntropyLoss(5, 4, out_features=(2,), reduction=reduction),
        swl.torch.Affine(5, 5),
    )
    ce, head, positions, layer = modules
    many = {"weight": w, "sample_weight": s, **OPTIONS, "reduction": reduction}
    if reduction == "mean":
        many["denominator"] = 3.0
    losses = [
        lambda x, W: swl.torch.cross_entropy(x, IDS, reduction=reduction),
        lambda x, W: swl.torch.cross_entropy(x, IDS, **many),
        lambda x, W: swl.torch.cross_entropy(x, W[:1].softmax(1).expand(6, 5), **many),
        lambda x, W: swl.torch.cross_entropy(x.reshape(2, 5, 3), IDS.reshape(2, 3), reduction=reduction),
        lambda x, W: swl.torch.cross_entropy(x.repeat(100, 200), IDS.repeat(100), reduction=reduction),
        lambda x, W: swl.torch.linear_cross_entropy(x, W, IDS, linear_bias=b, **many),
        lambda x, W: swl.torch.linear_cross_entropy(x, W, x.softmax(1), memory_budget=100, **many),
        lambda x, W: swl.torch.affine(x, W, b),
        lambda x, W: ce(x, IDS),
        lambda x, W: head(layer(x), IDS),
        lambda x, W: positions(x, ids),
    ]

    def run(loss: Any) -> list[Any]:
        """Compute in every way: without gradients, eagerly, differentiated twice, transformed."""
        inputs = x.clone().requires_grad_(), W.clone().requires_grad_()
        with torch.no_grad():
            out = [loss(*inputs)]
        value = loss(*inputs)
        up = torch.ones_like(value)
        once = torch.autograd.grad(value, inputs, up, retain_graph=True, materialize_grads=True)
        again = torch.autograd.grad(value, inputs, up, create_graph=True, materialize_grads=True)
        twice = torch.autograd.grad(again[0].square().sum(), inputs, materialize_grads=True, allow_unused=True)
        summed = lambda *inputs: loss(*inputs).sum()  # noqa: E731
        out += [value, *once, *again, *twice, *torch.func.grad(summed, (0, 1))(x, W)]
        return [*out, *torch.func.jvp(summed, (x, W), (x, W))]

    for k, loss in enumerate(losses):
        want = run(loss)
        with DEFAULTS[of]():
            got = run(loss)
        for a, b_ in zip(got, want, strict=True):
            assert a.device == b_.device, k
            close(a, b_)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of inductor's own imports
@pytest.mark.parametrize("of", DEFAULTS)
def test_compiled_results_are_on_the_device_of_the_input(of: str) -> None:
    torch._dynamo.reset()
    x, W = torch.randn(6, 5, requires_grad=True), torch.randn(5, 5, requires_grad=True)

    def loss(x: Any, W: Any) -> Any:
        h = swl.torch.affine(x, W)
        return swl.torch.cross_entropy(h, IDS, denominator=3.0) + swl.torch.linear_cross_entropy(h, W, IDS)

    want = loss(x, W)
    wants = torch.autograd.grad(want, (x, W))
    with DEFAULTS[of]():
        got = torch.compile(loss, fullgraph=True, backend="aot_eager")(x, W)
        gots = torch.autograd.grad(got, (x, W))
    for a, b in zip((got, *gots), (want, *wants), strict=True):
        assert a.device == b.device
        close(a, b)


def test_float16_gradients_survive_a_loss_scale() -> None:
    x, t = torch.zeros(70_000, 4, dtype=torch.float16, requires_grad=True), torch.zeros(70_000, dtype=torch.int64)
    (swl.torch.cross_entropy(x, t).float() * 32768).backward()
    assert x.grad[0].tolist() == pytest.approx([-0.75 * 32768 / 70_000, *[0.25 * 32768 / 70_000] * 3], rel=1e-3)


def test_no_copy_of_the_logits() -> None:
    import tracemalloc

    x = torch.randn(64, 20_000, requires_grad=True)
    t = torch.randint(0, 20_000, (64,))
    swl.torch.cross_entropy(x, t).backward()
    x.grad = None
    swl.empty_cache()  # the gradient's memory would be there already
    tracemalloc.start()  # NumPy's memory
    swl.torch.cross_entropy(x, t).backward()
    numpys = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    x.grad = None
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        swl.torch.cross_entropy(x, t).backward()
    torchs = sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages() if event.key != "[memory]")
    size = x.numel() * 4
    assert size <= numpys < 1.1 * size  # the gradient, and nothing else of its size
    assert torchs < size / 10


# ------------------------------------------------------------------------------------------------ bad input


def test_views_that_numpy_does_not_know() -> None:
    z, t = torch.randn(3, 5), torch.tensor([0, 1, 4])
    assert swl.torch.cross_entropy(z, torch._neg_view(-t)) == swl.torch.cross_entropy(z, t)
    with pytest.raises(TypeError, match=r"input must be float16.*got torch.complex64"):
        swl.torch.cross_entropy(torch.complex(z, z).conj(), t)


def test_an_ignore_index_that_no_id_can_be() -> None:
    z, t = torch.randn(3, 5), torch.tensor([0, 1, 4])
    for ignore_index in (-(2**70), 2**70):
        assert swl.torch.cross_entropy(z, t, ignore_index=ignore_index) == swl.torch.cross_entropy(z, t)


def test_bad_input() -> None:
    x, t = torch.randn(3, 5), torch.tensor([0, 1, 7])
    ce, W = swl.torch.cross_entropy, torch.randn(5, 5)
    with pytest.raises(ValueError, match=r"target\[2\] is 7"):
        ce(x, t)
    with pytest.raises(ValueError, match=r"target must have shape \(3,\).*got \(2,\)"):
        ce(x, t[:2])
    with pytest.raises(TypeError, match="target of class ids must be of an integer dtype"):
        ce(x, t.float())
    with pytest.raises(ValueError, match="reduction is 'avg'"):
        ce(x, t, reduction="avg")
    with pytest.raises(ValueError, match="label_smoothing must be in"):
        ce(x, t, label_smoothing=1.0)
    with pytest.raises(ValueError, match="ignore_index=1 is for class ids"):
        ce(x, x, ignore_index=1)
    with pytest.raises(ValueError, match="weight must have shape"):
        ce(x, t, torch.ones(4))
    with pytest.raises(NotImplementedError, match="weight requires a gradient"):
        ce(x, t, torch.ones(5, requires_grad=True))
    with pytest.raises(ValueError, match="denominator applies to"):
        ce(x, t, reduction="sum", denominator=2.0)
    with pytest.raises(TypeError, match=r"input is torch.float32 on cpu but weight is torch.float64"):
        swl.torch.affine(x, W.double())
    with pytest.raises(ValueError, match=r"linear_weight must have shape|input must have shape \(\.\.\., 4\)"):
        swl.torch.linear_cross_entropy(x, W[:, :4], t)
    with pytest.raises(ValueError, match="ignore_index cannot be given"):
        swl.torch.linear_cross_entropy(x, W, x, ignore_index=0)


# ------------------------------------------------------------------------------------------------ compile, threads, patch


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of inductor's own imports
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_in_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    body = torch.nn.Sequential(swl.torch.Affine(5, 7), torch.nn.Tanh())
    head = swl.torch.LinearCrossEntropyLoss(7, 5, bias=True, label_smoothing=0.1)
    ce = swl.torch.CrossEntropyLoss(torch.rand(5), label_smoothing=0.1, z_loss=0.01)
    x, t, q = torch.randn(6, 5, requires_grad=True), IDS, torch.rand(6, 5, requires_grad=True)
    leaves = [x, q, *body.parameters(), *head.parameters()]

    def model(x: Any, q: Any) -> Any:
        h = body(x)
        return head(h, t) + ce(h[:, :5], t) + swl.torch.cross_entropy(h[:, :5], q, reduction="none").square().sum()

    want = model(x, q)
    try:
        got = torch.compile(model, fullgraph=True, backend=backend)(x, q)
    except torch._inductor.exc.InductorError as error:
        if "compiler" not in str(error).lower():
            raise
        pytest.skip(f"{COMPILER}: {error}")
    close(got, want)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        close(a, b)


def test_opcheck() -> None:
    from swl.options import Options
    from swl.torch._options import packed

    x, t, W, b = torch.randn(6, 5, requires_grad=True), IDS, torch.randn(5, 5, requires_grad=True), torch.randn(5)
    options = packed(Options(label_smoothing=0.1))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.swl.cross_entropy, (x, t, *options, torch.float32, True), test_utils=tests)
    head = (x, W, t, b, *options, 2**20, torch.float32, True)
    torch.library.opcheck(torch.ops.swl.linear_cross_entropy, head, test_utils=tests)
    torch.library.opcheck(torch.ops.swl.affine, (x, W, b), test_utils=tests)


def train(steps: int = 8) -> Any:
    torch.manual_seed(0)  # of this thread's own generator below; the global one is not used in the loop
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(300, 16, generator=generator).requires_grad_()
    for _ in range(steps):
        x, t = torch.randn(512, 16, generator=generator), torch.randint(0, 300, (512,), generator=generator)
        loss = swl.torch.cross_entropy(swl.torch.affine(x, W), t) + swl.torch.linear_cross_entropy(x, W, t)
        loss.backward()
        with torch.no_grad():
            W -= W.grad
        W.grad = None
    return W.detach()


def test_two_threads_agree_with_one() -> None:
    want, got = train(), {}
    threads = [threading.Thread(target=lambda k=k: got.update({k: train()})) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(2):
        close(got[k], want)


def test_patch_reaches_compiled_code() -> None:
    layer, x, t = torch.nn.Linear(6, 5), torch.randn(4, 6), torch.tensor([0, 4, 2, 1])

    def loss(x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(layer(x), t)

    want = loss(x)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    close(compiled(x), want)
    with swl.torch.patch() as report:
        close(compiled(x), want)
        assert report.covered == 1
    close(compiled(x), want)
    assert report.covered == 1


def test_patch_routes_and_undoes() -> None:
    original = F.cross_entropy
    x, t = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, 2, 3])
    want = original(x, t)
    with pytest.raises(KeyError), swl.torch.patch() as report:  # noqa: PT012 - the error must come last
        assert F.cross_entropy is not original
        close(torch.nn.CrossEntropyLoss()(x, t), want)
        close(F.cross_entropy(x, t, label_smoothing=1.0), original(x, t, label_smoothing=1.0))
        with pytest.raises(IndexError):  # torch's own error
            F.cross_entropy(x, t + 9)
        raise KeyError
    assert F.cross_entropy is original
    assert report.covered == 1
    assert report.fell_through.total() == 2
    assert "1 by swl, 2 by torch" in str(report)


def test_modules_have_torchs_state() -> None:
    for ours, theirs in (
        (swl.torch.LinearCrossEntropyLoss(4, 3, bias=True), torch.nn.LinearCrossEntropyLoss(4, 3, bias=True)),
        (swl.torch.Affine(4, 3), torch.nn.Linear(4, 3)),
        (swl.torch.CrossEntropyLoss(torch.ones(3)), torch.nn.CrossEntropyLoss(torch.ones(3))),
    ):
        theirs.load_state_dict(ours.state_dict())
        ours.load_state_dict(theirs.state_dict())
    x, t = torch.randn(5, 4), torch.randint(0, 3, (5, 2))
    ours = swl.torch.LinearCrossEntropyLoss(4, 3, out_features=(2,), bias=True, reduction="sum")
    theirs = torch.nn.LinearCrossEntropyLoss(4, 3, out_features=(2,), bias=True, reduction="sum")
    theirs.load_state_dict(ours.state_dict())
    close(ours(x, t), theirs(x, t))


def test_the_specification_runs_too() -> None:
    x, t = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    with swl.use_backend("numpy"):
        assert swl.torch._bridge.bridge(x).backend.name == "numpy"
        close(swl.torch.cross_entropy(x, t), F.cross_entropy(x, t))


# ------------------------------------------------------------------------------------------------ the CUDA half


def send_to_the_fake_device(request: pytest.FixtureRequest, patch: pytest.MonkeyPatch | None = None) -> None:
    """Have tensors worked on there, on a stream that is not the default one."""
    stream = request.getfixturevalue("cupy").cuda.Stream(non_blocking=True)
    sys.path.insert(0, str(Path(__file__).parent / "cuda"))
    import tensors

    tensors.send(patch or request.getfixturevalue("monkeypatch"), 0, stream.ptr)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_device_paths_on_the_fake_device(dtype: Any, reduction: str, request: pytest.FixtureRequest) -> None:
    x, W, b = torch.randn(6, 5).to(dtype), torch.randn(5, 5).to(dtype), torch.randn(5).to(dtype)
    leaves = [t.requires_grad_() for t in (x, W, b)]
    for target in (IDS, torch.rand(6, 5)):
        target = target.to(dtype) if target.is_floating_point() else target

        def losses(target: Any = target) -> Any:
            plain = swl.torch.cross_entropy(x, target, W[0].detach().abs(), reduction=reduction, label_smoothing=0.1)
            fused = swl.torch.linear_cross_entropy(x, W, target, linear_bias=b, reduction=reduction)
            return plain, fused

        def run() -> list[Any]:
            plain, fused = losses()
            g = torch.full_like(plain, 0.5)
            return [
                plain.detach(),
                fused.detach(),
                *torch.autograd.grad(plain, x, g),
                *torch.autograd.grad(fused, leaves, g),
                *torch.autograd.grad(swl.torch.affine(x, W, b), leaves, torch.ones(6, 5).to(dtype)),
            ]

        want = run()
        with pytest.MonkeyPatch.context() as patch:
            send_to_the_fake_device(request, patch)
            got = run()
        for a, w in zip(got, want, strict=True):
            torch.testing.assert_close(a, w, rtol=2e-3 if dtype is torch.float16 else 1e-5, atol=2e-3)


def on_a_card(request: pytest.FixtureRequest) -> None:
    try:
        from swl.backends import get

        get("cupy")
        usable = torch.cuda.is_available()
        reason = "torch has no CUDA device"
    except swl.BackendUnavailable as error:
        usable, reason = False, str(error)
    if not usable:
        if request.config.getoption("require_gpu"):
            pytest.fail(f"--require-gpu: {reason}", pytrace=False)
        pytest.skip(f"{GPU}: {reason}")


def test_on_a_card(request: pytest.FixtureRequest) -> None:
    on_a_card(request)
    for dtype in FLOATS:
        x, W = torch.randn(64, 300).to(dtype), torch.randn(500, 300).to(dtype)
        t = torch.randint(0, 500, (64,))
        grads = []
        for device in ("cpu", "cuda"):
            leaves = [a.to(device).detach().requires_grad_() for a in (x, W)]
            with torch.cuda.stream(torch.cuda.Stream()):  # on whatever stream torch works
                loss = swl.torch.linear_cross_entropy(*leaves, t.to(device))
                loss = loss + swl.torch.cross_entropy(leaves[0], t.to(device) % 300) * 2
                grads.append([loss, *torch.autograd.grad(loss, leaves)])
                torch.cuda.current_stream().synchronize()
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(b.cpu(), a, rtol=3e-2 if dtype in FLOATS[2:] else 1e-4, atol=1e-3)


def test_memory_pool_on_a_card(request: pytest.FixtureRequest) -> None:
    on_a_card(request)
    import cupy

    before = cupy.cuda.get_allocator()
    try:
        swl.torch.share_memory_pool()
        start = torch.cuda.memory_allocated()
        there = cupy.zeros(2**20, np.uint8)
        assert torch.cuda.memory_allocated() - start >= 2**20
        del there
        assert torch.cuda.memory_allocated() == start
    finally:
        cupy.cuda.set_allocator(before)


def test_the_example_has_one_curve() -> None:
    spec = importlib.util.spec_from_file_location(
        "transformer", Path(__file__).parent.parent / "examples/transformer.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    curves = [module.train(loss, 3)["losses"] for loss in ("torch", "swl", "swl fused")]
    for curve in curves[1:]:
        np.testing.assert_allclose(curve, curves[0], atol=1e-4)
