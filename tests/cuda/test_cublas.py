"""The products of a fused head on a device: of 16-bit operands where those are given, and rounded once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fake
import fakecuda
import ml_dtypes
import numpy as np
import pytest
from fakecuda import strict
from needs import TORCH

import swl
from swl.backends.protocol import TF32

pytestmark = pytest.mark.usefixtures("on_fake")

N, D, C = 40, 64, 700
CUTS = {  # inputs, budget; rows and classes of a chunk; rows whose gradients of the logits are kept
    "one chunk": (64, 10**7, (40, 700), 0),
    "rows, all kept": (64, 4 * 25 * C, (20, 700), 40),
    "both, all kept": (64, 4 * 4000, (15, 175), 40),
    "rows, some kept": (16, 4 * 8 * C, (8, 700), 16),
    "both, some kept": (16, 4 * 500, (7, 54), 14),
    "rows": (16, 4 * 25 * C, (20, 700), 0),
    "both": (16, 4 * 4000, (32, 100), 0),
}
SHORT = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swl.ops.chunks.MIN_ROWS", 8)


def operands(dtype: Any, D: int = D) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    x, W = rng.normal(size=(N, D)).astype(dtype), rng.normal(size=(D, C)).astype(dtype)
    return x, W, rng.integers(0, C, N)


@contextmanager
def allocated() -> Iterator[list[int]]:
    """List the bytes of all memory taken within."""
    seen: list[int] = []

    def malloc(size: int) -> Any:
        seen.append(size)
        return strict.poisoned(size)

    with fake.cupy().cuda.using_allocator(malloc):
        yield seen


@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("turned", [False, True], ids=["(D, C)", "(C, D)"])
def test_all_products_of_a_16_bit_head_take_16_bit_operands(dtype: Any, how: str, turned: bool) -> None:
    D, budget, chunk, kept = CUTS[how]
    x, W, t = operands(dtype, D)
    x, t = swl.asarray(x), swl.asarray(t)
    W = swl.asarray(np.ascontiguousarray(W.T)).T if turned else swl.asarray(W)
    cut = swl.plan(N, D, C, dtype=dtype, memory_budget=budget, device=True)
    assert ((cut.rows, cut.classes), cut.kept) == (chunk, kept)
    with fakecuda.recorded() as works, allocated() as memory:
        swl.linear_cross_entropy_value_and_grad(x, W, t, memory_budget=budget)
    products = [work.what for work in works if work.what.startswith("gemmEx")]
    sums_of_dW = -(-N // kept) if kept else cut.chunks
    assert len(products) == (cut.products - 1) * cut.chunks + sums_of_dW
    assert [p for p in products if not p.startswith(f"gemmEx of {dtype.name}")] == []
    # beside the gradient: what it is added up in, or what is kept of all rows if that is less
    beside = 0 if cut.rows == N else min(4 * D * C, 2 * N * C) if kept == N else 4 * D * C
    assert cut.accumulators == beside
    taken = (2 * D * C, beside, 4 * cut.rows * cut.classes)
    assert sorted(n for n in memory if n >= 2 * D * C) == sorted(n for n in taken if n >= 2 * D * C)


@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("turned", [False, True], ids=["(D, C)", "(C, D)"])
def test_the_gradient_of_the_logits_is_rounded_once(dtype: Any, how: str, turned: bool) -> None:
    D, budget, _, _ = CUTS[how]
    x, W, t = operands(dtype, D)
    W = np.ascontiguousarray(W.T).T if turned else W
    wide = x.astype(np.float64) @ W.astype(np.float64)
    _, G = swl.cross_entropy_value_and_grad(wide, t, reduction="sum", backend="numpy")
    _, (dx, dW, db) = swl.linear_cross_entropy_value_and_grad(
        *map(swl.asarray, (x, W, t, np.zeros(C, dtype))), reduction="sum", memory_budget=budget
    )
    half = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype.name]  # of a unit: one rounding
    x, W = x.astype(np.float64), W.astype(np.float64)
    each = half * np.abs(G) + 2.0**-25 * (dtype == np.float16)
    slack = 1e-5 * np.abs(G) + 1e-7  # of float32
    for got, want, error in (
        (dx, G @ W.T, (each + slack) @ np.abs(W.T)),
        (dW, x.T @ G, np.abs(x.T) @ (each + slack)),
        (db, G.sum(axis=0), (each + slack).sum(axis=0)),
    ):
        got = got.get().astype(np.float64)
        assert np.all(np.abs(got - want) <= error + half * np.abs(want) * (1 + half) + 2.0**-25)


def test_float32_and_mixed_operands_stay_float32() -> None:
    x, W, t = operands(np.float32)
    for left, right in ((x, W), (x.astype(np.float16), W), (x, W.astype(ml_dtypes.bfloat16))):
        with fakecuda.recorded() as works:
            swl.linear_cross_entropy_value_and_grad(*map(swl.asarray, (left, right, t)))
        products = [work.what for work in works if work.what.startswith("gemmEx")]
        assert [re.sub(" into.*", "", p) for p in products] == ["gemmEx of float32"] * 3


def test_the_callers_math_mode_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    x, W, t = map(swl.asarray, operands(np.float16))
    cublas, handle = fake.cupy().cuda.cublas, fake.cupy().cuda.device.get_cublas_handle()
    cublas.setMathMode(handle, 3)
    swl.linear_cross_entropy_value_and_grad(x, W, t)
    assert cublas.getMathMode(handle) == 3

    def fails(*_: Any) -> None:
        assert cublas.getMathMode(handle) == 3 | 16
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")

    monkeypatch.setattr(cublas, "gemmEx", fails)
    with pytest.raises(RuntimeError, match="NOT_SUPPORTED"):
        swl.affine(x, W)
    assert cublas.getMathMode(handle) == 3
    cublas.setMathMode(handle, 0)


@pytest.mark.parametrize(
    ("asked_of_cupy", "torch", "used"), [(0, None, 68), (7, None, 77), (0, True, 77), (7, False, 68)]
)
def test_tf32_is_used_where_it_was_asked_for_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, asked_of_cupy: int, torch: bool | None, used: int
) -> None:
    cublas, types = fake.cupy().cuda.cublas, []
    original = cublas.gemmEx
    monkeypatch.setattr(cublas, "gemmEx", lambda *args: types.append(args[-2]) or original(*args))
    monkeypatch.setattr(fake.cupy()._core, "get_compute_type", lambda _: asked_of_cupy)
    asked = TF32.set(torch)
    try:
        for dtype, wanted in ((np.float32, used), (np.float64, 70), (np.float16, 68)):
            types.clear()
            swl.linear_cross_entropy_value_and_grad(*map(swl.asarray, operands(dtype)))
            assert set(types) == {wanted}
    finally:
        TF32.reset(asked)


def test_cupys_names_for_tf32_are_these() -> None:
    from cupy._core import _routines_linalg, get_compute_type

    assert _routines_linalg.compute_type_to_str(7) == "COMPUTE_TYPE_TF32"
    assert callable(get_compute_type)


def test_torch_is_asked_in_its_newer_way_or_in_the_older(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason=TORCH)
    from swl.torch._bridge import _tf32

    before = torch.get_float32_matmul_precision()
    try:
        for precision, wanted in (("highest", False), ("high", True), ("medium", True), ("highest", False)):
            torch.set_float32_matmul_precision(precision)
            assert _tf32() is wanted
            with monkeypatch.context() as patch:
                patch.setattr(torch.backends.cuda, "matmul", object())  # as before torch 2.9
                assert _tf32() is wanted
    finally:
        torch.set_float32_matmul_precision(before)
