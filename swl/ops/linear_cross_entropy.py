"""Softmax cross-entropy of ``x·W + b`` without stored logits: the functions, and inputs and weights as the source of a loss."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple, Unpack

from swl.backends import Backend, Rows, resolve
from swl.backends.registry import on_device
from swl.ops.affine import Operands, empty_like_weights
from swl.ops.checks import acc_dtype, affine_parameters, check_needs
from swl.ops.chunks import DEFAULT_BUDGET, Gradients, Plan, Swept, plan, sweep
from swl.ops.loss import Problem, problem
from swl.ops.targets import ChunkedProbabilities
from swl.options import OptionKwargs, Options
from swl.typing import Array, ArrayLike, Results, Stream

__all__ = ["linear_cross_entropy", "linear_cross_entropy_value_and_grad"]

ALL = ("dx", "dW", "db")


def linear_cross_entropy(
    x: ArrayLike,
    W: ArrayLike,
    target: ArrayLike,
    b: ArrayLike | None = None,
    *,
    memory_budget: int = DEFAULT_BUDGET,
    stats: bool = False,
    stream: Stream | None = None,
    **options: Unpack[OptionKwargs],
) -> Results:
    """Compute the cross-entropy of ``x·W + b`` without storing the logits, forward only.

    Parameters
    ----------
    x : array, shape (..., D) or (N, ...) with trailing axes of product D
        Inputs, of any dtype that `affine` takes.
    W : array, shape (D, C), floating
        Weights; a transposed view of a ``(C, D)`` array is used as it is.
    target : array, shape (...) of any integer dtype, or (..., C) of any real dtype; or a callable
        Class ids or probabilities. A callable gives probabilities a chunk at a time, so that they need not be stored:
        ``target(rows, classes)`` gets two slices, of the flattened rows and of the classes, and returns an array of that
        shape. It is called once per chunk and sweep.
    b : array, shape (C,), floating, optional
    memory_budget : int
        Bytes of working memory, inputs and outputs not counted; `swl.plan` says what it leads to. Any budget gives the
        same result up to rounding.
    stats : bool
        Also return a `RowStats` of the same sweep.
    stream : as for `affine`
    **options
        As for `cross_entropy`.

    Returns
    -------
    loss : as `cross_entropy`
    stats : RowStats
        Only with ``stats=True``.

    Raises
    ------
    ValueError, TypeError
        As `affine` and `cross_entropy`; also for a budget that is not a positive integer.

    Notes
    -----
    Logits are float32 (float64 if an operand is) whatever the dtype of `x` and `W`.

    Examples
    --------
    >>> import numpy as np, swl
    >>> swl.linear_cross_entropy(np.ones((2, 3)), np.zeros((3, 4)), np.array([0, 3]))
    array(1.38629436)
    """
    backend, checked = _backend_of(x, W, target, b, options)
    with backend.scope(stream, x=x, W=W, target=target):
        W, b = affine_parameters(backend, W, b)
        done = check(backend, x, W, b, target, checked, memory_budget).forward(stats)
    return (done.value, done.stats()) if stats else done.value


def linear_cross_entropy_value_and_grad(
    x: ArrayLike,
    W: ArrayLike,
    target: ArrayLike,
    b: ArrayLike | None = None,
    *,
    dout: ArrayLike = 1.0,
    needs: Iterable[str] = ("dx", "dW", "db"),
    memory_budget: int = DEFAULT_BUDGET,
    stats: bool = False,
    stream: Stream | None = None,
    **options: Unpack[OptionKwargs],
) -> Results:
    """Compute the loss of `linear_cross_entropy` and its gradients in one sweep: three matrix products in all.

    Parameters
    ----------
    x, W, target, b, memory_budget, stats, stream, **options
        As for `linear_cross_entropy`.
    dout : number or 0-d array; under ``reduction="none"`` also shape (...)
        Gradient of what follows with respect to the loss.
    needs : iterable of {"dx", "dW", "db"}
        The gradients to compute; each one left out of the first two saves a product.

    Returns
    -------
    loss : as `cross_entropy`
    gradients : tuple of dx, dW, db
        Of the shapes and dtypes of x, W and b (dx of the dtype of `W` where `x` holds integers); None where not needed, and
        for the bias where there is none. Summed over the rows in float32 or better.
    stats : RowStats
        Only with ``stats=True``.

    Examples
    --------
    >>> import numpy as np, swl
    >>> x, W = np.ones((1, 1)), np.zeros((1, 2))
    >>> loss, (dx, dW, db) = swl.linear_cross_entropy_value_and_grad(x, W, np.array([0]))
    >>> dW
    array([[-0.5,  0.5]])
    """
    wanted = check_needs(needs)
    backend, checked = _backend_of(x, W, target, b, options, dout)
    with backend.scope(stream, x=x, W=W, target=target):
        W, b = affine_parameters(backend, W, b)
        done, gradients = check(backend, x, W, b, target, checked, memory_budget, wanted).forward_backward(dout, stats)
    return (done.value, gradients, done.stats()) if stats else (done.value, gradients)


def _backend_of(
    x: Array, W: Array, target: Array, b: Array, kwargs: OptionKwargs, dout: Array = None
) -> tuple[Backend, Options]:
    options = Options.checked(kwargs)
    arrays = {"x": x, "W": W, "target": target, "b": b, **options.arrays(), "dout": dout}
    return resolve(options.backend, arrays), options


# ------------------------------------------------------------------------------------------------ inputs and weights


class Formed(NamedTuple):
    """Logits that are formed from inputs and weights, in chunks within a budget (`swl.ops.chunks`)."""

    operands: Operands
    b: Array
    memory_budget: int
    needs: Collection[str]  # the gradients that are wanted

    @property
    def home(self) -> dict[str, Array]:
        return {"W": self.operands.W}

    def cut(self, p: Problem, needs: Collection[str] = ()) -> Plan:
        """Plan the chunks."""
        x, W = self.operands.x2, self.operands.W
        (N, D), C = x.shape, W.shape[1]
        dtype = W.dtype if x.dtype == W.dtype and acc_dtype(W.dtype) == p.acc else p.acc
        return plan(N, D, C, dtype=dtype, needs=needs, memory_budget=self.memory_budget, device=on_device(W))

    def forward(self, p: Problem, stats: bool) -> Rows:
        return sweep(p, self.operands.x2, self.operands.W, self.cut(p), stats=stats)

    def forward_backward(self, p: Problem, dout: Array, stats: bool) -> tuple[Rows, Array]:
        return self.gradients(p, p.row_scale(dout), None, stats)

    def backward(self, p: Problem, dout: Array, rows: Rows) -> Array:
        return self.gradients(p, p.row_scale(dout), rows, False)[1]

    def gradients(
        self, p: Problem, row_scale: Array, known: Rows | None, stats: bool, loss: Swept | None = None
    ) -> tuple[Rows, Array]:
        """Compute rows and ``dx, dW, db`` in one sweep; from `known` rows of an earlier forward if there are any."""
        backend, x, x2, W, _ = self.operands
        needs = [name for name in self.needs if name != "db" or self.b is not None]
        cut = self.cut(p, needs)
        if not needs:
            return known or sweep(p, x2, W, cut, stats=stats), (None, None, None)
        N, C = x2.shape[0], W.shape[1]
        at_once = max(cut.rows, cut.kept) >= N
        into = Gradients(
            dx=backend.empty(x2.shape, x2.dtype) if "dx" in needs else None,
            dW=empty_like_weights(backend, W, W.dtype if at_once else acc_dtype(W.dtype)) if "dW" in needs else None,
            db=backend.empty((C,), p.acc) if "db" in needs else None,
        )
        rounded = kept = None
        if cut.kept and at_once:
            kept = backend.empty((N, C), W.dtype)
        elif cut.kept:  # where the rounded sum will be
            rounded = empty_like_weights(backend, W, W.dtype)
            flat = (rounded if rounded.flags.c_contiguous else rounded.T).reshape(-1)
            kept = flat[: cut.kept * C].reshape(cut.kept, C)
        rows = sweep(p, x2, W, cut, row_scale=row_scale, into=into, known=known, stats=stats, kept=kept, loss=loss)
        dx, dW, db = into
        if rounded is not None:
            rounded[...] = dW
            dW = rounded
        return rows, (
            None if dx is None else dx.reshape(x.shape),
            None if dW is None else backend.rounded(dW, W.dtype),
            None if db is None else db.astype(self.b.dtype, copy=False),
        )

    def probabilities(self, p: Problem, rows: Rows) -> Array:
        raise NotImplementedError("the probabilities of a fused head are not formed")


def check(
    backend: Backend,
    x: Array,
    W: Array,
    b: Array,
    target: Array,
    options: Options,
    memory_budget: int,
    needs: Collection[str] = ALL,
) -> Problem:
    """Check inputs, target and options against parameters that were checked before."""
    operands = Operands.of(backend, x, W)
    N, C = operands.x2.shape[0], W.shape[1]
    if C == 0:
        raise ValueError(f"W must have at least one column, a class, got shape {W.shape}")
    if callable(target):
        target = ChunkedProbabilities(target, slice(0, N), slice(0, C))
    source = Formed(operands, b, memory_budget, needs)
    return problem(backend, source, target, operands.leading, C, acc_dtype(operands.dtype(b)), options, bias=b)
