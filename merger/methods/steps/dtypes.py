"""Stored numbers to float32 and back, rounded once to nearest, ties to even; and sums made of their bits at once.

Not here: where the bytes come from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from merger.methods.steps.step import Array, room, single, step

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Raw = NDArray[Any]

from_bfloat16: Any = None
to_bfloat16: Any = None
from_float16: Any = None
to_float16: Any = None
to_float8: Any = None
from_bits: Any = None
largest: Any = None
largest_size: Any = None
put_scale: Any = None
to_byte: Any = None
to_code: Any = None
to_fp4: Any = None
scale_power: Any = None
power_of_two: Any = None
"""Words of compiled loops: `intrinsics` has them."""

BETWEEN_FP4 = (0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0)
"""What lies between the sizes that MXFP4 has of a scale: 0, 1, 2, 3, 4, 6, 8 and 12 times of it."""

HELD: Mapping[str, str] = {
    "F64": "<f8", "F32": "<f4", "F16": "<u2", "BF16": "<u2", "I8": "i1", "F8_E4M3": "u1", "F8_E5M2": "u1",
    "F8_E8M0": "u1",
}  # fmt: skip
"""The numpy dtype in which the bits of a dtype of safetensors are held."""


@step("void(uint16[::1], float32[::1])")
def load_bfloat16(raw: Raw, out: Array) -> None:
    """Bits of bfloat16 to float32."""
    for i in range(out.size):
        out[i] = from_bfloat16(raw[i])


@step("void(float32[::1], uint16[::1])")
def store_bfloat16(x: Array, out: Raw) -> None:
    """float32 to bits of bfloat16."""
    for i in range(out.size):
        out[i] = to_bfloat16(x[i])


@step("void(uint16[::1], uint16[::1], float32, float32[::1])")
def scale_bfloat16(raw: Raw, base: Raw, factor: float, out: Array) -> None:
    """The difference of bits of bfloat16, times a number."""
    for i in range(out.size):
        out[i] = (from_bfloat16(raw[i]) - from_bfloat16(base[i])) * factor


@step("void(float32[::1], uint16[::1], uint16[::1], float32)")
def add_scaled_bfloat16(total: Array, raw: Raw, base: Raw, factor: float) -> None:
    """To each entry such a difference times a number."""
    for i in range(total.size):
        total[i] += (from_bfloat16(raw[i]) - from_bfloat16(base[i])) * factor


@step("void(float32[::1], uint16[::1], uint16[::1])")
def store_sum_bfloat16(x: Array, base: Raw, out: Raw) -> None:
    """float32 and bits of bfloat16 to bits of their sum."""
    for i in range(out.size):
        out[i] = to_bfloat16(x[i] + from_bfloat16(base[i]))


@step("void(uint16[::1], float32[::1])")
def load_float16(raw: Raw, out: Array) -> None:
    """Bits of float16 to float32."""
    for i in range(out.size):
        out[i] = from_float16(raw[i])


@step("void(float32[::1], uint16[::1])")
def store_float16(x: Array, out: Raw) -> None:
    """float32 to bits of float16."""
    for i in range(out.size):
        out[i] = to_float16(x[i])


@step("void(float32[::1], uint8[::1])")
def store_float8(x: Array, out: Raw) -> None:
    """float32 to bits of E4M3."""
    for i in range(out.size):
        out[i] = to_float8(x[i])


# ---- blocks of 32 entries with a scale, as GGUF has them: the bits of `gguf.quants`; a NaN counts as nothing ---------


@step("void(float32[::1], uint8[::1])")
def store_q8_0(x: Array, out: Raw) -> None:
    """float32 to GGUF's Q8_0: of 32 entries a float16 scale, and each in eight bits, halves rounded away from zero."""
    for b in range(out.size // 34):
        entries, found = x[32 * b : 32 * b + 32], out[34 * b : 34 * b + 34]
        inverse, codes = put_scale(from_bits(largest_size(entries)) / single(127), found), found[2:34]
        for i in range(codes.size):
            codes[i] = to_byte(entries[i] * inverse)


@store_q8_0.torch
def _(x: Any, out: Any) -> None:
    import torch

    blocks, found = _blocks(x, out, 34)
    scale = blocks.abs().nan_to_num(0, torch.inf).amax(1, keepdim=True) / 127
    number = blocks * torch.where(scale == 0, 0, 1 / scale)
    size = number.abs().nan_to_num(0).clamp(max=127)
    whole = (size.floor() + (size - size.floor() >= 0.5)).clamp(max=127)
    _scales(scale, found)
    found[:, 2:] = torch.where(number > 0, whole, -whole).to(torch.int8).view(torch.uint8)


@step("void(float32[::1], uint8[::1])")
def store_q4_0(x: Array, out: Raw) -> None:
    """float32 to GGUF's Q4_0: of 32 entries a float16 scale, which makes the largest -8, and each in four bits."""
    for b in range(out.size // 18):
        entries, found = x[32 * b : 32 * b + 32], out[18 * b : 18 * b + 18]
        inverse = put_scale(largest(entries) / single(-8), found)
        low, high, codes = entries[:16], entries[16:], found[2:18]
        for i in range(codes.size):
            one, other = low[i] * inverse + single(8.5), high[i] * inverse + single(8.5)
            codes[i] = to_code(one, single(15)) | to_code(other, single(15)) << 4


@store_q4_0.torch
def _(x: Any, out: Any) -> None:
    blocks, found = _blocks(x, out, 18)
    codes = _codes(blocks, found, 8)
    found[:, 2:] = codes[:, :16] | codes[:, 16:] << 4


@step("void(float32[::1], uint8[::1])")
def store_q5_0(x: Array, out: Raw) -> None:
    """float32 to GGUF's Q5_0: the same with -16 and five bits, of which the fifth ones stand together."""
    for b in range(out.size // 22):
        entries, found = x[32 * b : 32 * b + 32], out[22 * b : 22 * b + 22]
        inverse = put_scale(largest(entries) / single(-16), found)
        low, high, codes = entries[:16], entries[16:], found[6:22]
        fifth = 0
        for i in range(codes.size):
            one = to_code(low[i] * inverse + single(16.5), single(31))
            other = to_code(high[i] * inverse + single(16.5), single(31))
            codes[i] = one & 15 | (other & 15) << 4
            fifth |= one >> 4 << i | other >> 4 << i + 16
        for i in range(4):
            found[2 + i] = fifth >> 8 * i & 255


@store_q5_0.torch
def _(x: Any, out: Any) -> None:
    import torch

    blocks, found = _blocks(x, out, 22)
    codes = _codes(blocks, found, 16)
    found[:, 6:] = codes[:, :16] & 15 | codes[:, 16:] << 4
    places = torch.arange(8, dtype=torch.uint8, device=x.device)
    found[:, 2:6] = ((codes >> 4).view(-1, 4, 8) << places).sum(2)


@step("void(float32[::1], uint8[::1])")
def store_mxfp4(x: Array, out: Raw) -> None:
    """float32 to GGUF's MXFP4: of 32 entries a power of two, and each as the nearest of eight multiples of it."""
    for b in range(out.size // 17):
        entries, found = x[32 * b : 32 * b + 32], out[17 * b : 17 * b + 17]
        power = scale_power(entries)
        scale, found[0] = power_of_two(power), power
        low, high, codes = entries[:16], entries[16:], found[1:17]
        for i in range(codes.size):
            codes[i] = to_fp4(low[i], scale) | to_fp4(high[i], scale) << 4


@store_mxfp4.torch
def _(x: Any, out: Any) -> None:
    import torch

    blocks, found = _blocks(x, out, 17)
    size = blocks.abs().nan_to_num(0, torch.inf)
    power = (size.amax(1, keepdim=True).view(torch.int32) >> 23).clamp(min=2) - 2
    scale = torch.where(power < 2, 1 << power + 21, power - 1 << 23).view(torch.float32)
    codes = (size[..., None] > scale[..., None] * torch.tensor(BETWEEN_FP4, device=x.device)).sum(2)
    codes = torch.where((blocks < 0) & (codes > 0), codes + 8, codes).to(torch.uint8)
    found[:, :1], found[:, 1:] = power, codes[:, :16] | codes[:, 16:] << 4


def _blocks(x: Any, out: Any, size: int) -> tuple[Any, Any]:
    """The entries of whole blocks, and the bytes that each block takes."""
    found = out.view(-1, size)
    return x[: 32 * len(found)].view(-1, 32), found


def _codes(blocks: Any, found: Any, least: int) -> Any:
    """The codes of blocks in which what is largest becomes the negative number; their scales go into the bytes."""
    import torch

    place = blocks.abs().nan_to_num(0, torch.inf).argmax(1, keepdim=True)
    scale = blocks.gather(1, place).nan_to_num(0, torch.inf, -torch.inf) / -least
    _scales(scale, found)
    number = blocks * torch.where(scale == 0, 0, 1 / scale) + (least + 0.5)
    return number.nan_to_num(0).clamp(0, 2 * least - 1).to(torch.uint8)


def _scales(scale: Any, found: Any) -> None:
    """The bits of float16 into the first two bytes of each block."""
    import torch

    bits = scale.half().view(torch.int16)
    found[:, 0], found[:, 1] = bits[:, 0] & 255, bits[:, 0] >> 8 & 255


BLOCKS: Mapping[str, tuple[int, int]] = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (32, 34), "Q4_0": (32, 18), "Q5_0": (32, 22),
    "MXFP4": (32, 17),
}  # fmt: skip
"""How many entries of a GGUF's type stand together, and in how many bytes."""


def quantise(x: Array, kind: str, out: Raw) -> None:
    """Round entries to a type of `BLOCKS`, whose bytes `out` has room for."""
    if kind in _QUANTISING:
        _QUANTISING[kind](x, out)
    else:
        store(x, kind, out.view(HELD[kind]))


_QUANTISING = {"Q8_0": store_q8_0, "Q4_0": store_q4_0, "Q5_0": store_q5_0, "MXFP4": store_mxfp4}


@dataclass(frozen=True)
class Held:
    """Entries as they are stored: their bits, as `HELD` has them, and their dtype as safetensors writes it."""

    bits: Raw
    dtype: str

    def floats(self, start: int, stop: int, out: Array) -> Array:
        """Some of the entries in float32, in the front of `out`."""
        return load(self.bits[start:stop], self.dtype, out)


class Tile(Sequence[Array]):
    """A method's inputs at some entries, each made float32 as it is asked for.

    Args:
        held: all entries of each as they are stored, and last the base's, if it is subtracted.
        has_base: whether it is.
        start: the first of the entries.
        stop: the end of them.
        shape: what the method wants of a row of entries.
    """

    def __init__(
        self, held: Sequence[Held], has_base: bool, start: int, stop: int, shape: Callable[[Array], Array]
    ) -> None:
        inputs = held[: len(held) - has_base]
        self._held = [Held(each.bits[start:stop], each.dtype) for each in inputs]
        self.based = Held(held[-1].bits[start:stop], held[-1].dtype) if has_base else None
        self._made = dict[int, Array]()
        self._entries, self._shape = stop - start, shape

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        number = range(len(self))[place]
        if number not in self._made:
            self._made[number] = self._shape(self._difference(self._held[number]))
        return self._made[number]

    def _difference(self, held: Held) -> Array:
        import numpy as np

        found, base = self._floats(held), self.base
        return found if base is None else np.subtract(found, base, out=found)

    @cached_property
    def base(self) -> Array | None:
        """What is subtracted, in one row."""
        return None if self.based is None else self._floats(self.based)

    def _floats(self, held: Held) -> Array:
        return held.floats(0, self._entries, room(4 * self._entries).view("<f4"))

    def weighted_sum(self, factors: Sequence[float]) -> Array | None:
        """The sum of each input times its factor, made of their bits at once; None where that cannot be.

        The numbers and their order are those of `arithmetic.weighted_sum`.
        """
        import numpy as np

        every = [*self._held, *([] if self.based is None else [self.based])]
        if {each.dtype for each in every} != {"BF16"} or len(factors) != len(self):
            return None
        base = room(2 * self._entries).view("<u2") if self.based is None else self.based.bits
        if self.based is None:
            base[:] = 0  # a number less zero is itself
        rows = [np.ascontiguousarray(each.bits) for each in self._held]
        scale_bfloat16(rows[0], base, factors[0], total := room(4 * self._entries).view("<f4"))
        for row, factor in zip(rows[1:], factors[1:], strict=True):
            add_scaled_bfloat16(total, row, base, factor)
        return self._shape(total)


def store_sum(x: Array, base: Held | None, dtype: str, out: Raw) -> None:
    """Round entries, to which a base is added if there is one, to a dtype, whose bits `out` has room for."""
    import numpy as np

    if base is not None and (base.dtype, dtype) == ("BF16", "BF16"):
        return store_sum_bfloat16(x, base.bits, out)
    if base is not None:
        np.add(x, base.floats(0, x.size, room(4 * x.size).view("<f4")), out=x)
    return store(x, dtype, out)


def load(raw: Raw, dtype: str, out: Array) -> Array:
    """The entries that the bits of a dtype stand for, in the front of `out`.

    Args:
        raw: their bits, as `HELD` has them.
        dtype: as safetensors writes it.
        out: room for as many.
    """
    import numpy as np

    found = out[: raw.size]
    if dtype == "BF16":
        load_bfloat16(np.ascontiguousarray(raw), found)
    elif dtype == "F16":
        load_float16(np.ascontiguousarray(raw), found)
    elif dtype.startswith("F8"):
        np.take(_table(dtype), raw, out=found)
    else:
        np.copyto(found, raw, casting="same_kind")
    return found


def store(x: Array, dtype: str, out: Raw) -> None:
    """Round entries to a dtype, whose bits `out` has room for."""
    import numpy as np

    if dtype == "BF16":
        store_bfloat16(x, out)
    elif dtype == "F16":
        store_float16(x, out)
    elif dtype == "F8_E4M3":
        store_float8(x, out)
    else:
        np.copyto(out, x.reshape(-1))


@cache
def _table(dtype: str) -> Array:
    """What each of 256 bit patterns stands for, by the OCP's formats of 8 bits."""
    import numpy as np

    bits = np.arange(256)
    if dtype == "F8_E8M0":
        return np.where(bits == 255, np.nan, np.exp2(bits - 127.0)).astype(np.float32)
    few, bias, last = (3, 7, 0x7F) if dtype == "F8_E4M3" else (2, 15, 0x7D)
    exponent, mantissa = bits >> few & (0x7F >> few), (bits & ((1 << few) - 1)) / (1 << few)
    sizes = np.where(exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent - bias))
    sizes[(bits & 0x7F) >= last] = np.nan
    sizes[(bits & 0x7F == 0x7C) & (few == 2)] = np.inf
    return np.where(bits < 128, sizes, -sizes).astype(np.float32)
