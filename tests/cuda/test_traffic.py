"""The kernels move no more bytes than they say; see traffic.py for the table."""

from __future__ import annotations

import pytest
import traffic

pytestmark = pytest.mark.usefixtures("on_fake")


def test_bytes_per_logit_stay_within_their_limits() -> None:
    table = traffic.measure()
    assert [row for row in table if not row.ok()] == []
    on_chip = {(row.C, row.shared) for row in table if row.sweeps == "both" and row.variant == "rows"}
    assert {(1000, traffic.H100), (32000, traffic.H100), (50257, traffic.H100), (128256, traffic.H100)} <= on_chip
    # close to what a block has: 4 packs a thread of 512, and its shared memory
    assert {(66000, traffic.H100), (49500, traffic.A100), (99000, traffic.A100)} <= on_chip
    assert any("combine" in row.variant for row in table)
