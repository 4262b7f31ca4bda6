"""A small language model on the English text that comes with Python, as `swl train text` trains it.

The next word is predicted from the ones before it: their embeddings, an Affine, a ReLU, and a head whose classes are all
the words that there are. So nearly all memory is in the logits, which the fused head never stores.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import sysconfig
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import swl
from swl.demos.data import DataError
from swl.demos.train import Progress, fit
from swl.distributed import Checkpoints, Grid
from swl.distributed.comm import gather_numbers
from swl.distributed.training import rows_here, spread

__all__ = ["Corpus", "Result", "Settings", "corpus", "documents", "train", "train_apart", "unigram_perplexity"]

END = "<end>"
"""The word after each document."""
HELD_OUT = 10
"""Every tenth document is kept for the test."""
_WORD = re.compile(r"\w+|[^\w\s]")
_TESTS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3"}


class Corpus(NamedTuple):
    """Text as numbers."""

    vocabulary: list[str]
    """All distinct words, in the order of their characters."""
    train: Any
    """Ids of the words of the documents to train on, int32."""
    held_out: Any
    """Ids of the words of the documents to test on."""


class Settings(NamedTuple):
    """How to train."""

    hidden: int = 64
    epochs: int = 1
    batch_size: int = 4096
    lr: float = 1e-2
    seed: int = 0
    dtype: str = "float32"
    embedding: int = 32
    context: int = 4
    """Words from which the next one is predicted."""
    memory_budget: int = 32 * 2**20
    """Bytes, of the fused head."""


class Result(NamedTuple):
    """What a run leaves."""

    perplexity: float
    """exp of the mean loss over the held-out words."""
    tokens_per_second: float
    peak: int
    """Most bytes of memory that the process ever held."""
    before: int
    """Those held before the first step: Python, libraries, corpus, parameters."""
    history: list[float]
    """Mean loss over the training words during each epoch, in nats."""


# ------------------------------------------------------------------------------------------------ the corpus


def documents() -> Iterator[str]:
    """Give Python's help topics, then every docstring of the standard library's sources, each once.

    Sources are parsed, never imported; the order is that of their names.

    Raises
    ------
    DataError
        If this Python comes without the sources of its library.
    """
    topics = importlib.import_module("pydoc_data.topics").topics
    root, seen, files = Path(sysconfig.get_path("stdlib")), set(topics.values()), 0
    yield from dict.fromkeys(topics[name] for name in sorted(topics))
    for path in sorted(root.rglob("*.py")):
        if _TESTS.isdisjoint(path.relative_to(root).parts):
            files += 1
            for text in _docstrings(path):
                if text not in seen:
                    seen.add(text)
                    yield text
    if not files:
        raise DataError(
            f"swl train text reads the docstrings of Python's library, of which there are no sources in {root}"
        )


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what its authors wrote
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # a template, or another Python's
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def corpus(texts: Iterable[str], limit: int | None = None) -> Corpus:
    """Cut texts into words and signs, number them, and keep every tenth text for the test.

    Parameters
    ----------
    texts : iterable of str
    limit : int, optional
        Use no more than the texts with which the words become this many.

    Raises
    ------
    DataError
        If there are fewer than ten texts.
    """
    parts: tuple[list[str], list[str]] = [], []
    number = -1
    for number, text in enumerate(texts):
        parts[number % HELD_OUT == HELD_OUT - 1].extend((*_WORD.findall(text), END))
        if limit is not None and len(parts[0]) + len(parts[1]) >= limit and parts[1]:
            break
    if not parts[1]:
        raise DataError(f"a corpus needs at least {HELD_OUT} texts, got {number + 1}")
    vocabulary = sorted(set(itertools.chain(*parts)))
    ids = {word: i for i, word in enumerate(vocabulary)}
    return Corpus(vocabulary, *(np.array([ids[word] for word in part], np.int32) for part in parts))


def unigram_perplexity(text: Corpus, context: int) -> float:
    """Compute the held-out perplexity of the words' frequencies in training, with one added to each count."""
    counts = np.bincount(text.train, minlength=len(text.vocabulary)) + 1.0
    return float(np.exp(-np.log(counts / counts.sum())[text.held_out[context:]].mean()))


# ------------------------------------------------------------------------------------------------ training


def build(n_words: int, settings: Settings, head: str) -> swl.Sequential:
    """Make Embedding → Affine → ReLU → head on the active backend; both heads start with the same numbers."""
    rng = np.random.default_rng(settings.seed)
    body = (
        swl.Embedding.init(n_words, settings.embedding, rng=rng, dtype=settings.dtype),
        swl.Affine.init(settings.context * settings.embedding, settings.hidden, rng=rng, dtype=settings.dtype),
        swl.ReLU(),
    )
    last = swl.Affine.init(settings.hidden, n_words, rng=rng, dtype=settings.dtype)
    last.W *= 0.1  # scores start near 0, so the loss at log C
    if head == "unfused":
        return swl.Sequential(*body, last, swl.SoftmaxWithLoss())
    return swl.Sequential(*body, swl.AffineSoftmaxWithLoss(last.W, last.b, memory_budget=settings.memory_budget))


def windows(ids: Any, context: int) -> tuple[Any, Any]:
    """Give the words before each word (n, context), and that word (n,)."""
    view = np.lib.stride_tricks.sliding_window_view(ids, context + 1)
    return view[:, :-1], view[:, -1]


def steps(train_ids: Any, settings: Settings) -> int:
    """Count the steps of a run."""
    return settings.epochs * math.ceil((len(train_ids) - settings.context) / settings.batch_size)


def train(
    train_ids: Any,
    held_out: Any,
    n_words: int,
    settings: Settings,
    head: str = "fused",
    on_step: Callable[[Any], None] = lambda loss: None,
    on_epoch: Callable[[int, float], None] = lambda number, loss: None,
    *,
    grid: Grid | None = None,
    checkpoints: Checkpoints | None = None,
) -> Result:
    """Train with AdamW and a learning rate that falls to 0 along a cosine, then test on the held-out words.

    Parameters
    ----------
    train_ids, held_out : arrays of int, shape (n,)
    n_words : int
        Classes.
    settings : Settings
    head : {"fused", "unfused"}
    on_step, on_epoch : callables
        Told the loss of each step, a 0-d array of the backend; number and mean loss of each epoch.
    grid : swl.distributed.Grid, optional
        Ranks to spread the fused head's classes and the batches over; all of them call this together, with the same
        words and settings.
    checkpoints : swl.distributed.Checkpoints, optional
        Where to save after each epoch; training goes on from the last one there.
    """
    net: Any = build(n_words, settings, head)
    if grid is not None:
        net = spread(net, grid)
    x, t = windows(train_ids, settings.context)

    def batch(rows: Any) -> tuple[Any, Any]:
        return swl.asarray(x[rows]), swl.asarray(t[rows])

    def after(number: int, loss: float) -> float:
        on_epoch(number, loss)
        return loss

    optimizer, rng, before = swl.AdamW(settings.lr), np.random.default_rng(settings.seed), peak_memory()
    history, speed = fit(
        net, optimizer, batch, len(x), settings, rng, after, on_step=on_step, grid=grid, checkpoints=checkpoints
    )
    return Result(perplexity(net, held_out, settings, grid), speed, peak_memory(), before, history)


def perplexity(net: Any, ids: Any, settings: Settings, grid: Grid | None = None) -> float:
    """Compute exp of the mean loss over all words that have enough words before them.

    With a `grid`, each rank takes its share of the words.
    """
    x, t = windows(ids, settings.context)
    words = len(t)
    if grid is not None:
        net, x, t = net.net, rows_here(x, grid), rows_here(t, grid)
    losses: Any = 0.0
    for start in range(0, len(x), settings.batch_size):
        rows = slice(start, start + settings.batch_size)
        losses = losses + net.forward(swl.asarray(x[rows]), swl.asarray(t[rows])) * len(t[rows])
    total = float(losses)
    if grid is not None:
        total = float(gather_numbers(grid.data, total).sum())
    return math.exp(total / words)


def peak_memory() -> int:
    """Return the most bytes of memory that this process ever held.

    On Linux it is VmHWM: the ``ru_maxrss`` of a process counts the one that started it, too.
    """
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024
    resource = importlib.import_module("resource")
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


# ------------------------------------------------------------------------------------------------ a process of its own


def train_apart(text: Corpus, settings: Settings, head: str, backend: str, progress: bool | None = None) -> Result:
    """Run `train` in a process of its own, whose peak memory is that of the training alone; the bar goes to stderr.

    That process ends with this one, however this one ends.

    Raises
    ------
    DataError
        If the process failed.
    """
    job = {
        "words": [len(text.train), len(text.held_out)],
        "n_words": len(text.vocabulary),
        "settings": settings,
        "head": head,
        "backend": backend,
        "progress": progress,
    }
    command = [sys.executable, "-m", "swl.demos.text", json.dumps(job)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as run:
        assert run.stdin is not None
        assert run.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it failed, as its status says
                for words in (text.train, text.held_out):
                    run.stdin.write(words.tobytes())
                run.stdin.flush()
            said = run.stdout.read()  # its stdin stays open until it has ended
        except BaseException:
            run.kill()
            raise
    if run.returncode:
        raise DataError(f"training with the {head} head failed with status {run.returncode}")
    return Result(**json.loads(said))


def _end_with_parent() -> None:
    """End this process when the one that started it has gone: nobody then holds the other end of stdin."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _child(job: dict[str, Any]) -> None:
    train_ids, held_out = (np.frombuffer(sys.stdin.buffer.read(4 * words), np.int32) for words in job["words"])
    _end_with_parent()
    settings, head = Settings(*job["settings"]), job["head"]
    with swl.use_backend(job["backend"]), Progress(job["progress"], head) as progress:
        progress.start(steps(train_ids, settings))
        result = train(train_ids, held_out, job["n_words"], settings, head, progress.step)
    print(json.dumps(result._asdict()))


if __name__ == "__main__":
    _child(json.loads(sys.argv[1]))
