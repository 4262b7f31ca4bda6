"""Log-probabilities of chosen classes, and the entropy, of ``softmax(x·W + b)`` without stored logits.

What reinforcement learning on tokens needs. With ``H = −Σ_c p_c·log p_c``, upstream gradients a of ``log p_t`` and h of ``H``::

    ∂/∂z_c = a·([c = t] − p_c) − h·p_c·(log p_c + H)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import numpy as np

from swl.backends import Backend, Rows, resolve
from swl.backends.protocol import Target
from swl.ops.checks import affine_parameters, check_needs
from swl.ops.chunks import DEFAULT_BUDGET
from swl.ops.linear_cross_entropy import ALL, Formed
from swl.ops.linear_cross_entropy import check as check_linear
from swl.ops.loss import Problem
from swl.ops.rows import final_logits, plus_bias
from swl.options import Options
from swl.typing import Array, ArrayLike, Results, Stream

__all__ = ["gradients", "head", "linear_log_prob", "linear_log_prob_value_and_grad", "values"]


def linear_log_prob(
    x: ArrayLike,
    W: ArrayLike,
    target: ArrayLike,
    b: ArrayLike | None = None,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    ignore_index: int = -100,
    memory_budget: int = DEFAULT_BUDGET,
    backend: str | None = None,
    check: bool | None = None,
    stream: Stream | None = None,
) -> Results:
    """Compute ``log softmax((x·W + b)/temperature)`` at the target classes, and the entropy, without storing the logits.

    Parameters
    ----------
    x, W, b, memory_budget, stream
        As for `linear_cross_entropy`.
    target : array, shape (...), of any integer dtype
        Class ids.
    temperature : float
        Divides the logits; above 0.
    entropy : bool
        Also return the entropy of each row.
    ignore_index, backend, check
        As in `swl.options.Options`.

    Returns
    -------
    log_prob : array, shape (...)
        In nats; float64 if an operand is, else float32. 0 in a row that is ignored.
    entropy : array, shape (...)
        ``−Σ_c p_c·log p_c`` in nats, 0 in a row that is ignored; only with ``entropy=True``.

    Raises
    ------
    ValueError, TypeError
        As `linear_cross_entropy`; also for a target of probabilities.

    Examples
    --------
    >>> import numpy as np, swl
    >>> log_prob, H = swl.linear_log_prob(np.ones((2, 3)), np.zeros((3, 4)), np.array([0, 3]), entropy=True)
    >>> np.exp(log_prob), np.exp(H)
    (array([0.25, 0.25]), array([4., 4.]))
    """
    options = _options(temperature, ignore_index, backend, check)
    runs = resolve(backend, {"x": x, "W": W, "target": target, "b": b})
    with runs.scope(stream, x=x, W=W, target=target):
        W, b = affine_parameters(runs, W, b)
        p = head(runs, x, W, target, b, options, memory_budget, ())
        found = values(p, p.forward(entropy).rows)
    return found if entropy else found[0]


def linear_log_prob_value_and_grad(
    x: ArrayLike,
    W: ArrayLike,
    target: ArrayLike,
    b: ArrayLike | None = None,
    *,
    dlog_prob: ArrayLike = 1.0,
    dentropy: ArrayLike | None = None,
    needs: Iterable[str] = ALL,
    temperature: float = 1.0,
    ignore_index: int = -100,
    memory_budget: int = DEFAULT_BUDGET,
    backend: str | None = None,
    check: bool | None = None,
    stream: Stream | None = None,
) -> Results:
    """Compute `linear_log_prob` and the gradient of ``Σ dlog_prob·log_prob + dentropy·entropy``, in one sweep.

    Parameters
    ----------
    x, W, target, b, temperature, ignore_index, memory_budget, backend, check, stream
        As for `linear_log_prob`.
    dlog_prob : number or 0-d array, or array of shape (...)
        Gradient of what follows with respect to each row's log-probability.
    dentropy : as `dlog_prob`, or None
        The same for the entropy; None: no entropy is asked for.
    needs : iterable of {"dx", "dW", "db"}
        The gradients to compute.

    Returns
    -------
    log_prob : as `linear_log_prob`
    entropy : as `linear_log_prob`
        Only where `dentropy` is given.
    gradients : tuple of dx, dW, db
        As `linear_cross_entropy_value_and_grad`. A row that is ignored adds nothing.

    Examples
    --------
    >>> import numpy as np, swl
    >>> x, W = np.ones((1, 1)), np.zeros((1, 2))
    >>> log_prob, (dx, dW, db) = swl.linear_log_prob_value_and_grad(x, W, np.array([0]))
    >>> dW
    array([[ 0.5, -0.5]])
    """
    options = _options(temperature, ignore_index, backend, check)
    arrays = {"x": x, "W": W, "target": target, "b": b, "dlog_prob": dlog_prob, "dentropy": dentropy}
    runs = resolve(backend, arrays)
    with runs.scope(stream, **arrays):
        W, b = affine_parameters(runs, W, b)
        p = head(runs, x, W, target, b, options, memory_budget, check_needs(needs))
        rows, given = gradients(p, dlog_prob, dentropy)
        log_prob, H = values(p, rows)
        if options.check:
            runs.check()
    return (log_prob, given) if dentropy is None else (log_prob, H, given)


def _options(temperature: float, ignore_index: int, backend: str | None, check: bool | None) -> Options:
    given = {"temperature": temperature, "ignore_index": ignore_index, "backend": backend, "check": check}
    return Options.checked({"reduction": "none", **given})  # type: ignore[typeddict-item]


def head(
    backend: Backend,
    x: Array,
    W: Array,
    target: Array,
    b: Array,
    options: Options,
    memory_budget: int,
    needs: Iterable[str],
) -> Problem:
    """Check inputs, target and options against parameters that were checked before."""
    p = check_linear(backend, x, W, b, target, options, memory_budget, tuple(needs))
    if p.target.ids is None:
        raise ValueError(f"target must have shape {p.leading}, one class id per row of x, got probabilities")
    return p


def values(p: Problem, rows: Rows) -> tuple[Array, Array]:
    """Give the log-probabilities and, where the rows have it, the entropy."""
    xp = p.backend.xp
    H = rows.entropy
    if H is not None:
        H = xp.where(p.target.ids >= 0, H, H.dtype.type(0)).reshape(p.leading)
    return (0 - rows.loss).reshape(p.leading), H


def gradients(p: Problem, dlog_prob: Array, dentropy: Array, known: Rows | None = None) -> tuple[Rows, Array]:
    """Compute rows and ``dx, dW, db``, from `known` rows of an earlier forward, which had statistics, if there are any."""
    xp = p.backend.xp
    source, scale = cast(Formed, p.source), p.row_scale(dlog_prob, "dlog_prob")
    if dentropy is None:
        return source.gradients(p, -scale, known, False)
    both = xp.empty((p.n_rows, 2), dtype=p.acc)
    both[:, 0], both[:, 1] = scale, p.row_scale(dentropy, "dentropy")
    return source.gradients(p, both, known, True, _LogProb(p.backend))


class _LogProb:
    """A `Swept` with the gradient of ``a·log p_t + h·H``; a row's scale is its a and h, divided by the temperature."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def cross_entropy_forward(self, logits: Array, target: Target, stats: bool) -> Rows:
        return self.backend.cross_entropy_forward(logits, target, stats)

    def cross_entropy_forward_backward(
        self, logits: Array, target: Target, row_scale: Array, out: Array, stats: bool
    ) -> Rows:
        rows = self.cross_entropy_forward(logits, target, stats)
        self.cross_entropy_backward(logits, target, rows, row_scale, out)
        return rows

    def cross_entropy_backward(self, logits: Array, target: Target, rows: Rows, row_scale: Array, out: Array) -> None:
        xp = self.backend.xp
        N, C = logits.shape
        column = target.ids - target.first_class
        hit = (column >= 0) & (column < C) & (target.ids >= 0)
        at_hit = xp.where(hit, row_scale[:, 0], row_scale.dtype.type(0))
        column = xp.clip(column, 0, C - 1)
        no_row = (target.ids < 0)[:, None]
        lowest = np.finfo(logits.dtype).min

        def some(i: int, j: int) -> None:
            here = slice(i, j)
            with np.errstate(all="ignore"):
                log_p = final_logits(xp, plus_bias(logits[here], target), target)
                log_p -= rows.row_max[here, None]
                log_p -= rows.log_sum[here, None]
                p = xp.exp(log_p)
                g = xp.maximum(log_p, lowest, out=log_p)  # 0·log 0 is 0
                g += rows.entropy[here, None]
                g *= p
                g *= -row_scale[here, 1:]
                p *= row_scale[here, :1]
                g -= p
                g[xp.arange(j - i), column[here]] += at_hit[here]
                xp.copyto(g, g.dtype.type(0), where=no_row[here])
                out[here] = g

        self.backend.by_rows(some, N, C)
