"""The operations as functions: check once, resolve the backend once, call one operation, reduce.

Gradients are with respect to the sum of ``dout · loss``, as everywhere in the library.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from swl.backends import Backend, resolve
from swl.ops.checks import affine_parameters, check_needs
from swl.ops.chunks import DEFAULT_BUDGET
from swl.ops.loss import AffinePass, LinearPass, at_once, cross_entropy_forward, one_sweep
from swl.ops.problem import RowStats
from swl.options import OptionKwargs, Options

__all__ = [
    "RowStats",
    "affine",
    "affine_backward",
    "cross_entropy",
    "cross_entropy_value_and_grad",
    "linear_cross_entropy",
    "linear_cross_entropy_value_and_grad",
]


def affine(x: Any, W: Any, b: Any = None, *, stream: Any = None) -> Any:
    """Compute the affine map ``y = x·W + b``.

    Parameters
    ----------
    x : array, shape (..., D) or (N, ...) with trailing axes of product D
        Inputs; integers are converted to the dtype of `W`. Any strides.
    W : array, shape (D, K), floating
    b : array, shape (K,), floating, optional
    stream : cupy.cuda.Stream, or an object with ``__cuda_stream__``, optional
        Where the work goes, for arrays on a device; by default to CuPy's current stream for that device.

    Returns
    -------
    array, shape (..., K)
        Of the common dtype of the operands. 16-bit operands are multiplied and summed in float32 and rounded once.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what came and what is legal.

    Examples
    --------
    >>> import numpy as np, swl
    >>> swl.affine(np.array([[1., 2.]]), np.eye(2), np.array([10., 20.]))
    array([[11., 22.]])
    """
    backend = resolve(None, {"x": x, "W": W, "b": b})
    with backend.scope(stream, x=x, W=W, b=b):
        W, b = affine_parameters(backend, W, b)
        return AffinePass.of(backend, x, W).forward(b)


def affine_backward(
    dout: Any, x: Any, W: Any, *, needs: Iterable[str] = ("dx", "dW", "db"), stream: Any = None
) -> tuple[Any | None, Any | None, Any | None]:
    """Compute the gradients of an affine map: ``dx = dout·Wᵀ``, ``dW = xᵀ·dout``, ``db = Σ_n dout``.

    Parameters
    ----------
    dout : array, shape (..., K), floating
        Gradient of what follows with respect to ``y``.
    x, W : arrays
        The operands of the forward call.
    needs : iterable of {"dx", "dW", "db"}
        The gradients to compute.
    stream : as for `affine`

    Returns
    -------
    dx, dW, db : array or None
        Of the shapes of `x`, `W` and ``(K,)``; `dW` and `db` of the dtype of `W`, `dx` of the dtype of `x` (of `W` where
        `x` holds integers). None for a gradient not in `needs`.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what came and what is legal.

    Examples
    --------
    >>> import numpy as np, swl
    >>> dx, dW, db = swl.affine_backward(np.ones((1, 2)), np.array([[1., 2.]]), np.eye(2), needs=("dW", "db"))
    >>> dx is None, dW.tolist(), db.tolist()
    (True, [[1.0, 1.0], [2.0, 2.0]], [1.0, 1.0])
    """
    backend = resolve(None, {"x": x, "W": W, "dout": dout})
    with backend.scope(stream, x=x, W=W, dout=dout):
        W, _ = affine_parameters(backend, W, None)
        return AffinePass.of(backend, x, W).backward(dout, check_needs(needs))


def cross_entropy(
    logits: Any, target: Any, *, stats: bool = False, stream: Any = None, **options: Unpack[OptionKwargs]
) -> Any:
    r"""Compute the softmax cross-entropy of logits against class ids or probabilities, forward only.

    Per row, with the target row ``y`` of `swl.backends.protocol` and ``A = Σ_c y_c``::

        loss = A·S − Σ_c y_c·(z_c − M) + λ·m·(M + S)²        M = max_c z_c,  S = log Σ_c exp(z_c − M)

    Parameters
    ----------
    logits : array, shape (..., C)
        float64, float32, float16 or bfloat16; any strides; never written to. The last two compute in float32.
    target : array, shape (...) of any integer dtype, or (..., C) of any real dtype
        Class ids, or probabilities (one-hot included).
    stats : bool
        Also return a `RowStats` of the same pass.
    stream : as for `affine`
    **options
        The fields of `swl.options.Options`: ``weight, ignore_index, reduction, label_smoothing, sample_weight, z_loss,
        softcap, denominator, backend, check``.

    Returns
    -------
    loss : 0-d array, or shape (...) under ``reduction="none"``
        In nats; float64 for float64 logits, else float32. The mean over class ids divides by ``Σ s·w_t`` of the rows that
        count, over probabilities by ``Σ s``, and is 0 when nothing counts.
    stats : RowStats
        Only with ``stats=True``.

    Raises
    ------
    ValueError
        For wrong shapes or option values; on a host also for a class id outside ``[0, C)`` that is not `ignore_index`.
    TypeError
        For wrong dtypes, or arrays of two libraries or devices.

    Notes
    -----
    Extra memory is ``O(N)``. ``−inf`` at a class without target mass is a mask. ``−inf`` at the target gives ``+inf``. A NaN,
    a ``+inf`` or a row of ``−inf`` only gives NaN in that row alone. With `softcap`, ``∓inf`` becomes ``∓κ``.

    Examples
    --------
    >>> import numpy as np, swl
    >>> swl.cross_entropy(np.zeros((2, 4)), np.array([0, 3]))
    array(1.38629436)
    """
    checked = Options.checked(options)
    if (small := at_once(logits, target, checked, stats, stream)) is not None:
        return small[0]
    done = cross_entropy_forward(logits, target, checked, stats, stream)
    return (done.loss, done.problem.stats(done.rows)) if stats else done.loss


def cross_entropy_value_and_grad(
    logits: Any,
    target: Any,
    *,
    dout: Any = 1.0,
    out: Any = None,
    stats: bool = False,
    stream: Any = None,
    **options: Unpack[OptionKwargs],
) -> Any:
    """Compute the loss of `cross_entropy` and its gradient with respect to the logits, in one sweep.

    Per row, with ``p_c = exp(z_c − M − S)``::

        ∂loss/∂z_c = (A + 2λ·m·(M + S))·p_c − y_c        times  1 − (z_c/κ)²  with a softcap

    Parameters
    ----------
    logits, target, stats, stream, **options
        As for `cross_entropy`.
    dout : number or 0-d array; under ``reduction="none"`` also shape (...)
        Gradient of what follows with respect to the loss.
    out : array of the shape and dtype of `logits`, optional
        Where to write the gradient; may be `logits` itself. A new array by default.

    Returns
    -------
    loss : as `cross_entropy`
    dlogits : array, shape (..., C), of the dtype of `logits`
        Formed in float32 (float64 for float64 logits) and rounded once. Exactly 0 in rows that do not count.
    stats : RowStats
        Only with ``stats=True``.

    Raises
    ------
    ValueError, TypeError
        As `cross_entropy`; also if `out` has another shape or dtype, is read-only, or overlaps an operand that it is not.

    Examples
    --------
    >>> import numpy as np, swl
    >>> loss, dlogits = swl.cross_entropy_value_and_grad(np.zeros((2, 2)), np.array([0, 1]))
    >>> dlogits
    array([[-0.25,  0.25],
           [ 0.25, -0.25]])
    """
    checked = Options.checked(options)
    if dout is not None and (small := at_once(logits, target, checked, stats, stream, dout, out)) is not None:
        return small
    done, grad = one_sweep(logits, target, checked, dout, out, stats, stream)
    return (done.loss, grad, done.problem.stats(done.rows)) if stats else (done.loss, grad)


def linear_cross_entropy(
    x: Any,
    W: Any,
    target: Any,
    b: Any = None,
    *,
    memory_budget: int = DEFAULT_BUDGET,
    stats: bool = False,
    stream: Any = None,
    **options: Unpack[OptionKwargs],
) -> Any:
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
    checked = Options.checked(options)
    backend = _linear_backend(x, W, target, b, checked)
    with backend.scope(stream, x=x, W=W, target=target):
        W, b = affine_parameters(backend, W, b)
        done = LinearPass.of(backend, x, W, b, target, checked, memory_budget)
        rows = done.forward(stats)
        loss = done.problem.reduce(rows.loss)
    return (loss, done.problem.stats(rows)) if stats else loss


def linear_cross_entropy_value_and_grad(
    x: Any,
    W: Any,
    target: Any,
    b: Any = None,
    *,
    dout: Any = 1.0,
    needs: Iterable[str] = ("dx", "dW", "db"),
    memory_budget: int = DEFAULT_BUDGET,
    stats: bool = False,
    stream: Any = None,
    **options: Unpack[OptionKwargs],
) -> Any:
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

    Raises
    ------
    ValueError, TypeError
        As `linear_cross_entropy`.

    Examples
    --------
    >>> import numpy as np, swl
    >>> x, W = np.ones((1, 1)), np.zeros((1, 2))
    >>> loss, (dx, dW, db) = swl.linear_cross_entropy_value_and_grad(x, W, np.array([0]))
    >>> dW
    array([[-0.5,  0.5]])
    """
    wanted = check_needs(needs)
    checked = Options.checked(options)
    backend = _linear_backend(x, W, target, b, checked, dout)
    with backend.scope(stream, x=x, W=W, target=target):
        W, b = affine_parameters(backend, W, b)
        done = LinearPass.of(backend, x, W, b, target, checked, memory_budget)
        rows, gradients = done.gradients(dout, wanted, stats=stats)
        loss = done.problem.reduce(rows.loss)
    return (loss, gradients, done.problem.stats(rows)) if stats else (loss, gradients)


def _linear_backend(x: Any, W: Any, target: Any, b: Any, options: Options, dout: Any = None) -> Backend:
    arrays = {
        "x": x,
        "W": W,
        "target": target,
        "b": b,
        "weight": options.weight,
        "sample_weight": options.sample_weight,
        "denominator": options.denominator,
        "dout": dout,
    }
    return resolve(options.backend, arrays)
