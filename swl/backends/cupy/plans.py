"""How the sweeps of cross-entropy are launched, by the shape and the device."""

from __future__ import annotations

import functools
from typing import NamedTuple

__all__ = [
    "CLUSTER",
    "KEEP_BLOCK",
    "KEEP_WARP",
    "PART_KEEP",
    "PART_LANES",
    "ROW_BYTES",
    "Limits",
    "Plan",
    "plan",
    "power_of_two",
]


class Limits(NamedTuple):
    """What of a device the choice of a variant depends on."""

    processors: int  # streaming multiprocessors
    shared: int  # bytes of shared memory that one block may have
    clusters: bool = False  # whether blocks of a cluster reach each other's shared memory


class Plan(NamedTuple):
    """How the forward sweep, alone or with the backward sweep, is launched.

    ========  ==========================================================  ==================================
    variant   when                                                        row
    ========  ==========================================================  ==================================
    part      C ≤ 32                                                      8 lanes of a warp, registers
    warp      16-byte packs of a row ≤ 4 per lane of a warp               32 lanes, registers
    cluster   a cluster has room for the row, and one block has not or    8 blocks of 128 or 256 threads
              few rows (3·N ≤ processors ≤ 8·N) would leave many idle
    split     3·N ≤ processors, and ≥ 2 blocks of ≥ 1024 packs in a row   blocks, combined by a second kernel
    block     all others                                                  a block of 128 to 512 threads
    ========  ==========================================================  ==================================

    Both sweeps in one read each logit once where `on_chip` holds: always in part, warp and cluster; in block where 4 packs
    per thread in registers and the rest of the row in shared memory have room. Otherwise ``ce_backward`` follows.
    """

    variant: str
    lanes: int  # LANES of ce_rows
    V: int  # elements of a pack
    keep: int  # KEEP of ce_rows
    threads: int
    blocks: int
    shared: int  # bytes without a staged row
    stage: int  # bytes of a staged row
    on_chip: bool
    splits: int = 1
    packs_each: int = 0


KEEP_WARP, KEEP_BLOCK = 4, 4  # packs per lane that stay in registers
PART_LANES, PART_KEEP = 8, 4
CLUSTER = 8  # blocks, as in kernels/clusters.cu
_SPLIT_PACKS = 1024  # at least 4 per thread of ce_partial
ROW_BYTES = 64  # Row in rows.cuh


def plan(N: int, C: int, itemsize: int, limits: Limits) -> Plan:
    """Choose how to sweep logits (N, C) of `itemsize` bytes. The choice never depends on which sweeps are asked for."""
    if C <= PART_LANES * PART_KEEP:
        return Plan("part", PART_LANES, 1, PART_KEEP, 256, -(-N // 32), 0, 0, True)
    V = 16 // itemsize
    packs = -(-(C + V - 1) // V)  # of the row that lies worst
    if packs <= 32 * KEEP_WARP:
        return Plan("warp", 32, V, KEEP_WARP, 128, -(-N // 4), 0, 0, True)
    sums = 64 if itemsize == 8 else 40  # bytes of Sums in sums.cuh, one for each warp
    shared = ROW_BYTES + 16 * sums
    threads, stage = _on_chip(packs, 512)
    fits = shared + stage <= limits.shared
    few = limits.processors >= 3 * N and packs >= 2 * _SPLIT_PACKS
    each = -(-packs // CLUSTER)
    threads_each, stage_each = _on_chip(each, 256)
    fill = limits.processors <= N * CLUSTER if few else not fits
    if limits.clusters and fill and shared + stage_each <= limits.shared:
        return Plan("cluster", 0, V, KEEP_BLOCK, threads_each, N * CLUSTER, shared, stage_each, True, CLUSTER, each)
    if few:
        splits = min(-(-2 * limits.processors // N), packs // _SPLIT_PACKS)
        return Plan("split", 0, V, 0, 256, N * splits, 8 * sums, 0, False, splits, -(-packs // splits))
    return Plan("block", 0, V, KEEP_BLOCK, threads, N, shared, stage, fits)


def _on_chip(packs: int, most: int) -> tuple[int, int]:
    """Give the threads of a block, at most `most`, for so many packs, and the bytes of those beyond its registers."""
    threads = min(max(power_of_two(-(-packs // KEEP_BLOCK)), 128), most)
    return threads, 16 * max(0, packs - KEEP_BLOCK * threads)


@functools.cache
def power_of_two(n: int) -> int:
    """Give the least power of two that is at least `n`."""
    return 1 << (n - 1).bit_length()
