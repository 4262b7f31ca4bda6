"""``swl train text``: a next-word model with the fused head, and with the unfused one beside it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np

import swl
from swl import distributed
from swl.cli.common import (
    BACKEND,
    DISTRIBUTED,
    JSON,
    PROGRESS,
    Refused,
    add_flags,
    add_settings,
    alone_or_on_ranks,
    at_least,
    check_backend,
    check_memory,
    check_outputs,
    mib,
    print_ranks,
    refused_data,
    settings_of,
)
from swl.demos import text, train
from swl.demos.data import require
from swl.distributed.comm import from_rank_0, gather_numbers

__all__ = ["add"]


def add(datasets: Any) -> None:
    """Add the command."""
    parser = datasets.add_parser(
        "text",
        help="a next-word model on Python's own documentation",
        description="Train a next-word model on Python's own documentation: once with the fused head and once with the "
        "unfused one, each in a process of its own, so that their peak memory can be compared. On the ranks of mpiexec: "
        "with the fused head, spread over them.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--head", choices=["both", "fused", "unfused"], help="which to train with; over ranks fused, else both"
    )
    parser.add_argument("--unfused", action="store_const", const="unfused", dest="head", help="as --head unfused")
    add_flags(parser, BACKEND)
    add_settings(parser, text.Settings)
    parser.add_argument("--limit", type=at_least(int, 1), metavar="N", help="use only about the first N words")
    add_flags(parser, *DISTRIBUTED, JSON, PROGRESS)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> Any:
    """Train in a process of its own for each head, or on the ranks of mpiexec."""
    for name in ("data", "scale", "plot", "save"):  # given before the word text, where they mean something
        if hasattr(options, name):
            raise Refused(f"--{name} is not allowed with text")
    return alone_or_on_ranks(options, lambda comm: _check(options, comm), lambda _, grid: _train(options, grid))


def _check(options: argparse.Namespace, comm: Any) -> None:
    if comm is not None and options.head not in (None, "fused"):
        raise Refused(f"--head {options.head}: over ranks there is only the fused head, of which each has a part")
    if comm is None and hasattr(options, "checkpoint") and options.head not in (None, "fused"):
        raise Refused("--checkpoint needs --head fused: two heads are trained one after the other, and compared")
    check_outputs(None, None, getattr(options, "checkpoint", None))
    check_backend(options)
    if getattr(options, "progress", False):
        with refused_data():
            require("tqdm", "--progress")


def _train(options: argparse.Namespace, grid: distributed.Grid | None) -> dict[str, Any] | None:
    settings, backend = settings_of(options, text.Settings), check_backend(options)
    apart = grid is None and not hasattr(options, "checkpoint")
    chosen = options.head or ("both" if apart else "fused")
    heads = ("fused", "unfused") if chosen == "both" else (chosen,)
    results = {}

    def read() -> text.Corpus:
        return text.corpus(text.documents(), options.limit)

    with refused_data():  # no text, a process that failed, or a checkpoint of another run
        words = read() if grid is None else from_rank_0(grid.world, read)  # one text, whatever the ranks' Pythons have
        sizes = f"{len(words.train):,} words to train on, {len(words.held_out):,} held out"
        print(f"backend {backend}, {settings.dtype}; text: {sizes}, {len(words.vocabulary):,} distinct", flush=True)
        print_ranks(grid)
        _check_sizes(words, settings)
        for head in heads:
            if apart:
                found = text.train_apart(words, settings, head, backend, getattr(options, "progress", None))
                for number, loss in enumerate(found.history, 1):
                    _print_epoch(number, loss)
            else:
                found = _train_here(words, settings, options, backend, grid)
            results[head] = found
            print(
                f"{head:<8}perplexity {found.perplexity:.2f}  {found.tokens_per_second:,.0f} tokens/s  "
                f"peak memory {mib(found.peak)}, {mib(found.before)} of it before the first step",
                flush=True,
            )
    if len(results) == 2:
        logits = settings.batch_size * len(words.vocabulary) * np.dtype(settings.dtype).itemsize
        peaks = " and ".join(f"{mib(found.peak)} {head}" for head, found in results.items())
        print(f"peak memory {peaks}; the logits of a batch are {mib(logits)}")
    unigram = text.unigram_perplexity(words, settings.context)
    print(f"test perplexity {results[heads[0]].perplexity:.1f}, of the unigram baseline {unigram:.1f}")
    return {
        "backend": backend,
        "words": {"train": len(words.train), "held_out": len(words.held_out), "distinct": len(words.vocabulary)},
        "settings": settings._asdict(),
        "heads": {head: found._asdict() for head, found in results.items()},
        "unigram_perplexity": unigram,
    }


def _check_sizes(words: text.Corpus, settings: text.Settings) -> None:
    """Refuse what the text is too short for, or the machine too small."""
    shortest = min(len(words.train), len(words.held_out))
    if settings.context >= shortest:
        raise Refused(f"--context must be less than the {shortest:,} words of the shorter part, got {settings.context}")
    V, H, E = len(words.vocabulary), settings.hidden, settings.embedding
    parameters = V * E + (settings.context * E + 1) * H + (H + 1) * V
    check_memory(parameters, settings.dtype, f"--hidden {H} and --embedding {E}")


def _train_here(
    words: text.Corpus,
    settings: text.Settings,
    options: argparse.Namespace,
    backend: str,
    grid: distributed.Grid | None,
) -> text.Result:
    """Train the fused head in this process, or on all ranks; the memory is that of the rank that had most."""
    leads, folder = grid is None or grid.world.rank == 0, getattr(options, "checkpoint", None)
    shown = getattr(options, "progress", None) if leads else False
    with swl.use_backend(backend), train.Progress(shown, "fused") as progress:
        progress.start(text.steps(words.train, settings))
        found = text.train(
            words.train,
            words.held_out,
            len(words.vocabulary),
            settings,
            on_step=progress.step,
            on_epoch=lambda number, loss: _print_epoch(number, loss, progress.print),
            grid=grid,
            checkpoints=None if folder is None else distributed.Checkpoints(folder, grid),
        )
    if grid is None:
        return found
    peak, before = gather_numbers(grid.world, found.peak, found.before).max(axis=0)
    return found._replace(peak=int(peak), before=int(before))


def _print_epoch(number: int, loss: float, say: Callable[[str], None] = print) -> None:
    say(f"epoch {number:3}  loss {loss:.8f}")
