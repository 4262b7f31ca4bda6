"""Distillation of tensors agrees with torch's own kl_div over log_softmax, eager, compiled and transformed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import swl.torch

DIRECTIONS = ("forward", "reverse", "jsd")


def make(dtype: Any = torch.float64, leading: Any = (6,), C: int = 7) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = (*leading, 3), (C, 3), (*leading, 2), (C, 2), (C,), (C,)
    tensors = [torch.randn(shape, dtype=dtype) for shape in shapes]
    for i in (0, 1, 4):
        tensors[i].requires_grad_()
    return tensors


def plain(
    x: Tensor,
    W: Tensor,
    tx: Tensor,
    tW: Tensor,
    b: Tensor,
    tb: Tensor,
    direction: str,
    tau: float,
    reduction: str,
    s: Any,
) -> Tensor:
    linear, kl = torch.nn.functional.linear, torch.nn.functional.kl_div
    log_p, log_q = ((linear(*head) / tau).log_softmax(-1) for head in ((x, W, b), (tx, tW, tb)))

    def divergence(a: Tensor, c: Tensor) -> Tensor:
        return kl(c, a, reduction="none", log_target=True).sum(-1)

    if direction == "jsd":
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        loss = (divergence(log_p, log_m) + divergence(log_q, log_m)) / 2
    else:
        loss = divergence(log_q, log_p) if direction == "forward" else divergence(log_p, log_q)
    s = torch.ones_like(loss) if s is None else s
    loss = loss * s
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.sum() / s.sum()


def ours(*tensors: Tensor, tau: float = 1.0, s: Any = None, **options: Any) -> Tensor:
    *heads, b, tb = tensors
    return swl.torch.linear_kl(*heads, linear_bias=b, teacher_bias=tb, temperature=tau, sample_weight=s, **options)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("leading", [(6,), (2, 3), ()], ids=str)
def test_value_and_gradients(direction: str, reduction: str, leading: Any) -> None:
    tensors = make(leading=leading)
    wanted = [tensors[i] for i in (0, 1, 4)]
    for tau, s in ((1.0, None), (0.6, torch.rand(leading, dtype=torch.float64))):
        want = plain(*tensors, direction, tau, reduction, s)
        got = ours(*tensors, tau=tau, s=s, direction=direction, reduction=reduction)
        torch.testing.assert_close(got, want)
        upstream = torch.randn(want.shape, dtype=want.dtype)
        grads = [torch.autograd.grad(y, wanted, upstream) for y in (got, want)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_numerical_derivatives_and_transforms(direction: str) -> None:
    x, W, tx, tW, b, tb = make()

    def f(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
        return ours(x, W, tx, tW, b, tb, tau=0.8, direction=direction)

    assert torch.autograd.gradcheck(f, (x, W, b))
    got = torch.func.grad(f, argnums=(0, 1, 2))(x, W, b)
    torch.testing.assert_close(got, torch.autograd.grad(f(x, W, b), (x, W, b)))
    mask = tb.index_fill(0, torch.tensor([2]), -math.inf)  # a class that both have not
    masked = b.detach().index_fill(0, torch.tensor([2]), -math.inf)

    def g(x: Tensor) -> Tensor:
        return ours(x, W, tx, tW, masked, mask, direction=direction)

    (want,) = torch.autograd.grad(g(x), x)
    assert want.isfinite().all()
    torch.testing.assert_close(torch.func.grad(g)(x), want)


def test_compiled_and_on_meta() -> None:
    tensors = make(torch.float32)
    compiled = torch.compile(lambda *a: ours(*a, direction="jsd"), backend="aot_eager", fullgraph=True)
    got, want = (torch.autograd.grad(f(*tensors), tensors[1]) for f in (compiled, lambda *a: ours(*a, direction="jsd")))
    torch.testing.assert_close(got, want)
    loss = ours(*(t.detach().to("meta") for t in tensors), reduction="none")
    assert (loss.shape, loss.dtype, loss.device.type) == ((6,), torch.float32, "meta")
    x, W, tx, tW, b, tb = tensors
    options = ("reverse", 0.7, "mean", 1 << 20)
    torch.library.opcheck(torch.ops.swl.linear_kl.default, (x, W, tx, tW, b, tb, torch.rand(6), *options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_is_summed_in_float32(dtype: Any) -> None:
    tensors = make(dtype)
    got = ours(*tensors)
    want = ours(*(t.detach().double() for t in tensors))
    assert got.dtype is torch.float32
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(got, tensors[0])[0].dtype is dtype


def test_nothing_has_no_mean_and_bad_arguments_are_named() -> None:
    x, W, tx, tW, b, _ = make()
    assert ours(*make(leading=(0,))).isnan()
    for wrong, kind, message in [
        (
            {"teacher_input": tx[:5]},
            ValueError,
            r"teacher_input must have the leading shape of input, \(6,\), got \(5,\)",
        ),
        ({"teacher_weight": tW[:3]}, ValueError, "linear_weight has 7 classes, but teacher_weight has 3"),
        ({"teacher_weight": W}, ValueError, r"teacher_input must have shape \(\.\.\., 3\), got \(6, 2\)"),
        (
            {"teacher_bias": b},
            NotImplementedError,
            "the teacher's tensors and sample_weight get no gradient; detach them",
        ),
        ({"direction": "up"}, ValueError, "direction is 'up'; legal are 'forward', 'reverse' and 'jsd'"),
        ({"sample_weight": torch.ones(2)}, ValueError, "sample_weight must have the leading shape of input"),
        ({"reduction": "max"}, ValueError, "reduction is 'max'"),
    ]:
        with pytest.raises(kind, match=message):
            swl.torch.linear_kl(**{"input": x, "linear_weight": W, "teacher_input": tx, "teacher_weight": tW, **wrong})
