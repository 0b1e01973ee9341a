"""Statistics of a model: files that lie like a model's, and the lock beside them that says what they were measured on.

Not here: measuring (statistics), the methods that use them, and whether they fit a recipe's models (planning).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import yaml

from merger.errors import ModelError, Problem
from merger.lock.parents import Parent, list_files, need_kind, need_within, read_files, read_parent
from merger.methods.registry import Statistic
from merger.models.plain_yaml import load_yaml
from merger.models.side_files import LOCK_NAME
from merger.safety import numbers
from merger.safety.limits import LOCK
from merger.stores.ports import FileInfo

KINDS: tuple[Statistic, ...] = get_args(Statistic)

STATISTICS_FORMAT = 1
"""Counts up with each change of what the files hold."""

_SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"""Layers that are fed what another one is: what is measured of inputs stands once, under that one's name."""


def statistic_name(kind: str, weight: str) -> str:
    """Under which name the statistic of a weight lies.

    >>> statistic_name("gram", "model.layers.0.self_attn.v_proj.weight")
    'model.layers.0.self_attn.q_proj.weight'
    >>> statistic_name("fisher", "model.layers.0.self_attn.v_proj.weight")
    'model.layers.0.self_attn.v_proj.weight'
    """
    before, _, rest = weight.rpartition(".")
    module, _, last = before.rpartition(".")
    if kind == "fisher" or last not in _SAME_INPUT:
        return weight
    return f"{module}.{_SAME_INPUT[last]}.{rest}"


def statistic_shape(kind: str, shape: tuple[int, ...], blocks: int | None = None) -> tuple[int, ...]:
    """The shape of what is measured for a weight of this shape, whose last dimension is that of its inputs.

    Args:
        blocks: of Gram matrices blocks of so many inputs along the diagonal, the last one filled up with zeros.

    >>> statistic_shape("gram", (8, 1000), 512)
    (2, 512, 512)
    """
    inputs = shape[-1]
    if kind == "gram" and blocks is not None and blocks < inputs:
        return -(-inputs // blocks), blocks, blocks
    return {"fisher": shape, "gram": (inputs, inputs), "activations": (inputs,)}[kind]


@dataclass(frozen=True)
class Statistics:
    """What a lock beside statistics says.

    Args:
        kind: fisher: of each entry the squared gradient of a sequence's log-likelihood, by predicted token, in the
            mean over sequences; gram: of each linear layer's inputs X the mean XᵀX over tokens; activations: of each of
            these inputs the mean magnitude.
        tokens: how many were measured on.
        length: how many of them follow each other in one sequence.
        data: what the texts are called.
        digest: the SHA-256 of the tokens' ids.
        seed: for tokens drawn by chance.
        identity: names all that decides the numbers.
        blocks: how many inputs the blocks of Gram matrices are of; None: all.
        merge: the plan's hash of the merge whose layers fed what was measured; None: the model's own.
        models: the model that was measured, and its adapter, if it had one.
        made_with: the versions of what measured.
        output: the files.
    """

    kind: Statistic
    tokens: int
    length: int
    data: str
    digest: str
    seed: int
    identity: str
    models: tuple[Parent, ...]
    made_with: Mapping[str, str] = field(default_factory=dict)
    output: Mapping[str, FileInfo] = field(default_factory=dict)
    format: int = STATISTICS_FORMAT
    blocks: int | None = None
    merge: str | None = None

    @property
    def measured_on(self) -> dict[str, Any]:
        """What decides the numbers beside the model."""
        return {
            "tokens": self.tokens,
            "length": self.length,
            "data": self.data,
            "sha256": self.digest,
            "seed": self.seed,
            **({"blocks": self.blocks} if self.blocks else {}),
            **({"merge": self.merge} if self.merge else {}),
        }

    def text(self) -> str:
        """As YAML."""
        content = {
            "statistics": self.kind,
            "format": self.format,
            "identity": self.identity,
            **self.measured_on,
            "made_with": dict(self.made_with),
            "models": [parent.encode() for parent in self.models],
            "output": list_files(self.output),
        }
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def read_statistics(text: str) -> Statistics:
    """What the text of such a lock says.

    Raises:
        ModelError: it is none, or a later version wrote it.
    """
    try:
        content = load_yaml(text, LOCK)
        if content["statistics"] and need_kind(int, content["format"]) > STATISTICS_FORMAT:
            raise ModelError(Problem("its statistics are of a later format", hint="use the merger that measured them"))
        if content["statistics"] not in KINDS:
            raise ValueError
        return Statistics(
            kind=content["statistics"],
            tokens=need_within(numbers.COUNT, content["tokens"]),
            length=need_within(numbers.COUNT, content["length"]),
            data=need_kind(str, content["data"]),
            digest=need_kind(str, content["sha256"]),
            seed=need_within(numbers.GIVEN_SEED, content["seed"]),
            identity=need_kind(str, content["identity"]),
            models=tuple(read_parent(item) for item in need_kind(list, content["models"])),
            made_with={need_kind(str, name): need_kind(str, number) for name, number in content["made_with"].items()},
            output=read_files(content["output"]),
            format=content["format"],
            blocks=None if (blocks := content.get("blocks")) is None else need_within(numbers.COUNT, blocks),
            merge=None if (merge := content.get("merge")) is None else need_kind(str, merge),
        )
    except (yaml.YAMLError, LookupError, TypeError, ValueError, AttributeError, RecursionError):
        hint = "make them with merger measure"
        raise ModelError(Problem(f"its {LOCK_NAME} is none of statistics", hint=hint)) from None
