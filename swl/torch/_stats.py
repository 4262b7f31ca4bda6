"""The by-products of a loss as tensors, which no gradient flows through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from swl.backends import Rows
from swl.ops.loss import RowStats
from swl.options import Options
from swl.torch._composed import class_ids, final_logits, log_p
from swl.torch._loss import Loss, logits_rows
from swl.typing import Results

__all__ = ["composed_stats", "fake_kept", "kept_stats", "of_kept", "of_rows", "result"]


def result(found: tuple[Tensor, ...], shape: torch.Size) -> Results:
    """Return what the caller gets: the loss, and the by-products in the shape of the rows if there are any."""
    loss, *stats = found
    return (loss, RowStats(*(t.view(shape) for t in stats))) if stats else loss


def of_rows(loss: Loss, rows: Rows) -> tuple[Tensor, ...]:
    """See the by-products of a sweep, if it was asked for them, as tensors in the order of `RowStats`."""
    if rows.argmax is None:
        return ()
    return tuple(loss.bridge.tensor(getattr(rows, name)) for name in RowStats._fields)


def kept_stats(loss: Loss, rows: Rows) -> tuple[Tensor, Tensor]:
    """Return what a backward sweep needs of the rows, then log_prob and entropy if they are there: (3 or 5, N); and argmax."""
    kept = loss.kept(rows)
    if not (stats := of_rows(loss, rows)):
        return kept, kept.new_empty(0, dtype=torch.int64)
    _, _, log_prob, entropy, argmax = stats
    return torch.cat([kept, log_prob[None], entropy[None]]), argmax


def fake_kept(input: Any, n: Any, stats: bool) -> tuple[Any, Any]:
    """Give the shapes of `kept_stats` to whoever traces."""
    acc = torch.float64 if input.dtype is torch.float64 else torch.float32
    kept = input.new_empty((5 if stats else 3, n), dtype=acc)
    return kept, input.new_empty(n if stats else 0, dtype=torch.int64)


def of_kept(kept: Tensor, argmax: Tensor) -> tuple[Tensor, ...]:
    """Undo `kept_stats`."""
    if len(kept) == 3:
        return ()
    row_max, log_sum, _, log_prob, entropy = kept.detach()
    return row_max, log_sum, log_prob, entropy, argmax


def composed_stats(input: Tensor, target: Tensor, options: Options, probabilities: bool) -> tuple[Tensor, ...]:
    """Compute them in torch's own operations."""
    z = logits_rows(input.detach())
    z = final_logits(z if z.dtype is torch.float64 else z.float(), options)
    row_max = z.amax(1)
    u = z - row_max[:, None]
    log_sum = u.exp().sum(1).log()
    p = (u - log_sum[:, None]).exp()
    entropy = log_sum - torch.where(p == 0, 0, p * u).sum(1)
    if probabilities:
        q = logits_rows(target.detach()).to(z.dtype)
        log_prob = (q * log_p(q, u, log_sum)).sum(1)
    else:
        ids, counts, invalid = class_ids(target, z.shape[1], options.ignore_index)
        chosen = (u - log_sum[:, None]).gather(1, ids[:, None])[:, 0]
        log_prob = torch.where(invalid, torch.nan, torch.where(counts, chosen, 0))
    return row_max, log_sum, log_prob, entropy, z.argmax(1)
