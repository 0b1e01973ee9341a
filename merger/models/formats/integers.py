"""Whole numbers of 2, 4 or 8 bits in words of 32, less a zero point and times a scale: compressed-tensors, GPTQ, AWQ.

Follows, in the order of codes and in what is rounded, compressed-tensors' pack-quantized, GPTQModel and AutoAWQ (gemm).
Not here: what is common to packed formats (packed).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merger.errors import ModelError, Problem
from merger.models.formats.packed import Described, Floats, PackedFormat, PackedMatrix, Parts, round_to

Codes = NDArray[np.uint8]
_WORD = 32
_BITS = (2, 4, 8)
_SCALES = ("F16", "BF16", "F32")
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Of eight columns the places in a word, counted from its low end."""


@cache
def _split(bits: int) -> NDArray[Any]:
    """For each byte its codes, the lowest first, as the bytes of one number."""
    places = np.arange(0, 8, bits)
    return ((np.arange(256)[:, None] >> places) & ((1 << bits) - 1)).astype(np.uint8).view(f"<u{len(places)}").ravel()


def codes_of(words: NDArray[np.int32], bits: int) -> Codes:
    """The codes of words, one axis more, the lowest bits first."""
    return _split(bits)[np.ascontiguousarray(words)[..., None].view(np.uint8)].view(np.uint8)


def _covering(first: int, last: int, bits: int) -> tuple[int, int]:
    """The words that hold these codes of a run."""
    return first * bits // _WORD, -(-last * bits // _WORD)


def _dequantise(codes: Codes, zeros: Floats, scales: Floats, groups: NDArray[np.int64] | None) -> Floats:
    """Rows of codes less the zero point and times the scale of their group; `groups` where these are no runs."""
    numbers = codes.astype(np.float32, order="C")
    if groups is None:
        runs = numbers.reshape(*scales.shape, -1)
        runs -= zeros[..., None]
        runs *= scales[..., None]
        return numbers
    numbers -= zeros[:, groups]
    numbers *= scales[:, groups]
    return numbers


def _groups(of: PackedMatrix, count: int) -> NDArray[np.int64] | None:
    """The group of each column; None: they are runs of equal length.

    Raises:
        ModelError: there are not so many.
    """
    if "order" not in of.parts:
        return None
    found = of.read("order").astype(np.int64)
    if len(found) and not 0 <= found.min() <= found.max() < count:
        what = f"{of.name} is of {count} groups, and its g_idx names {found.min()} to {found.max()}"
        raise ModelError(Problem(what, hint="the model is damaged: download it again, or ask its author"))
    return None if np.array_equal(found, np.arange(len(found)) * count // max(1, len(found))) else found


# ---- compressed-tensors: rows of words ------------------------------------------------------------------------------


def _weights(said: Mapping[str, Any]) -> Iterator[tuple[int, int | None]]:
    """Bits and group size of every scheme that the config gives weights of whole numbers."""
    schemes = said.get("config_groups")
    for scheme in schemes.values() if isinstance(schemes, dict) else ():
        weights = scheme.get("weights") if isinstance(scheme, dict) else None
        if isinstance(weights, dict) and weights.get("type", "int") == "int" and weights.get("num_bits") in _BITS:
            grouped = weights.get("strategy") == "group" and isinstance(weights.get("group_size"), int)
            yield weights["num_bits"], weights["group_size"] if grouped else None


def _pack_quantized(parts: Parts, said: Mapping[str, Any]) -> Described:
    """Read by the one scheme that the shapes fit."""
    codes, scales = parts["codes"], parts["scales"]
    if codes.dtype != "I32" or scales.dtype not in _SCALES or (len(codes.shape), len(scales.shape)) != (2, 2):
        return None
    (rows, words), (scale_rows, groups) = codes.shape, scales.shape
    found = {
        (bits, columns)
        for bits, size in _weights(said)
        for columns in [words * _WORD // bits if size is None else groups * size]
        if words == -(-columns * bits // _WORD) and (size is not None or groups == 1)
    }
    if len(found) != 1 or scale_rows != rows:
        return None
    bits, columns = found.pop()
    zeros, order = parts.get("zeros"), parts.get("order")
    if (zeros is not None and (zeros.dtype, zeros.shape) != ("I32", (-(-rows * bits // _WORD), groups))) or (
        order is not None and order.shape != (columns,)
    ):
        return None
    return (rows, columns), {"bits": bits, "rounded": scales.dtype}


def _unpack_pack_quantized(of: PackedMatrix, first: int, last: int) -> Floats:
    """Both codes and zero points have half of their range added; without these the half is the zero point."""
    bits, columns = int(of.settings["bits"]), of.shape[1]
    if "shape" in of.parts and not np.array_equal(of.read("shape"), of.shape):
        what = f"{of.name} is {of.read('shape').tolist()} by its weight_shape, and there are codes for {list(of.shape)}"
        raise ModelError(Problem(what, hint="read it back with compressed-tensors, save it, and merge that"))
    codes = codes_of(of.read("codes", (first, last)), bits).reshape(last - first, -1)[:, :columns]
    scales: Floats = of.read("scales", (first, last))
    zeros = np.full_like(scales, 1 << (bits - 1))
    if "zeros" in of.parts:
        begin, end = _covering(first, last, bits)
        stored = codes_of(of.read("zeros", (begin, end)), bits).swapaxes(1, 2).reshape(-1, scales.shape[1])
        zeros = stored[first - begin * _WORD // bits :][: last - first].astype(np.float32)
    unordered = "order" not in of.parts or -1 in of.read("order")  # as these may be written, too
    groups = None if unordered else _groups(of, scales.shape[1])
    return round_to(_dequantise(codes, zeros, scales, groups), str(of.settings["rounded"]))


# ---- GPTQ and AWQ: columns of words ---------------------------------------------------------------------------------


def _gptq(parts: Parts, said: Mapping[str, Any]) -> Described:
    """Words go down a column: each holds some rows of the stored, which are columns of what it stands for."""
    layout = said.get("checkpoint_format") or said.get("format") or "gptq"
    found = _stored_columns(parts)
    if found is None or layout not in ("gptq", "gptq_v2"):
        return None
    bits, groups, rows = found
    codes, order = parts["codes"], parts.get("order")
    columns = codes.shape[0] * _WORD // bits
    if codes.shape[1] != rows or (order is None and columns % groups) or (order and order.shape != (columns,)):
        return None
    return (rows, columns), {"bits": bits, "added": int(layout == "gptq"), "rounded": parts["scales"].dtype}


def _awq(parts: Parts, said: Mapping[str, Any]) -> Described:
    """Words go along a row: each holds eight columns of the stored, which are rows of what it stands for."""
    found = _stored_columns(parts)
    layout = str(said.get("version") or said.get("checkpoint_format") or said.get("format") or "gemm").lower()
    if found is None or layout != "gemm" or said.get("backend", "autoawq") not in ("autoawq", "auto"):
        return None
    bits, groups, rows = found
    columns, words = parts["codes"].shape
    if bits != 4 or rows % 8 or words != rows // 8 or columns % groups:
        return None
    return (rows, columns), {"rounded": parts["scales"].dtype}


def _stored_columns(parts: Parts) -> tuple[int, int, int] | None:
    """Bits, groups and columns, by scales of shape (groups, columns) and their zero points in words."""
    codes, zeros, scales = parts["codes"], parts["zeros"], parts["scales"]
    if (codes.dtype, zeros.dtype) != ("I32", "I32") or scales.dtype not in _SCALES:
        return None
    if not len(codes.shape) == len(zeros.shape) == len(scales.shape) == 2 or not zeros.entries or not scales.entries:
        return None
    (groups, words), (scale_groups, columns) = zeros.shape, scales.shape
    bits = next((bits for bits in _BITS if words == -(-columns * bits // _WORD)), None)
    return None if bits is None or groups != scale_groups else (bits, groups, columns)


def _unpack_gptq(of: PackedMatrix, first: int, last: int) -> Floats:
    """Before version 2 what is stored of a zero point is one less, in as many bits."""
    bits, added = int(of.settings["bits"]), int(of.settings["added"])
    words = of.read("codes", (0, of.parts["codes"][0]), (first, last))
    codes = codes_of(words, bits).swapaxes(0, 1).reshape(last - first, -1)
    groups = (0, of.parts["scales"][0])
    begin, end = _covering(first, last, bits)
    stored = codes_of(of.read("zeros", groups, (begin, end)), bits).reshape(groups[1], -1)
    zeros = (stored[:, first - begin * _WORD // bits :][:, : last - first] + np.uint8(added)) & ((1 << bits) - 1)
    scales = of.read("scales", groups, (first, last))
    made = _dequantise(codes, zeros.T.astype(np.float32), scales.T, _groups(of, groups[1]))
    return round_to(made, str(of.settings["rounded"]))


def _unpack_awq(of: PackedMatrix, first: int, last: int) -> Floats:
    """Eight columns lie in a word in an order of their own."""
    begin, end = _covering(first, last, 4)
    words, groups = (begin, end), (0, of.parts["scales"][0])
    mine = slice(first - begin * 8, last - begin * 8)
    codes, zeros = (
        codes_of(of.read(role, rows, words), 4)[..., _AWQ_PLACES].reshape(rows[1], -1)[:, mine]
        for role, rows in (("codes", (0, of.shape[1])), ("zeros", groups))
    )
    scales = of.read("scales", groups, (first, last))
    return round_to(_dequantise(codes.T, zeros.T.astype(np.float32), scales.T, None), str(of.settings["rounded"]))


_COLUMNS = {"codes": ".qweight", "zeros": ".qzeros", "scales": ".scales"}

FORMATS = (
    PackedFormat(
        "pack-quantized",
        "compressed-tensors (Kimi K2), 2, 4, 8 bits, groups or rows: (code - zero point) × scale in the scales' dtype",
        {"codes": "_packed", "scales": "_scale", "shape": "_shape", "zeros": "_zero_point", "order": "_g_idx"},
        _pack_quantized,
        _unpack_pack_quantized,
        optional=("shape", "zeros", "order"),
    ),
    PackedFormat(
        "GPTQ",
        "GPTQModel, 2, 4, 8 bits, version 1 or 2, any `desc_act`: scale × (code - zero point) in the scales' dtype",
        {**_COLUMNS, "order": ".g_idx"},
        _gptq,
        _unpack_gptq,
        optional=("order",),
        tensor=".weight",
        methods=("gptq",),
    ),
    PackedFormat(
        "AWQ",
        "AutoAWQ (gemm): (code - zero point) × scale in the scales' dtype",
        _COLUMNS,
        _awq,
        _unpack_awq,
        tensor=".weight",
        methods=("awq",),
    ),
)
