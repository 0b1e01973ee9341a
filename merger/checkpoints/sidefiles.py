"""The small files beside the tensors that a model needs to be used: tokenizer, chat template, processor, generation;
and its licence.

Not here: config.json, which is edited (architecture), and the card, which is written anew (card).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from merger.checkpoints.licence_file import is_notice, licence_files

_SIDE_FILE = re.compile(
    r"""^( tokenizer(_config)?\.json | tokenizer\.model(\.v\d+)? | [^/]*\.tiktoken | tekken\.json
        | vocab\.(json|txt) | merges\.txt | special_tokens_map\.json | added_tokens\.json
        | spiece\.model | source\.spm | target\.spm | sentencepiece\.bpe\.model
        | chat_template\.(jinja|json) | additional_chat_templates/[^/]+\.jinja
        | generation_config\.json | (image_|video_|audio_)?(pre)?processor(_config)?\.json
        | feature_extractor_config\.json
    )$""",
    re.VERBOSE,
)
_OF_A_TOKENIZER = re.compile(
    r"(^|/)(tokenizer|vocab|merges|special_tokens_map|added_tokens|spiece|source|target|sentencepiece|tekken|chat_template)"
    r"|\.tiktoken$|^additional_chat_templates/"
)
CARD_NAME = "README.md"
"""What a model says of itself to people."""

LOCK_NAME = "merger.lock.yaml"
"""What a merge was made of, beside its result."""

MEASURED_NAME = "merger.measured.json"
"""How parents and result lie to each other, as it was measured on the way: what a card is rendered from again."""

EVALUATED_NAME = "merger.evaluation.json"
"""What was measured of a result's use, beside it."""

PICTURES = "pictures/"
"""The folder beside a card that holds its pictures."""

_CODE = re.compile(r"^[^/]+\.py$")


def side_files(files: Collection[str], config: Mapping[str, Any]) -> tuple[str, ...]:
    """Those of a model's files that its merge takes over; code files only where the config refers to some."""
    wanted = [name for name in files if _SIDE_FILE.match(name) or ("auto_map" in config and _CODE.match(name))]
    return tuple(sorted([*wanted, *(name for name in licence_files(files) if not is_notice(name))]))


def read_beside(files: Collection[str], config: Mapping[str, Any]) -> tuple[str, ...]:
    """Those of a model's files beside tensors and config that its merge takes over, or reads for what it publishes."""
    return tuple(dict.fromkeys([*side_files(files, config), *licence_files(files), *({CARD_NAME} & set(files))]))


def tokenizer_files(files: Collection[str]) -> tuple[str, ...]:
    """Those of a model's side files that make up its tokenizer and its chat template."""
    return tuple(name for name in side_files(files, {}) if _OF_A_TOKENIZER.search(name))
