"""Bits of numbers inside of compiled loops, in LLVM's own words.

In numba's integers 32 bits widen to 64, and a loop with them does not become one of vectors. Not here: the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, register_jitable

from merger.methods.steps.dtypes import BETWEEN_FP4

_U16, _U32, _U64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_SIGN, _INFINITE = 0x8000_0000, 0x7F80_0000


def _word(result: Any, *of: Any) -> Callable[[Callable[..., Any]], Any]:
    def make(build: Callable[..., Any]) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return build(builder, *values)

        signature = result(*of), generate
        return intrinsic(_TAKES[len(of)](signature))

    return make


_TAKES: dict[int, Callable[[Any], Any]] = {
    1: lambda found: lambda context, x: found,
    2: lambda found: lambda context, x, y: found,
    3: lambda found: lambda context, x, y, z: found,
    4: lambda found: lambda context, w, x, y, z: found,
    5: lambda found: lambda context, v, w, x, y, z: found,
}
"""numba counts the arguments by their names."""


def _k(number: int, kind: ir.IntType = _U32) -> ir.Constant:
    return ir.Constant(kind, number)


@_word(types.float32, types.float32, types.float32)
def flip(b: Any, x: Any, like: Any) -> Any:
    """The first number, its sign turned where the second has the sign bit."""
    return b.bitcast(b.xor(b.bitcast(x, _U32), b.and_(b.bitcast(like, _U32), _k(_SIGN))), _F32)


@_word(types.uint32, types.float32)
def magnitude_bits(b: Any, x: Any) -> Any:
    """The bits without the sign: as integers they stand in the order of the magnitudes."""
    return b.and_(b.bitcast(x, _U32), _k(_SIGN - 1))


@_word(types.float32, types.uint32)
def from_bits(b: Any, bits: Any) -> Any:
    """The number that has these bits."""
    return b.bitcast(bits, _F32)


@_word(types.uint32, types.uint32, types.boolean)
def tally(b: Any, count: Any, hit: Any) -> Any:
    """One more where it is a hit."""
    return b.add(count, b.zext(hit, _U32))


@_word(types.boolean, types.uint32, types.uint32, types.uint32)
def within(b: Any, bits: Any, least: Any, most: Any) -> Any:
    """Whether it is one of these; none is where the least is the larger one by 1."""
    return b.icmp_unsigned("<", b.sub(bits, least), b.sub(b.add(most, _k(1)), least))


@_word(types.float32, types.uint16)
def from_bfloat16(b: Any, x: Any) -> Any:
    """A bfloat16's bits are the upper half of the same float32's."""
    return b.bitcast(b.shl(b.zext(x, _U32), _k(16)), _F32)


@_word(types.uint16, types.float32)
def to_bfloat16(b: Any, x: Any) -> Any:
    """Rounded to nearest, ties to even; NaN to one NaN."""
    bits = b.bitcast(x, _U32)
    odd = b.and_(b.lshr(bits, _k(16)), _k(1))
    rounded = b.lshr(b.add(bits, b.add(_k(0x7FFF), odd)), _k(16))
    return b.trunc(b.select(b.fcmp_unordered("uno", x, x), _k(0x7FC0), rounded), _U16)


@_word(types.float32, types.uint16)
def from_float16(b: Any, x: Any) -> Any:
    """Its exponent moved by a product with 2¹¹², which makes denormals of it normal numbers, too."""
    bits = b.zext(x, _U32)
    moved = b.shl(b.and_(bits, _k(0x7FFF)), _k(13))
    number = b.bitcast(b.fmul(b.bitcast(moved, _F32), b.bitcast(_k((127 + 112) << 23), _F32)), _U32)
    odd = b.icmp_unsigned(">=", moved, _k(0x7C00 << 13))  # infinite or NaN
    found = b.select(odd, b.or_(moved, _k(_INFINITE)), number)
    return b.bitcast(b.or_(found, b.shl(b.and_(bits, _k(0x8000)), _k(16))), _F32)


@_word(types.uint16, types.float32)
def to_float16(b: Any, x: Any) -> Any:
    """Rounded to nearest, ties to even; what is too large becomes infinite, and NaN one NaN."""
    bits = b.bitcast(x, _U32)
    size = b.and_(bits, _k(_SIGN - 1))
    magic = _k((127 - 15 + 23 - 10 + 1) << 23)  # a sum with it leaves a denormal's bits at the end, rounded
    small = b.sub(b.bitcast(b.fadd(b.bitcast(size, _F32), b.bitcast(magic, _F32)), _U32), magic)
    odd = b.and_(b.lshr(size, _k(13)), _k(1))
    normal = b.lshr(b.add(size, b.add(_k(((15 - 127) << 23) + 0xFFF & 0xFFFF_FFFF), odd)), _k(13))
    large = b.select(b.icmp_unsigned(">", size, _k(_INFINITE)), _k(0x7E00), _k(0x7C00))
    found = b.select(b.icmp_unsigned("<", size, _k(113 << 23)), small, normal)
    found = b.select(b.icmp_unsigned(">=", size, _k((127 + 16) << 23)), large, found)
    return b.trunc(b.or_(found, b.lshr(b.and_(bits, _k(_SIGN)), _k(16))), _U16)


@_word(types.uint8, types.float32)
def to_float8(b: Any, x: Any) -> Any:
    """E4M3, which has no infinity: to nearest, ties to even; the largest is 448; NaN is one NaN."""
    bits = b.bitcast(x, _U32)
    size, most = b.and_(bits, _k(_SIGN - 1)), _k((127 + 8 << 23) + (6 << 20))
    size = b.select(b.icmp_unsigned(">", size, most), most, size)
    magic = _k((127 - 7 + 23 - 3 + 1) << 23)  # as of float16
    small = b.sub(b.bitcast(b.fadd(b.bitcast(size, _F32), b.bitcast(magic, _F32)), _U32), magic)
    odd = b.and_(b.lshr(size, _k(20)), _k(1))
    normal = b.lshr(b.add(size, b.add(_k(((7 - 127) << 23) + 0x7FFFF & 0xFFFF_FFFF), odd)), _k(20))
    found = b.select(b.icmp_unsigned("<", size, _k(121 << 23)), small, normal)
    found = b.select(b.fcmp_unordered("uno", x, x), _k(0x7F), found)
    return b.trunc(b.or_(found, b.lshr(b.and_(bits, _k(_SIGN)), _k(24))), ir.IntType(8))


@_word(types.uint8, types.float32)
def to_byte(b: Any, x: Any) -> Any:
    """Rounded to a whole number of at most 127 and its sign, halves away from zero; NaN is 0."""
    bits = b.bitcast(x, _U32)
    size = b.bitcast(b.and_(bits, _k(_SIGN - 1)), _F32)
    whole = b.fptosi(_clamped(b, size, ir.Constant(_F32, 127.0)), _U32)
    rest = b.fsub(size, b.sitofp(whole, _F32))
    up = b.and_(b.fcmp_ordered(">=", rest, ir.Constant(_F32, 0.5)), b.icmp_unsigned("<", whole, _k(127)))
    whole = b.add(whole, b.zext(up, _U32))
    return b.trunc(b.select(b.icmp_signed("<", bits, _k(0)), b.neg(whole), whole), ir.IntType(8))


@_word(types.uint8, types.float32, types.float32)
def to_code(b: Any, x: Any, most: Any) -> Any:
    """Cut to a whole number from 0 to another one; NaN is 0."""
    return b.trunc(b.fptosi(_clamped(b, x, most), _U32), ir.IntType(8))


@_word(types.uint8, types.float32, types.float32)
def to_fp4(b: Any, x: Any, scale: Any) -> Any:
    """The number of the nearest multiple of a scale that FP4 has, of two the smaller; 8 more below zero; NaN is 0."""
    bits = b.bitcast(x, _U32)
    size = b.bitcast(b.and_(bits, _k(_SIGN - 1)), _F32)
    ends = [b.fmul(scale, ir.Constant(_F32, between)) for between in BETWEEN_FP4]
    code = reduce(b.add, [b.zext(b.fcmp_ordered(">", size, end), _U32) for end in ends])
    sign = b.and_(b.lshr(bits, _k(28)), _k(8))
    return b.trunc(b.select(b.icmp_unsigned("==", code, _k(0)), code, b.or_(code, sign)), ir.IntType(8))


def _clamped(b: Any, x: Any, most: Any) -> Any:
    """From zero to another number; NaN is 0."""
    positive = b.select(b.fcmp_ordered(">", x, ir.Constant(_F32, 0.0)), x, ir.Constant(_F32, 0.0))
    return b.select(b.fcmp_ordered("<", positive, most), positive, most)


def _size(b: Any, x: Any) -> Any:
    return b.select(b.fcmp_unordered("uno", x, x), _k(0), b.and_(b.bitcast(x, _U32), _k(_SIGN - 1)))


@_word(types.uint32, types.uint32, types.float32)
def larger(b: Any, most: Any, x: Any) -> Any:
    """The larger one of the bits of two magnitudes; NaN has none."""
    return b.select(b.icmp_unsigned(">", size := _size(b, x), most), size, most)


@_word(types.uint32, types.uint32, types.uint32, types.uint32, types.float32)
def first_place(b: Any, before: Any, place: Any, most: Any, x: Any) -> Any:
    """The lower one of a place that was found before and this one, if the magnitude here has these bits."""
    hit = b.and_(b.icmp_unsigned("==", _size(b, x), most), b.icmp_unsigned("<", place, before))
    return b.select(hit, place, before)


@register_jitable
def largest_size(entries: Any) -> Any:
    """The bits of the largest magnitude of 32 entries."""
    most = np.uint32(0)
    for i in range(entries.size):  # a known number would be written out, not made of vectors
        most = larger(most, entries[i])
    return most


@register_jitable
def largest(entries: Any) -> Any:
    """The first of 32 entries whose magnitude is the largest."""
    most, place = largest_size(entries), np.uint32(32)
    for i in range(entries.size):
        place = first_place(place, np.uint32(i), most, entries[i])
    found = entries[place]
    return found if found == found else np.float32(0)


@register_jitable
def put_scale(scale: Any, found: Any) -> Any:
    """Write a scale as float16 to the front of a block's bytes; 1 by it, of zero 0."""
    half = to_float16(scale)
    found[0], found[1] = half & 255, half >> 8
    return np.float32(0) if scale == np.float32(0) else np.float32(1) / scale


@register_jitable
def scale_power(entries: Any) -> Any:
    """The exponent with which the largest of 32 entries has a size of FP4, as MXFP4 writes it."""
    power: Any = np.int64(largest_size(entries)) >> 23
    return max(power, 2) - 2


@register_jitable
def power_of_two(power: Any) -> Any:
    """What such an exponent is to FP4's sizes doubled: 0 is 2 to the -128."""
    return from_bits(np.uint32(power - 1 << 23 if power > 1 else 1 << power + 21))


_TURNS = (10, 26), (11, 21), (13, 27), (23, 5), (6, 20), (17, 11), (25, 10), (18, 20)


def threefry_words(
    words: list[Any],
    key: list[Any],
    add: Callable[[Any, Any], Any],
    xor: Callable[[Any, Any], Any],
    turn: Callable[[Any, int], Any],
    number: Callable[[int], Any] = int,
) -> list[Any]:
    """Threefry4x32-20 (Salmon et al., 2011) of four words and a key of four, in whatever computes with 32 bits."""
    keys, found = [*key, reduce(xor, key, number(0x1BD11BDA))], list(words)
    for count in range(21):
        if count % 4 == 0:
            found = [add(word, keys[(count // 4 + place) % 5]) for place, word in enumerate(found)]
            found[3] = add(found[3], number(count // 4))
        for one, by in zip((0, 2) if count < 20 else (), _TURNS[count % 8], strict=False):
            other = one + 1 if count % 2 == 0 else 3 - one
            found[one] = add(found[one], found[other])
            found[other] = xor(turn(found[other], by), found[one])
    return found


_FOUR: Any = types.UniTuple


@_word(_FOUR(types.uint32, 4), types.int64, *4 * (types.uint32,))
def threefry(b: Any, counter: Any, *key: Any) -> Any:
    """Four random words, of a counter."""
    words = [b.trunc(counter, _U32), b.trunc(b.lshr(counter, _k(32, _U64)), _U32), _k(0), _k(0)]

    def turn(x: Any, by: int) -> Any:
        return b.or_(b.shl(x, _k(by)), b.lshr(x, _k(32 - by)))

    packed = ir.Constant(ir.ArrayType(_U32, 4), ir.Undefined)
    for place, word in enumerate(threefry_words(words, list(key), b.add, b.xor, turn, _k)):
        packed = b.insert_value(packed, word, place)
    return packed


@_word(types.uint32, types.int64, types.uint32, types.int64)
def rival(b: Any, place: Any, word: Any, count: Any) -> Any:
    """One of the other places among so many, by the upper 31 of 32 random bits; twice that, and the lowest bit."""
    others = b.sub(b.trunc(count, _U32), _k(1))
    ahead = b.trunc(b.lshr(b.mul(b.zext(b.lshr(word, _k(1)), _U64), b.zext(others, _U64)), _k(31, _U64)), _U32)
    found = b.add(b.add(b.trunc(place, _U32), _k(1)), ahead)
    found = b.select(b.icmp_unsigned(">", found, others), b.sub(found, b.add(others, _k(1))), found)
    return b.or_(b.shl(found, _k(1)), b.and_(word, _k(1)))


@_word(types.uint64, types.uint32)
def half(b: Any, word: Any) -> Any:
    """All bits but the lowest, as a place."""
    return b.zext(b.lshr(word, _k(1)), _U64)


@_word(types.uint32, types.uint32, types.uint32)
def coin(b: Any, bits: Any, word: Any) -> Any:
    """The bits, or one more, by a word's lowest bit."""
    return b.add(bits, b.and_(word, _k(1)))


@_word(types.boolean, types.uint16, types.int64)
def is_below(b: Any, draw: Any, most: Any) -> Any:
    """Whether a draw is less."""
    return b.icmp_unsigned("<", b.zext(draw, _U32), b.trunc(most, _U32))
