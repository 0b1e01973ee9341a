"""The tokenizer of a GGUF file as transformers has one: tokenizer.json and tokenizer_config.json of its metadata.

What is written of a tokenizer.json is read backwards (tokens). Not here: the model (source).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from merger.models import chat
from merger.models.gguf.tokens import BYTE, CONTROL, NORMAL, SPACE, SPLITS, UNKNOWN, UNUSED, USERS
from merger.models.vocabulary import TOKENIZER

Json = dict[str, Any]

_ALSO = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "smaug-bpe": "llama-bpe"}
_WHOLE = ("llama-bpe", "tekken")
"""Where llama.cpp takes a word that is a token for that token, whatever is joined; and begins a text with a token."""

_MOST_CHARACTERS, _LONGEST = 10_000_000, 1_000
"""Of all tokens, and of one: each is cut at each of its places."""

_NO_TOKEN = re.compile(r"\[PAD[0-9]+\]")
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def tokenizer_of(said: Mapping[str, Any]) -> dict[str, bytes]:
    """The files by name; none where they cannot be made of what the metadata say."""
    try:
        made = _Made(said)
        whole = made.tokenizer()
    except (LookupError, TypeError, ValueError, AttributeError):
        return {}
    if whole is None:
        return {}
    files = {TOKENIZER: whole, chat.SETTINGS: made.settings()}
    return {name: (json.dumps(each, ensure_ascii=False, indent=2) + "\n").encode() for name, each in files.items()}


class _Made:
    """A tokenizer by its metadata."""

    def __init__(self, said: Mapping[str, Any]) -> None:
        self._said = {key.removeprefix("tokenizer.ggml."): value for key, value in said.items()}
        self._arch = said["general.architecture"]
        self._tokens, self._kinds = list[str](self._said["tokens"]), list[int](self._said["token_type"])
        lengths = [len(token) for token in self._tokens]
        if len(self._kinds) < len(lengths) or sum(lengths) > _MOST_CHARACTERS or max(lengths) > _LONGEST:
            raise ValueError("they are no tokens")
        self._pre = _ALSO.get(self._said.get("pre", ""), self._said.get("pre"))
        self._of_pieces = self._said["model"] == "llama"
        for number, token in enumerate(self._tokens):
            if self._of_pieces and token and not token.strip(" "):  # as Gemma's files spell what are pieces
                self._tokens[number], self._kinds[number] = SPACE * len(token), NORMAL
        self._ids = {token: number for number, token in reversed(list(enumerate(self._tokens))) if self._is_one(number)}

    def _is_one(self, number: int) -> bool:
        """Whether it is a token, and not the place of none."""
        return self._kinds[number] != UNUSED or not _NO_TOKEN.fullmatch(self._tokens[number])

    def tokenizer(self) -> Json | None:
        if not self._of_pieces and (self._said["model"] != "gpt2" or self._pre not in SPLITS.values()):
            return None
        own = self._pieces() if self._of_pieces else self._bytes()
        return {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": self._added(),
            "normalizer": None, "pre_tokenizer": None, "post_processor": self._around(), "decoder": None, **own,
        }  # fmt: skip

    def _model(self, merges: Sequence[Sequence[str]], **more: Any) -> Json:
        return {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, **more,
            "vocab": dict(sorted(self._ids.items(), key=lambda each: each[1])), "merges": list(merges),
        }  # fmt: skip

    def _added(self) -> list[Json]:
        """Tokens that are found in a text before it is cut."""
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return [
            {"id": number, "content": self._tokens[number], **plain, "special": kind != USERS}
            for number, kind in enumerate(self._kinds)
            if kind in (CONTROL, USERS, UNKNOWN) and self._ids.get(self._tokens[number]) == number
        ]

    # ---- how text is cut ---------------------------------------------------------------------------------------------

    def _bytes(self) -> Json:
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        after = {**level, "use_regex": False}
        pattern = next(pattern for pattern, name in SPLITS.items() if name == self._pre)
        cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        merges = _pairs(self._said["merges"])
        return {
            "normalizer": {"type": "NFC"} if self._pre == "qwen2" else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, after]} if pattern else level,
            "decoder": level,
            "model": self._model(merges, ignore_merges=self._pre in _WHOLE),
        }

    def _pieces(self) -> Json:
        begins = bool(self._said.get("add_space_prefix", True))
        spaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        joined = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                  {"type": "ByteFallback"}, {"type": "Fuse"}]  # fmt: skip
        if begins:
            joined.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        before = [{"type": "Prepend", "prepend": SPACE}] if begins else []
        unknown = next((self._tokens[number] for number, kind in enumerate(self._kinds) if kind == UNKNOWN), None)
        merges = self._said.get("merges")
        pairs = _pairs(merges) if merges else self._joins()
        return {
            "normalizer": {"type": "Sequence", "normalizers": [*before, spaced]},
            "decoder": {"type": "Sequence", "decoders": joined},
            "model": self._model(pairs, unk_token=unknown, fuse_unk=True, byte_fallback=BYTE in self._kinds),
        }

    def _joins(self) -> list[tuple[str, str]]:
        """Any two pieces that are a piece together are joined, those of the highest score first; of Gemma's pieces,
        whose scores do not tell it, the first."""
        scores: Sequence[float] = range(0, -len(self._tokens), -1)
        if not self._arch.startswith("gemma"):
            scores = self._said["scores"]
        special = {UNKNOWN, CONTROL, BYTE}
        whole = [number for token, number in self._ids.items() if self._kinds[number] not in special]
        found = [(-scores[number], number, pair) for number in whole for pair in self._cuts(self._tokens[number])]
        return [pair for _, _, pair in sorted(found, key=lambda each: each[:2])]

    def _cuts(self, token: str) -> Iterator[tuple[str, str]]:
        cuts = ((token[:place], token[place:]) for place in range(1, len(token)))
        own = [cut for cut in cuts if cut[0] in self._ids and cut[1] in self._ids]
        yield from sorted(own, key=lambda cut: (self._ids[cut[0]], self._ids[cut[1]]))

    # ---- what stands at the ends -------------------------------------------------------------------------------------

    def _token(self, role: str) -> str | None:
        number = self._said.get(f"{_ROLES[role]}_token_id")
        return None if number is None else self._tokens[number]

    def _around(self) -> Json | None:
        usual = {"bos": self._of_pieces or self._pre in _WHOLE, "eos": False}
        asked = [end for end, is_so in usual.items() if self._said.get(f"add_{end}_token", is_so)]
        before, after = ([token] if end in asked and (token := self._token(end)) else [] for end in usual)
        if not before and not after:
            return None
        text = [{"Sequence": {"id": "A", "type_id": 0}}]
        single = [*_marks(before), *text, *_marks(after)]
        pair = [*single, *_marks(before, 1), {"Sequence": {"id": "B", "type_id": 1}}, *_marks(after, 1)]
        tokens = {token: {"id": token, "ids": [self._ids[token]], "tokens": [token]} for token in (*before, *after)}
        return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}

    def settings(self) -> Json:
        """tokenizer_config.json: special tokens, and the chat template."""
        found: Json = {f"{role}_token": token for role in _ROLES if (token := self._token(role)) is not None}
        template = self._said.get("tokenizer.chat_template")
        return {
            **found,
            **({"chat_template": template} if isinstance(template, str) else {}),
            "clean_up_tokenization_spaces": False,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }


def _pairs(merges: Sequence[str]) -> list[tuple[str, str]]:
    """Of tokens that are joined, by their texts with a space between."""
    cuts = (pair.partition(" ") for pair in merges)
    return [(one, other) for one, _, other in cuts]


def _marks(tokens: Sequence[str], number: int = 0) -> list[Json]:
    return [{"SpecialToken": {"id": token, "type_id": number}} for token in tokens]
