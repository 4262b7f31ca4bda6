"""What holds for every kernel, or every argument of a kind: offsets, strides, edges, rounding, limits, order, ids."""

from __future__ import annotations

import itertools
import re
from typing import Any

import branches
import fake
import fakecuda
import ml_dtypes
import numpy as np
import pytest
from test_devices import CALLS, Numbers, agree

import swl
from swl.backends.cupy.backend import CupyBackend
from swl.backends.cupy.compilation import source
from swl.backends.numpy import NumpyBackend
from swl.backends.protocol import IGNORED, INVALID, Target

pytestmark = pytest.mark.usefixtures("on_fake")

HALF, BFLOAT, F32 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)


def make() -> CupyBackend:
    return CupyBackend(fake.cupy())


# ------------------------------------------------------------------------------------------------ offsets and strides


FAR = (
    branches.Case("part", HALF, 3, 32),
    branches.Case("part", HALF, 3, 32, dense="float16"),
    branches.Case("warp", HALF, 3, 320, dense="float16"),
    branches.Case("block", HALF, 2, 3200),
    branches.Case("block", HALF, 2, 3200, dense="float16"),
    branches.Case("two sweeps", HALF, 2, 24000, shared=1200),
    branches.Case("cluster", HALF, 2, 24000, shared=1500, clusters=True),
    branches.Case("split", HALF, 1, 24000, processors=3),
    branches.Case("split", HALF, 2, 24000, dense="float16", processors=6),
)


@pytest.mark.parametrize("case", FAR, ids=str)
def test_rows_of_every_matrix_may_be_far_apart(case: branches.Case) -> None:
    """Logits, probabilities, gradients and row factors more than 2³¹ elements apart, in every variant."""
    with branches.small_device(case.processors, case.shared, case.clusters):
        near, far = branches.run(case, make()), branches.run(case, make(), far=True)
    for a, b in zip([*near.rows, near.grad, near.separate], [*far.rows, far.grad, far.separate], strict=True):
        assert (a is None) == (b is None)
        assert a is None or a.tobytes() == b.tobytes()


def test_columns_of_probabilities_may_be_far_apart() -> None:
    for C in (3, 40):
        rng = np.random.default_rng(0)
        z, q = rng.normal(size=(4, C)).astype(np.float32), rng.uniform(size=(4, C)).astype(np.float16)
        near, far = fake.cupy().asarray(q), branches.far_apart(q.T, np.float16).T
        results = [swl.cross_entropy(fake.cupy().asarray(z), t, reduction="none").get() for t in (near, far)]
        assert results[0].tobytes() == results[1].tobytes()


def test_vectors_and_affine_maps_may_be_far_apart(on_fake: CupyBackend) -> None:
    asarray, rng = on_fake.asarray, np.random.default_rng(0)
    column = lambda x, dtype: branches.far_apart(np.asarray(x)[:, None], dtype)[:, 0]  # noqa: E731
    ids = np.array([3, 700, -100], np.int32)
    for given in (asarray(ids), column(ids, np.int32)):
        clean, _, _ = make().prepare_ids(given, 5, -100, None)
        assert clean.get().tolist() == [3, INVALID, IGNORED]
    for given in (asarray(ids), column(ids, np.int32)):
        on_fake.prepare_ids(given, 5, -100, None)
        with pytest.raises(ValueError, match=r"target\[1\] is 700"):
            on_fake.check()
    for K in (40, 41):
        x, b = rng.normal(size=(3, K)).astype(np.float16), asarray(rng.normal(size=K).astype(np.float32))
        near, far, W = asarray(x), branches.far_apart(x, np.float16), asarray(np.eye(K).astype(np.float16))
        ys = [asarray(np.zeros_like(x)), branches.far_apart(np.zeros_like(x), np.float16)]
        dbs = [asarray(np.ones(K, np.float32)), column(np.ones(K), np.float32)]
        for rows, y, db in zip((near, far), ys, dbs, strict=True):
            on_fake._fill_rows(y, b)
            on_fake.affine_backward(rows, rows, W, None, None, db, accumulate=True)
        assert ys[0].get().tobytes() == ys[1].get().tobytes()
        assert dbs[0].get().tobytes() == dbs[1].get().tobytes()


def test_these_are_all_the_distances_that_kernels_take() -> None:
    """A new one is to be added above."""
    text = "".join(map(source, ("cross_entropy", "class_ids", "affine")))
    taken = set(re.findall(r"\b(\w*stride|probs_\w+)\b(?=[,;)])", " ".join(re.findall(r"i64 [\w, ]+[,;)]", text))))
    assert taken == {"stride", "scale_stride", "grad_stride", "ids_stride", "probs_row", "probs_column"}


def spread(x: Any) -> Any:
    """Put an array where its elements have neighbours that are none of it."""
    x = np.asarray(x)
    store = np.full([2 * n for n in x.shape], np.nan if x.dtype.kind == "f" else 99).astype(x.dtype)
    store[(slice(None, None, 2),) * x.ndim] = x
    return fake.cupy().asarray(store)[(slice(None, None, 2),) * x.ndim]


def backwards(x: Any) -> Any:
    x = np.asarray(x)
    turned = (slice(None, None, -1),) * x.ndim
    return fake.cupy().asarray(x[turned].copy())[turned]


def by_columns(x: Any) -> Any:
    return fake.cupy().asarray(np.asarray(x).T.copy()).T


@pytest.mark.parametrize("layout", [spread, backwards, by_columns])
@pytest.mark.parametrize("name", CALLS)
def test_every_operand_may_have_any_strides(name: str, layout: Any) -> None:
    got = CALLS[name](Numbers(layout))
    with swl.use_backend("numpy"):
        agree(got, CALLS[name](Numbers(np.asarray)))


# ------------------------------------------------------------------------------------------------ edges


def edges(dtype: Any, C: int) -> Any:
    """Rows of logits at the ends of what there is."""
    top = float(ml_dtypes.finfo(dtype).max)
    rows = np.random.default_rng(0).normal(size=(9, C))
    rows[1] = -np.inf
    rows[2, C // 2] = np.inf
    rows[3, C - 1] = np.nan
    rows[4, ::2], rows[4, 1::2] = top, -top
    rows[5] = top
    rows[6] = -top
    rows[7], rows[7, C // 3] = -np.inf, 1.0
    rows[8, : C // 2] = -np.inf
    return rows.astype(dtype)


@pytest.mark.parametrize("dtype", branches.DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["part", "warp", "block", "two sweeps", "cluster", "split"])
@pytest.mark.parametrize("dense", [False, True])
def test_every_statistic_at_the_edges(dtype: Any, variant: str, dense: bool) -> None:
    C = {"part": 20, "warp": 100}.get(variant, 2100 * 16 // dtype.itemsize)
    z, acc = edges(dtype, C), np.float64 if dtype == np.float64 else np.float32
    z = z[4:5] if variant == "split" else z
    N = len(z)
    q = np.random.default_rng(1).dirichlet(np.ones(C), N).astype(acc)
    ids = np.arange(N, dtype=np.int64)
    with np.errstate(all="ignore"):
        target = Target(probs=q) if dense else Target(ids=ids)
        want = NumpyBackend().cross_entropy_forward(z.astype(acc), target, True)
    shared = 1200 if variant in ("two sweeps", "cluster") else 65536
    with branches.small_device(3 if variant == "split" else 1, shared, variant == "cluster"):
        backend = make()
        target = Target(probs=backend.asarray(q)) if dense else Target(ids=backend.asarray(ids))
        out, scale = backend.empty(z.shape, z.dtype), backend.asarray(np.ones(1, acc))
        rows = backend.cross_entropy_forward_backward(backend.asarray(z), target, scale, out, True)
    for name, got, expected in zip(want._fields, rows, want, strict=True):
        tolerance = 1e-10 if acc is np.float64 else 1e-4
        known = want.row_max > -np.inf if name == "target_dot" else slice(None)  # −inf − (−inf), of no use to anyone
        np.testing.assert_allclose(got.get()[known], expected[known], rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=str)
def test_every_16_bit_result_is_rounded_at_the_top_as_below(dtype: Any, on_fake: CupyBackend) -> None:
    """Half of the last step beyond the largest number is infinity; below that, the largest number."""
    top = float(ml_dtypes.finfo(dtype).max)
    step = top - float(np.nextafter(np.array(top, dtype), np.array(0, dtype)))
    values = np.array([top + step * 0.49, top + step * 0.5, top * 1.001, -top - step * 0.49, -top - step * 0.5, 7.0])
    want = np.array([top, np.inf, top if top * 1.001 < top + step / 2 else np.inf, -top, -np.inf, 7.0])
    xp = fake.cupy()

    def agrees(got: Any, places: Any = slice(None)) -> None:
        np.testing.assert_array_equal(got.get().astype(np.float64), want[places])

    for bias in (np.float32, np.float64):
        y = xp.zeros((2, 6), dtype)
        on_fake._fill_rows(y, xp.asarray(values.astype(bias)))
        agrees(y[1])
    for x in (np.float32, np.float64):
        db = xp.zeros(6, dtype)
        on_fake._column_sums(xp.asarray(values.astype(x)[None]), db, False)
        agrees(db)
    # ∂L/∂r = scale·(p − y), which is the scale where p = 1 and y = 0
    for C, logits in itertools.product((2, 300, 3000), {dtype, F32}):
        z = np.full((6, C), -np.inf, logits)
        z[:, 1] = 0
        with branches.small_device(1, 65536 if C < 3000 or logits == dtype else 1200):
            backend = make()
            out = xp.zeros((6, C), dtype)
            target = Target(ids=xp.zeros(6, np.int64))
            backend.cross_entropy_forward_backward(
                xp.asarray(z), target, xp.asarray(values.astype(np.float32)), out, False
            )
        agrees(out[:, 1])


# ------------------------------------------------------------------------------------------------ limits


@pytest.mark.parametrize("dtype", branches.DTYPES, ids=str)
@pytest.mark.parametrize("dense", [False, True])
def test_every_launch_is_legal_for_any_number_of_rows_and_classes(cupy: Any, dtype: Any, dense: bool) -> None:
    store = cupy.zeros(64, np.uint8)
    kind = np.float64 if dtype == np.float64 else np.float32
    backend = make()

    def huge(shape: tuple[int, ...], dtype: Any) -> Any:
        return cupy.ndarray(shape, dtype, store.data)

    with fakecuda.settings(dry=1), cupy.cuda.using_allocator(cupy.cuda.MemoryPool().malloc):
        for N, C in itertools.product((1, 5, 70_000, 20_000_000), (1, 32, 500, 5000, 70_000, 2**31 + 5)):
            if N * C > 2**42:
                continue
            z, out, scale = huge((N, C), dtype), huge((N, C), dtype), huge((N,), kind)
            ids, _, _ = backend.prepare_ids(huge((N,), np.int64), C, -100, huge((C,), kind))
            target = Target(probs=huge((N, C), dtype)) if dense else Target(ids=ids)
            rows = backend.cross_entropy_forward_backward(z, target, scale, out, True)
            backend.cross_entropy_backward(z, target, rows, scale, out)
            if C < 10**6:
                x, W = huge((N, 3), dtype), huge((3, C), dtype)
                backend.affine_forward(x, W, huge((C,), dtype), out)
                backend.affine_backward(out, x, W, None, None, huge((C,), dtype), True)


# ------------------------------------------------------------------------------------------------ the record of errors


def streams(cupy: Any) -> Any:
    return (cupy.cuda.Stream(non_blocking=True) for _ in range(2))


def test_the_record_is_there_before_any_stream_uses_it(cupy: Any) -> None:
    backend, (one, two) = make(), streams(cupy)
    bad = cupy.full(3, 9)
    cupy.cuda.Device().synchronize()
    with one:
        backend._device(bad)
    with two:
        backend.prepare_ids(bad, 5, -100, None)
        two.synchronize()
    with pytest.raises(ValueError, match=r"target\[0\] is 9"):
        backend.check()


def test_a_check_waits_for_every_stream_and_leaves_an_empty_record_to_all(cupy: Any) -> None:
    backend, (one, two) = make(), streams(cupy)
    bad = cupy.full(3, 9)
    cupy.cuda.Device().synchronize()
    for stream in (one, two, one):
        with stream:
            backend.prepare_ids(bad, 5, -100, None)
        with pytest.raises(ValueError, match=r"target\[0\] is 9"):
            backend.check()
        with two:
            backend.prepare_ids(bad, 5, -100, None)
            two.synchronize()
        with pytest.raises(ValueError, match=r"target\[0\] is 9"):
            backend.check()
        backend.check()


# ------------------------------------------------------------------------------------------------ class ids

INTEGERS = [np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_ids_at_the_ends_of_every_integer_type_are_what_they_are(dtype: Any, on_fake: CupyBackend) -> None:
    C, info = 5, np.iinfo(dtype)
    near = {info.min, info.min + 1, info.max - 1, info.max, 0, C - 1, C, -1, -2, -100}
    near |= {n + 2**bits for bits in (8, 16, 32, 63, 64) for n in (-100, -1, 0, 3, C)}
    values = sorted(n for n in near if info.min <= n <= info.max)
    for ignored in (-100, -1, -2, 3, -(2**63), -(2**63) + 5, 2**63 - 1):
        for value in values:
            clean, _, count = on_fake.prepare_ids(on_fake.asarray(np.array([value], dtype)), C, ignored, None)
            same = value == ignored or (
                ignored == 2**63 - 1 and value > ignored
            )  # one too large is out of range anyway
            want = IGNORED if value == ignored else value if 0 <= value < C else INVALID
            if not same or value == ignored:
                assert (clean.get()[0], float(count)) == (want, want >= 0), (value, ignored)
    with pytest.raises(ValueError, match="legal are class ids"):
        on_fake.check()
