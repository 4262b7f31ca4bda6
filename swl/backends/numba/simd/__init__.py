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
# Numba compiles and types these files itself: the values are vectors and views that Python's types know nothing of.

from swl.backends.numba.simd import arithmetic, conversions, functions, memory, vectors, views
from swl.backends.numba.simd.arithmetic import (
    drop_below,
    first_equal,
    first_nan,
    fma,
    max_lanes,
    maximum,
    product_from,
    sum_lanes,
    zero_where_zero,
)
from swl.backends.numba.simd.conversions import reads_halves
from swl.backends.numba.simd.functions import exp_nonpositive, exp_parts, exp_unit, tanh
from swl.backends.numba.simd.memory import (
    gather,
    in_lanes,
    load,
    load_tail,
    move,
    prefetch,
    scatter,
    store,
    store_stream,
    store_tail,
    to_line,
)
from swl.backends.numba.simd.vectors import BYTES, first_lane, keep, lanes, normal, scalar, set_lane, splat
from swl.backends.numba.simd.views import (
    address_in,
    cut,
    fill_zero,
    from_row,
    item,
    part,
    read_only,
    row_of,
    set_item,
    whole,
)

__all__ = [
    "BYTES",
    "SOURCES",
    "address_in",
    "cut",
    "drop_below",
    "exp_nonpositive",
    "exp_parts",
    "exp_unit",
    "fill_zero",
    "first_equal",
    "first_lane",
    "first_nan",
    "fma",
    "from_row",
    "gather",
    "in_lanes",
    "item",
    "keep",
    "lanes",
    "load",
    "load_tail",
    "max_lanes",
    "maximum",
    "move",
    "normal",
    "part",
    "prefetch",
    "product_from",
    "read_only",
    "reads_halves",
    "row_of",
    "scalar",
    "scatter",
    "set_item",
    "set_lane",
    "splat",
    "store",
    "store_stream",
    "store_tail",
    "sum_lanes",
    "tanh",
    "to_line",
    "whole",
    "zero_where_zero",
]

SOURCES = tuple(module.__file__ for module in (arithmetic, conversions, functions, memory, vectors, views))
"""The files that a kernel of these vectors is compiled from, which decide with its own whether it is stale."""
