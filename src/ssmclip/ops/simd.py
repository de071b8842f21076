"""Vectors of one register for Numba kernels, so that they read like mathematics and LLVM has no width to guess.

    v = load(address, like)          lanes floats at an address; `like` is any scalar of the wanted type
    v = fma(a, b, broadcast(0.5))    + - * / and fma work lane by lane
    store(address, v)

float32 and float64 differ only in the type of `like`. An address is an integer, in bytes. `load` and `store` take
a count of lanes where an array may end inside the vector: lanes beyond it read 0 and are not written.
"""

from __future__ import annotations

import inspect
import logging
import operator
import os
from pathlib import Path

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.caching import FunctionCache
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

from ssmclip.ops.vector_width import vector_bytes

log = logging.getLogger(__name__)


def _kernels_folder() -> Path | None:
    """Return the folder of this module's compiled functions, None where they cannot be kept."""
    try:
        return Path(FunctionCache(inspect.unwrap(_kernels_folder)).cache_path)
    except RuntimeError:
        return None


REGISTER_BYTES = vector_bytes(os.environ, _kernels_folder())  # the same for all vectors of this process


def compiled(**options):
    """numba.njit for the function itself: the tests' shape checks wrap every function of the package."""
    return lambda function: njit(**options)(inspect.unwrap(function))


def entry_point(function):
    """A compiled function that releases the GIL, kept on disk where its machine code may be, apart for each width."""
    function = inspect.unwrap(function)
    function.__qualname__ += f"_{REGISTER_BYTES}"  # Numba names the files after it
    try:
        return compiled(nogil=True, cache=True)(function)
    except RuntimeError as error:  # neither the package nor the user's cache folder can be written to
        log.warning(
            "CPU kernels are compiled again in every process: %s (set NUMBA_CACHE_DIR to another folder)", error
        )
        return compiled(nogil=True)(function)


class Vector(types.Type):
    """REGISTER_BYTES of float32 or float64."""

    def __init__(self, scalar: types.Float):
        self.scalar = scalar
        self.lanes = REGISTER_BYTES * 8 // scalar.bitwidth
        super().__init__(name=f"Vector({scalar}, {self.lanes})")


def llvm_type(vector: Vector) -> ir.VectorType:
    return ir.VectorType(ir.DoubleType() if vector.scalar == types.float64 else ir.FloatType(), vector.lanes)


def _bits(vector: Vector) -> ir.VectorType:
    return ir.VectorType(ir.IntType(vector.scalar.bitwidth), vector.lanes)


def suffix(vector: Vector) -> str:
    return f"v{vector.lanes}f{vector.scalar.bitwidth}"


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        super().__init__(manager, vector, llvm_type(vector))


def call(builder, name: str, result, args):
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
        return call(builder, f"llvm.fma.{suffix(a)}", llvm_type(a), args)

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
        return call(builder, f"llvm.fabs.{suffix(a)}", llvm_type(a), args)

    return a(a), generate


def _reduce(builder, vector, v, combine):
    """Halves on halves until one lane is left: always in the same order."""
    n, i32 = vector.lanes, ir.IntType(32)
    while n > 1:
        n //= 2
        low = ir.Constant(ir.VectorType(i32, n), list(range(n)))
        high = ir.Constant(ir.VectorType(i32, n), list(range(n, 2 * n)))
        v = combine(builder.shuffle_vector(v, v, low), builder.shuffle_vector(v, v, high))
    return builder.extract_element(v, ir.Constant(i32, 0))


@intrinsic
def total(typing, a):
    """The sum of the lanes, a scalar."""

    def generate(context, builder, sig, args):
        return _reduce(builder, a, args[0], builder.fadd)

    return a.scalar(a), generate


@intrinsic
def largest(typing, a):
    """The largest lane, a scalar."""

    def generate(context, builder, sig, args):
        return _reduce(builder, a, args[0], lambda x, y: builder.select(builder.fcmp_ordered(">", x, y), x, y))

    return a.scalar(a), generate


@intrinsic
def where_negative(typing, x, yes, no):
    """yes where x < 0, else no."""

    def generate(context, builder, sig, args):
        negative = builder.fcmp_ordered("<", args[0], ir.Constant(llvm_type(x), [0.0] * x.lanes))
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
        return builder.bitcast(builder.add(builder.bitcast(args[0], bits), moved), llvm_type(a))

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
def prefetch(typing, address):
    """Ask for the cache line at an address, which need not be valid."""

    def generate(context, builder, sig, args):
        i32, byte = ir.IntType(32), ir.IntType(8).as_pointer()
        to_read, second_level, data = (ir.Constant(i32, k) for k in (0, 2, 1))
        call(builder, "llvm.prefetch.p0", ir.VoidType(), [builder.inttoptr(args[0], byte), to_read, second_level, data])
        return context.get_dummy_value()

    return types.void(address), generate


@intrinsic
def load(typing, address, like):
    """The lanes at an address."""
    vector = Vector(like)

    def generate(context, builder, sig, args):
        kind = llvm_type(vector)
        return builder.load(builder.inttoptr(args[0], kind.as_pointer()), align=like.bitwidth // 8, typ=kind)

    return vector(address, like), generate


@intrinsic
def store(typing, address, v):
    """Put the lanes at an address."""

    def generate(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], llvm_type(v).as_pointer())
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
        kind = llvm_type(vector)
        pointer = builder.inttoptr(args[0], kind.as_pointer())
        align = ir.Constant(ir.IntType(32), like.bitwidth // 8)
        rest = ir.Constant(kind, [0.0] * vector.lanes)
        parts = [pointer, align, _mask(builder, vector, args[2]), rest]
        return call(builder, f"llvm.masked.load.{suffix(vector)}.p0", kind, parts)

    return vector(address, like, count), generate


@intrinsic
def store_part(typing, address, v, count):
    """Put the first `count` lanes at an address."""

    def generate(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], llvm_type(v).as_pointer())
        align = ir.Constant(ir.IntType(32), v.scalar.bitwidth // 8)
        parts = [args[1], pointer, align, _mask(builder, v, args[2])]
        call(builder, f"llvm.masked.store.{suffix(v)}.p0", ir.VoidType(), parts)
        return context.get_dummy_value()

    return types.void(address, v, count), generate


@intrinsic
def load_transposed(typing, address, step, like):
    """A block of `lanes` rows, `step` bytes apart, as the tuple of its columns."""
    vector = Vector(like)
    result = types.UniTuple(vector, vector.lanes)

    def generate(context, builder, sig, args):
        kind, i64 = llvm_type(vector), ir.IntType(64)
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
        kind = llvm_type(v).element
        number = args[1] if v.scalar == types.float64 else builder.fptrunc(args[1], kind)
        return _splat(builder, v, number)

    return v(v, types.float64), generate


def _splat(builder, vector, number):
    undefined = ir.Constant(llvm_type(vector), ir.Undefined)
    first = builder.insert_element(undefined, number, ir.Constant(ir.IntType(32), 0))
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), vector.lanes), [0] * vector.lanes)
    return builder.shuffle_vector(first, undefined, lanes)
