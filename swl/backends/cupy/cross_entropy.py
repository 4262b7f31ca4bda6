"""Cross-entropy: the kernels of ``kernels/cross_entropy.cu`` and ``kernels/class_ids.cu``."""

from __future__ import annotations

import functools
from decimal import Context, Decimal
from fractions import Fraction
from typing import Any

import numpy as np

from swl.backends import Rows
from swl.backends.cupy.compilation import C_NAME, INDEX, kind
from swl.backends.cupy.launching import NULL, Launcher, i32, i64, or_null, row_stride, rows_are_dense
from swl.backends.cupy.plans import PART_KEEP, PART_LANES, ROW_BYTES, plan, power_of_two
from swl.backends.cupy.structs import PROBLEM, ROWS_OUT
from swl.backends.protocol import Target

__all__ = ["CrossEntropy"]

_PROBS = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}  # probs_type in problem.cuh


class CrossEntropy(Launcher):
    """The operations of a loss."""

    def gradient_over(self, logits: Any, x: Any, W: Any) -> Any:
        if x.dtype != W.dtype or x.itemsize != 2 or logits.dtype != np.float32:
            return logits
        return logits.view(x.dtype)[:, : logits.shape[1]]  # each row from the start of its logits

    def prepare_ids(self, ids: Any, n_classes: int, ignore_index: int, weight: Any | None) -> tuple[Any, Any, Any]:
        xp = self.xp
        if ids.dtype == np.uint64:  # beyond int64 every id is out of range
            ids = xp.minimum(ids, np.uint64(2**63 - 1))
        if ids.dtype.name not in INDEX:
            ids = ids.astype(np.int64)
        device, index = self._device(ids), INDEX[ids.dtype.name]
        (N,) = ids.shape
        blocks = max(1, min(-(-N // 256), 2 * device.limits.processors))
        acc = np.dtype(np.float32) if weight is None else weight.dtype
        clean = xp.empty(N, dtype=np.int64)
        row_weight = None if weight is None else xp.empty(N, dtype=acc)
        counts, bad, count = xp.empty(blocks), xp.empty(blocks, dtype=np.int64), xp.empty(())
        head = (ids, i64(ids.strides[0] // ids.itemsize), i64(N), i64(n_classes), i64(ignore_index))
        self._launch(
            device,
            f"prepare_ids<{index}, {C_NAME[acc.name]}>",
            (blocks,),
            (256,),
            (*head, or_null(weight), clean, or_null(row_weight), counts, bad),
            shared=8 * (8 + 8),
        )
        self._launch(
            device,
            f"finish_ids<{index}>",
            (1,),
            (32,),
            (*head, i64(blocks), counts, bad, count, device.error),
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
        dense_logits = logits if rows_are_dense(logits) else xp.ascontiguousarray(logits)
        c_type, what, head = self._problem(dense_logits, target, stats)
        if how.variant == "split":
            sums = xp.empty((N, how.splits, 7), dtype=rows.loss.dtype)
            at = xp.empty((N, how.splits), dtype=np.int64)
            self._launch(
                device,
                f"ce_partial<{c_type}, {what}, {how.V}>",
                (how.blocks,),
                (how.threads,),
                (head, i64(how.splits), i64(how.packs_each), sums, at),
                shared=how.shared,
            )
            self._launch(
                device,
                f"ce_combine<{c_type}, {what}>",
                (-(-N // 4),),
                (128,),
                (head, outputs, i64(how.splits), sums, at),
            )
        else:
            fused = out is not None and how.on_chip and rows_are_dense(out)
            gradient = (
                (row_scale, i64(_scale_stride(row_scale)), out, i64(row_stride(out)))
                if fused
                else (NULL, i64(0), NULL, i64(0))
            )
            keep = f"{how.V}, {how.keep if fused or how.lanes else 0}{_narrower(logits, out) if fused else ''}"
            part: tuple[Any, ...] = ()
            if how.variant == "cluster":
                name, part = f"ce_cluster<{c_type}, {what}, {keep}>", (i64(how.packs_each),)
            else:
                name = f"ce_rows<{c_type}, {what}, {how.lanes}, {keep}>"
            self._launch(
                device,
                name,
                (how.blocks,),
                (how.threads,),
                (head, outputs, *part, *gradient),
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
        dense_logits = logits if rows_are_dense(logits) else xp.ascontiguousarray(logits)
        dense_out = out if rows_are_dense(out) else self.empty(out.shape, out.dtype)
        c_type, what, head = self._problem(dense_logits, target, False)
        few = C <= PART_LANES * PART_KEEP
        V = 1 if few else 16 // logits.itemsize
        packs = -(-(C + V - 1) // V)
        lanes = min(power_of_two(packs), 256)
        each = 4 if out.itemsize >= logits.itemsize else -(-packs // lanes)  # gradients over the logits: in one tile
        tiles = -(-packs // (lanes * each))
        self._launch(
            self._device(logits),
            f"ce_backward<{c_type}, {what}, {V}{_narrower(logits, out)}>",
            (-(-N // (256 // lanes)) * tiles,),
            (256,),
            (
                head,
                rows.row_max,
                rows.log_sum,
                rows.mass,
                row_scale,
                i64(_scale_stride(row_scale)),
                dense_out,
                i64(row_stride(dense_out)),
                i32(lanes),
                i32(each),
                i64(tiles),
            ),
            shared=ROW_BYTES * (256 // lanes),
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
        return rows, ROWS_OUT(C_NAME[logits.dtype.name], {f"{name}_n": value for name, value in rows._asdict().items()})

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
        inverse, rate, rate_rest = _softcap(target.softcap, acc)
        T = C_NAME[logits.dtype.name]
        values = {
            "logits_nc": logits,
            "stride": row_stride(logits),
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
            "softcap_rate": rate,
            "softcap_rate_rest": rate_rest,
            # of one class it is y itself, rounded as the kernels round that
            "mass_hit": hot + rest if C == 1 else target.hot + target.rest * C,
            "mass_miss": target.rest * C,
            "first_class": target.first_class,
        }
        smooth = bool(rest) or (probs is not None and hot != 1)
        has = {
            "BIAS": target.bias is not None,
            "TEMPERATURE": target.temperature != 1,
            "SOFTCAP": bool(target.softcap),
            "SMOOTHING": smooth,
            "WEIGHTS": target.weight is not None and (smooth or probs is not None),
            "STATS": stats,
            "PROBS": probs is not None,
        }
        return T, kind(*(name for name, there in has.items() if there)), PROBLEM(T, values)


_TWO_LOG2_E = Fraction(Context(prec=60).divide(2, Context(prec=60).ln(Decimal(2))))


@functools.cache
def _softcap(x: float, acc: Any) -> tuple[Any, Any, Any]:
    """Give 1/x, and 2·log₂e/x as the sum of two numbers of dtype `acc`, which has twice its digits; 0 for 0."""
    if not x:
        return acc(0), acc(0), acc(0)
    rate = acc(float(_TWO_LOG2_E) / x)
    rest = float(_TWO_LOG2_E / Fraction(x) - Fraction(float(rate))) if np.isfinite(rate) else 0
    return acc(1 / x), rate, acc(rest)


def _narrower(logits: Any, out: Any) -> str:
    """Give the template argument for gradients of another type than the logits."""
    return "" if out.dtype == logits.dtype else f", {C_NAME[out.dtype.name]}"


def _scale_stride(row_scale: Any) -> int:
    """Give 0 for one factor for all rows, else 1."""
    return 0 if row_scale.shape[0] == 1 else row_scale.strides[0] // row_scale.itemsize
