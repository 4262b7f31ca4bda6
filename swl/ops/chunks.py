"""Affine, softmax and cross-entropy in chunks, so that the (N, C) logits are never stored.

A chunk is a block of the logits. While it is at hand its loss is taken and its gradient written over it, which then gives its
share of all gradients: three matrix products in all, as many as with stored logits. Only where the budget does not hold the
logits of a few rows are the classes cut too; then a first sweep finds each row's M and S, and a second one forms the logits
again::

    rows (chunks of rows, whole)           classes (chunks of both)
    logits = x[r]·W                        for each c:  logits = x[r]·W[:, c];  rows_c = forward(logits)
    G = forward_backward(logits)           rows = combine(rows_c)
    dx[r] = G·Wᵀ                           for each c:  logits = x[r]·W[:, c];  G = backward(logits, rows)
    dW += x[r]ᵀ·G                                       dx[r] += G·W[:, c]ᵀ;  dW[:, c] += x[r]ᵀ·G

The bias is folded into the loss kernels.

Where a device multiplies 16-bit operands, each chunk of rows would read and write a float32 ``dW``, which takes longer than the
product itself. So the 16-bit ``G`` of many rows is kept for one product of them all: of all rows where that takes no more memory
than the float32 ``dW`` would, or else of as many as have room where the 16-bit ``dW`` will be.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from swl.backends import Rows
from swl.backends.protocol import Target
from swl.ops.checks import acc_dtype, check_needs, float_dtype, require_integer
from swl.ops.loss import Problem
from swl.ops.rows import combine, plain_mass
from swl.ops.targets import ChunkedProbabilities
from swl.typing import Array, DTypeLike

__all__ = ["DEFAULT_BUDGET", "Plan", "Swept", "plan", "require_budget", "sweep"]

DEFAULT_BUDGET = 256 * 2**20
"""Bytes of working memory when the caller names none (docs/performance.md, "The fused head")."""

MIN_ROWS = 64
"""Rows below which a product of whole rows is no longer efficient, and classes are cut instead."""


class Plan(NamedTuple):
    """How a fused head is cut; printing it says so in words."""

    N: int
    D: int
    C: int
    rows: int
    """Rows of a chunk."""
    classes: int
    """Classes of a chunk; C where only rows are cut."""
    tile: int
    """Classes of ``dW`` that are added to at a time; 0 where it is not needed."""
    itemsize: int
    """Bytes of a number in the arithmetic."""
    products: int
    """Matrix products of N·D·C multiply-adds each."""
    memory_budget: int
    stored: int
    """Bytes of a number in the inputs; fewer than `itemsize` for 16-bit ones."""
    sums: int
    """Numbers of the temporaries of what is added up over chunks."""
    accumulators: int
    """Bytes beside the budget, of 16-bit inputs in several chunks of rows: a ``dW`` to add up in, or all rows if `kept`."""
    kept: int
    """Rows whose gradient of the logits is kept for one product, on a device; 0: each chunk has its own."""

    @property
    def chunks(self) -> int:
        """Chunks in all."""
        return -(-self.N // self.rows) * -(-self.C // self.classes) if self.N else 0

    @property
    def bytes(self) -> int:
        """Working memory: a chunk's logits, and the temporaries of what is added up over chunks."""
        return self.itemsize * (min(self.rows, self.N) * min(self.classes, self.C) + self.sums)

    @property
    def flops(self) -> int:
        """Floating-point operations of the products."""
        return 2 * self.products * self.N * self.D * self.C

    def __str__(self) -> str:
        what = "the logits' gradients are kept" if self.kept >= self.N else "dW is added up"
        wider = f"; {what} in {self.accumulators / 2**20:.1f} MiB beside it" if self.accumulators else ""
        return (
            f"linear_cross_entropy of {self.N} rows, {self.D} inputs, {self.C} classes\n"
            f"  chunks  {self.chunks} of {self.rows} rows × {self.classes} classes\n"
            f"  memory  {self.bytes / 2**20:.1f} MiB of a budget of {self.memory_budget / 2**20:.1f} MiB; "
            f"all logits are {self.N * self.C * self.itemsize / 2**20:.1f} MiB{wider}\n"
            f"  work    {self.products} products, {self.flops / 1e9:.1f} Gflop"
        )


def plan(
    N: int,
    D: int,
    C: int,
    *,
    dtype: DTypeLike = np.float32,
    needs: Collection[str] = ("dx", "dW", "db"),
    memory_budget: int = DEFAULT_BUDGET,
    device: bool = False,
) -> Plan:
    """Say how `swl.linear_cross_entropy_value_and_grad` cuts a problem.

    Parameters
    ----------
    N, D, C : int
        Rows, inputs, classes.
    dtype : dtype
        Of the inputs; float64 computes in float64, all others in float32.
    needs : collection of {"dx", "dW", "db"}
        Empty for the loss alone.
    memory_budget : int
        Bytes of working memory, inputs and outputs not counted. It is kept from ``4·D + 1`` numbers on; a smaller one
        gets the smallest chunks. Not in it are the ``dW`` of 16-bit inputs while it is added up (`Plan.accumulators`) and, on
        a host, the float32 copies of such inputs and what each thread of the CPU keeps as scratch, 1.1 to 4 MiB for a dtype. The
        NumPy backend, the specification, holds several arrays of a chunk's size.
    device : bool
        Whether the arrays are on a GPU, which multiplies 16-bit inputs as they are (docs/cuda.md).

    Returns
    -------
    Plan
        Chunks as large as the budget allows.

    Raises
    ------
    ValueError
        If a size is negative or the budget is not positive.

    Examples
    --------
    >>> import swl
    >>> print(swl.plan(4096, 768, 50257))
    linear_cross_entropy of 4096 rows, 768 inputs, 50257 classes
      chunks  4 of 1024 rows × 50257 classes
      memory  208.3 MiB of a budget of 256.0 MiB; all logits are 785.3 MiB
      work    3 products, 948.6 Gflop
    """
    for name, size in (("N", N), ("D", D), ("C", C)):
        require_integer(name, size, 0)
    require_budget(memory_budget)
    needs = check_needs(needs)
    dtype = float_dtype("dtype", dtype)
    stored, itemsize = dtype.itemsize, acc_dtype(dtype).itemsize
    room = memory_budget // itemsize  # in numbers
    tile = max(1, min(C, 2048, room // (16 * max(D, 1)))) if "dW" in needs and not device else 0
    across = int("dx" in needs) if device else 2  # temporaries of a chunk's dx, where it adds up over classes

    def cut(rows: int, classes: int) -> Plan:
        again = bool(needs) and classes < C  # the logits are formed twice
        products = 1 + len(needs & {"dx", "dW"}) + again
        sums = (2 * D * tile if rows < N else 0) + (across * rows * D if classes < C else 0)
        kept = wide = 0
        if "dW" in needs and rows < N and stored < itemsize:
            wide = itemsize * D * C
            if device and stored * N * C <= wide:
                kept, wide = N, stored * N * C
            elif device and 2 * rows <= D:
                kept = D // rows * rows  # they fill the memory of dW
        return Plan(N, D, C, rows, classes, tile, itemsize, products, memory_budget, stored, sums, wide, kept)

    if room >= N * C:
        return cut(max(N, 1), max(C, 1))
    rows = (room - 2 * D * tile) // C
    if rows >= min(N, MIN_ROWS):
        return cut(_even(N, rows), C)
    rows = max(1, min(N, 4 * MIN_ROWS, room // (4 * max(D, 1))))
    fixed = (2 * D * tile if rows < N else 0) + across * rows * D
    return cut(rows, _even(C, max(1, min(C, (room - fixed) // rows))))


def require_budget(memory_budget: Any) -> None:
    """Check a ``memory_budget=`` argument."""
    if isinstance(memory_budget, bool) or not isinstance(memory_budget, int | np.integer):
        raise TypeError(f"memory_budget must be a number of bytes, an integer, got {memory_budget!r}")
    if memory_budget <= 0:
        raise ValueError(f"memory_budget must be above 0 bytes, got {memory_budget}")


def _even(total: int, most: int) -> int:
    """Size of the parts when `total` is cut into as few of at most `most` as can be, all about the same."""
    parts = -(-total // most)
    return -(-total // parts)


def cuts(total: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut ``range(total)`` into ranges of `size`, the last one shorter."""
    for start in range(0, total, size):
        yield start, min(start + size, total)


class Gradients(NamedTuple):
    """Where gradients go; None where not needed."""

    dx: Array
    dW: Array  # noqa: N815 - the book's name
    db: Array


def sweep(
    p: Problem,
    x: Array,
    W: Array,
    cut: Plan,
    *,
    row_scale: Array = None,
    into: Gradients | None = None,
    known: Rows | None = None,
    stats: bool = False,
    across: Callable[[Rows, Target, Any], Rows] | None = None,
    kept: Any = None,
    loss: Swept | None = None,
) -> Rows:
    """Run the loss of ``x·W + bias`` in chunks, and its gradients if `into` says where to.

    Parameters
    ----------
    p : Problem
        The loss; its target carries the bias.
    x, W : array, shapes (N, D) and (D, C)
    cut : Plan
    row_scale : array, shape (N,) or (1,)
        As the backends take it.
    into : Gradients, optional
        Arrays of the shapes of x, W and (C,), to be overwritten, of float32 or better where chunks add up in them.
    known : Rows, optional
        Of an earlier forward sweep: spares a second one where it can.
    stats : bool
    across : callable, optional
        Where `W` is a shard of the classes: takes the rows of a chunk here, its target, and with `stats` the target's
        plain mass here (`swl.ops.rows`), and gives the rows over all shards. Called once per chunk of rows, in order.
    kept : array, shape (cut.kept, C), optional
        Where the gradients of the logits are kept; given where `cut.kept` is not 0.
    loss : Swept, optional
        Another function of the logits than the cross-entropy.

    Returns
    -------
    Rows, of all N rows
    """
    backend, xp = p.backend, p.backend.xp
    N, C = x.shape[0], W.shape[1]
    buffer = backend.empty((min(cut.rows, N) * cut.classes,), p.acc)
    parts: list[Rows] = []
    together = cut.rows if kept is None else cut.kept
    for r0, r1 in cuts(N, cut.rows):
        target = p.target.rows(r0, r1)
        scale = row_scale if row_scale is None or row_scale.shape[0] == 1 else row_scale[r0:r1]
        g0 = r0 // together * together
        mine = None if kept is None else kept[r0 - g0 : r1 - g0]
        chunk = _Chunk(p, loss or backend, x[r0:r1], W, buffer, cut, r0 == 0, across, mine)
        rows = None if known is None else known.cut(r0, r1)
        here = None if into is None else into._replace(dx=None if into.dx is None else into.dx[r0:r1])
        if cut.classes >= C:
            rows = chunk.whole(target, scale, here, rows, stats)
        else:
            if rows is None:
                rows = chunk.forward(target, stats)
            if here is not None:
                chunk.backward(target, scale, here, rows)
        if kept is not None and into is not None and r1 in (g0 + together, N):
            chunk._replace(x=x[g0:r1], first=g0 == 0, kept=None).add(kept[: r1 - g0], into, 0, C)
        parts.append(rows)
    if not parts:
        if into is not None:
            for gradient in into:
                if gradient is not None:
                    gradient[...] = 0
        return Rows.of_none(xp, p.acc, stats)
    return Rows.joined(xp, parts)


class Swept(Protocol):
    """A function of stored logits, and its gradient: a backend's cross-entropy, or another one with the same sweeps."""

    def cross_entropy_forward(self, logits: Array, target: Target, stats: bool) -> Rows:
        """Compute the rows."""

    def cross_entropy_backward(self, logits: Array, target: Target, rows: Rows, row_scale: Array, out: Array) -> None:
        """Write the gradient; `out` may lie over the logits."""

    def cross_entropy_forward_backward(
        self, logits: Array, target: Target, row_scale: Array, out: Array, stats: bool
    ) -> Rows:
        """Do both."""


class _Chunk(NamedTuple):
    """Some rows of the problem, and the memory for their logits."""

    problem: Problem
    loss: Swept
    x: Array
    W: Array
    buffer: Any
    cut: Plan
    first: bool  # of the chunks of rows: what adds up starts here
    across: Callable[[Rows, Target, Any], Rows] | None
    kept: Any  # where the gradient of these logits is kept, to be added with others; or None

    def _logits(self, c0: int, c1: int) -> Array:
        n = self.x.shape[0]
        logits = self.buffer[: n * (c1 - c0)].reshape(n, c1 - c0)  # dense, whatever the chunk's size
        self.problem.backend.affine_forward(self.x, self.W[:, c0:c1], None, logits)
        return logits

    def _target(self, target: Target, c0: int, c1: int) -> Target:
        target = target if (c0, c1) == (0, self.W.shape[1]) else target.classes(c0, c1)
        if isinstance(target.probs, ChunkedProbabilities):
            target = target._replace(probs=target.probs.array(self.problem.backend))
        return target

    def _gradient(self, logits: Array, c0: int, c1: int) -> Array:
        """Give where the gradient of these logits goes."""
        if self.kept is not None:
            return self.kept[:, c0:c1]
        return self.problem.backend.gradient_over(logits, self.x, self.W)

    def whole(self, target: Target, scale: Array, into: Gradients | None, known: Rows | None, stats: bool) -> Rows:
        """Do rows with all their classes at once."""
        backend, C = self.problem.backend, self.W.shape[1]
        target = self._target(target, 0, C)
        logits = self._logits(0, C)
        rows = known
        if known is None and (into is None or self.across is not None):
            rows = self.loss.cross_entropy_forward(logits, target, stats)
            if self.across is not None:
                rows = self.across(rows, target, plain_mass(backend.xp, target, C, self.problem.acc) if stats else None)
        G = self._gradient(logits, 0, C)
        if rows is None:
            rows = self.loss.cross_entropy_forward_backward(logits, target, scale, G, stats)
        elif into is not None:
            self.loss.cross_entropy_backward(logits, target, rows, scale, G)
        if into is None:
            return rows
        if into.dx is not None:
            backend.affine_backward(G, self.x, self.W, into.dx, None, None)
        if self.kept is None:
            self.add(G, into, 0, C)
        return rows

    def forward(self, target: Target, stats: bool) -> Rows:
        """Sweep over chunks of classes: the loss."""
        xp = self.problem.backend.xp
        parts, starts, plain = [], [], []
        for c0, c1 in cuts(self.W.shape[1], self.cut.classes):
            here = self._target(target, c0, c1)
            parts.append(self.loss.cross_entropy_forward(self._logits(c0, c1), here, stats))
            starts.append(c0)
            if stats:
                plain.append(plain_mass(xp, here, c1 - c0, self.problem.acc))
        rows = combine(xp, parts, target, starts, plain or [None] * len(parts))
        return rows if self.across is None else self.across(rows, target, sum(plain) if stats else None)

    def backward(self, target: Target, scale: Array, into: Gradients, rows: Rows) -> None:
        """Sweep over chunks of classes: the gradients."""
        backend = self.problem.backend
        dx = None if into.dx is None else backend.empty(self.x.shape, self.problem.acc)
        for c0, c1 in cuts(self.W.shape[1], self.cut.classes):
            logits, here = self._logits(c0, c1), self._target(target, c0, c1)
            G = self._gradient(logits, c0, c1)
            self.loss.cross_entropy_backward(logits, here, rows, scale, G)
            if dx is not None:  # the first chunk overwrites, the others add
                backend.affine_backward(G, self.x, self.W[:, c0:c1], dx, None, None, accumulate=c0)
            if self.kept is None:
                self.add(G, into, c0, c1)
        if dx is not None:
            into.dx[...] = dx

    def add(self, G: Array, into: Gradients, c0: int, c1: int) -> None:
        """``dW[:, c0:c1] += xᵀ·G`` and ``db[c0:c1] += Σ G``; the first chunk of rows overwrites instead."""
        if into.dW is None and into.db is None:
            return
        columns = slice(c0, c1)
        dW = None if into.dW is None else into.dW[:, columns]
        db = None if into.db is None else into.db[columns]
        tile = 0 if self.first else max(1, self.cut.tile)
        self.problem.backend.affine_backward(G, self.x, self.W[:, columns], None, dW, db, accumulate=tile)
