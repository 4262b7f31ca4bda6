"""What the kernels must do, as checks that raise: run by the tests on the kernels, and by mutants.py on broken ones.

The oracle is the NumPy specification in float64. Every check runs in both orders of fibers and blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import branches
import fakecuda
import numpy as np

from swl.backends import Rows
from swl.backends.cupy.backend import CupyBackend
from swl.backends.cupy.plans import Limits, plan
from swl.backends.numpy import NumpyBackend
from swl.backends.protocol import IGNORED, INVALID, Target

MakeBackend = Callable[[], CupyBackend]

# Largest error of a loss in units of its dtype's rounding, and of a gradient relative to the row's largest
LOSS = {"float64": 1e-12, "float32": 2e-5}
GRAD = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}


def both_orders(run: Callable[[], Any]) -> Any:
    """Run in both orders; the results must have the same bits."""
    results = []
    for reverse in (0, 1):
        with fakecuda.settings(reverse=reverse):
            results.append(run())
    for a, b in zip(*map(list, map(_arrays, results)), strict=True):
        assert a.tobytes() == b.tobytes(), "the two orders of fibers give different bits"
    return results[0]


def _arrays(result: Any) -> Iterator[Any]:
    if isinstance(result, np.ndarray | np.generic):
        yield np.asarray(result)
    elif isinstance(result, tuple | list):
        for one in result:
            yield from _arrays(one)


def close(name: str, got: Any, want: Any, tolerance: float) -> None:
    """Agree with the specification, NaN and infinities included; the tolerance is of the row's largest."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    finite = np.isfinite(want)
    assert np.array_equal(np.where(finite, 0, got), np.where(finite, 0, want), equal_nan=True), f"{name}: {got} {want}"
    got, want = np.where(finite, got, 0), np.where(finite, want, 0)
    scale = np.abs(want).max(axis=-1, keepdims=True, initial=1e-30) if want.ndim == 2 else np.maximum(np.abs(want), 1)
    error = np.abs(got - want) / scale
    assert np.all(error <= tolerance), f"{name}: off by {error.max()} > {tolerance}"


def specification(case: branches.Case) -> tuple[Rows, Any]:
    """Compute a case in float64."""
    given = branches.inputs(case)
    to64 = lambda x: x.astype(np.float64) if x is not None and x.dtype.kind not in "iu" else x  # noqa: E731
    target = Target(*(to64(v) if isinstance(v, np.ndarray) else v for v in given.target))
    numpy, logits = NumpyBackend(), to64(given.logits)
    rows = numpy.cross_entropy_forward(logits, target, True)
    grad = np.empty_like(logits)
    with np.errstate(all="ignore"):
        numpy.cross_entropy_backward(logits, target, rows, to64(given.row_scale), grad)
    if target.ids is not None:  # what a host refuses, a device marks
        invalid = target.ids == INVALID
        rows.loss[invalid] = rows.log_prob[invalid] = np.nan
        grad[invalid] = 0
    return rows, grad


def check_case(case: branches.Case, make: MakeBackend) -> None:
    """One of `branches.cases`: the variant, both sweeps together and apart, against the specification."""
    with branches.small_device(case.processors, case.shared, case.clusters):
        result = both_orders(lambda: branches.run(case, make()))
    how = plan(case.N, case.C, case.dtype.itemsize, Limits(case.processors, case.shared, case.clusters))
    variant = "two sweeps" if how.variant == "block" and not how.on_chip else how.variant
    assert variant == case.variant, f"the plan is {how}"
    for name, both, alone in zip(Rows._fields, result.rows, result.forward, strict=True):
        assert (both is None) == (alone is None), name
        assert both is None or both.tobytes() == alone.tobytes(), f"{name}: one sweep and two give different bits"
    assert result.grad.tobytes() == result.separate.tobytes(), "one sweep and two give different gradients"
    rows, grad = specification(case)
    acc = "float64" if case.dtype == np.float64 else "float32"
    for name, got, want in zip(Rows._fields, result.rows, rows, strict=True):
        if got is not None and name == "argmax":
            assert np.array_equal(got, want), f"argmax: {got} {want}"
        elif got is not None:
            close(name, got, want, LOSS[acc])
    close("gradient", result.grad, grad, GRAD[result.grad.dtype.name])
    ids = branches.inputs(case).target.ids
    if ids is not None:
        assert np.all(result.grad[ids < 0].astype(np.float64) == 0), "the gradient of a row that does not count"


def check_ids(make: MakeBackend) -> None:
    """Class ids of two integer dtypes: cleaned, weighed, counted; the first bad one is reported, once."""
    rng = np.random.default_rng(0)
    weight = rng.uniform(0.5, 2, 50)
    for dtype, N in ((np.int64, 1), (np.int32, 600), (np.int64, 600)):
        ids = rng.integers(0, 50, N).astype(dtype)
        ids[N // 3 :: 7] = -100
        for w in (None, weight, weight.astype(np.float32)):

            def run(ids: Any = ids, w: Any = w) -> Any:
                backend = make()
                given = backend.asarray(np.repeat(ids, 2))[::2]
                out = backend.prepare_ids(given, 50, -100, None if w is None else backend.asarray(w))
                backend.check()
                return [None if x is None else x.get() for x in out]

            with branches.small_device(1, 4096):
                clean, m, count = both_orders(run)
            want = np.where(ids == -100, IGNORED, ids.astype(np.int64))
            assert np.array_equal(clean, want)
            weights = np.where(want < 0, 0, 1 if w is None else w[want])
            assert (m is None) == (w is None)
            assert m is None or np.array_equal(m, weights)
            assert abs(float(count) - weights.sum(dtype=np.float64)) < 1e-9 * N

    def bad() -> Any:
        backend = make()
        ids = np.zeros(700, np.int32)
        ids[[130, 642]] = 50, -1  # of one thread
        clean, _, count = backend.prepare_ids(backend.asarray(ids), 50, -100, None)
        backend.prepare_ids(backend.asarray(ids[500:]), 50, -100, None)  # the first error stays
        try:
            backend.check()
        except ValueError as error:
            message = str(error)
        else:
            raise AssertionError("a bad id was not reported")
        backend.check()
        assert message == "target[130] is 50; legal are class ids in [0, 50) and ignore_index=-100", message
        return clean.get(), count.get()

    with branches.small_device(1, 4096):
        clean, count = both_orders(bad)
    assert np.array_equal(np.flatnonzero(clean == INVALID), [130, 642])
    assert count == 698


def check_affine(make: MakeBackend, dtypes: tuple[Any, ...] = branches.DTYPES) -> None:
    """The parts of an affine map that are kernels: bias and column sums, aligned or not, accumulated or not."""
    rng = np.random.default_rng(0)
    for dtype in dtypes:
        acc = np.float64 if dtype == np.float64 else np.float32
        V = 16 // dtype.itemsize
        for N, K, offset in ((3, 5, 0), (131, 32 * V, 0), (66, 33, 1)):
            x = rng.normal(size=(N, K)).astype(dtype)
            W = np.eye(K).astype(dtype)
            b = rng.normal(size=K).astype(dtype)
            before = rng.normal(size=K).astype(acc)

            def run(x: Any = x, W: Any = W, b: Any = b, before: Any = before, offset: int = offset) -> Any:
                backend = make()
                given = branches.placed(x, offset, offset)
                y = branches.placed(np.full_like(x, np.nan), offset, offset)
                backend.affine_forward(given, backend.asarray(W), backend.asarray(b), y)
                added = backend.asarray(before)
                backend.affine_backward(given, given, backend.asarray(W), None, None, added, accumulate=True)
                results = [y, added]
                for other in branches.DTYPES:
                    results.append(backend.empty(b.shape, other))
                    backend.affine_backward(given, given, backend.asarray(W), None, None, results[-1])
                return [r.get() for r in results]

            with branches.small_device(2, 4096):
                y, added, *sums = both_orders(run)
            x64 = x.astype(np.float64)
            close("y", y, x64 + b.astype(np.float64), GRAD[dtype.name])
            close("db added to", added, before + x64.sum(axis=0), 1e-12 if acc is np.float64 else 1e-5)
            for db in sums:
                close("db", db, x64.sum(axis=0), max(GRAD[db.dtype.name], 1e-12 if acc is np.float64 else 1e-5))


def check_offsets(make: MakeBackend) -> None:
    """Rows more than 2³¹ elements apart; the memory between is never touched."""
    view = branches.far_apart(np.arange(80).reshape(2, 40) / 10, np.float16)
    backend, ids, logits = make(), np.array([1, 2]), view.get()
    clean, _, _ = backend.prepare_ids(backend.asarray(ids), 40, -100, None)
    want_rows, want = (
        NumpyBackend().cross_entropy_forward(logits.astype(np.float64), Target(ids=ids), False),
        np.empty((2, 40)),
    )
    NumpyBackend().cross_entropy_backward(logits.astype(np.float64), Target(ids=ids), want_rows, np.ones(1), want)
    scale = backend.asarray(np.ones(1, np.float32))
    rows = backend.cross_entropy_forward_backward(view, Target(ids=clean), scale, view, False)
    close("loss", rows.loss.get(), want_rows.loss, LOSS["float32"])
    close("gradient", view.get(), want, GRAD["float16"])


def check_shard(make: MakeBackend) -> None:
    """A shard of the classes: an id outside it hits none of its columns, but its row counts."""
    z = np.random.default_rng(0).normal(size=(6, 9)).astype(np.float32)
    ids = np.array([2, 3, 11, 12, -1, 40])  # the columns are the classes 3 to 11
    target = Target(ids=ids, first_class=3, hot=0.9, rest=0.1 / 50)
    numpy = NumpyBackend()
    want_rows = numpy.cross_entropy_forward(z.astype(np.float64), target, True)
    want = np.empty(z.shape)
    numpy.cross_entropy_backward(z.astype(np.float64), target, want_rows, np.ones(1), want)

    def run() -> Any:
        backend = make()
        out = backend.asarray(np.zeros_like(z))
        moved = target._replace(ids=backend.asarray(ids))
        scale = backend.asarray(np.ones(1, np.float32))
        rows = backend.cross_entropy_forward_backward(backend.asarray(z), moved, scale, out, True)
        return [r.get() for r in rows], out.get()

    rows, grad = both_orders(run)
    for name, got, expected in zip(Rows._fields, rows, want_rows, strict=True):
        close(name, got, expected, LOSS["float32"])
    close("gradient", grad, want, GRAD["float32"])


def check_digits(make: MakeBackend) -> None:
    """Gradients that are small because numbers cancel in the formula have their digits nevertheless."""
    for softcap in (0.0, 1.0, 7.3, 30.0):
        z = np.linspace(0.01, 8, 500, dtype=np.float32)[:, None] * np.float32(softcap or 1)
        # one class: p = 1 = y, and ∂L/∂r = 2λ·M·∂z/∂r
        target = Target(ids=np.zeros(500, np.int64), hot=0.9, rest=0.1, softcap=softcap, z_loss=0.5)

        def run(z: Any = z, target: Any = target) -> Any:
            backend = make()
            out, scale = backend.empty(z.shape, z.dtype), backend.asarray(np.ones(1, np.float32))
            moved = target._replace(ids=backend.asarray(target.ids))
            rows = backend.cross_entropy_forward_backward(backend.asarray(z), moved, scale, out, False)
            return rows.row_max.get(), out.get()[:, 0]

        M, grad = both_orders(run)
        e = np.exp(-2 * z[:, 0].astype(np.float64) / softcap) if softcap else np.ones(500)
        want = M * (4 * e / (1 + e) ** 2)
        units = np.abs(grad - want) / np.spacing(want.astype(np.float32))
        assert np.all(units <= 4), f"softcap {softcap}: {units.max()} units in the last place"
