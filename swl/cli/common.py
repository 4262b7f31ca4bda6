"""What the commands share: flags, refusals, and running on the ranks of mpiexec."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

import swl
from swl import distributed
from swl.backends import active, get
from swl.demos.data import DataError
from swl.distributed.comm import launched
from swl.nn.gradcheck import GradientError

__all__ = [
    "BACKEND",
    "DISTRIBUTED",
    "JSON",
    "PROGRESS",
    "Refused",
    "add_flags",
    "add_settings",
    "alone_or_on_ranks",
    "at_least",
    "check_backend",
    "check_memory",
    "check_outputs",
    "mib",
    "print_ranks",
    "settings_of",
]

S = TypeVar("S")


class Refused(Exception):  # noqa: N818 - it never leaves the command line
    """What the user asked for cannot be done; the message is all they need."""


# ------------------------------------------------------------------------------------------------ flags


def at_least(number: type[int] | type[float], low: float) -> Callable[[str], float]:
    """Make a type of argparse: a finite number from `low` on."""

    def parse(text: str) -> float:
        value = number(text)
        if not low <= value < float("inf"):  # a NaN fails too
            raise argparse.ArgumentTypeError(f"must be finite and at least {low}, got {text}")
        return value

    parse.__name__ = number.__name__  # argparse names it where `text` is no number
    return parse


Flag = tuple[str, dict[str, Any]]


def _number(name: str, kind: type[int] | type[float], low: float, meaning: str) -> Flag:
    return name, {"type": at_least(kind, low), "metavar": "N" if kind is int else "X", "help": meaning}


BACKEND: Flag = "backend", {
    "metavar": "NAME",
    "help": "one of those that `swl info` lists; by default SWL_BACKEND, else numba",
}  # fmt: skip
DISTRIBUTED: tuple[Flag, ...] = (
    _number("class_parallel", int, 1, "spread the classes over N ranks of mpiexec; the others share the rows"),
    (
        "checkpoint",
        {
            "type": Path,
            "metavar": "FOLDER",
            "help": "save after each epoch, and go on from the last one; --epochs may be raised",
        },
    ),
)
JSON: Flag = "json", {"action": "store_true", "help": "print the results as JSON instead"}
PROGRESS: Flag = "progress", {
    "action": argparse.BooleanOptionalAction,
    "help": "show a progress bar; by default on a terminal, if tqdm is installed",
}  # fmt: skip
_SETTINGS = dict(
    [
        _number("hidden", int, 1, "units of the hidden layer"),
        _number("epochs", int, 1, "passes over the training rows"),
        _number("batch_size", int, 1, "rows per step"),
        _number("lr", float, 0, "learning rate at the start"),
        _number("seed", int, 0, "of initial weights and row order"),
        ("dtype", {"choices": ["float64", "float32"], "help": "of parameters and inputs"}),
        (
            "scale",
            {"choices": ["all", "each"], "help": "scale inputs all alike, or each feature; else as the data says"},
        ),
        _number("embedding", int, 1, "numbers by which a word is represented"),
        _number("context", int, 2, "words from which the next one is predicted"),
        _number("memory_budget", int, 1, "bytes of working memory of the fused head"),
    ]
)
"""One flag for each field of the settings of what `swl train` runs."""


def add_flags(parser: Any, *flags: Flag) -> None:
    """Add flags that leave nothing behind where they are not given."""
    for name, how in flags:
        parser.add_argument(f"--{name.replace('_', '-')}", **{"default": argparse.SUPPRESS, **how})


def add_settings(parser: Any, settings: Any) -> None:
    """Add the flags of a class of settings, whose defaults they name."""
    for name in settings._fields:
        how, default = _SETTINGS[name], settings._field_defaults[name]
        add_flags(parser, (name, how if default is None else {**how, "help": f"{how['help']} ({default})"}))


def settings_of(options: argparse.Namespace, settings: type[S]) -> S:
    """Make the settings of what was given."""
    given = vars(options)
    fields: tuple[str, ...] = settings._fields  # type: ignore[attr-defined]
    return settings(**{name: given[name] for name in fields if name in given})


# ------------------------------------------------------------------------------------------------ refusals


def check_backend(options: argparse.Namespace) -> str:
    """Return the name of the backend that was asked for, or of the active one, once it is known to be usable."""
    try:
        name = getattr(options, "backend", None) or active()
        get(name)
        swl.get_num_threads()
    except ValueError as error:  # no backend of that name, no number of threads
        raise Refused(str(error)) from None
    return name


def check_outputs(picture: Path | None, parameters: Path | None = None, checkpoints: Path | None = None) -> None:
    """Refuse before the work what could not be written after it."""
    for path in (picture, parameters):
        if path is not None and path.is_dir():
            raise Refused(f"cannot write {path}: it is a folder")
        if path is not None and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            raise Refused(f"cannot write {path}: {path.parent} is not a folder that can be written to")
    if checkpoints is not None:
        there = next(path for path in (checkpoints.absolute(), *checkpoints.absolute().parents) if path.exists())
        if not (there.is_dir() and os.access(there, os.W_OK)):
            raise Refused(f"cannot write {checkpoints}: {there} is not a folder that can be written to")
    if picture is not None and picture.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise Refused(f"--plot FILE must end in .png, .svg or .pdf, got {picture}")
    if parameters is not None and parameters.suffix != ".npz":
        raise Refused(f"--save FILE must end in .npz, got {parameters}")


def check_memory(parameters: int, dtype: str, what: str) -> None:
    """Refuse a network whose parameters, gradients and the optimiser's two moments do not fit into this machine."""
    needed = 4 * parameters * np.dtype(dtype).itemsize
    try:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # the system does not tell
        return
    if needed > there:
        raise Refused(f"{what} need {mib(needed)} for parameters and optimiser, this machine has {mib(there)}")


def mib(n_bytes: float) -> str:
    """Write bytes as mebibytes."""
    return f"{n_bytes / 2**20:,.0f} MiB"


# ------------------------------------------------------------------------------------------------ ranks


def alone_or_on_ranks(
    options: argparse.Namespace, prepare: Callable[[Any], Any], work: Callable[[Any, distributed.Grid | None], Any]
) -> Any:
    """Prepare and work in this process alone, or on the ranks of mpiexec, for which rank 0 speaks.

    What is wrong on one rank is found by `prepare`, without help of the others; `work` is refused by all or none.
    """
    if getattr(options, "class_parallel", 1) == 1 and not launched():  # without MPI, too
        _check_alone()
        return work(prepare(None), None)
    with distributed.run() as comm, contextlib.ExitStack() as stack:
        if comm.rank:
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(silence))
            stack.enter_context(contextlib.redirect_stderr(silence))
        prepared, refusal = None, None
        try:
            grid = distributed.Grid.of(comm, getattr(options, "class_parallel", 1))
            prepared = prepare(comm)
        except (Refused, ValueError, OSError, MemoryError, swl.BackendUnavailable) as error:
            refusal = str(error)
        found = next((text for text in comm.allgather(refusal) if text is not None), None)
        if found is None:
            with swl.use_backend(getattr(options, "backend", None) or active()):
                distributed.own_device(comm)
            try:
                result = work(prepared, grid)
                return result if comm.rank == 0 else 0
            except Refused as error:  # by all ranks
                found = str(error)
        print(f"swl: {found}", file=sys.stderr)
        return 2


def _check_alone() -> None:
    """Refuse to be one of several processes that know nothing of each other and would all write the same files."""
    for launcher, count in (("torchrun", "WORLD_SIZE"), ("srun without MPI", "SLURM_STEP_NUM_TASKS")):
        said = os.environ.get(count, "")
        if said.isdigit() and int(said) > 1:
            raise Refused(
                f"this is one of {said} processes of {launcher} ({count}={said}), which would all do the same and write the "
                f"same files: start them by mpiexec -n {said}, or one alone"
            )


def print_ranks(grid: distributed.Grid | None) -> None:
    """Print how many ranks share what."""
    if grid is not None:
        print(f"{grid.world.size} ranks: rows over {grid.data.size}, classes over {grid.classes.size}")


@contextlib.contextmanager
def refused_data() -> Any:
    """Turn what is wrong with data, packages or checkpoints into a refusal, and a gradient check that failed."""
    try:
        yield
    except DataError as error:
        raise Refused(str(error)) from None
    except GradientError as error:
        raise Refused(f"the check of gradients on the first rows failed: {error}") from None
