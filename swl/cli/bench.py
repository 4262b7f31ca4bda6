"""``swl bench``: times beside the floors, and beside PyTorch, JAX and NumPy."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from swl.cli.common import JSON, Refused, add_flags, at_least, check_backend, check_outputs, refused_data
from swl.demos.data import require

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command."""
    bench = commands.add_parser(
        "bench", help="times beside the floors, and beside PyTorch, JAX and NumPy", allow_abbrev=False
    )
    bench.add_argument(
        "groups", nargs="*", metavar="GROUP", help="what to compare; losses and forward by default, or all"
    )
    bench.add_argument(
        "--rounds", type=at_least(int, 1), default=3, metavar="N", help="blocks of each contender (%(default)s)"
    )
    bench.add_argument("--plot", type=Path, metavar="FILE", help="draw the time per logit over the classes instead")
    add_flags(bench, JSON)
    bench.set_defaults(run=run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the groups that were asked for, and print a table of each."""
    check_backend(options)
    from swl import bench

    if options.plot is not None:
        check_outputs(options.plot)
        with refused_data():
            require("matplotlib", "--plot")
        bench.plot(options.plot, options.rounds)
        print(f"picture in {options.plot}")
        return {"picture": str(options.plot)}
    groups = bench.GROUPS if options.groups == ["all"] else options.groups or ("losses", "forward")
    unknown = sorted(set(groups) - set(bench.GROUPS))
    if unknown:
        raise Refused(f"GROUP may be {', '.join(bench.GROUPS)} or all, got {unknown[0]!r}")
    results = []
    for case in bench.CASES.values():
        if case.group in groups:
            results.append((case, bench.measure(case, options.rounds)))
            print(f"{case.group}: {case.title}", file=sys.stderr)
    print("Milliseconds, and in brackets as a multiple of swl's own.\n")
    print(bench.table(results))
    return {
        "unit": "seconds per call",
        "cases": [
            {"group": case.group, "title": case.title, "own": case.own, "times": times} for case, times in results
        ],
    }
