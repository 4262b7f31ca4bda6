"""The affine map: forward, and all three gradients."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest

import swl

SHAPES = [(100, 784, 50), (256, 1024, 1000), (512, 768, 4096)]
shapes = pytest.mark.parametrize(("N", "D", "K"), SHAPES, ids=lambda n: str(n))


@lru_cache(maxsize=1)
def problem(N: int, D: int, K: int) -> tuple[Any, ...]:
    """float32 operands, and the results in float64."""
    rng = np.random.default_rng(0)
    operands = [rng.standard_normal(shape, np.float32) for shape in ((N, D), (D, K), (K,), (N, K))]
    x, W, b, dout = (a.astype(np.float64) for a in operands)
    return (*operands, x @ W + b, (dout @ W.T, x.T @ dout, dout.sum(axis=0)))


@shapes
def test_forward(contender: str, measure: Any, N: int, D: int, K: int) -> None:
    x, W, b, _, y, _ = problem(N, D, K)
    if contender == "torch":
        import torch

        xt, Wt, bt = (torch.from_numpy(a) for a in (x, W, b))

        def call() -> Any:
            with torch.inference_mode():
                return (torch.addmm(bt, xt, Wt),)
    else:
        xs, Ws, bs = (swl.asarray(a) for a in (x, W, b))

        def call() -> Any:
            return (swl.affine(xs, Ws, bs),)

    measure(call, (y,), f"affine forward {N} x {D} x {K}")


@shapes
def test_backward(contender: str, measure: Any, N: int, D: int, K: int) -> None:
    x, W, b, dout, _, grads = problem(N, D, K)
    if contender == "torch":
        import torch

        xt, Wt, bt = (torch.from_numpy(a).requires_grad_() for a in (x, W, b))
        y, dt = torch.addmm(bt, xt, Wt), torch.from_numpy(dout)

        def call() -> Any:
            return torch.autograd.grad(y, (xt, Wt, bt), dt, retain_graph=True)
    else:
        xs, Ws, ds = (swl.asarray(a) for a in (x, W, dout))

        def call() -> Any:
            return swl.affine_backward(ds, xs, Ws)

    measure(call, grads, f"affine backward {N} x {D} x {K}")
