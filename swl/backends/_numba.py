"""The CPU backend: compiled kernels over row ranges, on a pool of ordinary threads."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from swl.backends import Backend, Rows
from swl.backends import _cpu_kernels as kernels
from swl.backends._blas import product
from swl.backends._memory import MEMORY
from swl.backends._numpy import NumpyBackend, raise_bad_id
from swl.backends._threads import POOL
from swl.targets import Target


def load() -> Backend:
    """Give the backend; Numba is a dependency of the package, so it is always there."""
    return NumbaBackend()


SERIAL = 100_000
"""Logits up to which one thread does it all (docs/performance.md)."""

_EMPTY = {dtype: np.empty(0, dtype) for dtype in (np.dtype(np.float32), np.dtype(np.float64))}
_NO_IDS = np.empty(0, np.int64)
_NO_PROBS = np.empty((1, 0), np.float32)
_BITS = {"float16": np.uint16, "bfloat16": np.int16}


def _memory(x: Any) -> Any:
    """Give an array as the kernels read it: aligned, native, and 16-bit floats as their bits (`swl.backends._simd`)."""
    bits = _BITS.get(x.dtype.name)
    if bits is not None and x.dtype.isnative:
        x = x.view(bits)
    if not (x.flags.aligned and x.dtype.isnative):
        x = np.array(x, x.dtype.newbyteorder("="))
    return x


class NumbaBackend(NumpyBackend):
    """See `swl.backends.Backend` for what each operation means."""

    name = "numba"

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return MEMORY.empty(shape, dtype)

    def affine_forward(self, x: Any, W: Any, b: Any | None, out: Any) -> None:
        product(x, W, out, b)

    def affine_backward(
        self, dout: Any, x: Any, W: Any, dx: Any | None, dW: Any | None, db: Any | None, accumulate: bool = False
    ) -> None:
        if dx is not None:
            product(dout, W.T, dx)
        if dW is not None:
            product(x.T, dout, dW, add=accumulate)
        if db is not None:
            super().affine_backward(dout, x, W, None, None, db, accumulate)

    def prepare_ids(self, ids: Any, n_classes: int, ignore_index: int, weight: Any | None) -> tuple[Any, Any, Any]:
        clean = np.empty(ids.size, np.int64)
        m = _EMPTY[np.dtype(np.float32)] if weight is None else np.empty(ids.size, weight.dtype)
        if ids.dtype == np.uint64:
            ids = np.minimum(ids, np.uint64(2**63 - 1))
        w = _EMPTY[m.dtype] if weight is None else weight
        bad, total = kernels.prepare_ids(_memory(ids), n_classes, ignore_index, w, clean, m)
        if bad >= 0:
            raise_bad_id(ids, bad, n_classes, ignore_index)
        return clean, None if weight is None else m, total

    def _sweep(self, logits: Any, target: Target, rows: Any, argmax: Any, row_scale: Any, out: Any, flags: int) -> None:
        N, C = logits.shape
        none = _EMPTY[rows.dtype]
        memory = _memory(logits)
        args = (
            _NO_IDS if target.ids is None else target.ids,
            _NO_PROBS if target.probs is None else _memory(target.probs),
            none if target.weight is None else target.weight,
            none if target.row_weight is None else target.row_weight,
            none if target.bias is None else target.bias,
            none if row_scale is None else row_scale,
            rows,
            argmax,
            target.hot,
            target.rest,
            target.softcap,
            target.z_loss,
            target.first_class,
            flags,
        )
        grad = np.empty((1, 0), memory.dtype) if out is None else _memory(out)
        if N * C <= SERIAL:
            kernels.sweep(memory, grad, 0, N, *args)
        else:
            POOL.run(lambda a, b: kernels.sweep(memory, grad, a, b, *args), N)

    def cross_entropy_forward(self, logits: Any, target: Target, stats: bool) -> Rows:
        return self._forward(logits, target, None, None, stats, kernels.FORWARD)

    def cross_entropy_forward_backward(
        self, logits: Any, target: Target, row_scale: Any, out: Any, stats: bool
    ) -> Rows:
        return self._forward(logits, target, row_scale, out, stats, kernels.FORWARD | kernels.BACKWARD)

    def _forward(self, logits: Any, target: Target, row_scale: Any, out: Any, stats: bool, flags: int) -> Rows:
        N = logits.shape[0]
        acc = np.float64 if logits.dtype == np.float64 else np.float32
        if not stats:
            rows = np.empty((5, N), acc)
            self._sweep(logits, target, rows, _NO_IDS, row_scale, out, flags)
            return Rows(*rows)
        rows, argmax = np.empty((7, N), acc), np.empty(N, np.int64)
        self._sweep(logits, target, rows, argmax, row_scale, out, flags | kernels.STATS)
        return Rows(*rows, argmax)

    def cross_entropy_backward(self, logits: Any, target: Target, rows: Rows, row_scale: Any, out: Any) -> None:
        packed = np.stack((rows.row_max, rows.row_max, rows.log_sum, rows.log_sum, rows.mass))
        self._sweep(logits, target, packed, _NO_IDS, row_scale, out, kernels.BACKWARD)

    def info(self) -> dict[str, str]:
        return {"numba": numba.__version__, "threads": str(POOL.threads)}
