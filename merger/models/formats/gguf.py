"""Tensors as GGUF files store them: rows of blocks, as `gguf` reads each of its types, in llama.cpp's order.

Not here: what a file says of its tensors, and what they are called (models.gguf).
"""

from __future__ import annotations

from functools import cache, partial

import numpy as np

from merger.models.formats.packed import Floats, PackedFormat, PackedMatrix

_FORM = "GGUF "
PLAIN_FORMS = tuple(f"{_FORM}{kind}" for kind in ("F32", "F16", "BF16"))
"""Those of numbers as they are."""


def form_of_kind(kind: str) -> str:
    """What readers know a type by.

    >>> form_of_kind("Q4_K")
    'GGUF Q4_K'
    """
    return _FORM + kind


@cache
def gguf_format(form: str) -> PackedFormat:
    """The format of a type of GGUF."""
    unpack = partial(_unpack, form.removeprefix(_FORM))
    return PackedFormat(form, "gguf: its own routines, in float32", {}, lambda *_: None, unpack)


def _unpack(kind: str, matrix: PackedMatrix, first: int, last: int) -> Floats:
    """Rows of a matrix; where llama.cpp has the halves of a head's rows in turn, from where they stand there."""
    import gguf  # an extra: whoever reads a header has asked for it

    rows, size = np.arange(first, last), int(matrix.settings["head_rows"])
    if size:
        place = rows % size
        rows += place % (size // 2) * 2 + place // (size // 2) - place
    low = int(rows.min())
    codes = matrix.read("codes", (low, int(rows.max()) + 1))[rows - low]
    found: Floats = gguf.quants.dequantize(codes, gguf.GGMLQuantizationType[kind])
    added = np.float32(matrix.settings["added"])
    return found + added if added else found
