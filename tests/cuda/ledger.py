"""What a step of the fused head costs a device, counted on the fake driver, and the least time that a card needs for it.

    python tests/cuda/ledger.py                                     the table of docs/cuda.md
    python tests/cuda/ledger.py ROWS INPUTS CLASSES [DTYPE [BUDGET]]   each piece of work of one step

The driver judges and logs the work and does not do it, so a shape may be as large as a device's. Each array that a kernel
is given counts as read or written once, a product's operands and result likewise. The bound is arithmetic on that and on
data sheets, no measurement: every launch takes as long as its bytes or its multiply-adds at the card's peak, whichever is longer.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import fake
import fakecuda
import numpy as np
from fakecuda import strict

import swl
from swl.backends.cupy.structs import Argument
from swl.ops.checks import float_dtype
from swl.ops.chunks import DEFAULT_BUDGET

registry = fake.registry


class Card(NamedTuple):
    """Peaks of a card's data sheet: bytes a second, and operations a second of dense products by their operands."""

    bandwidth: float
    flops: dict[str, float]


def _card(bandwidth: float, half: float, tf32: float, single: float, double: float) -> Card:
    return Card(bandwidth, {"float16": half, "bfloat16": half, "tfloat32": tf32, "float32": single, "float64": double})


CARDS = {  # SXM boards with 80 GB (A100, H100), HGX B200; without sparsity
    "A100": _card(2.039e12, 312e12, 156e12, 19.5e12, 19.5e12),
    "H100": _card(3.35e12, 989.4e12, 494.7e12, 67e12, 67e12),
    "B200": _card(8e12, 2250e12, 1125e12, 75e12, 37e12),
}

LOOKED_UP = {"ce_combine": "logits_nc", "finish_ids": "ids_in"}
"""Arrays of which a kernel reads few elements."""


class Entry(NamedTuple):
    """A launch, a copy or a product."""

    what: str
    read: int
    written: int
    multiply_adds: int
    arithmetic: str  # "operands in sums" of a product

    def seconds(self, card: Card) -> float:
        """Return the least time that a card needs for it."""
        work = 2 * self.multiply_adds / card.flops[self.arithmetic.split(" in ")[0]] if self.multiply_adds else 0.0
        return max((self.read + self.written) / card.bandwidth, work)


@dataclass
class Ledger:
    """All that was given to the devices, and the memory that was taken for it."""

    entries: list[Entry] = field(default_factory=list)
    allocations: list[int] = field(default_factory=list)  # bytes of each
    peak: int = 0  # bytes at a time

    def seconds(self, card: Card) -> float:
        """Return the least time that a card needs, one piece of work after the other."""
        return sum(entry.seconds(card) for entry in self.entries)

    def multiply_adds(self) -> dict[str, int]:
        """Return them by operands and sums."""
        total: Counter[str] = Counter()
        for entry in self.entries:
            total[entry.arithmetic] += entry.multiply_adds
        return {arithmetic: n for arithmetic, n in total.items() if n}


@contextmanager
def counted() -> Iterator[Ledger]:
    """Count what is done within."""
    cupy, ledger, ours = fake.cupy(), Ledger(), []
    live: dict[int, int] = {}

    class Memory(cupy.cuda.MemoryHook):  # type: ignore[name-defined, misc]
        name = "ledger"  # type: ignore[misc]

        def malloc_postprocess(self, *, size: int, mem_ptr: int, **_: Any) -> None:
            ledger.allocations.append(size)
            live[mem_ptr] = size
            ledger.peak = max(ledger.peak, sum(live.values()))

        def free_postprocess(self, *, mem_ptr: int, **_: Any) -> None:
            live.pop(mem_ptr, None)  # what is older was not counted

    def observe(launch: strict.Launch) -> None:
        if launch.done:
            ours.append(moved(launch))

    with ExitStack() as stack:
        strict.observers.append(observe)
        stack.callback(strict.observers.remove, observe)
        stack.enter_context(Memory())
        works = stack.enter_context(fakecuda.recorded())
        yield ledger
    known = iter(ours)
    for work in works:
        read, written = next(known) if re.match(r"\w+<", work.what) else (work.read, work.written)
        if work.what not in ("empty", "free"):
            ledger.entries.append(Entry(work.what, read, written, work.multiply_adds, work.arithmetic))


def moved(launch: strict.Launch) -> tuple[int, int]:
    """Return the bytes of the arrays that a kernel of swl reads and writes: what is const is read."""
    base, read, written = launch.name.split("<")[0], 0, 0
    (parameters,) = re.findall(rf"\b{base}\(([^()]*\*[^()]*)\)", launch.module.code)
    for parameter, arg in zip(parameters.split(","), launch.args, strict=True):
        if isinstance(arg, Argument):
            arrays = [(name, arg.struct.fields[name], x) for name, x in arg.values.items()]
        else:
            arrays = [(parameter.split()[-1], parameter, arg)]
        for name, declared, x in arrays:
            if isinstance(x, fake.cupy().ndarray):
                size = x.itemsize if LOOKED_UP.get(base) == name else x.nbytes
                if "const" in declared:
                    read += size
                else:
                    written += size
    return read, written


# ------------------------------------------------------------------------------------------------ a step of the head


class Step(NamedTuple):
    """A step of the fused head: sizes, dtype of inputs and weights, and the budget."""

    N: int
    D: int
    C: int
    dtype: str = "bfloat16"
    memory_budget: int = DEFAULT_BUDGET

    def counted(self) -> Ledger:
        """Count value and gradients of a mean loss over class ids."""
        cupy, dtype = fake.cupy(), float_dtype("dtype", self.dtype)
        with fakecuda.settings(dry=1), cupy.cuda.using_allocator(cupy.cuda.MemoryPool().malloc):
            x, W, t = (
                cupy.empty(shape, of)
                for shape, of in (((self.N, self.D), dtype), ((self.D, self.C), dtype), ((self.N,), np.int64))
            )
            cupy.cuda.Device().synchronize()
            with counted() as ledger:
                swl.linear_cross_entropy_value_and_grad(x, W, t, memory_budget=self.memory_budget)
            return ledger

    def three_products(self, card: Card) -> float:
        """Return the least time that a card needs for three products of these sizes and this dtype, and nothing else."""
        N, D, C, item = self.N, self.D, self.C, float_dtype("dtype", self.dtype).itemsize
        matrices = {"x": N * D, "W": D * C, "logits": N * C}
        moved = item * sum(matrices.values())
        return 3 * Entry("product", moved, 0, N * D * C, f"{self.dtype} in float32").seconds(card)


SHAPES = (
    Step(8192, 4096, 128256),
    Step(4096, 4096, 128256),
    Step(4096, 768, 50257),
    Step(1024, 4096, 32000),
    Step(8192, 4096, 128256, "float32"),
)


def table() -> Iterator[str]:
    """Give the table of docs/cuda.md, line by line."""
    yield (
        "| rows | inputs | classes | dtype | launches | allocations | at a time | moved | multiply-adds | "
        + " | ".join(f"{card}, bound" for card in CARDS)
        + " |"
    )
    yield "|--:|--:|--:|---|--:|--:|--:|--:|---|" + "--:|" * len(CARDS)
    for step in SHAPES:
        ledger = step.counted()
        sums = "; ".join(f"{n / 1e12:.2f}·10¹² {arithmetic}" for arithmetic, n in ledger.multiply_adds().items())
        bounds = " | ".join(
            f"{1e3 * ledger.seconds(card):.1f} ms, {ledger.seconds(card) / step.three_products(card):.2f}×"
            for card in CARDS.values()
        )
        moved = sum(entry.read + entry.written for entry in ledger.entries)
        yield (
            f"| {step.N} | {step.D} | {step.C} | {step.dtype} | {len(ledger.entries)} | {len(ledger.allocations)} "
            f"| {ledger.peak / 2**30:.2f} GiB | {moved / 1e9:.1f} GB | {sums} | {bounds} |"
        )


def listing(step: Step) -> Iterator[str]:
    """Give the work of a step, what is alike and follows on one another on one line."""
    ledger = step.counted()
    yield f"{'times':>6} {'MB read':>10} {'MB written':>10} {'10⁹ multiply-adds':>18}  " + " ".join(
        f"{card + ' ms':>8}" for card in CARDS
    )
    kinds: dict[Entry, int] = Counter(ledger.entries)
    for entry, times in kinds.items():
        yield (
            f"{times:>6} {entry.read / 1e6:>10.3f} {entry.written / 1e6:>10.3f} {entry.multiply_adds / 1e9:>18.3f}  "
            + " ".join(f"{1e3 * times * entry.seconds(card):>8.3f}" for card in CARDS.values())
            + f"  {entry.what}{entry.arithmetic and f' ({entry.arithmetic})'}"
        )
    sizes = ", ".join(f"{size / 2**20:.1f}" for size in sorted(ledger.allocations, reverse=True) if size >= 2**20)
    yield f"{len(ledger.allocations)} allocations, {ledger.peak / 2**20:.1f} MiB at most at a time; from 1 MiB on: {sizes}"
    for name, card in CARDS.items():
        bound, products = ledger.seconds(card), step.three_products(card)
        yield (
            f"{name}: predicted bound {1e3 * bound:.2f} ms, no measurement; three bare products "
            f"{1e3 * products:.2f} ms, {bound / products:.3f} times that"
        )


def main(args: list[str]) -> int:
    if reason := fake.register():
        sys.exit(reason)
    registry._DEVICE = fake.NAME
    sizes = [args[i] if i == 3 else int(args[i]) for i in range(len(args))]
    print(*(listing(Step(*sizes)) if args else table()), sep="\n")  # type: ignore[arg-type]
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
