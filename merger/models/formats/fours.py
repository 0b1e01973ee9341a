"""Floats of four bits (E2M1), two a byte: MXFP4 with a power of two for 32 of them.

Follows the OCP Microscaling Formats specification 1.0. Not here: what is common to packed formats (packed).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merger.models.checkpoint import TensorInfo
from merger.models.formats.packed import Floats, PackedFormat, PackedMatrix, Settings, powers_of_two

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


def _mxfp4(parts: Mapping[str, TensorInfo], _said: Mapping[str, Any]) -> tuple[tuple[int, ...], Settings] | None:
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
    numbers = fours(of.read("codes", columns, groups))
    numbers *= powers_of_two()[of.read("scales", columns, groups)][..., None]
    return numbers.reshape(of.shape[1], -1)[:, first - groups[0] * size : last - groups[0] * size].T


FORMATS = (
    PackedFormat(
        "MXFP4", {"codes": "_blocks", "scales": "_scales"}, _mxfp4, _unpack_mxfp4, methods=("mxfp4",), step=32
    ),
)
