"""Run on every rank: loss and gradients over shards of the classes are those of one process, for every option.

The numbers of one process are torch's own and `swl.torch.linear_cross_entropy`'s, of the whole weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - as torch's own documentation calls it
from processes import RANK, SIZE
from ranks import BUDGETS, OPTIONS
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import swl
import swl.torch
from swl.ops.chunks import DEFAULT_BUDGET

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def by_torch(x: Any, W: Any, t: Any, b: Any, **options: Any) -> Any:
    """The definition, in float64 and torch's own operations."""
    z = F.linear(x, W, b) / options.get("temperature", 1)
    if cap := options.get("softcap"):
        z = cap * torch.tanh(z / cap)
    w, ignored = options.get("weight"), options.get("ignore_index", -100)
    w = None if w is None else w.double()
    loss = F.cross_entropy(z, t, w, ignore_index=ignored if not t.is_floating_point() else -100, reduction="none",
                           label_smoothing=options.get("label_smoothing", 0.0))  # fmt: skip
    m = torch.ones(len(x), dtype=torch.float64)
    if not t.is_floating_point():
        m = torch.where(t == ignored, 0, m if w is None else w[t.clamp(0)])
    loss = loss + options.get("z_loss", 0) * m * z.logsumexp(1) ** 2
    s = options["sample_weight"].double() if "sample_weight" in options else torch.ones(len(x), dtype=torch.float64)
    loss, reduction = loss * s, options.get("reduction", "mean")
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / options.get("denominator", (s * m).sum())


def near(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape, (name, got.shape, want.shape)
    if not want.numel():
        return
    off = (got.double() - want.double()).abs().max() / (want.double().abs().max() + 1e-30)
    assert not off > tolerance, f"{name} is off by {off:.1e} of its largest number"
    assert got.isfinite().all() == want.isfinite().all(), name


def sizes_of(g: torch.Generator, C: int) -> list[int]:
    """Uneven shards, some of them empty."""
    edges = sorted(torch.randint(0, C + 1, (SIZE - 1,), generator=g).tolist())
    return [b - a for a, b in zip([0, *edges], [*edges, C], strict=True)]


def one_case(number: int, options: dict[str, Any], kind: str, dtype: torch.dtype, budget: int) -> None:
    g = torch.Generator().manual_seed(1000 * SIZE + number)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    N, C = [(40, 17), (7, 64), (1, 3), (33, 211), (130, 40)][number % 5]
    D, few = 1 + number % 8, torch.float64 if dtype is torch.float64 else torch.float32
    x, W, b = draw(N, D).to(dtype), draw(C, D).to(dtype), draw(C).to(dtype) if number % 3 else None
    sizes = sizes_of(g, C)
    first = sum(sizes[:RANK])
    here = slice(first, first + sizes[RANK])
    weight = draw(C).abs().to(few) + 0.1
    options = dict(options)
    if options.get("weight"):
        options["weight"] = weight
    if options.get("sample_weight"):
        options["sample_weight"] = draw(N).abs().to(few)
    t: Tensor = torch.randint(0, C, (N,), generator=g)
    if kind == "ids" and number % 4 == 1:
        t[:] = C - 1  # most shards have no class of the batch
    if kind != "ids":
        t = draw(N, C).to(few).softmax(1)
    upstream = draw(N) if options.get("reduction") == "none" else torch.tensor([1.0, -1.5][number % 2]).double()

    def leaves(*given: Any) -> list[Any]:
        return [None if a is None else a.clone().requires_grad_() for a in given]

    def results(loss: Tensor, *inputs: Any) -> list[Tensor]:
        grads = iter(torch.autograd.grad(loss, [a for a in inputs if a is not None], upstream.to(loss.dtype)))
        return [loss.detach(), *(next(grads) for a in inputs if a is not None)]

    whole = leaves(x.double(), W.double(), None if b is None else b.double())
    want = results(by_torch(*whole[:2], t.double() if kind != "ids" else t, whole[2], **options), *whole)
    alone = leaves(x, W, b)
    single = results(swl.torch.linear_cross_entropy(*alone[:2], t, linear_bias=alone[2], **options), *alone)

    local = dict(options)
    if "weight" in local and number % 2:
        local["weight"] = weight[here].clone()
    shard = leaves(x, W[here], None if b is None else b[here])
    given = t[:, here] if kind == "shard" else t
    loss = swl.torch.class_parallel_linear_cross_entropy(
        *shard[:2], given, linear_bias=shard[2], memory_budget=budget, **local
    )
    with torch.no_grad():
        silent, stats = swl.torch.class_parallel_linear_cross_entropy(
            *shard[:2], given, linear_bias=shard[2], memory_budget=budget, sizes=sizes, stats=True, **local
        )
        _, single_stats = swl.torch.linear_cross_entropy(*alone[:2], t, linear_bias=alone[2], stats=True, **options)
    assert torch.equal(silent, loss.detach())
    assert not silent.requires_grad
    counts = t != options.get("ignore_index", -100) if kind == "ids" else slice(None)
    for name, a, one in zip(stats._fields, stats, single_stats, strict=True):
        near(f"case {number}: {name}", a[counts], one[counts], 3 * max(TOLERANCES[dtype], 1e-15))
    got = results(loss, *shard)
    for name, a, one, right in zip(("loss", "dx", "dW", "db"), got, single, want, strict=False):
        of_shard = name in ("dW", "db")
        assert a.dtype is one.dtype, name
        scale = right.abs().max() / (right[here].abs().max() + 1e-30) if of_shard and sizes[RANK] else 1.0
        tolerance = TOLERANCES[dtype] * min(float(scale), 1e6)
        near(f"case {number}: {name}", a, one[here] if of_shard else one, tolerance)
        near(f"case {number}, by torch: {name}", a, (right[here] if of_shard else right), 3 * tolerance)
    everyones = [torch.empty_like(a) for a in got[:2] for _ in range(SIZE)]
    for a, found in zip(got[:2], (everyones[:SIZE], everyones[SIZE:]), strict=True):
        dist.all_gather(found, a.contiguous())
        assert all(torch.equal(a, other) for other in found), f"case {number}: ranks differ"


def frozen() -> None:
    """Only the gradients that are asked for, and none twice; the same numbers in a second backward and over several batches."""
    g = torch.Generator().manual_seed(5)
    x, W = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((8, 3), (4 * SIZE, 3)))
    t, here = torch.randint(0, 4 * SIZE, (8,), generator=g), slice(4 * RANK, 4 * RANK + 4)
    head = swl.torch.ClassParallelLinearCrossEntropyLoss(dist.group.WORLD, label_smoothing=0.1)

    def gradients(of_x: bool, of_W: bool) -> Any:
        leaves = x.clone().requires_grad_(of_x), W[here].clone().requires_grad_(of_W)
        loss = head(*leaves, t)
        loss.backward(retain_graph=True)
        first = [a.grad.clone() for a in leaves if a.requires_grad]
        loss.backward()
        for a, b in zip([a for a in leaves if a.requires_grad], first, strict=True):
            torch.testing.assert_close(a.grad, 2 * b, rtol=1e-12, atol=0)
        return [a.grad for a in leaves]

    dx, dW = gradients(True, True)
    assert head.sizes == [4] * SIZE
    torch.testing.assert_close(gradients(True, False)[0], dx, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(False, True)[1], dW, rtol=1e-12, atol=0)
    # micro-batches that add up, each over what the whole batch divides by
    shard = W[here].clone().requires_grad_()
    for rows in (slice(0, 3), slice(3, 8)):
        head(x[rows], shard, t[rows], denominator=8.0).backward()
    torch.testing.assert_close(shard.grad, dW / 2, rtol=1e-12, atol=1e-15)
    # nothing counts, and nothing there
    x0 = x.clone().requires_grad_()
    loss = head(x0, W[here], torch.full((8,), -100))
    loss.backward()
    assert loss.isnan()
    assert (x0.grad == 0).all()
    assert head(x[:0], W[here], t[:0], denominator=1.0) == 0
    loss, stats = head(x.clone().requires_grad_(), W[here], t, stats=True)
    assert loss.requires_grad
    assert not any(of_row.requires_grad for of_row in stats)
    # leading dimensions, modes that look on, and autocast
    assert head(x.view(2, 4, 3), W[here], t.view(2, 4)) == head(x, W[here], t)
    with FlopCounterMode(display=False):
        assert head(x, W[here], t) == head(x, W[here], t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head(x.float(), W[here].float(), t)
    assert loss.dtype is torch.float32
    assert abs(loss - head(x, W[here], t)) < 0.05


def main() -> str:
    number = 0
    for options in OPTIONS:
        kinds = ["ids"] if "ignore_index" in options else ["ids", ["whole", "shard"][number % 2]]
        for kind in kinds:
            dtype = [torch.float64, torch.float32, torch.float64, torch.float32, torch.bfloat16][number % 5]
            with swl.use_backend(["numba", "numpy"][number % 2]):
                one_case(number, options, kind, dtype, BUDGETS[number % 4 % 3])
            number += 1
    one_case(number, {"weight": True, "label_smoothing": 0.1}, "ids", torch.float16, DEFAULT_BUDGET)
    frozen()
    return f"{number} cases as in one process"
