"""Floats of four bits (E2M1), two a byte: MXFP4 with a power of two for 32 of them, NVFP4 with a float8 scale for 16.

Follows the OCP Microscaling Formats specification 1.0 and, in what is rounded, transformers, NVIDIA's ModelOpt and
compressed-tensors. Not here: what is common to packed formats (packed).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merger.models.formats.packed import (
    Describe,
    Described,
    Floats,
    PackedFormat,
    PackedMatrix,
    Parts,
    powers_of_two,
    round_to,
    scale_groups,
)

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MX_BYTES = 16
"""Of the 32 codes that share a scale."""


@cache
def _pairs() -> NDArray[np.uint64]:
    """For each byte both of its numbers, the one of its low half first, side by side in eight bytes."""
    values = np.array([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], dtype=np.float32)
    codes = np.arange(256)
    return np.stack([values[codes & 15], values[codes >> 4]], axis=1).view(np.uint64).ravel()


def fours(codes: NDArray[np.uint8]) -> Floats:
    """What bytes stand for: twice as many numbers along the last axis."""
    return _pairs()[codes].view(np.float32)


# ---- MXFP4, as gpt-oss is published ---------------------------------------------------------------------------------


def _mxfp4(parts: Parts, _said: Mapping[str, Any]) -> Described:
    """Stored are columns, each a row of groups of its own: what they stand for is the transpose."""
    codes, scales = parts["codes"], parts["scales"]
    if (codes.dtype, scales.dtype) != ("U8", "U8") or len(codes.shape) not in (3, 4):
        return None
    if codes.shape != (*scales.shape, _MX_BYTES):
        return None
    *experts, columns, groups, _ = codes.shape
    return (*experts, groups * 2 * _MX_BYTES, columns), {}


def _unpack_mxfp4(of: PackedMatrix, first: int, last: int) -> Floats:
    """Each number times the power of two of its group; exact, so that no dtype rounds it."""
    size = 2 * _MX_BYTES
    columns, groups = (0, of.shape[1]), (first // size, -(-last // size))
    scales = powers_of_two()[of.read("scales", columns, groups)]
    numbers = scale_groups(fours(of.read("codes", columns, groups)), scales)
    return numbers.reshape(of.shape[1], -1)[:, first - groups[0] * size : last - groups[0] * size].T


# ---- NVFP4 of ModelOpt, and both as compressed-tensors writes them -------------------------------------------------


def _rows_of(group: int, scale: str) -> Describe:
    """What describes a matrix whose rows are stored, with a scale of this dtype for each so many numbers."""

    def describe(parts: Parts, _said: Mapping[str, Any]) -> Described:
        codes, scales = parts["codes"], parts["scales"]
        if (codes.dtype, scales.dtype) != ("U8", scale) or len(codes.shape) != 2:
            return None
        rows, bytes_of_row = codes.shape
        if scales.shape != (rows, 2 * bytes_of_row // group) or 2 * bytes_of_row % group:
            return None
        whole = parts.get("whole", scales)
        known = whole is scales or (whole.dtype == "F32" and whole.entries == 1)
        return ((rows, 2 * bytes_of_row), {}) if known else None

    return describe


def _unpack_modelopt(of: PackedMatrix, first: int, last: int) -> Floats:
    """Number times (scale times the tensor's scale); its table has no negative zero."""
    scales = of.read("scales", (first, last)) * of.read("whole").reshape(())
    numbers = fours(of.read("codes", (first, last))) + np.float32(0)
    return round_to(scale_groups(numbers, scales), of.dtype)


def _unpack_nvfp4(of: PackedMatrix, first: int, last: int) -> Floats:
    """Number times (scale through the tensor's scale), rounded to bfloat16 whatever the model is."""
    scales = np.divide(of.read("scales", (first, last)), of.read("whole").reshape(()), dtype=np.float32)
    return round_to(scale_groups(fours(of.read("codes", (first, last))), scales), "BF16")


def _unpack_mx_rows(of: PackedMatrix, first: int, last: int) -> Floats:
    """Number times power of two: exact."""
    return scale_groups(fours(of.read("codes", (first, last))), powers_of_two()[of.read("scales", (first, last))])


FORMATS = (
    PackedFormat(
        "MXFP4",
        "as gpt-oss is published; transformers: exact, the transpose of what is stored",
        {"codes": "_blocks", "scales": "_scales"},
        _mxfp4,
        _unpack_mxfp4,
        step=32,
    ),
    PackedFormat(
        "NVFP4",
        "ModelOpt: number × (scale × the tensor's scale) in float32, rounded to the model's dtype",
        {"codes": "", "scales": "_scale", "whole": "_scale_2"},
        _rows_of(16, "F8_E4M3"),
        _unpack_modelopt,
        mark="whole",
    ),
    PackedFormat(
        "NVFP4 of compressed-tensors",
        "compressed-tensors: number × (scale / the tensor's scale) in float32, rounded to bfloat16",
        {"codes": "_packed", "scales": "_scale", "whole": "_global_scale"},
        _rows_of(16, "F8_E4M3"),
        _unpack_nvfp4,
    ),
    PackedFormat(
        "MXFP4 of compressed-tensors",
        "compressed-tensors: exact",
        {"codes": "_packed", "scales": "_scale"},
        _rows_of(32, "U8"),
        _unpack_mx_rows,
    ),
)
