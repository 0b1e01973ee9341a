"""Single rows of embeddings and heads that an adapter has trained, PEFT's trainable_token_indices.

They stand in place of the model's rows, though PEFT calls them a delta. Not here: the rest of an adapter (adapter).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merger.checkpoints.checkpoint import FLOATS, TensorInfo

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
