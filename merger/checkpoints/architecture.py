"""What a tensor's name means: its stack, its layer, its role; learned from the names of the checkpoint themselves.

There is no list of known models here: a stack of layers is a run of names that count from zero. Also the edits of
config.json that follow when layers are taken away, added or repeated. Not here: which layers a recipe takes (plan).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_NUMBERED = re.compile(r"^(?P<stack>.+?)\.(?P<layer>\d+)\.(?P<role>.+)$")
_CONTAINER = re.compile(r"(^|[._])(layers?|h|blocks?|resblocks)$")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_layer|output)\.weight$")
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings|shared)\.weight$")
_BEFORE_LAYERS = re.compile(r"(^|[._])(emb|embed|embedding|embeddings|wte|wpe|shared)([._]|$)|embed")
_BUFFER = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias|position_ids|token_type_ids)$")

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
        self.stacks: Mapping[str, int] = {stack: len(found) for stack, found in layers.items() if _is_stack(stack, found)}

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


def is_buffer(name: str) -> bool:
    """Whether the tensor is a constant that old checkpoints carry along: computed from the config, never trained."""
    return _BUFFER.search(name) is not None


def is_before_layers(name: str) -> bool:
    """Whether a tensor outside the stacks acts before the first layer (embeddings), not after the last (norm, head)."""
    return _BEFORE_LAYERS.search(name) is not None and not is_head(name)


# ---- config.json ----------------------------------------------------------------------------------------------------

Config = Mapping[str, Any]
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "decoder_layers",
                 "encoder_layers", "depth")  # fmt: skip
_NOT_PER_LAYER = re.compile(r"(^architectures|token_ids?|_ids|languages?|labels?|_size|_sizes|image_mean|image_std)$")
_INDEX_LIST = re.compile(r"layers?($|_)|idxs?$|indices$|indexes$")


def is_tied(config: Config) -> bool:
    """Whether the config says that the head is the embedding; where it says nothing, it is taken not to be."""
    return bool(config.get("tie_word_embeddings", _text(config).get("tie_word_embeddings", False)))


def is_quantised(config: Config) -> bool:
    """Whether the tensors are stored in a form that must not be merged as numbers."""
    return any("quantization_config" in part for part in _parts(config))


def with_dtype(config: Config, dtype: str) -> dict[str, Any]:
    """The config with its dtype set, under the name that it already uses, in nested configs too."""
    edited = copy.deepcopy(dict(config))
    parts = [edited, *(part for part in edited.values() if isinstance(part, dict))]
    found = [(part, key) for part in parts for key in ("dtype", "torch_dtype") if key in part]
    for part, key in found or [(edited, "dtype")]:
        part[key] = dtype
    return edited


def untied(config: Config) -> dict[str, Any]:
    """The config with the statement that head and embedding are two tensors."""
    edited = copy.deepcopy(dict(config))
    holder = edited if "tie_word_embeddings" in edited else _text(edited)
    holder["tie_word_embeddings"] = False
    return edited


def with_layers(config: Config, count: int, layers: Sequence[tuple[Config, int]]) -> dict[str, Any]:
    """The config of a model whose layers were taken from others: the count and all per-layer lists follow.

    Args:
        config: the donor's config.
        count: how many layers the donor has.
        layers: for each output layer, the config of the model it comes from and its layer there.
    """
    edited = copy.deepcopy(dict(config))
    for part in _parts(edited):
        for key in list(part):
            part[key] = _follow(key, part[key], count, [(_value(source, key), layer) for source, layer in layers])
    return edited


def _follow(key: str, value: Any, count: int, layers: Sequence[tuple[Any, int]]) -> Any:
    """A config value as it must be when the layers are those of `layers`: (the source's value, its layer)."""
    if key in _LAYER_COUNTS and value == count:
        return len(layers)
    if not isinstance(value, list) or not value or _NOT_PER_LAYER.search(key):
        return value
    if _is_index_list(key, value, count):
        return [new for new, (theirs, layer) in enumerate(layers) if isinstance(theirs, list) and layer in theirs]
    if len(value) == count:
        return [_entry(theirs, layer, value) for theirs, layer in layers]
    return value


def _entry(theirs: Any, layer: int, ours: list[Any]) -> Any:
    source = theirs if isinstance(theirs, list) and layer < len(theirs) else ours
    return source[min(layer, len(source) - 1)]


def _is_index_list(key: str, value: list[Any], count: int) -> bool:
    """A list such as ``mlp_only_layers: [0, 3]``: rising layer numbers, not one entry for each layer."""
    numbers = all(type(n) is int and 0 <= n < count for n in value)
    return bool(_INDEX_LIST.search(key)) and numbers and value == sorted(set(value)) and len(value) != count


def _text(config: Config) -> dict[str, Any]:
    """The part of the config that describes the language model; the config itself where there is but one part."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config  # type: ignore[return-value]


def _parts(config: Config) -> tuple[dict[str, Any], ...]:
    """The config, and its language model's part if that is a part of its own."""
    text = _text(config)
    return (text,) if text is config else (config, text)  # type: ignore[return-value]


def _value(config: Config, key: str) -> Any:
    return config.get(key, _text(config).get(key))
