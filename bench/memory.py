"""Peak memory of the fused head above its inputs and outputs, each measurement in a process of its own.

python bench/memory.py --budget 64MiB --budget 1GiB        # exits with 1 if a peak is above its budget by more than 5 %
python bench/memory.py --plot docs/memory.svg              # over the classes, beside the unfused head and PyTorch; times too
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from swl.ops.chunks import DEFAULT_BUDGET

CLASSES = tuple(2**k for k in range(12, 18))
LARGEST_IN_CHUNKS = 2**15
"""Classes up to which PyTorch's chunks are measured: twice as many take a quarter of a minute a step."""
UNITS = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def n_bytes(text: str) -> int:
    """Read a size such as 64MiB."""
    found = re.fullmatch(r"(\d+)\s*([A-Za-z]*)", text)
    if not found or found[2].upper() not in UNITS:
        raise argparse.ArgumentTypeError(f"must be bytes, or a number with KiB, MiB or GiB, got {text!r}")
    return int(found[1]) * UNITS[found[2].upper()]


def resident(kind: str) -> int:
    """Return VmRSS, the bytes held now, or VmHWM, the most ever held (Linux)."""
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if not found:
        raise OSError(f"/proc/self/status has no {kind}")
    return int(found[1]) * 1024


Step = Callable[[Any, Any, Any, Any], tuple[Any, ...]]


def steps(job: dict[str, Any]) -> Step:
    """Give what is measured: from x, W, t and b to the gradients."""
    kind = job["kind"]
    if not kind.startswith("torch"):
        import swl

        def ours(x: Any, W: Any, t: Any, b: Any) -> tuple[Any, ...]:
            if kind == "fused":
                _, gradients = swl.linear_cross_entropy_value_and_grad(x, W, t, b, memory_budget=job["budget"])
                return gradients
            _, dlogits = swl.cross_entropy_value_and_grad(swl.affine(x, W, b), t)
            return swl.affine_backward(dlogits, x, W)

        swl.set_backend(job["backend"])
        return ours
    import torch

    options = {"options": torch.nn.LinearCrossEntropyOptions()} if kind == "torch, in chunks" else {}

    def theirs(x: Any, W: Any, t: Any, b: Any) -> tuple[Any, ...]:
        xt, Wt, bt = (torch.from_numpy(a).requires_grad_() for a in (x, W.T, b))
        loss = torch.nn.functional.linear_cross_entropy(xt, Wt, torch.from_numpy(t), linear_bias=bt, **options)
        loss.backward()
        return xt.grad, Wt.grad, bt.grad

    return theirs


def child(job: dict[str, Any]) -> None:
    """Run a step and print the bytes that it took above inputs and outputs, and the seconds of the fastest of some more.

    A small step of the same kind comes first, so that compiled code and threads are not counted; then the kernel's mark of
    the most memory ever held is set back.
    """
    import numpy as np

    rng, step = np.random.default_rng(0), steps(job)

    def inputs(N: int, D: int, C: int) -> tuple[Any, ...]:
        x, b = (rng.standard_normal(shape, np.float32) for shape in ((N, D), (C,)))
        W = (
            rng.standard_normal((C, D), np.float32).T
            if job["kind"].startswith("torch")
            else rng.standard_normal((D, C), np.float32)
        )
        W /= np.float32(D**0.5)  # logits of order 1: probabilities below 1e-38 would make the products slow
        return x, W, rng.integers(0, C, N), b

    step(*inputs(256, 64, 5000))
    arrays = inputs(job["N"], job["D"], job["C"])
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    start = time.perf_counter()
    gradients = step(*arrays)
    seconds = [time.perf_counter() - start]
    peak = resident("VmHWM") - before - sum(g.nbytes for g in gradients)
    del gradients
    for _ in range(2 if job["timed"] else 0):
        start = time.perf_counter()
        step(*arrays)
        seconds.append(time.perf_counter() - start)
    print(json.dumps([peak, min(seconds)]))


def measure(**job: Any) -> tuple[int, float]:
    """Run `child` in a process of its own; give bytes and seconds."""
    run = subprocess.run([sys.executable, __file__, "--child", json.dumps(job)], check=True, stdout=subprocess.PIPE)
    peak, seconds = json.loads(run.stdout)
    return int(peak), float(seconds)


def main() -> int:
    """Measure, print, and draw if asked to; the exit status says whether the budgets were kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024, metavar="N")
    parser.add_argument("--inputs", type=int, default=768, metavar="D")
    parser.add_argument("--classes", type=int, default=50257, metavar="C")
    parser.add_argument("--budget", type=n_bytes, action="append", metavar="BYTES", help="64MiB and 1GiB by default")
    parser.add_argument("--backend", default="numba")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw memory over the number of classes")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(json.loads(options.child))
        return 0
    shape = {"N": options.rows, "D": options.inputs, "backend": options.backend}
    if options.plot:
        draw(options.plot, shape, options.budget or [DEFAULT_BUDGET, 64 * 2**20])
        return 0
    kept = True
    for budget in options.budget or [64 * 2**20, 2**30]:
        peak, _ = measure(**shape, C=options.classes, budget=budget, kind="fused", timed=False)
        kept &= peak <= 1.05 * budget
        print(
            f"{options.rows} x {options.inputs} x {options.classes}, {options.backend}: budget {budget / 2**20:.1f} MiB, "
            f"peak above inputs and outputs {peak / 2**20:.1f} MiB ({peak / budget:.1%})"
        )
    return 0 if kept else 1


def draw(path: Path, shape: dict[str, Any], budgets: list[int]) -> None:
    """Draw peak memory over the number of classes, and print it with the times as a table in Markdown."""
    from matplotlib.figure import Figure

    kinds = {f"fused, {budget >> 20} MiB": {"kind": "fused", "budget": budget} for budget in budgets}
    kinds["unfused"] = {"kind": "unfused"}
    if find_spec("torch") is not None:
        kinds |= {kind: {"kind": kind} for kind in ("torch", "torch, in chunks")}
    print("| C | " + " | ".join(kinds) + " |\n| --- |" + " ---: |" * len(kinds))
    lines: dict[str, list[tuple[int, float]]] = {name: [] for name in kinds}
    for C in CLASSES:
        cells = []
        for name, kind in kinds.items():
            if name == "torch, in chunks" and C > LARGEST_IN_CHUNKS:
                cells.append("")
                continue
            peak, seconds = measure(**shape, **kind, C=C, timed=True)
            lines[name].append((C, peak / 2**20))
            cells.append(f"{peak / 2**20:.0f} MiB, {seconds:.3g} s")
        print(f"| {C} | " + " | ".join(cells) + " |", flush=True)
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
    axes.set(
        xscale="log", yscale="log", xlabel="classes", ylabel="peak above inputs and outputs (MiB)",
        title=f"{shape['N']} rows, {shape['D']} inputs, float32: loss and all gradients",
    )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
