"""Affine maps: cuBLAS, through CuPy, and the kernels of ``kernels/affine.cu``."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from swl.backends.cupy.compilation import C_NAME
from swl.backends.cupy.launching import Launcher, i32, i64, row_stride, rows_are_dense
from swl.backends.cupy.plans import power_of_two
from swl.backends.cupy.products import captured_gemm
from swl.backends.protocol import TF32

__all__ = ["AffineMaps"]

# of cuBLAS: library_types.h and cublas_api.h
_CUDA_R = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}
_COMPUTE_32F, _COMPUTE_64F, _COMPUTE_32F_FAST_TF32 = 68, 70, 77
_DISALLOW_REDUCED_PRECISION_REDUCTION = 16
_CUPY_TF32 = 7  # COMPUTE_TYPE_TF32 of CuPy's get_compute_type, which reads CUPY_TF32
_OP_N, _OP_T = 0, 1
_GEMM_DEFAULT = -1
# alpha and beta are read on the host, when gemmEx is called
_SCALARS = {name: np.array([0, 1], name) for name in ("float32", "float64")}


class AffineMaps(Launcher):
    """The operations of an affine map."""

    def affine_forward(self, x: Any, W: Any, b: Any | None, out: Any) -> None:
        if not out.size:
            return
        if not rows_are_dense(out):
            dense = self.empty(out.shape, out.dtype)
            self.affine_forward(x, W, b, dense)
            out[...] = dense
            return
        if b is not None:
            self._fill_rows(out, b)
        self._gemm(x, W, out, add=b is not None)

    def affine_backward(
        self, dout: Any, x: Any, W: Any, dx: Any | None, dW: Any | None, db: Any | None, accumulate: int = 0
    ) -> None:
        dout = _for_gemm(self.xp, dout)[0]
        if dx is not None:
            self._gemm(dout, W.T, dx, add=accumulate > 0)
        if dW is not None:
            self._gemm(x.T, dout, dW, add=accumulate > 0)
        if db is not None:
            self._column_sums(dout, db, accumulate > 0)

    def _gemm(self, a: Any, b: Any, out: Any, add: bool) -> None:
        """``out = a @ b`` or ``out += a @ b``, in float32 at least, rounded once to the dtype of `out`."""
        xp = self.xp
        if not out.size:
            return
        dtype = a.dtype
        if a.dtype != b.dtype:
            dtype = np.dtype(np.float64 if np.float64 in (a.dtype, b.dtype) else np.float32)
            a, b = a.astype(dtype, copy=False), b.astype(dtype, copy=False)
        if not a.shape[1]:
            if not add:
                out.fill(0)
            return
        acc = np.dtype(np.float64 if dtype == np.float64 else np.float32)
        _, op_out, ld_out = _layout(out)
        if out.dtype not in (dtype, acc) or op_out is None:
            wider = xp.empty(out.shape, dtype=acc)
            self._gemm(a, b, wider, add=False)
            if add:
                wider += out
            out[...] = wider
            return
        if op_out == _OP_T:  # columns are dense: outᵀ = bᵀ·aᵀ has dense rows
            self._gemm(b.T, a.T, out.T, add)
            return
        a, op_a, ld_a = _for_gemm(xp, a)
        b, op_b, ld_b = _for_gemm(xp, b)
        (N, K), D = out.shape, a.shape[1]
        zero = _SCALARS[acc.name].ctypes.data
        one = zero + acc.itemsize
        cublas, handle = xp.cuda.cublas, xp.cuda.device.get_cublas_handle()  # the handle is this thread's
        mode = cublas.getMathMode(handle)
        if dtype.itemsize == 2:  # the parts of a long sum are added in float32 too, so the result is rounded once
            cublas.setMathMode(handle, mode | _DISALLOW_REDUCED_PRECISION_REDUCTION)
        # cuBLAS counts by columns: what it calls outᵀ (K, N) = bᵀ (K, D)·aᵀ (D, N) is our out by rows
        arguments = (
            handle,
            op_b,
            op_a,
            K,
            N,
            D,
            one,
            b.data.ptr,
            _CUDA_R[b.dtype.name],
            ld_b,
            a.data.ptr,
            _CUDA_R[a.dtype.name],
            ld_a,
            one if add else zero,
            out.data.ptr,
            _CUDA_R[out.dtype.name],
            ld_out,
            self._compute_type(dtype),
            _GEMM_DEFAULT,
        )
        try:
            cublas.gemmEx(*arguments)
        except NotImplementedError:  # CuPy's answer while the stream is captured
            captured_gemm(xp.cuda.get_current_stream().ptr, *arguments)
        finally:
            cublas.setMathMode(handle, mode)

    def _compute_type(self, dtype: Any) -> int:
        """Give cuBLAS's name of the arithmetic for operands of `dtype`: TF32 only where CuPy or torch was told so."""
        if dtype == np.float64:
            return _COMPUTE_64F
        asked = TF32.get()
        if asked is None:
            asked = dtype == np.float32 and self.xp._core.get_compute_type(dtype) == _CUPY_TF32
        return _COMPUTE_32F_FAST_TF32 if asked and dtype == np.float32 else _COMPUTE_32F

    def _fill_rows(self, out: Any, b: Any) -> None:
        """``out[n, :] = b``."""
        N, K = out.shape
        V = 16 // out.itemsize
        packs = -(-(K + V - 1) // V)
        threads = min(max(power_of_two(packs), 32), 256)
        self._launch(
            self._device(out),
            f"fill_rows<{C_NAME[out.dtype.name]}, {C_NAME[b.dtype.name]}>",
            (-(-packs // threads), min(N, 16 * self._device(out).limits.processors)),
            (threads,),
            (out, i64(row_stride(out)), self.xp.ascontiguousarray(b), i64(N), i64(K)),
        )

    def _column_sums(self, x: Any, out: Any, accumulate: bool) -> None:
        """``out = Σ_n x[n, :]``, or ``out += …``."""
        N, K = x.shape
        if not K:
            return
        if not rows_are_dense(x):
            x = self.xp.ascontiguousarray(x)
        device, c_type = self._device(x), C_NAME[x.dtype.name]
        V = 16 // x.itemsize
        if x.data.ptr % 16 or (N > 1 and x.strides[0] % 16):
            V = 1
        acc = np.dtype(np.float64 if x.dtype == np.float64 else np.float32)
        across = -(-K // (32 * V))
        # as many stripes of at least 64 rows as give every processor about 4 blocks
        stripes = min(max(1, min(-(-4 * device.limits.processors // across), N // 64)), 65535)
        rows = -(-N // stripes)
        partial = self.empty((stripes, K), acc)
        self._launch(
            device,
            f"column_sums<{c_type}, {V}>",
            (across, stripes),
            (32, 8),
            (x, i64(row_stride(x)), i64(N), i64(K), i64(rows), partial),
            shared=256 * V * acc.itemsize,
        )
        self._launch(
            device,
            f"column_totals<{C_NAME[acc.name]}, {C_NAME[out.dtype.name]}>",
            (-(-K // 256),),
            (256,),
            (partial, i64(stripes), i64(K), out, i64(out.strides[0] // out.itemsize), i32(accumulate)),
        )


def _layout(x: Any) -> tuple[Any, int | None, int]:
    """Describe a matrix to cuBLAS: by rows (N), by columns (T) or neither (None), and the distance between them."""
    (rows, columns), (down, across) = x.shape, (s // x.itemsize for s in x.strides)
    if (across == 1 or columns == 1) and (down >= columns or rows == 1):
        return x, _OP_N, max(down if rows > 1 else columns, 1)
    if (down == 1 or rows == 1) and (across >= rows or columns == 1):
        return x, _OP_T, max(across if columns > 1 else rows, 1)
    return x, None, 0


def _for_gemm(xp: ModuleType, x: Any) -> tuple[Any, int, int]:
    """Describe an operand to cuBLAS, copied if it is neither by rows nor by columns."""
    _, op, distance = _layout(x)
    if op is None:
        return xp.ascontiguousarray(x), _OP_N, max(x.shape[1], 1)
    return x, op, distance
