"""What tokenizers' files hold beside a vocabulary: how a token's text is spelled, pieces of SentencePiece, ids of rows.

One token is written ``Ġthe`` in one tokenizer and ``▁the`` in another; here the one spelling becomes the other.
The characters for bytes are those of GPT-2's tokenizer. Not here: which tokens there are (vocabulary).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merger.models.checkpoint import FLOATS, TensorInfo
from merger.safety.limits import parse_json

BYTES, SPACES, PLAIN = "bytes", "spaces", "plain"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"
_SEQUENCES = ("normalizers", "pretokenizers", "decoders", "processors")


def _characters() -> dict[int, str]:
    """The character for each byte: itself where it is printed, else the next one from U+0100 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {byte: chr(byte) for byte in printed} | {byte: chr(0x100 + n) for n, byte in enumerate(others)}


_OF_BYTE = _characters()
_OF_CHARACTER = {character: byte for byte, character in _OF_BYTE.items()}


def spelling(tokenizer: Mapping[str, Any]) -> str:
    """How a tokenizer.json spells its tokens: BYTES, SPACES or PLAIN."""
    steps = [step for key in ("normalizer", "pre_tokenizer", "decoder") for step in tokenizer_steps(tokenizer.get(key))]
    if any(step.get("type") == "ByteLevel" for step in steps):
        return BYTES
    spaced = any(step.get("type") == "Metaspace" or _SPACE in str(step.get("content", "")) for step in steps)
    return SPACES if spaced else PLAIN


def tokenizer_steps(found: object) -> list[Mapping[str, Any]]:
    """The steps of a part of a tokenizer, of which a sequence holds several, that being none itself."""
    if not isinstance(found, dict):
        return []
    inside = [step for key in _SEQUENCES for step in found.get(key) or []]
    own = [] if found.get("type") == "Sequence" else [found]
    return [*own, *(deeper for step in inside for deeper in tokenizer_steps(step))]


def respell(token: str, written: str, wanted: str) -> str:
    """A token of one spelling in another; as it is where it has none there."""
    if written == wanted or PLAIN in (written, wanted):
        return token
    raw = _of_bytes(token) if written == BYTES else _of_spaces(token)
    if raw is None:
        return token
    if wanted == BYTES:
        return "".join(map(_OF_BYTE.__getitem__, raw))
    try:
        return raw.decode().replace(" ", _SPACE)
    except UnicodeDecodeError:
        return f"<0x{raw[0]:02X}>" if len(raw) == 1 else token


def _of_bytes(token: str) -> bytes | None:
    try:
        return bytes(map(_OF_CHARACTER.__getitem__, token))
    except KeyError:
        return None


def _of_spaces(token: str) -> bytes:
    if byte := _BYTE.fullmatch(token):
        return bytes([int(byte[1], 16)])
    return token.replace(_SPACE, " ").encode("utf-8", "replace")


# ---- sentencepiece --------------------------------------------------------------------------------------------------


_LENGTHS = {1: 8, 5: 4}
"""How many bytes a number takes that has a fixed length, by its wire type."""

_VARINT, _BYTES = 0, 2
_MOST_BITS = 64


def model_pieces(content: bytes) -> list[str] | None:
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


# ---- a tokenizer's pieces -------------------------------------------------------------------------------------------


_INSIDE = "##"
"""What WordPiece writes before a token that begins inside of a word."""


def split_tokens(tokenizer: bytes, tokens: Sequence[str], written: str) -> list[list[int]]:
    """For each token the ids of the pieces that a tokenizer splits its text into.

    Args:
        tokenizer: the text of its tokenizer.json.
        tokens: tokens of another tokenizer.
        written: how that one spells them.

    Raises:
        ValueError: the library does not read the tokenizer; why.
    """
    from tokenizers import Tokenizer

    try:
        model = Tokenizer.from_buffer(tokenizer).model
    except Exception as error:  # the library raises nothing more special
        raise ValueError(f"tokenizer.json is not read by the tokenizers library ({error})") from None
    wanted = spelling(parse_json(tokenizer))
    return [[piece.id for piece in model.tokenize(_text(token, written, wanted))] for token in tokens]


def _text(token: str, written: str, wanted: str) -> str:
    """A token's text as the model of a tokenizer is handed it."""
    return token.removeprefix(_INSIDE) if PLAIN in (written, wanted) else respell(token, written, wanted)


# ---- ids of rows ----------------------------------------------------------------------------------------------------


SETTING = "trainable_token_indices"
_NAME = re.compile(r"^base_model\.model\.(?P<module>.+)\.token_adapter\.trainable_tokens_delta$")


@dataclass(frozen=True)
class TokenRows:
    """Rows, and the number that each of them has in the model's tensor.

    Args:
        rows: the rows.
        numbers: their numbers.
    """

    rows: TensorInfo
    numbers: tuple[int, ...]


def rows_of(name: str) -> str | None:
    """The name of the model's tensor of which a tensor of an adapter holds rows; None for all other tensors."""
    found = _NAME.match(name)
    return None if found is None else f"{found['module']}.weight"


def token_rows(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, TokenRows]:
    """The rows by the names of the tensors that they belong to.

    Args:
        tensors: those of the adapter.
        config: adapter_config.json, which gives the rows' numbers: for all modules the same, or for each its own.

    Raises:
        ValueError: the numbers are not those of the rows.
    """
    found = {}
    for name, tensor in tensors.items():
        of = rows_of(name)
        if of is None:
            continue
        numbers = _numbers(config.get(SETTING), of.removesuffix(".weight"))
        if tensor.dtype not in FLOATS or len(tensor.shape) != 2 or tensor.shape[0] != len(numbers):
            shape = "x".join(map(str, tensor.shape))
            raise ValueError(f"{SETTING} names {len(numbers)} rows, but {name} is {shape} in {tensor.dtype}")
        found[of] = TokenRows(tensor, tuple(numbers))
    if config.get(SETTING) and not found:
        raise ValueError(f"{SETTING} names rows, and the adapter holds none")
    return found


def _numbers(given: Any, module: str) -> list[int]:
    if isinstance(given, Mapping):
        given = next((numbers for ending, numbers in given.items() if f".{module}".endswith(f".{ending}")), None)
    if not isinstance(given, list) or not all(type(number) is int and number >= 0 for number in given):
        raise ValueError(f"{SETTING} is no list of the numbers of {module}'s rows")
    return given
