"""Stored numbers to float32 and back, rounded once to nearest, ties to even. Not here: where the bytes come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from merger.methods.steps.step import Array, step

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Raw = NDArray[Any]

from_bfloat16: Any = None
to_bfloat16: Any = None
from_float16: Any = None
to_float16: Any = None
"""Words of compiled loops: `intrinsics` has them."""

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


@dataclass(frozen=True)
class Held:
    """Entries as they are stored: their bits, as `HELD` has them, and their dtype as safetensors writes it."""

    bits: Raw
    dtype: str

    def floats(self, start: int, stop: int, out: Array) -> Array:
        """Some of the entries in float32, in the front of `out`."""
        return load(self.bits[start:stop], self.dtype, out)


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
