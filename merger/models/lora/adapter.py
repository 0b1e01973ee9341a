"""What a LoRA adapter's files hold, and what it changes in a model: names, ranks, scales and places, but no bytes.

Follows PEFT's files: adapter_config.json, and adapter_model.safetensors with names such as
``base_model.model.<module>.lora_A.weight``. Not here: fetching them (lock.lock), and the sum (engine.readers).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from merger.errors import ModelError, Problem
from merger.models.architecture import is_embedding, is_head
from merger.models.checkpoint import FLOATS, TensorInfo
from merger.models.config import is_tied
from merger.models.lora.counterparts import counterparts
from merger.models.tokenizer_files import TokenRows, rows_of, token_rows
from merger.safety.apart import BeyondError
from merger.safety.expressions import compiles, first
from merger.safety.limits import EXPRESSIONS, excess
from merger.safety.numbers import ANY, RANK, Range

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
OF_MLX = "adapters.safetensors"
"""MLX's, whose matrices are turned and named otherwise."""

_PREFIX = re.compile(r"^base_model\.model\.")
_PART = re.compile(
    r"^(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|lora_bias)"
    r"(\.weight)?$"
)
_WRAPPED = re.compile(r"\.((token_adapter\.)?base_layer|modules_to_save(\.default)?)(?=\.)")
_UNTRAINED = re.compile(r"\.original_module\.")
"""What PEFT keeps beside a module that is trained as a whole: the model's own, as it was."""

TURNED_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
"""Kinds of models whose linear layers hold their matrices with the inputs first (transformers' Conv1D)."""

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
_NOT_BUILT = {
    "layer_replication": "it repeats layers of its model",
    "target_parameters": "it changes parameters that are no module's weight",
    "use_qalora": "it groups a quantised model's inputs",
    "use_bdlora": "its matrices are block-diagonal",
    "kasa_config": "it takes singular values away from its model",
    "arrow_config": "it routes between adapters while it runs",
    "alora_invocation_tokens": "it acts only after certain tokens",
    "megatron_config": "its layers are Megatron's",
}
_SHOWN = 3
_MERGE_FIRST = "merge it into its model with PEFT's merge_and_unload, and name the folder of the result"
_DAMAGED = "the adapter is incomplete or damaged: download it again, or ask its author"


@dataclass(frozen=True)
class AdaptedModule:
    """What an adapter holds for one module of its model: the module's matrix gets ``scale * B @ A`` added.

    Args:
        name: the module's name in its model.
        a: A, of `rank` rows, one column for each input.
        b: B, one row for each output, of `rank` columns.
        rank: the number of directions.
        scale: what B A is multiplied by.
        embedding: whether the module is an embedding: its matrix has its inputs (the tokens) as rows.
        bias: what is added, times the scale, to the module's bias.
        magnitude: DoRA's length of each of the sum's rows.
    """

    name: str
    a: TensorInfo
    b: TensorInfo
    rank: int
    scale: float
    embedding: bool = False
    bias: TensorInfo | None = None
    magnitude: TensorInfo | None = None

    @property
    def inputs(self) -> int:
        """How many inputs the module has."""
        return self.a.shape[1]

    @property
    def outputs(self) -> int:
        """How many outputs."""
        return self.b.shape[0]


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter by itself.

    Args:
        model: the model that it was trained on, as its config names it.
        modules: what it holds for the modules of its model, by their names.
        whole: the tensors that it holds whole, in place of its model's, by the names that these have there.
        tokens: the single rows that it holds, in place of its model's, by the names of the tensors that have them.
        turned: whether its config says that matrices have their inputs first.
        tied: whether a head that it holds whole is its embedding once more.
        aside: why some of its tensors are not read, by their names in its file.
    """

    model: str | None
    modules: Mapping[str, AdaptedModule] = field(repr=False)
    whole: Mapping[str, TensorInfo] = field(repr=False)
    tokens: Mapping[str, TokenRows] = field(default_factory=dict, repr=False)
    turned: bool = False
    tied: bool = False
    aside: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Change:
    """What an adapter makes of one tensor of its model, in this order.

    Args:
        whole: it is replaced by this one.
        tokens: some of its rows are replaced by these.
        low_rank: a product of two small matrices is added to it.
        turned: whether the tensor has the module's inputs as rows.
        added: this is added to it, times `scale`.
        scale: see there.
    """

    whole: TensorInfo | None = None
    tokens: TokenRows | None = None
    low_rank: AdaptedModule | None = None
    turned: bool = False
    added: TensorInfo | None = None
    scale: float = 1.0


# ---- an adapter by itself -------------------------------------------------------------------------------------------


def read_adapter(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Adapter:
    """The adapter that these files hold.

    Args:
        config: adapter_config.json.
        tensors: the tensors of adapter_model.safetensors by name.

    Raises:
        ModelError: it is no LoRA adapter, of a kind that is not built, or damaged; with every problem that was found.
    """
    problems = list(_config_problems(config))
    if problems:
        raise ModelError(problems)
    parts, whole, aside = _parted(tensors)
    modules: dict[str, AdaptedModule] = {}
    try:
        ranks = _by_pattern(config, "rank_pattern", list(parts), config.get("r", 8))
        alphas = _by_pattern(config, "alpha_pattern", list(parts), config.get("lora_alpha", 8))
    except BeyondError as error:
        raise ModelError(Problem(f"{CONFIG}: to try its regular expressions {error}", hint=_DAMAGED)) from None
    for name, found in parts.items():
        module = _module(name, found, int(ranks[name]), alphas[name], config)
        if isinstance(module, Problem):
            problems.append(module)
        else:
            modules[name] = module
    tokens: Mapping[str, TokenRows] = {}
    try:
        tokens = token_rows(tensors, config)
    except ValueError as error:
        problems.append(Problem(f"{CONFIG}: {error}", hint=_DAMAGED))
    if not parts and not whole and not tokens:
        problems.append(Problem(f"{TENSORS} holds no tensor", hint=_DAMAGED))
    if problems:
        raise ModelError(problems[:_SHOWN])
    named = config.get("base_model_name_or_path")
    model = named if isinstance(named, str) else None
    turned = config.get("fan_in_fan_out") is True
    return Adapter(model, modules, whole, tokens, turned, _copies_head(config, modules), aside)


def _copies_head(config: Mapping[str, Any], modules: Iterable[str]) -> bool:
    """Whether a head that is held whole is a tied model's embedding: so PEFT was told, or it trained neither."""
    saved = config.get("modules_to_save")
    trained = [f"{name}.weight" for name in (*(saved if isinstance(saved, list) else ()), *modules)]
    return config.get("ensure_weight_tying") is True or not any(is_embedding(n) or is_head(n) for n in trained)


def _config_problems(config: Mapping[str, Any]) -> Iterator[Problem]:
    kind = config.get("peft_type")
    if kind != "LORA":
        said = f"is a {kind} adapter" if isinstance(kind, str) else f"{CONFIG} names no peft_type"
        yield Problem(f"{said}; LoRA is the only kind that is built", hint=_MERGE_FIRST)
        return
    for key, why in _NOT_BUILT.items():
        if config.get(key):
            yield Problem(f"{CONFIG} has {key}: {why}, which is not built", hint=_MERGE_FIRST)
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        what = (
            f"{CONFIG} has init_lora_weights: {start}, with which PEFT changes the model too, not only by the adapter"
        )
        hint = "convert it: save_pretrained(..., path_initial_model_for_weight_conversion=...) writes a plain adapter"
        yield Problem(what, hint=hint)
    yield from _number_problems(config)


def _number_problems(config: Mapping[str, Any]) -> Iterator[Problem]:
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    if not _is_number(rank, RANK) or not isinstance(rank, int):
        yield Problem(f"{CONFIG} has r: {_shown(rank)}, which is no rank from {RANK}", hint=_DAMAGED)
    if not _is_number(alpha, ANY):
        yield Problem(f"{CONFIG} has lora_alpha: {_shown(alpha)}, which is no number from {ANY}", hint=_DAMAGED)
    for key, within in (("rank_pattern", RANK), ("alpha_pattern", ANY)):
        patterns = config.get(key) or {}
        sound = isinstance(patterns, Mapping) and all(_is_number(value, within) for value in patterns.values())
        if sound and (problem := excess(f"{CONFIG}: {key}", len(patterns), EXPRESSIONS)):
            yield problem
        elif not sound or any(compiles(pattern) for pattern in patterns):
            yield Problem(f"{CONFIG}: {key} is no map of regular expressions to numbers", hint=_DAMAGED)


def _is_number(value: Any, within: Range) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and within.holds(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


_Parts = dict[str, dict[str, TensorInfo]]


def _parted(tensors: Mapping[str, TensorInfo]) -> tuple[_Parts, dict[str, TensorInfo], dict[str, str]]:
    """The tensors of each module by what they are to it, those that stand for whole tensors, and why some do not."""
    parts: _Parts = defaultdict(dict)
    whole: dict[str, TensorInfo] = {}
    aside: dict[str, str] = {}
    for name in sorted(tensors, key=lambda name: _WRAPPED.search(name) is not None):
        own = _PREFIX.sub("", name)
        match, stands_for = _PART.match(own.replace(".lora_B.bias", ".lora_bias")), _WRAPPED.sub("", own)
        if match is not None:
            parts[match["module"]][match["part"]] = tensors[name]
        elif rows_of(name) is not None:
            continue
        elif _UNTRAINED.search(own):
            aside[name] = "the model's own, which PEFT saves beside what it trained in its place"
        elif stands_for in whole:
            aside[name] = "the adapter holds it under another name, too"
        else:
            whole[stands_for] = tensors[name]
    return parts, whole, aside


def _module(
    name: str, parts: Mapping[str, TensorInfo], rank: int, alpha: float, config: Mapping[str, Any]
) -> AdaptedModule | Problem:
    """A module's tensors, if they belong together."""
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    first, second = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    lacking = [part for part in (first, second) if part not in parts]
    if lacking:
        return Problem(f"{name} has {', '.join(parts)}, but no {lacking[0]}", hint=_DAMAGED)
    a, b = parts[first], parts[second]
    if len(a.shape) != 2 or len(b.shape) != 2:
        what = f"{name} is a convolution: its {first} has the shape {_shape(a)}"
        return Problem(f"{what}, and only matrices are built", hint=_MERGE_FIRST)
    if (a.shape[0], b.shape[1]) != (rank, rank):
        what = f"{name}: {CONFIG} says rank {rank}, but {first} is {_shape(a)} and {second} is {_shape(b)}"
        return Problem(what, hint=_DAMAGED)
    odd = next((part for part in parts.values() if part.dtype not in FLOATS), None)
    if odd is not None:
        return Problem(f"{odd.name} is stored as {odd.dtype}, which is not read", hint=_MERGE_FIRST)
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    module = AdaptedModule(
        name, a, b, rank, scale, embedding, parts.get("lora_bias"), parts.get("lora_magnitude_vector")
    )
    return _lengths(module, config) or module


def _lengths(module: AdaptedModule, config: Mapping[str, Any]) -> Problem | None:
    """What is wrong with the vectors that go with the matrices."""
    for vector, told in ((module.bias, "lora_B.bias"), (module.magnitude, "lora_magnitude_vector")):
        if vector is not None and vector.entries != module.outputs:
            what = f"{module.name}: {told} has {vector.entries:,} numbers, and lora_B {module.outputs:,} rows"
            return Problem(what, hint=_DAMAGED)
    if bool(config.get("use_dora")) != (module.magnitude is not None):
        has = "has" if module.magnitude is not None else "has no"
        what = f"{module.name} {has} lora_magnitude_vector, but {CONFIG} says use_dora: {bool(config.get('use_dora'))}"
        return Problem(what, hint=_DAMAGED)
    if module.magnitude is not None and module.embedding:
        return Problem(f"{module.name} is an embedding with DoRA, which is not built", hint=_MERGE_FIRST)
    return None


def _by_pattern(config: Mapping[str, Any], key: str, modules: Sequence[str], otherwise: float) -> Mapping[str, float]:
    """The modules' numbers: of the first pattern that the end of a name matches, as in PEFT."""
    patterns: Mapping[str, float] = config.get(key) or {}
    values = list(patterns.values())
    found = first(list(patterns), modules, at_end=True)
    return {name: otherwise if place is None else values[place] for name, place in zip(modules, found, strict=True)}


# ---- an adapter and its model ---------------------------------------------------------------------------------------


def changes(adapter: Adapter, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Mapping[str, Change]:
    """What an adapter makes of a model's tensors, by their names.

    Args:
        adapter: the adapter.
        tensors: the model's tensors by name.
        config: the model's config.json.

    Raises:
        ModelError: some part of it has no place in the model, or does not fit there.
    """
    fitting = _Fitting(adapter, tensors, config)
    found = fitting.changes()
    if fitting.problems:
        raise ModelError(fitting.problems)
    return found


def _wanted(adapter: Adapter) -> dict[str, tuple[int, ...] | None]:
    """The names by which an adapter calls its model's tensors, and their shapes where it tells them."""
    modules = adapter.modules.values()
    return {
        **dict.fromkeys(adapter.tokens),
        **{name: tensor.shape for name, tensor in adapter.whole.items()},
        **{f"{module.name}.weight": (module.outputs, module.inputs) for module in modules},
        **{f"{module.name}.bias": (module.outputs,) for module in modules if module.bias is not None},
    }


class _Fitting:
    """One adapter held against one model."""

    def __init__(self, adapter: Adapter, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> None:
        self._adapter, self._tensors, self._config = adapter, dict(tensors), config
        self._counterparts = counterparts(_wanted(adapter), {name: tensor.shape for name, tensor in tensors.items()})
        self._taken: dict[str, str] = {}
        self._homeless: list[str] = []
        self._unclear: list[str] = []
        self.problems: list[Problem] = []

    def changes(self) -> dict[str, Change]:
        found: dict[str, Change] = {}
        for name, tensor in self._adapter.whole.items():
            untied = is_head(name) and is_tied(self._config)
            if untied and self._adapter.tied:
                continue
            place = self._embedding() if untied else self._place(name, tensor)
            if place is not None and self._can_replace(place, tensor):
                place = replace(place, name=name) if untied else place
                found[place.name] = Change(whole=tensor)
                self._tensors[place.name] = replace(place, shape=tensor.shape)
        self._rows(found)
        places = [(module, self._place(f"{name}.weight", module.a)) for name, module in self._adapter.modules.items()]
        settled = [(module, place) for module, place in places if place is not None and self._fits(module, place)]
        usual = self._usually_turned(settled)
        for module, place in settled:
            turned = self._turned(module, place, usual)
            if turned and module.magnitude is not None:
                self._refuse(f"{module.name} has DoRA and its inputs first, which is not built", _MERGE_FIRST)
            found[place.name] = replace(found.get(place.name, Change()), low_rank=module, turned=turned)
            self._bias(module, found)
        self._tell_unplaced()
        return found

    def _rows(self, found: dict[str, Change]) -> None:
        """Single rows; of a head that is the embedding PEFT saves the embedding's once more."""
        for name, tokens in self._adapter.tokens.items():
            if is_head(name) and is_tied(self._config) and tokens.numbers in self._of_embeddings():
                continue
            place = self._place(name, tokens.rows)
            if place is None:
                continue
            last = max(tokens.numbers, default=-1)
            if last >= place.shape[0] or tokens.rows.shape[1:] != place.shape[1:]:
                rows = f"it has rows of {tokens.rows.shape[-1]} numbers up to row {last}"
                what = f"{rows} for {name}, but the model's {place.name} is {_shape(place)}"
                self._refuse(what, f"take the model that it was trained on{self._told_model()}")
            else:
                found[place.name] = replace(found.get(place.name, Change()), tokens=tokens)

    def _of_embeddings(self) -> list[tuple[int, ...]]:
        return [tokens.numbers for name, tokens in self._adapter.tokens.items() if is_embedding(name)]

    def _refuse(self, what: str, hint: str) -> None:
        self.problems.append(Problem(what, hint=hint))

    def _place(self, name: str, tensor: TensorInfo) -> TensorInfo | None:
        """The model's tensor that the adapter calls `name`."""
        places = self._counterparts[name]
        if is_head(name) and is_tied(self._config):
            what = f"it adds to {name}, which in this model is the embedding"
            self._refuse(what, _MERGE_FIRST)
            return None
        if not places:
            self._homeless.append(tensor.name)
            return None
        if len(places) > 1:
            self._unclear.append(f"{tensor.name} changes {places[0]} or {places[1]}")
            return None
        (place,) = places
        other = self._taken.setdefault(place, name)
        if other != name:
            self._unclear.append(f"{other} or {name} changes {place}")
            return None
        if self._tensors[place].dtype not in FLOATS:
            self._refuse(f"it changes {place}, which is stored as {self._tensors[place].dtype}", _MERGE_FIRST)
            return None
        return self._tensors[place]

    def _embedding(self) -> TensorInfo | None:
        """What a tied head is, so that one of its own has to be like it."""
        return next((tensor for tensor in self._tensors.values() if _is_of_tokens(tensor)), None)

    def _can_replace(self, place: TensorInfo, tensor: TensorInfo) -> bool:
        """Whether a tensor can stand in the model's place: of its shape, or an embedding or head of other tokens."""
        same = tensor.shape == place.shape or (_is_of_tokens(place) and tensor.shape[1:] == place.shape[1:])
        if tensor.dtype not in FLOATS:
            self._refuse(f"{tensor.name} is stored as {tensor.dtype}, which is not read", _MERGE_FIRST)
        elif not same:
            what = f"{tensor.name} is {_shape(tensor)}, but the model's {place.name} {_shape(place)}"
            self._refuse(what, f"take the model that it was trained on{self._told_model()}")
        return tensor.dtype in FLOATS and same

    def _fits(self, module: AdaptedModule, place: TensorInfo) -> bool:
        sizes = (module.outputs, module.inputs)
        allowed = [sizes[::-1]] if module.embedding else [sizes, sizes[::-1]]
        if place.shape in allowed:
            return True
        product = "x".join(map(str, allowed[0]))
        what = f"{module.name}: B A is {product}, but the model's {place.name} is {_shape(place)}"
        hint = f"take the model that it was trained on{self._told_model()}"
        if _is_of_tokens(place):
            hint += "; if it was given tokens before, give it those first (resize_token_embeddings in transformers)"
        self._refuse(what, hint)
        return False

    def _usually_turned(self, settled: Iterable[tuple[AdaptedModule, TensorInfo]]) -> bool:
        """Whether square matrices have their inputs first: as those do whose shape tells, else as the configs say."""
        told = [place.shape == (module.inputs, module.outputs) for module, place in settled
                if module.inputs != module.outputs and not module.embedding]  # fmt: skip
        return any(told) if told else self._adapter.turned or self._config.get("model_type") in TURNED_MODELS

    def _turned(self, module: AdaptedModule, place: TensorInfo, usual: bool) -> bool:
        if module.embedding or module.inputs != module.outputs:
            return place.shape == (module.inputs, module.outputs)
        return usual

    def _bias(self, module: AdaptedModule, found: dict[str, Change]) -> None:
        if module.bias is None:
            return
        place = self._place(f"{module.name}.bias", module.bias)
        if place is not None and self._can_replace(place, module.bias):
            found[place.name] = replace(found.get(place.name, Change()), added=module.bias, scale=module.scale)

    def _tell_unplaced(self) -> None:
        if self._unclear:
            rest = f", and so of {len(self._unclear) - 1} more" if len(self._unclear) > 1 else ""
            self._refuse(f"the adapter's names do not tell whether {self._unclear[0]}{rest}", _MERGE_FIRST)
        if self._homeless:
            names, more = self._homeless[:_SHOWN], len(self._homeless) - _SHOWN
            told = ", ".join(names) + (f" and {more} more" if more > 0 else "")
            hint = f"take the model that it was trained on{self._told_model()}"
            self._refuse(f"the model has no place for {told}", hint)

    def _told_model(self) -> str:
        return f": {self._adapter.model}" if self._adapter.model else ""


def _is_of_tokens(tensor: TensorInfo) -> bool:
    return len(tensor.shape) == 2 and (is_embedding(tensor.name) or is_head(tensor.name))


def _shape(tensor: TensorInfo) -> str:
    return "x".join(map(str, tensor.shape)) or "a single number"
