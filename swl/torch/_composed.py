"""Losses in torch's own operations, all of whose derivatives torch knows: the equations of the kernels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from swl.options import Options, require_magnitudes
from swl.torch._bridge import bridge
from swl.torch._loss import PLAIN, logits_rows, restored

__all__ = [
    "check_values",
    "class_ids",
    "composed",
    "differentiated",
    "final_logits",
    "log_p",
    "placed",
    "target_gradient",
]


def placed(gradients: Iterable[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Put gradients where they were needed, and None where they were not."""
    found = iter(gradients)
    return tuple(next(found) if needed else None for needed in needs)


def differentiated(
    outputs: Sequence[Tensor], upstream: Sequence[Tensor], inputs: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Compute gradients to be differentiated again, or many at once, of what was computed in torch's own operations."""
    wanted = [t for t, needed in zip(inputs, needs, strict=True) if needed]
    return placed(torch.autograd.grad(outputs, wanted, upstream, create_graph=torch.is_grad_enabled()), needs)


def target_gradient(
    input: Tensor, target: Tensor, row_max: Tensor, log_sum: Tensor, scale: Tensor, options: Options
) -> Tensor:
    """Compute the gradient with respect to probabilities, ``∂loss/∂q_c = −(1−ε)·w_c·log p_c``, in the arithmetic's dtype.

    It is 0 at a masked class without mass, where the loss is finite only as long as the mass stays 0.
    """
    z = final_logits(logits_rows(input).to(row_max.dtype), options)
    w = z.new_ones(z.shape[1]) if options.weight is None else options.weight.to(z.dtype)
    y = _probability_rows(target, w, options.label_smoothing)
    scale = scale * options.temperature  # which `Problem.row_scale` has divided by it
    factor = (options.label_smoothing - 1.0) * scale[:, None]
    return restored(log_p(y, z - row_max[:, None], log_sum) * w * factor, input)


def composed(input: Tensor, target: Tensor, options: Options, probabilities: bool) -> Tensor:
    """Compute the loss in torch's own operations, all of whose derivatives torch knows: the equations of the kernels."""
    weight, sample_weight, denominator = options.arrays().values()
    reduction, eps, z_loss = options.reduction, options.label_smoothing, options.z_loss
    z = logits_rows(input)
    z = z if z.dtype is torch.float64 else z.float()
    C = z.shape[1]
    w = z.new_ones(C) if weight is None else weight.to(z.dtype)
    ids = invalid = None
    if probabilities:
        m = z.new_ones(z.shape[0])
        y = _probability_rows(target, w, eps)
    else:
        ids, counts, invalid = class_ids(target, C, options.ignore_index)
        m = torch.where(counts, w[ids], 0)
        hot = ids[:, None] == torch.arange(C, device=ids.device)
        y = torch.where(counts[:, None], torch.where(hot, (1 - eps) * m[:, None], 0) + (eps / C) * w, 0)
        z = torch.where(counts[:, None], z, 0)  # whatever stands in a row that does not count
    z = final_logits(z, options)
    M = z.amax(1).detach()  # the loss does not depend on it
    u = z - M[:, None]
    S = u.exp().sum(1).log()
    loss = -(y * log_p(y, u, S)).sum(1)
    if z_loss:
        loss = loss + z_loss * m * (M + S) ** 2
    if invalid is not None:
        loss = torch.where(invalid, math.nan, loss)
    s = torch.ones_like(m) if sample_weight is None else sample_weight.reshape(-1).to(z.dtype)
    loss = loss * s
    if reduction == "none":
        return loss.view(target.shape if not probabilities else input.shape[:1] + input.shape[2:])
    if reduction == "sum":
        return loss.sum()
    total = (s * m).sum() if denominator is None else denominator
    some = total != 0
    return torch.where(some, loss.sum() / torch.where(some, total, 1), math.nan)  # no gradient where nothing counts


def class_ids(target: Tensor, C: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids (N,), 0 in a row that does not count; which rows count; and which ids are neither a class nor ignored."""
    ids = target.reshape(-1).long()
    counts = legal = (ids >= 0) & (ids < C)
    if -(2**63) <= ignore_index < 2**63:  # else no id can be it
        ignored = ids == ignore_index
        counts, legal = legal & ~ignored, legal | ignored
    return torch.where(counts, ids, 0), counts, ~legal


def _probability_rows(target: Tensor, w: Tensor, eps: float) -> Tensor:
    """y_c = w_c·((1−ε)·q_c + ε/C)."""
    return w * ((1 - eps) * logits_rows(target).to(w.dtype) + eps / w.shape[0])


def log_p(y: Tensor, u: Tensor, S: Tensor) -> Tensor:
    """Compute log p = u − S, but 0 for a masked class, u = −inf, without mass: there y·log p and its derivatives are 0."""
    S = S[:, None]
    return torch.where((y == 0) & (u == -math.inf) & (S == S), 0, u - S)


def final_logits(r: Tensor, options: Options) -> Tensor:
    """Compute z = κ·tanh(r/κ) in a form whose derivative torch finds without the cancellation of 1 − tanh²."""
    if options.temperature != 1:
        r = r / options.temperature
    if options.softcap is None:
        return r
    a = r / options.softcap
    near = a.abs() < 0.5
    return options.softcap * torch.where(near, a.tanh(), a.sign() * (1 - 2 * torch.sigmoid(-2 * a.abs())))


def check_values(target: Tensor, C: int, acc: Any, options: Options, probabilities: bool) -> None:
    """Check class ids and denominator as the kernels' way does, if the values inside a transform's tensors can be looked at.

    Where ids cannot, `composed` makes the row's loss NaN.
    """
    with torch._C._DisableFuncTorch():
        ids, denominator = None if probabilities else _inside(target), _inside(options.denominator)
        if ids is not None:
            here = bridge(ids)
            here.backend.prepare_ids(here.array(ids.reshape(-1)), C, options.ignore_index, None)
        if denominator is not None:
            for value in denominator.reshape(-1).tolist():
                require_magnitudes(acc, C, denominator=value)


def _inside(t: Tensor | None) -> Tensor | None:
    """Return the tensor inside a transform's; None if its values cannot be looked at without waiting."""
    while t is not None and torch._C._functorch.is_functorch_wrapped_tensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    look = type(t) in PLAIN and t is not None and t.is_cpu and not torch._C._len_torch_dispatch_stack()
    return t if look else None
