"""What a step of the fused head costs a device; see ledger.py."""

from __future__ import annotations

from typing import Any

import fake
import fakecuda
import ledger
import ml_dtypes
import numpy as np
import pytest
from ledger import CARDS, Entry, Step, float_dtype

import swl
from swl.backends.cupy.backend import CupyBackend

pytestmark = pytest.mark.usefixtures("on_fake")

HEAD = Step(8192, 4096, 128256)


def arrays(N: int, D: int, C: int, dtype: Any) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    x, W = rng.normal(size=(N, D)).astype(dtype), rng.normal(size=(D, C)).astype(dtype)
    return swl.asarray(x), swl.asarray(W), swl.asarray(rng.integers(0, C, N))


@pytest.mark.parametrize("N", [4096, HEAD.N, 20000])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_16_bit_head_takes_little_longer_than_its_three_products(N: int, dtype: str) -> None:
    step = HEAD._replace(N=N, dtype=dtype)
    _, D, C, _, _ = step
    counted = step.counted()
    assert counted.multiply_adds() == {f"{dtype} in float32": 3 * N * D * C}
    gradient, beside = (
        2 * D * C,
        min(4 * D * C, 2 * N * C),
    )  # the sum of dW, or the gradient of all logits if that is less
    assert sorted(size for size in counted.allocations if size >= gradient) == [gradient, beside]
    assert {
        card: counted.seconds(CARDS[card]) / step.three_products(CARDS[card]) < 1.15 for card in CARDS
    } == dict.fromkeys(CARDS, True)


@pytest.mark.parametrize(
    "step",
    [
        HEAD,
        HEAD._replace(N=20000),
        HEAD._replace(N=100),
        Step(4000, 256, 50257, "float16", 2**24),
        Step(500, 4096, 50257, "float16", 2**22),
        Step(4000, 1024, 32000, "float32", 2**24),
        Step(500, 4096, 32000, "float64", 2**23),
    ],
    ids=str,
)
def test_a_plan_tells_all_memory_that_is_taken(step: Step) -> None:
    N, D, C, dtype, budget = step
    cut = swl.plan(N, D, C, dtype=dtype, memory_budget=budget, device=True)
    results = float_dtype("dtype", dtype).itemsize * D * (N + C)
    peak = step.counted().peak
    assert 0 <= peak - (results + cut.bytes + cut.accumulators) <= 100 * N


def test_the_ledger_sees_what_is_not_so(monkeypatch: pytest.MonkeyPatch) -> None:
    N, D, C = 60, 32, 600
    each, step = N * D * C, Step(N, D, C)
    assert step.counted().multiply_adds() == {"bfloat16 in float32": 3 * each}
    assert step._replace(dtype="float32").counted().multiply_adds() == {"float32 in float32": 3 * each}
    assert step._replace(dtype="float64").counted().multiply_adds() == {"float64 in float64": 3 * each}
    with monkeypatch.context() as patch:
        patch.setattr(CupyBackend, "gradient_over", lambda self, logits, x, W: logits)
        wide = step.counted()
    assert wide.multiply_adds() == {"bfloat16 in float32": each, "float32 in float32": 2 * each}
    assert [size for size in wide.allocations if size == 4 * D * C] == [4 * D * C] * 2  # copies of W, and of dW
    with monkeypatch.context() as patch:
        patch.setattr(fake.cupy().cuda.cublas, "setMathMode", lambda *_: None)
        assert step.counted().multiply_adds() == {"bfloat16 in float32": each, "bfloat16 in bfloat16": 2 * each}
    with monkeypatch.context() as patch:
        patch.setattr(fake.cupy()._core, "get_compute_type", lambda _: 7)
        assert step._replace(dtype="float32").counted().multiply_adds() == {"tfloat32 in float32": 3 * each}


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)], ids=str)
def test_bytes_of_kernels_are_those_that_the_driver_counts(dtype: Any) -> None:
    N, D, C = 24, 8, 6000
    x, W, t = arrays(N, D, C, dtype)
    dense = swl.asarray(np.ones((N, C), dtype))
    calls = [
        lambda budget=budget: swl.linear_cross_entropy_value_and_grad(x, W, t, memory_budget=budget)
        for budget in (10**7, 4 * 10 * C, 4 * 4000)
    ]
    for call in (*calls, lambda: swl.affine_backward(dense, x, W, needs=("db",))):
        fake.cupy().cuda.Device().synchronize()
        fakecuda.traffic()
        with ledger.counted() as counted:
            call()
        fake.cupy().cuda.Device().synchronize()
        seen = fakecuda.traffic()
        ours = [entry for entry in counted.entries if "<" in entry.what]
        assert abs(sum(e.read for e in ours) / seen.bytes_read - 1) < 0.02
        assert abs(sum(e.written for e in ours) / seen.bytes_written - 1) < 0.02


def test_copies_casts_and_products_are_counted_exactly() -> None:
    cupy = fake.cupy()
    a, b, out = (cupy.zeros(shape, np.float32) for shape in ((30, 20), (20, 50), (30, 50)))
    with ledger.counted() as counted:
        out.astype(np.float16)
        out[...] = 0
        out.sum(axis=0)
        a.T + cupy.broadcast_to(cupy.zeros(1, np.float32), (20, 30))
        swl.affine(a, b, out[0])
    got = {e.what.split("<")[0].split("__")[0]: (e.read, e.written, e.multiply_adds) for e in counted.entries}
    assert got["cupy_copy"] == (6000, 3000, 0)
    assert got["cupy_sum"] == (6000, 200, 0)
    assert got["cupy_add"] == (2400 + 8, 2400, 0)  # what is one number counts as 8 bytes
    assert got["fill_rows"] == (200, 6000, 0)
    assert got["gemmEx of float32 into float32"] == (4 * (600 + 1000 + 1500), 6000, 30 * 20 * 50)
    assert 3000 in counted.allocations


def test_the_peak_is_what_lives_at_a_time() -> None:
    cupy = fake.cupy()
    older = cupy.empty(999)
    with ledger.counted() as counted:
        one = cupy.empty(1000, np.uint8)
        del one, older
        two, three = cupy.empty(2000, np.uint8), cupy.empty(600, np.uint8)
        del two, three
    assert counted.allocations == [1000, 2000, 600]
    assert counted.peak == 2600


def test_a_bound_is_the_longer_of_bytes_and_multiply_adds_at_the_cards_peak() -> None:
    H100 = CARDS["H100"]
    assert Entry("copy", 2, 1, 0, "").seconds(H100) == 3 / 3.35e12
    assert Entry("gemm", 2, 1, 10**6, "float16 in float32").seconds(H100) == 2e6 / 989.4e12
    assert Entry("gemm", 10**6, 0, 1, "float16 in float32").seconds(H100) == 1e6 / 3.35e12
    assert HEAD.three_products(H100) == pytest.approx(26.1e-3, rel=1e-3)
