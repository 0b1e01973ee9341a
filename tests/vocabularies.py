"""Small models with a tokenizer each, for tests: real tokenizers, rows that tell which token they stand for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tiny
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers.utils.sentencepiece_model_pb2_new import ModelProto

from merger.models.tokenizer_files import BYTES, SPACES, respell

CHARACTERS = ["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "Ċ"]
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("a", "n"), ("an", "d")]
BASE = [*CHARACTERS, *("".join(pair) for pair in MERGES)]
"""The tokens that all models of these tests begin with."""


def tokenizer(added: Sequence[str] = (), tokens: Sequence[str] = BASE, special: bool = True) -> Tokenizer:
    """A byte-level BPE tokenizer with a few merges, and tokens added to it."""
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [pair for pair in MERGES if "".join(pair) in vocabulary]
    found = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens([AddedToken(token, normalized=False) for token in ("<s>", "</s>")])
    found.add_tokens([AddedToken(token, normalized=False, special=special) for token in added])
    return found


def sentencepiece(tokens: Sequence[str] = BASE) -> bytes:
    """A SentencePiece model, tokenizer.model, that has these tokens of a byte-level tokenizer as its pieces."""
    proto = ModelProto()
    for number, token in enumerate(tokens):
        kind = 3 if token in ("<s>", "</s>") else 1
        proto.pieces.add(piece=respell(token, BYTES, SPACES), score=-float(number), type=kind)
    proto.trainer_spec.vocab_size = len(tokens)
    return proto.SerializeToString()


def model(
    folder: Path,
    seed: int,
    added: Sequence[str] = (),
    tokens: Sequence[str] = BASE,
    rows: int | None = None,
    settings: Mapping[str, Any] | None = None,
    tied: bool = False,
    **changed: Any,
) -> Path:
    """A small Mistral whose embedding has a row for each token of its tokenizer, or `rows` of them."""
    its = tokenizer(added, tokens)
    held = tiny.tensors(seed, vocab=rows or its.get_vocab_size(), dtype=torch.float32)
    if tied:
        del held["lm_head.weight"]
    count = len(held["model.embed_tokens.weight"])
    changed = {"bos_token_id": 0, "eos_token_id": 1, "vocab_size": count, "tie_word_embeddings": tied, **changed}
    tiny.write(folder, held, **changed)
    its.save(str(folder / "tokenizer.json"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **(settings or {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder


def rows(folder: Path, name: str = "model.embed_tokens.weight") -> dict[str, Tensor]:
    """The row of each token, by the folder's own tokenizer."""
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True)
    table = tiny.read(folder)[name]
    return {token: table[number] for token, number in ids.items() if number < len(table)}
