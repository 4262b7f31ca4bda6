"""The specification: every operation as its equations, in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from swl.backends import Backend, Rows
from swl.backends.host.blas import matmul
from swl.backends.protocol import IGNORED, Target, host_scope
from swl.typing import Array, ArrayLike, DTypeLike, Stream


def load() -> Backend:
    """Give the backend; NumPy is always there."""
    return NumpyBackend()


def acc(x: Array) -> Array:
    """Bring an array to the dtype that arithmetic uses."""
    return x if x.dtype in (np.float32, np.float64) else x.astype(np.float32)


CACHED = 1 << 15
"""Numbers whose temporaries stay in a processor's second cache."""

_quiet = np.errstate(all="ignore")
"""NaN and ±inf mean what IEEE 754 says, and are no news."""


class NumpyBackend:
    """See `swl.backends.Backend` for what each operation means."""

    name = "numpy"
    xp = np

    def scope(self, stream: Stream | None = None, /, **arrays: ArrayLike) -> AbstractContextManager[object]:
        if stream is not None:
            raise TypeError(f"stream is for arrays on a device, but this call is the host's (backend {self.name!r})")
        return host_scope()

    def owns(self, x: Array) -> bool:
        return type(x) is np.ndarray

    def asarray(self, x: ArrayLike, dtype: DTypeLike | None = None) -> Array:
        return np.asarray(x, dtype=dtype)

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        return np.empty(shape, dtype)

    @_quiet
    def rounded(self, a: Array, dtype: DTypeLike) -> Array:
        return a.astype(dtype, copy=False)

    @_quiet
    def affine_forward(self, x: Array, W: Array, b: Array | None, out: Array) -> None:
        y = matmul(acc(x), acc(W))
        out[...] = y if b is None else y + acc(b)

    @_quiet
    def affine_backward(
        self, dout: Array, x: Array, W: Array, dx: Array | None, dW: Array | None, db: Array | None, accumulate: int = 0
    ) -> None:
        dout = acc(dout)
        if dx is not None:
            product = matmul(dout, acc(W).T)
            dx[...] = dx + product if accumulate else product
        if dW is not None:
            if not accumulate:
                dW[...] = matmul(acc(x).T, dout)
            for c in range(0, dW.shape[1] if accumulate else 0, max(1, accumulate)):
                dW[:, c : c + accumulate] += matmul(acc(x).T, dout[:, c : c + accumulate])
        if db is not None:
            sums = dout.sum(axis=0)
            db[...] = db + sums if accumulate else sums

    def gradient_over(self, logits: Array, x: Array, W: Array) -> Array:
        return logits

    def prepare_ids(
        self, ids: Array, n_classes: int, ignore_index: int, weight: Array | None
    ) -> tuple[Array, Array, Array]:
        ignored = ids == ignore_index
        bad = ~ignored & ((ids < 0) | (ids >= n_classes))
        if bad.any():
            raise_bad_id(ids, int(bad.argmax()), n_classes, ignore_index)
        ids = np.where(ignored, IGNORED, ids.astype(np.int64))
        if weight is None:
            return ids, None, float(ids.size - np.count_nonzero(ignored))
        m = np.where(ignored, 0, weight[ids])
        return ids, m, float(m.sum(dtype=np.float64))

    @_quiet
    def cross_entropy_forward(self, logits: Array, target: Target, stats: bool) -> Rows:
        parts = [self._forward(logits[a:b], target.rows(a, b), stats) for a, b in _cuts(logits)]
        return Rows(*(None if field[0] is None else np.concatenate(field) for field in zip(*parts, strict=True)))

    def _forward(self, logits: Array, target: Target, stats: bool) -> Rows:
        z, _ = _final_logits(logits, target)
        q, y, m = _target_rows(z, target)
        M = z.max(axis=1, initial=-np.inf)
        u = z - np.where(-np.inf == M, 0, M)[:, None].astype(z.dtype)
        S = np.log(np.exp(u).sum(axis=1, dtype=np.float64)).astype(z.dtype)
        S[-np.inf == M] = np.nan  # nothing but −inf
        A = _mass(y, target)
        d = _dot(y, u)
        loss = A * S - d
        if target.z_loss:
            loss += target.z_loss * m * (M + S) ** 2
        if target.ids is not None:
            loss[target.ids == IGNORED] = 0
        if not stats:
            return Rows(loss, M, S, d, A)
        p = np.exp(u - S[:, None])
        log_prob = _dot(q, u - S[:, None])
        if target.ids is not None:
            log_prob[target.ids == IGNORED] = 0
        return Rows(loss, M, S, d, A, S - _dot(p, u), log_prob, z.argmax(axis=1))

    @_quiet
    def cross_entropy_backward(self, logits: Array, target: Target, rows: Rows, row_scale: Array, out: Array) -> None:
        for a, b in _cuts(logits):
            here = Rows(*(None if field is None else field[a:b] for field in rows))
            scale = row_scale if row_scale.size == 1 else row_scale[a:b]
            self._backward(logits[a:b], target.rows(a, b), here, scale, out[a:b])

    def _backward(self, logits: Array, target: Target, rows: Rows, row_scale: Array, out: Array) -> None:
        z, slope = _final_logits(logits, target)
        _, y, m = _target_rows(z, target)
        M, S, A = rows.row_max, rows.log_sum, rows.mass
        p = np.exp(z - M[:, None] - S[:, None])
        grad = A[:, None] * p - y  # ∂L/∂z = (A·p − y) + 2λ·m·(M + S)·p
        if target.z_loss:
            grad += (2 * target.z_loss * m * (M + S))[:, None] * p
        grad *= row_scale[:, None]
        if slope is not None:
            grad *= slope
        if target.ids is not None:
            grad[target.ids == IGNORED] = 0
        out[...] = grad

    def cross_entropy_forward_backward(
        self, logits: Array, target: Target, row_scale: Array, out: Array, stats: bool
    ) -> Rows:
        rows = self.cross_entropy_forward(logits, target, stats)
        self.cross_entropy_backward(logits, target, rows, row_scale, out)
        return rows

    def plain_loss(
        self, logits: Array, target: Array, ignore_index: int, out: Array | None
    ) -> tuple[Array, float] | None:
        return None

    def total(self, x: Array) -> Array:
        return x.sum(dtype=np.float64)

    def by_rows(self, work: Callable[[int, int], object], n_rows: int, row_size: int) -> None:
        step = max(1, CACHED // max(row_size, 1))
        for begin in range(0, n_rows, step):
            work(begin, min(begin + step, n_rows))

    def check(self) -> None:
        return None

    def info(self) -> dict[str, str]:
        return {"numpy": np.__version__}


def _cuts(logits: Array) -> list[tuple[int, int]]:
    """Cut the rows so that the temporaries of a part stay small; an empty array is one part."""
    N, C = logits.shape
    step = max(1, _AT_ONCE // C)
    return [(a, min(a + step, N)) for a in range(0, max(N, 1), step)]


_AT_ONCE = 1 << 22


def raise_bad_id(ids: Array, row: int, n_classes: int, ignore_index: int) -> None:
    """Raise the ValueError that names row, value and range."""
    raise ValueError(
        f"target[{row}] is {int(ids[row])}; legal are class ids in [0, {n_classes}) and ignore_index={ignore_index}"
    )


def _final_logits(logits: Array, target: Target) -> tuple[Array, Array | None]:
    """Z = κ·tanh(r/κ) and ∂z/∂r = 1 − (z/κ)² of r = (logits + bias)/τ; without a softcap z = r and None.

    The slope is formed as 4e/(1 + e)², e = exp(−2|r|/κ), in float64: where z is near ±κ, the difference has no digits left.
    """
    r = acc(logits)
    if target.bias is not None:
        r = r + target.bias
    if target.temperature != 1:
        r = r / r.dtype.type(target.temperature)
    if not target.softcap:
        return r, None
    cap = r.dtype.type(target.softcap)
    e = np.exp(np.abs(r.astype(np.float64)) * (-2 / target.softcap))
    return cap * np.tanh(r / cap), 4 * e / (1 + e) ** 2


def _target_rows(z: Array, target: Target) -> tuple[Array, Array, Array]:
    """Q (N, C), the plain target; y (N, C), the target with all its options; m (N,)."""
    N, C = z.shape
    w = np.ones(C, z.dtype) if target.weight is None else target.weight
    if target.ids is None:
        q = acc(target.probs).astype(z.dtype)
        y = w * (z.dtype.type(target.hot) * q + z.dtype.type(target.rest))
        return q, y, np.ones(N, z.dtype)
    counts = target.ids >= 0
    m = counts.astype(z.dtype) if target.row_weight is None else target.row_weight
    q = (target.ids[:, None] - target.first_class == np.arange(C)).astype(z.dtype)
    q[~counts] = 0
    y = z.dtype.type(target.hot) * m[:, None] * q + z.dtype.type(target.rest) * w * counts[:, None]
    return q, y, m


def _mass(y: Array, target: Target) -> Array:
    """Sum A = Σ_c y_c, exactly 1 for class ids without weights."""
    return y.sum(axis=1, dtype=np.float64).astype(y.dtype)


def _dot(y: Array, u: Any) -> Array:
    """Σ_c y_c·u_c, where a class without mass adds nothing even at u = −inf."""
    return np.multiply(y, u, where=y != 0, out=np.zeros_like(u)).sum(axis=1)
