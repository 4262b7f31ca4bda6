"""What a step of a class-parallel head costs a rank: bytes sent, flops, memory and time (docs/scale.md)."""

from __future__ import annotations

__all__ = ["agreement_bytes", "step_bytes"]


def agreement_bytes(P: int) -> int:
    """Bytes a rank sends so that all know that they are about to do the same."""
    return 17 * (P - 1)


def step_bytes(N: int, D: int, P: int, *, itemsize: int = 4, weighted: bool = False) -> float:
    """Bytes a rank sends in a step of the head, on average over the ranks; the number of classes plays no part.

    M, S, d and A of each row, and ``dx``, cross the network twice, save a P-th::

        2·(P − 1)/P · itemsize · N·(4 + D)        and one number more per row with class weights
    """
    return 2 * (P - 1) * itemsize * N * (4 + D + weighted) / P
