"""A model's config.json: what it says of the tensors, and its edits when layers, tokens, head or dtype change.

Layers are known to it by their number alone, so each of its per-layer lists, and each text with a letter for a layer,
must follow them; and an order of layers that no edit could express is refused. Not here: what the tensors' names tell
(architecture).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]
Kind = frozenset[str]
"""The roles and shapes of a layer's tensors: layers of one kind are built alike."""

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_encoder_layers", "num_decoder_layers",
                 "encoder_layers", "decoder_layers", "encoder_num_hidden_layers", "decoder_num_hidden_layers",
                 "num_transformer_layers", "layers", "depth")  # fmt: skip
_PREDICTED = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
"""How configs count the layers of multi-token prediction, which their number of layers leaves out."""

_NOT_PER_LAYER = re.compile(
    r"(^architectures|^mtp_.*|token_ids?|_ids|languages?|labels?|(?<!intermediate)_sizes?|image_mean|image_std)$"
)
_COUNTED = re.compile(r"(layer|block)(s|_).*types?$|pattern$")
"""Lists that say how many layers there are where no number does."""

_LETTERS = re.compile(r"pattern$")
"""Texts with a letter for a layer, such as ``hybrid_override_pattern: M-M*``."""

_INDEX_LIST = re.compile(r"layers?($|_)|idxs?$|indices$|indexes$")
_ONE_MODULE_EACH = re.compile(r"^deepstack_")
"""Lists of layers each of which has a module of its own outside of the stack: their number must not change."""

_ROW_COUNT = re.compile(r"(^|_)vocab_size(_|$)")
_TOKEN_ID = re.compile(r"token_(id|ids|index|indices)$|suppress_tokens$")
_ROLE = re.compile(r"^(bos|eos|pad|unk|sep|cls|mask|decoder_start|forced_[be]os)_token_id$")
_LEADING = re.compile(r"^(first_k_|n(um)?_dense_layers$)")
_TRAILING = "num_kv_shared_layers"
"""Of Gemma 3n and 4: how many of the last layers have no keys and values of their own."""

_EVERY = re.compile(r"(window|att(entio)?n|rope).*_(pattern|period|interval|every_n_layers)$")


@dataclass(frozen=True)
class Layer:
    """A layer that a new model takes: its old model's config, its number there, its kind."""

    config: Config
    number: int
    kind: Kind


def is_tied(config: Config) -> bool:
    """Whether the config says that the head is the embedding; where it says nothing, it is taken not to be."""
    return bool(config.get("tie_word_embeddings", _text(config).get("tie_word_embeddings", False)))


def is_diffusion(config: Config) -> bool:
    """Whether the config is one of diffusers', which know no dtype."""
    return "_class_name" in config


def quantisation(config: Config) -> Mapping[str, Any] | None:
    """What the config says of how its tensors are quantised; None where they are not."""
    found = [part["quantization_config"] for part in _parts(config) if part.get("quantization_config") is not None]
    return (found[0] if isinstance(found[0], dict) else {}) if found else None


def without_quantisation(config: Config) -> dict[str, Any]:
    """The config without a word of that, for tensors that were read back."""
    edited = copy.deepcopy(dict(config))
    for part in _parts(edited):
        part.pop("quantization_config", None)
    return edited


_STATED_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def stated_dtype(config: Config) -> str:
    """The dtype that the config gives the model, as safetensors writes it; bfloat16 where it gives none."""
    said = [str(value).removeprefix("torch.") for key, value in _statements(config) if key in ("dtype", "torch_dtype")]
    return next((_STATED_DTYPES[name] for name in said if name in _STATED_DTYPES), "BF16")


def with_dtype(config: Config, dtype: str) -> dict[str, Any]:
    """The config with its dtype set, under the name that it already uses, in nested configs too."""
    edited = copy.deepcopy(dict(config))
    parts = [edited, *(part for part in edited.values() if isinstance(part, dict))]
    found = [(part, key) for part in parts for key in ("dtype", "torch_dtype") if key in part]
    for part, key in found or ([] if is_diffusion(config) else [(edited, "dtype")]):
        part[key] = dtype
    return edited


def without_tie(config: Config) -> dict[str, Any]:
    """The config with the statement that head and embedding are two tensors."""
    edited = copy.deepcopy(dict(config))
    stated = [part for part in _parts(edited) if "tie_word_embeddings" in part]
    for part in stated or _parts(edited):
        part["tie_word_embeddings"] = False
    return edited


# ---- tokens ---------------------------------------------------------------------------------------------------------


def with_vocabulary(config: Config, before: int, rows: int) -> dict[str, Any]:
    """The config of a model whose embedding has another number of rows.

    Args:
        before: how many rows the embedding had.
        rows: how many it has.
    """
    edited = copy.deepcopy(dict(config))
    for part in _parts(edited):
        for key in part:
            if key == "vocab_size" or (_ROW_COUNT.search(key) and part[key] == before):
                part[key] = rows
    return edited


def renumber_tokens(
    config: Config, follow: Sequence[int], source: Config
) -> tuple[dict[str, Any], list[tuple[str, int]]]:
    """The config with the ids that its tokens have in another tokenizer, and what it names that is not there.

    Which tokens begin, end and pad a text is the tokenizer's own affair: those come from its model's config.

    Args:
        config: a config.json, or a generation_config.json.
        follow: for each id the new one, -1 for none.
        source: the config of the model that the tokenizer comes from.
    """
    edited, lost = copy.deepcopy(dict(config)), list[tuple[str, int]]()
    theirs = {key: value for part in _parts(source) for key, value in part.items()}
    for part in _parts(edited):
        for key in [key for key in part if _TOKEN_ID.search(key)]:
            role = _ROLE.search(key) is not None
            if role and key in theirs:
                part[key] = theirs[key]
                continue
            part[key], missing = _follow_ids(part[key], follow)
            lost += [] if role else [(key, number) for number in missing]
    return edited, lost


def _follow_ids(value: Any, follow: Sequence[int]) -> tuple[Any, list[int]]:
    """One id or a list of them in new numbers, and those that have none."""
    listed = value if isinstance(value, list) else [value]
    ids = [number for number in listed if type(number) is int]
    new = {number: int(follow[number]) if 0 <= number < len(follow) else -1 for number in ids}
    missing = [number for number in ids if new[number] < 0]
    kept = [new.get(number, number) for number in listed if new.get(number, 0) >= 0]
    if isinstance(value, list):
        return kept, missing
    return (kept[0] if kept else None), missing


# ---- layers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """Where a config tells of one stack of layers.

    Args:
        path: the keys that lead to the part that describes it; empty: the config itself and its language model's part.
        side: ``encoder`` or ``decoder`` where one part describes both.
    """

    path: tuple[str, ...] = ()
    side: str | None = None

    def parts(self, config: Config) -> tuple[dict[str, Any], ...]:
        """The maps that describe the stack."""
        if not self.path:
            return _parts(config)
        part: Any = config
        for key in self.path:
            part = part.get(key) if isinstance(part, dict) else None
        return _parts(part) if isinstance(part, dict) else ()

    def stated(self, config: Config) -> Iterator[tuple[dict[str, Any], str, Any]]:
        """What the config says of the stack: each part, key and value; a text with a letter for a layer as a list."""
        for part in self.parts(config):
            for key, value in part.items():
                if self._speaks(key):
                    yield part, key, _open_pattern(key, value)

    def _speaks(self, key: str) -> bool:
        """Of encoder and decoder in one part, a key that names neither is about the encoder."""
        return self.side is None or ("decoder" in key) == (self.side == "decoder")


def section(config: Config, stack: str, stacks: Mapping[str, int]) -> Section:
    """Where a config tells of a stack, by the words in the stack's name.

    Args:
        stacks: all stacks of the model and their numbers of layers.

    Raises:
        ValueError: nothing tells which of two stacks a number of layers is about.
    """
    found = {name: _section(config, name, stacks) for name in stacks}
    rivals = [name for name in stacks if name != stack and found[name] == found[stack]]
    rival = next((name for name in rivals if stacks[name] == stacks[stack]), None)
    if rival is not None:
        raise ValueError(f"config.json does not tell the layers of {stack} from those of {rival}")
    return found[stack]


def _section(config: Config, stack: str, stacks: Mapping[str, int]) -> Section:
    if len(stacks) == 1:
        return Section()
    paths = {name: _path(config, _words(name)) for name in stacks}
    sides = {name: "decoder" if "decoder" in _words(name) else "encoder" for name in stacks}
    shared = {sides[name] for name in stacks if paths[name] == paths[stack]}
    return Section(paths[stack], sides[stack] if len(shared) > 1 else None)


_SYNONYMS = {"visual": "vision", "image": "vision", "language": "text", "llm": "text", "speech": "audio"}


def _words(name: str) -> set[str]:
    """The words of a stack's name, or of the key of a nested config, in one spelling."""
    return {_SYNONYMS.get(word, word) for word in re.split(r"[._]", name.removesuffix("_config"))}


def _path(config: Config, words: set[str]) -> tuple[str, ...]:
    """The keys of the nested configs whose names consist of these words; of several, the one of most words."""
    nested = {key: _words(key) for key, value in config.items() if isinstance(value, dict)}
    fitting = [key for key, of in nested.items() if of <= words]
    if not fitting:
        return ()
    best = max(fitting, key=lambda key: len(nested[key]))
    return (best, *_path(config[best], words))


def ordinary_layers(config: Config, stack: str, stacks: Mapping[str, int]) -> int | None:
    """How many layers a stack has by a config that counts those of multi-token prediction apart; None: it does not."""
    said = {key: value for _, key, value in _section(config, stack, stacks).stated(config)}
    return next(iter(_counts(said)), None) if any(key in said for key in _PREDICTED) else None


def _counts(said: Config) -> list[int]:
    """The numbers of layers that a config says; where there is no number, how long the lists of their kinds are."""
    numbers = [said[key] for key in _LAYER_COUNTS if type(said.get(key)) is int]
    kinds = [value for key, value in said.items() if _COUNTED.search(key)]
    return numbers or [len(value) for value in kinds if isinstance(value, list | str)]


def _open_pattern(key: str, value: Any) -> Any:
    """A text with a letter for a layer as the list of its letters; all else as it is."""
    return list(value) if isinstance(value, str) and _LETTERS.search(key) else value


def _close_pattern(old: Any, value: Any) -> Any:
    """The new value in the form that the old one has."""
    return "".join(value) if isinstance(old, str) and isinstance(value, list) else value


@dataclass(frozen=True)
class Sizes:
    """What a config says of a tensor's size: of a layer's share in it, of heads, and every number that it names."""

    per_layer: frozenset[int]
    heads: frozenset[int]
    stated: frozenset[int]


def sizes(config: Config, stack: str, stacks: Mapping[str, int]) -> Sizes:
    """What a config says of a stack's sizes."""
    said = [(key, value) for _, key, value in _section(config, stack, stacks).stated(config) if type(value) is int]
    shares = (value for key, value in said if "per_layer" in key and not _ROW_COUNT.search(key))
    heads = (value for key, value in said if key in ("num_attention_heads", "n_head", "num_heads"))
    return Sizes(frozenset(shares), frozenset(heads), frozenset(_numbers(config)))


def _numbers(value: Any) -> Iterator[int]:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if type(value) is int:
        yield value
    for part in parts:
        yield from _numbers(part)


def predicted_layers(config: Config) -> int:
    """How many layers of multi-token prediction a config promises."""
    found = [value for key, value in _statements(config) if key in _PREDICTED and type(value) is int]
    return max(found, default=0)


def with_prediction(config: Config, layers: int, like: Config) -> Config:
    """The config with so many layers of multi-token prediction, counted as it does itself, or else as `like` does."""
    promised = predicted_layers(config)
    if layers == promised:
        return config
    edited = copy.deepcopy(dict(config))
    stated = [(part, key) for part in _parts(edited) for key in _PREDICTED if key in part]
    theirs = [(_text(edited), key) for key, _ in _statements(like) if key in _PREDICTED]
    for part, key in stated or theirs:
        part[key] = layers
    for part in _parts(edited):
        for count in _counts(part)[:1]:
            for key in [key for key, value in part.items() if promised and _is_per_layer(key, value, count + promised)]:
                part[key] = part[key][: count + layers]
    return edited


def with_layers(
    config: Config,
    own_kinds: Sequence[Kind],
    layers: Sequence[Layer],
    section: Section = Section(),
) -> dict[str, Any]:
    """The config of a model whose layers were taken from others: the count and all per-layer lists follow.

    Args:
        config: the config model's config.
        own_kinds: the kinds of the config model's layers.
        layers: the output's layers.
        section: where configs tell of this stack.

    Raises:
        ValueError: no edit of the config would describe such a model; why, in a sentence.
    """
    edited = copy.deepcopy(dict(config))
    predicted = _taken_off(edited, len(own_kinds), section)
    _check(edited, own_kinds, layers, section)
    before, after = _leading(own_kinds[0], own_kinds), _leading(own_kinds[0], [layer.kind for layer in layers])
    for part, key, value in list(section.stated(edited)):
        counts_leading = _LEADING.search(key) and value == before and after is not None
        trailing = _trailing(key, value, len(own_kinds), layers)
        part[key] = (
            after
            if counts_leading
            else trailing
            if trailing is not None
            else _close_pattern(part[key], _follow(key, value, len(own_kinds), layers, section))
        )
    _check_kinds(edited, config, own_kinds, layers, section)
    for part, key, entries in predicted:
        part[key] = _close_pattern(part[key], [*part[key], *entries])
    return edited


def _trailing(key: str, value: Any, count: int, layers: Sequence[Layer]) -> int | None:
    """How many of the last layers now share what those before them have; None: the key counts no such layers."""
    if key != _TRAILING or type(value) is not int or value <= 0:
        return None
    sharing = [layer.number >= count - value for layer in layers]
    if sharing != sorted(sharing):
        raise ValueError(
            f"config.json counts the last layers by {key}: {value}, which this order of layers would break"
        )
    return sum(sharing)


def _taken_off(config: dict[str, Any], count: int, section: Section) -> list[tuple[dict[str, Any], str, list[Any]]]:
    """Cut per-layer lists to a stack's layers: what they say of layers of multi-token prediction, which lie behind."""
    whole = count + predicted_layers(config)
    found = [(part, key, value[count:]) for part, key, value in section.stated(config)
             if whole > count and _is_per_layer(key, value, whole)]  # fmt: skip
    for part, key, _ in found:
        part[key] = part[key][:count]
    return found


def _follow(key: str, value: Any, count: int, layers: Sequence[Layer], section: Section) -> Any:
    """A config value as it must be when the layers are those of `layers`."""
    if key in (*_LAYER_COUNTS, "max_window_layers") and value == count:
        return len(layers)
    theirs = [_theirs(key, value, layer, section) for layer in layers]
    if _is_index_list(key, value, count):
        return _renumber(key, value, [new for new, layer in enumerate(layers) if layer.number in theirs[new]])
    if _is_per_layer(key, value, count):
        return [_entry(key, of, layer) for of, layer in zip(theirs, layers, strict=True)]
    return value


def _renumber(key: str, old: list[int], new: list[int]) -> list[int]:
    if _ONE_MODULE_EACH.search(key) and len(new) != len(old):
        raise ValueError(f"config.json's {key} names {len(old)} layers, each with a module of its own, not {len(new)}")
    return new


def _entry(key: str, of: list[Any], layer: Layer) -> Any:
    if layer.number >= len(of):
        raise ValueError(f"config.json's {key} has {len(of)} entries, none of them for layer {layer.number}")
    return of[layer.number]


def _theirs(key: str, ours: list[Any], layer: Layer, section: Section) -> list[Any]:
    """The list of the model that the layer comes from; the config model's, where that model has none."""
    found = next((_open_pattern(key, part[key]) for part in section.parts(layer.config) if key in part), None)
    return found if isinstance(found, list) else ours


def _is_index_list(key: str, value: Any, count: int) -> bool:
    """A list such as ``mlp_only_layers: [0, 3]``: rising layer numbers, not one entry for each layer."""
    if not isinstance(value, list) or not value or not _INDEX_LIST.search(key):
        return False
    numbers = all(type(n) is int and 0 <= n < count for n in value)
    return numbers and value == sorted(set(value)) and (len(value) != count or count > 2)


def _is_per_layer(key: str, value: Any, count: int) -> bool:
    """A list such as ``layer_types``: one entry for each layer."""
    return isinstance(value, list) and len(value) == count and not _NOT_PER_LAYER.search(key)


def _check(config: Config, own_kinds: Sequence[Kind], layers: Sequence[Layer], section: Section) -> None:
    """Whether a config can say that its layers are these: a loader builds what the config says, and nothing else."""
    count = len(own_kinds)
    stated = [(key, value) for _, key, value in section.stated(config)]
    counts = _counts(dict(stated))
    as_stated = [layer.number for layer in layers] == list(range(len(layers))) and len(layers) in counts
    if len(layers) != count and count not in counts and not as_stated:
        raise ValueError(f"config.json does not say that there are {count} layers, so it cannot be told {len(layers)}")
    said = _kinds_by_layer(stated, count)
    for key, value in stated:
        every = len(value) if isinstance(value, list) else value
        counted = _EVERY.search(key) is not None and type(every) is int and every > 1 and not any(said)
        if counted and any(layer.number % every != new % every for new, layer in enumerate(layers)):
            raise ValueError(f"config.json counts layers by {key}: {every}, which this order of layers would break")
    listed = _tells_apart(said, own_kinds) or _counts_leading(stated, own_kinds, layers)
    if not listed and any(layer.kind != _expected_kind(own_kinds, new) for new, layer in enumerate(layers)):
        raise ValueError("its layers are not all alike, and config.json cannot say that they come in this order")


def _check_kinds(
    edited: Config, before: Config, own_kinds: Sequence[Kind], layers: Sequence[Layer], of: Section
) -> None:
    """Whether what the edited lists say of a layer is what the config model's say of layers of its kind."""
    known, new = (_kinds_by_layer([(key, value) for _, key, value in of.stated(config)], count)
                  for config, count in ((before, len(own_kinds)), (edited, len(layers))))  # fmt: skip
    told = [(said, layer.kind) for said, layer in zip(new, layers, strict=True) if layer.kind in own_kinds]
    if _tells_apart(known, own_kinds) and not _tells_apart(
        [*known, *(said for said, _ in told)], [*own_kinds, *(kind for _, kind in told)]
    ):
        raise ValueError("its layers are not all alike, and the models' config.json say it in different ways")


def _kinds_by_layer(stated: Sequence[tuple[str, Any]], count: int) -> list[list[Any]]:
    """For each layer, what the config's lists say of it."""
    indexes = [value for key, value in stated if _is_index_list(key, value, count)]
    entries = [value for key, value in stated if _is_per_layer(key, value, count)]
    return [[*(of[layer] for of in entries), *(layer in of for of in indexes)] for layer in range(count)]


def _tells_apart(said: Sequence[list[Any]], own_kinds: Sequence[Kind]) -> bool:
    """Whether layers of different kinds are different ones in the config's lists too."""
    known: dict[str, Kind] = {}
    return all(known.setdefault(str(entries), kind) == kind for entries, kind in zip(said, own_kinds, strict=True))


def _counts_leading(stated: Sequence[tuple[str, Any]], own_kinds: Sequence[Kind], layers: Sequence[Layer]) -> bool:
    """Whether the config counts the first few layers, and only those differ, in the config model and in the output."""
    before, after = _leading(own_kinds[0], own_kinds), _leading(own_kinds[0], [layer.kind for layer in layers])
    counted = any(_LEADING.search(key) and value == before for key, value in stated)
    return counted and after is not None and len({*own_kinds, *(layer.kind for layer in layers)}) <= 2


def _leading(first: Kind, kinds: Sequence[Kind]) -> int | None:
    """How many layers at the beginning are of the kind `first`; None if one of that kind comes later again."""
    count = next((number for number, kind in enumerate(kinds) if kind != first), len(kinds))
    return None if first in kinds[count:] else count


def _expected_kind(own_kinds: Sequence[Kind], position: int) -> Kind | None:
    """The kind that a rule by position would put there, if the config model shows such a rule.

    Either its kinds repeat with a period, or they stay the same from somewhere in the first half on.
    """
    count = len(own_kinds)
    for period in range(1, count // 2 + 1):
        if all(own_kinds[layer] == own_kinds[layer - period] for layer in range(period, count)):
            return own_kinds[position % period]
    if position < count:
        return own_kinds[position]
    return own_kinds[-1] if len(set(own_kinds[count // 2 :])) == 1 else None


# ---- parts ----------------------------------------------------------------------------------------------------------


def _text(config: Config) -> dict[str, Any]:
    """The part of the config that describes the language model; the config itself where there is but one part."""
    named = (value for key, value in config.items() if _words(key) == {"text"} and isinstance(value, dict))
    return next(named, config)  # type: ignore[arg-type]


def _parts(config: Config) -> tuple[dict[str, Any], ...]:
    text = _text(config)
    return (text,) if text is config else (config, text)  # type: ignore[return-value]


def _statements(config: Config) -> Iterator[tuple[str, Any]]:
    return ((key, value) for part in _parts(config) for key, value in part.items())
