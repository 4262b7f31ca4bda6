"""The CPU backend: compiled kernels over row ranges, on a pool of ordinary threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from swl.backends import Backend, Rows
from swl.backends.host.memory import MEMORY
from swl.backends.host.threads import POOL
from swl.backends.numba import gemm as _gemm
from swl.backends.numba import kernels
from swl.backends.numba.halves import BITS, bits_of, read_only, round_into, widened_rows
from swl.backends.numba.products import product
from swl.backends.numba.scratch import scratch
from swl.backends.numba.simd import reads_halves
from swl.backends.numpy import NumpyBackend, raise_bad_id
from swl.backends.protocol import Target
from swl.errors import BackendUnavailable


def load() -> Backend:
    """Return the backend.

    Raises
    ------
    BackendUnavailable
        If Numba is told not to compile: the kernels are more than Python.
    """
    if vars(numba.config)["DISABLE_JIT"]:
        raise BackendUnavailable(
            "backend 'numba' compiles, and NUMBA_DISABLE_JIT=1 forbids it; unset it, or SWL_BACKEND=numpy"
        )
    return NumbaBackend()


GRAIN = 1 << 17
"""Logits of a range at least: as long as handing work to another thread takes (docs/performance.md)."""

STREAM = ((24 << 20, 1000), (12 << 20, 4000))
"""Bytes of a gradient, and classes of a row, from which both it is written past the caches, unless over the logits."""

STAGED = 1 << 17
"""Numbers that are brought to the kernels' form at a time."""

_BEYOND = 1 << 63
"""The first number that is too large for int64, in which the kernels look at class ids."""

_F32, _F64, _I64 = np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.int64)
_NONE = {dtype: np.empty(0, dtype) for dtype in (_F32, _F64)}
_NO_IDS = np.empty(0, np.int64)
_NO_OUT = {dtype: np.empty((0, 0), dtype) for dtype in (_F32, _F64, *BITS.values())}
READS_HALVES = reads_halves()
"""Whether rows of 16-bit numbers go to the kernels as they are; else they are copied to float32 some at a time."""


def _threads() -> str:
    """Say how many there are, and why."""
    try:
        return "{} ({})".format(*POOL.granted)
    except ValueError as error:
        return str(error)


def _vector(x: Any | None, dtype: Any) -> Any:
    """Give a vector as the kernels take it: contiguous, and writeable, of which they make no use."""
    return _NONE[dtype] if x is None else x if x.flags.carray else MEMORY.allocate(x.copy)


def _fits(x: Any, acc: Any) -> bool:
    """Tell whether the kernels take an array as it is."""
    return x is None or bool(x.dtype == acc and x.flags.c_contiguous and x.flags.aligned)


_NO_PROBS = {dtype: read_only(np.empty((1, 0), dtype)) for dtype in (_F32, _F64)}


def _staged(x: Any, dtype: Any) -> Any:
    """Copy some rows to the form that the kernels take."""
    bits = bits_of(x.dtype) if dtype == _F32 else None
    return MEMORY.allocate(np.array, x, dtype, order="C") if bits is None else widened_rows(x, bits)


class NumbaBackend(NumpyBackend):
    """See `swl.backends.Backend` for what each operation means."""

    name = "numba"

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return MEMORY.empty(shape, dtype)

    def rounded(self, a: Any, dtype: Any) -> Any:
        if a.dtype == dtype or a.dtype != _F32 or a.ndim != 2:
            return super().rounded(a, dtype)
        if a.strides[0] < a.strides[1]:
            return self.rounded(a.T, dtype).T
        a, out = MEMORY.allocate(np.ascontiguousarray, a), self.empty(a.shape, dtype)
        POOL.run(lambda begin, end: round_into(a[begin:end], out[begin:end]), len(a), -(-GRAIN // max(a.shape[1], 1)))
        return out

    def affine_forward(self, x: Any, W: Any, b: Any | None, out: Any) -> None:
        product(x, W, out, b)

    def affine_backward(
        self, dout: Any, x: Any, W: Any, dx: Any | None, dW: Any | None, db: Any | None, accumulate: int = 0
    ) -> None:
        if dx is not None:
            share = self.empty(dx.shape, dx.dtype) if accumulate else dx
            product(dout, W.T, share)
            if accumulate:
                dx += share
        if dW is not None:
            product(x.T, dout, dW, add=accumulate and max(1, accumulate // 2))
        if db is not None:
            if accumulate or not db.dtype == dout.dtype in _NONE:
                super().affine_backward(dout, x, W, None, None, db, accumulate)
            else:
                np.add.reduce(dout, axis=0, out=db)

    def prepare_ids(self, ids: Any, n_classes: int, ignore_index: int, weight: Any | None) -> tuple[Any, Any, Any]:
        if not -_BEYOND <= ignore_index < _BEYOND or (ids.dtype == np.uint64 and (ids >= _BEYOND).any()):
            return super().prepare_ids(ids, n_classes, ignore_index, weight)
        clean = MEMORY.allocate(np.empty, ids.size, np.int64)
        m = MEMORY.allocate(np.empty, 0 if weight is None else ids.size, _F32 if weight is None else weight.dtype)
        w = _vector(weight, m.dtype)
        if not (ids.dtype.isnative and ids.flags.aligned and ids.flags.c_contiguous):
            ids = MEMORY.allocate(np.array, ids, ids.dtype.newbyteorder("="), order="C")
        bad, total = kernels.prepare_ids(read_only(ids), n_classes, ignore_index, w, clean, m)
        if bad >= 0:
            raise_bad_id(ids, bad, n_classes, ignore_index)
        return clean, None if weight is None else m, total

    def _sweep(self, logits: Any, target: Target, rows: Any, argmax: Any, row_scale: Any, out: Any, flags: int) -> None:
        N, C = logits.shape
        acc = rows.dtype
        large = out is not None and any(size <= out.nbytes and classes <= C for size, classes in STREAM)
        if large and not np.may_share_memory(out, logits):
            flags |= kernels.STREAM
        ids = _NO_IDS if target.ids is None else target.ids
        options = (
            _vector(target.weight, acc),
            _vector(target.row_weight, acc),
            _vector(target.bias, acc),
            _vector(row_scale, acc),
            rows,
            argmax,
            read_only(np.array([getattr(target, name) for name in kernels.NUMBERS])),
            target.first_class,
            flags,
        )
        form = acc  # of the logits and their gradient
        if READS_HALVES and (bits := bits_of(logits.dtype)) and (out is None or out.dtype == logits.dtype):
            form = bits
            logits, out = logits.view(form), None if out is None else out.view(form)
        as_it_is = _fits(logits, form), _fits(target.probs, acc), _fits(out, form)
        room = kernels.sweep_room(C, acc.itemsize)

        def work(begin: int, end: int) -> None:
            # what is not as the kernels take it is brought to that form some rows at a time, in memory that stays in L2
            step = max(1, end - begin) if all(as_it_is) else max(1, STAGED // max(C, 1))
            for a in range(begin, end, step):
                b = min(a + step, end)
                z = logits[a:b] if as_it_is[0] else _staged(logits[a:b], form)
                q = _NO_PROBS[acc]
                if target.probs is not None:
                    q = read_only(target.probs[a:b] if as_it_is[1] else _staged(target.probs[a:b], acc))
                if out is None:
                    g = _NO_OUT[form]
                elif as_it_is[2]:
                    g = out[a:b]
                else:
                    g = MEMORY.allocate(np.empty, z.shape, form) if as_it_is[0] else z
                kernels.sweep(read_only(z), g, a, ids, q, *options, scratch(room, acc))
                if not as_it_is[2]:
                    round_into(g, out[a:b])

        POOL.run(work, N, -(-GRAIN // C))

    def cross_entropy_forward(self, logits: Any, target: Target, stats: bool) -> Rows:
        return self._run(logits, target, None, None, stats, kernels.FORWARD)

    def cross_entropy_forward_backward(
        self, logits: Any, target: Target, row_scale: Any, out: Any, stats: bool
    ) -> Rows:
        return self._run(logits, target, row_scale, out, stats, kernels.FORWARD | kernels.BACKWARD)

    def _run(self, logits: Any, target: Target, row_scale: Any, out: Any, stats: bool, flags: int) -> Rows:
        N = logits.shape[0]
        acc = np.float64 if logits.dtype == np.float64 else np.float32
        if not stats:
            rows = MEMORY.allocate(np.empty, (5, N), acc)
            self._sweep(logits, target, rows, _NO_IDS, row_scale, out, flags)
            return Rows(rows[0], rows[1], rows[2], rows[3], rows[4])
        rows, argmax = (MEMORY.allocate(np.empty, *what) for what in (((7, N), acc), (N, np.int64)))
        self._sweep(logits, target, rows, argmax, row_scale, out, flags | kernels.STATS)
        return Rows(rows[0], rows[1], rows[2], rows[3], rows[4], rows[5], rows[6], argmax)

    def cross_entropy_backward(self, logits: Any, target: Target, rows: Rows, row_scale: Any, out: Any) -> None:
        packed = np.stack((rows.row_max, rows.row_max, rows.log_sum, rows.log_sum, rows.mass))
        self._sweep(logits, target, packed, _NO_IDS, row_scale, out, kernels.BACKWARD)

    def plain_loss(self, logits: Any, target: Any, ignore_index: int, out: Any | None) -> tuple[Any, float] | None:
        acc = logits.dtype
        if acc not in _NONE or logits.ndim != 2:
            return None
        N, C = shape = logits.shape
        if not (N * C and logits.flags.carray and -_BEYOND <= ignore_index < _BEYOND):
            return None
        if out is None:
            gradient = _NO_OUT[acc]
        elif out.dtype == acc and out.shape == shape and out.flags.carray:
            gradient = out
        else:
            return None
        room = scratch(kernels.plain_room(N, C, acc.itemsize), acc)
        if target.ndim == 1:
            if target.size != N or target.dtype != _I64 or not target.flags.carray:  # it would be compiled once more
                return None
            total, count = kernels.plain_loss(logits, target, ignore_index, gradient, room)
        else:
            if target.shape != shape or C == 1 or target.dtype.kind not in "fiub":
                return None
            if out is not None and np.may_share_memory(out, target):
                return None
            total, count = kernels.plain_loss_of_rows(logits, np.ascontiguousarray(target, acc), gradient, room)
        return None if count < 0 else (total, count)

    def by_rows(self, work: Callable[[int, int], object], n_rows: int, row_size: int) -> None:
        in_cache = super().by_rows

        def some(begin: int, end: int) -> None:
            in_cache(lambda a, b: work(begin + a, begin + b), end - begin, row_size)

        POOL.run(some, n_rows, -(-GRAIN // max(row_size, 1)))

    def total(self, x: Any) -> Any:
        return kernels.total(_vector(x, x.dtype))

    def info(self) -> dict[str, str]:
        large = "compiled" if _gemm.USABLE else "by BLAS, for want of AVX-512"
        return {"numba": numba.__version__, "threads": _threads(), "large products": large}
