"""What `swl train` needs to train on several ranks: a network spread over them, and the whole one in the end."""

from __future__ import annotations

from swl.backends import active, get
from swl.distributed.comm import Grid, gather_numbers, in_blocks
from swl.distributed.data import DataParallel
from swl.distributed.head import ClassParallelHead
from swl.nn.affine import Affine
from swl.nn.fused_head import AffineSoftmaxWithLoss
from swl.nn.losses import SoftmaxWithLoss
from swl.nn.sequential import Sequential
from swl.ops.chunks import DEFAULT_BUDGET
from swl.typing import Array, ArrayLike

__all__ = ["accuracy", "collect", "rows_here", "spread"]


def spread(net: Sequential, grid: Grid) -> DataParallel:
    """Spread a network over the ranks: the classes of its head over a row of the grid, batches over a column.

    Parameters
    ----------
    net : Sequential
        Its head is an `AffineSoftmaxWithLoss`, or an `Affine` and a `SoftmaxWithLoss`; the same on all ranks.
    grid : Grid
    """
    *body, loss = net.layers
    head, budget = loss, DEFAULT_BUDGET
    if isinstance(loss, AffineSoftmaxWithLoss):
        budget = loss.memory_budget
    elif isinstance(loss, SoftmaxWithLoss) and body and isinstance(body[-1], Affine):
        head = body.pop()
    else:
        raise TypeError(f"the head must be an AffineSoftmaxWithLoss, or Affine and SoftmaxWithLoss, got {net!r}")
    shard = ClassParallelHead.of(grid.classes, head.W, head.b, memory_budget=budget, **loss.options._asdict())
    return DataParallel(Sequential(*body, shard), grid.data)


def collect(net: DataParallel) -> Sequential:
    """Give the network that was spread, whole, on every rank."""
    *body, head = net.net.layers
    backend = get(active())
    W, b = (None if p is None else backend.asarray(p) for p in head.gather())
    return Sequential(*body, Affine(W, b), SoftmaxWithLoss(**head.options._asdict()))


def rows_here(batch: Array, grid: Grid) -> Array:
    """Give this rank's share of a batch of rows."""
    start, stop = in_blocks(len(batch), grid.data.size)[grid.data.rank]
    return batch[start:stop]


def accuracy(net: DataParallel, x: ArrayLike, t: ArrayLike, grid: Grid) -> float:
    """Compute the share of rows whose largest score is at the class of the target, each rank on its share of the rows."""
    *body, head = net.net.layers
    x, t = rows_here(x, grid), rows_here(t, grid)
    for layer in body:
        x = layer.predict(x)
    right = head.accuracy(x, t) * len(x) if len(x) else 0.0  # all ranks with these rows have none
    hits, rows = gather_numbers(grid.data, right, len(x)).sum(axis=0)
    return float(hits / rows)
