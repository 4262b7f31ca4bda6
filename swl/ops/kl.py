"""The divergence between the softmax of a head and that of a teacher's, neither of whose logits are stored: distillation.

With the student's row p and the teacher's q, m = (p + q)/2, and a loss ℓ per row::

    forward   ℓ = Σ_c q_c·log(q_c/p_c)                                ∂ℓ/∂z_c = p_c − q_c
    reverse   ℓ = Σ_c p_c·log(p_c/q_c)                                ∂ℓ/∂z_c = p_c·(log(p_c/q_c) − ℓ)
    jsd       ℓ = ½·Σ_c p_c·log(p_c/m_c) + ½·Σ_c q_c·log(q_c/m_c)     ∂ℓ/∂z_c = ½·p_c·(log(p_c/m_c) − Σ_k p_k·log(p_k/m_k))

A class without mass adds nothing. (J. Lin, "Divergence measures based on the Shannon entropy", 1991; G. Hinton, O. Vinyals and
J. Dean, "Distilling the knowledge in a neural network", 2015.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypedDict, Unpack, cast, get_args

import numpy as np

from swl.backends import Backend, Rows, resolve
from swl.backends.protocol import Target
from swl.ops.affine import Operands
from swl.ops.checks import acc_dtype, affine_parameters, check_needs
from swl.ops.chunks import DEFAULT_BUDGET, MIN_ROWS, require_budget, sweep
from swl.ops.linear_cross_entropy import ALL, Formed
from swl.ops.linear_cross_entropy import check as check_linear
from swl.ops.loss import Problem
from swl.ops.rows import final_logits, log_softmax, plus_bias
from swl.options import Options, shown
from swl.typing import Array, ArrayLike, Direction, Reduction, Results, Stream

__all__ = ["KLKwargs", "gradients", "head", "linear_kl", "linear_kl_value_and_grad"]

DIRECTIONS: tuple[Direction, ...] = get_args(Direction)


class KLKwargs(TypedDict, total=False):
    """The options of a divergence; see `swl.options.Options` for their meaning."""

    temperature: float
    reduction: Reduction
    sample_weight: Array
    denominator: Array
    backend: str | None


def linear_kl(
    x: ArrayLike,
    W: ArrayLike,
    teacher_x: ArrayLike,
    teacher_W: ArrayLike,
    b: ArrayLike | None = None,
    teacher_b: ArrayLike | None = None,
    *,
    direction: Direction = "forward",
    memory_budget: int = DEFAULT_BUDGET,
    stream: Stream | None = None,
    **options: Unpack[KLKwargs],
) -> Results:
    """Compute the divergence between the softmax of ``(x·W + b)/temperature`` and a teacher's, without storing any logits.

    Parameters
    ----------
    x, W, b : arrays
        The student's, as for `linear_cross_entropy`.
    teacher_x, teacher_W, teacher_b : arrays
        The teacher's: the same leading shape and the same classes, of any width.
    direction : {"forward", "reverse", "jsd"}
        KL(teacher ‖ student), KL(student ‖ teacher), or the mean of both against their average, which is at most log 2.
    memory_budget : int
        Bytes of working memory, inputs and outputs not counted. It is kept from 160 rows of logits on.
    stream : as for `affine`
    **options
        `temperature`, `reduction`, `sample_weight`, `denominator` and `backend` as in `swl.options.Options`. The temperature
        divides the logits of both, and the loss is not multiplied by its square.

    Returns
    -------
    loss : 0-d array, or shape (...) under ``reduction="none"``
        In nats; float64 if an operand of the student is, else float32. ``inf`` in a row where the first of the two has mass at a
        class and the second, masked by −inf, has none.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what came and what is legal.

    Examples
    --------
    >>> import numpy as np, swl
    >>> x, W = np.ones((2, 3)), np.zeros((3, 4))
    >>> swl.linear_kl(x, W, x, W, teacher_b=np.array([0., 0., -np.inf, -np.inf]))
    array(0.69314718)
    """
    student, teacher = (x, W, b), (teacher_x, teacher_W, teacher_b)
    return _run(student, teacher, direction, memory_budget, stream, options, None, ())[0]


def linear_kl_value_and_grad(
    x: ArrayLike,
    W: ArrayLike,
    teacher_x: ArrayLike,
    teacher_W: ArrayLike,
    b: ArrayLike | None = None,
    teacher_b: ArrayLike | None = None,
    *,
    dout: ArrayLike = 1.0,
    needs: Iterable[str] = ALL,
    direction: Direction = "forward",
    memory_budget: int = DEFAULT_BUDGET,
    stream: Stream | None = None,
    **options: Unpack[KLKwargs],
) -> Results:
    """Compute `linear_kl` and its gradients with respect to the student's operands, in one sweep.

    Parameters
    ----------
    x, W, teacher_x, teacher_W, b, teacher_b, direction, memory_budget, stream, **options
        As for `linear_kl`.
    dout, needs
        As for `linear_cross_entropy_value_and_grad`.

    Returns
    -------
    loss : as `linear_kl`
    gradients : tuple of dx, dW, db
        As `linear_cross_entropy_value_and_grad`.

    Examples
    --------
    >>> import numpy as np, swl
    >>> x, W = np.ones((1, 1)), np.zeros((1, 2))
    >>> loss, (dx, dW, db) = swl.linear_kl_value_and_grad(x, W, x, np.array([[np.log(3.), 0.]]))
    >>> dW
    array([[-0.25,  0.25]])
    """
    student, teacher = (x, W, b), (teacher_x, teacher_W, teacher_b)
    return _run(student, teacher, direction, memory_budget, stream, options, dout, check_needs(needs))


def _run(
    student: Any,
    teacher: Any,
    direction: Direction,
    memory_budget: int,
    stream: Stream,
    kwargs: KLKwargs,
    dout: Array,
    needs: Iterable[str],
) -> tuple[Array, Array]:
    unknown = kwargs.keys() - KLKwargs.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown option {min(unknown)!r}; legal options are {', '.join(KLKwargs.__annotations__)}")
    options = Options.checked(kwargs)  # type: ignore[arg-type]
    names = ("x", "W", "b", "teacher_x", "teacher_W", "teacher_b")
    arrays = {**dict(zip(names, (*student, *teacher), strict=True)), "dout": dout}
    backend = resolve(options.backend, {**arrays, **options.arrays()})
    with backend.scope(stream, **arrays):
        p = head(backend, student, teacher, options, direction, memory_budget, needs)
        rows, found = gradients(p, direction, 1.0 if dout is None else dout)
        return p.reduce(rows.loss), found


# ------------------------------------------------------------------------------------------------ the head and its loss


def head(
    backend: Backend,
    student: tuple[Any, Any, Any],
    teacher: tuple[Any, Any, Any],
    options: Options,
    direction: Direction,
    memory_budget: int,
    needs: Iterable[str],
) -> Problem:
    """Check both heads' ``x, W, b`` and the options. The target of the problem gives the teacher's logits, a chunk at a time."""
    if direction not in DIRECTIONS:
        raise ValueError(f"direction is {shown(direction)}; legal are 'forward', 'reverse' and 'jsd'")
    require_budget(memory_budget)
    x, W, b = student
    W, b = affine_parameters(backend, W, b)
    operands, teacher_b = _teacher(backend, *teacher)
    if operands.W.shape[1] != W.shape[1]:
        raise ValueError(f"W has {W.shape[1]} classes, but teacher_W has {operands.W.shape[1]}")

    acc = acc_dtype(operands.dtype(teacher_b))

    def logits(rows: slice, classes: slice) -> Array:
        x2, W = operands.x2[rows], operands.W[:, classes]
        z = backend.empty((x2.shape[0], W.shape[1]), acc)
        backend.affine_forward(x2, W, None, z)
        if teacher_b is not None:
            z += teacher_b[classes].astype(acc)
        if options.temperature != 1:
            z /= options.temperature
        return z.astype(p.acc, copy=False)

    p = check_linear(backend, x, W, b, logits, options, memory_budget, tuple(needs))
    if operands.leading != p.leading:
        raise ValueError(f"teacher_x must have the leading shape of x, {p.leading}, got {operands.leading}")
    # half is for the teacher's logits; rows are not cut, because a row's loss is known only where all its classes are at hand
    least = p.acc.itemsize * MIN_ROWS * W.shape[1] * 5 // 4
    source = cast(Formed, p.source)
    return p._replace(source=source._replace(memory_budget=max(int(memory_budget) // 2, least)))


def _teacher(backend: Backend, x: Array, W: Array, b: Array) -> tuple[Operands, Array]:
    try:
        W, b = affine_parameters(backend, W, b)
        return Operands.of(backend, x, W), b
    except (TypeError, ValueError) as error:
        raise type(error)(f"the teacher's {error}") from error


def gradients(p: Problem, direction: Direction, dout: Array) -> tuple[Rows, Array]:
    """Compute the rows' losses and, as far as they are needed, ``dx, dW, db``."""
    source, loss = cast(Formed, p.source), _Divergence(p.backend, direction)
    if source.needs:
        return source.gradients(p, p.row_scale(dout), None, False, loss)
    return sweep(p, source.operands.x2, source.operands.W, source.cut(p), loss=loss), (None, None, None)


class _Divergence:
    """A `Swept` whose target is the teacher's logits."""

    def __init__(self, backend: Backend, direction: Direction) -> None:
        self.backend, self.direction = backend, direction

    def cross_entropy_forward(self, logits: Array, target: Target, stats: bool) -> Rows:
        return self._sweep(logits, target, None, None)

    def cross_entropy_backward(self, logits: Array, target: Target, rows: Rows, row_scale: Array, out: Array) -> None:
        self._sweep(logits, target, row_scale, out)

    def cross_entropy_forward_backward(
        self, logits: Array, target: Target, row_scale: Array, out: Array, stats: bool
    ) -> Rows:
        return self._sweep(logits, target, row_scale, out)

    def _sweep(self, logits: Array, target: Target, row_scale: Array, out: Array) -> Rows:
        xp = self.backend.xp
        N, C = logits.shape
        losses = xp.empty(N, dtype=logits.dtype)
        scale = None if row_scale is None else xp.broadcast_to(row_scale, (N,))

        def some(i: int, j: int) -> None:
            with np.errstate(all="ignore"):
                log_p = log_softmax(xp, final_logits(xp, plus_bias(logits[i:j], target), target))
                log_q = log_softmax(xp, target.probs[i:j])
                losses[i:j], g = _divergence(xp, self.direction, log_p, log_q, out is not None)
                if scale is not None:
                    g *= scale[i:j, None]
                    out[i:j] = g

        self.backend.by_rows(some, N, C)
        return Rows(losses, losses, losses, losses, losses)


def _divergence(xp: Any, direction: Direction, log_p: Array, log_q: Array, gradient: bool) -> tuple[Array, Array]:
    """Compute each row's loss and its gradient with respect to z, by the equations above."""
    p, q = xp.exp(log_p), xp.exp(log_q)
    if direction == "forward":
        return _mean(xp, q, log_q - log_p).sum(axis=1), p - q if gradient else None
    if direction == "reverse":
        f = _mean(xp, p, log_p - log_q)
        loss = f.sum(axis=1)
        return loss, f - p * loss[:, None] if gradient else None
    log_m = xp.logaddexp(log_p, log_q) - log_p.dtype.type(math.log(2))
    f = _mean(xp, p, log_p - log_m)
    half = f.sum(axis=1)
    return (half + _mean(xp, q, log_q - log_m).sum(axis=1)) / 2, (f - p * half[:, None]) / 2 if gradient else None


def _mean(xp: Any, mass: Array, value: Any) -> Array:
    """mass·value, and 0 without mass, whatever the value."""
    return xp.where(mass == 0, mass, mass * value)
