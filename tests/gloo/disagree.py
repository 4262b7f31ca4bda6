"""Run on every rank: what differs between ranks, or is wrong on one, is an error on all, by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import RANK, SIZE
from ranks import wrong_on_the_last
from torch import Tensor

import swl.torch


def main() -> str:
    last = RANK == SIZE - 1
    where, raises = f"rank {SIZE - 1}", wrong_on_the_last(RANK, SIZE)
    x, W = torch.ones(5, 3, requires_grad=True), torch.ones(4, 3)
    t = torch.arange(5)

    def loss(x: Any = x, W: Any = W, t: Any = t, **options: Any) -> Tensor:
        return swl.torch.class_parallel_linear_cross_entropy(x, W, t, **options)

    def differ(message: str) -> Any:
        return pytest.raises(ValueError, match=rf"ranks disagree.*{where} has .*{message}")

    with differ("'label_smoothing': 0.5"):
        loss(label_smoothing=0.5 if last else 0.1)
    with differ("linear_weight of 5 inputs"):
        loss(W=torch.ones(4, 5) if last else W)
    with differ("linear_bias given"):
        loss(linear_bias=torch.ones(4) if last else None)
    with differ("memory_budget 7000"):
        loss(memory_budget=7000 if last else 8000)
    with differ("denominator 3.0"):
        loss(denominator=3.0 if last else 4.0)
    with differ("gradient of input not wanted"):
        loss(x.detach() if last else x)
    with differ("checksum"):
        loss(t=t.flip(0) if last else t)
    with differ("sample_weight with checksum"):
        loss(sample_weight=torch.full((5,), 2.0 if last else 3.0))
    with differ(r"x of shape \(4, 3\)"):
        loss(x[:4] if last else x, t=t[:4] if last else t)
    with differ("sizes"):
        loss(sizes=[4] * SIZE if last else [*[4] * (SIZE - 1), 5])

    with raises(ValueError, "label_smoothing must be in"):
        loss(label_smoothing=3.0 if last else 0.0)
    with raises(ValueError, "weight must have shape"):
        loss(weight=torch.ones(99 if last else 4))
    with raises(ValueError, r"target\[2\] is 999"):
        loss(t=torch.where((t == 2) & torch.tensor(last), 999, t))
    with raises(ValueError, r"input must have shape"):
        loss(torch.ones(5, 2) if last else x)
    with raises(ValueError, r"target must have shape \(5,\) \(class ids\), .* got \(5, 3\)"):
        loss(t=torch.ones(5, 3) if last else t)
    with raises(TypeError, "input must be a torch.Tensor, got numpy.ndarray: .* swl.class_parallel_linear"):
        loss(np.ones((5, 3)) if last else x)
    with raises(TypeError, "linear_weight is torch.float64"):
        loss(W=W.double() if last else W)
    with raises(ValueError, r"sizes must be the classes of each of \d ranks, .* got \[4\] on rank"):
        loss(sizes=[4] if last else [4] * SIZE)
    with raises(NotImplementedError, "target requires a gradient"):
        loss(t=torch.ones(5, 4 * SIZE, requires_grad=last))
    with raises(NotImplementedError, "needs plain tensors with memory"):
        loss(*(a.to("meta") if last else a for a in (x, W, t)))
    with pytest.raises(ValueError, match=r"sizes must be the classes .* at least one in all"):
        loss(W=torch.ones(0, 3))
    head = swl.torch.ClassParallelLinearCrossEntropyLoss()
    head(x, W, t)
    with raises(ValueError, "and 3 of this one"):
        head(x, W[:3] if last else W, t)

    value = loss()
    assert value.isfinite(), "and the next call is as good as before"
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="one at a time"):
        torch.autograd.grad(loss(reduction="none"), x, torch.eye(5), is_grads_batched=True)
    assert repr(head).startswith("ClassParallelLinearCrossEntropyLoss(sizes=[4, ")
    groups = [dist.new_group([rank]) for rank in range(SIZE)]
    if SIZE > 1:
        with pytest.raises(ValueError, match="not in the process group"):
            swl.torch.class_parallel_linear_cross_entropy(x, W, t, groups[1 - RANK if RANK < 2 else 0])
    return "all that differs between ranks, or is wrong on one"
