"""A classifier head whose classes are spread over the ranks of a communicator.

Every rank has the same inputs ``x (N, D)`` and targets and a shard of the classes, ``W (D, C_k)``; `swl.distributed.shard` has
the mathematics.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any, Unpack

import numpy as np

from swl.backends import Backend, active, get, resolve
from swl.distributed.comm import agree, as_numpy, exchange, gather_numbers, in_blocks
from swl.distributed.shard import Classes, Shard, described, share_row_weight
from swl.distributed.transport import over
from swl.nn.base import LossLayer, bring
from swl.ops import checks
from swl.ops.affine import Operands
from swl.ops.chunks import DEFAULT_BUDGET, cuts, plan
from swl.ops.loss import Problem
from swl.ops.topk import Best
from swl.options import OptionKwargs, Options
from swl.typing import Array, ArrayLike, Comm, DTypeLike, Results

__all__ = ["ClassParallelHead"]

DRAWN_TOGETHER = 1024
"""Classes whose initial weights are drawn from one seed, so that they do not depend on the number of ranks."""


class HeadKwargs(OptionKwargs, total=False):
    """What a head takes beside its parameters."""

    memory_budget: int


class ClassParallelHead(LossLayer):
    """Affine and softmax-cross-entropy over classes that are spread over ranks; the logits are never stored whole.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        The ranks that share the classes. All of them call every method together, with the same `x` and `t`. Arrays on a
        device travel as ``SWL_TRANSPORT`` says (docs/scale.md).
    W : array, shape (D, C_k), floating
        The columns of this rank; shards lie in the order of the ranks, and C = Σ_k C_k. They may differ in size, and a
        rank may have none. Kept, not copied.
    b : array, shape (C_k,), floating, optional
        On all ranks or on none.
    memory_budget : int
        Bytes of working memory of a rank, parameters, gradients and the sums over ranks not counted.
    **options
        Those of `swl.linear_cross_entropy`, the same on all ranks. `weight` has the shape (C_k,) of the shard or (C,).

    Attributes
    ----------
    W, b, dW, db : array
        This rank's parameters and their gradients.
    C, first : int
        Classes in all, and the id of the first one here.
    loss : 0-d array, or shape (...) under ``reduction="none"``, or None
        The same bits on every rank, as the gradient of `x`.

    Raises
    ------
    ValueError
        On all ranks, if sizes, dtypes or options differ between them; found before anything else is exchanged.
    RuntimeError
        If another rank found an error in its arguments; the message names rank and cause.

    Examples
    --------
    One rank is enough to try it:

    >>> import numpy as np
    >>> from swl import distributed
    >>> with distributed.run() as comm:
    ...     head = distributed.ClassParallelHead(comm, np.zeros((2, 4)))
    ...     loss, dx = head.forward_backward(np.ones((3, 2)), np.array([0, 1, 3]))
    >>> loss
    array(1.38629436)
    """

    names = ("W", "b")

    def __init__(
        self,
        comm: Comm,
        W: ArrayLike,
        b: ArrayLike | None = None,
        *,
        memory_budget: int = DEFAULT_BUDGET,
        **options: Unpack[OptionKwargs],
    ) -> None:
        self.comm, self.memory_budget = comm, memory_budget

        def describe() -> str:
            self.options = Options.checked(options)
            backend = resolve(self.options.backend, {"W": W, "b": b, "weight": self.options.weight})
            self.backend = backend.name
            with backend.scope(W=W, b=b):
                self.W, self.b = checks.affine_parameters(backend, W, b)
            plan(1, 1, 1, memory_budget=memory_budget)
            plain = {k: v for k, v in self.options._asdict().items() if k not in ("weight", "sample_weight")}
            given = [name for name in ("weight", "sample_weight") if getattr(self.options, name) is not None]
            return (
                f"W of {self.W.shape[0]} inputs and {self.W.dtype}, b {'absent' if b is None else self.b.dtype}, "
                f"memory_budget {memory_budget}, options {plain}, arrays {given}"
            )

        agree(comm, "ClassParallelHead", describe)
        with self._scope():
            self.transport = over(comm, self._backend)
        self.sizes = [int(size) for size in gather_numbers(comm, self.W.shape[1])[:, 0]]
        self.C, self.first = self._classes.total, self._classes.first
        if self.C == 0:
            raise ValueError("ClassParallelHead needs at least one class on one of the ranks")
        self.dW: Array = None
        self.db: Array = None
        self._weight: Array = None
        if self.options.weight is not None:
            agree(comm, "weight of ClassParallelHead", self._place_weight)

    @classmethod
    def init(
        cls,
        comm: Comm,
        D: int,
        C: int,
        *,
        rng: int = 0,
        dtype: DTypeLike = np.float32,
        bias: bool = True,
        **keywords: Unpack[HeadKwargs],
    ) -> ClassParallelHead:
        """Draw this rank's share of ``W ~ N(0, 2/D)``, C/P classes or one more, and set ``b = 0``, on the active backend.

        The weights of a class depend on the seed and its id alone, not on the number of ranks.

        Parameters
        ----------
        comm : communicator of P ranks
        D, C : int
            Inputs, and classes of all ranks together.
        rng : int
            Seed.
        dtype : floating dtype
        bias : bool
        **keywords
            As for the class.
        """
        for name, size in (("D", D), ("C", C)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        first, stop = in_blocks(C, comm.size)[comm.rank]
        W = np.empty((D, stop - first), dtype)
        for block in range(first // DRAWN_TOGETHER, -(-stop // DRAWN_TOGETHER)):
            start = block * DRAWN_TOGETHER
            drawn = np.random.default_rng([rng, block]).standard_normal((DRAWN_TOGETHER, D)).T * math.sqrt(2 / D)
            a, b = max(first, start), min(stop, start + DRAWN_TOGETHER)
            W[:, a - first : b - first] = drawn[:, a - start : b - start]
        backend = get(keywords.get("backend") or active())
        b = backend.asarray(np.zeros(stop - first, dtype)) if bias else None
        return cls(comm, backend.asarray(W), b, **keywords)

    @classmethod
    def of(
        cls, comm: Comm, W: ArrayLike, b: ArrayLike | None = None, **keywords: Unpack[HeadKwargs]
    ) -> ClassParallelHead:
        """Take this rank's share of the parameters of a whole head, ``W (D, C)`` and ``b (C,)``, as copies."""
        first, stop = in_blocks(W.shape[1], comm.size)[comm.rank]
        return cls(comm, W[:, first:stop].copy(), None if b is None else b[first:stop].copy(), **keywords)

    def _place_weight(self) -> str:
        with self._scope(weight=self.options.weight):
            weight = bring(self._backend, "weight", self.options.weight)
            self._weight = self._classes.weight_here(self._backend, weight)
        return str(self._weight.dtype)

    @property
    def _backend(self) -> Backend:
        return get(self.backend)

    @property
    def _classes(self) -> Classes:
        return Classes(self.comm, self.transport, self.sizes)

    def _scope(self, **arrays: Any) -> AbstractContextManager[object]:
        return self._backend.scope(W=self.W, **arrays)

    # ------------------------------------------------------------------------------------------------ a step

    def forward(self, x: ArrayLike, t: ArrayLike, *, stats: bool = False) -> Results:  # type: ignore[override]
        """Compute the loss and keep what `backward` needs.

        Parameters
        ----------
        x : array, shape (..., D)
        t : array, shape (...), of class ids in [0, C); or (..., C) or (..., C_k) of probabilities; or a callable
            That gives probabilities a chunk at a time, as for `swl.linear_cross_entropy`, by ids of all ranks.
        stats : bool
            Also return a `swl.RowStats`.

        Returns
        -------
        loss : 0-d array, or shape (...) under ``reduction="none"``
        stats : RowStats
            Only with ``stats=True``.
        """
        done = self.begin(x, t).forward(stats)
        loss = self._keep(done, t)
        return (loss, done.stats()) if stats else loss

    def forward_backward(self, x: ArrayLike, t: ArrayLike, dout: ArrayLike = 1, *, stats: bool = False) -> Results:
        """Compute loss and gradients, bitwise as `forward`, then `backward`: ``loss, dx``, and statistics if asked."""
        done, gradients = self.begin(x, t).forward_backward(dout, stats)
        loss, dx = self._keep(done, t), self._give(gradients)
        return (loss, dx, done.stats()) if stats else (loss, dx)

    def begin(self, x: ArrayLike, t: ArrayLike) -> Problem:
        """Check a batch on all ranks; its `denominator` is then known, and `finish` does the rest."""
        p: Problem | None = None

        def describe() -> str:
            nonlocal p
            operands = Operands.of(self._backend, bring(self._backend, "x", x), self.W)
            target = t if callable(t) else bring(self._backend, "t", t)
            p = Shard(self._classes, operands, self.b, self.memory_budget).problem(target, self.options, self._weight)
            return described(p)

        with self._scope(x=x, t=t):
            agree(self.comm, "ClassParallelHead.forward", describe)
            assert p is not None
            return share_row_weight(p)

    def _give(self, gradients: Array) -> Array:
        dx, self.dW, self.db = gradients
        self._publish()
        return dx

    # ------------------------------------------------------------------------------------------------ without a loss

    def predict(self, x: ArrayLike) -> Array:
        """Compute the scores of the classes here, shape (..., C_k); no other rank is asked."""
        with self._scope(x=x):
            return Operands.of(self._backend, bring(self._backend, "x", x), self.W).forward(self.b)

    def top_k(self, x: ArrayLike, k: int) -> tuple[Array, Array]:
        """Find the k classes of all ranks with the largest scores ``x·W + b``.

        Parameters
        ----------
        x : array, shape (..., D)
        k : int
            At least 1 and at most C.

        Returns
        -------
        ids : NumPy int64 array, shape (..., k)
            The class with the largest score first, the lower id first among equal scores; a NaN ranks as +inf.
        scores : NumPy array, shape (..., k)
            As `predict` gives them, before any option of the loss.
        """
        operands: Operands | None = None

        def describe() -> str:
            nonlocal operands
            if not 1 <= k <= self.C:
                raise ValueError(f"k must be at least 1 and at most the number of classes, {self.C}, got {k}")
            operands = Operands.of(self._backend, bring(self._backend, "x", x), self.W)
            return f"k {k}, x of shape {operands.x.shape} and {operands.x.dtype}"

        with self._scope(x=x):
            agree(self.comm, "ClassParallelHead.top_k", describe)
            assert operands is not None
            scores, ids = self._local_top(operands, k)

        def work(received: Any) -> Array:
            ranks, _, n = received.shape
            every = [part.transpose(2, 0, 1).reshape(n, ranks * k) for part in (received[:, :k], received[:, k:])]
            order = np.lexsort((every[1], -every[0]), axis=1)[:, :k]
            return np.concatenate([np.take_along_axis(a, order, axis=1).T for a in every])

        merged = exchange(self.comm, np, np.concatenate([scores.T, ids.T]), work)
        leading, acc = operands.leading, checks.acc_dtype(operands.dtype(None))
        return (
            np.ascontiguousarray(merged[k:].T).astype(np.int64).reshape(*leading, k),
            np.ascontiguousarray(merged[:k].T).astype(acc).reshape(*leading, k),
        )

    def accuracy(self, x: ArrayLike, t: ArrayLike, k: int = 1) -> float:
        """Compute the share of rows whose class is among the k largest scores; ids ``t (...)`` or rows ``(..., C)``."""
        ids = as_numpy(t)
        classes, _ = self.top_k(x, k)
        if ids.shape != classes.shape[:-1]:
            ids = ids.argmax(axis=-1)
        return float((classes == ids[..., None]).any(axis=-1).mean())

    def _local_top(self, operands: Operands, k: int) -> tuple[Array, Array]:
        """Find scores and ids, float64 (N, k), of the best classes here; −inf and C for want of one."""
        (N, D), here, backend = operands.x2.shape, self.W.shape[1], self._backend
        scores, ids = np.full((N, k), -np.inf), np.full((N, k), float(self.C))
        acc = checks.acc_dtype(operands.dtype(None))
        cut = plan(N, D, max(here, 1), dtype=acc, needs=(), memory_budget=max(1, self.memory_budget // 4))
        b = None if self.b is None else backend.xp.ascontiguousarray(self.b, dtype=acc)
        for r0, r1 in cuts(N, cut.rows):
            best = Best(np, k)
            for c0, c1 in cuts(here, cut.classes):
                z = backend.empty((r1 - r0, c1 - c0), acc)
                backend.affine_forward(operands.x2[r0:r1], self.W[:, c0:c1], None if b is None else b[c0:c1], z)
                best.add(as_numpy(z), self.first + c0)
            if here:
                scores[r0:r1, : best.ids.shape[1]], ids[r0:r1, : best.ids.shape[1]] = best.scores, best.ids
        return scores, ids

    # ------------------------------------------------------------------------------------------------ shards

    def shards(self) -> dict[str, tuple[int, int, int]]:
        """Say where the parameters here lie in the whole ones: axis, first index, size of the whole axis, by name."""
        found = {"W": (1, self.first, self.C)}
        return found if self.b is None else {**found, "b": (0, self.first, self.C)}

    def gather(self) -> tuple[Array, Array]:
        """Give the whole ``W (D, C)`` and ``b (C,)`` or None as NumPy arrays, on every rank."""

        def whole(x: Array) -> Array:  # (n, C_k)
            n = x.shape[0]
            flat = np.empty(n * self.C, x.dtype)
            counts = n * np.array(self.sizes)
            offsets = np.concatenate(([0], np.cumsum(counts)[:-1]))
            send = np.ascontiguousarray(x)
            kind = np.dtype(f"u{x.dtype.itemsize}")  # MPI has no name for every dtype
            self.comm.Allgatherv(send.view(kind), [flat.view(kind), (counts, offsets)])
            return np.concatenate(
                [flat[o : o + c].reshape(n, -1) for o, c in zip(offsets, counts, strict=True) if c], axis=1
            )

        return whole(as_numpy(self.W)), None if self.b is None else whole(as_numpy(self.b)[None])[0]

    def __repr__(self) -> str:
        D, here = self.W.shape
        return f"ClassParallelHead({D}, {self.C}; {here} on rank {self.comm.rank} of {self.comm.size})"
