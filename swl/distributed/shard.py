"""The loss of a head of which a rank has a shard of the classes, whatever carries numbers between the ranks.

A step is that of the fused head (`swl.ops.chunks`) on the shard, with the rows of the loss combined over the ranks between
its two sweeps::

    rows_k = forward(x·W_k)            M, S, d and A of each row, over the classes here
    rows   = combine(rows_0, …)        O(N): the only thing the loss needs of other ranks
    G_k    = backward(x·W_k, rows)     dW_k = xᵀ·G_k stays here
    dx     = Σ_k G_k·W_kᵀ              one sum over the ranks

The combining is shared out: each rank combines a P-th of the rows, in the order of the ranks, so the bits are the same
on all of them, and the bytes sent do not grow with P or C.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import numpy as np

from swl.backends import Backend, Rows
from swl.backends.protocol import Target
from swl.distributed.comm import as_numpy, exchange, in_blocks, sum_in_order
from swl.ops import checks
from swl.ops.affine import Operands, empty_like_weights
from swl.ops.chunks import Gradients, Plan, cuts, plan, sweep
from swl.ops.linear_cross_entropy import ALL
from swl.ops.loss import Problem, problem
from swl.ops.rows import combine, row_loss
from swl.ops.targets import CheckedTarget, ChunkedProbabilities
from swl.options import Options
from swl.typing import Array, Comm

__all__ = ["Classes", "Shard", "described", "share_row_weight"]


class Classes(NamedTuple):
    """How classes lie on the ranks, in their order."""

    comm: Comm
    """The communicator of the ranks (`swl.distributed.comm`)."""
    transport: Any
    """The communicator by which arrays travel (`swl.distributed.transport`)."""
    sizes: list[int]
    """Classes of each rank."""

    @property
    def total(self) -> int:
        """C, the classes of all ranks."""
        return sum(self.sizes)

    @property
    def first(self) -> int:
        """The id of the first class of this rank."""
        return sum(self.sizes[: self.comm.rank])

    def here(self, x: Array) -> Array:
        """Take this rank's part of the last axis of an array with one number per class of all ranks."""
        return x[..., self.first : self.first + self.sizes[self.comm.rank]]

    def weight_here(self, backend: Backend, weight: Array) -> Array:
        """Check class weights, of all classes or of those here, and take those here."""
        weight = checks.real_array(backend, "weight", weight)
        if weight.shape == (self.total,):
            weight = self.here(weight)
        legal = f"one per class here; or ({self.total},), all classes"
        checks.require_shape("weight", weight, (self.sizes[self.comm.rank],), legal)
        return weight


class Shard(NamedTuple):
    """The logits of the classes here: formed in chunks, their rows combined over the ranks."""

    classes: Classes
    operands: Operands
    b: Array
    memory_budget: int
    needs: Collection[str] = ALL  # the gradients that are wanted
    add_up: bool = True  # False: dx is this rank's part of the sum, in the arithmetic's dtype

    def problem(self, target: Array, options: Options, weight: Array) -> Problem:
        """Check target and options against all classes; no other rank is asked. `weight` is that of the classes here."""
        backend, classes, leading = self.operands.backend, self.classes, self.operands.leading
        N, here, C = self.operands.x2.shape[0], self.operands.W.shape[1], classes.total
        if here != classes.sizes[classes.comm.rank]:
            raise ValueError(
                f"W had {classes.sizes[classes.comm.rank]} classes when the head was made, and now has {here}"
            )
        if callable(target):
            columns = slice(classes.first, classes.first + here)
            target = CheckedTarget(probs=ChunkedProbabilities(target, slice(0, N), columns), count=float(N))
        elif target.shape in ((*leading, C), (*leading, here)) and target.shape != leading:
            probs = checks.real_array(backend, "target of probabilities", target)
            probs = (classes.here(probs) if target.shape[-1] == C else probs).reshape(N, here)
            target = CheckedTarget(probs=probs, count=float(N))
        acc = checks.acc_dtype(self.operands.dtype(None))
        p = problem(backend, self, target, leading, C, acc, options._replace(weight=None), bias=self.b)
        weight = None if weight is None else backend.xp.ascontiguousarray(weight, dtype=acc)
        return p._replace(target=p.target._replace(first_class=classes.first, weight=weight))

    @property
    def home(self) -> dict[str, Array]:
        """Return the weights here."""
        return {"W": self.operands.W}

    def forward(self, p: Problem, stats: bool) -> Rows:
        """Compute the rows of the loss."""
        return self._sweep(p, None, None, None, stats)

    def forward_backward(self, p: Problem, dout: Array, stats: bool) -> tuple[Rows, Array]:
        """Compute rows and ``dx, dW, db``, None where not wanted."""
        return self._gradients(p, dout, None, stats)

    def backward(self, p: Problem, dout: Array, rows: Rows) -> Array:
        """Compute the gradients from the rows of an earlier `forward`; of other ranks only `dx` asks."""
        return self._gradients(p, dout, rows, False)[1]

    def probabilities(self, p: Problem, rows: Rows) -> Array:
        """Refuse: they are not formed."""
        raise NotImplementedError("the probabilities of a fused head are not formed")

    def _cut(self, p: Problem) -> Plan:
        """Plan the chunks: all ranks cut the rows alike, and a forward as a backward sweep does, for the same bits."""
        N, D = self.operands.x2.shape
        return plan(N, D, max(self.classes.sizes), dtype=p.acc, memory_budget=self.memory_budget)

    def _gradients(self, p: Problem, dout: Array, known: Rows | None, stats: bool) -> tuple[Rows, Array]:
        backend, x, x2, W, _ = self.operands
        needs = [name for name in self.needs if name != "db" or self.b is not None]
        if not needs:
            return known or self._sweep(p, None, None, None, stats), (None, None, None)
        at_once = self._cut(p).rows >= x2.shape[0]
        into = Gradients(
            dx=backend.empty(x2.shape, p.acc) if "dx" in needs else None,  # not rounded before it is summed
            dW=empty_like_weights(backend, W, W.dtype if at_once else p.acc) if "dW" in needs else None,
            db=backend.empty((W.shape[1],), p.acc) if "db" in needs else None,
        )
        rows = self._sweep(p, p.row_scale(dout), into, known, stats)
        dx, dW, db = into
        if dx is not None and self.add_up:
            sum_in_order(self.classes.transport, backend.xp, dx)
            dx = dx.astype(x2.dtype, copy=False)
        return rows, (
            None if dx is None else dx.reshape(x.shape),
            None if dW is None else backend.rounded(dW, W.dtype),
            None if db is None else db.astype(self.b.dtype, copy=False),
        )

    def _sweep(self, p: Problem, scale: Array, into: Gradients | None, known: Rows | None, stats: bool) -> Rows:
        x, W, cut, xp = self.operands.x2, self.operands.W, self._cut(p), p.backend.xp
        blocks = list(cuts(x.shape[0], cut.rows))
        across = self._across(p, iter(blocks), stats)
        if W.shape[1]:
            return sweep(p, x, W, cut, row_scale=scale, into=into, known=known, stats=stats, across=across)
        # no classes here: nothing to add to any row, but a share in combining
        if into is not None and into.dx is not None:
            into.dx[...] = 0
        if known is not None:
            return known
        parts = [across(*_nothing(p, start, stop, stats)) for start, stop in blocks]
        return Rows.joined(xp, parts) if parts else _nothing(p, 0, 0, stats)[0]

    def _across(
        self, p: Problem, blocks: Iterator[tuple[int, int]], stats: bool
    ) -> Callable[[Rows, Target, Any], Rows]:
        """Make the function that combines the rows of a chunk over all ranks."""
        xp, (comm, transport, sizes) = p.backend.xp, self.classes
        P = comm.size
        kind = checks.F64 if stats else p.acc  # float64 holds class ids below 2⁵³
        starts = [sum(sizes[:k]) for k in range(P)]

        def packed(fields: list[Any]) -> Array:
            return xp.stack([field.astype(kind, copy=False) for field in fields])

        def across(rows: Rows, _: Target, plain: Any) -> Rows:
            a, b = next(blocks)
            if P == 1:
                return rows
            target = p.target.rows(a, b)
            mine = target.rows(*in_blocks(b - a, P)[comm.rank])

            def work(received: Any) -> Array:
                parts = [_unpacked(part, p.acc) for part in received]
                masses = [part[-1].astype(p.acc) if stats else None for part in received]
                return packed(_fields(combine(xp, parts, mine, starts, masses), stats))

            sent = packed([*_fields(rows, stats), plain] if stats else _fields(rows, stats))
            whole = _unpacked(exchange(transport, xp, sent, work), p.acc)
            with np.errstate(invalid="ignore"):
                return whole._replace(loss=row_loss(xp, whole, target))

        return across


def described(p: Problem) -> str:
    """Say what of a shard's problem must be the same on all ranks."""
    assert isinstance(p.source, Shard)
    operands = p.source.operands
    # what a device holds is waited for only where that was asked for
    seen = _checksum if p.backend.xp is np or p.options.check else lambda array: "not looked at"
    kind = "probabilities" if p.target.ids is None else f"ids with checksum {seen(p.target.ids)}"
    return (
        f"x of shape {operands.x.shape} and {operands.x.dtype}, target of shape {p.leading}, {kind}, "
        f"sample_weight with checksum {'none' if p.sample_weight is None else seen(p.sample_weight)}, "
        f"denominator {p.denominator if isinstance(p.denominator, float | None) else 'not looked at'}"
    )


def share_row_weight(p: Problem) -> Problem:
    """``m_n = w_{t_n}``, known to the rank that has the class, and the denominator that follows from it."""
    assert isinstance(p.source, Shard)
    classes, xp, ids, w = p.source.classes, p.backend.xp, p.target.ids, p.target.weight
    if ids is None or w is None:
        return p
    m = xp.zeros(ids.size, p.acc)
    if w.size:
        local = ids - classes.first
        hit = (ids >= 0) & (local >= 0) & (local < w.size)
        m = xp.where(hit, w[xp.where(hit, local, 0)], p.acc.type(0))
    sum_in_order(classes.transport, xp, m)
    if p.options.reduction == "mean" and p.options.denominator is None:
        total = (m if p.sample_weight is None else m * p.sample_weight).sum(dtype=np.float64)
        p = p._replace(denominator=float(total) if xp is np else total)
    return p._replace(target=p.target._replace(row_weight=m))


def _checksum(x: Array) -> str:
    return f"{zlib.crc32(np.ascontiguousarray(as_numpy(x)).data):08x}"


def _fields(rows: Rows, stats: bool) -> list[Array]:
    """Choose what of a chunk's rows is sent."""
    fields = [rows.row_max, rows.log_sum, rows.target_dot, rows.mass]
    return [*fields, rows.entropy, rows.log_prob, rows.argmax] if stats else fields


def _unpacked(part: Any, acc: Any) -> Rows:
    """Undo the packing; there may be one more field at the end."""
    plain = [field.astype(acc, copy=False) for field in part[:6]]
    M, S, d, A = plain[:4]
    if len(part) == 4:
        return Rows(M, M, S, d, A)
    return Rows(M, M, S, d, A, plain[4], plain[5], part[6].astype(np.int64))


def _nothing(p: Problem, start: int, stop: int, stats: bool) -> tuple[Rows, Target, Any]:
    """Rows of no classes: no maximum, no sum, no mass."""
    xp, n = p.backend.xp, stop - start
    zero = xp.zeros(n, p.acc)
    top = xp.full(n, -np.inf, p.acc)
    extra = (zero, zero, xp.zeros(n, np.int64)) if stats else ()
    return Rows(zero, top, xp.full(n, np.nan, p.acc), zero, zero, *extra), p.target, zero
