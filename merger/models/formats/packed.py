"""Tensors that are stored as codes of a few bits: how a format says so, and the numbers that the codes stand for.

A format is a table of the stored tensors that belong together, what their shapes tell, and one function that makes
rows of the tensor. Not here: the formats (fours, integers, bitsandbytes), and reading bytes (engine).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merger.models.checkpoint import TensorInfo

Floats = NDArray[np.float32]
Read = Callable[..., NDArray[Any]]
"""By role, part of a stored tensor: a range of each of its first axes, and all of the others."""

Settings = Mapping[str, int | float | str]
Parts = Mapping[str, TensorInfo]
Described = tuple[tuple[int, ...], Settings] | None
Describe = Callable[[Parts, Mapping[str, Any]], Described]
"""The shape of what stored tensors stand for, and settings; from the tensors by role, and from what the config says of
them, under "state" with what a tensor says that holds JSON."""


@dataclass(frozen=True)
class PackedTensor:
    """A tensor that is stored in several.

    Args:
        form: the format's name.
        parts: the stored tensors by their role, that of the codes first.
        shape: its own.
        settings: what the function that reads it has to know besides.
    """

    form: str
    parts: Parts
    shape: tuple[int, ...]
    settings: Settings = field(default_factory=dict)

    @property
    def codes(self) -> TensorInfo:
        """The stored tensor that holds most of it."""
        return self.parts["codes"]


@dataclass(frozen=True)
class PackedMatrix:
    """One matrix of such a tensor, as it is read.

    Args:
        name: the tensor's.
        shape: its rows and columns.
        dtype: the model's before it was quantised.
        parts: the shapes of the stored tensors by role, without an axis for matrices.
        settings: see PackedTensor.
        read: gives part of a stored tensor; what is stored as floats comes in float32.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    parts: Mapping[str, tuple[int, ...]]
    settings: Settings
    read: Read


@dataclass(frozen=True)
class PackedFormat:
    """A format of packed tensors.

    Args:
        name: what readers know it by; it stands in plan hashes.
        how: in what order and dtype its library reads it, for docs/formats.md.
        endings: by role what follows the tensor's stem in the name of a stored one; the codes first.
        describe: shape and settings; None: it does not read such tensors.
        unpack: rows ``[first, last)`` of a matrix in float32.
        mark: the role whose ending tells the format.
        optional: roles that may be missing.
        state: the role of a tensor that holds JSON; none: there is none.
        tensor: what follows the stem in the name of what they stand for.
        methods: which quant_method in the config speaks of it; none: its names tell enough.
        step: rows that are stored together.
    """

    name: str
    how: str
    endings: Mapping[str, str]
    describe: Describe
    unpack: Callable[[PackedMatrix, int, int], Floats]
    mark: str = "codes"
    optional: tuple[str, ...] = ()
    state: str = ""
    tensor: str = ""
    methods: tuple[str, ...] = ()
    step: int = 1


# ---- numbers --------------------------------------------------------------------------------------------------------

NUMPY_DTYPES: Mapping[str, str] = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1",
    "BOOL": "?",
}  # fmt: skip
"""How numpy holds what is stored; what it has no dtype for as its bits."""


def decode(bits: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Stored floats in float32, integers as they are."""
    if dtype.startswith("F8"):
        floats: Floats = _bytes_of(dtype)[bits]
        return floats
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.astype(np.float32, copy=False) if dtype.startswith("F") else bits


@cache
def _bytes_of(dtype: str) -> Floats:
    """What each byte stands for."""
    if dtype == "F8_E8M0":
        return np.append(powers_of_two()[:-1], np.float32(np.nan))
    mantissa, bias = (3, 7) if dtype == "F8_E4M3" else (2, 15)
    magnitude = np.arange(128)
    exponent, rest = magnitude >> mantissa, magnitude & ((1 << mantissa) - 1)
    scaled = np.where(exponent > 0, rest + (1 << mantissa), rest).astype(np.float32)
    found = np.ldexp(scaled, np.maximum(exponent, 1) - bias - mantissa)
    if dtype == "F8_E4M3":
        found[-1] = np.nan
    else:
        found[-4:] = (np.inf, np.nan, np.nan, np.nan)
    return np.concatenate([found, -found])


@cache
def powers_of_two() -> Floats:
    """By the byte of a scale its power of two, with 127 added to the exponent; the last is infinite."""
    with np.errstate(over="ignore"):
        return np.ldexp(np.float32(1), np.arange(256) - 127)


def round_to(values: Floats, dtype: str) -> Floats:
    """The numbers rounded to the nearest that a dtype has, ties to even."""
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    if dtype == "BF16":
        bits = values.view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)
        return np.where(np.isnan(values), values, rounded)
    return values


def scale_groups(numbers: Floats, scales: Floats) -> Floats:
    """The numbers, each row of them in as many groups as it has scales, times their group's; in place."""
    grouped = numbers.reshape(*scales.shape, -1)
    grouped *= scales[..., None]
    return numbers
