"""The CUDA backend: chooses variant and launch geometry for ``kernels/*.cu``, and calls cuBLAS, through CuPy.

Nothing here waits for the device except `CupyBackend.check`, and memory comes from CuPy's pool alone, so that a
training step can be captured in a CUDA graph once each of its kernels has run. Work goes to CuPy's current device and
stream, which `CupyBackend.scope` chooses for a whole call: CuPy's own operations, between the kernels, know no other way.
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from fractions import Fraction
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from swl.backends import Backend, Rows
from swl.backends.cupy.products import captured_gemm
from swl.backends.cupy.structs import PROBLEM, ROWS_OUT
from swl.backends.protocol import TF32, Target
from swl.errors import BackendUnavailable

__all__ = ["CupyBackend", "Limits", "Plan", "instances", "load", "module_source", "plan", "source"]


def load() -> Backend:
    """Give the backend.

    Raises
    ------
    BackendUnavailable
        Without CuPy, driver or device; the message says which, and what to do.
    """
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        raise BackendUnavailable(
            f"backend 'cupy' needs CuPy, which cannot be imported ({error}); "
            "pip install cupy-cuda13x, or cupy-cuda12x for a driver of CUDA 12 (nvidia-smi shows which)"
        ) from error
    driver = cupy.cuda.runtime.driverGetVersion()
    if not driver:
        raise BackendUnavailable(
            f"backend 'cupy' finds no NVIDIA driver (CuPy {cupy.__version__} is installed); "
            "install the driver, or in a container start it with the GPU passed through"
        )
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise BackendUnavailable(
            f"backend 'cupy' cannot use the driver of CUDA {_version(driver)} ({error}); install the CuPy of that "
            f"CUDA: pip install cupy-cuda{driver // 1000}x, or a newer driver"
        ) from error
    if not count:
        raise BackendUnavailable("backend 'cupy' finds no CUDA device; check nvidia-smi and CUDA_VISIBLE_DEVICES")
    return CupyBackend(cupy)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


# ------------------------------------------------------------------------------------------------ kernels


def source(name: str) -> str:
    """Give ``kernels/<name>.cu`` with its header in it: CuPy's disk cache knows a kernel by its text alone."""
    installed, checkout = files("swl") / "kernels", Path(__file__).parents[3] / "kernels"
    folder = installed if installed.is_dir() else checkout
    text = (folder / f"{name}.cu").read_text(encoding="utf-8")
    return text.replace('#include "common.cuh"', (folder / "common.cuh").read_text(encoding="utf-8"))


def module_source(group: tuple[str, ...]) -> str:
    """Give the source of a module of `instances`: the file, and the checks of the structs that its kernels take."""
    file, T, *_ = group
    return source(file) + "".join(s.check(T) for s in (PROBLEM, ROWS_OUT) if file == "cross_entropy" and T in _SIZE)


OPTIONS = ("-std=c++17", "-fmad=false")
"""Compiler options. No contraction of a·b + c: which ones are contracted differs between kernels of the same code, and
forward, backward and the fused sweep must agree to the bit. CuPy adds ``-ftz=true``: float32 results below the normal numbers
become 0.
"""

_C = {"float32": "float", "float64": "double", "float16": "__half", "bfloat16": "__nv_bfloat16"}  # C's name of a dtype
_SIZE = {"float": 4, "double": 8, "__half": 2, "__nv_bfloat16": 2}  # bytes
_NARROWER = {"float": ("__half", "__nv_bfloat16")}  # types of gradients, other than their own, that logits may have
_KINDS = (
    "PLAIN",
    "OPTIONS",
    "PROBS",
)  # Kind of cross_entropy.cu; float64 has no PLAIN, whose exponentials take most registers
_INDEX = {"int32": "int", "int64": "long long"}


def instances() -> dict[tuple[str, ...], tuple[str, ...]]:
    """List every kernel instance that the backend launches, by module: its file, and what tells it from others."""
    groups: dict[tuple[str, ...], tuple[str, ...]] = {}
    for T, size in _SIZE.items():
        wide = 16 // size
        for kind in _KINDS[T == "double" :]:
            groups["cross_entropy", T, kind] = (
                f"ce_rows<{T}, {kind}, 8, 1, 4>",
                f"ce_rows<{T}, {kind}, 32, {wide}, {_KEEP_WARP}>",
                f"ce_rows<{T}, {kind}, 0, {wide}, {_KEEP_BLOCK}>",
                f"ce_rows<{T}, {kind}, 0, {wide}, 0>",
                f"ce_partial<{T}, {kind}, {wide}>",
                f"ce_combine<{T}, {kind}>",
                f"ce_backward<{T}, {kind}, 1>",
                f"ce_backward<{T}, {kind}, {wide}>",
            )
            for G in _NARROWER.get(T, ()):  # gradients of a fused head, for products of 16-bit operands
                groups["cross_entropy", T, kind, G] = (
                    f"ce_rows<{T}, {kind}, 8, 1, 4, {G}>",
                    f"ce_rows<{T}, {kind}, 32, {wide}, {_KEEP_WARP}, {G}>",
                    f"ce_rows<{T}, {kind}, 0, {wide}, {_KEEP_BLOCK}, {G}>",
                    f"ce_backward<{T}, {kind}, 1, {G}>",
                    f"ce_backward<{T}, {kind}, {wide}, {G}>",
                )
        groups["affine", T] = (
            *(f"fill_rows<{T}, {B}>" for B in _SIZE),
            f"column_sums<{T}, 1>",
            f"column_sums<{T}, {wide}>",
            f"column_totals<float, {T}>",
            f"column_totals<double, {T}>",
        )
    groups["cross_entropy", "ids"] = tuple(
        name
        for index in _INDEX.values()
        for name in (f"prepare_ids<{index}, float>", f"prepare_ids<{index}, double>", f"finish_ids<{index}>")
    )
    return groups


# ------------------------------------------------------------------------------------------------ launch geometry


class Limits(NamedTuple):
    """What of a device the choice of a variant depends on."""

    processors: int  # streaming multiprocessors
    shared: int  # bytes of shared memory that one block may have


class Plan(NamedTuple):
    """How the forward sweep, alone or with the backward sweep, is launched.

    ========  ==========================================================  ==================================
    variant   when                                                        row
    ========  ==========================================================  ==================================
    part      C ≤ 32                                                      8 lanes of a warp, registers
    warp      16-byte packs of a row ≤ 4 per lane of a warp               32 lanes, registers
    split     3·N ≤ processors, and ≥ 2 blocks of ≥ 1024 packs in a row   blocks, combined by a second kernel
    block     all others                                                  a block of 128 to 512 threads
    ========  ==========================================================  ==================================

    Both sweeps in one read each logit once where `on_chip` holds: always in part and warp; in block where 4 packs per
    thread in registers and the rest of the row in shared memory have room. Otherwise ``ce_backward`` follows.
    """

    variant: str
    lanes: int  # LANES of ce_rows
    V: int  # elements of a pack
    keep: int  # KEEP of ce_rows
    threads: int
    blocks: int
    shared: int  # bytes without a staged row
    stage: int  # bytes of a staged row
    on_chip: bool
    splits: int = 1
    packs_each: int = 0


_KEEP_WARP, _KEEP_BLOCK = 4, 4  # packs per lane that stay in registers
_PART_LANES, _PART_KEEP = 8, 4
_SPLIT_PACKS = 1024  # at least 4 per thread of ce_partial
_AT_ONCE = 1 << 22  # numbers of a range of `by_rows`
_ROW_BYTES = 64  # Row in cross_entropy.cu


def plan(N: int, C: int, itemsize: int, limits: Limits) -> Plan:
    """Choose how to sweep logits (N, C) of `itemsize` bytes. The choice never depends on which sweeps are asked for."""
    if C <= _PART_LANES * _PART_KEEP:
        return Plan("part", _PART_LANES, 1, _PART_KEEP, 256, -(-N // 32), 0, 0, True)
    V = 16 // itemsize
    packs = -(-(C + V - 1) // V)  # of the row that lies worst
    if packs <= 32 * _KEEP_WARP:
        return Plan("warp", 32, V, _KEEP_WARP, 128, -(-N // 4), 0, 0, True)
    sums = 64 if itemsize == 8 else 40  # bytes of Sums in cross_entropy.cu, one for each warp
    splits = min(-(-2 * limits.processors // N), packs // _SPLIT_PACKS) if limits.processors >= 3 * N else 1
    if splits > 1:
        each = -(-packs // splits)
        return Plan("split", 0, V, 0, 256, N * splits, 8 * sums, 0, False, splits, each)
    threads = min(max(_power_of_two(-(-packs // _KEEP_BLOCK)), 128), 512)
    stage = 16 * max(0, packs - _KEEP_BLOCK * threads)
    shared = _ROW_BYTES + 16 * sums
    return Plan("block", 0, V, _KEEP_BLOCK, threads, N, shared, stage, shared + stage <= limits.shared)


@functools.cache
def _power_of_two(n: int) -> int:
    """Give the least power of two that is at least `n`."""
    return 1 << (n - 1).bit_length()


# ------------------------------------------------------------------------------------------------ the backend

_NULL = np.uint64(0)  # a pointer to nothing
_DLPACK_CUDA = 2  # kDLCUDA of dlpack.h
_i32, _i64 = np.int32, np.int64
_PROBS = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}  # probs_type in cross_entropy.cu

# of cuBLAS: library_types.h and cublas_api.h
_CUDA_R = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}
_COMPUTE_32F, _COMPUTE_64F, _COMPUTE_32F_FAST_TF32 = 68, 70, 77
_DISALLOW_REDUCED_PRECISION_REDUCTION = 16
_CUPY_TF32 = 7  # COMPUTE_TYPE_TF32 of CuPy's get_compute_type, which reads CUPY_TF32
_OP_N, _OP_T = 0, 1
_GEMM_DEFAULT = -1
# alpha and beta are read on the host, when gemmEx is called
_SCALARS = {name: np.array([0, 1], name) for name in ("float32", "float64")}


class _Device:
    """What is kept for each device: its limits, its kernels, and where its kernels report a bad class id."""

    def __init__(self, xp: ModuleType, index: int) -> None:
        attributes = xp.cuda.Device(index).attributes
        self.index = index
        self.limits = Limits(attributes["MultiProcessorCount"], attributes["MaxSharedMemoryPerBlockOptin"])
        self.kernels: dict[str, Any] = {}
        with xp.cuda.Device(index):
            self.error = xp.zeros(5, dtype=np.uint64)
            xp.cuda.get_current_stream().synchronize()  # once: other streams use it too


class CupyBackend:
    """See `swl.backends.Backend` for what each operation means."""

    name = "cupy"

    def __init__(self, xp: ModuleType) -> None:
        self.xp = xp
        self._lock = threading.RLock()
        self._devices: dict[int, _Device] = {}
        self._modules: dict[tuple[str, ...], Any] = {}
        self._module_of = {name: group for group, names in instances().items() for name in names}

    # -------------------------------------------------------------------------------------------- where work goes

    def scope(self, stream: Any = None, /, **arrays: Any) -> AbstractContextManager[object]:
        found: tuple[str, Any] | None = None
        for name, x in arrays.items():
            device = self._device_of(x)
            if device is not None and found is None:
                found = name, device
            elif device is not None and found is not None and device.id != found[1].id:
                raise TypeError(
                    f"{found[0]} is on cuda:{found[1].id} but {name} is on cuda:{device.id}; "
                    "all arrays of a call must be on one device"
                )
        here = self.xp.cuda.Device() if found is None else found[1]
        return here if stream is None else _on(here, self._stream(stream, here))

    def _device_of(self, x: Any) -> Any:
        """Give the device of an array of any library; None for whatever is not on a device."""
        xp = self.xp
        if isinstance(x, xp.ndarray):
            return x.device
        kind, index = x.__dlpack_device__() if hasattr(x, "__dlpack_device__") else (0, 0)
        if kind == _DLPACK_CUDA:
            return xp.cuda.Device(index)
        if not hasattr(x, "__cuda_array_interface__"):
            return None
        pointer = x.__cuda_array_interface__["data"][0]
        # the driver knows whose the memory is; an array without elements has none
        return xp.cuda.Device(xp.cuda.runtime.pointerGetAttributes(pointer).device) if pointer else xp.cuda.Device()

    def _stream(self, stream: Any, device: Any) -> Any:
        """Bring what a caller gave as `stream` to CuPy's form."""
        cuda = self.xp.cuda
        if not isinstance(stream, cuda.Stream | cuda.ExternalStream):
            if not hasattr(stream, "__cuda_stream__"):
                raise TypeError(
                    "stream must be a cupy.cuda.Stream, or an object with __cuda_stream__ such as a torch.cuda.Stream, "
                    f"got {stream!r} of type {type(stream).__name__}"
                )
            stream = cuda.Stream.from_external(stream)
        if stream.device_id not in (-1, device.id):  # -1: not known
            raise TypeError(f"stream is of cuda:{stream.device_id}, but the arrays are on cuda:{device.id}")
        return stream

    # -------------------------------------------------------------------------------------------- arrays

    def owns(self, x: Any) -> bool:
        return isinstance(x, self.xp.ndarray)

    def asarray(self, x: Any, dtype: Any = None) -> Any:
        xp = self.xp
        if not isinstance(x, xp.ndarray):
            if getattr(x, "__dlpack_device__", lambda: (0, 0))()[0] == _DLPACK_CUDA:  # tells the producer our stream
                x = xp.from_dlpack(x)
            elif hasattr(x, "__cuda_array_interface__"):
                with self._device_of(x):  # or CuPy copies it to the current device
                    x = _Interface(x)
                    here = xp.cuda.get_current_stream()
                    if x.stream not in (None, here.ptr or 1):  # 1 is the null stream
                        here.wait_event(xp.cuda.Stream.from_external(x).record())
                    x = xp.asarray(x)
            else:
                x = xp.asarray(np.asarray(x, dtype=dtype))
        if x.data.ptr % x.itemsize or any(step % x.itemsize for step in x.strides):
            _refuse_misaligned(x)
        if dtype is None or x.dtype == dtype:
            return x
        with x.device:
            return x.astype(dtype)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self.xp.empty(shape, dtype=dtype)

    # -------------------------------------------------------------------------------------------- launching

    def _device(self, x: Any) -> _Device:
        index = x.device.id
        found = self._devices.get(index)
        if found is None:
            with self._lock:
                found = self._devices.get(index) or _Device(self.xp, index)
                self._devices[index] = found
        return found

    def _kernel(self, device: _Device, name: str) -> Any:
        found = device.kernels.get(name)
        if found is None:
            with self._lock:
                group = self._module_of[name]
                if group not in self._modules:
                    self._modules[group] = self.xp.RawModule(
                        code=module_source(group), options=OPTIONS, name_expressions=instances()[group]
                    )
                found = self._modules[group].get_function(name)
                if name.startswith("ce_rows") and ", 0, " in name and not name.endswith(", 0>"):
                    found.max_dynamic_shared_size_bytes = device.limits.shared
                device.kernels[name] = found
        return found

    def _launch(self, device: _Device, name: str, grid: Any, block: Any, args: Any, shared: int = 0) -> None:
        self._kernel(device, name)(grid, block, args, shared_mem=shared)

    # -------------------------------------------------------------------------------------------- affine

    def affine_forward(self, x: Any, W: Any, b: Any | None, out: Any) -> None:
        if not out.size:
            return
        if not _rows_are_dense(out):
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
        threads = min(max(_power_of_two(packs), 32), 256)
        self._launch(
            self._device(out),
            f"fill_rows<{_C[out.dtype.name]}, {_C[b.dtype.name]}>",
            (-(-packs // threads), min(N, 16 * self._device(out).limits.processors)),
            (threads,),
            (out, _i64(_row_stride(out)), self.xp.ascontiguousarray(b), _i64(N), _i64(K)),
        )

    def _column_sums(self, x: Any, out: Any, accumulate: bool) -> None:
        """``out = Σ_n x[n, :]``, or ``out += …``."""
        N, K = x.shape
        if not K:
            return
        if not _rows_are_dense(x):
            x = self.xp.ascontiguousarray(x)
        device, c_type = self._device(x), _C[x.dtype.name]
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
            (x, _i64(_row_stride(x)), _i64(N), _i64(K), _i64(rows), partial),
            shared=256 * V * acc.itemsize,
        )
        self._launch(
            device,
            f"column_totals<{_C[acc.name]}, {_C[out.dtype.name]}>",
            (-(-K // 256),),
            (256,),
            (partial, _i64(stripes), _i64(K), out, _i64(out.strides[0] // out.itemsize), _i32(accumulate)),
        )

    # -------------------------------------------------------------------------------------------- cross-entropy

    def gradient_over(self, logits: Any, x: Any, W: Any) -> Any:
        if x.dtype != W.dtype or x.itemsize != 2 or logits.dtype != np.float32:
            return logits
        return logits.view(x.dtype)[:, : logits.shape[1]]  # each row from the start of its logits

    def prepare_ids(self, ids: Any, n_classes: int, ignore_index: int, weight: Any | None) -> tuple[Any, Any, Any]:
        xp = self.xp
        if ids.dtype == np.uint64:  # beyond int64 every id is out of range
            ids = xp.minimum(ids, np.uint64(2**63 - 1))
        if ids.dtype.name not in _INDEX:
            ids = ids.astype(np.int64)
        device, index = self._device(ids), _INDEX[ids.dtype.name]
        (N,) = ids.shape
        blocks = max(1, min(-(-N // 256), 2 * device.limits.processors))
        acc = np.dtype(np.float32) if weight is None else weight.dtype
        clean = xp.empty(N, dtype=np.int64)
        row_weight = None if weight is None else xp.empty(N, dtype=acc)
        counts, bad, count = xp.empty(blocks), xp.empty(blocks, dtype=np.int64), xp.empty(())
        head = (ids, _i64(ids.strides[0] // ids.itemsize), _i64(N), _i64(n_classes), _i64(ignore_index))
        self._launch(
            device,
            f"prepare_ids<{index}, {_C[acc.name]}>",
            (blocks,),
            (256,),
            (*head, _or_null(weight), clean, _or_null(row_weight), counts, bad),
            shared=8 * (8 + 8),
        )
        self._launch(
            device,
            f"finish_ids<{index}>",
            (1,),
            (32,),
            (*head, _i64(blocks), counts, bad, count, device.error),
        )
        return clean, row_weight, count

    def cross_entropy_forward(self, logits: Any, target: Target, stats: bool) -> Rows:
        return self._forward(logits, target, stats, None, None)

    def cross_entropy_forward_backward(
        self, logits: Any, target: Target, row_scale: Any, out: Any, stats: bool
    ) -> Rows:
        return self._forward(logits, target, stats, row_scale, out)

    def _forward(self, logits: Any, target: Target, stats: bool, row_scale: Any | None, out: Any | None) -> Rows:
        """Sweep forward, and backward too if there is an `out`."""
        xp = self.xp
        rows, outputs = self._rows(logits, stats)
        N, C = logits.shape
        if not N:
            return rows
        device = self._device(logits)
        how = plan(N, C, logits.itemsize, device.limits)
        dense_logits = logits if _rows_are_dense(logits) else xp.ascontiguousarray(logits)
        c_type, kind, head = self._problem(dense_logits, target, stats)
        if how.variant == "split":
            sums = xp.empty((N, how.splits, 7), dtype=rows.loss.dtype)
            at = xp.empty((N, how.splits), dtype=np.int64)
            self._launch(
                device,
                f"ce_partial<{c_type}, {kind}, {how.V}>",
                (how.blocks,),
                (how.threads,),
                (head, _i64(how.splits), _i64(how.packs_each), sums, at, _i32(stats)),
                shared=how.shared,
            )
            self._launch(
                device,
                f"ce_combine<{c_type}, {kind}>",
                (-(-N // 4),),
                (128,),
                (head, outputs, _i64(how.splits), sums, at),
            )
        else:
            fused = out is not None and how.on_chip and _rows_are_dense(out)
            gradient = (
                (row_scale, _i64(_scale_stride(row_scale)), out, _i64(_row_stride(out)))
                if fused
                else (_NULL, _i64(0), _NULL, _i64(0))
            )
            self._launch(
                device,
                f"ce_rows<{c_type}, {kind}, {how.lanes}, {how.V}, {how.keep if fused or how.lanes else 0}"
                f"{_narrower(logits, out) if fused else ''}>",
                (how.blocks,),
                (how.threads,),
                (head, outputs, *gradient),
                shared=how.shared + (how.stage if fused else 0),
            )
            if fused:
                return rows
        if out is not None:
            self.cross_entropy_backward(logits, target, rows, row_scale, out)
        return rows

    def cross_entropy_backward(self, logits: Any, target: Target, rows: Rows, row_scale: Any, out: Any) -> None:
        xp = self.xp
        N, C = logits.shape
        if not N:
            return
        dense_logits = logits if _rows_are_dense(logits) else xp.ascontiguousarray(logits)
        dense_out = out if _rows_are_dense(out) else self.empty(out.shape, out.dtype)
        c_type, kind, head = self._problem(dense_logits, target, False)
        few = C <= _PART_LANES * _PART_KEEP
        V = 1 if few else 16 // logits.itemsize
        packs = -(-(C + V - 1) // V)
        lanes = min(_power_of_two(packs), 256)
        each = 4 if out.itemsize >= logits.itemsize else -(-packs // lanes)  # gradients over the logits: in one tile
        tiles = -(-packs // (lanes * each))
        self._launch(
            self._device(logits),
            f"ce_backward<{c_type}, {kind}, {V}{_narrower(logits, out)}>",
            (-(-N // (256 // lanes)) * tiles,),
            (256,),
            (
                head,
                rows.row_max,
                rows.log_sum,
                rows.mass,
                row_scale,
                _i64(_scale_stride(row_scale)),
                dense_out,
                _i64(_row_stride(dense_out)),
                _i32(lanes),
                _i32(each),
                _i64(tiles),
            ),
            shared=_ROW_BYTES * (256 // lanes),
        )
        if dense_out is not out:
            out[...] = dense_out

    def _rows(self, logits: Any, stats: bool) -> tuple[Rows, Any]:
        """Make the outputs of a forward sweep; give them as rows, and as the kernels' argument."""
        N = logits.shape[0]
        acc = np.dtype(np.float64 if logits.dtype == np.float64 else np.float32)
        values = list(self.empty((7 if stats else 5, N), acc))
        if stats:
            values.append(self.empty((N,), np.int64))
        rows = Rows(*values)
        return rows, ROWS_OUT(_C[logits.dtype.name], {f"{name}_n": value for name, value in rows._asdict().items()})

    def _problem(self, logits: Any, target: Target, stats: bool) -> tuple[str, str, Any]:
        """Give the kernels' type and kind, and the argument that all of them start with."""
        xp = self.xp
        acc = np.float64 if logits.dtype == np.float64 else np.float32
        N, C = logits.shape
        ids, probs = target.ids, target.probs
        row, column = 0, 1
        if probs is not None:
            if probs.dtype.name not in _PROBS:
                probs = probs.astype(acc)  # whole numbers and truth values
            row, column = (s // probs.itemsize for s in probs.strides)
        else:
            ids = xp.ascontiguousarray(ids)
        hot, rest = acc(target.hot), acc(target.rest)
        inverse, inverse_rest = _inverse(target.softcap, acc)
        T = _C[logits.dtype.name]
        values = {
            "logits_nc": logits,
            "stride": _row_stride(logits),
            "N": N,
            "C": C,
            "ids_n": ids,
            "probs_nc": probs,
            "probs_type": 0 if probs is None else _PROBS[probs.dtype.name],
            "probs_row": row,
            "probs_column": column,
            "weight_c": target.weight,
            "row_weight_n": target.row_weight,
            "bias_c": target.bias,
            "hot": hot,
            "rest": rest,
            "softcap": target.softcap,
            "z_loss": target.z_loss,
            "temperature_inverse": 1 / target.temperature,
            "softcap_inverse": inverse,
            "softcap_inverse_rest": inverse_rest,
            # of one class it is y itself, rounded as the kernels round that
            "mass_hit": hot + rest if C == 1 else target.hot + target.rest * C,
            "mass_miss": target.rest * C,
            "first_class": target.first_class,
        }
        by_column = stats or rest or target.softcap or target.temperature != 1 or target.bias is not None
        kind = "PROBS" if probs is not None else "OPTIONS" if by_column or T == "double" else "PLAIN"
        return T, kind, PROBLEM(T, values)

    # -------------------------------------------------------------------------------------------- the host's side

    def plain_loss(self, logits: Any, target: Any, ignore_index: int, out: Any | None) -> tuple[Any, float] | None:
        return None

    def total(self, x: Any) -> Any:
        return x.sum(dtype=np.float64)

    def by_rows(self, work: Callable[[int, int], object], n_rows: int, row_size: int) -> None:
        step = max(1, _AT_ONCE // max(row_size, 1))
        for begin in range(0, n_rows, step):
            work(begin, min(begin + step, n_rows))

    def check(self) -> None:
        for device in list(self._devices.values()):
            with self.xp.cuda.Device(device.index) as on:
                on.synchronize()
                found, row, value, n_classes, ignore_index = device.error.get().astype(np.int64).tolist()
                if found:
                    device.error.fill(0)
                    on.synchronize()
                    raise ValueError(
                        f"target[{row}] is {value}; legal are class ids in [0, {n_classes}) "
                        f"and ignore_index={ignore_index}"
                    )

    def info(self) -> dict[str, str]:
        runtime = self.xp.cuda.runtime
        found = {
            "cupy": self.xp.__version__,
            "driver": f"CUDA {_version(runtime.driverGetVersion())}",
            "runtime": f"CUDA {_version(runtime.runtimeGetVersion())}",
        }
        for index in range(runtime.getDeviceCount()):
            name = runtime.getDeviceProperties(index)["name"].decode()
            capability = self.xp.cuda.Device(index).compute_capability
            found[f"device {index}"] = f"{name}, compute capability {capability[:-1]}.{capability[-1]}"
        return found


class _Interface:
    """An object's ``__cuda_array_interface__`` without its stream, for which CuPy would make the host wait."""

    def __init__(self, x: Any) -> None:
        self._keep, self.__cuda_array_interface__ = x, dict(x.__cuda_array_interface__)
        self.stream = self.__cuda_array_interface__.pop("stream", None)

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.stream


@contextmanager
def _on(device: Any, stream: Any) -> Iterator[None]:
    with device, stream:
        yield


def _or_null(x: Any | None) -> Any:
    return _NULL if x is None else x


@functools.cache
def _inverse(x: float, acc: Any) -> tuple[Any, Any]:
    """Give 1/x as the sum of two numbers of dtype `acc`, which has twice its digits; 0 for 0."""
    if not x:
        return acc(0), acc(0)
    high = acc(1 / x)
    return high, acc(float(1 / Fraction(x) - Fraction(float(high)))) if np.isfinite(high) else acc(0)


def _narrower(logits: Any, out: Any) -> str:
    """Give the template argument for gradients of another type than the logits."""
    return "" if out.dtype == logits.dtype else f", {_C[out.dtype.name]}"


def _refuse_misaligned(x: Any) -> None:
    """Raise for elements off the multiples of their size, which no kernel can read, unless they do not exist."""
    steps = [step for n, step in zip(x.shape, x.strides, strict=True) if n > 1]
    if x.size and any(where % x.itemsize for where in (x.data.ptr, *steps)):
        raise ValueError(
            f"a device reads {x.dtype} at multiples of {x.itemsize} bytes only, got an array of shape {x.shape} with "
            f"strides {x.strides} at address {x.data.ptr:#x}; copy it on the host first"
        )


def _scale_stride(row_scale: Any) -> int:
    """Give 0 for one factor for all rows, else 1."""
    return 0 if row_scale.shape[0] == 1 else row_scale.strides[0] // row_scale.itemsize


def _row_stride(x: Any) -> int:
    """Distance of rows in elements."""
    return int(x.strides[0]) // int(x.itemsize)


def _rows_are_dense(x: Any) -> bool:
    """Tell whether the elements of each row are neighbours, as the kernels want them."""
    return bool((x.shape[1] <= 1 or x.strides[1] == x.itemsize) and x.strides[0] % x.itemsize == 0)


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
