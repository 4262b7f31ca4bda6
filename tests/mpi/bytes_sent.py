"""Run on every rank: bytes sent per step are what the model says, whatever the number of classes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from swl import distributed
from swl.distributed.cost import agreement_bytes, step_bytes


def sent(comm: Any, N: int, D: int, C: int, weighted: bool, budget: int) -> int:
    """Bytes that all ranks together send in a step."""
    counted = distributed.Counted(comm)
    rng = np.random.default_rng(0)
    options = {"weight": np.ones(C, np.float32)} if weighted else {}
    head = distributed.ClassParallelHead.init(counted, D, C, rng=1, memory_budget=budget, **options)
    counted.sent = 0
    head.forward_backward(rng.standard_normal((N, D)).astype(np.float32), rng.integers(0, C, N))
    return sum(comm.allgather(counted.sent))


def main() -> None:
    with distributed.run() as comm:
        P = comm.size
        for N, D, weighted, budget in itertools.product((1, 96, 301), (1, 24), (False, True), (20_000, 2**28)):
            found = {C: sent(comm, N, D, C, weighted, budget) for C in (50, 500, 5000)}
            want = P * step_bytes(N, D, P, weighted=weighted) + P * agreement_bytes(P)
            assert all(got == want for got in found.values()), (N, D, weighted, budget, found, want)
            assert (want == 0) == (P == 1)
        if comm.rank == 0:
            print("bytes as in the model")


if __name__ == "__main__":
    main()
