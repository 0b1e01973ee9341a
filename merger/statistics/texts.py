"""The tokens that a model is measured on: of texts, or drawn by chance. Not here: what is measured (plan)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from merger.errors import Problem, RecipeError
from merger.evaluation.evaluate import read_source
from merger.methods.steps.random import Rng, uniform
from merger.safety.paths import ANYWHERE

Tokens = NDArray[np.int32]
"""A row for each sequence."""

RANDOM = "random-tokens"
_PIECE = 100_000
"""A longer text is cut at ends of lines: so many letters are turned into tokens at once."""


def draw_tokens(vocabulary: int, count: int, length: int, seed: int) -> Tokens:
    """So many sequences of tokens, each as likely as any other."""
    drawn = uniform(Rng(seed, RANDOM).bits(0, np.arange(count * length), "entries"))
    return np.minimum(drawn * vocabulary, vocabulary - 1).astype(np.int32).reshape(count, length)


def read_tokens(
    data: str,
    encode: Callable[[str], list[int]],
    count: int,
    length: int,
    token: str | bool | None,
    root: Path | None = ANYWHERE,
) -> Tokens:
    """The first sequences of texts, one text behind the other.

    Args:
        data: a file of this machine, or ``hf://[datasets/]owner/name[@revision]/file``: .jsonl with a text in each
            line, else text.
        encode: makes tokens of a text.
        count: how many sequences.
        length: how many tokens each has.
        token: the reader's, for the Hub.
        root: inside of which files of this machine have to lie (safety.paths).

    Raises:
        RecipeError: it cannot be read, or has too few tokens.
        ModelError: it cannot be read on the Hub.
    """
    found: list[int] = []
    for text in _pieces(data, read_source(data, None, "", token, root)):
        found += encode(text)
        if len(found) >= count * length:
            return np.array(found[: count * length], np.int32).reshape(count, length)
    what = f"{data} makes {len(found):,} tokens, and {count * length:,} are to be measured on"
    least = len(found) // length * length
    hint = (
        f"--tokens {least} takes what is there, or give more text" if least else "give more text, or a lower --length"
    )
    raise RecipeError(Problem(what, hint=hint))


def _pieces(data: str, text: str) -> Iterator[str]:
    if Path(data).suffix == ".jsonl":
        yield from (_text_of(data, number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip())
        return
    start = 0
    while start < len(text):
        stop = len(text) if len(text) - start <= _PIECE else text.rfind("\n", start, start + _PIECE) + 1
        stop = stop if stop > start else start + _PIECE
        yield text[start:stop]
        start = stop


def _text_of(data: str, number: int, line: str) -> str:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    text = found.get("text") if isinstance(found, dict) else found
    if isinstance(text, str):
        return text
    hint = 'each line is written {"text": "..."}'
    raise RecipeError(Problem(f"{data}:{number}: no text is there", hint=hint))
