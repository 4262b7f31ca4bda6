"""Contiguous numbers of an array as a value of a kernel: pointer and size."""

# mypy: ignore-errors
# Numba compiles and types this file itself: the values are vectors and views that Python's types know nothing of.

from __future__ import annotations

from typing import Any

from numba import types
from numba.core import cgutils
from numba.core.datamodel import register_default
from numba.core.datamodel.models import StructModel
from numba.core.imputils import impl_ret_borrowed
from numba.core.typing import signature
from numba.extending import intrinsic, make_attribute_wrapper

from swl.backends.numba.simd.vectors import I64


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


def element(builder: Any, row: Any, index: Any) -> Any:
    """Point to ``row[index]``."""
    return builder.gep(builder.extract_value(row, 0), [index])


def align(dtype: Any) -> int:
    """Return the bytes of a number in memory, to multiples of which its address is aligned."""
    return max(1, getattr(dtype, "bitwidth", 8) // 8)


# ------------------------------------------------------------------------------------------------ views of arrays, and of parts


def _row(context: Any, builder: Any, dtype: Any, data: Any, size: Any) -> Any:
    made = cgutils.create_struct_proxy(Row(dtype))(context, builder)
    made.data, made.size = data, size
    return made._getvalue()


def _view(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """View a one-dimensional C-ordered array, or row `index` of a two-dimensional one."""
    if array_type.layout != "C":
        raise TypeError(f"a Row must be contiguous, got an array of layout {array_type.layout!r}")
    view = context.make_array(array_type)(context, builder, array)
    shape = cgutils.unpack_tuple(builder, view.shape, array_type.ndim)
    return _row(context, builder, array_type.dtype, builder.gep(view.data, [builder.mul(index, shape[-1])]), shape[-1])


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
        left = builder.sub(builder.mul(rows, columns), skipped)
        return _row(context, builder, array.dtype, builder.gep(view.data, [skipped]), left)

    return signature(Row(array.dtype), array, types.intp), codegen


@intrinsic
def part(typingctx: Any, array: Any, start: Any, size: Any) -> Any:
    """View ``array[start : start + size]`` of a one-dimensional array."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        data = context.make_array(array)(context, builder, args[0]).data
        return _row(context, builder, array.dtype, builder.gep(data, [args[1]]), args[2])

    return signature(Row(array.dtype), array, types.intp, types.intp), codegen


@intrinsic
def cut(typingctx: Any, row: Any, start: Any, size: Any) -> Any:
    """View ``row[start : start + size]`` of a view."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _row(context, builder, row.dtype, element(builder, *args[:2]), args[2])

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
        return _view(context, builder, array, args[0], I64(0))

    return signature(Row(array.dtype), array), codegen


# ------------------------------------------------------------------------------------------------ single numbers, and zeros


@intrinsic
def item(typingctx: Any, row: Any, index: Any) -> Any:
    """Give the number ``row[index]``."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(element(builder, *args))

    return signature(row.dtype, row, types.intp), codegen


@intrinsic
def set_item(typingctx: Any, row: Any, index: Any, value: Any) -> Any:
    """``row[index] = value``."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[2], element(builder, *args[:2]))
        return context.get_dummy_value()

    return signature(types.void, row, types.intp, row.dtype), codegen


@intrinsic
def fill_zero(typingctx: Any, row: Any) -> Any:
    """``row[:] = 0``."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        data, size = (builder.extract_value(args[0], i) for i in range(2))
        cgutils.memset(builder, data, builder.mul(size, I64(align(row.dtype))), 0)
        return context.get_dummy_value()

    return signature(types.void, row), codegen
