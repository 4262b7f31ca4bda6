"""Softmax cross-entropy of stored logits: the functions, and the logits as the source of a loss."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple, Unpack

import numpy as np

from swl.backends import Backend, Rows, active, get, resolve
from swl.ops.checks import acc_dtype, float_array, places_apart, require_shape, size_of
from swl.ops.loss import Loss, Problem, inverse, problem
from swl.ops.rows import final_logits
from swl.options import DEFAULTS, OptionKwargs, Options
from swl.typing import Array, ArrayLike, Results, Stream

__all__ = ["SMALL", "cross_entropy", "cross_entropy_value_and_grad"]


def cross_entropy(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    stats: bool = False,
    stream: Stream | None = None,
    **options: Unpack[OptionKwargs],
) -> Results:
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
        The fields of `swl.options.Options`.

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
    done = forward(logits, target, Options.checked(options), stats=stats, stream=stream)
    return (done.value, done.stats()) if stats else done.value


def cross_entropy_value_and_grad(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    dout: ArrayLike = 1.0,
    out: ArrayLike | None = None,
    stats: bool = False,
    stream: Stream | None = None,
    **options: Unpack[OptionKwargs],
) -> Results:
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
    done, dlogits = forward_backward(logits, target, Options.checked(options), dout, out, stats=stats, stream=stream)
    return (done.value, dlogits, done.stats()) if stats else (done.value, dlogits)


# ------------------------------------------------------------------------------------------------ the logits


class Stored(NamedTuple):
    """Logits in an array, and where their gradient goes."""

    logits: Array  # as they came, (..., C)
    logits_nc: Array  # (N, C)
    out: Array = None

    @property
    def home(self) -> dict[str, Array]:
        return {"logits": self.logits}

    def forward(self, p: Problem, stats: bool) -> Rows:
        return p.backend.cross_entropy_forward(self.logits_nc, p.target, stats)

    def forward_backward(self, p: Problem, dout: Array, stats: bool) -> tuple[Rows, Array]:
        scale = p.row_scale(dout)
        gradient = _Gradient.into(p, self, scale)
        rows = p.backend.cross_entropy_forward_backward(self.logits_nc, p.target, scale, gradient.nc, stats)
        return rows, gradient.finish()

    def backward(self, p: Problem, dout: Array, rows: Rows) -> Array:
        scale = p.row_scale(dout)
        gradient = _Gradient.into(p, self, scale)
        p.backend.cross_entropy_backward(self.logits_nc, p.target, rows, scale, gradient.nc)
        return gradient.finish()

    def probabilities(self, p: Problem, rows: Rows) -> Array:
        with np.errstate(invalid="ignore"):  # a row of −inf is NaN, as everywhere
            if p.target.ids is not None:  # a forward sweep without statistics may pass over ignored rows
                rows = p.backend.cross_entropy_forward(self.logits_nc, p.target, True)
            xp = p.backend.xp
            z = final_logits(xp, self.logits_nc.astype(p.acc), p.target)
            z -= rows.row_max[:, None]
            z -= rows.log_sum[:, None]
            return xp.exp(z, out=z).reshape(self.logits.shape)


def check(
    logits: Array,
    target: Array,
    options: Options,
    backend: Backend | None = None,
    dout: Array = None,
    out: Array = None,
) -> Problem:
    """Check logits, target and options; the arrays decide the backend unless it is given."""
    if backend is None:
        backend = _backend_of(logits, target, options, dout, out)
    logits = float_array(backend, "logits", logits)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have shape (..., C) with at least one class, got {logits.shape}")
    *leading, C = logits.shape
    logits_nc = logits if logits.ndim == 2 else logits.reshape(size_of(leading), C)
    source = Stored(logits, logits_nc, out)
    return problem(backend, source, target, tuple(leading), C, acc_dtype(logits.dtype), options)


def forward(
    logits: Array,
    target: Array,
    options: Options,
    *,
    stats: bool = False,
    stream: Stream | None = None,
    keep: bool = False,
) -> Loss:
    """Compute the loss; to `keep` it is to call `backward` later."""
    if not stats and stream is None and (small := _small(logits, target, options, 1.0 if keep else None, None, keep)):
        return small
    backend = _backend_of(logits, target, options)
    with backend.scope(stream, logits=logits, target=target):
        return check(logits, target, options, backend).forward(stats)


def forward_backward(
    logits: Array,
    target: Array,
    options: Options,
    dout: Array = 1.0,
    out: Array = None,
    *,
    stats: bool = False,
    stream: Stream | None = None,
    keep: bool = False,
) -> tuple[Loss, Array]:
    """Compute the loss and its gradient in one sweep; the logits are gone if `out` overwrote them."""
    if dout is None:
        raise TypeError("dout must be a number or an array, got None")
    if not stats and stream is None and (small := _small(logits, target, options, dout, out, keep)):
        return small, small.take()
    backend = _backend_of(logits, target, options, dout, out)
    with backend.scope(stream, logits=logits, target=target):
        return check(logits, target, options, backend, dout, out).forward_backward(dout, stats)


def _backend_of(logits: Array, target: Array, options: Options, dout: Array = None, out: Array = None) -> Backend:
    arrays = {"logits": logits, "target": target, **options.arrays(), "dout": dout, "out": out}
    return resolve(options.backend, arrays)


# ------------------------------------------------------------------------------------------------ small problems

SMALL = 1 << 18
"""Logits up to which calls take so much of the time that `_small` is worth a way of its own."""


class _Small(Loss):
    """A loss that one call of a kernel has computed; what it did not compute is computed when it is asked for."""

    __slots__ = ("_arguments", "_done", "_gradient")

    def __init__(self, value: Any, gradient: Array, *arguments: Any) -> None:
        self.value, self._gradient, self._arguments = value, gradient, arguments
        self._done: Loss | None = None

    def take(self) -> Array:
        """Hand over the gradient for an upstream gradient of 1."""
        gradient, self._gradient = self._gradient, None
        return gradient

    def backward(self, dout: Array = 1.0) -> Array:
        gradient = self.take()
        if gradient is not None and type(dout) in (int, float) and dout == 1:
            return gradient
        return super().backward(dout)

    @property
    def _general(self) -> Loss:
        if self._done is None:
            self._done = check(*self._arguments).forward()
        return self._done

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        return self._general.problem

    @property
    def rows(self) -> Rows:  # type: ignore[override]
        return self._general.rows


def _small(logits: Array, target: Array, options: Options, dout: Array, out: Array, keep: bool) -> _Small | None:
    """Compute a small problem as most are: on the host, without options, and its gradient unless `dout` is None.

    Returns None, leaving `out` untouched, where the general way must be taken, which also says what is wrong.
    """
    if options is not DEFAULTS or type(logits) is not np.ndarray or logits.size > SMALL:
        return None
    if dout is not None:
        if type(dout) not in (float, int) or dout != 1:
            return None
        out = np.empty_like(logits) if out is None else out
    if type(target) is not np.ndarray or type(out) not in (np.ndarray, type(None)):
        return None
    backend = get(active())
    done = backend.plain_loss(logits, target, options.ignore_index, out)
    if done is None:
        return None
    total, count = done
    value = np.asarray(total * inverse(np, count), logits.dtype)
    return _Small(value, out, logits, target.copy() if keep else target, options, backend)


# ------------------------------------------------------------------------------------------------ the gradient


class _Gradient(NamedTuple):
    """Where a gradient goes: `nc` is what the kernel writes, `whole` what the caller gets."""

    xp: Any
    whole: Array
    nc: Any

    @classmethod
    def into(cls, p: Problem, source: Stored, scale: Array) -> _Gradient:
        """Check the caller's array, or make one."""
        backend, (logits, logits_nc, out) = p.backend, source
        if out is None:
            nc = backend.empty(logits_nc.shape, logits_nc.dtype)
            return cls(backend.xp, nc if logits.ndim == 2 else nc.reshape(logits.shape), nc)
        if not backend.owns(out):
            raise TypeError(f"out must be an array of the {backend.name} backend, got {type(out).__name__}")
        require_shape("out", out, logits.shape, "the shape of logits")
        if out.dtype != logits.dtype:
            raise TypeError(f"out must have the dtype of logits, {logits.dtype}, got {out.dtype}")
        if not getattr(out.flags, "writeable", True):
            raise ValueError("out is read-only")
        if out.size and not places_apart(out):
            raise ValueError(f"out must have a place for every element, got strides {out.strides}")
        target = p.target

        def overlap(a: Any, b: Array) -> bool:  # the exact answer takes long
            a, b = _extent(a), _extent(b)
            return np.may_share_memory(a, b) and np.shares_memory(a, b)

        same = out is logits or (out.strides == logits.strides and _address(out) == _address(logits))
        if not same and overlap(out, logits):
            raise ValueError("out overlaps logits without being the same array")
        for name, other in (("target", target.probs), ("weight", target.weight), ("dout or sample_weight", scale)):
            if other is not None and overlap(out, other):
                raise ValueError(f"out overlaps {name}")
        return cls(backend.xp, out, out if out.ndim == 2 else out.reshape(logits_nc.shape))

    def finish(self) -> Array:
        if self.whole is not self.nc and not self.xp.may_share_memory(self.whole, self.nc):
            self.whole[...] = self.nc.reshape(self.whole.shape)  # leading axes that do not merge into one
        return self.whole


def _address(x: Array) -> int:
    interface = getattr(x, "__cuda_array_interface__", None) or x.__array_interface__
    return int(interface["data"][0])


def _extent(x: Array) -> np.ndarray[Any, Any]:
    """See where an array lies as NumPy would, which looks at addresses alone: those of a device will do."""
    if isinstance(x, np.ndarray):
        return x
    where = {"data": (_address(x), True), "shape": x.shape, "strides": x.strides, "typestr": f"|V{x.itemsize}"}
    return np.asarray(SimpleNamespace(__array_interface__={**where, "version": 3}))
