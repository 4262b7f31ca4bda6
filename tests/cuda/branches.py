"""Calls that between them enter every branch of the kernels.

Each variant, dtype and kind of target; rows that start and end off a 16-byte boundary; every option; rows that are
ignored or invalid. On a device made small, so that the shapes can be small.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import fake
import fakecuda
import ml_dtypes
import numpy as np

from swl.backends import Rows
from swl.backends.protocol import Target

DTYPES = (np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


class Case(NamedTuple):
    """A sweep over logits (N, C) whose rows start `offset` elements after a boundary and are C + `gap` apart."""

    variant: str
    dtype: np.dtype[Any]
    N: int
    C: int
    offset: int = 0
    gap: int = 0
    dense: str = ""  # dtype of probabilities; "": class ids
    options: str = ""  # of "weight smoothing bias temperature softcap z_loss shard stats"
    out: str = "new"  # "new", "same": in place, "shifted": off the logits' boundary; or a shorter dtype, in place
    processors: int = 2
    shared: int = 4096
    clusters: bool = False

    def __str__(self) -> str:
        what = f"{self.dense or 'ids'} {self.options}".strip().replace(" ", "-")
        return f"{self.variant}-{self.dtype.name}-{self.N}x{self.C}-at{self.offset}+{self.gap}-{what}-{self.out}"


PLAIN = "weight z_loss"  # no instance for options is needed
ALL = "weight smoothing bias temperature softcap z_loss stats"


def cases(dtypes: tuple[np.dtype[Any], ...] = DTYPES) -> Iterator[Case]:
    """Every branch, once for each dtype."""
    for dtype in dtypes:
        V = 16 // dtype.itemsize
        q = "float32" if dtype.itemsize == 2 else dtype.name
        yield Case("part", dtype, 35, 10)
        yield Case("part", dtype, 6, 30, options=ALL)
        yield Case("part", dtype, 3, 32, gap=3, dense=q, options=ALL)
        yield Case("warp", dtype, 5, 40 * V, options=ALL, out="same")
        yield Case("warp", dtype, 6, 30 * V + 1, offset=1, dense="float16", options="stats")
        yield Case("block", dtype, 2, 200 * V + 3, offset=1, gap=1, options=ALL, out="shifted")
        yield Case("block", dtype, 1, 2060 * V, options="smoothing", out="same")
        yield Case("block", dtype, 1, 130 * V, offset=V - 1, dense="float64", options=ALL)
        yield Case("two sweeps", dtype, 1, 2100 * V + 1, dense="bfloat16", options="weight stats", shared=1200)
        yield Case("cluster", dtype, 2, 2200 * V + 1, offset=1, gap=1, options=ALL, shared=1500, clusters=True)
        yield Case("cluster", dtype, 3, 2200 * V, offset=1, options=PLAIN, shared=1500, out="same", clusters=True)
        yield Case("cluster", dtype, 1, 8350 * V + 3, options=PLAIN, shared=1500, out="same", clusters=True)
        yield Case("cluster", dtype, 1, 2200 * V, dense=q, options=ALL, shared=1500, out="shifted", clusters=True)
        yield Case("split", dtype, 1, 2060 * V + 1, offset=1, options=ALL, processors=3)
        yield Case("warp", dtype, 5, 100 * V + 1, offset=1, options=PLAIN, out="same")
        yield Case("block", dtype, 4, 2060 * V + 3, offset=1, gap=1, options=PLAIN)
        yield Case("block", dtype, 2, 200 * V + 3, gap=1, options=PLAIN, out="shifted")
        yield Case("two sweeps", dtype, 3, 2100 * V + 1, gap=V - 1, options=PLAIN, shared=1200, out="same")
        yield Case("split", dtype, 1, 2060 * V + 1, offset=1, options=PLAIN, processors=3)
        yield Case("split", dtype, 1, 2060 * V, dense=q, options=ALL, processors=3)
    for out in ("float16", "bfloat16") if np.float32 in dtypes else ():
        dtype = np.dtype(np.float32)
        for dense in ("", "float32"):
            yield Case("part", dtype, 35, 10, gap=1, dense=dense, options=ALL if dense else "", out=out)
            yield Case("warp", dtype, 6, 301, offset=1, dense=dense, options=ALL, out=out)
            yield Case("block", dtype, 2, 2060, dense=dense, options=ALL, out=out)
        yield Case("part", dtype, 6, 30, options=ALL, out=out)
        yield Case("warp", dtype, 6, 301, offset=1, options=PLAIN, out=out)
        yield Case("block", dtype, 3, 8243, offset=1, options=PLAIN, out=out)
        yield Case("block", dtype, 2, 8243, offset=3, gap=2, options="smoothing", out=out)
        yield Case("two sweeps", dtype, 2, 8401, offset=1, options=ALL, shared=1200, out=out)
        yield Case("cluster", dtype, 1, 33403, offset=1, options=PLAIN, shared=1500, out=out, clusters=True)
        yield Case("cluster", dtype, 2, 8801, options=ALL, shared=1500, out=out, clusters=True)
        yield Case("cluster", dtype, 1, 8800, dense="float32", options=ALL, shared=1500, out=out, clusters=True)
        yield Case("split", dtype, 1, 8240, processors=3, out=out)


def single_options() -> Iterator[Case]:
    """One option at a time, in rows long enough to go straight: some on a boundary, as the columns' bias, and some not."""
    for dtype in (np.dtype(np.float32), np.dtype(np.float16)):
        V = 16 // dtype.itemsize
        for options in ("smoothing", "weight smoothing", "bias", "temperature", "softcap", "stats"):
            yield Case("block", dtype, 4, 2064 * V, options=options)
            yield Case("two sweeps", dtype, 3, 2100 * V + 1, offset=1, options=options, shared=1200, out="same")


@contextmanager
def small_device(processors: int, shared: int, clusters: bool = False) -> Iterator[None]:
    """Make the fake devices small, and without clusters unless told; for backends made inside."""
    with fakecuda.settings(processors=processors, shared=shared, clusters=clusters):
        yield


class Result(NamedTuple):
    """What a case computes, on the host; `separate` is the gradient of the backward sweep alone."""

    rows: Rows
    grad: Any
    forward: Rows
    separate: Any


class Inputs(NamedTuple):
    """The numbers of a case, on the host."""

    logits: Any
    target: Target
    row_scale: Any


def inputs(case: Case) -> Inputs:
    """Draw the numbers of a case: some rows ignored, one invalid, one with a mask, one with a NaN."""
    rng = np.random.default_rng(case.N * 1000003 + case.C)
    N, C, dtype = case.N, case.C, case.dtype
    acc = np.float64 if dtype == np.float64 else np.float32
    chosen = case.options.split()
    logits = np.sort(rng.normal(size=(N, C)) * 3, axis=1)  # rising: the running maximum grows all along the row
    logits[::2] = logits[::2, ::-1]
    logits = logits.astype(dtype)
    logits[-1, 0] = -np.inf
    first_class = 3 if "shard" in chosen else 0
    ids = rng.integers(0, C, N)
    ids[0] = C - 1  # where a row's tail ends
    if N > 2:
        ids[1], ids[2] = -1, -2
        logits[1, C // 2] = np.nan
    weight = rng.uniform(0.5, 2, C).astype(acc) if "weight" in chosen else None
    eps = 0.1 if "smoothing" in chosen and not np.isinf(logits.astype(np.float64)).any() else 0.0
    if "smoothing" in chosen:
        logits[-1, 0] = 0
        eps = 0.1
    probs = None
    if case.dense:
        probs = rng.uniform(0, 2 / C, (N, C))
        probs[:, 0] = 0
        probs = probs.astype(ml_dtypes.bfloat16 if case.dense == "bfloat16" else case.dense)
    target = Target(
        ids=None if case.dense else ids + first_class * (ids >= 0),
        probs=probs,
        weight=weight,
        row_weight=None if weight is None or case.dense else np.where(ids >= 0, weight[ids], 0).astype(acc),
        hot=1 - eps,
        rest=eps / C,
        softcap=5.0 if "softcap" in chosen else 0.0,
        temperature=0.7 if "temperature" in chosen else 1.0,
        z_loss=0.01 if "z_loss" in chosen else 0.0,
        bias=rng.normal(size=C).astype(acc) if "bias" in chosen else None,
        first_class=first_class,
    )
    return Inputs(logits, target, rng.uniform(0.5, 2, N).astype(acc))


def run(case: Case, backend: Any, far: bool = False) -> Result:
    """Run a case on the fake devices: both sweeps at once, then forward and backward; `far`: from rows far apart."""
    given = inputs(case)
    asarray = backend.asarray
    at = (lambda x, *_: far_apart(x, x.dtype)) if far else placed
    moved = {f: asarray(v) for f, v in given.target._asdict().items() if isinstance(v, np.ndarray)}
    target = given.target._replace(**moved)
    stats = "stats" in case.options.split()
    if far and target.probs is not None:
        target = target._replace(probs=at(given.target.probs))
    place = lambda: at(given.logits, case.offset, case.gap)  # noqa: E731
    logits, scale = place(), at(given.row_scale[:, None])[:, 0] if far else asarray(given.row_scale)

    def empty(over: Any) -> Any:
        """Give where a gradient goes."""
        if case.out in ("new", "same", "shifted"):
            other = {"new": 0, "same": case.offset, "shifted": case.offset + 1}[case.out]
            return at(np.full_like(given.logits, np.nan), other, case.gap)
        return over.view(np.dtype(getattr(ml_dtypes, case.out, case.out)))[:, : case.C]

    forward = backend.cross_entropy_forward(logits, target, stats)
    again = place()
    separate = empty(again)
    backend.cross_entropy_backward(again, target, forward, scale, separate)
    out = logits if case.out == "same" else empty(logits)
    rows = backend.cross_entropy_forward_backward(logits, target, scale, out, stats)
    host = lambda r: Rows(*(None if x is None else x.get() for x in r))  # noqa: E731
    return Result(host(rows), out.get(), host(forward), separate.get())


def far_apart(x: Any, dtype: Any) -> Any:
    """Put a matrix on the device, its rows more than 2³¹ elements apart; nothing between is ever touched."""
    cupy = fake.cupy()
    rows, columns = x.shape
    distance = 2**31 + 8
    with cupy.cuda.using_allocator(cupy.cuda.MemoryPool().malloc):  # not filled with NaN, and given back at once
        store = cupy.empty((rows - 1) * distance + columns, dtype)
    view = cupy.lib.stride_tricks.as_strided(store, (rows, columns), (distance * store.itemsize, store.itemsize))
    view[...] = cupy.asarray(x.astype(dtype))
    return view


def placed(x: np.ndarray[Any, Any], offset: int, gap: int) -> Any:
    """Put a matrix on the device, `offset` elements after a boundary, with `gap` elements between the rows."""
    N, C = x.shape
    store = np.full(offset + N * (C + gap), np.nan).astype(x.dtype)
    store[offset:].reshape(N, C + gap)[:, :C] = x
    return fake.cupy().asarray(store)[offset:].reshape(N, C + gap)[:, :C]
