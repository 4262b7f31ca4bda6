"""The operations as functions: check once, resolve the backend once, call one operation, reduce.

Gradients are with respect to the sum of ``dout · loss``, as everywhere in the library.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple, Unpack

import numpy as np

from swl.backends import Backend, Rows, resolve
from swl.targets import OptionKwargs, Options, Target

__all__ = [
    "RowStats",
    "affine",
    "affine_backward",
    "cross_entropy",
    "cross_entropy_value_and_grad",
]


class RowStats(NamedTuple):
    """Per-row by-products of a loss, each of the target's leading shape ``(...)``.

    The log of the partition function is ``lse = row_max + log_sum``; the two stay apart because at ``|z| = 1e8`` their
    float32 sum has no bits left for the logarithm.
    """

    row_max: Any
    """max_c z_c."""
    log_sum: Any
    """log Σ_c exp(z_c − row_max), in nats."""
    log_prob: Any
    """log p_t, or Σ_c q_c·log p_c for probabilities, in nats, without weights or smoothing; 0 for an ignored row."""
    entropy: Any
    """−Σ_c p_c·log p_c, in nats."""
    argmax: Any
    """The class with the largest logit, the first of equals; int64."""


# ------------------------------------------------------------------------------------------------ checks


def acc_dtype(dtype: Any) -> np.dtype[Any]:
    """Return the dtype that arithmetic on `dtype` uses: float64 for float64, else float32."""
    return _F64 if dtype == _F64 else _F32


_F32, _F64 = np.dtype(np.float32), np.dtype(np.float64)
_NATIVE_FLOATS = frozenset((np.dtype(np.float16), _F32, _F64))


def is_float(dtype: Any) -> bool:
    """Tell whether the kernels take `dtype` for logits, inputs and parameters."""
    return dtype in _NATIVE_FLOATS or getattr(dtype, "name", "") == "bfloat16"


def float_array(backend: Backend, name: str, x: Any) -> Any:
    """Bring `x` to the backend and check that it is of a floating dtype that swl computes with."""
    x = backend.asarray(x)
    if not is_float(x.dtype):
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    return x


def real_array(backend: Backend, name: str, x: Any) -> Any:
    """Bring `x` to the backend and check that it holds real numbers of any dtype."""
    x = backend.asarray(x)
    if not (is_float(x.dtype) or x.dtype.kind in "iub"):
        raise TypeError(f"{name} must hold real numbers, got {x.dtype}")
    return x


def require_shape(name: str, x: Any, legal: tuple[int, ...], meaning: str) -> None:
    """Raise the ValueError that names argument, shape and legal shape, unless they agree."""
    if x.shape != legal:
        raise ValueError(f"{name} must have shape {legal} ({meaning}), got {x.shape}")


def _size(shape: Iterable[int]) -> int:
    return math.prod(shape)


# ------------------------------------------------------------------------------------------------ affine


class AffinePass(NamedTuple):
    """A forward pass of an affine map, and all that a backward pass needs of it."""

    backend: Backend
    x: Any  # as it came, on the backend
    x2: Any  # (N, D), of a floating dtype
    W: Any
    leading: tuple[int, ...]  # (...) of the result

    @classmethod
    def of(cls, backend: Backend, x: Any, W: Any) -> AffinePass:
        """Check the inputs against parameters that were checked before."""
        x = x2 = real_array(backend, "x", x)
        if x.dtype.kind in "iub":
            x2 = x.astype(W.dtype)
        x2, leading = flatten_inputs(x2, W.shape[0])
        return cls(backend, x, x2, W, leading)

    def forward(self, b: Any) -> Any:
        """Compute ``y = x·W + b``."""
        backend, _, x2, W, leading = self
        same = x2.dtype == W.dtype and (b is None or b.dtype == W.dtype)
        dtype = W.dtype if same else backend.xp.result_type(*(a for a in (x2, W, b) if a is not None))
        y = backend.empty((x2.shape[0], W.shape[1]), dtype)
        backend.affine_forward(x2, W, b, y)
        return y if len(leading) == 1 else y.reshape(*leading, W.shape[1])

    def backward(self, dout: Any, needs: Collection[str] = ("dx", "dW", "db")) -> tuple[Any, Any, Any]:
        """Compute ``dx, dW, db``, each in an array of its own or None; any number of times."""
        backend, x, x2, W, leading = self
        K = W.shape[1]
        dout = float_array(backend, "dout", dout)
        require_shape("dout", dout, (*leading, K), "the shape of the affine map's result")
        dx = backend.empty(x2.shape, x2.dtype) if "dx" in needs else None
        dW = backend.empty(W.shape, W.dtype) if "dW" in needs else None
        db = backend.empty((K,), W.dtype) if "db" in needs else None
        backend.affine_backward(dout.reshape(x2.shape[0], K), x2, W, dx, dW, db)
        return (None if dx is None else dx.reshape(x.shape)), dW, db


def affine_parameters(backend: Backend, W: Any, b: Any) -> tuple[Any, Any]:
    """Bring the parameters of an affine map to the backend and check them."""
    W = float_array(backend, "W", W)
    if W.ndim != 2:
        raise ValueError(f"W must have shape (D, K), got {W.shape}")
    if b is not None:
        b = float_array(backend, "b", b)
        require_shape("b", b, (W.shape[1],), "the columns of W")
    return W, b


def flatten_inputs(x: Any, D: int) -> tuple[Any, tuple[int, ...]]:
    """Bring ``(..., D)``, or ``(N, ...)`` with trailing axes of product D, to ``(rows, D)``; also give the leading shape.

    Raises
    ------
    ValueError
        If neither reading fits.
    """
    shape = x.shape
    if shape and shape[-1] == D:
        leading = shape[:-1]
    elif len(shape) > 1 and _size(shape[1:]) == D:
        leading = shape[:1]
    else:
        raise ValueError(f"x must have shape (..., {D}), or (N, ...) with trailing axes of product {D}, got {shape}")
    return x if len(shape) == 2 and len(leading) == 1 else x.reshape(_size(leading), D), leading


def affine(x: Any, W: Any, b: Any = None) -> Any:
    """Compute the affine map ``y = x·W + b``.

    Parameters
    ----------
    x : array, shape (..., D) or (N, ...) with trailing axes of product D
        Inputs; integers are converted to the dtype of `W`. Any strides.
    W : array, shape (D, K), floating
    b : array, shape (K,), floating, optional

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
    W, b = affine_parameters(backend, W, b)
    return AffinePass.of(backend, x, W).forward(b)


def affine_backward(
    dout: Any, x: Any, W: Any, *, needs: Iterable[str] = ("dx", "dW", "db")
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
    W, _ = affine_parameters(backend, W, None)
    return AffinePass.of(backend, x, W).backward(dout, check_needs(needs))


def check_needs(needs: Iterable[str]) -> frozenset[str]:
    """Check a ``needs=`` argument."""
    wanted = frozenset((needs,) if isinstance(needs, str) else needs)
    if not wanted <= {"dx", "dW", "db"}:
        raise ValueError(f"needs may name 'dx', 'dW' and 'db' only, got {sorted(wanted)}")
    return wanted


# ------------------------------------------------------------------------------------------------ cross-entropy


class Problem(NamedTuple):
    """A loss whose arguments were checked: the form in which `cross_entropy` and the fused head share it."""

    backend: Backend
    options: Options
    target: Target
    leading: tuple[int, ...]  # (...) of the rows
    n_rows: int
    acc: np.dtype[Any]
    sample_weight: Any  # (N,), acc; or None
    denominator: Any  # what the mean divides by, a float or a 0-d array; None for the other reductions

    def row_scale(self, dout: Any) -> Any:
        """Fold upstream gradient, row weights and denominator into what a backward kernel takes: (N,) or (1,)."""
        xp, options = self.backend.xp, self.options
        if isinstance(dout, (int, float)):
            scale: Any = dout
        else:
            scale = real_array(self.backend, "dout", dout)
            legal = self.leading if options.reduction == "none" else ()
            if scale.ndim != 0:
                require_shape("dout", scale, legal, f"one value per loss of reduction={options.reduction!r}")
                scale = scale.reshape(self.n_rows)
        if self.denominator is not None:
            scale = scale * inverse(xp, self.denominator)
        if self.sample_weight is not None:
            scale = scale * self.sample_weight
        if isinstance(scale, (int, float)):  # asarray would copy from the host, which a CUDA graph cannot repeat
            return xp.full(1, scale, dtype=self.acc)
        return xp.asarray(scale, dtype=self.acc).reshape(-1)

    def reduce(self, loss: Any) -> Any:
        """Reduce the rows' losses ``(N,)``."""
        if self.sample_weight is not None:
            loss = loss * self.sample_weight
        if self.options.reduction == "none":
            return loss.reshape(self.leading)
        total = loss.sum(dtype=_F64)
        if self.denominator is not None:
            total = total * inverse(self.backend.xp, self.denominator)
        return self.backend.xp.asarray(total, dtype=self.acc)

    def stats(self, rows: Rows) -> RowStats:
        """Give the by-products the shape of the target."""
        return RowStats(*(getattr(rows, name).reshape(self.leading) for name in RowStats._fields))

    def finish(self) -> None:
        """Raise the errors of a device now, if the caller asked for that."""
        if self.options.check:
            self.backend.check()


def inverse(xp: Any, denominator: Any) -> Any:
    """1/denominator, and 0 where nothing counts."""
    if isinstance(denominator, float):
        return 1.0 / denominator if denominator else 0.0
    return xp.where(denominator != 0, 1.0 / xp.where(denominator != 0, denominator, 1.0), 0.0)


def problem(
    backend: Backend, target: Any, leading: tuple[int, ...], C: int, acc: np.dtype[Any], options: Options
) -> Problem:
    """Check target and options against logits of shape ``(*leading, C)``."""
    xp = backend.xp
    n_rows = _size(leading)
    weight, sample_weight = options.weight, options.sample_weight
    if weight is not None:
        weight = real_array(backend, "weight", weight)
        require_shape("weight", weight, (C,), "one per class")
        weight = xp.ascontiguousarray(weight, dtype=acc)
    if sample_weight is not None:
        sample_weight = real_array(backend, "sample_weight", sample_weight)
        require_shape("sample_weight", sample_weight, leading, "one per row")
        sample_weight = sample_weight.reshape(n_rows).astype(acc, copy=False)

    target = backend.asarray(target)
    ids = probs = row_weight = None
    counted: Any = float(n_rows)  # Σ m
    if target.shape == leading:
        if target.dtype.kind not in "iu":
            raise TypeError(f"target of class ids must be of an integer dtype, got {target.dtype}")
        ids, row_weight, counted = backend.prepare_ids(target.reshape(n_rows), C, options.ignore_index, weight)
    elif target.shape == (*leading, C):
        probs = real_array(backend, "target of probabilities", target).reshape(n_rows, C)
    else:
        raise ValueError(
            f"target must have shape {leading} (class ids) or {(*leading, C)} (probabilities) "
            f"for {C} classes, got {target.shape}"
        )
    denominator = None
    if options.reduction == "mean":
        denominator = options.denominator
        if denominator is None:
            denominator = counted if sample_weight is None else _weighted_count(xp, sample_weight, ids, row_weight)
        elif isinstance(denominator, (int, float)) or backend.xp is np:
            denominator = float(denominator)
        else:
            denominator = backend.asarray(denominator)

    eps = options.label_smoothing
    spec = Target(
        ids=ids,
        probs=probs,
        weight=weight,
        row_weight=row_weight,
        hot=1.0 - eps,
        rest=eps / C,
        softcap=options.softcap or 0.0,
        z_loss=options.z_loss,
    )
    return Problem(backend, options, spec, leading, n_rows, acc, sample_weight, denominator)


def _weighted_count(xp: Any, sample_weight: Any, ids: Any, row_weight: Any) -> Any:
    """Σ_n s_n·m_n, in float64."""
    if row_weight is not None:
        sample_weight = sample_weight * row_weight
    elif ids is not None:
        sample_weight = xp.where(ids >= 0, sample_weight, 0)
    total = sample_weight.sum(dtype=_F64)
    return float(total) if xp is np else total


class Pass(NamedTuple):
    """A forward pass over logits, and all that a backward pass needs of it."""

    problem: Problem
    logits: Any  # as it came, (..., C)
    logits_nc: Any  # (N, C)
    rows: Rows

    def backward(self, dout: Any = 1.0, out: Any = None) -> Any:
        """Compute ``dout · ∂loss/∂logits``; any number of times."""
        p = self.problem
        scale = p.row_scale(dout)
        grad = _Gradient.into(p, out, self.logits, self.logits_nc, scale)
        p.backend.cross_entropy_backward(self.logits_nc, p.target, self.rows, scale, grad.nc)
        return grad.finish()

    def probabilities(self) -> Any:
        """Compute softmax(z), shape (..., C), of the arithmetic's dtype."""
        p, xp, rows = self.problem, self.problem.backend.xp, self.rows
        if p.target.ids is not None:  # a forward sweep without statistics may pass over ignored rows
            rows = p.backend.cross_entropy_forward(self.logits_nc, p.target, True)
        z = self.logits_nc.astype(p.acc)
        if p.target.softcap:
            z = p.target.softcap * xp.tanh(z / p.target.softcap)
        with np.errstate(invalid="ignore"):  # a row of −inf is NaN, as everywhere
            z -= rows.row_max[:, None]
            z -= rows.log_sum[:, None]
        return xp.exp(z, out=z).reshape(self.logits.shape)


class _Gradient(NamedTuple):
    """Where a gradient goes: `nc` is what the kernel writes, `whole` what the caller gets."""

    xp: Any
    whole: Any
    nc: Any

    @classmethod
    def into(cls, p: Problem, out: Any, logits: Any, logits_nc: Any, scale: Any) -> _Gradient:
        backend = p.backend
        if out is None:
            nc = backend.empty(logits_nc.shape, logits_nc.dtype)
            return cls(backend.xp, nc if logits.ndim == 2 else nc.reshape(logits.shape), nc)
        if backend.asarray(out) is not out:
            raise TypeError(f"out must be an array of the {backend.name} backend, got {type(out).__name__}")
        require_shape("out", out, logits.shape, "the shape of logits")
        if out.dtype != logits.dtype:
            raise TypeError(f"out must have the dtype of logits, {logits.dtype}, got {out.dtype}")
        if not getattr(out.flags, "writeable", True):
            raise ValueError("out is read-only")
        if out.size and any(step == 0 and n > 1 for step, n in zip(out.strides, out.shape, strict=True)):
            raise ValueError(f"out must have a place for every element, got strides {out.strides}")
        xp, target = backend.xp, p.target
        overlap = np.shares_memory if xp is np else xp.may_share_memory  # the exact answer would wait for a device
        same = out is logits or (out.strides == logits.strides and _address(out) == _address(logits))
        if not same and overlap(out, logits):
            raise ValueError("out overlaps logits without being the same array")
        for name, other in (("target", target.probs), ("weight", target.weight), ("dout or sample_weight", scale)):
            if other is not None and overlap(out, other):
                raise ValueError(f"out overlaps {name}")
        return cls(xp, out, out if out.ndim == 2 else out.reshape(logits_nc.shape))

    def finish(self) -> Any:
        if self.whole is not self.nc and not self.xp.may_share_memory(self.whole, self.nc):
            self.whole[...] = self.nc.reshape(self.whole.shape)  # leading axes that do not merge into one
        return self.whole


def _address(x: Any) -> int:
    interface = getattr(x, "__cuda_array_interface__", None) or x.__array_interface__
    return int(interface["data"][0])


def logits_problem(logits: Any, target: Any, options: Options, out: Any = None) -> tuple[Problem, Any, Any]:
    """Check logits and target; also give the logits as an array, and that as (N, C)."""
    backend = resolve(
        options.backend,
        {
            "logits": logits,
            "target": target,
            "weight": options.weight,
            "sample_weight": options.sample_weight,
            "out": out,
        },
    )
    logits = float_array(backend, "logits", logits)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have shape (..., C) with at least one class, got {logits.shape}")
    *leading, C = logits.shape
    p = problem(backend, target, tuple(leading), C, acc_dtype(logits.dtype), options)
    return p, logits, logits if logits.ndim == 2 else logits.reshape(p.n_rows, C)


def cross_entropy_forward(logits: Any, target: Any, options: Options, stats: bool = False) -> Pass:
    """Run the forward sweep and keep what the backward sweep needs."""
    p, logits, logits_nc = logits_problem(logits, target, options)
    rows = p.backend.cross_entropy_forward(logits_nc, p.target, stats)
    p.finish()
    return Pass(p, logits, logits_nc, rows)


def cross_entropy(logits: Any, target: Any, *, stats: bool = False, **options: Unpack[OptionKwargs]) -> Any:
    r"""Compute the softmax cross-entropy of logits against class ids or probabilities, forward only.

    Per row, with the target row ``y`` of `swl.targets` and ``A = Σ_c y_c``::

        loss = A·S − Σ_c y_c·(z_c − M) + λ·m·(M + S)²        M = max_c z_c,  S = log Σ_c exp(z_c − M)

    Parameters
    ----------
    logits : array, shape (..., C)
        float64, float32, float16 or bfloat16; any strides; never written to. The last two compute in float32.
    target : array, shape (...) of any integer dtype, or (..., C) of any real dtype
        Class ids, or probabilities (one-hot included).
    stats : bool
        Also return a `RowStats` of the same pass.
    **options
        The fields of `swl.targets.Options`: ``weight, ignore_index, reduction, label_smoothing, sample_weight, z_loss,
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
    done = cross_entropy_forward(logits, target, Options.checked(options), stats)
    loss = done.problem.reduce(done.rows.loss)
    return (loss, done.problem.stats(done.rows)) if stats else loss


def cross_entropy_value_and_grad(
    logits: Any,
    target: Any,
    *,
    dout: Any = 1.0,
    out: Any = None,
    stats: bool = False,
    **options: Unpack[OptionKwargs],
) -> Any:
    """Compute the loss of `cross_entropy` and its gradient with respect to the logits, in one sweep.

    Per row, with ``p_c = exp(z_c − M − S)``::

        ∂loss/∂z_c = (A + 2λ·m·(M + S))·p_c − y_c        times  1 − (z_c/κ)²  with a softcap

    Parameters
    ----------
    logits, target, stats, **options
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
    return value_and_grad(logits, target, Options.checked(options), dout, out, stats)


def value_and_grad(
    logits: Any, target: Any, options: Options, dout: Any = 1.0, out: Any = None, stats: bool = False
) -> Any:
    """Run `cross_entropy_value_and_grad` with options that were checked before."""
    done, grad = one_sweep(logits, target, options, dout, out, stats)
    loss = done.problem.reduce(done.rows.loss)
    return (loss, grad, done.problem.stats(done.rows)) if stats else (loss, grad)


def one_sweep(
    logits: Any, target: Any, options: Options, dout: Any = 1.0, out: Any = None, stats: bool = False
) -> tuple[Pass, Any]:
    """Run forward and backward in one sweep and keep the pass, whose logits are gone if `out` overwrote them."""
    p, logits, logits_nc = logits_problem(logits, target, options, out)
    scale = p.row_scale(dout)
    grad = _Gradient.into(p, out, logits, logits_nc, scale)
    rows = p.backend.cross_entropy_forward_backward(logits_nc, p.target, scale, grad.nc, stats)
    p.finish()
    return Pass(p, logits, logits_nc, rows), grad.finish()
