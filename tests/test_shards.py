"""The operations on shards of the classes: their rows combine to those of the whole, and so do the gradients."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from cases import CONTIGUOUS, FLOATS, Case, cases
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_close

from swl.backends import Rows
from swl.ops.cross_entropy import check
from swl.options import Options


def combine(parts: list[Rows], dtype: Any) -> tuple[Any, ...]:
    """M by maximum, S by logsumexp of S + M − max M, d by addition after the shift d + A·(M − max M); A adds up.

    A shard whose classes are all masked (M = −inf) has no share in S or d.
    """
    M = np.max([part.row_max for part in parts], axis=0)
    total, d, A = np.zeros_like(M), np.zeros_like(M), np.zeros_like(M)
    with np.errstate(all="ignore"):
        for part in parts:
            shift = part.row_max - M
            masked = part.row_max == -np.inf
            total += np.where(masked, 0, np.exp(part.log_sum + shift))
            d += np.where(masked, 0, part.target_dot + np.where(part.mass == 0, 0, part.mass * shift))
            A += part.mass
        return M.astype(dtype), np.log(total).astype(dtype), d.astype(dtype), A.astype(dtype)


@given(case=cases(), cuts=st.lists(st.floats(0, 1), min_size=1, max_size=3), masked=st.booleans())
def test_shards_of_the_classes_combine_to_the_whole(backend: Any, case: Case, cuts: list[float], masked: bool) -> None:
    C = case.logits.shape[-1]
    edges = sorted({0, C, *(round(cut * C) for cut in cuts)})
    ranges = list(pairwise(edges))
    if masked and len(ranges) > 1 and case.target.shape != case.logits.shape:
        # the last shard is padding: no target is in it
        start = ranges[-1][0]
        case.logits = np.where(np.arange(C) < start, case.logits, -np.inf).astype(case.dtype)
        in_padding = (case.target >= start) & (case.target != case.options.get("ignore_index", -100))
        case.target = np.where(in_padding, 0, case.target).astype(case.target.dtype)
        case.options.pop("label_smoothing", None)
    case.dout = 1.0
    logits, target, options, _ = case.on(backend)
    alone = {"reduction": "none", "denominator": None, "sample_weight": None}
    problem = check(logits, target, Options.checked({**options, **alone}))
    logits_nc = problem.source.logits_nc
    ops, whole = problem.backend, problem.target

    parts = [ops.cross_entropy_forward(logits_nc[:, a:b], whole.classes(a, b), False) for a, b in ranges]
    host = [Rows(*(None if x is None else backend.numpy(x) for x in part)) for part in parts]
    M, S, d, A = combine(host, case.acc)

    plain = {k: v for k, v in case.options.items() if k not in ("reduction", "denominator", "sample_weight")}
    want = Case(case.logits, case.target, CONTIGUOUS, {**plain, "reduction": "none"}).answer()
    N = len(M)
    m = np.ones(N, case.acc)
    if whole.ids is not None:
        m = (backend.numpy(whole.ids) >= 0).astype(case.acc)
        if whole.row_weight is not None:
            m = backend.numpy(whole.row_weight)
    scale = want.row_scale.reshape(N)
    counts = np.ones(N, bool) if whole.ids is None else backend.numpy(whole.ids) >= 0
    assert_close("M", M[counts], want.row_max.reshape(N)[counts], scale[counts], case.acc)
    assert_close("S", S[counts], want.log_sum.reshape(N)[counts], scale[counts], case.acc)
    with np.errstate(all="ignore"):
        loss = np.where(counts, A * S - d + whole.z_loss * m * (M + S) ** 2, 0)
    loss_scale = want.loss_scale.reshape(N) + A * scale  # the shifts M_k − M cancel between d and the whole
    assert_close("loss", loss, want.loss.reshape(N), loss_scale, case.acc, roundings=64)

    rows = Rows(*(backend.array(x) for x in (loss.astype(case.acc), M, S, d, A)))
    row_scale = problem.row_scale(1.0)
    grads = []
    for a, b in ranges:
        out = ops.empty((N, b - a), logits_nc.dtype)
        ops.cross_entropy_backward(logits_nc[:, a:b], whole.classes(a, b), rows, row_scale, out)
        grads.append(backend.numpy(out))
    grad_scale = want.grad_scale.reshape(N, C)
    assert_close(
        "grad", np.concatenate(grads, axis=1), want.grad.reshape(N, C), grad_scale, case.acc, case.dtype, roundings=64
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_bias_is_added_to_the_logits_before_the_softcap(backend: Any, dtype: Any, softcap: float | None) -> None:
    """The fused head leaves the bias to the loss; it is added in the arithmetic's dtype."""
    rng = np.random.default_rng(0)
    case = Case(rng.standard_normal((5, 67)).astype(dtype), np.arange(5), CONTIGUOUS, {"reduction": "none"})
    case.options["softcap"] = softcap
    bias = rng.standard_normal(67).astype(case.acc)
    logits, target, options, _ = case.on(backend)
    problem = check(logits, target, Options.checked(options))
    logits_nc = problem.source.logits_nc
    target_with_bias = problem.target._replace(bias=backend.array(bias))
    want = Case(case.logits.astype(np.float64) + bias, case.target, CONTIGUOUS, case.options).answer()
    row_scale, out = backend.array(np.ones(1, case.acc)), problem.backend.empty((5, 67), logits_nc.dtype)
    rows = problem.backend.cross_entropy_forward_backward(logits_nc, target_with_bias, row_scale, out, True)
    scale = want.loss_scale + np.abs(want.row_max) + 1  # the sum with the bias is rounded
    assert_close("loss", backend.numpy(rows.loss), want.loss, scale, case.acc)
    assert_close("grad", backend.numpy(out), want.grad, want.grad_scale + 1, case.acc, dtype)
    np.testing.assert_array_equal(backend.numpy(rows.argmax), want.argmax)

    again = problem.backend.empty((5, 67), logits_nc.dtype)
    problem.backend.cross_entropy_backward(logits_nc, target_with_bias, rows, row_scale, again)
    assert backend.numpy(again).tobytes() == backend.numpy(out).tobytes()


@given(case=cases(), cut=st.integers(0, 40))
def test_rows_can_be_worked_on_in_chunks(backend: Any, case: Case, cut: int) -> None:
    """`Target.rows` and slices of the logits give the same rows as the whole."""
    case.dout = 1.0
    logits, target, options, _ = case.on(backend)
    alone = {"reduction": "none", "denominator": None, "sample_weight": None}
    problem = check(logits, target, Options.checked({**options, **alone}))
    logits_nc = problem.source.logits_nc
    ops, N = problem.backend, problem.n_rows
    cut = min(cut, N)
    scale = backend.array(np.ones(1, case.acc))
    out = ops.empty(logits_nc.shape, logits_nc.dtype)
    whole = ops.cross_entropy_forward_backward(logits_nc, problem.target, scale, out, True)
    for a, b in ((0, cut), (cut, N)):
        part_out = ops.empty((b - a, logits_nc.shape[1]), logits_nc.dtype)
        part = ops.cross_entropy_forward_backward(logits_nc[a:b], problem.target.rows(a, b), scale, part_out, True)
        for name in ("loss", "row_max", "log_sum", "log_prob"):
            got, want = (backend.numpy(getattr(rows, name)) for rows in (part, whole))
            assert_close(name, got, want[a:b], np.abs(want[a:b]) + 1, case.acc)
        got, want = backend.numpy(part_out), backend.numpy(out)[a:b].astype(np.float64)
        assert_close("grad", got, want, np.abs(want), case.acc, case.dtype)
