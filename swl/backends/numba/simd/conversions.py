"""Half precision and bfloat16 to lanes of float32 and back, to the same bits on every processor."""

# mypy: ignore-errors
# Numba compiles and types this file itself: the values are vectors and views that Python's types know nothing of.

from __future__ import annotations

from functools import partial, reduce
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target

from swl.backends.numba.simd.vectors import I16, I32, Normal, Vector, call, constant

REGISTER = 16
"""Lanes of float32 in a register of AVX-512."""
SUBNORMAL = I32(0x20)
"""The class of numbers that `vfpclassps` looks for."""


def has(context: Any, feature: str) -> bool:
    """Return whether the processor compiled for is one of x86-64 with this extension."""
    return f"+{feature}" in context.codegen().magic_tuple()[2].split(",")


def _converts(context: Any) -> bool:
    """Return whether half precision is converted by instructions, as on all 64-bit ARM; else LLVM calls what nobody links."""
    return context.codegen().magic_tuple()[0].startswith(("aarch64", "arm64")) or has(context, "f16c")


def reads_halves() -> bool:
    """Return whether kernels are to read and write 16-bit memory: where its numbers are converted a vector at a time."""
    context = cpu_target.target_context
    return _converts(context) and (has(context, "avx2") or not has(context, "sse2"))


def _whole_numbers(vector: Vector, n: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(I32, vector.lanes), [n] * vector.lanes)


def _half_to_single(builder: Any, raw: Any, vector: Vector) -> Any:
    """Convert half to single precision without an instruction for it, to the same bits."""
    const = partial(_whole_numbers, vector)
    h = builder.zext(raw, const(0).type)
    size = builder.and_(h, const(0x7FFF))
    fields = builder.shl(size, const(13))
    normal = builder.add(fields, const((127 - 15) << 23))
    infinite = builder.or_(fields, const(0x7F800000))
    quiet = builder.or_(infinite, const(0x00400000))  # NaN
    tiny = builder.fmul(builder.sitofp(size, vector.llvm), constant(vector, 2.0**-24))  # exact, never subnormal itself
    bits = builder.select(builder.icmp_signed("<=", size, const(0x7C00)), infinite, quiet)
    bits = builder.select(builder.icmp_signed("<", size, const(0x7C00)), normal, bits)
    bits = builder.select(builder.icmp_signed("<", size, const(0x0400)), builder.bitcast(tiny, bits.type), bits)
    sign = builder.shl(builder.and_(h, const(0x8000)), const(16))
    return builder.bitcast(builder.or_(bits, sign), vector.llvm)


def _single_to_half(builder: Any, value: Any, vector: Vector) -> Any:
    """Round single to half precision without an instruction for it, to the same bits."""
    const = partial(_whole_numbers, vector)
    bits = builder.bitcast(value, const(0).type)
    size = builder.and_(bits, const(0x7FFFFFFF))
    fields = builder.lshr(size, const(13))
    odd = builder.and_(fields, const(1))
    normal = builder.lshr(builder.add(builder.add(size, odd), const(0xFFF - ((127 - 15) << 23))), const(13))
    quiet = builder.or_(builder.and_(fields, const(0x3FF)), const(0x7E00))  # NaN
    # the spacing of numbers from 0.5 on is that of the subnormal ones, so the sum is rounded as they are
    half = constant(vector, 0.5)
    sum_ = builder.fadd(builder.bitcast(size, vector.llvm), half)
    tiny = builder.sub(builder.bitcast(sum_, bits.type), builder.bitcast(half, bits.type))
    h = builder.select(builder.icmp_signed("<=", size, const(0x7F800000)), const(0x7C00), quiet)
    h = builder.select(builder.icmp_signed("<", size, const((127 + 16) << 23)), normal, h)
    h = builder.select(builder.icmp_signed("<", size, const((127 - 14) << 23)), tiny, h)
    sign = builder.and_(builder.lshr(bits, const(16)), const(0x8000))
    return builder.trunc(builder.or_(h, sign), ir.VectorType(I16, vector.lanes))


def _single_to_bfloat(builder: Any, value: Any, vector: Vector) -> Any:
    """Round single precision to bfloat16 by integers."""
    const = partial(_whole_numbers, vector)
    bits = builder.bitcast(value, const(0).type)
    even = builder.and_(builder.lshr(bits, const(16)), const(1))
    rounded = builder.lshr(builder.add(bits, builder.add(even, const(0x7FFF))), const(16))
    quiet = builder.or_(builder.lshr(bits, const(16)), const(0x40))  # rounding must not turn a NaN into an inf
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(is_nan, quiet, rounded), ir.VectorType(I16, vector.lanes))


def _registers(builder: Any, value: Any) -> list[Any]:
    """Cut a vector of float32 into registers of AVX-512."""
    indices = [list(range(start, start + REGISTER)) for start in range(0, value.type.count, REGISTER)]
    return [builder.shuffle_vector(value, value, ir.Constant(ir.VectorType(I32, REGISTER), lanes)) for lanes in indices]


def _joined(builder: Any, a: Any, b: Any) -> Any:
    """Put the lanes of one vector after those of another."""
    lanes = list(range(a.type.count + b.type.count))
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def _normal_to_bfloat(builder: Any, value: Any) -> Any:
    """Round single precision to bfloat16 by `vcvtneps2bf16`: to the same bits, but for subnormal numbers, which it takes as 0."""
    kind, name = ir.VectorType(I16, REGISTER), "llvm.x86.avx512bf16.cvtneps2bf16.512"
    return reduce(partial(_joined, builder), [call(builder, name, kind, [x]) for x in _registers(builder, value)])


def _unless_subnormal(builder: Any, rounded: Any, value: Any, vector: Vector) -> Any:
    """Take the vector that `value` was rounded to, but round by integers where it has a subnormal number."""
    kind, name = ir.VectorType(ir.IntType(1), REGISTER), "llvm.x86.avx512.fpclass.ps.512"
    classes = [call(builder, name, kind, [x, SUBNORMAL]) for x in _registers(builder, value)]
    found = builder.bitcast(reduce(builder.or_, classes), ir.IntType(REGISTER))
    before = builder.block
    with builder.if_then(builder.icmp_unsigned("!=", found, found.type(0)), likely=False):
        by_integers, aside = _single_to_bfloat(builder, value, vector), builder.block
    result = builder.phi(rounded.type)
    result.add_incoming(rounded, before)
    result.add_incoming(by_integers, aside)
    return result


def to_lanes(context: Any, builder: Any, raw: Any, dtype: Any, vector: Vector) -> Any:
    """Convert a vector in memory's type to lanes."""
    if dtype == vector.lane:
        return raw
    if vector.lane != types.float32:
        raise NotImplementedError(f"load of {dtype} as {vector.lane}")
    if dtype == types.uint16:
        if not _converts(context):
            return _half_to_single(builder, raw, vector)
        return builder.fpext(builder.bitcast(raw, ir.VectorType(ir.HalfType(), vector.lanes)), vector.llvm)
    if dtype == types.int16:
        sixteen = _whole_numbers(vector, 16)
        return builder.bitcast(builder.shl(builder.zext(raw, sixteen.type), sixteen), vector.llvm)
    raise NotImplementedError(f"load of {dtype}")


def from_lanes(context: Any, builder: Any, value: Any, dtype: Any, kind: Vector | Normal) -> Any:
    """Convert lanes to memory's type, rounding to nearest even."""
    vector = kind.vector if isinstance(kind, Normal) else kind
    if dtype == vector.lane:
        return value
    if vector.lane != types.float32:
        raise NotImplementedError(f"store of {vector.lane} to {dtype}")
    if dtype == types.uint16:
        if not _converts(context):
            return _single_to_half(builder, value, vector)
        half = builder.fptrunc(value, ir.VectorType(ir.HalfType(), vector.lanes))
        return builder.bitcast(half, ir.VectorType(I16, vector.lanes))
    if dtype == types.int16:
        if not has(context, "avx512bf16"):
            return _single_to_bfloat(builder, value, vector)
        rounded = _normal_to_bfloat(builder, value)
        return rounded if isinstance(kind, Normal) else _unless_subnormal(builder, rounded, value, vector)
    raise NotImplementedError(f"store to {dtype}")
