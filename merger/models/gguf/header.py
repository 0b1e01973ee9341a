"""What a GGUF file says before its tensors: metadata, and the name, type, shape and place of each of them.

How long that is stands nowhere, so it is read front to back in pieces, and every count and place is checked before it
is believed. Versions 2 and 3 of the format. Not here: what a model is made of it (source, tokenizer).
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from merger.errors import ModelError, Problem
from merger.models.checkpoint import is_weights
from merger.models.gguf.layout import ALIGNMENT, ENDING
from merger.runtime import install_command
from merger.safety.limits import GGUF_HEADER, excess

Fetch = Callable[[int, int], bytes]
"""The bytes ``[start, stop)`` of the file."""

_FIRST_BYTES = 1 << 20
_MOST_SIDES, _MOST_ALIGNMENT, _SHOWN = 4, 1 << 16, 60
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
_DAMAGED = "download it again, or ask its author"


# ---- files ----------------------------------------------------------------------------------------------------------

_PART = re.compile(r"-[0-9]{5}-of-([0-9]{5})\.gguf$")
_BESIDE = re.compile(r"(mmproj|.*imatrix)[^/]*$", re.IGNORECASE)
"""Files that hold no language model: what sees, and what a quantiser measured."""


def parts_of(file: str, files: Collection[str]) -> list[str]:
    """Those of a folder's files that are one with a file that somebody names: itself; of GGUF in parts all of them."""
    found = _PART.search(file)
    if found is None:
        return [name for name in files if name == file]
    stem, end = file[: found.start()], found[1]
    return sorted(name for name in files if re.fullmatch(rf"{re.escape(stem)}-[0-9]{{5}}-of-{end}\.gguf", name))


def find_gguf(files: Collection[str]) -> list[str]:
    """The GGUF files that a model is, in their order; none where it is something else.

    Raises:
        ModelError: they are several models, or a part is missing.
    """
    here = [name for name in files if "/" not in name]
    named = sorted(name for name in here if name.endswith(ENDING))
    found = [name for name in named if not _BESIDE.match(name)] or named
    if not found or any(map(is_weights, here)):
        return []
    parts = parts_of(found[0], found)
    if len(parts) < len(found):
        each = list(dict.fromkeys(parts_of(name, found)[0] for name in found))
        what = f"holds several GGUF files ({', '.join(each)})"
        raise ModelError(Problem(what, hint=f"name the one that is meant: .../{each[0]}"))
    count = _PART.search(found[0])
    if count and len(parts) != int(count[1]):
        raise ModelError(Problem(f"has {len(parts)} of {int(count[1])} parts ({parts[0]}, ...)", hint=_DAMAGED))
    return parts


# ---- headers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlacedTensor:
    """A tensor of a file: its name there, its type, its shape with the rows first, and its bytes ``[start, stop)``."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class GgufHeader:
    """What stands before a file's tensors, and these in the order of their places."""

    metadata: Mapping[str, Any]
    tensors: tuple[PlacedTensor, ...]


def read_gguf_header(file: str, size: int, fetch: Fetch, count: Callable[[int], None]) -> GgufHeader:
    """The header of a file.

    Args:
        file: its name.
        size: its size in bytes.
        fetch: reads it.
        count: is told how many tensors there are to be before any is read.

    Raises:
        ModelError: it is damaged, or of a kind that is not read; or what `count` raises.
    """
    try:
        cursor = _Cursor(size, fetch)
        tensors, entries = _read_counts(cursor)
        metadata = dict(_read_entries(cursor, entries))
        count(tensors)
        placed = _place(list(_read_tensors(cursor, tensors)), cursor.place, size, metadata)
    except (ValueError, struct.error, OverflowError) as error:
        raise ModelError(Problem(f"{file}: the GGUF header cannot be read: {error}", hint=_DAMAGED)) from None
    return GgufHeader(metadata, placed)


class _Cursor:
    """Hands out a file's bytes front to back; pieces of twice the size are fetched as they are needed."""

    def __init__(self, size: int, fetch: Fetch) -> None:
        self._size, self._fetch, self._data = size, fetch, bytearray()
        self.place, self._values = 0, 0

    def take(self, count: int) -> bytes:
        start, stop = self.place, self.place + count
        if stop > len(self._data):
            self._fill(stop)
        self.place = stop
        return bytes(self._data[start:stop])

    def _fill(self, stop: int) -> None:
        if stop > self._size:
            raise ValueError(f"it is cut short ({self._size:,} bytes in all)")
        if problem := excess("it", stop, GGUF_HEADER):
            raise ValueError(problem.what)
        held = len(self._data)
        self._data += self._fetch(held, min(max(stop, 2 * held, _FIRST_BYTES), self._size, GGUF_HEADER.most))

    def numbers(self, form: str, count: int = 1) -> tuple[Any, ...]:
        self.expect(count, struct.calcsize(form))
        return struct.unpack(f"<{count}{form}", self.take(count * struct.calcsize(form)))

    def text(self) -> str:
        length = int.from_bytes(self.take(8), "little")
        return self.take(length).decode("utf-8", "replace")

    def expect(self, count: int, nbytes: int) -> None:
        """That so many values of so many bytes at least can follow."""
        self._values += count
        if self._values > (GGUF_HEADER.values or 0):
            raise ValueError(f"more than {GGUF_HEADER.values:,} values stand in it")
        if self.place + count * nbytes > self._size:
            raise ValueError(f"it promises {count:,} values, and is cut short ({self._size:,} bytes in all)")


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
    """How many tensors there are, and entries of metadata."""
    if cursor.take(4) != b"GGUF":
        raise ValueError("it is no GGUF file")
    raw = cursor.take(4)
    version = int.from_bytes(raw, "little")
    if version not in (2, 3):
        swapped = int.from_bytes(raw, "big") in (2, 3)
        raise ValueError("it is big-endian" if swapped else f"it is of version {version}, and 2 and 3 are read")
    tensors, entries = cursor.numbers("Q", 2)
    return tensors, entries


def _read_entries(cursor: _Cursor, count: int) -> Iterator[tuple[str, Any]]:
    cursor.expect(count, 13)
    seen = set[str]()
    for _ in range(count):
        key = cursor.text()
        if key in seen:
            raise ValueError(f"{key[:_SHOWN]!r} stands twice")
        seen.add(key)
        yield key, _read_value(cursor, *cursor.numbers("I"))


def _read_value(cursor: _Cursor, kind: int) -> Any:
    if kind == _TEXT:
        return cursor.text()
    if kind in _NUMBERS:
        (value,) = cursor.numbers(_NUMBERS[kind])
        return float(str(np.float32(value))) if _NUMBERS[kind] == "f" else value  # 1e-06, not 9.999999974752427e-07
    if kind != _LIST:
        raise ValueError(f"a value is of type {kind}, which is not known")
    (kind,), (count,) = cursor.numbers("I"), cursor.numbers("Q")
    if kind in _NUMBERS:
        return list(cursor.numbers(_NUMBERS[kind], count))
    if kind != _TEXT:
        raise ValueError(f"a list holds values of type {kind}, which are not read")
    cursor.expect(count, 8)
    return [cursor.text() for _ in range(count)]


def _read_tensors(cursor: _Cursor, count: int) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
    """Name, shape with the rows first, number of the type, place behind the header."""
    cursor.expect(count, 32)
    for _ in range(count):
        name, (sides,) = cursor.text(), cursor.numbers("I")
        if not 1 <= sides <= _MOST_SIDES:
            raise ValueError(f"{name[:_SHOWN]!r} has {sides:,} dimensions")
        shape = cursor.numbers("Q", sides)[::-1]
        (kind,), (place,) = cursor.numbers("I"), cursor.numbers("Q")
        yield name, shape, kind, place


def _place(
    found: list[tuple[str, tuple[int, ...], int, int]], end: int, size: int, metadata: Mapping[str, Any]
) -> tuple[PlacedTensor, ...]:
    """The tensors where they lie in the file, none of which may reach beyond it or into another."""
    aligned = metadata.get("general.alignment", ALIGNMENT)
    if type(aligned) is not int or not 1 <= aligned <= _MOST_ALIGNMENT:
        raise ValueError(f"its tensors are aligned to {str(aligned)[:_SHOWN]} bytes")
    first, placed = end + -end % aligned, list[PlacedTensor]()
    for name, shape, number, place in sorted(found, key=lambda each: each[3]):
        kind, together, nbytes = kind_of(number)
        if shape[-1] % together or 0 in shape:
            raise ValueError(f"{name[:_SHOWN]!r} is {list(shape)} in {kind}, which has {together} numbers a block")
        start = first + place
        stop = start + math.prod(shape) // together * nbytes
        if stop > size:
            raise ValueError(f"{name[:_SHOWN]!r} reaches beyond the file's end ({size:,} bytes)")
        if placed and start < placed[-1].stop:
            raise ValueError(f"{name[:_SHOWN]!r} reaches into {placed[-1].name[:_SHOWN]!r}")
        placed.append(PlacedTensor(name, kind, shape, start, stop))
    if len({tensor.name for tensor in placed}) < len(placed):
        raise ValueError("a tensor's name stands twice")
    return tuple(placed)


@cache
def kind_of(number: int) -> tuple[str, int, int]:
    """A type of entries that `gguf` reads: its name, and how many of it stand in how many bytes.

    Raises:
        ValueError: it reads no such type.
        ModelError: it is not installed.
    """
    gguf = import_gguf()
    try:
        kind = gguf.GGMLQuantizationType(number)
        together, nbytes = gguf.GGML_QUANT_SIZES[kind]
        gguf.quants.dequantize(np.zeros((1, nbytes), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError):
        raise ValueError(f"it holds a tensor of type {number}, which the installed gguf does not read") from None
    return kind.name, together, nbytes


def import_gguf() -> Any:
    """The package that knows the types, and how llama.cpp calls tensors.

    Raises:
        ModelError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        hint = f"install it: {install_command('gguf')}"
        raise ModelError(Problem("is GGUF, which takes the package gguf to be read", hint=hint)) from None
    return gguf
