"""What the scripts for several ranks share, those under MPI and those on torch's process groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from swl.ops.chunks import DEFAULT_BUDGET

OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight": True},
    {"label_smoothing": 0.1},
    {"sample_weight": True},
    {"z_loss": 0.3},
    {"softcap": 2.0},
    {"temperature": 0.7},
    {"ignore_index": 0},
    {"denominator": 7.0},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"weight": True, "label_smoothing": 0.3},
    {"weight": True, "sample_weight": True, "ignore_index": 1, "z_loss": 1e-2},
    {"weight": True, "reduction": "none", "sample_weight": True, "temperature": 1.5},
    {"weight": True, "label_smoothing": 0.5, "sample_weight": True, "z_loss": 0.1, "softcap": 3.0, "temperature": 2.0},
]
BUDGETS = [DEFAULT_BUDGET, 3000, 40_000]  # all logits at once; classes cut; rows cut


def wrong_on_the_last(rank: int, size: int) -> Callable[[type[Exception], str], Any]:
    """Expect what the last rank alone does wrong: its own error there, on the others a message with rank and cause."""
    last = rank == size - 1

    def raises(own: type[Exception], message: str) -> Any:
        cause = message if last else rf"rank {size - 1} of {size} failed: {own.__name__}: .*{message}"
        return pytest.raises(own if last else RuntimeError, match=cause)

    return raises
