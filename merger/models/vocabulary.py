"""Which tokens a tokenizer knows and under which ids, read from its files; one tokenizer made of several.

Ids are those that the `tokenizers` library gives, which numbers added tokens anew when it loads a file.
Not here: rows of embeddings (plan), and splitting text into tokens.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merger.models.tokenizer_files import BYTES, PLAIN, SPACES, model_pieces, respell, spelling
from merger.safety.limits import of, parse_json

TOKENIZER, SETTINGS, ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
WORDS = ("vocab.json", "vocab.txt")
PIECES = "tokenizer.model"
FILES = (TOKENIZER, SETTINGS, ADDED, *WORDS, PIECES)
"""The files that a vocabulary is read from."""

EXTENDED = (TOKENIZER, SETTINGS, ADDED)
"""Those that are written anew where tokens are added."""

Json = dict[str, Any]
Ids = NDArray[np.int64]
_MOST_ROWS = 1 << 24  # a list with a place for each is made of them
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a tokenizer.

    Args:
        ids: every token's id.
        added: of the tokens that stand beside the model's own, what tokenizer.json says of each, in its order.
        spelling: how the text of tokens is written that are the model's own.
    """

    ids: Mapping[str, int]
    added: Mapping[str, Json] = field(default_factory=dict)
    spelling: str = PLAIN

    @cached_property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.ids.values(), default=-1) + 1

    @cached_property
    def tokens(self) -> tuple[str | None, ...]:
        """The tokens by id; None where an id belongs to none."""
        found: list[str | None] = [None] * self.size
        for token, number in self.ids.items():
            found[number] = token
        return tuple(found)

    def rows(self, tokens: Iterable[str | None], limit: int) -> Ids:
        """For each token its row here, -1 where it has none.

        Args:
            limit: how many rows there are.
        """
        found = np.fromiter(map(self.ids.get, tokens, repeat(-1)), dtype=np.int64)  # type: ignore[arg-type]  # None too
        return np.where(found < limit, found, -1)

    def spelled(self, wanted: str) -> Vocabulary:
        """The same vocabulary in another spelling; of two tokens that are then alike the first."""
        if PLAIN in (self.spelling, wanted) or self.spelling == wanted:
            return self
        ids: dict[str, int] = {}
        for token, number in self.ids.items():
            ids.setdefault(token if token in self.added else respell(token, self.spelling, wanted), number)
        return Vocabulary(ids, self.added, wanted)

    def agrees(self, other: Vocabulary, limit: int) -> bool:
        """Whether both know the same tokens under the same ids, as far as the ids have rows."""
        if self.ids == other.ids:
            return True
        mine, theirs = ({token for token in one.ids.items() if token[1] < limit} for one in (self, other))
        return mine == theirs


def told_by(files: Container[str]) -> tuple[str, ...]:
    """Those of a model's files that tell its vocabulary; tokenizer.model does only where there is no tokenizer.json."""
    return tuple(name for name in FILES if name in files and not (name == PIECES and TOKENIZER in files))


# ---- reading --------------------------------------------------------------------------------------------------------


def read_vocabulary(files: Mapping[str, bytes]) -> Vocabulary | None:
    """The vocabulary that a model's files hold; None where they hold none that is read here.

    Args:
        files: those of `FILES` that the model has.

    Raises:
        ValueError: a file is damaged; how, in a sentence.
    """
    if TOKENIZER in files:
        return _number(_object(files, TOKENIZER), _further(files))
    own, spelled = _words(files), BYTES if WORDS[0] in files else PLAIN
    if own is None and PIECES in files:
        own, spelled = _pieces(files), SPACES
    if own is None:
        return None
    given = {token: number for token, number in _further(files).items() if token not in own}
    records = {token: _record(token, number) for token, number in given.items()}
    return _distinct(Vocabulary({**own, **given}, records, spelled))


def _object(files: Mapping[str, bytes], name: str) -> Json:
    try:
        found = parse_json(files[name], of(name))
    except ValueError as error:
        raise ValueError(f"{name} is no JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{name} is no JSON object")
    return found


def _of_tokenizer(content: Json) -> tuple[dict[str, int], list[Json]]:
    """The model's own tokens, and what is said of the added ones."""
    model = content.get("model")
    held = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(held, list):  # Unigram: pairs of a piece and its score, numbered by their places
        if not all(isinstance(pair, list) and pair and isinstance(pair[0], str) for pair in held):
            raise ValueError(f"{TOKENIZER}: model.vocab is no list of pieces and scores")
        held = {pair[0]: number for number, pair in enumerate(held)}
    if not isinstance(held, dict) or not all(map(_is_id, held.values())):
        raise ValueError(f"{TOKENIZER}: model.vocab is no map from tokens to ids")
    added = content.get("added_tokens") or []
    if not isinstance(added, list) or not all(map(_is_record, added)):
        raise ValueError(f"{TOKENIZER}: added_tokens is no list of tokens, each with its content")
    return held, [item for item in added if item["content"]]


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < _MOST_ROWS


def _is_record(value: object) -> bool:
    return isinstance(value, dict) and _is_text(value.get("content"))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _further(files: Mapping[str, bytes]) -> dict[str, int]:
    """The tokens that the smaller files add, by the ids that they give them."""
    listed = _object(files, SETTINGS).get("added_tokens_decoder") or {} if SETTINGS in files else {}
    plain = _object(files, ADDED) if ADDED in files else {}
    try:
        found = {item["content"]: int(number) for number, item in listed.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{SETTINGS}: added_tokens_decoder is no map from ids to tokens") from None
    if not all(map(_is_id, plain.values())):
        raise ValueError(f"{ADDED} is no map from tokens to ids")
    found = {token: number for token, number in {**plain, **found}.items() if _is_text(token) and token}
    return dict(sorted(found.items(), key=lambda pair: pair[1]))


def _number(content: Json, further: Mapping[str, int]) -> Vocabulary:
    """The vocabulary as the library numbers it: an added token that is new takes the next free id."""
    own, listed = _of_tokenizer(content)
    ids, added = dict(own), {}
    following = len(own)
    records = {item["content"]: item for item in listed}
    for token in dict.fromkeys([*records, *further]):
        if token not in ids:
            ids[token] = following
            following += 1
        elif token not in own:
            continue
        following = max(following, ids[token] + 1)
        added[token] = records.get(token) or _record(token, ids[token])
    return _distinct(Vocabulary(ids, added, spelling(content)))


def _words(files: Mapping[str, bytes]) -> dict[str, int] | None:
    """The tokens of a tokenizer that has no tokenizer.json: a map, or a word a line."""
    if WORDS[0] in files:
        found = _object(files, WORDS[0])
        if not all(map(_is_id, found.values())):
            raise ValueError(f"{WORDS[0]} is no map from tokens to ids")
        return found
    if WORDS[1] not in files:
        return None
    try:
        lines = files[WORDS[1]].decode().splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{WORDS[1]} is no UTF-8 text") from None
    return {line.strip(): number for number, line in enumerate(lines)}


def _pieces(files: Mapping[str, bytes]) -> dict[str, int] | None:
    """The pieces of a tokenizer that has no other file than its SentencePiece model."""
    try:
        found = model_pieces(files[PIECES])
    except ValueError as error:
        raise ValueError(f"{PIECES}: {error}") from None
    return None if found is None else {piece: number for number, piece in enumerate(found)}


def _distinct(found: Vocabulary) -> Vocabulary:
    if len(set(found.ids.values())) < len(found.ids):
        seen: dict[int, str] = {}
        token, number = next((t, n) for t, n in found.ids.items() if seen.setdefault(n, t) != t)
        raise ValueError(f"its tokens {seen[number]!r} and {token!r} have one id, {number}")
    return found


# ---- several tokenizers ---------------------------------------------------------------------------------------------


def extend_tokenizer(
    base: Vocabulary, others: Sequence[tuple[Vocabulary, int]], extra: Iterable[str] = ()
) -> Vocabulary:
    """The base's vocabulary with the tokens of others that it lacks, as added tokens, in the order of their ids.

    Args:
        base: keeps its ids.
        others: the other vocabularies, and how many rows each has: tokens beyond them are left aside.
        extra: tokens to be added besides.

    Raises:
        ValueError: tokens are to be added, and the base's ids have gaps, which the library would fill.
    """
    ids, added = dict(base.ids), dict(base.added)
    for other, limit in others:
        lacking = sorted((other.ids[token], token) for token in other.ids.keys() - ids.keys())
        for number, token in lacking:
            if number < limit:
                ids[token] = len(ids)
                added[token] = {**other.added.get(token, _record(token, 0)), "id": ids[token]}
    for token in extra:
        if token not in ids:
            ids[token] = len(ids)
            added[token] = _record(token, ids[token])
    if len(ids) > len(base.ids) and base.size != len(base.ids):
        raise ValueError(f"its {len(base.ids):,} tokens have ids up to {base.size - 1:,}, so none can be added to them")
    return Vocabulary(ids, added, base.spelling)


def special_as_in(base: Vocabulary, others: Sequence[tuple[Vocabulary, int]]) -> Vocabulary:
    """The base's vocabulary; tokens that are plain in it, and special in another, are as the first of those has them.

    Args:
        base: keeps its ids.
        others: as for `extend_tokenizer`.
    """
    added = dict(base.added)
    for other, limit in others:
        for token, record in other.added.items():
            has_row = token in base.ids and other.ids[token] < limit
            if has_row and record.get("special") and token not in added:
                added[token] = {**record, "id": base.ids[token]}
    return Vocabulary(base.ids, added, base.spelling)


def _record(token: str, number: int) -> Json:
    """What tokenizer.json says of a token that is added to be found as it is written."""
    return {"id": number, "content": token, **_FLAGS}


def rewrite_files(files: Mapping[str, bytes], added: Iterable[Json]) -> dict[str, bytes]:
    """Those of a tokenizer's files that must be written anew so that it knows more tokens.

    Args:
        files: those of `EXTENDED` that it has, tokenizer.json among them.
        added: what tokenizer.json is to say of each added token, as `extend_tokenizer` gives it.
    """
    content = _object(files, TOKENIZER)
    known = {item["content"] for item in content.get("added_tokens") or []}
    new = [record for record in added if record["content"] not in known]
    content["added_tokens"] = [*(content.get("added_tokens") or []), *new]
    made = {TOKENIZER: json.dumps(content, ensure_ascii=False).encode()}  # indented it takes four times as long
    settings = _object(files, SETTINGS) if SETTINGS in files else {}
    if settings.get("added_tokens_decoder"):
        records = {str(record["id"]): {key: record[key] for key in record if key != "id"} for record in new}
        settings["added_tokens_decoder"] = {**settings["added_tokens_decoder"], **records}
        made[SETTINGS] = dump_json(settings)
    if ADDED in files:
        numbers = {record["content"]: record["id"] for record in new}
        made[ADDED] = dump_json({**_object(files, ADDED), **numbers})
    return made


def dump_json(content: Json) -> bytes:
    """A small file's JSON, as people read it."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
