"""A GGUF file known in advance: its header from metadata, names, shapes and types of tensors.

Version 3 of the format: counts, metadata, names with their places, then the tensors, each at a multiple of 32 bytes.
Not here: what the metadata says (families, tokens), and rounding numbers to a type (steps).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True)
class GgufKind:
    """A type of entries: its number, that of files which mostly have it, and how many of it stand in how many bytes."""

    number: int
    file_type: int
    together: int
    nbytes: int


KINDS: Mapping[str, GgufKind] = {
    "F32": GgufKind(0, 0, 1, 4),
    "F16": GgufKind(1, 1, 1, 2),
    "BF16": GgufKind(30, 32, 1, 2),
    "Q8_0": GgufKind(8, 7, 32, 34),
    "Q4_0": GgufKind(2, 2, 32, 18),
    "Q5_0": GgufKind(6, 8, 32, 22),
    "MXFP4": GgufKind(39, 38, 32, 17),
}

ENDING = ".gguf"
ALIGNMENT = 32
_UINT16, _UINT32, _INT32, _FLOAT32, _BOOL, _TEXT, _LIST = 2, 4, 5, 6, 7, 8, 9

Value = str | bool | int | float | Sequence[str] | Sequence[int] | Sequence[float]


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file.

    Args:
        name: its name there.
        kind: its type.
        shape: as safetensors has it, the rows first.
        sources: the tensors of the result that it is made of, one behind the other; none: it is `data`.
        head_rows: rows of each head in which the two halves are to stand in turn, as llama.cpp rotates them; 0: none.
        added: what is added to each entry.
        data: its bytes.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    sources: tuple[str, ...] = ()
    head_rows: int = 0
    added: float = 0.0
    data: bytes = field(default=b"", repr=False)

    @property
    def nbytes(self) -> int:
        """How many bytes its entries take."""
        return nbytes_of(self.kind, math.prod(self.shape))

    @property
    def gap(self) -> int:
        """How many bytes of nothing follow it."""
        return -self.nbytes % ALIGNMENT

    @property
    def unit(self) -> int:
        """How many entries have to be there at once to be written."""
        return self.head_rows * math.prod(self.shape[1:]) or KINDS[self.kind].together


def nbytes_of(kind: str, entries: int) -> int:
    """How many bytes so many entries of a type take."""
    return entries // KINDS[kind].together * KINDS[kind].nbytes


@dataclass(frozen=True)
class GgufFile:
    """A file: its name, the type that most of it has, its metadata as `encode` writes it, and its tensors in order."""

    name: str
    kind: str
    metadata: tuple[bytes, ...] = field(repr=False)
    tensors: tuple[GgufTensor, ...] = field(repr=False)

    @cached_property
    def _infos(self) -> bytes:
        found, place = list[bytes](), 0
        for tensor in self.tensors:
            shape = tensor.shape[::-1]
            numbers = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, KINDS[tensor.kind].number, place)
            found.append(_text(tensor.name) + numbers)
            place += tensor.nbytes + tensor.gap
        return b"".join(found)

    @property
    def header(self) -> bytes:
        """The first bytes of the file, up to the first tensor."""
        counts = struct.pack("<4sIQQ", b"GGUF", 3, len(self.tensors), len(self.metadata))
        found = b"".join([counts, *self.metadata, self._infos])
        return found + bytes(-len(found) % ALIGNMENT)

    @property
    def size(self) -> int:
        """The file's size in bytes."""
        start = 24 + sum(map(len, self.metadata)) + len(self._infos)
        return start + -start % ALIGNMENT + sum(tensor.nbytes + tensor.gap for tensor in self.tensors)


def encode(key: str, value: Value) -> bytes:
    """An entry of the metadata; whole numbers get 32 bits, with a sign where they stand in a list."""
    if isinstance(value, str | bool | int | float):
        kind, data = _scalar(value)
        return _text(key) + struct.pack("<I", kind) + data
    kind, data = _items(value)
    return _text(key) + struct.pack("<IIQ", _LIST, kind, len(value)) + data


def encode_part(number: int, count: int, tensors: int) -> tuple[bytes, ...]:
    """What tells llama.cpp that a file is one of several: its number from 0; how many files and tensors there are."""
    pairs = (("no", _UINT16, "H", number), ("count", _UINT16, "H", count), ("tensors.count", _INT32, "i", tensors))
    return tuple(_text(f"split.{key}") + struct.pack(f"<I{form}", kind, value) for key, kind, form, value in pairs)


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "replace")
    return struct.pack("<Q", len(data)) + data


def _scalar(value: str | bool | int | float) -> tuple[int, bytes]:
    if isinstance(value, str):
        return _TEXT, _text(value)
    if isinstance(value, bool):
        return _BOOL, struct.pack("<?", value)
    return (_UINT32, struct.pack("<I", value)) if isinstance(value, int) else (_FLOAT32, struct.pack("<f", value))


def _items(values: Sequence[str] | Sequence[int] | Sequence[float]) -> tuple[int, bytes]:
    if any(isinstance(value, str) for value in values):
        return _TEXT, b"".join(_text(str(value)) for value in values)
    if any(isinstance(value, float) for value in values):
        return _FLOAT32, struct.pack(f"<{len(values)}f", *values)
    return _INT32, struct.pack(f"<{len(values)}i", *values)
