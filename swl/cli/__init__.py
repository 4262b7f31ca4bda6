"""The command ``swl``: ``swl info``, ``warmup``, ``bench``, ``plan``, ``train`` and ``completion``, each in a file of its own."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import swl
from swl.cli.common import Refused
from swl.demos.data import DataError
from swl.distributed.checkpoint import PASSED_OVER

__all__ = ["main"]

COMMANDS = ("info", "warmup", "bench", "plan", "train", "completion")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    A command gives its results as a mapping, which is printed under ``--json`` in place of its text, or an exit status.
    What the user can cure is one line and status 2.
    """
    options = _parser().parse_args(arguments)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_warnings_in_one_line())
            if getattr(options, "json", False):
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            result = options.run(options)
        if isinstance(result, int):
            return result
        if result is not None and getattr(options, "json", False):
            print(json.dumps(_plain(result), allow_nan=False))
        sys.stdout.flush()  # a closed pipe shows here
        return 0
    except BrokenPipeError:  # `swl info | head -1`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a program that the signal of a closed pipe ends
    except (Refused, DataError, swl.BackendUnavailable) as error:
        message = str(error)
    except MemoryError as error:
        message = f"not enough memory: {error or 'none is left'}"
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)
    except KeyboardInterrupt:
        print("swl: interrupted", file=sys.stderr)
        return 130
    print(f"swl: {' '.join(message.split())}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def _warnings_in_one_line() -> Any:
    """Print the warning of a damaged checkpoint as the command's other messages: it is for the user, not for programmers."""
    with warnings.catch_warnings():
        show: Any = warnings.showwarning

        def showwarning(message: Any, category: Any, *rest: Any) -> None:
            if str(message).endswith(PASSED_OVER):
                print(f"swl: {message}", file=sys.stderr)
            else:
                show(message, category, *rest)

        warnings.filterwarnings("always", f".*{PASSED_OVER}$", RuntimeWarning)
        warnings.showwarning = showwarning  # type: ignore[assignment]
        yield


def _plain(value: Any) -> Any:
    """Bring results to what JSON has; a number that is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="swl", description="Affine, softmax and cross-entropy on NumPy, Numba and CUDA.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"swl {swl.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name in COMMANDS:
        importlib.import_module(f"swl.cli.{name}").add(commands)
    return parser
