"""The fused head as a layer: Affine and SoftmaxWithLoss in one, which never store the (N, C) logits."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Unpack

import numpy as np

from swl.backends import Backend, Target, get
from swl.nn.base import LossLayer, WithAffineParameters, bring, describe
from swl.ops.affine import Operands
from swl.ops.checks import acc_dtype
from swl.ops.chunks import DEFAULT_BUDGET, cuts, plan
from swl.ops.linear_cross_entropy import check
from swl.ops.loss import Problem
from swl.ops.rows import combine, final_logits
from swl.ops.topk import Best
from swl.options import OptionKwargs, Options, require_magnitudes
from swl.typing import Array, ArrayLike

__all__ = ["AffineSoftmaxWithLoss"]

SELECTING = 8
"""`top_k` holds a chunk of logits, a partitioned copy, masks, counts and candidates: under eight times the logits."""


class AffineSoftmaxWithLoss(LossLayer, WithAffineParameters):
    """The affine map ``x·W + b``, softmax and cross-entropy as the last layer, in chunks within a memory budget.

    It computes what ``Affine(W, b)`` and ``SoftmaxWithLoss(**options)`` compute one after the other, but never stores
    the ``(N, C)`` logits.

    Parameters
    ----------
    W : array, shape (D, C), floating
    b : array, shape (C,), floating, optional
        Both are kept, as by `Affine`.
    memory_budget : int
        Bytes of working memory, inputs and outputs not counted; `swl.plan` says what it leads to. Any budget gives the
        same result up to rounding.
    **options
        The fields of `swl.options.Options`.

    Attributes
    ----------
    W, b, dW, db, x, backend
        As `Affine`.
    t : array or callable, or None
        The target of the last forward.
    loss : 0-d array, or shape (...) under ``reduction="none"``, or None

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what came and what is legal.

    Examples
    --------
    >>> import numpy as np, swl
    >>> layer = swl.AffineSoftmaxWithLoss(np.zeros((1, 2)), np.zeros(2))
    >>> layer.forward(np.array([[3.]]), np.array([0]))
    array(0.69314718)
    >>> layer.backward()
    array([[0.]])
    >>> layer.dW, layer.db
    (array([[-1.5,  1.5]]), array([-0.5,  0.5]))
    """

    def __init__(
        self,
        W: ArrayLike,
        b: ArrayLike | None = None,
        *,
        memory_budget: int = DEFAULT_BUDGET,
        **options: Unpack[OptionKwargs],
    ) -> None:
        checked = Options.checked(options)
        plan(0, 0, 0, memory_budget=memory_budget)  # refuses a budget that is none
        super().__init__(W, b, asked=checked.backend)
        here = get(self.backend)
        arrays = {"weight": checked.weight, "sample_weight": checked.sample_weight}
        with self._scope(**arrays):
            placed = {name: bring(here, name, a) for name, a in arrays.items() if a is not None}
        self.options = checked._replace(**placed)
        self.memory_budget = memory_budget

    def forward(self, x: ArrayLike, t: ArrayLike) -> Array:  # type: ignore[override]
        """Compute the loss.

        Parameters
        ----------
        x : array, shape (..., D) or (N, ...) with trailing axes of product D
        t : array, shape (...) of class ids, or (..., C) of probabilities or one-hot; or a callable
            A host array is brought to the layer's backend. A callable gives probabilities a chunk at a time, as in
            `swl.linear_cross_entropy`; it is called again by `backward`.

        Returns
        -------
        0-d array, or shape (...) under ``reduction="none"``
        """
        return super().forward(x, t)

    def begin(self, x: ArrayLike, t: ArrayLike) -> Problem:
        """Check a batch; `finish` computes it."""
        backend = get(self.backend)
        with self._scope(x=x, t=t):
            target = t if callable(t) else bring(backend, "t", t)
            return check(backend, bring(backend, "x", x), self._W, self._b, target, self.options, self.memory_budget)

    def predict(self, x: ArrayLike) -> Array:
        """Compute the scores ``x·W + b``, shape (..., C), as `Affine` does: before any option of the loss.

        The result is the only array of that size.
        """
        with self._scope(x=x):
            operands = Operands.of(get(self.backend), bring(get(self.backend), "x", x), self._W)
            return operands.forward(self._b, self.memory_budget)

    def top_k(self, x: ArrayLike, k: int) -> tuple[Array, Array]:
        """Find the k most probable classes of each row, within the memory budget.

        Parameters
        ----------
        x : array
            As `forward` takes it.
        k : int
            In [1, C].

        Returns
        -------
        ids : array, shape (..., k), int64
            The most probable class first, the lower id first among equal scores.
        log_probs : array, shape (..., k)
            Their log-probabilities under the options, in nats; float64 if an operand is, else float32. NaN where a
            score of the row is NaN or ``+inf``, or all are ``−inf``.

        Raises
        ------
        TypeError, ValueError
            If `k` is not an integer in [1, C], or `x` does not fit.

        Examples
        --------
        >>> import numpy as np, swl
        >>> layer = swl.AffineSoftmaxWithLoss(np.log([[1., 5., 2., 2.]]))
        >>> ids, log_probs = layer.top_k(np.array([[1.]]), 3)
        >>> ids, np.exp(log_probs)
        (array([[1, 2, 3]]), array([[0.5, 0.2, 0.2]]))
        """
        backend, C = get(self.backend), self._W.shape[1]
        if isinstance(k, bool) or not isinstance(k, int | np.integer):
            raise TypeError(f"k must be an integer, got {k!r} of type {type(k).__name__}")
        if not 1 <= k <= C:
            raise ValueError(f"k must be in [1, {C}], the number of classes, got {k}")
        with self._scope(x=x):
            operands = Operands.of(backend, bring(backend, "x", x), self._W)
            x2, shape = operands.x2, (*operands.leading, int(k))
            N, D = x2.shape
            acc = acc_dtype(operands.dtype(self._b))
            require_magnitudes(acc, C, **self.options.numbers())
            cut = plan(N, D, C, dtype=acc, needs=(), memory_budget=max(1, self.memory_budget // SELECTING))
            ids, log_probs = backend.empty((N, int(k)), np.int64), backend.empty((N, int(k)), acc)
            buffer = backend.empty((min(cut.rows, N) * cut.classes,), acc)
            for r0, r1 in cuts(N, cut.rows):
                ids[r0:r1], log_probs[r0:r1] = self._top_rows(backend, x2[r0:r1], int(k), cut.classes, buffer)
            return ids.reshape(shape), log_probs.reshape(shape)

    def _top_rows(self, backend: Backend, x: Array, k: int, classes: int, buffer: Any) -> tuple[Array, Array]:
        """Sweep some rows over chunks of classes, and keep the best so far."""
        xp, n, C = backend.xp, x.shape[0], self._W.shape[1]
        whole = Target(ids=xp.zeros(n, np.int64))  # any class will do: only M and S are wanted
        bends: dict[str, Any] = {name: x for name, x in self.options.numbers().items() if name in Target._fields}
        bent = Target(**bends)
        rows, best = None, Best(xp, k)
        for c0, c1 in cuts(C, classes):
            logits = buffer[: n * (c1 - c0)].reshape(n, c1 - c0)
            backend.affine_forward(x, self._W[:, c0:c1], None if self._b is None else self._b[c0:c1], logits)
            logits = final_logits(xp, logits, bent)
            here = backend.cross_entropy_forward(logits, whole.classes(c0, c1), False)
            rows = here if rows is None else combine(xp, (rows, here), whole, (0, c0), (None, None))
            best.add(logits, c0)
        assert rows is not None  # there is a class
        with np.errstate(invalid="ignore"):
            return best.ids, best.scores - rows.row_max[:, None] - rows.log_sum[:, None]

    def _scope(self, **arrays: Any) -> AbstractContextManager[object]:
        return get(self.backend).scope(W=self._W, **arrays)

    def _give(self, gradients: Array) -> Array:
        dx, self.dW, self.db = gradients
        self._publish()
        return dx

    def _input(self, saved: Any) -> Any:
        return saved.problem.source.operands.x

    def __repr__(self) -> str:
        D, C = self._W.shape
        bias = [] if self._b is not None else ["no bias"]
        return f"AffineSoftmaxWithLoss({', '.join([str(D), str(C), *bias, *describe(self.options)])})"
