"""``stats=True`` in swl.torch: the by-products that the functions of arrays give, whatever way the tensors go."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import swl
import swl.torch

N, D, C = 6, 5, 7
RNG = np.random.default_rng(0)
LOGITS, X, W, b = (RNG.normal(size=shape) for shape in ((N, C), (N, D), (D, C), C))
IDS = np.array([0, 3, -100, 6, 1, 2])
TARGETS = {"ids": IDS, "probabilities": RNG.dirichlet(np.ones(C), N)}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "many": {"softcap": 2.0, "temperature": 0.7, "label_smoothing": 0.1, "z_loss": 1e-3, "reduction": "none"},
}


def same(got: Any, want: Any, tol: float = 1e-12) -> None:
    (loss, stats), (want_loss, want_stats) = got, want
    np.testing.assert_allclose(loss.detach().double().numpy(), want_loss, rtol=tol, atol=tol)
    assert type(stats) is swl.RowStats
    for name, t, array in zip(swl.RowStats._fields, stats, want_stats, strict=True):
        assert not t.requires_grad
        assert t.shape == array.shape
        np.testing.assert_allclose(t.double().numpy(), array, rtol=tol, atol=tol, err_msg=name)
    assert stats.argmax.dtype is torch.int64


def call(fused: bool, target: Any, *leaves: Any, stats: bool = True, **options: Any) -> Any:
    if fused:
        x, weight, bias = leaves
        return swl.torch.linear_cross_entropy(x, weight, target, linear_bias=bias, stats=stats, **options)
    return swl.torch.cross_entropy(leaves[0], target, stats=stats, **options)


@pytest.mark.parametrize("way", ["at hand", "gradients", "compiled", "vmap"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("fused", [False, True])
def test_they_are_those_of_the_functions_of_arrays(fused: bool, target: str, options: str, way: str) -> None:
    t, given = TARGETS[target], OPTIONS[options]
    if fused:
        want = swl.linear_cross_entropy(X, W, t, b, stats=True, **given)
        leaves = [torch.tensor(X), torch.tensor(W.T.copy()), torch.tensor(b)]
    else:
        want, leaves = swl.cross_entropy(LOGITS, t, stats=True, **given), [torch.tensor(LOGITS)]
    t = torch.tensor(t)
    if way == "compiled":
        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        same(compiled(fused, t, *(a.requires_grad_() for a in leaves), **given), want)
        torch._dynamo.reset()
    elif way == "vmap":
        mapped = torch.func.vmap(lambda *leaves: call(fused, t, *leaves, **given))
        loss, stats = mapped(*(a.expand(2, *a.shape) for a in leaves))
        same((loss[1], swl.RowStats(*(s[1] for s in stats))), want)
    else:
        same(call(fused, t, *(a.requires_grad_(way == "gradients") for a in leaves), **given), want)


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_the_same_with_and_without(fused: bool) -> None:
    def gradients(stats: bool) -> Any:
        leaves = [torch.tensor(a, requires_grad=True) for a in ((X, W.T.copy(), b) if fused else (LOGITS,))]
        found = call(fused, torch.tensor(IDS), *leaves, stats=stats, z_loss=0.1)
        return torch.autograd.grad(found[0] if stats else found, leaves)

    torch.testing.assert_close(gradients(True), gradients(False))


@pytest.mark.parametrize("shape", [(C,), (2, C, 3), (2, C, 3, 2), (0, C)], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_shapes_are_those_of_class_ids(shape: tuple[int, ...], target: str) -> None:
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    t = torch.zeros(rows, dtype=torch.long) if target == "ids" else z.softmax(0 if len(shape) == 1 else 1)
    for module in (swl.torch.CrossEntropyLoss(), torch.compile(swl.torch.CrossEntropyLoss(), backend="eager")):
        _, stats = module(z, t, stats=True)
        assert {s.shape for s in stats} == {rows}
        torch.testing.assert_close(stats.row_max, z.amax(0 if len(shape) == 1 else 1))
    torch._dynamo.reset()


def test_a_head_of_leading_axes_and_16_bit() -> None:
    head = swl.torch.LinearCrossEntropyLoss(D, C, dtype=torch.bfloat16)
    x = torch.tensor(X).bfloat16().reshape(2, 3, D)
    loss, stats = head(x, torch.tensor(IDS).reshape(2, 3), stats=True)
    assert loss.dtype is torch.bfloat16
    assert {(s.shape, s.dtype) for s in stats[:4]} == {((2, 3), torch.float32)}
    logits = torch.nn.functional.linear(x.float(), head.linear.weight.float())
    torch.testing.assert_close(stats.row_max, logits.amax(-1), rtol=1e-5, atol=1e-5)
    _, stats = swl.torch.linear_cross_entropy(
        x.float()[0], torch.randn(C, 2, D), torch.zeros(3, 2, dtype=torch.long), stats=True
    )
    assert stats.entropy.shape == (3, 2)


def test_meta_tensors_give_shapes() -> None:
    z, t = torch.empty(N, C, device="meta"), torch.empty(N, dtype=torch.long, device="meta")
    loss, stats = swl.torch.cross_entropy(z, t, stats=True)
    assert loss.is_meta
    assert all(s.is_meta and s.shape == (N,) for s in stats)
