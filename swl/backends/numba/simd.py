"""Explicit SIMD vectors for Numba: what the CPU kernels are written in.

A `Vector` is an LLVM vector of float32 or float64 lanes, so nothing depends on the auto-vectoriser: accumulators stay in
registers, every sum has one fixed order, and LLVM maps a vector to as many registers as the machine needs (AVX-512, AVX2,
NEON alike). No fast-math flag is used anywhere: NaN and ±inf mean what IEEE 754 says, and fused multiply-adds happen
exactly where `fma` is written. So the same code gives the same bits wherever it is inlined.

Memory may hold other types than the lanes; `load` and `store` convert:

===============  ===========================================================
array dtype      meaning
===============  ===========================================================
float32/float64  themselves
uint16           IEEE half precision (float16 arrays come as their bits)
int16            bfloat16 (likewise)
===============  ===========================================================
"""

# mypy: ignore-errors
# Numba compiles and types this file itself: the values are vectors and views that Python's types know nothing of.

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import register_default
from numba.core.datamodel.models import PrimitiveModel, StructModel
from numba.core.imputils import impl_ret_borrowed
from numba.core.registry import cpu_target
from numba.core.typing import signature
from numba.extending import intrinsic, make_attribute_wrapper, overload

BYTES = 128
"""Size of a vector. Two AVX-512 registers: 64 leaves latency exposed, 256 spills (docs/performance.md)."""

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_HALF = ir.HalfType()


class Vector(types.Type):
    """The Numba type of a vector with lanes of the scalar type `lane`."""

    def __init__(self, lane: types.Float) -> None:
        self.lane = lane
        self.lanes = BYTES * 8 // lane.bitwidth
        super().__init__(name=f"Vector({lane}, {self.lanes})")

    @property
    def llvm(self) -> ir.VectorType:
        return ir.VectorType(ir.FloatType() if self.lane.bitwidth == 32 else ir.DoubleType(), self.lanes)

    @property
    def bits(self) -> ir.VectorType:
        return ir.VectorType(ir.IntType(self.lane.bitwidth), self.lanes)


@register_default(Vector)
class _VectorModel(PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm)


class Row(types.Type):
    """The Numba type of a contiguous one-dimensional view: pointer and size.

    Arrays passed to inner functions are reference-counted inside the loops; a view is not, and lives no longer than the
    array it was taken from. That must be an argument of the kernel: what a kernel allocated itself would be freed before.
    """

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        super().__init__(name=f"Row({dtype})")


@register_default(Row)
class _RowModel(StructModel):
    def __init__(self, dmm: Any, fe_type: Row) -> None:
        super().__init__(dmm, fe_type, [("data", types.CPointer(fe_type.dtype)), ("size", types.intp)])


make_attribute_wrapper(Row, "size", "size")


def _view(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """View a one-dimensional C-ordered array, or row `index` of a two-dimensional one."""
    if array_type.layout != "C":
        raise TypeError(f"a Row must be contiguous, got an array of layout {array_type.layout!r}")
    view = context.make_array(array_type)(context, builder, array)
    shape = cgutils.unpack_tuple(builder, view.shape, array_type.ndim)
    made = cgutils.create_struct_proxy(Row(array_type.dtype))(context, builder)
    made.data = builder.gep(view.data, [builder.mul(index, shape[-1])])
    made.size = shape[-1]
    return made._getvalue()


@intrinsic
def read_only(typingctx: Any, array: Any) -> Any:
    """See an array as one that is not written to: the type that the kernels take their operands as."""
    seen = array.copy(readonly=True)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return impl_ret_borrowed(context, builder, sig.return_type, args[0])

    return signature(seen, array), codegen


@intrinsic
def row_of(typingctx: Any, array: Any, n: Any) -> Any:
    """View ``array[n]`` of a two-dimensional array."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _view(context, builder, array, *args)

    return signature(Row(array.dtype), array, types.intp), codegen


@intrinsic
def from_row(typingctx: Any, array: Any, n: Any) -> Any:
    """View a two-dimensional array from the beginning of row n to its end."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        view = context.make_array(array)(context, builder, args[0])
        rows, columns = cgutils.unpack_tuple(builder, view.shape, 2)
        skipped = builder.mul(args[1], columns)
        made = cgutils.create_struct_proxy(Row(array.dtype))(context, builder)
        made.data = builder.gep(view.data, [skipped])
        made.size = builder.sub(builder.mul(rows, columns), skipped)
        return made._getvalue()

    return signature(Row(array.dtype), array, types.intp), codegen


@intrinsic
def part(typingctx: Any, array: Any, start: Any, size: Any) -> Any:
    """View ``array[start : start + size]`` of a one-dimensional array."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        made = cgutils.create_struct_proxy(Row(array.dtype))(context, builder)
        made.data = builder.gep(context.make_array(array)(context, builder, args[0]).data, [args[1]])
        made.size = args[2]
        return made._getvalue()

    return signature(Row(array.dtype), array, types.intp, types.intp), codegen


@intrinsic
def cut(typingctx: Any, row: Any, start: Any, size: Any) -> Any:
    """View ``row[start : start + size]`` of a view."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        made = cgutils.create_struct_proxy(row)(context, builder)
        made.data = _element(builder, *args[:2])
        made.size = args[2]
        return made._getvalue()

    return signature(row, row, types.intp, types.intp), codegen


@intrinsic
def address_in(typingctx: Any, array: Any, index: Any) -> Any:
    """Point to ``array[index]`` of a one-dimensional array, for `numba.carray`: an array that nobody counts or frees."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        data = context.make_array(array)(context, builder, args[0]).data
        return builder.bitcast(builder.gep(data, [args[1]]), cgutils.voidptr_t)

    return signature(types.voidptr, array, types.intp), codegen


@intrinsic
def whole(typingctx: Any, array: Any) -> Any:
    """View a one-dimensional array."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _view(context, builder, array, args[0], _I64(0))

    return signature(Row(array.dtype), array), codegen


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


def _vector_of(dtype: Any) -> Vector:
    """Lanes for a scalar type."""
    return Vector(types.float64 if dtype == types.float64 else types.float32)


def _constant(vector: Vector, values: Any) -> ir.Constant:
    element = vector.llvm.element
    if not isinstance(values, (list, tuple)):
        values = [values] * vector.lanes
    return ir.Constant(vector.llvm, [ir.Constant(element, v) for v in values])


def _splat(builder: Any, value: Any, lanes: int) -> Any:
    one = builder.insert_element(ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes))


def _call(builder: Any, name: str, result: Any, args: list[Any]) -> Any:
    fnty = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, fnty, name), args)


def _suffix(vector: ir.VectorType) -> str:
    element = {"float": "f32", "double": "f64", "half": "f16", "i8": "i8", "i16": "i16", "i32": "i32", "i64": "i64"}
    return f"v{vector.count}{element[str(vector.element)]}"


def _has(context: Any, feature: str) -> bool:
    """Return whether the processor compiled for is one of x86-64 with this extension."""
    return f"+{feature}" in context.codegen().magic_tuple()[2].split(",")


def _converts(context: Any) -> bool:
    """Return whether half precision is converted by instructions, as on all 64-bit ARM; else LLVM calls what nobody links."""
    return context.codegen().magic_tuple()[0].startswith(("aarch64", "arm64")) or _has(context, "f16c")


def reads_halves() -> bool:
    """Return whether kernels are to read and write 16-bit memory: where its numbers are converted a vector at a time."""
    context = cpu_target.target_context
    return _converts(context) and (_has(context, "avx2") or not _has(context, "sse2"))


# ------------------------------------------------------------------------------------------- making vectors


@intrinsic
def splat(typingctx: Any, value: Any) -> Any:
    """Make a vector of one scalar."""
    vector = _vector_of(value)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _splat(builder, args[0], vector.lanes)

    return signature(vector, value), codegen


@intrinsic
def lanes(typingctx: Any, value: Any) -> Any:
    """Count the lanes of a vector for a scalar of this type."""
    count = _vector_of(value).lanes

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return context.get_constant(types.intp, count)

    return signature(types.intp, value), codegen


@intrinsic
def scalar(typingctx: Any, like: Any, value: Any) -> Any:
    """Give `value` as a scalar of the type of `like`: Numba's own arithmetic would widen float32 to float64."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return context.cast(builder, args[1], value, like)

    return signature(like, like, value), codegen


def _whole_numbers(vector: Vector, n: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(_I32, vector.lanes), [n] * vector.lanes)


def _half_to_single(builder: Any, raw: Any, vector: Vector) -> Any:
    """Convert half to single precision without an instruction for it, to the same bits."""

    def const(n: int) -> ir.Constant:
        return _whole_numbers(vector, n)

    h = builder.zext(raw, const(0).type)
    size = builder.and_(h, const(0x7FFF))
    fields = builder.shl(size, const(13))
    normal = builder.add(fields, const((127 - 15) << 23))
    infinite = builder.or_(fields, const(0x7F800000))
    quiet = builder.or_(infinite, const(0x00400000))  # NaN
    tiny = builder.fmul(
        builder.sitofp(size, vector.llvm), _constant(vector, 2.0**-24)
    )  # exact, and never subnormal itself
    bits = builder.select(builder.icmp_signed("<=", size, const(0x7C00)), infinite, quiet)
    bits = builder.select(builder.icmp_signed("<", size, const(0x7C00)), normal, bits)
    bits = builder.select(builder.icmp_signed("<", size, const(0x0400)), builder.bitcast(tiny, bits.type), bits)
    sign = builder.shl(builder.and_(h, const(0x8000)), const(16))
    return builder.bitcast(builder.or_(bits, sign), vector.llvm)


def _single_to_half(builder: Any, value: Any, vector: Vector) -> Any:
    """Round single to half precision without an instruction for it, to the same bits."""

    def const(n: int) -> ir.Constant:
        return _whole_numbers(vector, n)

    bits = builder.bitcast(value, const(0).type)
    size = builder.and_(bits, const(0x7FFFFFFF))
    fields = builder.lshr(size, const(13))
    odd = builder.and_(fields, const(1))
    normal = builder.lshr(builder.add(builder.add(size, odd), const(0xFFF - ((127 - 15) << 23))), const(13))
    quiet = builder.or_(builder.and_(fields, const(0x3FF)), const(0x7E00))  # NaN
    # the spacing of numbers from 0.5 on is that of the subnormal ones, so the sum is rounded as they are
    half = _constant(vector, 0.5)
    sum_ = builder.fadd(builder.bitcast(size, vector.llvm), half)
    tiny = builder.sub(builder.bitcast(sum_, bits.type), builder.bitcast(half, bits.type))
    h = builder.select(builder.icmp_signed("<=", size, const(0x7F800000)), const(0x7C00), quiet)
    h = builder.select(builder.icmp_signed("<", size, const((127 + 16) << 23)), normal, h)
    h = builder.select(builder.icmp_signed("<", size, const((127 - 14) << 23)), tiny, h)
    sign = builder.and_(builder.lshr(bits, const(16)), const(0x8000))
    return builder.trunc(builder.or_(h, sign), ir.VectorType(_I16, vector.lanes))


def _to_lanes(context: Any, builder: Any, raw: Any, dtype: Any, vector: Vector) -> Any:
    """Convert a vector in memory's type to lanes."""
    if dtype == vector.lane:
        return raw
    if vector.lane != types.float32:
        raise NotImplementedError(f"load of {dtype} as {vector.lane}")
    if dtype == types.uint16:
        if not _converts(context):
            return _half_to_single(builder, raw, vector)
        return builder.fpext(builder.bitcast(raw, ir.VectorType(_HALF, vector.lanes)), vector.llvm)
    if dtype == types.int16:
        sixteen = _whole_numbers(vector, 16)
        return builder.bitcast(builder.shl(builder.zext(raw, sixteen.type), sixteen), vector.llvm)
    raise NotImplementedError(f"load of {dtype}")


def _from_lanes(context: Any, builder: Any, value: Any, dtype: Any, vector: Vector) -> Any:
    """Convert lanes to memory's type, rounding to nearest even."""
    if dtype == vector.lane:
        return value
    if vector.lane != types.float32:
        raise NotImplementedError(f"store of {vector.lane} to {dtype}")
    if dtype == types.uint16:
        if not _converts(context):
            return _single_to_half(builder, value, vector)
        half = builder.fptrunc(value, ir.VectorType(_HALF, vector.lanes))
        return builder.bitcast(half, ir.VectorType(_I16, vector.lanes))
    if dtype == types.int16:

        def const(n: int) -> ir.Constant:
            return _whole_numbers(vector, n)

        bits = builder.bitcast(value, const(0).type)
        even = builder.and_(builder.lshr(bits, const(16)), const(1))
        rounded = builder.lshr(builder.add(bits, builder.add(even, const(0x7FFF))), const(16))
        quiet = builder.or_(builder.lshr(bits, const(16)), const(0x40))  # rounding must not turn a NaN into an inf
        is_nan = builder.fcmp_unordered("uno", value, value)
        return builder.trunc(builder.select(is_nan, quiet, rounded), ir.VectorType(_I16, vector.lanes))
    raise NotImplementedError(f"store to {dtype}")


def _memory_type(context: Any, dtype: Any) -> Any:
    return context.get_data_type(dtype)


def _element(builder: Any, row: Any, index: Any) -> Any:
    """Point to ``row[index]``."""
    return builder.gep(builder.extract_value(row, 0), [index])


def _align(dtype: Any) -> int:
    return max(1, getattr(dtype, "bitwidth", 8) // 8)


@intrinsic
def load(typingctx: Any, row: Any, start: Any, like: Any) -> Any:
    """Load ``row[start : start + lanes]`` as lanes of the type of the scalar `like`."""
    vector = _vector_of(like)
    sig = signature(vector, row, types.intp, like)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array, start, _ = args
        raw_type = ir.VectorType(_memory_type(context, row.dtype), vector.lanes)
        pointer = _element(builder, array, start)
        raw = builder.load(builder.bitcast(pointer, raw_type.as_pointer()), align=_align(row.dtype))
        return _to_lanes(context, builder, raw, row.dtype, vector)

    return sig, codegen


def _mask(builder: Any, count: Any, n: int) -> Any:
    """First `count` lanes."""
    index = ir.Constant(ir.VectorType(_I32, n), list(range(n)))
    return builder.icmp_signed("<", index, _splat(builder, builder.trunc(count, _I32), n))


def _on_the_stack(context: Any, builder: Any, raw_type: Any, dtype: Any) -> Any:
    """Make room for a vector of which only a part is moved, by `memcpy`; None where memory's type has masked moves of its own."""
    if dtype.bitwidth > 16 or _has(context, "avx512bw"):
        return None
    return cgutils.alloca_once_value(builder, ir.Constant(raw_type, None))


@intrinsic
def load_tail(typingctx: Any, row: Any, start: Any, count: Any, fill: Any) -> Any:
    """Load ``row[start : start + count]``, ``0 < count < lanes``, and put `fill` into the other lanes."""
    vector = _vector_of(fill)
    sig = signature(vector, row, types.intp, types.intp, fill)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array, start, count, fill = args
        raw_type = ir.VectorType(_memory_type(context, row.dtype), vector.lanes)
        mask = _mask(builder, count, vector.lanes)
        pointer = builder.bitcast(_element(builder, array, start), raw_type.as_pointer())
        if (copied := _on_the_stack(context, builder, raw_type, row.dtype)) is None:
            name = f"llvm.masked.load.{_suffix(raw_type)}.p0"
            raw = _call(builder, name, raw_type, [pointer, _I32(_align(row.dtype)), mask, ir.Constant(raw_type, None)])
        else:
            cgutils.raw_memcpy(builder, copied, pointer, count, _align(row.dtype))
            raw = builder.load(copied)
        return builder.select(
            mask, _to_lanes(context, builder, raw, row.dtype, vector), _splat(builder, fill, vector.lanes)
        )

    return sig, codegen


LINE = 64
"""Bytes of a cache line, and the alignment that `store_stream` asks for."""


def _storing(stream: bool) -> Any:
    """Make an intrinsic that stores all lanes to ``row[start : start + lanes]``, rounded once."""

    @intrinsic
    def op(typingctx: Any, row: Any, start: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            raw = _from_lanes(context, builder, args[2], row.dtype, value)
            pointer = builder.bitcast(_element(builder, args[0], args[1]), raw.type.as_pointer())
            stored = builder.store(raw, pointer, align=LINE if stream else _align(row.dtype))
            if stream:
                stored.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))
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
        address = builder.ptrtoint(_element(builder, args[0], args[1]), _I64)
        missing = builder.and_(builder.neg(address), _I64(LINE - 1))
        return builder.udiv(missing, _I64(_align(row.dtype)))

    return signature(types.intp, row, types.intp), codegen


@intrinsic
def store_tail(typingctx: Any, row: Any, start: Any, count: Any, value: Any) -> Any:
    """Store the first `count` lanes to ``row[start : start + count]``, rounded once."""
    sig = signature(types.void, row, types.intp, types.intp, value)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array, start, count, lanes_ = args
        raw = _from_lanes(context, builder, lanes_, row.dtype, value)
        pointer = builder.bitcast(_element(builder, array, start), raw.type.as_pointer())
        if (copied := _on_the_stack(context, builder, raw.type, row.dtype)) is not None:
            builder.store(raw, copied)
            cgutils.raw_memcpy(builder, pointer, copied, count, _align(row.dtype))
            return context.get_dummy_value()
        mask = _mask(builder, count, value.lanes)
        name = f"llvm.masked.store.{_suffix(raw.type)}.p0"
        _call(builder, name, ir.VoidType(), [raw, pointer, _I32(_align(row.dtype)), mask])
        return context.get_dummy_value()

    return sig, codegen


@intrinsic
def item(typingctx: Any, row: Any, index: Any) -> Any:
    """Give the number ``row[index]``."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(_element(builder, *args))

    return signature(row.dtype, row, types.intp), codegen


@intrinsic
def set_item(typingctx: Any, row: Any, index: Any, value: Any) -> Any:
    """``row[index] = value``."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[2], _element(builder, *args[:2]))
        return context.get_dummy_value()

    return signature(types.void, row, types.intp, row.dtype), codegen


@intrinsic
def fill_zero(typingctx: Any, row: Any) -> Any:
    """``row[:] = 0``."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        data, size = (builder.extract_value(args[0], i) for i in range(2))
        cgutils.memset(builder, data, builder.mul(size, _I64(_align(row.dtype))), 0)
        return context.get_dummy_value()

    return signature(types.void, row), codegen


def _elements(builder: Any, row: Any, start: Any, stride: Any, n: int) -> Any:
    """Point to ``row[start + i·stride]`` from each of n lanes."""
    many = ir.VectorType(_I64, n)
    steps = builder.mul(ir.Constant(many, list(range(n))), _splat(builder, stride, n))
    base = _element(builder, row, start)
    pointers = builder.gep(base, [steps], source_etype=base.type.pointee)
    pointers.type = ir.VectorType(base.type, n)  # of what it gives for a vector of indices
    return pointers


@intrinsic
def gather(typingctx: Any, row: Any, start: Any, stride: Any, count: Any, like: Any) -> Any:
    """Load ``row[start + i·stride]`` into lane i, for the first `count` lanes; 0 into the others. `row` has the lanes' dtype."""
    vector = _vector_of(like)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointers = _elements(builder, *args[:3], vector.lanes)
        mask = _mask(builder, args[3], vector.lanes)
        name = f"llvm.masked.gather.{_suffix(vector.llvm)}.v{vector.lanes}p0"
        return _call(
            builder, name, vector.llvm, [pointers, _I32(_align(row.dtype)), mask, ir.Constant(vector.llvm, None)]
        )

    return signature(vector, row, types.intp, types.intp, types.intp, like), codegen


@intrinsic
def scatter(typingctx: Any, row: Any, start: Any, stride: Any, count: Any, value: Any) -> Any:
    """Store lane i to ``row[start + i·stride]``, for the first `count` lanes. `row` has the lanes' dtype."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointers = _elements(builder, *args[:3], value.lanes)
        mask = _mask(builder, args[3], value.lanes)
        name = f"llvm.masked.scatter.{_suffix(value.llvm)}.v{value.lanes}p0"
        _call(builder, name, ir.VoidType(), [args[4], pointers, _I32(_align(row.dtype)), mask])
        return context.get_dummy_value()

    return signature(types.void, row, types.intp, types.intp, types.intp, value), codegen


# ------------------------------------------------------------------------------------------- arithmetic


@intrinsic
def prefetch(typingctx: Any, row: Any, start: Any, like: Any) -> Any:
    """Fetch the cache lines of a vector that will be read; past the end of the array it is harmless."""
    size = _vector_of(like).lanes * _align(row.dtype)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = builder.bitcast(_element(builder, args[0], args[1]), ir.IntType(8).as_pointer())
        fnty = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
        fn = cgutils.get_or_insert_function(builder.module, fnty, "llvm.prefetch.p0")
        read, into_l2, data = _I32(0), _I32(2), _I32(1)
        for offset in range(0, size, LINE):
            builder.call(fn, [builder.gep(pointer, [_I64(offset)]), read, into_l2, data])
        return context.get_dummy_value()

    return signature(types.void, row, types.intp, like), codegen


def _lanewise(emit: Any) -> Any:
    """Make an intrinsic of two vectors from what the builder emits."""

    @intrinsic
    def op(typingctx: Any, a: Any, b: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return emit(builder, *args)

        return signature(a, a, b), codegen

    return op


_add = _lanewise(lambda builder, a, b: builder.fadd(a, b))
_sub = _lanewise(lambda builder, a, b: builder.fsub(a, b))
_mul = _lanewise(lambda builder, a, b: builder.fmul(a, b))
_div = _lanewise(lambda builder, a, b: builder.fdiv(a, b))
maximum = _lanewise(lambda builder, a, b: builder.select(builder.fcmp_ordered("<", a, b), b, a))
"""b where a < b, else a: a NaN in `b` is dropped, a NaN in `a` stays."""


def _operator(symbol: Any, op: Any) -> None:
    @overload(symbol)
    def impl(a, b):  # Numba compares this signature with the lambda's
        if isinstance(a, Vector) and isinstance(b, Vector):
            return lambda a, b: op(a, b)
        return None


for _symbol, _op in ((operator.add, _add), (operator.sub, _sub), (operator.mul, _mul), (operator.truediv, _div)):
    _operator(_symbol, _op)


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a·b + c, rounded once."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _fma(builder, a, *args)

    return signature(a, a, b, c), codegen


@intrinsic
def zero_where_zero(typingctx: Any, y: Any, product: Any) -> Any:
    """0 where ``y`` is 0, else ``product``: a class without mass adds nothing, even at −inf."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        zero = _constant(y, 0.0)
        return builder.select(builder.fcmp_ordered("==", args[0], zero), zero, args[1])

    return signature(y, y, product), codegen


@intrinsic
def keep(typingctx: Any, value: Any, count: Any, fill: Any) -> Any:
    """Put `fill` into the lanes from `count` on."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        n = value.lanes
        return builder.select(_mask(builder, args[1], n), args[0], _splat(builder, args[2], n))

    return signature(value, value, types.intp, fill), codegen


def _search(emit: Any) -> Any:
    """Make an intrinsic that gives the first lane in which two vectors compare so; `lanes` if there is none."""

    @intrinsic
    def op(typingctx: Any, a: Any, b: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            bits = ir.IntType(a.lanes)
            found = builder.zext(builder.bitcast(emit(builder, *args), bits), _I64)
            stop = builder.or_(found, _I64(1 << a.lanes))
            return builder.cttz(stop, ir.IntType(1)(1))

        return signature(types.intp, a, b), codegen

    return op


first_equal = _search(lambda builder, a, b: builder.fcmp_ordered("==", a, b))
first_nan = _search(lambda builder, a, b: builder.fcmp_unordered("uno", a, b))


@intrinsic
def drop_below(typingctx: Any, value: Any, least: Any) -> Any:
    """0 where a lane is below `least`, NaN not."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        below = builder.fcmp_ordered("<", *args)
        return builder.select(below, _constant(value, 0.0), args[0])

    return signature(value, value, least), codegen


@intrinsic
def product_from(typingctx: Any, value: Any, factor: Any, least: Any) -> Any:
    """value·factor, 0 where a lane of `value` is below `least`; a NaN is not."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value_, factor_, least_ = args
        below = builder.fcmp_ordered("<", value_, least_)
        return builder.select(below, _constant(value, 0.0), builder.fmul(value_, factor_))

    return signature(value, value, factor, least), codegen


@intrinsic
def set_lane(typingctx: Any, value: Any, lane: Any, scalar: Any) -> Any:
    """Replace one lane."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.insert_element(args[0], args[2], builder.trunc(args[1], _I32))

    return signature(value, value, types.intp, value.lane), codegen


@intrinsic
def first_lane(typingctx: Any, value: Any) -> Any:
    """Take lane 0."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.extract_element(args[0], _I32(0))

    return signature(value.lane, value), codegen


def _reduction(emit: Any) -> Any:
    """Make an intrinsic that folds a vector in halves."""

    @intrinsic
    def op(typingctx: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            (v,) = args
            n = value.lanes
            while n > 1:
                n //= 2
                low, high = (ir.Constant(ir.VectorType(_I32, n), list(range(s, s + n))) for s in (0, n))
                v = emit(builder, builder.shuffle_vector(v, v, low), builder.shuffle_vector(v, v, high))
            return builder.extract_element(v, _I32(0))

        return signature(value.lane, value), codegen

    return op


sum_lanes = _reduction(lambda builder, a, b: builder.fadd(a, b))
max_lanes = _reduction(lambda builder, a, b: builder.select(builder.fcmp_ordered("<", a, b), b, a))


# ------------------------------------------------------------------------------------------- exp and tanh

# exp(x) = 2^n · e^r with n = round(x / ln 2) and r = x − n·ln 2 in [−ln 2/2, ln 2/2]. Adding `magic` rounds x / ln 2 to an
# integer that stands in the low bits of the sum, offset so that one shift makes the float 2^(n + bias) of it: `bias` keeps
# that a normal number down to the smallest result, and the last multiplication takes it away again and rounds once where the
# result is subnormal. The polynomials 1 + r + r²·poly(r) are minimax in relative error (3e-9 and 4e-18), by Remez exchange.
_EXP = {
    32: {
        "low": -104.66522426455174,  # −(offset + bias)·ln 2, where the bits of 2^(n + bias) are 0
        "magic": 1.5 * 2.0**23,
        "offset": 127,
        "bias": 24,
        "mantissa": 23,
        "ln2": (0.693145751953125, 1.428606765330187e-06),
        "poly": (0.0013814540176919471, 0.00836874510888554, 0.041668390783542376, 0.16666520399043, 0.4999999343212932),
    },
    64: {
        "low": -746.5195134630611,
        "magic": 1.5 * 2.0**52,
        "offset": 1023,
        "bias": 54,
        "mantissa": 52,
        "ln2": (0.693147180369123816490, 1.90821492927058770002e-10),
        "poly": (
            2.500001883327381e-08, 2.7630306250176643e-07, 2.7557586803894454e-06, 2.480149294963417e-05,
            0.00019841269505773776, 0.0013888888943759965, 0.008333333333494976, 0.041666666666529725,
            0.1666666666666641, 0.5000000000000011,
        ),
    },
}  # fmt: skip


def _fma(builder: Any, x: Vector, a: Any, b: Any, c: Any) -> Any:
    return _call(builder, f"llvm.fma.{_suffix(x.llvm)}", x.llvm, [a, b, c])


def _emit_exp(builder: Any, x: Vector, value: Any) -> Any:
    """Two factors of e^x · 2^bias; the second is exactly 0 from `low` down."""
    k = _EXP[x.lane.bitwidth]
    low = _constant(x, k["low"])
    value = builder.select(builder.fcmp_ordered("<", value, low), low, value)  # a NaN stays
    magic = _constant(x, k["magic"] + k["offset"] + k["bias"])
    t = _fma(builder, x, value, _constant(x, 1.4426950408889634), magic)
    n = builder.fsub(t, magic)
    r = _fma(builder, x, n, _constant(x, -k["ln2"][0]), value)
    r = _fma(builder, x, n, _constant(x, -k["ln2"][1]), r)
    p = _constant(x, k["poly"][0])
    for c in (*k["poly"][1:], 1.0, 1.0):
        p = _fma(builder, x, p, r, _constant(x, c))
    shift = ir.Constant(x.bits, [k["mantissa"]] * x.lanes)
    return p, builder.bitcast(builder.shl(builder.bitcast(t, x.bits), shift), x.llvm)


@intrinsic
def exp_parts(typingctx: Any, x: Any) -> Any:
    """Two factors of e^x divided by `exp_unit`, for x up to 40: never subnormal, which would cost a hundred cycles a vector."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return context.make_tuple(builder, sig.return_type, _emit_exp(builder, x, args[0]))

    return signature(types.UniTuple(x, 2), x), codegen


@intrinsic
def exp_unit(typingctx: Any, like: Any) -> Any:
    """Give the power of two that brings `exp_parts` back to e^x, as a scalar of the type of `like`."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return context.get_constant(like, 2.0 ** -_EXP[like.bitwidth]["bias"])

    return signature(like, like), codegen


@intrinsic
def exp_nonpositive(typingctx: Any, x: Any) -> Any:
    """e^x for x ≤ 0, −inf and NaN included, within 1 ulp, subnormal results too."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        unit = _constant(x, 2.0 ** -_EXP[x.lane.bitwidth]["bias"])
        return builder.fmul(builder.fmul(*_emit_exp(builder, x, args[0])), unit)

    return signature(x, x), codegen


# tanh(a) = a + a·s·poly(s) with s = a², for a up to `limit`; (1 − e^−2a) / (1 + e^−2a) above. The polynomials interpolate at
# Chebyshev nodes, with a relative error of 5e-10 and 2e-22.
_TANH_LIMIT = 0.1735
_TANH = {
    32: (-0.052994159278727505, 0.13332238010909137, -0.33333331502814584),
    64: (
        0.0005620500340951482, -0.0014544787849986463, 0.003592093666613681, -0.008863235046193753,
        0.021869488532454694, -0.05396825396824006, 0.1333333333333333, -0.3333333333333333,
    ),
}  # fmt: skip


@intrinsic
def tanh(typingctx: Any, x: Any) -> Any:
    """Hyperbolic tangent, within 4 ulp."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        (v,) = args
        suffix = _suffix(x.llvm)
        one = _constant(x, 1.0)
        a = _call(builder, f"llvm.fabs.{suffix}", x.llvm, [v])
        unit = _constant(x, 2.0 ** -_EXP[x.lane.bitwidth]["bias"])
        t = builder.fmul(builder.fmul(*_emit_exp(builder, x, builder.fmul(a, _constant(x, -2.0)))), unit)
        far = builder.fdiv(builder.fsub(one, t), builder.fadd(one, t))
        s = builder.fmul(a, a)
        first, *rest = _TANH[x.lane.bitwidth]
        p = _constant(x, first)
        for c in rest:
            p = _fma(builder, x, p, s, _constant(x, c))
        near = _fma(builder, x, builder.fmul(a, s), p, a)
        # unordered: a NaN takes the polynomial, which hands it on
        result = builder.select(builder.fcmp_unordered("ult", a, _constant(x, _TANH_LIMIT)), near, far)
        return _call(builder, f"llvm.copysign.{suffix}", x.llvm, [result, v])

    return signature(x, x), codegen
