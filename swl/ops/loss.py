"""Forward passes that keep what their backward passes need: what the public functions and the layers are made of."""

from __future__ import annotations

from collections.abc import Collection
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from swl.backends import Backend, Rows, active, get, resolve
from swl.ops.checks import acc_dtype, flatten_inputs, float_array, real_array, require_shape
from swl.ops.chunks import Gradients, Plan, cuts, plan, sweep
from swl.ops.problem import ChunkedProbabilities, Problem, inverse, problem
from swl.options import DEFAULTS, Options


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

    def forward(self, b: Any, memory_budget: int | None = None) -> Any:
        """Compute ``y = x·W + b``; in chunks if the temporaries are to stay within a budget in bytes."""
        backend, _, x2, W, leading = self
        same = x2.dtype == W.dtype and (b is None or b.dtype == W.dtype)
        dtype = W.dtype if same else backend.xp.result_type(*(a for a in (x2, W, b) if a is not None))
        (N, D), C = x2.shape, W.shape[1]
        y = backend.empty((N, C), dtype)
        if memory_budget is None:
            backend.affine_forward(x2, W, b, y)
        else:
            cut = plan(N, D, C, dtype=acc_dtype(dtype), needs=(), memory_budget=memory_budget)
            for r0, r1 in cuts(N, cut.rows):
                for c0, c1 in cuts(C, cut.classes):
                    bias = None if b is None else b[c0:c1]
                    backend.affine_forward(x2[r0:r1], W[:, c0:c1], bias, y[r0:r1, c0:c1])
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
        backend.affine_backward(dout if dout.ndim == 2 else dout.reshape(x2.shape[0], K), x2, W, dx, dW, db)
        return (dx if dx is None or x.ndim == 2 else dx.reshape(x.shape)), dW, db


class Pass(NamedTuple):
    """A forward pass over logits, and all that a backward pass needs of it."""

    problem: Problem
    logits: Any  # as it came, (..., C)
    logits_nc: Any  # (N, C)
    rows: Rows
    loss: Any  # reduced

    def backward(self, dout: Any = 1.0, out: Any = None) -> Any:
        """Compute ``dout · ∂loss/∂logits``; any number of times."""
        p = self.problem
        with p.backend.scope(logits=self.logits, dout=dout, out=out):
            scale = p.row_scale(dout)
            grad = _Gradient.into(p, out, self.logits, self.logits_nc, scale)
            p.backend.cross_entropy_backward(self.logits_nc, p.target, self.rows, scale, grad.nc)
            return grad.finish()

    def probabilities(self) -> Any:
        """Compute softmax(z), shape (..., C), of the arithmetic's dtype."""
        p, xp, rows = self.problem, self.problem.backend.xp, self.rows
        with p.backend.scope(logits=self.logits), np.errstate(invalid="ignore"):  # a row of −inf is NaN, as everywhere
            if p.target.ids is not None:  # a forward sweep without statistics may pass over ignored rows
                rows = p.backend.cross_entropy_forward(self.logits_nc, p.target, True)
            z = self.logits_nc.astype(p.acc)
            if p.target.softcap:
                z = p.target.softcap * xp.tanh(z / p.target.softcap)
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
        target = p.target

        def overlap(a: Any, b: Any) -> bool:  # the exact answer takes long
            a, b = _extent(a), _extent(b)
            return np.may_share_memory(a, b) and np.shares_memory(a, b)

        same = out is logits or (out.strides == logits.strides and _address(out) == _address(logits))
        if not same and overlap(out, logits):
            raise ValueError("out overlaps logits without being the same array")
        for name, other in (("target", target.probs), ("weight", target.weight), ("dout or sample_weight", scale)):
            if other is not None and overlap(out, other):
                raise ValueError(f"out overlaps {name}")
        return cls(backend.xp, out, out if out.ndim == 2 else out.reshape(logits_nc.shape))

    def finish(self) -> Any:
        if self.whole is not self.nc and not self.xp.may_share_memory(self.whole, self.nc):
            self.whole[...] = self.nc.reshape(self.whole.shape)  # leading axes that do not merge into one
        return self.whole


def _address(x: Any) -> int:
    interface = getattr(x, "__cuda_array_interface__", None) or x.__array_interface__
    return int(interface["data"][0])


def _extent(x: Any) -> np.ndarray[Any, Any]:
    """See where an array lies as NumPy would, which looks at addresses alone: those of a device will do."""
    if isinstance(x, np.ndarray):
        return x
    where = {"data": (_address(x), True), "shape": x.shape, "strides": x.strides, "typestr": f"|V{x.itemsize}"}
    return np.asarray(SimpleNamespace(__array_interface__={**where, "version": 3}))


def _loss_backend(logits: Any, target: Any, options: Options, dout: Any = None, out: Any = None) -> Backend:
    arrays = {
        "logits": logits,
        "target": target,
        "weight": options.weight,
        "sample_weight": options.sample_weight,
        "denominator": options.denominator,
        "dout": dout,
        "out": out,
    }
    return resolve(options.backend, arrays)


def logits_problem(
    logits: Any, target: Any, options: Options, backend: Backend | None = None
) -> tuple[Problem, Any, Any]:
    """Check logits and target; also give the logits as an array, and that as (N, C)."""
    backend = backend or _loss_backend(logits, target, options)
    logits = float_array(backend, "logits", logits)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have shape (..., C) with at least one class, got {logits.shape}")
    *leading, C = logits.shape
    p = problem(backend, target, tuple(leading), C, acc_dtype(logits.dtype), options)
    return p, logits, logits if logits.ndim == 2 else logits.reshape(p.n_rows, C)


SMALL = 1 << 18
"""Logits up to which calls take so much of the time that `at_once` is worth a way of its own."""


def at_once(
    logits: Any, target: Any, options: Options, stats: bool, stream: Any, dout: Any = None, out: Any = None
) -> tuple[Any, Any] | None:
    """Compute loss and, where there is a `dout`, gradient of a small problem as most are: on the host, without options.

    None, with nothing written, says that the general way must be taken, which also tells what is wrong.
    """
    if options is not DEFAULTS or stats or stream is not None or type(logits) is not np.ndarray or logits.size > SMALL:
        return None
    if dout is not None:
        if type(dout) not in (float, int) or dout != 1:
            return None
        out = np.empty_like(logits) if out is None else out
    if type(target) is not np.ndarray or type(out) not in (np.ndarray, type(None)):
        return None
    done = get(active()).plain_loss(logits, target, options.ignore_index, out)
    if done is None:
        return None
    total, count = done
    return np.asarray(total * inverse(np, count), logits.dtype), out


class SmallPass:
    """What `at_once` has computed, in the place of a `Pass`, which is made only for what was not computed."""

    def __init__(self, logits: Any, target: Any, options: Options, loss: Any, gradient: Any = None) -> None:
        self._arguments = logits, target.copy(), options._replace(backend=active())
        self.loss, self._gradient = loss, gradient
        self._pass: Pass | None = None

    def backward(self, dout: Any = 1.0) -> Any:
        """Compute ``dout · ∂loss/∂logits``, or hand over what is there."""
        gradient, self._gradient = self._gradient, None
        if gradient is not None and type(dout) in (int, float) and dout == 1:
            return gradient
        return self._general().backward(dout)

    def probabilities(self) -> Any:
        """Compute softmax(z), shape (N, C)."""
        return self._general().probabilities()

    def _general(self) -> Pass:
        if self._pass is None:
            self._pass = cross_entropy_forward(*self._arguments)
        return self._pass


def cross_entropy_forward(logits: Any, target: Any, options: Options, stats: bool = False, stream: Any = None) -> Pass:
    """Run the forward sweep and keep what the backward sweep needs."""
    backend = _loss_backend(logits, target, options)
    with backend.scope(stream, logits=logits, target=target):
        p, logits, logits_nc = logits_problem(logits, target, options, backend)
        rows = backend.cross_entropy_forward(logits_nc, p.target, stats)
        p.finish()
        return Pass(p, logits, logits_nc, rows, p.reduce(rows.loss))


def one_sweep(
    logits: Any,
    target: Any,
    options: Options,
    dout: Any = 1.0,
    out: Any = None,
    stats: bool = False,
    stream: Any = None,
) -> tuple[Pass, Any]:
    """Run forward and backward in one sweep and keep the pass, whose logits are gone if `out` overwrote them."""
    backend = _loss_backend(logits, target, options, dout, out)
    with backend.scope(stream, logits=logits, target=target):
        p, logits, logits_nc = logits_problem(logits, target, options, backend)
        scale = p.row_scale(dout)
        grad = _Gradient.into(p, out, logits, logits_nc, scale)
        rows = backend.cross_entropy_forward_backward(logits_nc, p.target, scale, grad.nc, stats)
        p.finish()
        return Pass(p, logits, logits_nc, rows, p.reduce(rows.loss)), grad.finish()


class LinearPass(NamedTuple):
    """The fused head's arguments, checked; its sweeps run in chunks within the budget (`swl.ops.chunks`)."""

    problem: Problem
    x: Any  # as it came
    x2: Any  # (N, D)
    W: Any
    b: Any
    memory_budget: int

    @classmethod
    def of(
        cls, backend: Backend, x: Any, W: Any, b: Any, target: Any, options: Options, memory_budget: int
    ) -> LinearPass:
        """Check inputs and target against parameters that were checked before."""
        done = AffinePass.of(backend, x, W)
        C = W.shape[1]
        if C == 0:
            raise ValueError(f"W must have at least one column, a class, got shape {W.shape}")
        acc = acc_dtype(backend.xp.result_type(*(a for a in (done.x2, W, b) if a is not None)))
        if callable(target):
            target = ChunkedProbabilities(target, slice(0, done.x2.shape[0]), slice(0, C))
        p = problem(backend, target, done.leading, C, acc, options)
        if b is not None:
            bias = backend.xp.ascontiguousarray(b, dtype=acc)
            p = p._replace(target=p.target._replace(bias=bias))
        return cls(p, done.x, done.x2, W, b, memory_budget)

    def cut(self, needs: Collection[str] = ()) -> Plan:
        """Plan the chunks."""
        (N, D), C = self.x2.shape, self.W.shape[1]
        return plan(N, D, C, dtype=self.problem.acc, needs=needs, memory_budget=self.memory_budget)

    def forward(self, stats: bool = False) -> Rows:
        """Compute the rows of the loss alone."""
        rows = sweep(self.problem, self.x2, self.W, self.cut(), stats=stats)
        self.problem.finish()
        return rows

    def gradients(
        self, dout: Any, needs: Collection[str], known: Rows | None = None, stats: bool = False
    ) -> tuple[Rows, tuple[Any, Any, Any]]:
        """Compute rows and gradients in one sweep; from `known` rows of an earlier `forward` if they are given."""
        p, x, W = self.problem, self.x2, self.W
        backend = p.backend
        if self.b is None:
            needs = [name for name in needs if name != "db"]
        cut = self.cut(needs)
        adds_up = W.dtype if cut.rows >= x.shape[0] else acc_dtype(W.dtype)
        into = Gradients(
            dx=backend.empty(x.shape, x.dtype) if "dx" in needs else None,
            dW=empty_like_weights(backend, W, adds_up) if "dW" in needs else None,
            db=backend.empty((W.shape[1],), p.acc) if "db" in needs else None,
        )
        if any(gradient is not None for gradient in into):
            rows = sweep(p, x, W, cut, row_scale=p.row_scale(dout), into=into, known=known, stats=stats)
        else:
            rows = known if known is not None else sweep(p, x, W, cut, stats=stats)
        p.finish()
        dx, dW, db = into
        return rows, (
            None if dx is None else dx.reshape(self.x.shape),
            None if dW is None else dW.astype(W.dtype, copy=False),
            None if db is None else db.astype(self.b.dtype, copy=False),
        )


def empty_like_weights(backend: Backend, W: Any, dtype: Any) -> Any:
    """Give an array for the gradient of `W`: a (C, D) matrix seen as (D, C) gets its gradient likewise."""
    return backend.empty(W.shape[::-1], dtype).T if W.strides[0] < W.strides[1] else backend.empty(W.shape, dtype)
