"""The exponential and the hyperbolic tangent of vectors."""

# mypy: ignore-errors
# Numba compiles and types this file itself: the values are vectors and views that Python's types know nothing of.

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.typing import signature
from numba.extending import intrinsic

from swl.backends.numba.simd.arithmetic import emit_fma
from swl.backends.numba.simd.vectors import Vector, call, constant, suffix

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


def _emit_exp(builder: Any, x: Vector, value: Any) -> Any:
    """Two factors of e^x · 2^bias; the second is exactly 0 from `low` down."""
    k = _EXP[x.lane.bitwidth]
    low = constant(x, k["low"])
    value = builder.select(builder.fcmp_ordered("<", value, low), low, value)  # a NaN stays
    magic = constant(x, k["magic"] + k["offset"] + k["bias"])
    t = emit_fma(builder, x, value, constant(x, 1.4426950408889634), magic)
    n = builder.fsub(t, magic)
    r = emit_fma(builder, x, n, constant(x, -k["ln2"][0]), value)
    r = emit_fma(builder, x, n, constant(x, -k["ln2"][1]), r)
    p = constant(x, k["poly"][0])
    for c in (*k["poly"][1:], 1.0, 1.0):
        p = emit_fma(builder, x, p, r, constant(x, c))
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
        unit = constant(x, 2.0 ** -_EXP[x.lane.bitwidth]["bias"])
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
        kind = suffix(x.llvm)
        one = constant(x, 1.0)
        a = call(builder, f"llvm.fabs.{kind}", x.llvm, [v])
        unit = constant(x, 2.0 ** -_EXP[x.lane.bitwidth]["bias"])
        t = builder.fmul(builder.fmul(*_emit_exp(builder, x, builder.fmul(a, constant(x, -2.0)))), unit)
        far = builder.fdiv(builder.fsub(one, t), builder.fadd(one, t))
        s = builder.fmul(a, a)
        first, *rest = _TANH[x.lane.bitwidth]
        p = constant(x, first)
        for c in rest:
            p = emit_fma(builder, x, p, s, constant(x, c))
        near = emit_fma(builder, x, builder.fmul(a, s), p, a)
        # unordered: a NaN takes the polynomial, which hands it on
        result = builder.select(builder.fcmp_unordered("ult", a, constant(x, _TANH_LIMIT)), near, far)
        return call(builder, f"llvm.copysign.{kind}", x.llvm, [result, v])

    return signature(x, x), codegen
