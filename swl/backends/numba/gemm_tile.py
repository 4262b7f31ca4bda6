"""The innermost part of a matrix product, in LLVM: what a processor with 32 registers of 64 bytes (AVX-512) does at its full rate.

A tile of the result, `ROWS` × `VECTORS` registers, stays in registers while the two panels that make it go by: at each step along
the inner axis one column of `ROWS` numbers, each against all lanes of the other panel's row::

    tile[i, :] += column[i] · row[:]            24 fused multiply-adds, which need 3 + 8 loads

All memory is given by addresses and steps in bytes: operands come in any layout, and a kernel is compiled once for each dtype.

Types are given by a number of theirs, as everywhere in `swl.backends.numba.simd`: uint16 holds the bits of float16, int16 those
of bfloat16. Both are widened on the way to a panel. A panel of int32 holds pairs of bfloat16 as they are, two steps along the
inner axis in one; `vdpbf16ps` multiplies both and adds them to float32 sums, subnormal numbers taken as 0.
"""

# mypy: ignore-errors
# Numba compiles and types this file itself: the values are lanes and addresses that Python's types know nothing of.

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing import signature
from numba.extending import intrinsic

from swl.backends.numba.simd.views import Row

ROWS, VECTORS = 8, 3
"""Rows of a tile, and registers of each: 24 of 32 hold the tile."""
UNROLL = 4
"""Steps along the inner axis of one pass of the loop; panels are filled up to a multiple of it."""
LINE = 64
"""Bytes of a register, and of a cache line."""
SQUARE = 8
"""Rows and columns that `transpose` takes at a time."""
LINES = VECTORS + 1
"""Lines of memory that a row of a tile lies in, at most."""
AHEAD = 4
"""Lines of each row that a tile fetches for a later one, a line a pass. One every 48 cycles leaves the loads of the tile their way;
all at once cost it 5 % (docs/performance.md).
"""

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_INTO_L1, _INTO_L2 = 3, 2


def _memory(dtype: Any) -> ir.Type:
    """Give the type of a number in memory."""
    if dtype == types.uint16:
        return ir.HalfType()
    return ir.IntType(dtype.bitwidth) if isinstance(dtype, types.Integer) else _scalar(dtype)


def _scalar(dtype: Any) -> ir.Type:
    """Give the type of sums."""
    return ir.DoubleType() if dtype.bitwidth == 64 else ir.FloatType()


def _bytes(dtype: Any) -> int:
    return dtype.bitwidth // 8


def _panel(dtype: Any) -> ir.Type:
    """Give the type of a panel's numbers."""
    return _I32 if dtype == types.int32 else _scalar(dtype)


def _lanes(dtype: Any, lanes: int | None = None) -> ir.VectorType:
    return ir.VectorType(_scalar(dtype), lanes or LINE // _bytes(dtype))


def _like(element: ir.Type, shape: ir.Type) -> ir.Type:
    """Give a vector of such elements where `shape` is a vector."""
    return ir.VectorType(element, shape.count) if isinstance(shape, ir.VectorType) else element


def _widened(builder: Any, raw: Any, dtype: Any) -> Any:
    """Bring a number or vector from memory to the type of sums."""
    if dtype == types.uint16:
        return builder.fpext(raw, _like(ir.FloatType(), raw.type))
    if dtype == types.int16:
        wide = _like(_I32, raw.type)
        sixteen = ir.Constant(wide, [16] * wide.count if isinstance(wide, ir.VectorType) else 16)
        return builder.bitcast(builder.shl(builder.zext(raw, wide), sixteen), _like(ir.FloatType(), raw.type))
    return raw


def _read(builder: Any, address: Any, dtype: Any, lanes: int | None = None, offset: Any = 0) -> Any:
    """Load a number, or a vector of them, and widen it."""
    element = _memory(dtype)
    pointed = ir.VectorType(element, lanes) if lanes else element
    raw = builder.load(_pointer(builder, address, pointed, offset), align=_bytes(dtype))
    return _widened(builder, raw, dtype)


def _pointer(builder: Any, address: Any, pointed: ir.Type, offset: Any = 0) -> Any:
    offset = _I64(offset) if isinstance(offset, int) else offset
    return builder.inttoptr(builder.add(address, offset), pointed.as_pointer())


def _fetch(builder: Any, address: Any, where: int) -> None:
    pointer = _pointer(builder, address, _I8)
    fnty = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
    fn = cgutils.get_or_insert_function(builder.module, fnty, "llvm.prefetch.p0")
    builder.call(fn, [pointer, _I32(0), _I32(where), _I32(1)])


@intrinsic
def size_of(typingctx: Any, like: Any) -> Any:
    """Give the bytes of a number of this type, as a constant."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _I64(_bytes(like))

    return signature(types.intp, like), codegen


@intrinsic
def address_of(typingctx: Any, array: Any) -> Any:
    """Give the address of an array's first number."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.ptrtoint(context.make_array(array)(context, builder, args[0]).data, _I64)

    return signature(types.intp, array), codegen


@intrinsic
def get(typingctx: Any, like: Any, address: Any) -> Any:
    """Give the number of the type of `like` at an address, widened."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _read(builder, args[1], like)

    return signature(types.float64 if like.bitwidth == 64 else types.float32, like, types.intp), codegen


@intrinsic
def put(typingctx: Any, address: Any, value: Any) -> Any:
    """Write a number to an address."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[1], _pointer(builder, args[0], _scalar(value)), align=_bytes(value))
        return context.get_dummy_value()

    return signature(types.void, types.intp, value), codegen


@intrinsic
def steps_in(typingctx: Any, panel: Any) -> Any:
    """Give the steps along the inner axis that one number of a panel holds, as a constant."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _I64(2 if panel == types.int32 else 1)

    return signature(types.intp, panel), codegen


@intrinsic
def put_step(typingctx: Any, panel: Any, like: Any, source: Any, along: Any, here: Any, target: Any) -> Any:
    """Write one number of a panel: of `like` at `source`, and for a pair the next one, `along` bytes on.

    Only the first `here` of them are there; for 0 it is filled up with 0.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _, _, source, along, here, target = args
        number = cgutils.alloca_once(builder, _panel(panel))
        builder.store(ir.Constant(_panel(panel), None), number)
        with builder.if_then(builder.icmp_signed(">", here, _I64(0))):
            if panel != types.int32:
                builder.store(_read(builder, source, like), number)
            else:
                first = builder.zext(builder.load(_pointer(builder, source, _I16), align=2), _I32)
                builder.store(first, number)
                with builder.if_then(builder.icmp_signed(">", here, _I64(1))):
                    second = builder.zext(
                        builder.load(_pointer(builder, builder.add(source, along), _I16), align=2), _I32
                    )
                    builder.store(builder.or_(first, builder.shl(second, _I32(16))), number)
        builder.store(builder.load(number), _pointer(builder, target, _panel(panel)), align=_bytes(panel))
        return context.get_dummy_value()

    return signature(types.void, panel, like, *[types.intp] * 4), codegen


@intrinsic
def copy(typingctx: Any, panel: Any, like: Any, source: Any, along: Any, target: Any) -> Any:
    """Copy `SQUARE` numbers that are neighbours to a panel; for pairs each with that `along` bytes on."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _, _, source, along, target = args
        if panel == types.int32:
            eight = ir.VectorType(_I16, SQUARE)
            pair = [builder.load(_pointer(builder, at, eight), align=2) for at in (source, builder.add(source, along))]
            in_turn = [i + j * SQUARE for i in range(SQUARE) for j in range(2)]
            found = builder.shuffle_vector(*pair, ir.Constant(ir.VectorType(_I32, 2 * SQUARE), in_turn))
        else:
            found = _read(builder, source, like, SQUARE)
        builder.store(found, _pointer(builder, target, found.type), align=_bytes(panel))
        return context.get_dummy_value()

    return signature(types.void, panel, like, *[types.intp] * 3), codegen


@intrinsic
def transpose(typingctx: Any, panel: Any, like: Any, source: Any, step: Any, target: Any, target_step: Any) -> Any:
    """Write `SQUARE` rows of as many numbers or pairs, `step` bytes apart, as columns of a panel.

    The rows of the target are `target_step` bytes apart. Blocks of 4, 2 and 1 are exchanged across the diagonal in turn.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _, _, source, step, target, target_step = args
        rows = []
        for r in range(SQUARE):
            row = builder.add(source, builder.mul(step, _I64(r)))
            if panel == types.int32:
                rows.append(builder.load(_pointer(builder, row, ir.VectorType(_I32, SQUARE)), align=2))
            else:
                rows.append(_read(builder, row, like, SQUARE))
        for block in (4, 2, 1):
            upper = [j if not j & block else SQUARE + j - block for j in range(SQUARE)]
            lower = [j + block if not j & block else SQUARE + j for j in range(SQUARE)]
            for r in range(SQUARE):
                if not r & block:
                    pair = rows[r], rows[r + block]
                    rows[r], rows[r + block] = (
                        builder.shuffle_vector(*pair, ir.Constant(ir.VectorType(_I32, SQUARE), lanes_))
                        for lanes_ in (upper, lower)
                    )
        for r, row in enumerate(rows):
            to = _pointer(builder, target, row.type, builder.mul(target_step, _I64(r)))
            builder.store(row, to, align=_bytes(panel))
        return context.get_dummy_value()

    return signature(types.void, panel, like, *[types.intp] * 4), codegen


@intrinsic
def row_at(typingctx: Any, like: Any, address: Any, size: Any) -> Any:
    """View the numbers at an address as the kernels of `swl.backends.numba.simd` do."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        made = cgutils.create_struct_proxy(Row(like))(context, builder)
        made.data = builder.inttoptr(args[1], made.data.type)
        made.size = args[2]
        return made._getvalue()

    return signature(Row(like), like, types.intp, types.intp), codegen


@intrinsic
def multiply_tile(
    typingctx: Any, panel: Any, a: Any, b: Any, k: Any, out: Any, step: Any, add: Any, ahead: Any, ahead_step: Any
) -> Any:
    """``out = aᵀ·b`` or ``out += aᵀ·b`` for one tile.

    `a` is (k, ROWS) and `b` (k, VECTORS registers), both dense, `b` at a cache line; k is a multiple of `UNROLL`, above 0; rows of
    `out` are `step` bytes apart. Meanwhile the lines of `out` are fetched, and for a later tile `AHEAD` lines of each
    of the rows that begin at `ahead`, `ahead_step` bytes apart; an address where nothing is does no harm.
    """
    vector, size, lanes = _lanes(panel), _bytes(panel), LINE // _bytes(panel)
    number_, row_ = _panel(panel), ir.VectorType(_panel(panel), lanes)
    cells = [(r, v) for r in range(ROWS) for v in range(VECTORS)]

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _, a, b, k, out, step, add, ahead, ahead_step = args
        if panel == types.int32:
            kind = ir.FunctionType(vector, [row_, row_, vector])
            multiply_add = ir.InlineAsm(kind, "vdpbf16ps $2, $1, $0", "=v,v,v,0")
        else:
            kind = ir.FunctionType(vector, [vector] * 3)
            multiply_add = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{lanes}f{8 * size}")
        short = builder.icmp_signed("<", k, _I64(UNROLL * ROWS * LINES))  # then two lines of out a pass, else one
        twice = builder.zext(short, _I64)
        before, loop, after = builder.block, builder.append_basic_block("steps"), builder.append_basic_block("store")
        builder.branch(loop)

        builder.position_at_end(loop)
        passes, left, right = (builder.phi(_I64) for _ in range(3))
        tile = {cell: builder.phi(vector) for cell in cells}
        sums = dict(tile)
        for other in (_I64(0), twice):
            nth = builder.add(builder.shl(passes, twice), other)
            row, line = builder.and_(nth, _I64(ROWS - 1)), builder.and_(builder.udiv(nth, _I64(ROWS)), _I64(LINES - 1))
            here = builder.add(builder.mul(row, step), builder.mul(line, _I64(LINE)))
            _fetch(builder, builder.add(out, here), _INTO_L1)
        row, line = builder.udiv(passes, _I64(AHEAD)), builder.and_(passes, _I64(AHEAD - 1))
        there = builder.add(builder.mul(row, ahead_step), builder.mul(line, _I64(LINE)))
        _fetch(builder, builder.add(ahead, there), _INTO_L2)
        for u in range(UNROLL):
            registers = [
                builder.load(_pointer(builder, right, row_, (u * VECTORS + v) * LINE), align=LINE)
                for v in range(VECTORS)
            ]
            for r in range(ROWS):
                number = builder.load(_pointer(builder, left, number_, (u * ROWS + r) * size), align=size)
                one = builder.insert_element(ir.Constant(row_, ir.Undefined), number, _I32(0))
                number = builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes))
                for v in range(VECTORS):
                    sums[r, v] = builder.call(multiply_add, [number, registers[v], sums[r, v]])
        for phi, first, step_ in (
            (passes, _I64(0), 1),
            (left, a, UNROLL * ROWS * size),
            (right, b, UNROLL * VECTORS * LINE),
        ):
            phi.add_incoming(first, before)
            phi.add_incoming(builder.add(phi, _I64(step_)), loop)
        for cell in cells:
            tile[cell].add_incoming(ir.Constant(vector, None), before)
            tile[cell].add_incoming(sums[cell], loop)
        done = builder.mul(builder.add(passes, _I64(1)), _I64(UNROLL))
        builder.cbranch(builder.icmp_signed("<", done, k), loop, after)

        builder.position_at_end(after)
        with builder.if_else(add) as branches:
            for adds, branch in zip((True, False), branches, strict=True):
                with branch:
                    for r, v in cells:
                        pointer = _pointer(builder, builder.add(out, builder.mul(step, _I64(r))), vector, v * LINE)
                        value = builder.fadd(builder.load(pointer, align=size), sums[r, v]) if adds else sums[r, v]
                        builder.store(value, pointer, align=size)
        return context.get_dummy_value()

    types_ = [types.intp] * 5
    return signature(types.void, panel, *types_, types.boolean, types.intp, types.intp), codegen
