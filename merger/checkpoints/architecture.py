"""What a tensor's name means: its stack, its layer, its role; learned from the names of the checkpoint themselves.

There is no list of known models here: a stack of layers is a run of names that count from zero.
Not here: what config.json says of them (config), and which layers a recipe takes (plan).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_NUMBERED = re.compile(r"^(?P<stack>.+?)\.(?P<layer>0|[1-9][0-9]{0,4})\.(?P<role>.+)$")
_CONTAINER = re.compile(r"(^|[._])(layers?|h|blocks?|resblocks)$")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_layer|output)\.weight$")
_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings|token_embedding|embeddings?|shared)\.weight$"
)
_BEFORE_LAYERS = re.compile(r"(^|[._])(emb|embed|embedding|embeddings|wte|wpe|shared)([._]|$)|embed")
_OTHER_ROWS = re.compile(r"position|wpe|token_type|norm|(^|\.)ln_")
_BUFFER = re.compile(
    r"(^|\.)(inv_freq|(cos|sin)_cached|rope\.freqs|attn\.bias|masked_bias|position_ids|token_type_ids)$"
)

DEFAULT = "default"
"""The module that holds what is in no stack; of a model with one stack, the whole model."""


@dataclass(frozen=True)
class Place:
    """A tensor's place in its architecture; outside all stacks `stack` and `layer` are None.

    >>> Architecture(["model.layers.0.mlp.up_proj.weight"]).place("model.layers.0.mlp.up_proj.weight")
    Place(stack='model.layers', layer=0, role='mlp.up_proj.weight')
    """

    stack: str | None
    layer: int | None
    role: str

    def at_layer(self, layer: int) -> str:
        """The name of the tensor that has this role in another layer of the stack."""
        return f"{self.stack}.{layer}.{self.role}"


class Architecture:
    """The stacks of layers that a checkpoint's tensor names tell of: ``stacks`` maps each to its number of layers."""

    def __init__(self, names: Iterable[str]) -> None:
        layers: dict[str, dict[int, set[str]]] = {}
        for name in names:
            if match := _NUMBERED.match(name):
                roles = layers.setdefault(match["stack"], {}).setdefault(int(match["layer"]), set())
                roles.add(match["role"])
        self.stacks: Mapping[str, int] = {
            stack: len(found) for stack, found in layers.items() if _is_stack(stack, found)
        }

    def place(self, name: str) -> Place:
        """Where the tensor of this name belongs."""
        match = _NUMBERED.match(name)
        if match is None or match["stack"] not in self.stacks:
            return Place(None, None, name)
        return Place(match["stack"], int(match["layer"]), match["role"])

    def module(self, name: str) -> str:
        """The module that the tensor belongs to, as recipes name it under ``modules:``."""
        stack = self.place(name).stack
        return DEFAULT if stack is None or len(self.stacks) == 1 else stack

    @property
    def modules(self) -> tuple[str, ...]:
        """The names that a recipe may use under ``modules:``."""
        return (DEFAULT,) if len(self.stacks) <= 1 else (*self.stacks, DEFAULT)


def _is_stack(name: str, layers: Mapping[int, set[str]]) -> bool:
    """Counts from zero without a gap; and is called like a stack, or is clearly built like one."""
    if sorted(layers) != list(range(len(layers))):
        return False
    shared = set.intersection(*layers.values())
    return bool(shared) and (_CONTAINER.search(name) is not None or (len(layers) >= 3 and len(shared) >= 4))


def is_head(name: str) -> bool:
    """Whether the tensor turns hidden states into logits over the vocabulary."""
    return _HEAD.search(name) is not None


def is_embedding(name: str) -> bool:
    """Whether the tensor holds one row for each token of the vocabulary, at the model's input."""
    return _EMBEDDING.search(name) is not None


def never_by_token(name: str) -> bool:
    """Whether the tensor's rows are positions or features, even if there are as many as there are tokens."""
    return _OTHER_ROWS.search(name) is not None


def is_buffer(name: str) -> bool:
    """Whether the tensor is a constant that old checkpoints carry along: computed from the config, never trained."""
    return _BUFFER.search(name) is not None


def is_before_layers(name: str) -> bool:
    """Whether a tensor outside the stacks acts before the first layer (embeddings), not after the last (norm, head)."""
    return _BEFORE_LAYERS.search(name) is not None and not is_head(name)
