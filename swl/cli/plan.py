"""``swl plan``: what a step of a head over many ranks costs."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from swl import distributed
from swl.cli.common import at_least
from swl.distributed import cost
from swl.ops.chunks import DEFAULT_BUDGET

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command."""
    plan = commands.add_parser(
        "plan",
        help="what a step of a head over many ranks costs",
        description="Print memory, work, bytes and time per rank of a step of ClassParallelHead (docs/scale.md).",
        allow_abbrev=False,
    )
    count = at_least(int, 1)
    for name, what in (("rows", "rows of the whole batch"), ("inputs", "inputs of the head"), ("classes", "classes")):
        plan.add_argument(f"--{name}", type=count, required=True, metavar="N", help=what)
    plan.add_argument("--ranks", type=count, metavar="N", help="ranks in all; by default those of mpiexec")
    plan.add_argument("--class-parallel", type=count, metavar="N", help="ranks that share the classes; by default all")
    plan.add_argument(
        "--memory-budget", type=count, default=DEFAULT_BUDGET, metavar="BYTES", help="of a rank (%(default)s)"
    )
    for name, unit in (
        ("flops", "flop/s of the products of a rank"),
        ("logits", "logits/s that a rank turns into losses and gradients"),
        ("bandwidth", "bytes/s that a rank sends in a collective"),
        ("latency", "seconds of an empty collective"),
    ):
        plan.add_argument(f"--{name}", type=at_least(float, 0), metavar="X", help=f"{unit}; measured if not given")
    plan.add_argument("--measure", action="store_true", help="also run the step, on the ranks of mpiexec")
    plan.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the plan, of figures given or measured here."""
    with distributed.run() as comm:
        ranks = options.ranks or comm.size
        step = cost.Step(
            options.rows,
            options.inputs,
            options.classes,
            ranks,
            options.class_parallel or ranks,
            options.memory_budget,
        )
        given = {name: getattr(options, name) for name in cost.Machine._fields}
        refusal = None
        if step.ranks % step.class_parallel:
            refusal = f"--class-parallel must divide --ranks, {step.ranks}, got {step.class_parallel}"
        elif options.measure and (step.ranks, step.class_parallel) != (comm.size, comm.size):
            refusal = f"--measure needs all classes spread over the {comm.size} ranks there are, got {step.ranks} ranks"
        elif any(value == 0 for name, value in given.items() if name != "latency"):
            refusal = "--flops, --logits and --bandwidth must be above 0"
        if refusal is not None:
            if comm.rank == 0:
                print(f"swl: {refusal}", file=sys.stderr)
            return 2
        measured = cost.measure(comm, step) if options.measure else None  # first: what it needs is not yet there
        missing = [name for name, value in given.items() if value is None]
        machine = cost.calibrate(comm) if missing else cost.Machine(**given)
        machine = machine._replace(**{name: value for name, value in given.items() if value is not None})
        if comm.rank:
            return 0
        print(f"ClassParallelHead: {step.N:,} rows, {step.D:,} inputs, {step.C:,} classes")
        print(f"  {step.ranks} ranks: rows over {step.groups}, classes over {step.class_parallel}")
        for name, value in step.table(machine):
            print(f"  {name:<16}{value}")
        print(
            f"  {'a rank does':<16}{machine.flops:.3g} flop/s, {machine.logits:.3g} logits/s, "
            f"{machine.bandwidth:.3g} B/s, {machine.latency:.2g} s per collective"
            + (f"; measured on {comm.size} ranks here: {', '.join(missing)}" if missing else "")
        )
        if measured is not None:
            print(f"  {'measured time':<16}{measured.seconds * 1e3:,.3g} ms")
            if measured.memory:
                ratio = measured.memory / step.memory
                print(f"  {'measured memory':<16}{measured.memory / 2**20:,.1f} MiB, {ratio:.2f} of the plan")
    return 0
