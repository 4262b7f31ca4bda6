"""What only the compiled CPU kernels have to promise: of their threads, and of memory past 2³² elements."""

from __future__ import annotations

import itertools
import math
import mmap
import multiprocessing
import os
import platform
import re
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
from cases import BFLOAT16

import swl
from swl.backends.host import threads
from swl.backends.host.threads import POOL
from swl.backends.numba import backend as _backend
from swl.backends.numba import simd

RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((601, 1009), np.float32)  # more than one thread's worth
TARGET = RNG.integers(0, 1009, 601)


def results() -> list[bytes]:
    with swl.use_backend("numba"):
        loss, grad, stats = swl.cross_entropy_value_and_grad(LOGITS, TARGET, stats=True, label_smoothing=0.1)
        W = LOGITS[:, :77]
        return [np.asarray(a).tobytes() for a in (loss, grad, *stats, *swl.affine_backward(W, LOGITS, LOGITS[0:77].T))]


@pytest.fixture
def one_thread() -> Iterator[list[bytes]]:
    swl.set_num_threads(1)
    yield results()
    swl.set_num_threads()


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_thread_counts_give_the_same_bits(one_thread: list[bytes], threads: int) -> None:
    swl.set_num_threads(threads)
    assert results() == one_thread


def test_callers_may_be_threads(one_thread: list[bytes]) -> None:
    swl.set_num_threads(2)
    with ThreadPoolExecutor(4) as callers:
        for got in callers.map(lambda _: results(), range(16)):
            assert got == one_thread


def _child(queue: Any) -> None:
    queue.put(results())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_has_threads_of_its_own(one_thread: list[bytes]) -> None:
    """Threads do not survive a fork: waiting for the parent's would last forever."""
    swl.set_num_threads(2)
    results()  # the pool is running
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python and JAX warn of forks in threaded processes: that is the test
        child.start()
    try:
        assert queue.get(timeout=60) == one_thread
    finally:
        child.kill()
        child.join()


def test_resizing_while_others_compute_loses_nothing(one_thread: list[bytes]) -> None:
    swl.set_num_threads(3)
    with ThreadPoolExecutor(2) as callers:
        going = [callers.submit(results) for _ in range(12)]
        for n in (1, 4, 2, 3, 1, 2):
            swl.set_num_threads(n)
        assert all(got.result() == one_thread for got in going)


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="this system has one processor, or does not say where a thread may run",
)
def test_threads_run_where_the_caller_may_but_off_its_processor(
    one_thread: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    swl.set_num_threads(2)
    while not POOL._crew.workers:  # the thread says what it is called once it runs
        results()
    (worker,) = POOL._crew.workers
    before = os.sched_getaffinity(0)
    try:
        for here in sorted(before)[:2]:
            monkeypatch.setattr(threads, "_current_processor", lambda here=here: here)
            assert results() == one_thread
            assert os.sched_getaffinity(worker) == before - {here}
            os.sched_setaffinity(0, {here})  # set after the thread was started
            assert results() == one_thread
            assert os.sched_getaffinity(worker) == {here}
            os.sched_setaffinity(0, before)
    finally:
        os.sched_setaffinity(0, before)


def test_an_error_of_any_thread_reaches_the_caller(one_thread: list[bytes]) -> None:
    swl.set_num_threads(2)
    done = []

    def work(begin: int, end: int) -> None:
        if begin == 5:
            raise ZeroDivisionError("in a range")
        done.append(begin)

    with pytest.raises(ZeroDivisionError, match="in a range"):
        POOL.run(work, 10)
    assert results() == one_thread  # and the pool goes on


@pytest.mark.usefixtures("one_thread")
def test_offsets_past_two_to_the_32() -> None:
    """Row 4096 of 2²⁰ classes, on one thread: an offset of 32 bits would be row 0.

    The rows between are ignored, so that they are never read and their 17 GB of memory never exist.
    """
    N, C = 4097, 2**20
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, 4 * N * C, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    z = np.frombuffer(memory, np.float32).reshape(N, C)
    z[0], z[-1] = 5, RNG.standard_normal(C, np.float32)
    t = np.full(N, -100)
    t[-1] = 3
    with swl.use_backend("numba"):
        loss = swl.cross_entropy(z, t)
        alone = swl.cross_entropy(z[-1:].copy(), t[-1:])
    assert loss == alone
    assert 13 < loss < 22


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gradients_hold_hardly_any_subnormal_numbers(dtype: Any) -> None:
    """They would slow the products that read them tens of times; each is less than the smallest normal number."""
    rng = np.random.default_rng(0)
    z = (rng.standard_normal((64, 5000)) * (28 if dtype == np.float32 else 230)).astype(dtype)
    with swl.use_backend("numba"):
        _, grad = swl.cross_entropy_value_and_grad(z, rng.integers(0, 5000, 64))
    subnormal = (grad != 0) & (np.abs(grad) < np.finfo(dtype).tiny)
    assert subnormal.mean() < 1e-3
    assert (grad == 0).mean() > 0.5


def test_rows_without_options_get_no_subnormal_gradient() -> None:
    """Their rounding to bfloat16 relies on it (`simd.normal`).

    The exponentials lie around the least normal number; with each `dout`, rounding alone would bring one gradient below it.
    """
    z = np.concatenate([[0], np.arange(-104.4, -103.9, 2.0**-17)]).astype(np.float32)[None]
    for factor in (1.1389981663610602, 1.1570761793632272, 1.2590931821970328, 1.3404817469578263):
        with swl.use_backend("numba"):
            _, grad = swl.cross_entropy_value_and_grad(z, np.array([0]), dout=factor * 2**24, reduction="sum")
        size = np.abs(grad[0, 1:])
        assert np.count_nonzero(size) > 1000
        assert not ((size != 0) & (size < np.finfo(np.float32).tiny)).any()


@pytest.mark.parametrize("C", [1, 2, 10, 63, 64])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_of_few_classes_are_what_longer_rows_are(C: int, dtype: Any) -> None:
    """Few classes go through the lanes, a row in each; with masked classes behind them, they are summed along the row."""
    rng = np.random.default_rng(C)
    z = (rng.standard_normal((71, C)) * 5).astype(dtype)
    z[3], z[4, 0], z[5, -1], z[6] = -np.inf, np.nan, np.inf, 1e8
    t = rng.integers(0, C, len(z))
    t[[1, 4, 40, 70]] = -100
    long = np.full((len(z), 100), -np.inf, dtype)
    long[:, :C] = z
    options: dict[str, Any] = {"reduction": "none", "z_loss": 1e-3, "dout": rng.standard_normal(len(z))}
    w = rng.random(100).astype(dtype)
    with swl.use_backend("numba"):
        loss, grad, stats = swl.cross_entropy_value_and_grad(z, t, weight=w[:C], stats=True, **options)
        expected, wide, long_stats = swl.cross_entropy_value_and_grad(long, t, weight=w, stats=True, **options)
    close = partial(np.testing.assert_allclose, rtol=20 * np.finfo(dtype).eps, atol=20 * np.finfo(dtype).eps)
    close(loss, expected)
    close(grad, wide[:, :C])
    for name in ("row_max", "log_sum", "log_prob", "argmax"):
        close(getattr(stats, name), getattr(long_stats, name))
    assert not grad[t == -100].any()


@pytest.mark.parametrize("at", [5, 1023, 1024, 4095, 4096, 9000, 12_290])
@pytest.mark.parametrize("above", [1.0, 3.9, 4.1, 60.0, 1e4])
def test_a_maximum_may_stand_anywhere(at: int, above: float) -> None:
    """Before or after the classes that the first block is summed relative to, and far above them or hardly."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((2, 12_291), np.float32)
    z[0, at] = z[0].max() + above
    z[1, :at] = -np.inf
    q = rng.random(z.shape, np.float32) * (z > -np.inf)
    q /= q.sum(axis=1, keepdims=True)
    for target in (np.array([at, 12_290]), q):
        results = []
        for backend in ("numba", "numpy"):
            loss, grad, stats = swl.cross_entropy_value_and_grad(
                z, target, reduction="none", stats=True, backend=backend
            )
            results.append((loss, grad, stats.row_max, stats.log_sum))
        for got, expected in zip(*results, strict=True):
            np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-7)
        assert (results[0][0] >= 0).all()


def test_the_small_way_is_the_general_way_to_the_bit() -> None:
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float64):
        z = rng.standard_normal((67, 300)).astype(dtype)
        hot = np.eye(300, dtype=bool)[rng.integers(0, 300, 67)]
        kinds = [hot.astype(kind) for kind in ("?", "i8", "f2", "f4", "f8")] + [
            rng.dirichlet(np.ones(300), 67).T.copy().T
        ]
        for t in (rng.integers(0, 300, 67), np.full(67, -100), np.where(np.arange(67) % 3, 7, -100), *kinds):
            with swl.use_backend("numba"):
                loss, grad = swl.cross_entropy_value_and_grad(z, t)
                expected, general, _ = swl.cross_entropy_value_and_grad(z, t, stats=True)
                assert loss.dtype == dtype
                assert loss.tobytes() == expected.tobytes() == swl.cross_entropy(z, t).tobytes()
                assert grad.tobytes() == general.tobytes()
                in_place = z.copy()
                again, out = swl.cross_entropy_value_and_grad(in_place, t, out=in_place)
                assert out is in_place
                assert again.tobytes() + out.tobytes() == loss.tobytes() + grad.tobytes()


def test_a_gradient_over_its_own_target_is_refused_at_every_size() -> None:
    for N in (6, 40_000):
        z, q = np.zeros((N, 10)), np.full((N, 10), 0.1)
        for out in (q, q[::-1]):
            with swl.use_backend("numba"), pytest.raises(ValueError, match="out overlaps target"):
                swl.cross_entropy_value_and_grad(z, q, out=out)
        assert (q == 0.1).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exp_is_within_two_ulp_on_its_whole_range(dtype: Any) -> None:
    """Subnormal results included; exactly 0 below them, 1 at 0, and a NaN stays one."""
    from numba import njit

    @njit(error_model="numpy")
    def exp(x: Any, out: Any) -> None:
        step = simd.lanes(x[0])
        for j in range(0, x.size, step):
            simd.store(simd.whole(out), j, simd.exp_nonpositive(simd.load(simd.whole(x), j, x[0])))

    low = 110 if dtype == np.float32 else 760
    special = np.array([0, -0.0, -np.inf, -1e30, np.nan, -104, -746, -87.5])
    x = np.concatenate([special, -np.linspace(0, low, 200_000), -np.logspace(-30, 2, 50_000)]).astype(dtype)
    x = np.resize(x, x.size // 32 * 32)  # whole vectors
    got = np.empty_like(x)
    exp(x, got)
    want = np.exp(x.astype(np.longdouble))
    ulp = np.spacing(np.maximum(want.astype(dtype), np.finfo(dtype).smallest_subnormal)).astype(np.longdouble)
    with np.errstate(invalid="ignore"):
        error = np.abs(got - want) / ulp
    assert (error[~np.isnan(x)] <= 2).all()
    np.testing.assert_array_equal(got[:5], np.array([1, 1, 0, 0, np.nan], dtype))


def test_the_rounding_errors_of_a_mean_do_not_grow_with_its_rows() -> None:
    rng = np.random.default_rng(0)
    z, t, w = rng.standard_normal((100_000, 10)), rng.integers(0, 10, 100_000), rng.random(10)
    with swl.use_backend("numba"):
        each = swl.cross_entropy(z, t, weight=w, reduction="none")
        mean = float(swl.cross_entropy(z, t, weight=w))
    assert abs(mean - math.fsum(each) / math.fsum(w[t])) <= 16 * np.spacing(mean)


# ------------------------------------------------------------------------------------------------ 16 bit


@pytest.mark.parametrize("C", [1, 10, 64, 65, 97, 1000, 9001])
@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16], ids=str)
def test_rows_of_16_bit_have_the_bits_of_float32_rows_rounded(
    dtype: Any, C: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels that read and write 16 bit compute what they do on a float32 copy; wherever rows lie, in place, with all options."""
    rng = np.random.default_rng(C)
    z = (rng.standard_normal((67, C)) * 6).astype(dtype)
    z[3], z[4, 0], z[5, -1], z[6, : C // 2], z[7, 0] = -np.inf, np.nan, np.inf, -np.inf, np.finfo(np.float16).tiny / 8
    ids, q = rng.integers(0, C, 67), rng.random((67, C), np.float32)
    ids[[1, 2, 40, 66]] = -100
    everything: dict[str, Any] = {"softcap": 20.0, "z_loss": 1e-3, "label_smoothing": 0.1, "temperature": 1.5}
    everything["weight"] = rng.random(C, np.float32)
    dout = np.exp(rng.uniform(-30, 12, 67))  # gradients below the smallest number and above the largest
    spread = np.zeros((67, 2 * C + 1), dtype)[:, 1::2]

    def found() -> list[Any]:
        arrays: list[Any] = []
        for t, options in itertools.product((ids, q.astype(dtype)), ({}, everything)):
            here = {"reduction": "none", "dout": dout, **options}
            for logits, out in ((z, None), (np.asfortranarray(z), None), (z, spread), (inside := z.copy(), inside)):
                loss, grad, stats = swl.cross_entropy_value_and_grad(logits, t, stats=True, out=out, **here)
                arrays += [loss, grad.copy(), *stats]
            arrays += swl.cross_entropy_value_and_grad(z, t, **here)
            arrays.append(swl.cross_entropy(z, t, **options))
        return arrays

    with swl.use_backend("numba"):
        monkeypatch.setattr(_backend, "STREAM", ((0, 0),))
        direct = found()
        monkeypatch.setattr(_backend, "READS_HALVES", False)
        staged = found()
    for got, want in zip(direct, staged, strict=True):
        assert got.dtype == want.dtype
        nan = np.isnan(want.astype(np.float64))
        np.testing.assert_array_equal(np.isnan(got.astype(np.float64)), nan)
        assert np.where(nan, want.dtype.type(0), got).tobytes() == np.where(nan, want.dtype.type(0), want).tobytes()


def test_16_bit_numbers_are_converted_a_register_at_a_time() -> None:
    """One instruction for each register of numbers; nothing is called, and no lane is taken out or put in."""
    from numba import from_dtype, njit

    @njit(error_model="numpy")
    def twice(x: Any, out: Any) -> None:
        one = np.float32(1)
        for j in range(0, x.size, simd.lanes(one)):
            z = simd.load(simd.whole(x), j, one)
            simd.store(simd.whole(out), j, z + z)

    expected = {np.uint16: ("vcvtph2ps", "vcvtps2ph"), np.int16: ("vpmovzxwd", "v?(?:packusdw|pmovdw)")}
    for dtype, names in expected.items():
        x = np.full(64, 0x3F00, dtype)
        twice(x, x)
        text = next(text for sig, text in twice.inspect_asm().items() if sig[0].dtype == from_dtype(np.dtype(dtype)))
        if "%ymm" not in text:  # of a processor that reads them otherwise, which tests/test_processors.py holds
            assert not (_backend.READS_HALVES and platform.machine() == "x86_64")
            continue
        body = text.split(".cfi_startproc")[1].split(".cfi_endproc")[0]  # without the wrapper for Python
        registers = 2 if "%zmm" in body else 4
        counts = [len(re.findall(rf"\s{name}\s", body)) for name in names]
        assert counts[0] > 0
        assert counts[0] % registers == 0
        assert counts[1] % (registers // 2) == 0
        assert not re.search(r"\s(call\w*|v?pextrw|v?pinsrw|vcvtph2ps\s.*%xmm\d+, %xmm)", body)
