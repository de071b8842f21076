"""2^x, softplus and sigmoid of vectors, with no branch: range reduction by rounding, then a polynomial."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ssmclip.ops.simd import (
    absolute,
    call,
    compiled,
    fill,
    fma,
    llvm_type,
    maximum,
    minimum,
    shift_exponent,
    suffix,
    where_negative,
)

LOG2_E = 1.4426950408889634


def polynomial(single: tuple[float, ...], double: tuple[float, ...]):
    """The function c[0] + c[1] x + ..., with the coefficients of x's type.

    By Estrin's scheme, pairs of pairs: a product or two more than Horner's rule, half its chain of dependent steps.
    The chain is what a core waits for.
    """

    @intrinsic
    def evaluate(typing, x):
        coefficients = double if x.scalar == types.float64 else single

        def generate(context, builder, sig, args):
            vector, power = llvm_type(x), args[0]
            terms = [ir.Constant(vector, [c] * x.lanes) for c in coefficients]
            while len(terms) > 1:
                pairs = zip(terms[1::2], terms[::2], strict=False)
                combined = [call(builder, f"llvm.fma.{suffix(x)}", vector, [high, power, low]) for high, low in pairs]
                terms = combined + terms[len(terms) // 2 * 2 :]
                power = builder.fmul(power, power)
            return terms[0]

        return x(x), generate

    return evaluate


# Coefficients: of least relative error, by Remez' exchange for the slope of log1p in float32, else interpolated at
# Chebyshev's points, in 60 digits: 2e-7 and 1e-17, both functions.

# 2^f on [-1/2, 1/2] as 1 + f q(f): exact at 0, because a slow decay acts many times
_exp2_fraction = polynomial(
    (
        1.0,
        0.693147180559945309,
        0.240223490380203614,
        0.0555038101379645743,
        0.00966636851538544831,
        0.00133813025373207962,
    ),
    (
        1.0,
        0.693147180559945309,
        0.240226506959100982,
        0.0555041086648215943,
        0.00961812910760688853,
        0.00133335581464169353,
        0.000154035304417360502,
        0.0000152527338298361184,
        1.32154424879216897e-6,
        1.01780624458457735e-7,
        7.0725859492692237e-9,
        4.45496059818651839e-10,
    ),
)

# log(1 + e) / e on [0, 1]
_log1p_slope = polynomial(
    (
        0.999999805668294255,
        -0.499974053732888792,
        0.332754794374921804,
        -0.2449546105570622,
        0.177452369405102414,
        -0.107681652990709045,
        0.04408959149373808,
        -0.00853919780192513732,
    ),
    (
        0.99999999999999999,
        -0.49999999999999079,
        0.333333333331975252,
        -0.249999999920095234,
        0.199999997498565228,
        -0.166666618482485386,
        0.142856519752759262,
        -0.124994270635143811,
        0.111072115852995379,
        -0.0997976809658656833,
        0.0900909581519863245,
        -0.0807095457843020583,
        0.0701529623652647141,
        -0.0571897853419390586,
        0.0419257098539041573,
        -0.0263987794807432172,
        0.0135987780906172537,
        -0.00542173399100160966,
        0.00155352440343343336,
        -0.000282742113937410716,
        0.0000244379739485809471,
    ),
)


def _by_type(name: str, single: float, double: float):
    """A number that depends on the vector's type: `name(v)` is v's type filled with it."""

    @intrinsic
    def constant(typing, v):
        value = double if v.scalar == types.float64 else single

        def generate(context, builder, sig, args):
            return ir.Constant(llvm_type(v), [value] * v.lanes)

        return v(v), generate

    constant.__name__ = name
    return constant


_rounder = _by_type("_rounder", 1.5 * 2.0**23, 1.5 * 2.0**52)  # adding it leaves no room for a fraction
_lowest = _by_type("_lowest", -127.0, -1023.0)  # 2^lowest comes out as 0, as its exponent field is 0
_highest = _by_type("_highest", 128.0, 1024.0)  # 2^highest comes out as infinity


NEAR = 120.0


@compiled(forceinline=True)
def exp2_near(x):
    """2^x for |x| <= NEAR, NaN for NaN."""
    shifted = x + _rounder(x)
    f = x - (shifted - _rounder(x))
    return shift_exponent(_exp2_fraction(f), shifted)


@compiled(forceinline=True)
def exp2(x):
    """2^x: 0 and infinity outside the type's range, NaN for NaN."""
    return exp2_near(minimum(_highest(x), maximum(_lowest(x), x)))


@compiled(forceinline=True)
def softplus_and_sigmoid(x):
    """(log(1 + e^x), 1 / (1 + e^-x)) for one exponential: the second is the derivative of the first.

    Relative error below 1e-6 for float32 from x = -10 on (that of x / log 2 rounded), 1e-5 at -80.
    """
    e = exp2_near(maximum(_lowest(x), absolute(x) * fill(x, -LOG2_E)))  # e^-|x|
    one = fill(x, 1.0)
    return fma(e, _log1p_slope(e), maximum(fill(x, 0.0), x)), where_negative(x, e, one) / (one + e)


@compiled(forceinline=True)
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return softplus_and_sigmoid(x)[1]
