"""How tokenizers write the text of a token: bytes as characters, spaces as an underscore, or as it is.

One token is written ``Ġthe`` in one tokenizer and ``▁the`` in another; here the one spelling becomes the other.
The characters for bytes are those of GPT-2's tokenizer. Not here: reading tokenizers (vocab).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

BYTES, SPACES, PLAIN = "bytes", "spaces", "plain"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"


def _characters() -> dict[int, str]:
    """The character for each byte: itself where it is printed, else the next one from U+0100 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {byte: chr(byte) for byte in printed} | {byte: chr(0x100 + n) for n, byte in enumerate(others)}


_OF_BYTE = _characters()
_OF_CHARACTER = {character: byte for byte, character in _OF_BYTE.items()}


def spelling(tokenizer: Mapping[str, Any]) -> str:
    """How a tokenizer.json spells its tokens: BYTES, SPACES or PLAIN."""
    steps = [step for key in ("normalizer", "pre_tokenizer", "decoder") for step in _steps(tokenizer.get(key))]
    if any(step.get("type") == "ByteLevel" for step in steps):
        return BYTES
    spaced = any(step.get("type") == "Metaspace" or _SPACE in str(step.get("content", "")) for step in steps)
    return SPACES if spaced else PLAIN


def _steps(found: object) -> list[Mapping[str, Any]]:
    """A step of a tokenizer, or those that a sequence holds."""
    if not isinstance(found, dict):
        return []
    inside = [step for key in ("normalizers", "pretokenizers", "decoders") for step in found.get(key) or []]
    return [found, *(deeper for step in inside for deeper in _steps(step))]


def respelled(token: str, written: str, wanted: str) -> str:
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
