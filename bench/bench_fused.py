"""The fused head: loss and all gradients from inputs and weights, within two budgets, beside the unfused head and torch."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest

import swl

SHAPES = [(256, 2048, 1000), (1024, 768, 8192), (1024, 768, 50257)]
shapes = pytest.mark.parametrize(("N", "D", "C"), SHAPES, ids=lambda n: str(n))


@lru_cache(maxsize=1)
def problem(N: int, D: int, C: int) -> tuple[Any, ...]:
    """float32 operands, and loss and gradients in float64."""
    rng = np.random.default_rng(0)
    x, W = rng.standard_normal((N, D), np.float32), rng.standard_normal((D, C), np.float32) / np.float32(D**0.5)
    t = rng.integers(0, C, N)
    with swl.use_backend("numpy"):
        wide = x.astype(np.float64), W.astype(np.float64)
        loss, (dx, dW, _) = swl.linear_cross_entropy_value_and_grad(*wide, t)
    return x, W, t, (loss, dx, dW)


def in_torch(x: Any, W: Any, t: Any, options: Any = None) -> Any:
    """Give the call of `torch.nn.functional.linear_cross_entropy`, or of its parts where torch has none."""
    import torch

    xt, Wt, tt = (
        torch.from_numpy(x).requires_grad_(),
        torch.from_numpy(W.T.copy()).requires_grad_(),
        torch.from_numpy(t),
    )
    fused = getattr(torch.nn.functional, "linear_cross_entropy", None)

    def call() -> Any:
        xt.grad = Wt.grad = None
        if options is not None:
            loss = fused(xt, Wt, tt, options=options)
        elif fused is not None:
            loss = fused(xt, Wt, tt)
        else:
            loss = torch.nn.functional.cross_entropy(xt @ Wt.T, tt)
        loss.backward()
        return loss, xt.grad, Wt.grad.T

    return call


@shapes
@pytest.mark.parametrize("budget", [64 * 2**20, swl.fused.DEFAULT_BUDGET], ids=lambda n: f"{n >> 20}MiB")
def test_fused(contender: str, measure: Any, N: int, D: int, C: int, budget: int) -> None:
    x, W, t, want = problem(N, D, C)
    if contender == "torch":
        chunked = getattr(__import__("torch").nn, "LinearCrossEntropyOptions", None)
        if chunked is None:
            pytest.skip("this torch has no LinearCrossEntropyOptions")
        call = in_torch(x, W, t, chunked())
    else:
        xs, Ws, ts = (swl.asarray(a) for a in (x, W, t))

        def call() -> Any:
            loss, (dx, dW, _) = swl.linear_cross_entropy_value_and_grad(xs, Ws, ts, memory_budget=budget)
            return loss, dx, dW

    measure(call, want, f"fused head {N} x {D} x {C}")


@shapes
def test_unfused(contender: str, measure: Any, N: int, D: int, C: int) -> None:
    x, W, t, want = problem(N, D, C)
    if contender == "torch":
        call = in_torch(x, W, t)
    else:
        xs, Ws, ts = (swl.asarray(a) for a in (x, W, t))

        def call() -> Any:
            loss, dlogits = swl.cross_entropy_value_and_grad(swl.affine(xs, Ws), ts)
            dx, dW, _ = swl.affine_backward(dlogits, xs, Ws, needs=("dx", "dW"))
            return loss, dx, dW

    measure(call, want, f"fused head {N} x {D} x {C}")


@shapes
def test_three_products(benchmark: Any, N: int, D: int, C: int) -> None:
    """Time the floor: the three bare products of those shapes, by NumPy."""
    x, W, _, _ = problem(N, D, C)
    logits, dx, dW = np.empty((N, C), np.float32), np.empty_like(x), np.empty_like(W)

    def call() -> None:
        np.matmul(x, W, out=logits)
        np.matmul(logits, W.T, out=dx)
        np.matmul(x.T, logits, out=dW)

    benchmark.group = f"fused head {N} x {D} x {C}"
    benchmark.extra_info["contender"] = "three products"
    benchmark.pedantic(call, rounds=7, iterations=1, warmup_rounds=2)
