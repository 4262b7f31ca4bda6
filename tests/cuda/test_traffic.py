"""The kernels move no more bytes than they say; see traffic.py for the table."""

from __future__ import annotations

import fake
import numpy as np
import pytest
import traffic

from swl.backends.cupy.backend import CupyBackend
from swl.backends.protocol import Target

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


def test_a_row_that_does_not_count_is_not_read_for_its_gradient() -> None:
    backend = CupyBackend(fake.cupy())
    logits = backend.asarray(np.zeros((64, 5000), np.float32))
    ids, _, _ = backend.prepare_ids(backend.asarray(np.full(64, -100)), 5000, -100, None)
    target, scale, grad = (
        Target(ids=ids),
        backend.asarray(np.ones(1, np.float32)),
        backend.empty((64, 5000), np.float32),
    )
    rows = backend.cross_entropy_forward(logits, target, False)
    _, read, written = traffic.count(lambda: backend.cross_entropy_backward(logits, target, rows, scale, grad))
    assert read < logits.nbytes / 50
    assert written == logits.nbytes
    assert not grad.get().any()
