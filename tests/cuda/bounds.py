"""What bounds a plain loss on a card, value and gradient of class ids: the memory, or the kernel's own instructions.

    python tests/cuda/bounds.py            prints the table of docs/cuda.md; fails where memory is not the bound
    pip install --no-deps triton liger-kernel           and then Liger's kernel stands beside ours

Both are counted in clocks of a processor for a logit: instructions from the machine code (instructions.py), bytes from the
launch that `plan` chooses. The cards' constants are of NVIDIA's white papers. It is arithmetic, not a measurement.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import compile_table
import instructions
import liger

from swl.backends.cupy.compilation import SIZE
from swl.backends.cupy.plans import Limits, plan

N = 4096
CASES = tuple((T, C) for T in ("float", "__nv_bfloat16") for C in (32000, 50257, 128256))


class Card(NamedTuple):
    """A card, and of each of its processors what it does in a clock, for single threads."""

    name: str
    limits: Limits
    bandwidth: float  # bytes a second
    clock: float  # Hz
    fma: int
    alu: int = 64
    mufu: int = 16
    instructions: int = 128
    near: int = 128  # bytes from and to its cache and shared memory

    def memory(self, moved: float) -> float:
        """Return the clocks that a processor's share of the bandwidth takes for so many bytes."""
        return moved * self.limits.processors * self.clock / self.bandwidth

    def work(self, pipes: Counter[str], near: float) -> float:
        """Return the clocks that the busiest part of a processor takes for instructions by pipe and bytes moved near it."""
        return max(
            pipes.total() / self.instructions,
            pipes["FMA"] / self.fma,
            pipes["ALU"] / self.alu,
            pipes["MUFU"] / self.mufu,
            near / self.near,
        )


CARDS = {
    "80": Card("A100", Limits(108, 163 * 1024), 2.039e12, 1.41e9, fma=64),
    "90": Card("H100", Limits(132, 227 * 1024, True), 3.35e12, 1.755e9, fma=128),
}


class Bound(NamedTuple):
    """A line of the table: clocks for a logit of both sweeps."""

    card: str
    T: str
    C: int
    kernels: tuple[str, ...]
    pipes: Counter[str]
    memory: float
    work: float

    @property
    def share(self) -> float:
        """Return the part of the card's bandwidth that the instructions leave room for."""
        return min(1.0, self.memory / self.work)


def bound(
    card: Card,
    T: str,
    C: int,
    kernels: tuple[str, ...],
    turns: Iterable[instructions.Turn],
    moved: float,
    waste: float = 1,
) -> Bound:
    """Bound both sweeps, whose `turns` are given, that move so many bytes for a logit and work on `waste` times the columns."""
    pipes: Counter[str] = Counter()
    for turn in turns:
        pipes.update({pipe: n * waste for pipe, n in turn.by_pipe().items()})
    # what is kept of a row goes to shared memory and back, beside its load and its store
    return Bound(card.name, T, C, kernels, pipes, card.memory(moved), card.work(pipes, 2 * moved))


def bounds(kernels: Iterable[Any]) -> Iterator[Bound]:
    """Bound every case on every card, from the `compile_table.Kernel`\\ s of all of them."""
    turns = {(k.architecture, k.name): k.turns for k in kernels}
    for architecture, card in CARDS.items():
        for T, C in CASES:
            size, V = SIZE[T], 16 // SIZE[T]
            how = plan(N, C, size, card.limits)
            if how.on_chip:
                name = (
                    f"ce_cluster<{T}, PLAIN, {V}, 4>" if how.variant == "cluster" else f"ce_rows<{T}, PLAIN, 0, {V}, 4>"
                )
                names: tuple[str, ...] = (name,)
            else:
                names = f"ce_rows<{T}, PLAIN, 0, {V}, 0>", f"ce_backward<{T}, PLAIN, {V}>"
            sweeps = {sweep: turn for name in names for sweep, turn in turns[architecture, name].items()}
            yield bound(card, T, C, names, sweeps.values(), (2 if how.on_chip else 3) * size)


def main() -> int:
    """Print a line for each case, Liger's kernel too where it is installed; return how many of ours memory does not bound."""
    kernels = compile_table.compile_all(
        tuple(CARDS), lambda group: len(group) == 3 and group[2] == "PLAIN" and group[1] in ("float", "__nv_bfloat16")
    )
    found = [*bounds(kernels)]
    print("| card | logits | classes | kernels | instructions | ALU | MUFU | work | memory | bandwidth at most |")
    print("|---|---|--:|---|--:|--:|--:|--:|--:|--:|")
    for b in [*found, *(liger.bounds() if liger.installed() else ())]:
        dtype = {"float": "float32", "__nv_bfloat16": "bfloat16"}[b.T]
        names = ", ".join(f"`{name.split('<')[0]}`" if "<" in name else name for name in b.kernels)
        print(
            f"| {b.card} | {dtype} | {b.C} | {names} | {b.pipes.total():.1f} | {b.pipes['ALU']:.1f} | {b.pipes['MUFU']:.1f} "
            f"| {b.work:.3f} | {b.memory:.3f} | {b.share:.0%} |"
        )
    return sum(b.share < 0.95 for b in found)


if __name__ == "__main__":
    sys.exit(main() != 0)
