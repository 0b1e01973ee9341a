"""The pieces of a SentencePiece model, `tokenizer.model`, by their ids: what a tokenizer knows that has no other file.

Follows sentencepiece_model.proto: field 1 of the file is a piece, field 1 of that its text. The rest is passed over.
Not here: added tokens (vocab), and splitting text.
"""

from __future__ import annotations

from collections.abc import Iterator

_LENGTHS = {1: 8, 5: 4}
"""How many bytes a number takes that has a fixed length, by its wire type."""

_VARINT, _BYTES = 0, 2
_MOST_BITS = 64


def pieces(content: bytes) -> list[str] | None:
    """The pieces by id; None where it is no such file: some vendors call a tiktoken file so, which is lines of text.

    Raises:
        ValueError: it begins like one, and is damaged.
    """
    if content[:1] != b"\n":  # the first piece: field 1, of bytes
        return None
    try:
        held = [piece for field, piece in _fields(content) if field == 1]
        return [next(text for field, text in _fields(piece) if field == 1).decode() for piece in held]
    except (LookupError, StopIteration, UnicodeDecodeError):
        raise ValueError("it is no whole SentencePiece model") from None


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """The fields of a message that hold bytes, by their numbers.

    Raises:
        LookupError: the message ends in one, or has what no message has.
    """
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            _, at = _varint(message, at)
            continue
        length, at = _varint(message, at) if kind == _BYTES else (_LENGTHS[kind], at)
        if at + length > len(message):
            raise LookupError(at)
        if kind == _BYTES:
            yield number, message[at : at + length]
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends."""
    found = shift = 0
    while message[at] & 0x80:
        found |= (message[at] & 0x7F) << shift
        shift += 7
        at += 1
        if shift > _MOST_BITS:
            raise LookupError(at)
    return found | message[at] << shift, at + 1
