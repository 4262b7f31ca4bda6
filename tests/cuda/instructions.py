"""Count the instructions that the loss kernels issue for each logit, by the pipe that executes them, from the machine code.

    python tests/cuda/instructions.py             prints the table of docs/cuda.md; fails where a budget is exceeded
    python tests/cuda/instructions.py 80 90       only for these devices
    python tests/cuda/instructions.py --budget    writes the budget anew

Counted is the cheapest turn of a sweep's loop that moves whole packs: a round trip through the loop that passes at least one
access as wide as a pack, and one exponential for each logit of the packs that it passes; never the reciprocal of a softcap. So
edges of rows, options that are off and branches that a turn can do without are left out. It is a count, not a time.
"""

from __future__ import annotations

import heapq
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

KINDS = ("PLAIN", "SMOOTHING", "SMOOTHING + WEIGHTS", "BIAS", "SOFTCAP")
"""What models are trained with: the kinds of work at every column whose instructions are counted."""

PIPES = {
    "FMA": "FADD FMUL FFMA IMAD FADD2 FFMA2 FMUL2",
    "ALU": "IADD3 LOP3 ISETP SEL SHF LEA PRMT VIADD IMNMX VIMNMX VIMNMX3 IABS PLOP3 P2R R2P SGXT BMSK VIADDMNMX IADD LOP MOV32I "
    "FSEL FSETP FMNMX FMNMX3 FSET CS2R MOV HSETP2 HMNMX2 VHMNMX F2FP IADD64",
    "half": "HADD2 HMUL2 HFMA2",
    "conversion": "F2F I2F F2I FRND I2I POPC FLO I2FP",
    "MUFU": "MUFU",
    "memory": "LDG STG LDS STS LDL STL LDC ATOM ATOMG RED SHFL LDGSTS",
    "branch": "BRA BSSY BSYNC EXIT RET CALL WARPSYNC BAR NOP YIELD BREAK DEPBAR",
}
_PIPE = {op: pipe for pipe, ops in PIPES.items() for op in ops.split()}


def pipe(op: str) -> str:
    """Name the pipe of an instruction; conversions of two floats at a time are the ALU's."""
    name = op.split(".")[0]
    return _PIPE.get(name, "uniform" if name[0] == "U" or name in ("R2UR", "S2UR") else "other")


class Block(NamedTuple):
    """Instructions without a branch between them, and the blocks that may follow."""

    ops: list[str]
    next: list[int]


def blocks(text: str) -> list[Block]:
    """Cut the listing of one kernel, as ``nvdisasm -c`` writes it, into basic blocks."""
    ops: list[tuple[str, str, str]] = []  # predicate, operation, operands
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(ops)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([\w.]+)\s*(.*?)\s*;", line):
            ops.append((found[1] or "", found[2], found[3]))
    # some loops are left by a call of a label, from which nothing returns
    to_label = [op.startswith(("BRA", "CALL")) and ".L_" in operands for _, op, operands in ops]
    jump = [to or op.startswith(("EXIT", "RET")) for to, (_, op, _) in zip(to_label, ops, strict=True)]
    starts = sorted({0, *labels.values(), *(i + 1 for i, is_jump in enumerate(jump) if is_jump)} - {len(ops)})
    number = {start: i for i, start in enumerate(starts)}
    found = []
    for start, end in zip(starts, [*starts[1:], len(ops)], strict=True):
        predicate, _, operands = ops[end - 1]
        to = labels.get("".join(re.findall(r"\.L_\w+", operands)), -1) if to_label[end - 1] else -1
        always = jump[end - 1] and not predicate and (not to_label[end - 1] or operands.startswith("`"))
        following = [to] * (to >= 0) + [end] * (not always)
        found.append(Block([op for _, op, _ in ops[start:end]], [number[i] for i in following if i in number]))
    return found


def _loop(code: list[Block], start: int) -> set[int]:
    """Return the blocks of the loops that a block is in."""

    def reached(edges: list[list[int]]) -> set[int]:
        seen, todo = set(), [start]
        while todo:
            for i in edges[todo.pop()]:
                if i not in seen:
                    seen.add(i)
                    todo.append(i)
        return seen

    back: list[list[int]] = [[] for _ in code]
    for i, block in enumerate(code):
        for j in block.next:
            back[j].append(i)
    inside = reached([block.next for block in code]) & reached(back)
    return inside


class Turn(NamedTuple):
    """The cheapest turn of a loop: how many logits it takes, and its operations."""

    logits: int
    ops: Counter[str]

    def per_logit(self) -> float:
        return self.ops.total() / self.logits

    def by_pipe(self) -> dict[str, float]:
        """Return the instructions per logit of each pipe."""
        found: Counter[str] = Counter()
        for op, n in self.ops.items():
            found[pipe(op)] += n
        return {name: n / self.logits for name, n in found.most_common()}


MOST = 4  # packs of a turn


def cheapest_turn(code: list[Block], access: str, V: int, each: int = 1, most: int = MOST) -> Turn | None:
    """Find the turn with the fewest instructions per logit among those that pass `access`, a pattern, once for each pack of V,
    at most `most` of them, and `each` exponentials for each logit."""
    best: Turn | None = None
    wide = [sum(bool(re.match(access, op)) for op in block.ops) for block in code]
    exps = [sum(op.startswith("MUFU.EX2") for op in block.ops) for block in code]
    for start in (i for i, n in enumerate(wide) if n):
        inside = _loop(code, start)
        cost = {(start, 0, 0): 0}
        came: dict[tuple[int, int, int], tuple[int, int, int]] = {}
        heap = [(0, (start, 0, 0))]
        while heap:
            spent, state = heapq.heappop(heap)
            at, packs, done = state
            if spent > cost[state]:
                continue
            if packs and at == start:
                if done >= packs * V * each and (best is None or spent / (packs * V) < best.per_logit()):
                    best = Turn(packs * V, Counter(op for i in _path(came, state) for op in code[i].ops))
                continue
            packs, done = packs + wide[at], min(done + exps[at], most * V * each)
            if packs > most:
                continue
            for after in code[at].next:
                to, price = (after, packs, done), spent + len(code[at].ops)
                if after in inside and price < cost.get(to, 1 << 30):
                    cost[to], came[to] = price, state
                    heapq.heappush(heap, (price, to))
    return best


def _path(came: dict[tuple[int, int, int], tuple[int, int, int]], state: tuple[int, int, int]) -> Iterator[int]:
    """Walk a turn backwards: the blocks that it passes."""
    while state in came:
        state = came[state]
        yield state[0]


def sweeps(name: str, text: str) -> dict[str, Turn]:
    """Count the sweeps of a kernel of `instances` that streams packs of class ids' logits; others have none."""
    found = re.match(r"(ce_rows|ce_cluster|ce_partial|ce_backward)<(\w+), ([A-Z +]+), (.*)>", name)
    size = {"float": 4, "__half": 2, "__nv_bfloat16": 2}
    if not found or found[2] not in size or found[3] not in KINDS:
        return {}
    kernel, T, numbers, V = found[1], found[2], found[4].split(", "), 16 // size[found[2]]
    if numbers[0] != ("0" if kernel == "ce_rows" else str(V)):  # a row of few packs passes no loop
        return {}
    G, code = numbers[-1] if numbers[-1] in size else T, blocks(text)
    loads, stores = r"LDG\..*\b128\b", rf"STG\..*\b{8 * V * size[G]}\b"
    if (
        kernel in ("ce_rows", "ce_cluster") and numbers[-1 - (G != T)] != "0"
    ):  # all but a thread's first packs pass through shared memory
        loads, stores = r"STS\..*\b128\b", r"LDS\..*\b128\b"
    exps = 2 if "SOFTCAP" in found[3] else 1
    turns = {"forward": cheapest_turn(code, loads, V, exps), "backward": cheapest_turn(code, stores, V, exps)}
    if kernel == "ce_backward":
        del turns["forward"]
    return {sweep: turn for sweep, turn in turns.items() if turn}


BUDGET = Path(__file__).with_name("instructions.json")
"""The most instructions per logit of each sweep of each kernel, on A100 and H100."""


def over_budget(counts: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """Compare the counts, by kernel, sweep and device, with the budget, which must not be generous either."""
    budget = json.loads(BUDGET.read_text(encoding="utf-8"))
    found = [f"{name} is counted or in {BUDGET.name}, but not both" for name in counts.keys() ^ budget.keys()]
    for name in counts.keys() & budget.keys():
        for sweep, by_device in counts[name].items():
            most, allowed = max(by_device.get(a, 0) for a in ("80", "90")), budget[name].get(sweep, 0)
            if not most <= allowed <= 1.1 * most + 0.5:
                found.append(f"{name}, {sweep}: {most:.2f} instructions per logit, {allowed:g} in {BUDGET.name}")
    return found


def counts_of(kernels: list[Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Gather the instructions per logit of `compile_table.Kernel`\\ s by name, sweep and device."""
    counts: dict[str, dict[str, dict[str, float]]] = {}
    for k in kernels:
        for sweep, turn in k.turns.items():
            counts.setdefault(k.name, {}).setdefault(sweep, {})[k.architecture] = turn.per_logit()
    return counts


def main(arguments: list[str]) -> int:
    """Print a line for each sweep; return how many are over budget."""
    import compile_table

    architectures = tuple(a for a in arguments if a.isdigit()) or compile_table.ARCHITECTURES
    shown = "90" if "90" in architectures else architectures[-1]
    kernels = compile_table.compile_all(
        architectures,
        lambda group: group[0] in ("cross_entropy", "clusters") and "double" not in group and group[2] in KINDS,
    )
    counts = counts_of(kernels)
    if "--budget" in arguments:
        budget = {
            name: {s: math.ceil(2 * max(n.get(a, 0) for a in ("80", "90")) + 0.2) / 2 for s, n in by_sweep.items()}
            for name, by_sweep in counts.items()
        }
        BUDGET.write_text(json.dumps(budget, indent=2) + "\n", encoding="utf-8")
    print(f"| kernel | sweep | on {', '.join(architectures)} | by pipe, on {shown} |")
    print("|---|---|---|---|")
    for k in kernels:
        for sweep, turn in k.turns.items() if k.architecture == shown else ():
            found = counts[k.name][sweep]
            each = ", ".join(f"{found[a]:.1f}" if a in found else "–" for a in architectures)
            pipes = ", ".join(f"{pipe} {n:.1f}" for pipe, n in turn.by_pipe().items() if n >= 0.05)
            print(f"| `{k.name}` | {sweep} | {each} | {pipes} |")
    broken = over_budget(counts)
    print("", *broken, sep="\n")
    return len(broken)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) != 0)
