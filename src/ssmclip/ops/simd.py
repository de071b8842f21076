"""Vectors of one register for Numba kernels, so that they read like mathematics and LLVM has no width to guess.

    v = load(address, like)          lanes floats at an address; `like` is any scalar of the wanted type
    v = fma(a, b, broadcast(0.5))    + - * / and fma work lane by lane
    store(address, v)

float32 and float64 differ only in the type of `like`. An address is an integer, in bytes. `load` and `store` take
a count of lanes where an array may end inside the vector: lanes beyond it read 0 and are not written.
"""

from __future__ import annotations

import operator

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

LOG2_E = 1.4426950408889634
REGISTER_BYTES = 32  # AVX2; two registers on NEON, half of one on AVX-512


class Vector(types.Type):
    """REGISTER_BYTES of float32 or float64."""

    def __init__(self, scalar: types.Float):
        self.scalar = scalar
        self.lanes = REGISTER_BYTES * 8 // scalar.bitwidth
        super().__init__(name=f"Vector({scalar}, {self.lanes})")


def _llvm(vector: Vector) -> ir.VectorType:
    return ir.VectorType(ir.DoubleType() if vector.scalar == types.float64 else ir.FloatType(), vector.lanes)


def _bits(vector: Vector) -> ir.VectorType:
    return ir.VectorType(ir.IntType(vector.scalar.bitwidth), vector.lanes)


def _suffix(vector: Vector) -> str:
    return f"v{vector.lanes}f{vector.scalar.bitwidth}"


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        super().__init__(manager, vector, _llvm(vector))


def _call(builder, name: str, result, args):
    function_type = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), args)


# ---- arithmetic

for _operator, _instruction in {
    operator.add: "fadd",
    operator.sub: "fsub",
    operator.mul: "fmul",
    operator.truediv: "fdiv",
}.items():

    @type_callable(_operator)
    def _type_of_operator(context):
        def typer(a, b):
            return a if isinstance(a, Vector) and a == b else None

        return typer

    @lower_builtin(_operator, Vector, Vector)
    def _lower_operator(context, builder, sig, args, _instruction=_instruction):
        return getattr(builder, _instruction)(*args)


@intrinsic
def fma(typing, a, b, c):
    """a * b + c, rounded once."""

    def generate(context, builder, sig, args):
        return _call(builder, f"llvm.fma.{_suffix(a)}", _llvm(a), args)

    return a(a, a, a), generate


@intrinsic
def minimum(typing, a, b):
    """The smaller, b where either is NaN."""

    def generate(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered("<", *args), *args)

    return a(a, b), generate


@intrinsic
def maximum(typing, a, b):
    """The larger, b where either is NaN."""

    def generate(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered(">", *args), *args)

    return a(a, b), generate


@intrinsic
def absolute(typing, a):
    def generate(context, builder, sig, args):
        return _call(builder, f"llvm.fabs.{_suffix(a)}", _llvm(a), args)

    return a(a), generate


@intrinsic
def total(typing, a):
    """The sum of the lanes, a scalar; always added in the same order."""

    def generate(context, builder, sig, args):
        (v,), n = args, a.lanes
        while n > 1:
            n //= 2
            i32 = ir.IntType(32)
            low = ir.Constant(ir.VectorType(i32, n), list(range(n)))
            high = ir.Constant(ir.VectorType(i32, n), list(range(n, 2 * n)))
            v = builder.fadd(builder.shuffle_vector(v, v, low), builder.shuffle_vector(v, v, high))
        return builder.extract_element(v, ir.Constant(ir.IntType(32), 0))

    return a.scalar(a), generate


@intrinsic
def where_negative(typing, x, yes, no):
    """yes where x < 0, else no."""

    def generate(context, builder, sig, args):
        negative = builder.fcmp_ordered("<", args[0], ir.Constant(_llvm(x), [0.0] * x.lanes))
        return builder.select(negative, args[1], args[2])

    return x(x, yes, no), generate


@intrinsic
def shift_exponent(typing, a, n):
    """The bits of a plus the low bits of n moved into the exponent: a * 2^i where n = 1.5 * 2^mantissa + i."""
    mantissa = 52 if a.scalar == types.float64 else 23

    def generate(context, builder, sig, args):
        bits = _bits(a)
        places = ir.Constant(bits, [mantissa] * a.lanes)
        moved = builder.shl(builder.bitcast(args[1], bits), places)
        return builder.bitcast(builder.add(builder.bitcast(args[0], bits), moved), _llvm(a))

    return a(a, n), generate


# ---- memory


@intrinsic
def size_of(typing, scalar):
    """Bytes of a scalar."""

    def generate(context, builder, sig, args):
        return ir.Constant(ir.IntType(64), scalar.bitwidth // 8)

    return types.int64(scalar), generate


@intrinsic
def broadcast(typing, scalar):
    """All lanes the same."""
    vector = Vector(scalar)

    def generate(context, builder, sig, args):
        return _splat(builder, vector, args[0])

    return vector(scalar), generate


@intrinsic
def read(typing, address, like):
    """The scalar at an address."""

    def generate(context, builder, sig, args):
        kind = args[1].type
        return builder.load(builder.inttoptr(args[0], kind.as_pointer()), align=like.bitwidth // 8, typ=kind)

    return like(address, like), generate


@intrinsic
def write(typing, address, scalar):
    """Put the scalar at an address."""

    def generate(context, builder, sig, args):
        builder.store(args[1], builder.inttoptr(args[0], args[1].type.as_pointer()), align=scalar.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(address, scalar), generate


@intrinsic
def load(typing, address, like):
    """The lanes at an address."""
    vector = Vector(like)

    def generate(context, builder, sig, args):
        kind = _llvm(vector)
        return builder.load(builder.inttoptr(args[0], kind.as_pointer()), align=like.bitwidth // 8, typ=kind)

    return vector(address, like), generate


@intrinsic
def store(typing, address, v):
    """Put the lanes at an address."""

    def generate(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], _llvm(v).as_pointer())
        builder.store(args[1], pointer, align=v.scalar.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(address, v), generate


def _mask(builder, vector, count):
    i64 = ir.IntType(64)
    counts = ir.Constant(ir.VectorType(i64, vector.lanes), ir.Undefined)
    for i in range(vector.lanes):
        counts = builder.insert_element(counts, count, ir.Constant(ir.IntType(32), i))
    return builder.icmp_signed("<", ir.Constant(ir.VectorType(i64, vector.lanes), list(range(vector.lanes))), counts)


@intrinsic
def load_part(typing, address, like, count):
    """The first `count` lanes at an address, 0 in the others."""
    vector = Vector(like)

    def generate(context, builder, sig, args):
        kind = _llvm(vector)
        pointer = builder.inttoptr(args[0], kind.as_pointer())
        align = ir.Constant(ir.IntType(32), like.bitwidth // 8)
        rest = ir.Constant(kind, [0.0] * vector.lanes)
        parts = [pointer, align, _mask(builder, vector, args[2]), rest]
        return _call(builder, f"llvm.masked.load.{_suffix(vector)}.p0", kind, parts)

    return vector(address, like, count), generate


@intrinsic
def store_part(typing, address, v, count):
    """Put the first `count` lanes at an address."""

    def generate(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], _llvm(v).as_pointer())
        align = ir.Constant(ir.IntType(32), v.scalar.bitwidth // 8)
        parts = [args[1], pointer, align, _mask(builder, v, args[2])]
        _call(builder, f"llvm.masked.store.{_suffix(v)}.p0", ir.VoidType(), parts)
        return context.get_dummy_value()

    return types.void(address, v, count), generate


@intrinsic
def load_transposed(typing, address, step, like):
    """A block of `lanes` rows, `step` bytes apart, as the tuple of its columns."""
    vector = Vector(like)
    result = types.UniTuple(vector, vector.lanes)

    def generate(context, builder, sig, args):
        kind, i64 = _llvm(vector), ir.IntType(64)
        block = []
        for i in range(vector.lanes):
            row = builder.add(args[0], builder.mul(args[1], ir.Constant(i64, i)))
            pointer = builder.inttoptr(row, kind.as_pointer())
            block.append(builder.load(pointer, align=like.bitwidth // 8, typ=kind))
        return context.make_tuple(builder, result, _transpose(builder, block))

    return result(address, step, like), generate


def _transpose(builder, block):
    """Eklundh: exchange the off-diagonal halves of ever larger squares."""
    n, half = len(block), 1
    while half < n:
        upper = [i if not i & half else n + i - half for i in range(n)]
        lower = [i + half if not i & half else n + i for i in range(n)]
        masks = [ir.Constant(ir.VectorType(ir.IntType(32), n), m) for m in (upper, lower)]
        for i in range(n):
            if not i & half:
                pair = block[i], block[i + half]
                block[i], block[i + half] = (builder.shuffle_vector(*pair, mask) for mask in masks)
        half *= 2
    return block


@intrinsic
def fill(typing, v, value):
    """A vector of v's type, the constant `value` in all lanes."""

    def generate(context, builder, sig, args):
        kind = _llvm(v).element
        number = args[1] if v.scalar == types.float64 else builder.fptrunc(args[1], kind)
        return _splat(builder, v, number)

    return v(v, types.float64), generate


def _splat(builder, vector, number):
    undefined = ir.Constant(_llvm(vector), ir.Undefined)
    first = builder.insert_element(undefined, number, ir.Constant(ir.IntType(32), 0))
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), vector.lanes), [0] * vector.lanes)
    return builder.shuffle_vector(first, undefined, lanes)


# ---- functions


def polynomial(single: tuple[float, ...], double: tuple[float, ...]):
    """The function c[0] + c[1] x + ..., by Horner's rule, with the coefficients of x's type."""

    @intrinsic
    def evaluate(typing, x):
        coefficients = double if x.scalar == types.float64 else single

        def generate(context, builder, sig, args):
            vector = _llvm(x)
            constants = [ir.Constant(vector, [c] * x.lanes) for c in coefficients]
            value = constants[-1]
            for c in reversed(constants[:-1]):
                value = _call(builder, f"llvm.fma.{_suffix(x)}", vector, [value, args[0], c])
            return value

        return x(x), generate

    return evaluate


# Coefficients: Chebyshev interpolation in 60 digits; relative errors 2e-7 and 1e-17, 3e-8 and 1e-17.

# (2^f - 1) / f on [-1/2, 1/2]; exact at 0, because 1 + f q(f) there is a slow decay that acts many times
_exp2_slope = polynomial(
    (
        0.693147180559945309,
        0.240223490380203614,
        0.0555038101379645743,
        0.00966636851538544831,
        0.00133813025373207962,
    ),
    (
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
        0.999999965925509634,
        -0.499994449763400949,
        0.333181217075331907,
        -0.248353989885155441,
        0.190768807357477941,
        -0.13602247622479405,
        0.0775160867403694124,
        -0.0290740646774942013,
        0.0051261021409669134,
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
            return ir.Constant(_llvm(v), [value] * v.lanes)

        return v(v), generate

    constant.__name__ = name
    return constant


_rounder = _by_type("_rounder", 1.5 * 2.0**23, 1.5 * 2.0**52)  # adding it leaves no room for a fraction
_lowest = _by_type("_lowest", -127.0, -1023.0)  # 2^lowest comes out as 0, as its exponent field is 0
_highest = _by_type("_highest", 128.0, 1024.0)  # 2^highest comes out as infinity


@njit(forceinline=True)
def exp2(x):
    """2^x: 0 and infinity outside the type's range, NaN for NaN."""
    x = minimum(_highest(x), maximum(_lowest(x), x))
    shifted = x + _rounder(x)
    f = x - (shifted - _rounder(x))
    return shift_exponent(fma(f, _exp2_slope(f), fill(f, 1.0)), shifted)


@njit(forceinline=True)
def exp(x):
    """e^x. Relative error below 1e-6 for float32 down to x = -10 (that of x / log 2 rounded), 1e-5 at -80."""
    return exp2(x * fill(x, LOG2_E))


@njit(forceinline=True)
def softplus(x):
    """log(1 + e^x)."""
    e = exp(fill(x, 0.0) - absolute(x))
    return fma(e, _log1p_slope(e), maximum(fill(x, 0.0), x))


@njit(forceinline=True)
def sigmoid(x):
    """1 / (1 + e^-x)."""
    e = exp(fill(x, 0.0) - absolute(x))
    one = fill(x, 1.0)
    return where_negative(x, e, one) / (one + e)
