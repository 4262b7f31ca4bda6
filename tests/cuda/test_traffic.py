"""The kernels move no more bytes than they say; see traffic.py for the table."""

from __future__ import annotations

import pytest
import traffic

pytestmark = pytest.mark.usefixtures("on_fake")


def test_bytes_per_logit_stay_within_their_limits() -> None:
    table = traffic.measure()
    assert [row for row in table if not row.ok()] == []
    both = [row for row in table if row.sweeps == "both"]
    on_chip = {(row.C, row.shared) for row in both if row.variant == "rows"}
    assert {(1000, traffic.H100), (32000, traffic.H100), (50257, traffic.H100), (128256, traffic.H100)} <= on_chip
    # close to what a block has: 4 packs a thread of 512, and its shared memory
    assert {(66000, traffic.H100), (49500, traffic.A100), (99000, traffic.A100)} <= on_chip
    # a cluster of blocks has room for the rows of the largest vocabularies
    in_cluster = {(row.C, row.dtype) for row in both if row.variant == "cluster"}
    assert {(128256, "float32"), (262144, "float32"), (262144, "float16"), (262144, "bfloat16")} == in_cluster
    assert any("combine" in row.variant for row in table)
