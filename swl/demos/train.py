"""Training of a classifier with one hidden layer, as `swl train` does it."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import swl
from swl.demos.data import Data, DataError, Part, require, split
from swl.distributed import Checkpoints, Grid
from swl.distributed.checkpoint import write_whole
from swl.distributed.training import accuracy as spread_accuracy
from swl.distributed.training import collect, rows_here, spread
from swl.nn.gradcheck import GradientReport

__all__ = ["Epoch", "Progress", "Result", "Settings", "fit", "plot", "save", "train"]


class Settings(NamedTuple):
    """How to train."""

    hidden: int = 200
    epochs: int = 30
    batch_size: int = 32
    lr: float = 3e-3
    seed: int = 0
    dtype: str = "float64"
    """float64 keeps the losses of two backends together to 1e-5 and better over all epochs; float32 is faster."""
    scale: str | None = None
    """Divide inputs by the deviation of "all" of them, or of "each" feature; None: as the data says."""


LABEL_SMOOTHING = 0.1
WEIGHT_DECAY = 0.1


class Epoch(NamedTuple):
    """One line of the history."""

    loss: float
    """Mean loss over the training rows during the epoch, label smoothing included, in nats."""
    validation: float
    """Accuracy on the validation rows after it."""


class Result(NamedTuple):
    """What training leaves."""

    net: swl.Sequential
    """Takes inputs as they are in the data; the scaling is part of its first layer."""
    history: list[Epoch]
    test_accuracy: float
    rows_per_second: float


def build(D: int, C: int, settings: Settings, rng: np.random.Generator) -> swl.Sequential:
    """Make Affine → ReLU → Affine → SoftmaxWithLoss on the active backend."""
    return swl.Sequential(
        swl.Affine.init(D, settings.hidden, rng=rng, dtype=settings.dtype),
        swl.ReLU(),
        swl.Affine.init(settings.hidden, C, rng=rng, dtype=settings.dtype),
        swl.SoftmaxWithLoss(label_smoothing=LABEL_SMOOTHING),
    )


def train(
    data: Data,
    settings: Settings,
    *,
    on_start: Callable[[swl.Sequential, GradientReport, int], None] = lambda net, report, steps: None,
    on_step: Callable[[Any], None] = lambda loss: None,
    on_epoch: Callable[[int, Epoch], None] = lambda number, epoch: None,
    grid: Grid | None = None,
    checkpoints: Checkpoints | None = None,
) -> Result:
    """Check the gradients once, then train with AdamW and a learning rate that falls to 0 along a cosine.

    Parameters
    ----------
    data : Data
    settings : Settings
    on_start, on_step, on_epoch : callables
        Told about the network, its gradient check and the number of steps; the loss of each step, a 0-d array; each
        epoch.
    grid : swl.distributed.Grid, optional
        Ranks to spread network and batches over; all of them call this together, with the same data and settings.
    checkpoints : swl.distributed.Checkpoints, optional
        Where to save after each epoch; training goes on from the last one there.

    Raises
    ------
    swl.nn.gradcheck.GradientError
        If the gradients are wrong on this machine.
    """
    rng = np.random.default_rng(settings.seed)
    parts = split(data)
    shift, scale = _scaling(parts.train.x, settings.scale or data.scale)

    def ready(part: Part) -> Part:
        return Part(swl.asarray(((part.x - shift) / scale).astype(settings.dtype)), swl.asarray(part.t))

    training, validation, test = map(ready, parts)
    net: Any = build(data.x.shape[1], data.n_classes, settings, rng)
    steps = settings.epochs * math.ceil(len(training.x) / settings.batch_size)
    on_start(net, swl.check_gradients(net, training.x[:8], training.t[:8], projections=3), steps)
    if grid is not None:
        net = spread(net, grid)

    def batch(rows: Any) -> tuple[Any, Any]:
        here = swl.asarray(rows)
        return training.x[here], training.t[here]

    def after(number: int, loss: float) -> Epoch:
        epoch = Epoch(loss, accuracy(net, validation, grid))
        on_epoch(number, epoch)
        return epoch

    optimizer = swl.AdamW(settings.lr, weight_decay=WEIGHT_DECAY)
    history, speed = fit(
        net,
        optimizer,
        batch,
        len(training.x),
        settings,
        rng,
        after,
        on_step=on_step,
        grid=grid,
        checkpoints=checkpoints,
    )
    test_accuracy = accuracy(net, test, grid)
    if grid is not None:
        net = collect(net)
    _absorb(net, shift, scale)
    return Result(net, [Epoch(*epoch) for epoch in history], test_accuracy, speed)


def fit(
    net: Any,
    optimizer: Any,
    batch: Callable[[Any], tuple[Any, Any]],
    rows: int,
    settings: Any,
    rng: np.random.Generator,
    after: Callable[[int, float], Any],
    *,
    on_step: Callable[[Any], None] = lambda loss: None,
    grid: Grid | None = None,
    checkpoints: Checkpoints | None = None,
) -> tuple[list[Any], float]:
    """Train epoch by epoch, in batches of rows in random order, with a learning rate that falls to 0 along a cosine.

    Parameters
    ----------
    net : Sequential or DataParallel
        DataParallel where there is a `grid`.
    optimizer : swl.SGD or swl.AdamW
    batch : callable
        Takes row numbers, NumPy int64 (n,), and gives the inputs and targets of these rows.
    rows : int
        Rows in all.
    settings : NamedTuple
        With `epochs`, `batch_size` and `lr`; a checkpoint is of a run with the same settings, but for `epochs`.
    rng : numpy.random.Generator
        Of the order of the rows: in the same state on all ranks.
    after : callable
        Takes the number of an epoch, from 1, and the mean loss over its rows in nats; gives what the history is to hold
        of it, which JSON must be able to.
    on_step : callable
        Told the loss of each step, a 0-d array of the backend.
    grid : swl.distributed.Grid, optional
        Each rank takes its share of the rows of each batch.
    checkpoints : swl.distributed.Checkpoints, optional
        Where to save after each epoch; training goes on from the last one there.

    Returns
    -------
    history : list
    speed : float
        Rows per second; 0 if there was nothing left to do.

    Raises
    ------
    swl.demos.data.DataError
        If the last checkpoint is of a run with other settings or data, or damaged.
    """
    run = {"settings": {name: value for name, value in settings._asdict().items() if name != "epochs"}, "rows": rows}
    history: list[Any] = []
    if checkpoints is not None:
        try:
            found = checkpoints.load(net, optimizer, expect=run)
        except ValueError as error:
            raise DataError(str(error)) from None
        history = [] if found is None else found[1]["history"]
    parameters, size = net.parameters(), settings.batch_size
    per_epoch, done, seconds = math.ceil(rows / size), len(history), 0.0
    for number in range(1, settings.epochs + 1):
        order = rng.permutation(rows)
        if number <= done:
            continue
        begin, total = time.perf_counter(), 0.0
        for i in range(per_epoch):
            chosen = order[i * size : (i + 1) * size]
            step = (number - 1) * per_epoch + i
            optimizer.lr = settings.lr * 0.5 * (1 + math.cos(math.pi * step / (settings.epochs * per_epoch)))
            loss, _ = net.forward_backward(*batch(chosen if grid is None else rows_here(chosen, grid)))
            optimizer.update(parameters, net.gradients())
            total = total + loss * len(chosen)
            on_step(loss)
        mean = float(total) / rows  # on a GPU, the one wait of an epoch
        seconds += time.perf_counter() - begin
        history.append(after(number, mean))
        if checkpoints is not None:
            checkpoints.save(number, net, optimizer, {"history": history, **run})
    trained = (len(history) - done) * rows
    return history, trained / seconds if trained else 0.0


class Progress:
    """A bar of the steps on stderr, and lines printed above it; without tqdm, or where none is wanted, only the lines.

    Parameters
    ----------
    shown : bool or None
        Show a bar: by default on a terminal, if tqdm is installed.
    name : str
        Before the bar.

    Raises
    ------
    swl.demos.data.DataError
        If a bar is asked for and tqdm is not installed.
    """

    def __init__(self, shown: bool | None = None, name: str | None = None) -> None:
        self.bar = None
        if shown or (shown is None and sys.stderr.isatty()):
            try:
                tqdm = require("tqdm", "--progress").tqdm
            except DataError:
                if shown:
                    raise
            else:
                self.bar = tqdm(unit="step", file=sys.stderr, leave=False, desc=name)

    def start(self, steps: int) -> None:
        """Begin anew, with this number of steps to come."""
        if self.bar is not None:
            self.bar.reset(total=steps)

    def step(self, loss: Any) -> None:
        """Move on by a step."""
        if self.bar is not None:
            if self.bar.n % 10 == 0:  # a device is waited for only now and then
                self.bar.set_postfix(loss=f"{float(loss):.3f}", refresh=False)
            self.bar.update()

    def print(self, line: str) -> None:
        """Print a line to standard output, above the bar."""
        if self.bar is not None:
            self.bar.clear()
        print(line, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()


def accuracy(net: Any, part: Part, grid: Grid | None = None) -> float:
    """Compute the share of rows whose largest score is at the class of the target."""
    if grid is not None:
        return spread_accuracy(net, part.x, part.t, grid)
    best = part.t.argmax(axis=1) if part.t.ndim == 2 else part.t
    return float((net.predict(part.x).argmax(axis=1) == best).mean())


def _scaling(x: Any, how: str) -> tuple[Any, Any]:
    """Shift and scale (D,) that bring the training rows to mean 0 and deviation 1."""
    if how == "each":
        shift, scale = x.mean(axis=0), x.std(axis=0)
    else:
        shift, scale = np.full(x.shape[1], x.mean()), np.full(x.shape[1], x.std())
    return shift, np.where(scale > 0, scale, 1)  # a constant feature carries nothing


def _absorb(net: swl.Sequential, shift: Any, scale: Any) -> None:
    """Let the first layer take raw inputs: ``((x − shift)/scale)·W + b = x·(W/scale) + (b − shift·(W/scale))``."""
    state = net.state_dict()
    state["0.W"] = state["0.W"] / scale[:, None]
    state["0.b"] = state["0.b"] - shift @ state["0.W"]
    net.load_state_dict(state)


def save(path: Path, net: swl.Sequential) -> None:
    """Save the parameters as an ``.npz`` file: all of it or nothing, if interrupted."""
    write_whole(path, lambda file: np.savez(file, **net.state_dict()))


def plot(path: Path, result: Result, title: str) -> None:
    """Draw loss and accuracy over the epochs."""
    figure = require("matplotlib.figure", "--plot").Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = range(1, len(result.history) + 1)
    left.plot(epochs, [epoch.loss for epoch in result.history])
    left.set(xlabel="epoch", ylabel="training loss, smoothed (nats)")
    right.plot(epochs, [epoch.validation for epoch in result.history], label="validation")
    label = f"test, in the end: {result.test_accuracy:.4f}"
    right.axhline(result.test_accuracy, color="gray", linestyle="--", label=label)
    right.set(xlabel="epoch", ylabel="accuracy")
    right.legend()
    figure.suptitle(title)
    kind = path.suffix[1:] or "png"
    write_whole(path, lambda file: figure.savefig(file, format=kind, dpi=150))
