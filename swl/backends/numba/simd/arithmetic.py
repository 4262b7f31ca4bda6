"""Arithmetic and comparisons of vectors, and their sum and maximum."""

# mypy: ignore-errors
# Numba compiles and types this file itself: the values are vectors and views that Python's types know nothing of.

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.typing import signature
from numba.extending import intrinsic, overload

from swl.backends.numba.simd.vectors import I32, I64, Vector, call, constant, suffix


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


def emit_fma(builder: Any, x: Vector, a: Any, b: Any, c: Any) -> Any:
    """a·b + c of three vectors of the type x, rounded once."""
    return call(builder, f"llvm.fma.{suffix(x.llvm)}", x.llvm, [a, b, c])


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a·b + c, rounded once."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return emit_fma(builder, a, *args)

    return signature(a, a, b, c), codegen


@intrinsic
def zero_where_zero(typingctx: Any, y: Any, product: Any) -> Any:
    """0 where ``y`` is 0, else ``product``: a class without mass adds nothing, even at −inf."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        zero = constant(y, 0.0)
        return builder.select(builder.fcmp_ordered("==", args[0], zero), zero, args[1])

    return signature(y, y, product), codegen


@intrinsic
def drop_below(typingctx: Any, value: Any, least: Any) -> Any:
    """0 where a lane is below `least`, NaN not."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        below = builder.fcmp_ordered("<", *args)
        return builder.select(below, constant(value, 0.0), args[0])

    return signature(value, value, least), codegen


@intrinsic
def product_from(typingctx: Any, value: Any, factor: Any, least: Any) -> Any:
    """value·factor, 0 where a lane of `value` is below `least`; a NaN is not."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value_, factor_, least_ = args
        below = builder.fcmp_ordered("<", value_, least_)
        return builder.select(below, constant(value, 0.0), builder.fmul(value_, factor_))

    return signature(value, value, factor, least), codegen


def _search(emit: Any) -> Any:
    """Make an intrinsic that gives the first lane in which two vectors compare so; `lanes` if there is none."""

    @intrinsic
    def op(typingctx: Any, a: Any, b: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            bits = ir.IntType(a.lanes)
            found = builder.zext(builder.bitcast(emit(builder, *args), bits), I64)
            stop = builder.or_(found, I64(1 << a.lanes))
            return builder.cttz(stop, ir.IntType(1)(1))

        return signature(types.intp, a, b), codegen

    return op


first_equal = _search(lambda builder, a, b: builder.fcmp_ordered("==", a, b))
first_nan = _search(lambda builder, a, b: builder.fcmp_unordered("uno", a, b))


def _reduction(emit: Any) -> Any:
    """Make an intrinsic that folds a vector in halves."""

    @intrinsic
    def op(typingctx: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            (v,) = args
            n = value.lanes
            while n > 1:
                n //= 2
                low, high = (ir.Constant(ir.VectorType(I32, n), list(range(s, s + n))) for s in (0, n))
                v = emit(builder, builder.shuffle_vector(v, v, low), builder.shuffle_vector(v, v, high))
            return builder.extract_element(v, I32(0))

        return signature(value.lane, value), codegen

    return op


sum_lanes = _reduction(lambda builder, a, b: builder.fadd(a, b))
max_lanes = _reduction(lambda builder, a, b: builder.select(builder.fcmp_ordered("<", a, b), b, a))
