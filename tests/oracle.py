"""The mathematics of the library in float64 NumPy, written from its definition and from nothing else.

Beside each result stands its `scale`: the sum of the magnitudes that were added up to form it, so that a tolerance is
a number of roundings: ``|got − want| ≤ k·eps·scale``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

FLUSHED = 2.0**-126 / (32 * 2.0**-23)
"""Added to a probability's share of a scale: 32 roundings of it in float32 are the numbers that kernels may flush to 0."""


class Answer(NamedTuple):
    loss: Any
    grad: Any
    row_max: Any
    log_sum: Any
    log_prob: Any
    entropy: Any
    argmax: Any
    loss_scale: Any
    grad_scale: Any
    row_scale: Any  # of row_max, log_sum, log_prob and entropy


def cross_entropy(
    logits: Any,
    target: Any,
    *,
    weight: Any = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    sample_weight: Any = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    denominator: float | None = None,
    dout: Any = 1.0,
) -> Answer:
    with np.errstate(all="ignore"):
        raw = np.asarray(logits).astype(np.float64)
        *leading, C = raw.shape
        r = raw.reshape(-1, C) if raw.size else raw.reshape(int(np.prod(leading)), C)
        r = r / temperature
        N = len(r)
        t = np.asarray(target)
        w = np.ones(C) if weight is None else np.asarray(weight).astype(np.float64)
        s = np.ones(N) if sample_weight is None else np.asarray(sample_weight).astype(np.float64).reshape(N)
        g = np.broadcast_to(np.asarray(dout, dtype=np.float64), leading).reshape(N)

        # the target row y, and the plain target q
        if t.shape == tuple(leading):
            ids = t.reshape(N)
            counts = np.array([int(i) != ignore_index for i in ids], dtype=bool)
            q = np.array([[float(c == int(i)) for c in range(C)] for i in ids]).reshape(N, C)
            q[~counts] = 0
            m = (q * w).sum(axis=1)
            y = counts[:, None] * ((1 - label_smoothing) * m[:, None] * q + label_smoothing / C * w)
            default_denominator = float((s * m).sum())
        else:
            counts = np.ones(N, dtype=bool)
            q = t.astype(np.float64).reshape(N, C)
            m = np.ones(N)
            y = w * ((1 - label_smoothing) * q + label_smoothing / C)
            default_denominator = float(s.sum())

        # softmax, relative to the row maximum
        z = r if softcap is None else softcap * np.tanh(r / softcap)
        slope = np.ones_like(z) if softcap is None else 1 / np.cosh(r / softcap) ** 2
        M = z.max(axis=1)
        u = z - M[:, None]
        S = np.log(np.exp(u).sum(axis=1))
        p = np.exp(u - S[:, None])
        lse = M + S

        # the loss of each row and its gradient
        A = y.sum(axis=1)
        loss = np.where(counts, A * S - _dot(y, u) + (z_loss * m * lse**2 if z_loss else 0), 0)
        pull = A + 2 * z_loss * m * lse
        dz = np.where(counts[:, None], (pull[:, None] * p - y) * slope / temperature, 0)

        # what each was added up from; an error of δ in a logit moves p by p·δ
        wobble = np.abs(np.where(np.isfinite(u), u, 0)) + S[:, None] + (0 if softcap is None else softcap)
        drift = 0 if temperature == 1 else np.abs(M)  # a quotient is rounded
        wobble = wobble + np.expand_dims(drift, -1)
        size = np.abs(M) + np.abs(S)
        capped = 0 if softcap is None else softcap
        loss_scale = (
            np.abs(A) * (np.maximum(S, 1) + capped + drift)
            + np.abs(_dot(np.abs(y), u))
            + (z_loss * m * size**2 if z_loss else 0)
        )
        pull = (np.abs(A) + 2 * z_loss * m * size)[:, None]
        grad_scale = (pull * (p * (1 + wobble) + FLUSHED) + FLUSHED + np.abs(y)) / temperature  # p, and its factors
        row_scale = 1 + size + _dot(p + np.abs(q), np.abs(u)) + np.abs(q).sum(axis=1) * (S + drift) + drift + capped

        # a sum of C terms, added one after the other, is off by some √C roundings
        terms = 1 + np.sqrt(C) / 8
        loss_scale, grad_scale, row_scale = terms * loss_scale, terms * grad_scale, terms * row_scale

        # reductions
        scale = s * g
        if reduction == "mean":
            divisor = default_denominator if denominator is None else float(denominator)
            scale = scale / divisor if divisor != 0 else np.zeros(N)
            factor = s / divisor if divisor != 0 else np.zeros(N)
        else:
            factor = s
        loss, loss_scale = loss * factor, loss_scale * np.abs(factor)
        if reduction == "none":
            loss, loss_scale = loss.reshape(leading), loss_scale.reshape(leading)
        else:
            loss, loss_scale = loss.sum(), loss_scale.sum()

        log_prob = np.where(counts, _dot(q, u) - q.sum(axis=1) * S, 0)
        argmax = np.array([_first_largest(row) for row in z], dtype=np.int64)

        def rows(x: Any) -> Any:
            return x.reshape(leading)

        return Answer(
            loss,
            (dz * scale[:, None]).reshape(raw.shape),
            rows(M),
            rows(S),
            rows(log_prob),
            rows(S - _dot(p, u)),
            rows(argmax),
            loss_scale,
            (grad_scale * np.abs(scale)[:, None]).reshape(raw.shape),
            rows(row_scale),
        )


def _dot(a: Any, u: Any) -> Any:
    """Σ_c a_c·u_c with 0·(−inf) = 0: a masked class adds nothing."""
    return np.where(a == 0, 0, a * np.where(a == 0, 0, u)).sum(axis=1)


def _first_largest(row: Any) -> int:
    return max(range(len(row)), key=lambda c: (row[c], -c))


class AffineAnswer(NamedTuple):
    y: Any
    dx: Any
    dW: Any  # noqa: N815 - the field's own name
    db: Any


def affine(x: Any, W: Any, b: Any, dout: Any) -> AffineAnswer:
    """y = x·W + b of ``x (N, D)``, and the gradients for upstream ``dout (N, K)``, all in float64."""
    x, W, dout = (np.asarray(a).astype(np.float64) for a in (x, W, dout))
    y = np.einsum("nd,dk->nk", x, W)
    if b is not None:
        y = y + np.asarray(b).astype(np.float64)
    return AffineAnswer(y, np.einsum("nk,dk->nd", dout, W), np.einsum("nd,nk->dk", x, dout), np.einsum("nk->k", dout))


def affine_scale(x: Any, W: Any, b: Any, dout: Any) -> AffineAnswer:
    """Sum the magnitudes that `affine` adds up."""
    return affine(*(None if a is None else np.abs(np.asarray(a).astype(np.float64)) for a in (x, W, b, dout)))


# ------------------------------------------------------------------------------------------------ comparison


def assert_close(
    name: str, got: Any, want: Any, scale: Any, acc: Any, stored: Any = None, roundings: float = 32
) -> None:
    """Hold `got` to ``roundings`` roundings of `acc` on `scale`, and one rounding to the dtype `stored`.

    Infinities must be equal, unless the number is beyond the largest of `stored`; and a NaN agrees with a NaN only.
    """
    got, want, scale = (np.asarray(a).astype(np.float64) for a in (got, want, scale))
    assert got.shape == want.shape, f"{name} has shape {got.shape}, not {want.shape}"
    tolerance = roundings * _eps(acc) * np.nan_to_num(scale) + _tiny(acc)
    if stored is not None and stored != acc:
        tolerance = tolerance + _eps(stored) * np.abs(np.nan_to_num(want)) + _tiny(stored)
    with np.errstate(invalid="ignore"):
        error = np.abs(got - want)
        legal = (error <= tolerance) | (got == want) | (np.isnan(got) & np.isnan(want))
        beyond = np.abs(want) + tolerance > _largest(acc if stored is None else stored)
        legal |= np.isinf(got) & (np.sign(got) == np.sign(want)) & beyond
    if legal.all():
        return
    worst = np.unravel_index(np.argmax(np.where(legal, -1, np.nan_to_num(error / tolerance, nan=np.inf))), got.shape)
    raise AssertionError(
        f"{name}{list(map(int, worst))} is {got[worst]!r}, not {want[worst]!r}: "
        f"off by {error[worst]:.3g}, legal {tolerance[worst]:.3g}; {np.count_nonzero(~legal)} of {got.size} are off"
    )


def _eps(dtype: Any) -> float:
    dtype = np.dtype(dtype)
    return 2.0**-7 if dtype.name == "bfloat16" else float(np.finfo(dtype).eps)


def _largest(dtype: Any) -> float:
    dtype = np.dtype(dtype)
    return (2 - 2.0**-7) * 2.0**127 if dtype.name == "bfloat16" else float(np.finfo(dtype).max)


def _tiny(dtype: Any) -> float:
    """Twice the spacing of the subnormal numbers; for float32 and float64 what kernels may flush to 0."""
    dtype = np.dtype(dtype)
    return (
        2.0**-132
        if dtype.name == "bfloat16"
        else 2 * float(np.finfo(dtype).smallest_subnormal if dtype.itemsize == 2 else np.finfo(dtype).tiny)
    )
