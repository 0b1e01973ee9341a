"""What a tensor's name means: its stack, its layer, its role; learned from the names of the checkpoint themselves.

There is no list of known models here: a stack of layers is a run of names that count from zero.
Layers that predict the tokens after the next one (multi-token prediction) lie behind a stack's own, whose number only
config.json tells, or under a name of their own; they belong to no stack. Not here: what else config.json says (config),
and which layers a recipe takes (plan).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from merger.models.config import ordinary_layers

_NUMBERED = re.compile(r"^(?P<stack>.+?)\.(?P<layer>0|[1-9][0-9]{0,4})\.(?P<role>.+)$")
_PREDICTING = re.compile(r"(^|\.)mtp(_[a-z_]+)?\.")
_CONTAINER = re.compile(r"(^|[._])(layers?|h|blocks?|resblocks)$")
_HEADS = tuple(f".{name}.weight" for name in ("lm_head", "embed_out", "output_layer", "output"))
_EMBEDDINGS = tuple(
    f".{name}.weight"
    for name in (
        "embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "token_embedding", "embedding",
        "embeddings", "shared",
    )
)  # fmt: skip
_BEFORE_LAYERS = re.compile(r"(^|[._])(emb|embed|embedding|embeddings|wte|wpe|shared)([._]|$)|embed")
_OTHER_ROWS = re.compile(r"position|wpe|token_type|norm|(^|\.)ln_")
_STACK = re.compile(
    r"(^|[._])(experts|moe)\.(?!experts|\d)|\.(input|output)_linear\.weight$|\.codebooks_head\.weight$"
    r"|\.(dt|x)_proj_weight$|\.rg_lru\.(input|recurrent)_gate_weight$"
)
_BUFFERS = (
    ".inv_freq", ".cos_cached", ".sin_cached", ".rope.freqs", ".attn.bias", ".masked_bias", ".position_ids",
    ".token_type_ids",
)  # fmt: skip

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


def parse_place(name: str) -> Place:
    """What a name tells by itself: what is before its first number and behind it, whether or not that is a stack."""
    match = _NUMBERED.match(name)
    return Place(None, None, name) if match is None else Place(match["stack"], int(match["layer"]), match["role"])


class Architecture:
    """The stacks of layers that a checkpoint's tensor names tell of: ``stacks`` maps each to its number of layers.

    Args:
        names: the names.
        config: the model's config.json, which tells layers of prediction from those before them.
    """

    def __init__(self, names: Iterable[str], config: Mapping[str, Any] | None = None) -> None:
        layers: dict[str, dict[int, set[str]]] = {}
        for name in names:
            match = _NUMBERED.match(name)
            if match and not ("mtp" in name and _PREDICTING.search(name)):
                roles = layers.setdefault(match["stack"], {}).setdefault(int(match["layer"]), set())
                roles.add(match["role"])
        found = {stack: of for stack, of in layers.items() if _is_stack(stack, of)}
        counts = {stack: len(of) for stack, of in found.items()}
        said = {stack: ordinary_layers(config or {}, stack, counts) for stack in found}
        self.stacks: Mapping[str, int] = {stack: _ordinary(of, said[stack]) for stack, of in found.items()}
        self.behind: Mapping[str, int] = {stack: count - self.stacks[stack] for stack, count in counts.items()}
        self._places: dict[str, Place] = {}

    def place(self, name: str) -> Place:
        """Where the tensor of this name belongs."""
        if (known := self._places.get(name)) is not None:
            return known
        told = parse_place(name)
        inside = told.stack is not None and told.layer is not None and told.layer < self.stacks.get(told.stack, 0)
        return self._places.setdefault(name, told if inside else Place(None, None, name))

    def predicts(self, name: str) -> bool:
        """Whether the tensor belongs to layers of multi-token prediction, which a model computes as well without."""
        if "mtp" in name and _PREDICTING.search(name) is not None:
            return True
        match = _NUMBERED.match(name) if any(self.behind.values()) else None
        beyond = 0 if match is None else int(match["layer"]) - self.stacks.get(match["stack"], 0)
        return match is not None and 0 <= beyond < self.behind.get(match["stack"], 0)

    def predicted(self, names: Iterable[str]) -> int:
        """How many layers of multi-token prediction these tensors are of."""
        mine = [name for name in names if self.predicts(name)]
        matches = [match for name in mine if (match := _NUMBERED.match(name))]
        return max(len({match["layer"] for match in matches}), min(1, len(mine)))

    def moved_behind(self, name: str, stacks: Mapping[str, int]) -> str:
        """The name that a tensor of a layer behind a stack has where stacks have other numbers of layers.

        >>> Architecture(["a.0.x", "a.1.x"]).moved_behind("b.mtp.x", {"a": 3})
        'b.mtp.x'
        """
        match = _NUMBERED.match(name)
        if match is None or match["stack"] not in self.stacks or not self.predicts(name):
            return name
        stack, layer = match["stack"], int(match["layer"]) - self.stacks[match["stack"]]
        return Place(stack, None, match["role"]).at_layer(stacks.get(stack, self.stacks[stack]) + layer)

    def module(self, name: str) -> str:
        """The module that the tensor belongs to, as recipes name it under ``modules:``."""
        stack = self.place(name).stack
        return DEFAULT if stack is None or len(self.stacks) == 1 else stack

    @property
    def modules(self) -> tuple[str, ...]:
        """The names that a recipe may use under ``modules:``."""
        return (DEFAULT,) if len(self.stacks) <= 1 else (*self.stacks, DEFAULT)


def _ordinary(layers: Mapping[int, set[str]], said: int | None) -> int:
    """How many layers a stack has without those of prediction, which hold something that no other layer does."""
    if said is None or not 0 < said < len(layers):
        return len(layers)
    known = set[str]().union(*(layers[layer] for layer in range(said)))
    return said if all(layers[layer] - known for layer in range(said, len(layers))) else len(layers)


def _is_stack(name: str, layers: Mapping[int, set[str]]) -> bool:
    """Counts from zero without a gap; and is called like a stack, or is clearly built like one."""
    if sorted(layers) != list(range(len(layers))):
        return False
    shared = set.intersection(*layers.values())
    return bool(shared) and (_CONTAINER.search(name) is not None or (len(layers) >= 3 and len(shared) >= 4))


def is_head(name: str) -> bool:
    """Whether the tensor turns hidden states into logits over the vocabulary."""
    return f".{name}".endswith(_HEADS)


def is_embedding(name: str) -> bool:
    """Whether the tensor holds one row for each token of the vocabulary, at the model's input."""
    return f".{name}".endswith(_EMBEDDINGS)


def never_by_token(name: str) -> bool:
    """Whether the tensor's rows are positions or features, even if there are as many as there are tokens."""
    return _OTHER_ROWS.search(name) is not None


def is_buffer(name: str) -> bool:
    """Whether the tensor is a constant that old checkpoints carry along: computed from the config, never trained."""
    return f".{name}".endswith(_BUFFERS)


def is_stack_of_matrices(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor holds matrices one behind the other: one for each expert, or as few models have it, for each
    head (Zamba, RecurrentGemma) or codebook (CSM). Only its name can tell it from a kernel.

    >>> is_stack_of_matrices("model.layers.0.mlp.experts.gate_up_proj", (8, 64, 32))
    True
    >>> is_stack_of_matrices("model.layers.0.linear_attn.conv1d.weight", (64, 1, 4))
    False
    """
    return len(shape) == 3 and _STACK.search(name) is not None


def matrix_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """What the tensor is to methods that treat it as a matrix: the shape of one that it is, or is a stack of.

    What has fewer than two dimensions is none, and keeps its shape. A kernel [out, in, k...], and whatever else has
    more than two and is no stack, is one matrix: its first dimension against all others.

    >>> matrix_shape("vision_tower.patch_embed.proj.weight", (32, 3, 14, 14))
    (32, 588)
    """
    if len(shape) < 3:
        return shape
    return shape[1:] if is_stack_of_matrices(name, shape) else (shape[0], math.prod(shape[1:]))


def is_before_layers(name: str) -> bool:
    """Whether a tensor outside the stacks acts before the first layer (embeddings), not after the last (norm, head)."""
    return _BEFORE_LAYERS.search(name) is not None and not is_head(name)
