"""Log-probabilities and entropies of tensors agree with torch's own log_softmax, with all derivatives, however they are called."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import swl.torch

OPTIONS = [{}, {"temperature": 0.7}, {"ignore_index": 3, "temperature": 2.0}]


def make(
    dtype: Any = torch.float64, leading: Any = (6,), D: int = 3, C: int = 7
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, W, b = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((*leading, D), (C, D), (C,)))
    return x, W, torch.randint(0, C, leading), b


def plain(x: Tensor, W: Tensor, t: Tensor, b: Any = None, temperature: float = 1.0, ignore_index: int = -100) -> Any:
    counts = t != ignore_index
    log_p = (torch.nn.functional.linear(x, W, b) / temperature).log_softmax(-1)
    log_prob = log_p.gather(-1, torch.where(counts, t, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(counts, log_prob, 0), torch.where(counts, -(log_p.exp() * log_p).sum(-1), 0)


def ours(x: Tensor, W: Tensor, t: Tensor, b: Any = None, **options: Any) -> Any:
    return swl.torch.linear_log_prob(x, W, t, linear_bias=b, entropy=True, **options)


def objective(values: Any) -> Tensor:
    log_prob, H = values
    return (log_prob * torch.linspace(-1, 2, log_prob.numel()).view(log_prob.shape)).sum() + (0.3 * H * H).sum()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("leading", [(6,), (2, 3), (), (0,)], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients(leading: Any, with_bias: bool, options: dict[str, Any]) -> None:
    x, W, t, b = make(leading=leading)
    arguments = (x, W, t, b if with_bias else None)
    wanted = [x, W, b] if with_bias else [x, W]
    for budget in (10**6, 200):
        got, want = ours(*arguments, memory_budget=budget, **options), plain(*arguments, **options)
        torch.testing.assert_close(got, want)
        grads = [torch.autograd.grad(objective(values), wanted) for values in (got, want)]
        torch.testing.assert_close(*grads)
    only = swl.torch.linear_log_prob(x, W, t, linear_bias=arguments[3], **options)
    torch.testing.assert_close(only, want[0])
    grads = [torch.autograd.grad(values.sum(), wanted) for values in (only, plain(*arguments, **options)[0])]
    torch.testing.assert_close(*grads)
    if leading:
        grads = [torch.autograd.grad(values[1].sum(), wanted) for values in (ours(*arguments), plain(*arguments))]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("entropy", [True, False])
def test_numerical_derivatives_of_both_orders(entropy: bool) -> None:
    x, W, t, b = make()

    def f(x: Tensor, W: Tensor, b: Tensor) -> Any:
        return swl.torch.linear_log_prob(x, W, t, linear_bias=b, temperature=0.8, entropy=entropy)

    assert torch.autograd.gradcheck(f, (x, W, b), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, (x, W, b))


def test_transforms_give_what_eager_gives() -> None:
    x, W, t, b = make()
    t[0] = 3

    def f(x: Tensor) -> Any:
        return objective(ours(x, W, t, b, ignore_index=3))

    (want,) = torch.autograd.grad(f(x), x)
    torch.testing.assert_close(torch.func.grad(f)(x), want)
    rows = torch.func.vmap(lambda x, t: ours(x, W, t, b))(x, t)
    torch.testing.assert_close(rows, ours(x, W, t, b))
    with pytest.raises(ValueError, match=r"target\[1\] is 7"):
        torch.func.grad(lambda x: objective(ours(x, W, torch.full((6,), 3).index_fill(0, torch.tensor([1]), 7), b)))(x)


def test_compiled_it_is_one_graph() -> None:
    x, W, t, b = make(torch.float32)
    graphs = 0

    def count(graph: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(lambda *a: objective(ours(*a)), backend=count, fullgraph=True)
    for _ in range(5):
        got = torch.autograd.grad(compiled(x, W, t, b), (x, W, b))
        torch.testing.assert_close(got, torch.autograd.grad(objective(ours(x, W, t, b)), (x, W, b)))
    assert graphs == 1
    aot = torch.compile(lambda *a: objective(ours(*a)), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(aot(x, W, t, b), (x, W, b)), got)


@pytest.mark.parametrize("entropy", [True, False])
def test_the_operation_keeps_torchs_rules(entropy: bool) -> None:
    x, W, t, b = make()
    torch.library.opcheck(torch.ops.swl.linear_log_prob.default, (x, W, t, b, 0.8, -100, 1 << 20, entropy))


def test_meta_tensors_give_shapes() -> None:
    x, W, t = (
        torch.empty(2, 3, 5, device="meta"),
        torch.empty(7, 5, device="meta"),
        torch.empty(2, 3, device="meta").long(),
    )
    log_prob, H = ours(x.requires_grad_(), W, t)
    assert log_prob.shape == H.shape == (2, 3)
    assert log_prob.device.type == "meta"
    log_prob.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_16_bit_is_summed_in_float32(dtype: Any) -> None:
    x, W, t, b = make(dtype)
    got = ours(x, W, t, b)
    want = plain(*(a.double() if a.is_floating_point() else a for a in (x, W, t, b)))
    assert got[0].dtype is got[1].dtype is torch.float32
    torch.testing.assert_close(got, tuple(v.float() for v in want), rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad(objective(got), (x, W, b))
    assert {g.dtype for g in got} == {dtype}
    want = torch.autograd.grad(objective(want), (x, W, b))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=torch.finfo(dtype).eps * 2, atol=1e-3 if dtype.itemsize == 2 else 1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(*make(torch.float32))[0].dtype is torch.float32


def test_the_example_learns_the_same() -> None:
    path = Path(__file__).parent.parent / "examples" / "policy_gradient.py"
    example = SimpleNamespace(**runpy.run_path(str(path)))
    curves = [example.train(scores, 8, 100, 32) for scores in (example.by_torch, example.by_swl)]
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)
    assert curves[0][-1] != curves[0][0]


def test_bad_arguments_are_named() -> None:
    x, W, t, b = make()
    for wrong, kind, message in [
        ({"target": t[:5]}, ValueError, r"target must have shape \(6,\), one class id per row, got \(5,\)"),
        ({"target": t.double()}, TypeError, "target of class ids must be of an integer dtype"),
        ({"target": t + 7}, ValueError, r"target\[0\] is \d+; legal are class ids in \[0, 7\)"),
        ({"temperature": -1.0}, ValueError, "temperature must be finite and above 0, got -1.0"),
        ({"linear_bias": b[:2]}, ValueError, r"linear_bias must have shape \(7,\), got \(2,\)"),
        ({"input": x.detach().numpy()}, TypeError, "input must be a torch.Tensor, got numpy.ndarray"),
    ]:
        with pytest.raises(kind, match=message):
            swl.torch.linear_log_prob(**{"input": x, "linear_weight": W, "target": t, **wrong})
