"""Run on every rank: a step sends what the model says, whatever the number of classes, and backward is one all-reduce."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from processes import RANK, SIZE

import swl.torch
from swl.distributed.cost import agreement_bytes, step_bytes

sent, reductions = 0.0, 0


def count() -> None:
    """Count the bytes of what the library may use, and refuse everything else."""
    exchange, reduce = dist.all_to_all_single, dist.all_reduce

    def all_to_all_single(b: Any, a: Any, incoming: Any, outgoing: Any, group: Any) -> None:
        global sent
        sent += (sum(outgoing) - outgoing[RANK]) * a.element_size()
        exchange(b, a, incoming, outgoing, group=group)

    def all_reduce(x: Any, group: Any) -> None:
        global sent, reductions
        sent += 2 * (SIZE - 1) / SIZE * x.nbytes  # of the best algorithms
        reductions += 1
        reduce(x, group=group)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("not counted")

    for name in ("all_gather", "all_gather_object", "broadcast", "reduce_scatter", "all_to_all", "send", "isend"):
        setattr(dist, name, refuse)
    dist.all_to_all_single, dist.all_reduce = all_to_all_single, all_reduce


def step(N: int, D: int, here: int, weighted: bool, budget: int, of_x: bool) -> float:
    """Bytes that all ranks together send in a step."""
    global sent, reductions
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(N, D, generator=g).requires_grad_(of_x), torch.randn(here, D, generator=g, requires_grad=True)
    t = torch.randint(0, here * SIZE, (N,), generator=g)
    weight = torch.ones(here) if weighted else None
    head = swl.torch.ClassParallelLinearCrossEntropyLoss(sizes=[here] * SIZE, weight=weight, memory_budget=budget)
    sent = reductions = 0
    loss = head(x, W, t)
    forward = reductions
    loss.backward()
    assert (forward, reductions) == (0, int(of_x and SIZE > 1))
    mine = torch.tensor(sent, dtype=torch.float64)
    dist.all_reduce(mine, group=None)
    return float(mine)


def main() -> str:
    count()
    cases = itertools.product((1, 96, 301), (1, 24), (False, True), (20_000, 2**28), (True, False))
    for N, D, weighted, budget, of_x in cases:
        found = [step(N, D, here, weighted, budget, of_x) for here in (5, 500)]
        want = SIZE * (step_bytes(N, D if of_x else 0, SIZE, weighted=weighted) + agreement_bytes(SIZE))
        assert all(abs(got - want) < 1e-6 for got in found), (N, D, weighted, budget, of_x, found, want)
        assert (want == 0) == (SIZE == 1)
    return "bytes as in the model"
