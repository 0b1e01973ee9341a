"""bitsandbytes: codes of four bits that a table of 16 numbers explains (nf4, fp4), and int8 by rows (LLM.int8).

Follows bitsandbytes' dequantize_4bit, dequantize_blockwise and int8_vectorwise_dequant in what is multiplied and
rounded. Not here: what is common to packed formats (packed).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merger.errors import ModelError, Problem
from merger.models.formats.packed import Described, Floats, PackedFormat, PackedMatrix, Parts, Settings, round_to

_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_BLOCKS = tuple(1 << power for power in range(5, 13))
"""How many numbers may share a scale."""

_INVERSE = np.float32(7.874015718698502e-3)
"""Of 127, as bitsandbytes writes it."""


# ---- four bits ------------------------------------------------------------------------------------------------------


def _four_bits(parts: Parts, said: Mapping[str, Any]) -> Described:
    """The shape stands in what is stored as JSON; blocks follow each other through rows."""
    state, codes = said["state"], parts["codes"]
    shape, dtype = state.get("shape"), _DTYPES.get(str(state.get("dtype")))
    block: Any = state.get("blocksize")
    if not _is_matrix(shape) or block not in _BLOCKS or dtype is None or codes.dtype != "U8":
        return None
    entries = math.prod(shape)
    blocks = -(-entries // block)
    fitting = codes.shape == (-(-entries // 2), 1) and _is(parts["table"], "F32", 16)
    scaled = _nested(parts, state, blocks) if "nested" in parts else {} if _is(parts["scales"], "F32", blocks) else None
    if not fitting or scaled is None:
        return None
    return (shape[0], shape[1]), {"block": block, "rounded": dtype, **scaled}


def _nested(parts: Parts, state: Mapping[str, Any], blocks: int) -> Settings | None:
    """Of scales that are stored as codes of eight bits themselves."""
    block: Any = state.get("nested_blocksize")
    offset = state.get("nested_offset")
    if block not in _BLOCKS or not isinstance(offset, float) or not math.isfinite(offset):
        return None
    codes = _is(parts["scales"], "U8", blocks) and _is(parts["nested_table"], "F32", 256)
    fitting = codes and _is(parts["nested"], "F32", -(-blocks // block)) and state.get("nested_dtype") == "float32"
    return {"nested_block": block, "offset": offset} if fitting else None


def _is_matrix(shape: Any) -> bool:
    return isinstance(shape, list) and len(shape) == 2 and all(type(side) is int and side > 0 for side in shape)


def _is(part: Any, dtype: str, entries: int) -> bool:
    return (part.dtype, part.shape) == (dtype, (entries,))


def _unpack_four_bits(of: PackedMatrix, first: int, last: int) -> Floats:
    """The high half of a byte first; numbers of the table times the scale of their block."""
    begin, end, block = first * of.shape[1], last * of.shape[1], int(of.settings["block"])
    codes, table = of.read("codes", (begin // 2, -(-end // 2))).ravel(), of.read("table")
    pairs = table[np.stack([codes >> 4, codes & 15], axis=-1)].ravel()
    numbers = pairs[begin % 2 :][: end - begin]
    scales = np.repeat(_scales(of, begin // block, -(-end // block)), block)
    numbers *= scales[begin % block :][: end - begin]
    return round_to(numbers, str(of.settings["rounded"])).reshape(last - first, -1)


def _scales(of: PackedMatrix, first: int, last: int) -> Floats:
    """The scales of these blocks."""
    stored: NDArray[Any] = of.read("scales", (first, last))
    if "nested" not in of.parts:
        return stored
    block = int(of.settings["nested_block"])
    outer = np.repeat(of.read("nested", (first // block, -(-last // block))), block)[first % block :][: last - first]
    found: Floats = of.read("nested_table")[stored] * outer + np.float32(of.settings["offset"])
    return found


# ---- eight bits -----------------------------------------------------------------------------------------------------


def _eight_bits(parts: Parts, _said: Mapping[str, Any]) -> Described:
    codes = parts["codes"]
    fitting = codes.dtype == "I8" and len(codes.shape) == 2 and _is(parts["scales"], "F32", codes.shape[0])
    return (codes.shape, {}) if fitting else None


def _unpack_eight_bits(of: PackedMatrix, first: int, last: int) -> Floats:
    """Number times the largest of its row, over 127: in float32, and not rounded."""
    if "layout" in of.parts and of.read("layout").any():
        what = f"{of.name} has its numbers in an order for one kind of GPU (weight_format)"
        raise ModelError(Problem(what, hint="load it with transformers, dequantize() it, save it, and merge that"))
    numbers = of.read("codes", (first, last)).astype(np.float32)
    numbers *= of.read("scales", (first, last))[:, None]
    numbers *= _INVERSE
    return numbers


_FOUR_BITS = {
    "codes": "", "scales": ".absmax", "table": ".quant_map", "nested": ".nested_absmax",
    "nested_table": ".nested_quant_map",
}  # fmt: skip

FORMATS = (
    *(
        PackedFormat(
            f"bitsandbytes {kind}",
            "bitsandbytes, nested scales too: number of the table × scale in float32, rounded to the state's dtype",
            {**_FOUR_BITS, "state": f".quant_state.bitsandbytes__{kind}"},
            _four_bits,
            _unpack_four_bits,
            mark="state",
            state="state",
            optional=("nested", "nested_table"),
        )
        for kind in ("nf4", "fp4")
    ),
    PackedFormat(
        "bitsandbytes int8",
        "bitsandbytes: number × largest of its row × (1 / 127) in float32",
        {"codes": ".weight", "scales": ".SCB", "layout": ".weight_format"},
        _eight_bits,
        _unpack_eight_bits,
        mark="scales",
        optional=("layout",),
        tensor=".weight",
    ),
)
