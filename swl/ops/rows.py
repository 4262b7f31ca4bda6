"""Rows of one loss from rows of its shards: what chunks of classes and class-parallel ranks both end with.

With ``Δ_k = M_k − M`` for shard k and ``M = max_k M_k``::

    S = log Σ_k exp(S_k + Δ_k)        A = Σ_k A_k        d = Σ_k (d_k + A_k·Δ_k)

S is formed as ``log1p`` of what the sum has above 1: a confident row's S is far below the spacing of numbers at 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from swl.backends import Rows
from swl.backends.protocol import IGNORED, INVALID, Target, joined
from swl.typing import Array

__all__ = ["combine", "final_logits", "log_softmax", "plain_mass", "plus_bias", "row_loss"]


def row_loss(xp: Any, rows: Rows, target: Target) -> Array:
    """Loss = A·S − d + λ·m·(M + S)²; 0 for an ignored row, NaN for an invalid one."""
    loss = rows.mass * rows.log_sum - rows.target_dot
    if target.z_loss:
        lse = rows.row_max + rows.log_sum
        square = lse * lse if target.row_weight is None else target.row_weight * lse * lse
        loss = loss + loss.dtype.type(target.z_loss) * square
    if target.ids is None:
        return loss
    loss = xp.where(target.ids == IGNORED, loss.dtype.type(0), loss)
    return xp.where(target.ids == INVALID, loss.dtype.type(np.nan), loss)


def combine(xp: Any, parts: Sequence[Rows], target: Target, starts: Sequence[int], plain_mass: Sequence[Array]) -> Rows:
    """Combine the rows of all shards of the classes.

    Parameters
    ----------
    xp : numpy or cupy
    parts : Rows of each shard, in the order of the classes
    target : Target
        Of the whole; its `row_weight` must know every class id.
    starts : first class of each shard
    plain_mass : Σ_c q_c of each shard, (N,) or a number
        The target's mass in it, without weights or smoothing; read only where statistics were asked for.

    Returns
    -------
    Rows
    """
    with np.errstate(invalid="ignore"):
        tops = joined(xp, [part.row_max[None] for part in parts])
        M = tops.max(axis=0)
        shifts = xp.where(tops == M, tops.dtype.type(0), tops - M)  # also where both are infinite
        shifts = xp.where(xp.isnan(M), M, shifts)
        # a shard of −inf only has no log_sum of its own, and adds nothing
        sums = [
            xp.where(top == -np.inf, top.dtype.type(0), xp.exp(part.log_sum + shift))
            for top, part, shift in zip(tops, parts, shifts, strict=True)
        ]
        best = tops.argmax(axis=0)
        above = _sum([xp.where(best == k, xp.expm1(parts[k].log_sum), e) for k, e in enumerate(sums)])
        S = xp.log1p(xp.where(-np.inf == M, M.dtype.type(np.nan), above).astype(np.float64)).astype(M.dtype)
        A = _sum([part.mass for part in parts])
        # within a shard of −inf only, u is −inf for all that has mass
        d = _sum(
            [
                xp.where(top == -np.inf, _times(xp, part.mass, top), part.target_dot + _times(xp, part.mass, shift))
                for top, part, shift in zip(tops, parts, shifts, strict=True)
            ]
        )
        rows = Rows(M, M, S, d, A)
        rows = rows._replace(loss=row_loss(xp, rows, target))
        if parts[0].entropy is None:
            return rows
        # Σ_c p_c·u_c is S_k − H_k within shard k, relative to its own maximum
        expected = _sum(
            [
                xp.where(e == 0, e, e * (part.log_sum - part.entropy + shift))
                for e, part, shift in zip(sums, parts, shifts, strict=True)
            ]
        )
        log_prob = _sum(
            [
                xp.where(
                    q == 0,
                    S.dtype.type(0),
                    xp.where(top == -np.inf, top, part.log_prob + q * (part.log_sum + shift - S)),
                )
                for q, top, part, shift in zip(plain_mass, tops, parts, shifts, strict=True)
            ]
        )
        argmax = joined(xp, [part.argmax[None] + start for part, start in zip(parts, starts, strict=True)])
        argmax = xp.take_along_axis(argmax, best[None], axis=0)[0]
        if target.ids is not None:
            log_prob = xp.where(target.ids < 0, log_prob.dtype.type(0), log_prob)
        return rows._replace(entropy=S - expected / (1 + above), log_prob=log_prob, argmax=argmax)


def _sum(terms: list[Array]) -> Array:
    """Add in the order of the shards."""
    result = terms[0]
    for term in terms[1:]:
        result = result + term
    return result


def _times(xp: Any, mass: Array, value: Any) -> Array:
    """mass·value, and 0 without mass, at −inf too."""
    return xp.where(mass == 0, value.dtype.type(0), mass * value)


def plus_bias(logits: Array, target: Target) -> Array:
    """Add the bias, in a new array."""
    return logits.copy() if target.bias is None else logits + target.bias


def log_softmax(xp: Any, z: Array) -> Array:
    """Compute log p = (z − M) − S in a new array."""
    log_p = z - z.max(axis=1, keepdims=True)
    log_p -= xp.log(xp.exp(log_p).sum(axis=1, keepdims=True, dtype=np.float64)).astype(z.dtype)
    return log_p


def final_logits(xp: Any, z: Array, target: Target) -> Array:
    """Turn logits, bias added, which may be written over, into the z of which the loss is the cross-entropy."""
    if target.temperature != 1:
        z /= target.temperature
    if target.softcap:
        z /= target.softcap
        z = xp.tanh(z, out=z)
        z *= target.softcap
    return z


def plain_mass(xp: Any, target: Target, n_classes: int, acc: Any) -> Array:
    """Σ_c q_c over the target's classes: the target's mass there without weights or smoothing, shape (N,)."""
    if target.ids is None:
        return target.probs.sum(axis=1, dtype=acc)
    local = target.ids - target.first_class
    return ((local >= 0) & (local < n_classes) & (target.ids >= 0)).astype(acc)
