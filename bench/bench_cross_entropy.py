"""Cross-entropy over class ids: forward, forward and backward, and the gradient in place of a given array."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest

import swl

SHAPES = [(100, 10), (4096, 1000), (512, 50257), (64, 128256)]
shapes = pytest.mark.parametrize(("N", "C"), SHAPES, ids=lambda n: str(n))


@lru_cache(maxsize=1)
def problem(N: int, C: int) -> tuple[Any, ...]:
    """float32 logits, ids, and the loss and gradient in float64."""
    rng = np.random.default_rng(0)
    z, t = rng.standard_normal((N, C), np.float32), rng.integers(0, C, N)
    with swl.use_backend("numpy"):
        loss, grad = swl.cross_entropy_value_and_grad(z.astype(np.float64), t)
    return z, t, loss, grad


@shapes
def test_forward(contender: str, measure: Any, N: int, C: int) -> None:
    z, t, loss, _ = problem(N, C)
    if contender == "torch":
        import torch

        zt, tt = torch.from_numpy(z), torch.from_numpy(t)

        def call() -> Any:
            with torch.inference_mode():
                return (torch.nn.functional.cross_entropy(zt, tt),)
    else:
        zs, ts = swl.asarray(z), swl.asarray(t)

        def call() -> Any:
            return (swl.cross_entropy(zs, ts),)

    measure(call, (loss,), f"cross-entropy forward {N} x {C}")


@shapes
def test_forward_backward(contender: str, measure: Any, N: int, C: int) -> None:
    z, t, loss, grad = problem(N, C)
    if contender == "torch":
        import torch

        zt, tt = torch.from_numpy(z).requires_grad_(), torch.from_numpy(t)

        def call() -> Any:
            zt.grad = None
            value = torch.nn.functional.cross_entropy(zt, tt)
            value.backward()
            return value, zt.grad
    else:
        zs, ts = swl.asarray(z), swl.asarray(t)

        def call() -> Any:
            return swl.cross_entropy_value_and_grad(zs, ts)

    measure(call, (loss, grad), f"cross-entropy forward+backward {N} x {C}")


@shapes
def test_forward_backward_out(contender: str, measure: Any, N: int, C: int) -> None:
    if contender == "torch":
        pytest.skip("torch has no out= for a gradient")
    z, t, loss, grad = problem(N, C)
    zs, ts = swl.asarray(z), swl.asarray(t)
    out = swl.asarray(np.empty_like(z))
    measure(
        lambda: swl.cross_entropy_value_and_grad(zs, ts, out=out),
        (loss, grad),
        f"cross-entropy forward+backward {N} x {C}, out=",
    )
