"""Peak memory of the fused head above its inputs and outputs, each measurement in a process of its own.

python bench/memory.py --budget 64MiB --budget 1GiB        # exits with 1 if a peak is above its budget by more than 5 %
python bench/memory.py --plot memory.png                   # over the number of classes, beside the unfused head
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def child(job: dict[str, Any]) -> None:
    """Run one step and print what it took above inputs and outputs.

    A small step of the same kind comes first, so that compiled code and threads are not counted; then the kernel's mark of
    the most memory ever held is set back.
    """
    import numpy as np

    import swl

    rng = np.random.default_rng(0)

    def step(N: int, D: int, C: int, budget: int) -> tuple[int, int]:
        x, W, b = (rng.standard_normal(shape, np.float32) for shape in ((N, D), (D, C), (C,)))
        W /= np.float32(D**0.5)  # logits of order 1: probabilities below 1e-38 would make the products slow
        t = rng.integers(0, C, N)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        if job["fused"]:
            _, gradients = swl.linear_cross_entropy_value_and_grad(x, W, t, b, memory_budget=budget)
        else:
            _, dlogits = swl.cross_entropy_value_and_grad(swl.affine(x, W, b), t)
            gradients = swl.affine_backward(dlogits, x, W)
        return resident("VmHWM") - before, sum(g.nbytes for g in gradients)

    with swl.use_backend(job["backend"]):
        step(256, 64, 5000, 2**20)
        peak, outputs = step(job["N"], job["D"], job["C"], job["budget"])
    print(json.dumps(peak - outputs))


def measure(**job: Any) -> int:
    """Run `child` in a process of its own."""
    run = subprocess.run([sys.executable, __file__, "--child", json.dumps(job)], check=True, stdout=subprocess.PIPE)
    return int(json.loads(run.stdout))


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
    budgets = options.budget or [64 * 2**20, 2**30]
    shape = {"N": options.rows, "D": options.inputs, "backend": options.backend}
    if options.plot:
        draw(options.plot, shape, budgets)
        return 0
    kept = True
    for budget in budgets:
        peak = measure(**shape, C=options.classes, budget=budget, fused=True)
        kept &= peak <= 1.05 * budget
        print(
            f"{options.rows} x {options.inputs} x {options.classes}, {options.backend}: budget {budget / 2**20:.1f} MiB, "
            f"peak above inputs and outputs {peak / 2**20:.1f} MiB ({peak / budget:.1%})"
        )
    return 0 if kept else 1


def draw(path: Path, shape: dict[str, Any], budgets: list[int]) -> None:
    """Draw peak memory over the number of classes."""
    from matplotlib.figure import Figure

    classes = [2**k for k in range(11, 18)]
    lines = {"unfused": [measure(**shape, C=C, budget=1, fused=False) for C in classes]}
    for budget in budgets:
        lines[f"fused, {budget / 2**20:.0f} MiB"] = [measure(**shape, C=C, budget=budget, fused=True) for C in classes]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, peaks in lines.items():
        axes.plot(classes, [peak / 2**20 for peak in peaks], marker="o", label=name)
        print(name, *(f"{C}: {peak / 2**20:.1f} MiB" for C, peak in zip(classes, peaks, strict=True)), sep="  ")
    axes.set(
        xscale="log", yscale="log", xlabel="classes", ylabel="peak above inputs and outputs (MiB)",
        title=f"{shape['N']} rows, {shape['D']} inputs, forward and all gradients",
    )  # fmt: skip
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
