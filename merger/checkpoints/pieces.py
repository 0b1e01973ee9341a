"""A tokenizer's own pieces of the tokens of another one, by the `tokenizers` library.

Not here: how tokens are spelled (spelling), and which rows the pieces have (plan).
"""

from __future__ import annotations

from collections.abc import Sequence

from merger.checkpoints.spelling import PLAIN, respelled, spelling
from merger.safety.limits import parsed

_INSIDE = "##"
"""What WordPiece writes before a token that begins inside of a word."""


def pieces(tokenizer: bytes, tokens: Sequence[str], written: str) -> list[list[int]]:
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
    wanted = spelling(parsed(tokenizer))
    return [[piece.id for piece in model.tokenize(_text(token, written, wanted))] for token in tokens]


def _text(token: str, written: str, wanted: str) -> str:
    """A token's text as the model of a tokenizer is handed it."""
    return token.removeprefix(_INSIDE) if PLAIN in (written, wanted) else respelled(token, written, wanted)
