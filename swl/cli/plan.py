"""``swl plan``: what a step of a head over many ranks costs."""

from __future__ import annotations

import argparse
import math
import sys
from typing import Any

from swl import distributed
from swl.cli.common import JSON, Refused, add_flags, at_least, check_backend
from swl.distributed import cost
from swl.distributed.comm import launched
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
    plan.add_argument(
        "--device", choices=cost.DEVICES, help="take --flops and --logits from its data sheet, for float32"
    )
    for name, unit in (
        ("flops", "flop/s of the products of a rank"),
        ("logits", "logits/s that a rank turns into losses and gradients"),
        ("bandwidth", "bytes/s that a rank sends in a collective"),
        ("latency", "seconds of an empty collective"),
    ):
        plan.add_argument(f"--{name}", type=at_least(float, 0), metavar="X", help=f"{unit}; measured if not given")
    plan.add_argument("--measure", action="store_true", help="also run the step, on the ranks of mpiexec")
    add_flags(plan, JSON)
    plan.set_defaults(run=run)


def run(options: argparse.Namespace) -> Any:
    """Print the plan: of figures that were given, by arithmetic alone, or else measured on the ranks of mpiexec."""
    given = {name: getattr(options, name) for name in cost.Machine._fields}
    if options.device:
        for name, value in zip(("flops", "logits"), cost.DEVICES[options.device], strict=True):
            given[name] = value if given[name] is None else given[name]
    if any(value == 0 for name, value in given.items() if name != "latency"):
        raise Refused("--flops, --logits and --bandwidth must be above 0")
    if not launched():
        if (options.ranks or 1) == 1:  # sends nothing
            given["bandwidth"], given["latency"] = given["bandwidth"] or math.inf, given["latency"] or 0.0
        missing = [f"--{name}" for name in ("bandwidth", "latency") if given[name] is None]
        if missing:
            raise Refused(
                f"{' and '.join(missing)} must be given for --ranks {options.ranks} outside mpiexec: there is no network to "
                "measure (say 4e11 bytes/s and 3e-5 s within a machine of 8 GPUs)"
            )
        if not options.measure and None not in given.values():
            return _report(_step(options, options.ranks or 1), cost.Machine(**given), [], 1, None)
    check_backend(options)
    with distributed.run() as comm:
        refusal, step = None, None
        try:
            step = _step(options, options.ranks or comm.size)
        except Refused as error:
            refusal = str(error)
        if step and options.measure and (step.ranks, step.class_parallel) != (comm.size, comm.size):
            refusal = f"--measure needs all classes spread over the {comm.size} ranks there are, got {step.ranks} ranks"
        if step is None or refusal is not None:
            if comm.rank == 0:
                print(f"swl: {refusal}", file=sys.stderr)
            return 2
        measured = cost.measure(comm, step) if options.measure else None  # first: what it needs is not yet there
        missing = [name for name, value in given.items() if value is None]
        machine = cost.calibrate(comm) if missing else cost.Machine(**given)
        machine = machine._replace(**{name: value for name, value in given.items() if value is not None})
        return _report(step, machine, missing, comm.size, measured) if comm.rank == 0 else 0


def _step(options: argparse.Namespace, ranks: int) -> cost.Step:
    class_parallel = options.class_parallel or ranks
    if ranks % class_parallel:
        raise Refused(f"--class-parallel must divide --ranks, {ranks}, got {class_parallel}")
    return cost.Step(options.rows, options.inputs, options.classes, ranks, class_parallel, options.memory_budget)


def _report(
    step: cost.Step, machine: cost.Machine, missing: list[str], here: int, measured: cost.Measured | None
) -> dict[str, Any]:
    print(f"ClassParallelHead: {step.N:,} rows, {step.D:,} inputs, {step.C:,} classes")
    print(f"  {step.ranks} ranks: rows over {step.groups}, classes over {step.class_parallel}")
    for name, value in step.table(machine):
        print(f"  {name:<16}{value}")
    print(
        f"  {'a rank does':<16}{machine.flops:.3g} flop/s, {machine.logits:.3g} logits/s, "
        f"{machine.bandwidth:.3g} B/s, {machine.latency:.2g} s per collective"
        + (f"; measured on {here} ranks here: {', '.join(missing)}" if missing else "")
    )
    result: dict[str, Any] = {
        "step": step._asdict(),
        "per_rank": {
            "rows": step.rows,
            "classes": step.classes,
            "memory_bytes": step.memory,
            "flops": step.flops,
            "logits": step.logits,
            "bytes_sent": step.bytes_sent,
            "collectives": step.collectives,
        },
        "machine": machine._asdict(),
        "measured_figures": missing,
        "seconds": step.seconds(machine),
        "seconds_of": step.times(machine),
    }
    if measured is not None:
        print(f"  {'measured time':<16}{measured.seconds * 1e3:,.3g} ms")
        if measured.memory:
            ratio = measured.memory / step.memory
            print(f"  {'measured memory':<16}{measured.memory / 2**20:,.1f} MiB, {ratio:.2f} of the plan")
        result["measured"] = measured._asdict()
    return result
