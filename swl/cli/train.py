"""``swl train``: train a classifier on digits or on arrays of one's own, or a language model (`swl.cli.text`)."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

import swl
from swl import distributed
from swl.backends import active
from swl.cli import text
from swl.cli.common import (
    BACKEND,
    DISTRIBUTED,
    JSON,
    PROGRESS,
    add_flags,
    add_settings,
    alone_or_on_ranks,
    check_backend,
    check_memory,
    check_outputs,
    print_ranks,
    refused_data,
    settings_of,
)
from swl.demos import data as datasets
from swl.demos import train as training
from swl.demos.train import Settings
from swl.nn.gradcheck import GradientReport

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command, and the data sets that it knows as commands of its own."""
    train = commands.add_parser(
        "train",
        help="train a classifier; `swl train text`: a language model",
        description="Train Affine, ReLU, Affine, SoftmaxWithLoss; the last line printed is the test accuracy.",
        epilog="`swl train text` trains a language model with the fused head; see `swl train text --help`.",
        allow_abbrev=False,
    )
    datasets_ = train.add_subparsers(metavar="DATASET", title="data sets")
    digits = datasets_.add_parser("digits", help="1,797 handwritten digits, from scikit-learn", allow_abbrev=False)
    text.add(datasets_)
    for parser in (train, digits):
        add_flags(
            parser,
            ("data", {"type": Path, "metavar": "FILE.npz", "help": "your arrays x (N, ...) and t (N,) or (N, C)"}),
            BACKEND,
        )
        add_settings(parser, Settings)
        add_flags(
            parser,
            *DISTRIBUTED,
            JSON,
            PROGRESS,
            ("plot", {"type": Path, "metavar": "FILE", "help": "save a picture of loss and accuracy"}),
            ("save", {"type": Path, "metavar": "FILE", "help": "save the parameters, as .npz"}),
        )

    train.set_defaults(
        run=lambda options: (
            run(options) if hasattr(options, "data") else train.error("one of the arguments dataset --data is required")
        )
    )
    digits.set_defaults(
        run=lambda options: (
            run(options) if not hasattr(options, "data") else digits.error("argument --data: not allowed with digits")
        )
    )


def run(options: argparse.Namespace) -> Any:
    """Train alone, or on the ranks of mpiexec."""
    return alone_or_on_ranks(
        options, lambda comm: _prepare(options), lambda prepared, grid: _train(prepared, options, grid)
    )


def _prepare(options: argparse.Namespace) -> tuple[datasets.Data, Settings]:
    """Check what can be checked, and load the data."""
    picture = getattr(options, "plot", None)
    check_outputs(picture, getattr(options, "save", None), getattr(options, "checkpoint", None))
    with refused_data():
        if getattr(options, "progress", False):
            datasets.require("tqdm", "--progress")
        if picture is not None:
            datasets.require("matplotlib", "--plot")
        data = datasets.from_file(options.data) if hasattr(options, "data") else datasets.digits()
    check_backend(options)
    settings = settings_of(options, Settings)
    parameters = (data.x.shape[1] + 1) * settings.hidden + (settings.hidden + 1) * data.n_classes
    check_memory(parameters, settings.dtype, f"--hidden {settings.hidden} and {data.n_classes} classes")
    return data, settings


def _train(
    prepared: tuple[datasets.Data, Settings], options: argparse.Namespace, grid: distributed.Grid | None
) -> dict[str, Any] | None:
    data, settings = prepared
    (N, D), leads = data.x.shape, grid is None or grid.world.rank == 0
    checkpoints = distributed.Checkpoints(options.checkpoint, grid) if hasattr(options, "checkpoint") else None
    with contextlib.ExitStack() as stack:
        stack.enter_context(swl.use_backend(check_backend(options)))
        name = active()
        print(f"backend {name}, {settings.dtype}; {data.name}: {N} rows of {D} numbers, {data.n_classes} classes")
        print_ranks(grid)
        progress = stack.enter_context(training.Progress(getattr(options, "progress", None) if leads else False))

        def on_start(net: swl.Sequential, report: GradientReport, steps: int) -> None:
            progress.start(steps)
            progress.print(f"{net!r}")
            progress.print(f"gradients checked: worst relative error {report.worst:.1e}, tolerance {report.tol:.0e}")

        def on_epoch(number: int, epoch: training.Epoch) -> None:
            progress.print(f"epoch {number:3}  loss {epoch.loss:.8f}  validation accuracy {epoch.validation:.4f}")

        stack.enter_context(refused_data())  # a checkpoint of another run
        result = training.train(
            data,
            settings,
            on_start=on_start,
            on_step=progress.step,
            on_epoch=on_epoch,
            grid=grid,
            checkpoints=checkpoints,
        )
    print(f"throughput {result.rows_per_second:,.0f} rows/s")
    if hasattr(options, "plot") and leads:
        training.plot(options.plot, result, f"{data.name}, backend {name}")
        print(f"picture in {options.plot}")
    if hasattr(options, "save") and leads:
        training.save(options.save, result.net)
        print(f"parameters in {options.save}")
    print(f"test accuracy {result.test_accuracy:.4f}")
    return {
        "backend": name,
        "data": {"name": data.name, "rows": N, "inputs": D, "classes": data.n_classes},
        "settings": settings._asdict(),
        "epochs": [{"epoch": i, **epoch._asdict()} for i, epoch in enumerate(result.history, 1)],
        "rows_per_second": result.rows_per_second,
        "test_accuracy": result.test_accuracy,
    }
