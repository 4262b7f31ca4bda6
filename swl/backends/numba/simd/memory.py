"""Vectors from memory and to it, whole and in part, converted where memory's type is another."""

# mypy: ignore-errors
# Numba compiles and types this file itself: the values are vectors and views that Python's types know nothing of.

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing import signature
from numba.extending import intrinsic, overload

from swl.backends.numba.simd.conversions import from_lanes, has, to_lanes
from swl.backends.numba.simd.vectors import I32, I64, call, lane_mask, lanes, spread, suffix, vector_of
from swl.backends.numba.simd.views import align, cut, element

LINE = 64
"""Bytes of a cache line, and the alignment that `store_stream` asks for."""


# ------------------------------------------------------------------------------------------------ whole vectors


@intrinsic
def load(typingctx: Any, row: Any, start: Any, like: Any) -> Any:
    """Load ``row[start : start + lanes]`` as lanes of the type of the scalar `like`."""
    vector = vector_of(like)
    sig = signature(vector, row, types.intp, like)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array, start, _ = args
        raw_type = ir.VectorType(context.get_data_type(row.dtype), vector.lanes)
        pointer = element(builder, array, start)
        raw = builder.load(builder.bitcast(pointer, raw_type.as_pointer()), align=align(row.dtype))
        return to_lanes(context, builder, raw, row.dtype, vector)

    return sig, codegen


def _storing(stream: bool) -> Any:
    """Make an intrinsic that stores all lanes to ``row[start : start + lanes]``, rounded once."""

    @intrinsic
    def op(typingctx: Any, row: Any, start: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            raw = from_lanes(context, builder, args[2], row.dtype, value)
            pointer = builder.bitcast(element(builder, args[0], args[1]), raw.type.as_pointer())
            stored = builder.store(raw, pointer, align=LINE if stream else align(row.dtype))
            if stream:
                stored.set_metadata("nontemporal", builder.module.add_metadata([I32(1)]))
            return context.get_dummy_value()

        return signature(types.void, row, types.intp, value), codegen

    return op


store = _storing(stream=False)
store_stream = _storing(stream=True)
"""Past the caches, to an address that `to_line` is 0 for: spares reading the lines that are written."""


@intrinsic
def to_line(typingctx: Any, row: Any, start: Any) -> Any:
    """Count the elements from `start` to the next beginning of a cache line."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address = builder.ptrtoint(element(builder, args[0], args[1]), I64)
        missing = builder.and_(builder.neg(address), I64(LINE - 1))
        return builder.udiv(missing, I64(align(row.dtype)))

    return signature(types.intp, row, types.intp), codegen


@intrinsic
def prefetch(typingctx: Any, row: Any, start: Any, like: Any) -> Any:
    """Fetch the cache lines of a vector that will be read; past the end of the array it is harmless."""
    size = vector_of(like).lanes * align(row.dtype)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = builder.bitcast(element(builder, args[0], args[1]), ir.IntType(8).as_pointer())
        fnty = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
        fn = cgutils.get_or_insert_function(builder.module, fnty, "llvm.prefetch.p0")
        read, into_l2, data = I32(0), I32(2), I32(1)
        for offset in range(0, size, LINE):
            builder.call(fn, [builder.gep(pointer, [I64(offset)]), read, into_l2, data])
        return context.get_dummy_value()

    return signature(types.void, row, types.intp, like), codegen


# ------------------------------------------------------------------------------------------------ parts


def _on_the_stack(context: Any, builder: Any, raw_type: Any, dtype: Any) -> Any:
    """Make room for a vector of which only a part is moved, by `memcpy`; None where memory's type has masked moves of its own."""
    if dtype.bitwidth > 16 or has(context, "avx512bw"):
        return None
    return cgutils.alloca_once_value(builder, ir.Constant(raw_type, None))


@intrinsic
def load_tail(typingctx: Any, row: Any, start: Any, count: Any, fill: Any) -> Any:
    """Load ``row[start : start + count]``, ``0 < count < lanes``, and put `fill` into the other lanes."""
    vector = vector_of(fill)
    sig = signature(vector, row, types.intp, types.intp, fill)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array, start, count, fill = args
        raw_type = ir.VectorType(context.get_data_type(row.dtype), vector.lanes)
        mask = lane_mask(builder, count, vector.lanes)
        pointer = builder.bitcast(element(builder, array, start), raw_type.as_pointer())
        if (copied := _on_the_stack(context, builder, raw_type, row.dtype)) is None:
            name = f"llvm.masked.load.{suffix(raw_type)}.p0"
            raw = call(builder, name, raw_type, [pointer, I32(align(row.dtype)), mask, ir.Constant(raw_type, None)])
        else:
            cgutils.raw_memcpy(builder, copied, pointer, count, align(row.dtype))
            raw = builder.load(copied)
        return builder.select(
            mask, to_lanes(context, builder, raw, row.dtype, vector), spread(builder, fill, vector.lanes)
        )

    return sig, codegen


@intrinsic
def store_tail(typingctx: Any, row: Any, start: Any, count: Any, value: Any) -> Any:
    """Store the first `count` lanes to ``row[start : start + count]``, rounded once."""
    sig = signature(types.void, row, types.intp, types.intp, value)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array, start, count, lanes_ = args
        raw = from_lanes(context, builder, lanes_, row.dtype, value)
        pointer = builder.bitcast(element(builder, array, start), raw.type.as_pointer())
        if (copied := _on_the_stack(context, builder, raw.type, row.dtype)) is not None:
            builder.store(raw, copied)
            cgutils.raw_memcpy(builder, pointer, copied, count, align(row.dtype))
            return context.get_dummy_value()
        mask = lane_mask(builder, count, value.lanes)
        name = f"llvm.masked.store.{suffix(raw.type)}.p0"
        call(builder, name, ir.VoidType(), [raw, pointer, I32(align(row.dtype)), mask])
        return context.get_dummy_value()

    return sig, codegen


# ------------------------------------------------------------------------------------------------ strided


def _elements(builder: Any, row: Any, start: Any, stride: Any, n: int) -> Any:
    """Point to ``row[start + i·stride]`` from each of n lanes."""
    many = ir.VectorType(I64, n)
    steps = builder.mul(ir.Constant(many, list(range(n))), spread(builder, stride, n))
    base = element(builder, row, start)
    pointers = builder.gep(base, [steps], source_etype=base.type.pointee)
    pointers.type = ir.VectorType(base.type, n)  # of what it gives for a vector of indices
    return pointers


@intrinsic
def gather(typingctx: Any, row: Any, start: Any, stride: Any, count: Any, like: Any) -> Any:
    """Load ``row[start + i·stride]`` into lane i, for the first `count` lanes; 0 into the others. `row` has the lanes' dtype."""
    vector = vector_of(like)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointers = _elements(builder, *args[:3], vector.lanes)
        mask = lane_mask(builder, args[3], vector.lanes)
        name = f"llvm.masked.gather.{suffix(vector.llvm)}.v{vector.lanes}p0"
        return call(builder, name, vector.llvm, [pointers, I32(align(row.dtype)), mask, ir.Constant(vector.llvm, None)])

    return signature(vector, row, types.intp, types.intp, types.intp, like), codegen


@intrinsic
def scatter(typingctx: Any, row: Any, start: Any, stride: Any, count: Any, value: Any) -> Any:
    """Store lane i to ``row[start + i·stride]``, for the first `count` lanes. `row` has the lanes' dtype."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointers = _elements(builder, *args[:3], value.lanes)
        mask = lane_mask(builder, args[3], value.lanes)
        name = f"llvm.masked.scatter.{suffix(value.llvm)}.v{value.lanes}p0"
        call(builder, name, ir.VoidType(), [args[4], pointers, I32(align(row.dtype)), mask])
        return context.get_dummy_value()

    return signature(types.void, row, types.intp, types.intp, types.intp, value), codegen


# ------------------------------------------------------------------------------------------------ rows


def move(source: Any, target: Any, like: Any) -> None:
    """Copy numbers from a view to one of the same size, converting them; nothing if both are of the dtype of `like`."""


@overload(move)
def _move(source, target, like):
    if source.dtype == target.dtype == like:
        return lambda source, target, like: None

    def convert(source, target, like):
        step = lanes(like)
        full = source.size - source.size % step
        for j in range(0, full, step):
            store(target, j, load(source, j, like))
        if full < source.size:
            store_tail(target, full, source.size - full, load_tail(source, full, source.size - full, like))

    return convert


def in_lanes(row: Any, room: Any, like: Any) -> Any:
    """View numbers of the lanes' dtype where they are; give a part of `room` for as many of another."""


@overload(in_lanes)
def _in_lanes(row, room, like):
    if row.dtype == like:
        return lambda row, room, like: row
    return lambda row, room, like: cut(room, 0, row.size)
