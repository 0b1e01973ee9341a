"""Vocabularies as tokenizers' files hold them: the same ids as the tokenizers library, and one made of several."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from vocabularies import BASE, sentencepiece, tokenizer

from merger.models import vocabulary as vocab
from merger.models.tokenizer_files import BYTES, PLAIN, SPACES, respell, spelling
from merger.models.vocabulary import Vocabulary, extend_tokenizer, read_vocabulary, rewrite_files

WORDS = st.text("abc<>", min_size=1, max_size=4)


def text(content: Any) -> bytes:
    return json.dumps(content).encode()


def saved(found: Tokenizer) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(found.to_str())
    return content


def library_ids(content: bytes) -> dict[str, int]:
    found: dict[str, int] = Tokenizer.from_buffer(content).get_vocab(with_added_tokens=True)
    return found


@given(st.lists(st.tuples(WORDS, st.integers(0, 60)), max_size=6))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_ids_are_those_of_the_library(added: list[tuple[str, int]]) -> None:
    """Whatever ids the file gives to added tokens: the library numbers them anew, and so are they here."""
    content = saved(tokenizer())
    record = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    content["added_tokens"] += [{"id": number, "content": token, **record} for token, number in added]
    found = read_vocabulary({"tokenizer.json": text(content)})
    assert found is not None
    assert found.ids == library_ids(text(content))
    assert list(found.ids) == list(dict.fromkeys([*BASE, *(token for token, _ in added)]))


def test_smaller_files_add_tokens() -> None:
    """Tokens that only tokenizer_config.json or added_tokens.json names come behind those of tokenizer.json, by id."""
    files = {
        "tokenizer.json": tokenizer(["<a>"]).to_str().encode(),
        "tokenizer_config.json": text({"added_tokens_decoder": {"38": {"content": "<c>"}, "36": {"content": "<a>"}}}),
        "added_tokens.json": text({"<b>": 37}),
    }
    found = read_vocabulary(files)
    assert found is not None
    assert [found.ids[token] for token in ("<a>", "<b>", "<c>")] == [36, 37, 38]
    assert list(found.added) == ["<s>", "</s>", "<a>", "<b>", "<c>"]


@pytest.mark.parametrize(("files", "ids", "written"), [
    ({"vocab.json": {"a": 0, "Ġb": 1}, "added_tokens.json": {"<x>": 5}}, {"a": 0, "Ġb": 1, "<x>": 5}, BYTES),
    ({"vocab.txt": "[PAD]\nthe\n##ing\n"}, {"[PAD]": 0, "the": 1, "##ing": 2}, PLAIN),
    ({"tokenizer.json": {"model": {"vocab": [["<unk>", 0.0], ["▁a", -1.5]]}, "decoder": {"type": "Metaspace"}}},
     {"<unk>": 0, "▁a": 1}, SPACES),
    ({"tokenizer.model": "\0"}, None, None),
    ({}, None, None),
])  # fmt: skip
def test_the_kinds_of_files(files: dict[str, Any], ids: dict[str, int] | None, written: str | None) -> None:
    """A map, a word a line, or pieces with scores; a SentencePiece model alone is not read."""
    found = read_vocabulary({name: text(of) if isinstance(of, dict) else of.encode() for name, of in files.items()})
    assert (None if found is None else (found.ids, found.spelling)) == (None if ids is None else (ids, written))


NO_MAP = "tokenizer.json: model.vocab is no map from tokens to ids"
GOOD = '{"model": {"vocab": {"a": 0}}}'
DAMAGED = [
    ({"tokenizer.json": "{"}, "tokenizer.json is no JSON ("),
    ({"tokenizer.json": "[]"}, "tokenizer.json is no JSON object"),
    ({"tokenizer.json": "{}"}, NO_MAP),
    ({"tokenizer.json": '{"model": {"vocab": {"a": "0"}}}'}, NO_MAP),
    ({"tokenizer.json": '{"model": {"vocab": ["a"]}}'}, "tokenizer.json: model.vocab is no list of pieces and scores"),
    ({"tokenizer.json": '{"model": {"vocab": {"a": 1, "b": 1}}}'}, "its tokens 'a' and 'b' have one id, 1"),
    ({"tokenizer.json": '{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1}]}'},
     "tokenizer.json: added_tokens is no list of tokens, each with its content"),
    ({"tokenizer.json": GOOD, "tokenizer_config.json": '{"added_tokens_decoder": {"x": {}}}'},
     "tokenizer_config.json: added_tokens_decoder is no map from ids to tokens"),
    ({"tokenizer.json": GOOD, "tokenizer_config.json": "7"}, "tokenizer_config.json is no JSON object"),
    ({"vocab.json": '{"a": 0}', "added_tokens.json": '{"b": -1}'}, "added_tokens.json is no map from tokens to ids"),
    ({"vocab.json": '{"a": null}'}, "vocab.json is no map from tokens to ids"),
    ({"vocab.txt": b"\xff"}, "vocab.txt is no UTF-8 text"),
]  # fmt: skip


@pytest.mark.parametrize(("files", "what"), DAMAGED, ids=[str(number) for number in range(len(DAMAGED))])
def test_damaged_files_are_named(files: dict[str, Any], what: str) -> None:
    """Each says which file it is and what it lacks."""
    with pytest.raises(ValueError, match=f"^{re.escape(what)}"):
        read_vocabulary({name: of if isinstance(of, bytes) else of.encode() for name, of in files.items()})


def test_the_base_keeps_its_ids_and_others_tokens_follow() -> None:
    """By model, then by id; a token beyond a model's rows is left aside; what tokenizer.json says of it comes along."""
    base, other = (
        Vocabulary({"a": 0, "b": 1}),
        Vocabulary({"b": 0, "d": 2, "c": 1}, {"c": {"id": 1, "content": "c", "special": True}}),
    )
    far = Vocabulary({"e": 0, "f": 1})
    whole = extend_tokenizer(base, [(other, 3), (far, 1)], ["a", "g"])
    assert whole.ids == {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4, "g": 5}
    assert whole.added["c"] == {"id": 2, "content": "c", "special": True}
    assert whole.added["g"] == {"id": 5, "content": "g", "single_word": False, "lstrip": False, "rstrip": False,
                                "normalized": True, "special": False}  # fmt: skip


def test_tokens_are_not_put_into_gaps() -> None:
    """Where the base's ids have gaps the library would number new tokens differently: that is refused."""
    gaps = Vocabulary({"a": 0, "b": 5})
    assert extend_tokenizer(gaps, [(Vocabulary({"a": 3}), 9)]).ids == gaps.ids
    with pytest.raises(ValueError, match=r"^its 2 tokens have ids up to 5, so none can be added to them$"):
        extend_tokenizer(gaps, [(Vocabulary({"c": 0}), 1)])


@given(st.lists(st.sampled_from(["<a>", "<b>", "</s>", "the", "new", "Ġnew"]), max_size=4, unique=True))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_the_library_gives_the_promised_ids(extra: list[str]) -> None:
    """The files written for more tokens are read by the library as they were meant, and the tokens found in a text."""
    files = {
        "tokenizer.json": tokenizer(["<a>"]).to_str().encode(),
        "tokenizer_config.json": text(
            {"added_tokens_decoder": {"36": {"content": "<a>"}, "37": {"content": "<late>"}}}
        ),
        "added_tokens.json": text({"<a>": 36, "<late>": 37}),
    }
    base = read_vocabulary(files)
    assert base is not None
    whole = extend_tokenizer(base, [], extra)
    made = {**files, **rewrite_files(files, whole.added.values())}
    assert library_ids(made["tokenizer.json"]) == whole.ids
    assert read_vocabulary(made) == whole
    assert json.loads(made["added_tokens.json"]) == {
        token: number for token, number in whole.ids.items() if number >= len(BASE)
    }
    library = Tokenizer.from_buffer(made["tokenizer.json"])
    assert all(library.encode(f"the{token}").ids[-1] == whole.ids[token] for token in extra)


@pytest.mark.parametrize(("token", "written", "wanted", "found"), [
    ("Ġthe", BYTES, SPACES, "▁the"), ("▁the", SPACES, BYTES, "Ġthe"), ("Ã©", BYTES, SPACES, "é"),
    ("é", SPACES, BYTES, "Ã©"), ("<0x0A>", SPACES, BYTES, "Ċ"), ("Ã", BYTES, SPACES, "<0xC3>"),
    ("ÃĠ", BYTES, SPACES, "ÃĠ"), ("##ing", PLAIN, BYTES, "##ing"), ("Ġthe", BYTES, BYTES, "Ġthe"),
])  # fmt: skip
def test_one_spelling_becomes_the_other(token: str, written: str, wanted: str, found: str) -> None:
    """Bytes as characters and spaces as underscores are turned into each other; what has no counterpart stays."""
    assert respell(token, written, wanted) == found


def test_tokens_of_two_spellings_meet() -> None:
    """A vocabulary in another spelling knows the tokens of that one; added tokens are written as they are."""
    held = Vocabulary({"▁the": 0, "<0x0A>": 1, "▁<x>": 2}, {"▁<x>": {"content": "▁<x>"}}, SPACES)
    assert held.spelled(BYTES).ids == {"Ġthe": 0, "Ċ": 1, "▁<x>": 2}
    assert spelling(saved(tokenizer())) == BYTES
    nested = {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Replace", "content": "▁"}]}}
    assert spelling(nested) == SPACES


def test_rows_and_agreement() -> None:
    """A token beyond the rows has none; two vocabularies agree if they differ only beyond the rows."""
    one, other = Vocabulary({"a": 0, "b": 1, "c": 2}), Vocabulary({"a": 0, "b": 1, "d": 2})
    assert one.rows(["c", None, "b", "x"], limit=2).tolist() == [-1, -1, 1, -1]
    assert one.agrees(other, 2)
    assert not one.agrees(other, 3)


def test_large_vocabularies() -> None:
    """Two that are the same, united with a token more: each has its own rows, and none for what it does not know."""
    draw, size = random.Random(0), 128_000
    words = list(dict.fromkeys("".join(draw.choices("abcdefghijkl", k=draw.randint(4, 9))) for _ in range(2 * size)))
    assert len(words) >= size
    files = {
        "tokenizer.json": text({"model": {"vocab": {word: number for number, word in enumerate(words[:size])},
                                          "merges": [[word[:2], word[2:]] for word in words[:size]]}})
    }  # fmt: skip
    one, other = vocab.read_vocabulary(files), vocab.read_vocabulary(files)
    assert one is not None
    assert other is not None
    whole = extend_tokenizer(one, [(other, size)], ["<x>"])
    found = [held.rows(whole.tokens, size) for held in (one, other)]
    assert all(rows.tolist() == [*range(size), -1] for rows in found)


@pytest.mark.parametrize("size", [3, 300, 70_000])
def test_pieces_of_a_sentencepiece_model(size: int) -> None:
    """As many as its own library wrote, in their order, with what the small files add behind them."""
    tokens = [f"word{number}" for number in range(size)]
    files = {
        "tokenizer.model": sentencepiece(tokens),
        "added_tokens.json": text({"<b>": size + 1, "word0": 7}),
        "tokenizer_config.json": text({"added_tokens_decoder": {str(size): {"content": "<a>"}}}),
    }
    found = read_vocabulary(files)
    assert found is not None
    assert found.spelling == SPACES
    assert found.tokens == (*tokens, "<a>", "<b>")
    assert list(found.added) == ["<a>", "<b>"]


@given(st.integers(1, 900), st.binary(max_size=12))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_damaged_sentencepiece_model_is_no_crash(end: int, more: bytes) -> None:
    """Cut anywhere, with anything behind: read as far as it makes sense, or refused; what begins otherwise is none."""
    told = "read"
    try:
        read_vocabulary({"tokenizer.model": sentencepiece()[:end] + more})
    except ValueError as error:
        told = str(error)
    assert re.match(r"read$|tokenizer\.model: it is no whole SentencePiece model$|its tokens .* have one id", told)
    assert read_vocabulary({"tokenizer.model": b"IQ== 0\nIg== 1\n"}) is None
