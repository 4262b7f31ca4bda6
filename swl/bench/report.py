"""What is made of the measurements: tables in Markdown, and a picture."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from swl.bench.cases import logits_case
from swl.bench.timing import Case, measure, median
from swl.distributed.checkpoint import write_whole

__all__ = ["plot", "table"]

CLASSES = (10, 32, 100, 320, 1000, 3200, 10_000, 32_000, 100_000, 320_000, 1_000_000)
LOGITS = 2**24


def table(results: list[tuple[Case, dict[str, list[float]]]]) -> str:
    """Give milliseconds, and in brackets multiples of swl's own; under a heading for each group."""
    lines = []
    for group in dict.fromkeys(case.group for case, _ in results):
        rows = [(case, times) for case, times in results if case.group == group]
        names = [
            n for n in dict.fromkeys(n for case, _ in rows for n in case.names) if any(n in times for _, times in rows)
        ]
        lines += ["", f"| {group} | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
        for case, times in rows:
            own = median(times[case.own])
            cells = []
            for name in names:
                if name not in times:
                    cells.append("")
                    continue
                ratio = "" if name == case.own else f" ({median(times[name]) / own:.2f}×)"
                cells.append(f"{median(times[name]) * 1e3:.3g}{ratio}")
            lines.append(f"| {case.title} | " + " | ".join(cells) + " |")
    return "\n".join(lines[1:])


def plot(path: Path, rounds: int) -> None:
    """Draw the time per logit over the number of classes for every contender, and as a multiple of a copy of the logits.

    A copy reads and writes as many bytes, but it may read what it is about to write as well, so a loss can be below it.
    """
    from matplotlib.figure import Figure

    lines: dict[str, list[tuple[int, float, float]]] = {}
    for C in CLASSES:
        N = LOGITS // C
        case = logits_case("plot", N, C, every=False)
        times = {name: median(seconds) for name, seconds in measure(case, rounds).items()}
        for name, seconds in times.items():
            lines.setdefault(name, []).append((C, seconds / (N * C) * 1e9, seconds / times["copy"]))
        print(f"C = {C}: " + ", ".join(f"{name} {s * 1e3:.3g} ms" for name, s in times.items()), file=sys.stderr)
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    time, distance = figure.subplots(1, 2)
    for name, points in lines.items():
        classes, per_logit, multiples = zip(*points, strict=True)
        style: dict[str, Any] = {"marker": "o", "markersize": 3, "label": name}
        if name == "copy":
            style = {"color": "black", "linestyle": "--", "label": "copy of the logits"}
        time.loglog(classes, per_logit, **style)
        distance.loglog(classes, multiples, **style)
    time.set(xlabel=f"classes, of {LOGITS:,} logits", ylabel="ns per logit", title="forward + backward, float32")
    distance.set(xlabel=f"classes, of {LOGITS:,} logits", ylabel="times", title="beside a copy of the logits")
    for axes in (time, distance):
        axes.grid(alpha=0.3)
    figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    write_whole(path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=110))
