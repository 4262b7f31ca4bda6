"""The vector as a type of Numba's; what LLVM's code for it is built from; scalars to vectors and back."""

# mypy: ignore-errors
# Numba compiles and types this file itself: the values are vectors and views that Python's types know nothing of.

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import register_default
from numba.core.datamodel.models import PrimitiveModel
from numba.core.imputils import lower_cast
from numba.core.typeconv import Conversion
from numba.core.typing import signature
from numba.extending import intrinsic

BYTES = 128
"""Size of a vector. Two AVX-512 registers: 64 leaves latency exposed, 256 spills (docs/performance.md)."""

I16, I32, I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)


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


class Normal(types.Type):
    """The Numba type of a vector without subnormal numbers, to be stored. It has no arithmetic, which might give it some."""

    def __init__(self, vector: Vector) -> None:
        self.vector = vector
        self.lanes = vector.lanes
        super().__init__(name=f"Normal({vector.name})")

    def can_convert_to(self, typingctx: Any, other: Any) -> Any:
        return Conversion.safe if other == self.vector else None


@register_default(Normal)
class _NormalModel(PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Normal) -> None:
        super().__init__(dmm, fe_type, fe_type.vector.llvm)


@lower_cast(Normal, Vector)
def _to_vector(context: Any, builder: Any, normal: Any, vector: Any, value: Any) -> Any:
    return value


def vector_of(dtype: Any) -> Vector:
    """Lanes for a scalar type."""
    return Vector(types.float64 if dtype == types.float64 else types.float32)


# ------------------------------------------------------------------------------------------------ LLVM code for vectors


def constant(vector: Vector, values: Any) -> ir.Constant:
    """Make a constant vector of a number for each lane, or of one for all."""
    element = vector.llvm.element
    if not isinstance(values, (list, tuple)):
        values = [values] * vector.lanes
    return ir.Constant(vector.llvm, [ir.Constant(element, v) for v in values])


def spread(builder: Any, value: Any, lanes: int) -> Any:
    """Put a scalar into all lanes."""
    one = builder.insert_element(ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined), value, I32(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def call(builder: Any, name: str, result: Any, args: list[Any]) -> Any:
    """Call one of LLVM's intrinsics."""
    fnty = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, fnty, name), args)


def suffix(vector: ir.VectorType) -> str:
    """Name a type as the names of LLVM's intrinsics do."""
    element = {"float": "f32", "double": "f64", "half": "f16", "i8": "i8", "i16": "i16", "i32": "i32", "i64": "i64"}
    return f"v{vector.count}{element[str(vector.element)]}"


def lane_mask(builder: Any, count: Any, n: int) -> Any:
    """Mark the first `count` of n lanes."""
    index = ir.Constant(ir.VectorType(I32, n), list(range(n)))
    return builder.icmp_signed("<", index, spread(builder, builder.trunc(count, I32), n))


# ------------------------------------------------------------------------------------------------ scalars to vectors and back


@intrinsic
def splat(typingctx: Any, value: Any) -> Any:
    """Make a vector of one scalar."""
    vector = vector_of(value)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return spread(builder, args[0], vector.lanes)

    return signature(vector, value), codegen


@intrinsic
def lanes(typingctx: Any, value: Any) -> Any:
    """Count the lanes of a vector for a scalar of this type."""
    count = vector_of(value).lanes

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return context.get_constant(types.intp, count)

    return signature(types.intp, value), codegen


@intrinsic
def scalar(typingctx: Any, like: Any, value: Any) -> Any:
    """Give `value` as a scalar of the type of `like`: Numba's own arithmetic would widen float32 to float64."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return context.cast(builder, args[1], value, like)

    return signature(like, like, value), codegen


@intrinsic
def set_lane(typingctx: Any, value: Any, lane: Any, scalar: Any) -> Any:
    """Replace one lane."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.insert_element(args[0], args[2], builder.trunc(args[1], I32))

    return signature(value, value, types.intp, value.lane), codegen


@intrinsic
def normal(typingctx: Any, value: Any) -> Any:
    """Promise that no lane is subnormal, which spares `store` looking for one."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return args[0]

    return signature(Normal(value), value), codegen


@intrinsic
def first_lane(typingctx: Any, value: Any) -> Any:
    """Take lane 0."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.extract_element(args[0], I32(0))

    return signature(value.lane, value), codegen


@intrinsic
def keep(typingctx: Any, value: Any, count: Any, fill: Any) -> Any:
    """Put `fill` into the lanes from `count` on."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        n = value.lanes
        return builder.select(lane_mask(builder, args[1], n), args[0], spread(builder, args[2], n))

    return signature(value, value, types.intp, fill), codegen
