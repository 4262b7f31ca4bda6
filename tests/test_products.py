"""Matrix products of the CPU backend: the compiled kernel, and how products are shared out to threads."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import swl
from swl.backends.host.blas import control, one_thread_each
from swl.backends.host.threads import POOL
from swl.backends.numba import gemm as _gemm
from swl.backends.numba import products as _products
from swl.backends.numba.backend import READS_HALVES
from swl.backends.numba.gemm import DEEP, gemm
from swl.backends.numba.gemm_tile import ROWS
from swl.backends.numba.products import product

SIZES = st.one_of(st.integers(1, 70), st.sampled_from([96, 97, 144, 255, 300]))
INNER = st.one_of(st.integers(1, 40), st.sampled_from([DEEP - 1, DEEP, DEEP + 1, 2 * DEEP + 3]))
PLACES = ("plain", "transposed", "every second", "reversed", "amid others", "unaligned", "repeated")


def put_down(x: Any, place: str, around: float) -> Any:
    """Lay a matrix into memory full of something else, and give the view that holds it."""
    m, n = x.shape
    if place == "repeated":  # the caller made all rows alike
        return np.broadcast_to(x[:1], x.shape)
    if place == "unaligned":
        raw = np.full(x.nbytes + 1, 7, np.uint8)
        view = raw[1:].view(x.dtype).reshape(m, n)
    elif place == "transposed":
        view = np.full((n, m + 3), around, x.dtype)[:, 2:-1].T
    elif place == "every second":
        view = np.full((2 * m, 2 * n), around, x.dtype)[::2, 1::2]
    elif place == "reversed":
        view = np.full((m, n), around, x.dtype)[::-1, ::-1]
    elif place == "amid others":
        view = np.full((m + 2, n + 9), around, x.dtype)[1:-1, 4:-5]
    else:
        view = np.full((m, n), around, x.dtype)
    view[...] = x
    return view


def bound(a: Any, b: Any, steps: int) -> Any:
    """Rounding errors that a sum of `steps` terms in order may make, number by number."""
    return steps * np.finfo(a.dtype).eps * (np.abs(a).astype(np.float64) @ np.abs(b).astype(np.float64))


DTYPES = {"d": np.float64, "f": np.float32, "e": np.float16, "b": ml_dtypes.bfloat16}
CONVERTS = pytest.mark.skipif(not READS_HALVES, reason="the kernel widens 16-bit operands where an instruction does")


def eps(dtype: Any) -> float:
    return float(ml_dtypes.finfo(dtype).eps)


@pytest.mark.parametrize(
    "dtypes", ["fff", "ddd", *(pytest.param(d, marks=CONVERTS) for d in ("bbf", "bbb", "efe", "fbf"))]
)
@given(
    m=SIZES, n=SIZES, k=INNER, add=st.booleans(),
    places=st.tuples(*[st.sampled_from(PLACES)] * 2, st.sampled_from(PLACES[:-1])), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_the_kernel_multiplies_matrices_wherever_they_lie(
    dtypes: str, m: int, n: int, k: int, add: bool, places: tuple[str, str, str], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    a, b, out = (
        rng.standard_normal(shape).astype(DTYPES[d]) for shape, d in zip(((m, k), (k, n), (m, n)), dtypes, strict=True)
    )
    add = add and out.itemsize > 2
    a, b = (np.repeat(x[:1], len(x), 0) if place == "repeated" else x for x, place in zip((a, b), places, strict=False))
    expected = a.astype(np.float64) @ b.astype(np.float64) + (out if add else 0)
    here = put_down(out, places[2], around=2.0**14)
    gemm(put_down(a, places[0], around=np.nan), put_down(b, places[1], around=np.nan), here, add)
    if out.itemsize == 2:
        a, b = a.astype(np.float32), b.astype(np.float32)
    legal = bound(a, b, min(k, DEEP) + k // DEEP + 2) + eps(out.dtype) * (8 if out.itemsize > 2 else np.abs(expected))
    assert (np.abs(here.astype(np.float64) - expected) <= legal + (6e-8 if dtypes[2] == "e" else 0)).all()
    base = here
    while base.base is not None:
        base = base.base
    if places[2] not in ("plain", "reversed", "unaligned"):
        assert (base == 2.0**14).sum() == base.size - here.size  # nothing beside the result was written


@CONVERTS
@pytest.mark.parametrize("name", ["e", "b"])
def test_a_result_of_16_bit_is_the_float32_one_rounded_once(name: str) -> None:
    """However many parts the inner axis is taken in, and as if the operands had been float32."""
    rng = np.random.default_rng(0)
    for m, k, n in ((33, 400, 70), (33, 3 * DEEP + 5, 101)):
        a, b = rng.standard_normal((m, k)).astype(DTYPES[name]), rng.standard_normal((k, n)).astype(np.float32)
        out, wide, wider = np.empty((m, n), DTYPES[name]), np.empty((m, n), np.float32), np.empty((m, n), np.float32)
        gemm(a, b, out)
        gemm(a, b, wide)
        gemm(a.astype(np.float32), b, wider)
        np.testing.assert_array_equal(wide, wider)
        np.testing.assert_array_equal(out, wide.astype(DTYPES[name]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_more_rows_than_a_block(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    m = 2 * _gemm.BLOCK // (DEEP * np.dtype(dtype).itemsize) + ROWS + 3
    for layout in ("C", "F"):
        a, b = np.asarray(rng.standard_normal((m, 300)), dtype, layout), rng.standard_normal((300, 60)).astype(dtype)
        out = np.empty((m, 60), dtype)
        gemm(a, b, out)
        assert (np.abs(out - a.astype(np.float64) @ b) <= bound(a, b, DEEP + 3)).all()


def test_long_sums_are_taken_in_parts() -> None:
    """The error grows with DEEP and k/DEEP, not with k."""
    rng = np.random.default_rng(0)
    a, b = (rng.random(shape, np.float32) for shape in ((16, 50257), (50257, 48)))
    out = np.empty((16, 48), np.float32)
    gemm(a, b, out)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    assert (np.abs(out / exact - 1)).max() < 2e-6


def test_a_part_of_a_product_has_the_bits_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((90, 700)).astype(np.float32), rng.standard_normal((700, 200)).astype(np.float32)
    whole, part = np.empty((90, 200), np.float32), np.empty((33, 77), np.float32)
    gemm(a, b, whole)
    gemm(a[20:53], b[:, 101:178], part)
    assert (part == whole[20:53, 101:178]).all()


def test_infinities_and_nans_stay_in_their_rows_and_columns() -> None:
    a, b = np.ones((20, 30), np.float32), np.ones((30, 100), np.float32)
    a[3, 4], b[29, 99] = np.inf, np.nan
    out = np.empty((20, 100), np.float32)
    gemm(a, b, out)
    expected = np.full((20, 100), 30, np.float32)
    expected[3], expected[:, 99] = np.inf, np.nan
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["e", "b", "f", "d"])
def test_a_gradient_is_rounded_where_it_lies(host_backend: Any, name: str, place: str) -> None:
    x = np.random.default_rng(0).standard_normal((301, 1003)).astype(np.float32) * np.float32(1e-6)
    a = put_down(np.repeat(x[:1], 301, 0) if place == "repeated" else x, place, around=np.nan)
    got, want = host_backend.ops.rounded(a, np.dtype(DTYPES[name])), a.astype(DTYPES[name])
    assert got.dtype == want.dtype
    assert (got == want).all()
    assert (got is a) == (name == "f")
    if name != "f" and place in ("plain", "transposed"):
        assert got.flags.c_contiguous == (place == "plain")


@pytest.mark.skipif(sys.platform == "win32", reason="memory is protected by another call there")
def test_nothing_beside_the_operands_is_touched() -> None:
    program = str(Path(__file__).with_name("guarded.py"))
    done = subprocess.run([sys.executable, program, "products"], capture_output=True, text=True, check=False)
    assert done.stdout == "survived\n", (done.returncode, done.stderr[-2000:])


# ------------------------------------------------------------------------------------- on the threads of the pool


@pytest.fixture(params=["compiled", "BLAS"])
def shared_out(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Let every product be large, and be multiplied by one or the other."""
    for name in ("LARGE", "WIDE", "ADDED"):
        monkeypatch.setattr(_products, name, 0)
    monkeypatch.setattr(_products, "_suits", lambda m, n, k: request.param == "compiled")
    before = POOL.threads
    yield request.param
    swl.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (7, 900, 33), (900, 50, 20), (130, 1500, 300), (50, 60, 700)])
@pytest.mark.parametrize("dtypes", ["fff", "ddd", "eee", "eff", "fef", "ffe", "fdd"])
def test_products_of_all_sizes_and_dtypes(
    shared_out: str, threads: int, m: int, n: int, k: int, dtypes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []

    def counted(*args: Any, **named: Any) -> None:
        calls.append(True)
        gemm(*args, **named)

    monkeypatch.setattr(_products, "gemm", counted)
    swl.set_num_threads(threads)
    rng = np.random.default_rng(m)
    a, b, out, bias = (
        rng.standard_normal(shape).astype(dtype)
        for shape, dtype in zip(((m, k), (k, n), (m, n), (n,)), dtypes + dtypes[2], strict=True)
    )
    exact, wide = a.astype(np.float64) @ b.astype(np.float64), out.astype(np.float64)
    rounding = bound(a.astype(np.float32), b.astype(np.float32), k + 4) + 1e-6
    for (add, with_bias, expected), order in itertools.product(
        ((0, None, exact), (0, bias, exact + bias), (33, None, exact + wide)), "CF"
    ):
        here = out.copy(order)
        product(a, b, here, with_bias, add=add)
        legal = rounding + np.finfo(out.dtype).eps * np.abs(expected)
        assert (np.abs(here - expected) <= legal).all()
    assert bool(calls) == (shared_out == "compiled")


def test_thread_counts_give_the_same_bits(shared_out: str) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((1000, 300)).astype(np.float32), rng.standard_normal((300, 1100)).astype(np.float32)
    results = []
    for threads in (1, 2, 3, 16):
        swl.set_num_threads(threads)
        out = np.ones((1000, 1100), np.float32)
        product(a, b, out)
        product(a, b, out, add=200)
        results.append(out)
    assert all((out == results[0]).all() for out in results)


@pytest.mark.parametrize("memory_budget", [2**30, 2**18])
def test_the_fused_head_on_shared_out_products(shared_out: str, memory_budget: int) -> None:
    rng = np.random.default_rng(0)
    x, W = rng.standard_normal((200, 40)).astype(np.float32), rng.standard_normal((3000, 40)).astype(np.float32).T
    t = rng.integers(0, 3000, 200)
    with swl.use_backend("numba"):
        loss, gradients = swl.linear_cross_entropy_value_and_grad(x, W, t, memory_budget=memory_budget)
    with swl.use_backend("numpy"):
        wide = swl.linear_cross_entropy_value_and_grad(x.astype(np.float64), W.astype(np.float64), t)
    for got, want in zip((loss, *gradients[:2]), (wide[0], *wide[1][:2]), strict=True):
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_what_the_kernel_is_not_made_for_goes_to_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gemm, "USABLE", True)
    monkeypatch.setattr(_products, "gemm", lambda *args, **named: pytest.fail("the kernel was called"))
    rng = np.random.default_rng(0)
    for m, n, k in ((5, 401_000, 4), (401_000, 5, 4), (2000, 2000, 3), (20, 20, 20)):
        a, b = rng.standard_normal((m, k)), rng.standard_normal((k, n))
        out = np.empty((m, n))
        product(a, b, out)
        np.testing.assert_allclose(out[:3, :3], (a[:3] @ b[:, :3]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_affine_maps_as_they_are(dtype: Any, transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []

    def seen(a: Any, b: Any, out: Any, add: bool = False) -> None:
        calls.append(out.shape)
        gemm(a, b, out, add)

    monkeypatch.setattr(_products, "gemm", seen)
    rng = np.random.default_rng(0)
    x, W, b, dout = (rng.standard_normal(s).astype(dtype) for s in ((601, 640), (640, 1403), (1403,), (601, 1403)))
    W = W.T.copy().T if transposed else W
    wide = [a.astype(np.float64) for a in (x, W, b, dout)]
    with swl.use_backend("numba"):
        y = swl.affine(x, W, b)
        dx, dW, db = swl.affine_backward(dout, x, W)
    assert (np.abs(y - (wide[0] @ wide[1] + wide[2])) <= bound(x, W, 642) + 1e-5).all()
    assert (np.abs(dx - wide[3] @ wide[1].T) <= bound(dout, W.T, 1404)).all()
    assert (np.abs(dW - wide[0].T @ wide[3]) <= bound(x.T, dout, 602)).all()
    np.testing.assert_allclose(db, wide[3].sum(axis=0), rtol=1e-4, atol=1e-3)
    assert bool(calls) == _gemm.USABLE


@pytest.mark.parametrize("shape", [(2048, 33, 1030), (100, 784, 50), (70, 1000, 300), (512, 512, 512)], ids=str)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16], ids=lambda dtype: np.dtype(dtype).name)
def test_bits_do_not_depend_on_what_holds_blas(host_backend: Any, shape: tuple[int, int, int], dtype: Any) -> None:
    """A large product in another thread holds BLAS to one thread each, and the user may set any number."""
    blas = control()
    if blas is None:
        pytest.skip("needs NumPy's own OpenBLAS")
    m, n, k = shape
    rng = np.random.default_rng(0)
    x, W, dout = (rng.standard_normal(s).astype(dtype) for s in ((m, k), (k, n), (m, n)))

    def results() -> list[bytes]:
        return [a.tobytes() for a in (swl.affine(x, W), *swl.affine_backward(dout, x, W))]

    before = blas.get()
    try:
        blas.set(4)
        alone = results()
        with one_thread_each(1):
            held = results()
        blas.set(2)
        assert alone == held == results()
        assert blas.get() == 2
    finally:
        blas.set(before)
