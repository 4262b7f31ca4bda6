"""The command ``swl``: ``swl info``, ``warmup``, ``bench``, ``plan`` and ``train``, each in a file of its own."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import swl
from swl.cli.common import Refused

__all__ = ["main"]

COMMANDS = ("info", "warmup", "bench", "plan", "train")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (Refused, swl.BackendUnavailable) as error:
        print(f"swl: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("swl: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="swl", description="Affine, softmax and cross-entropy on NumPy, Numba and CUDA.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"swl {swl.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f"swl.cli.{name}").add(commands)
    return parser
