"""``swl warmup``: compile now what a training loop will call, and keep it on disk."""

from __future__ import annotations

import argparse
from typing import Any

import swl
from swl.cli.common import BACKEND, Refused, add_flags, check_backend
from swl.cli.info import kernel_cache
from swl.warmup import DTYPES

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command."""
    warm = commands.add_parser(
        "warmup", help="compile now what a training loop will call, and keep it on disk", allow_abbrev=False
    )
    warm.add_argument("--dtype", action="append", choices=DTYPES, help="may be repeated; float32 by default")
    add_flags(warm, BACKEND)
    warm.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Compile, and say for what and where it is kept."""
    dtypes, backend = options.dtype or ["float32"], check_backend(options)
    try:
        swl.warmup(dtypes, backend=backend)
    except TypeError as error:  # bfloat16 without its package
        raise Refused(str(error)) from None
    print(f"compiled for {', '.join(dtypes)} on {backend}; kernels are kept in {kernel_cache()}")
    return 0
