"""Recipe + Store -> LockedRecipe: every model pinned to a commit, its headers and config read, no tensor byte.

Not here: what is made of them (jobs).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import yaml

from merger.checkpoints import adapter as adapters
from merger.checkpoints.adapter import Adapter, Change
from merger.checkpoints.architecture import Architecture, is_embedding, is_head
from merger.checkpoints.checkpoint import (
    INDEX,
    Checkpoint,
    TensorInfo,
    gather,
    header_length,
    read_header,
    weight_files,
)
from merger.checkpoints.config import is_quantised, is_tied
from merger.errors import ModelError, Problem, RecipeError
from merger.recipe.model import ModelRef, Recipe
from merger.stores.ports import Located, Store

_CARD_BYTES = 1 << 20
_REQUESTS_AT_ONCE = 8


@dataclass(frozen=True)
class LockedModel:
    """A model of the recipe as it was found.

    Args:
        ref: what the recipe says.
        located: where it is, at which commit, with which files.
        checkpoint: its tensors' names, shapes, dtypes and places, and its config.json.
        card: the metadata of its own model card, empty where there is none.
        lora: what its files hold, of a LoRA adapter; its config is adapter_config.json.
        adapter: the LoRA adapter that is added to it.
        changes: what that makes of its tensors, by their names.
    """

    ref: ModelRef
    located: Located
    checkpoint: Checkpoint = field(repr=False)
    card: Mapping[str, Any] = field(default_factory=dict, repr=False)
    lora: Adapter | None = field(default=None, repr=False)
    adapter: LockedModel | None = field(default=None, repr=False)
    changes: Mapping[str, Change] = field(default_factory=dict, repr=False)

    @cached_property
    def architecture(self) -> Architecture:
        """What the tensors' names tell."""
        return Architecture(self.checkpoint.tensors)

    @cached_property
    def by_layer(self) -> Mapping[tuple[str | None, int | None], list[TensorInfo]]:
        """The tensors of each layer of each stack, under (None, None) those outside; in the order of their places."""
        found: dict[tuple[str | None, int | None], list[TensorInfo]] = {}
        for tensor in self.checkpoint.tensors.values():
            place = self.architecture.place(tensor.name)
            found.setdefault((place.stack, place.layer), []).append(tensor)
        return found

    def layer(self, stack: str | None, layer: int | None) -> list[TensorInfo]:
        """The tensors of a layer, or with (None, None) those outside all stacks."""
        return self.by_layer.get((stack, layer), [])

    @cached_property
    def dtypes(self) -> Mapping[tuple[str | None, str], str]:
        """The dtype of each role in each stack, under None of the tensors outside."""
        places = [(tensor, self.architecture.place(tensor.name)) for tensor in self.checkpoint.tensors.values()]
        return {(place.stack, place.role): tensor.dtype for tensor, place in places}

    @cached_property
    def head(self) -> TensorInfo | None:
        """The tensor that makes logits over the vocabulary, where the checkpoint holds exactly one."""
        return self._only(is_head)

    @cached_property
    def embedding(self) -> TensorInfo | None:
        """The tensor with a row for each token, where the checkpoint holds exactly one."""
        return self._only(is_embedding)

    def _only(self, wanted: Callable[[str], bool]) -> TensorInfo | None:
        found = [tensor for tensor in self.layer(None, None) if wanted(tensor.name)]
        return found[0] if len(found) == 1 else None

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embedding: its config says so, and the embedding is what its files hold."""
        return is_tied(self.checkpoint.config) and any(is_embedding(tensor.name) for tensor in self.layer(None, None))

    @property
    def name(self) -> str:
        """The name for readers: repo id, or the folder's last part; with that of its adapter."""
        return self.located.name if self.adapter is None else f"{self.located.name}+{self.adapter.name}"

    @property
    def licence(self) -> str | None:
        """The licence that its card states."""
        stated = self.card.get("license")
        return " ".join(stated.split()) if isinstance(stated, str) else None


@dataclass(frozen=True)
class LockedRecipe:
    """A recipe and its models, in the order of ``recipe.models``, then the adapters that are added to them."""

    recipe: Recipe
    models: tuple[LockedModel, ...]

    def index(self, ref: ModelRef) -> int:
        """The number of a model among `models`."""
        return next(number for number, model in enumerate(self.models) if model.ref == ref)

    def model(self, ref: ModelRef) -> LockedModel:
        """The model that a reference means."""
        return self.models[self.index(ref)]

    @property
    def merged(self) -> tuple[LockedModel, ...]:
        """The models that are merged, without the adapters that are added to some of them."""
        return self.models[: len(self.recipe.models)]

    def holder(self, number: int) -> int:
        """The number of the first model with the same files: one that is named with several adapters is read once."""
        return next(first for first, model in enumerate(self.models) if model.located == self.models[number].located)

    @property
    def donor(self) -> LockedModel:
        """The model whose config and side files the result takes."""
        return self.model(self.recipe.donor)


def pins(text: str, path: str) -> dict[str, str]:
    """The commits by model that a lock file names, such as lies beside every result.

    Raises:
        RecipeError: it is no lock file.
    """
    try:
        models = yaml.safe_load(text)["models"]
        return {str(item["model"]): str(item["commit"]) for item in models if item["commit"]}
    except (yaml.YAMLError, LookupError, TypeError, ValueError, RecursionError):
        hint = "take the merger.lock.yaml of a result, or remove it"
        raise RecipeError(Problem(f"{path} is no lock file", hint=hint)) from None


def lock(recipe: Recipe, store: Store, pinned: Mapping[str, str] | None = None) -> LockedRecipe:
    """Find and read every model of the recipe.

    Args:
        recipe: the recipe.
        store: where its models are.
        pinned: the commits to take, by model as the recipe writes it; the others are taken as they are now.

    Raises:
        ModelError: with every model that cannot be read.
    """
    # Two pools: a model waits for its headers, which wait for nobody.
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as models, ThreadPoolExecutor(_REQUESTS_AT_ONCE) as headers:
        fetching = _Fetching(store, headers, pinned or {})
        fetch = fetching.adapter if recipe.merges_adapters else fetching.model
        merged = list(models.map(lambda ref: _attempt(ref, fetch), recipe.models))
        loras = list(models.map(lambda ref: _attempt(ref, fetching.adapter), recipe.adapters))
    found = {model.ref: model for model, _ in loras if model is not None}
    merged = [_attempt_with(model, found) if model is not None else (model, told) for model, told in merged]
    problems = [problem for _, told in (*merged, *loras) for problem in told]
    if problems:
        raise ModelError(problems)
    return LockedRecipe(recipe, tuple(model for model, _ in (*merged, *loras) if model is not None))


_Attempt = tuple[LockedModel | None, tuple[Problem, ...]]


def _attempt(ref: ModelRef, fetch: Callable[[ModelRef], LockedModel]) -> _Attempt:
    """The model, or its problems at the place where the recipe names it."""
    try:
        return fetch(ref), ()
    except ModelError as error:
        return None, tuple(_at(problem, ref) for problem in error.problems)


def _attempt_with(model: LockedModel, loras: Mapping[ModelRef, LockedModel]) -> _Attempt:
    """The model with what its adapter makes of it, if it has one that could be read."""
    lora = loras.get(model.ref.adapter) if model.ref.adapter is not None else None
    if lora is None or lora.lora is None:
        return model, ()
    held = model.checkpoint
    try:
        found = adapters.changes(lora.lora, held.tensors, held.config)
    except ModelError as error:
        return None, tuple(_at(problem, model.ref) for problem in error.problems)
    return replace(model, adapter=lora, changes=found), ()


def _at(problem: Problem, ref: ModelRef) -> Problem:
    return replace(problem, at=problem.at or ref.at, where=problem.where or f"models[{ref}]")


@dataclass(frozen=True)
class _Fetching:
    """Reads what is needed of models and adapters; `pinned` are the commits to take."""

    store: Store
    pool: ThreadPoolExecutor
    pinned: Mapping[str, str]

    def _located(self, ref: ModelRef) -> Located:
        return self.store.locate(ref.path, self.pinned.get(str(ref)) or ref.revision)

    def model(self, ref: ModelRef) -> LockedModel:
        located = self._located(ref)
        if adapters.CONFIG in located.files and "config.json" not in located.files:
            hint = f"add it to its model: org/model+{ref.path}; or list adapters under adapters: to merge them"
            raise ModelError(Problem("is a LoRA adapter, not a model", hint=hint))
        config = _config(located, self.store)
        checkpoint = Checkpoint(_tensors(located, self.store, self.pool), config)
        return LockedModel(ref, located, checkpoint, _card(located, self.store))

    def adapter(self, ref: ModelRef) -> LockedModel:
        located = self._located(ref)
        _check_adapter_files(located)
        config = _json(located, adapters.CONFIG, self.store)
        tensors = {tensor.name: tensor for tensor in _header(located, self.store, adapters.TENSORS)}
        lora = adapters.read_adapter(config, tensors)
        return LockedModel(ref, located, Checkpoint(tensors, config), _card(located, self.store), lora)


def _check_adapter_files(located: Located) -> None:
    if adapters.CONFIG not in located.files:
        hint = "is it a LoRA adapter as PEFT saves it?"
        raise ModelError(Problem(f"has no {adapters.CONFIG}", hint=hint))
    if adapters.TENSORS not in located.files:
        pickled = adapters.PICKLED in located.files
        what = f"has no {adapters.TENSORS}" + (f", only {adapters.PICKLED}" if pickled else "")
        hint = "such files can run code when they are read: load it with PEFT and save it with save_pretrained"
        raise ModelError(Problem(what, hint=hint if pickled else "the adapter is incomplete: download it again"))


def _config(located: Located, store: Store) -> Mapping[str, Any]:
    if "config.json" not in located.files:
        raise ModelError(Problem("has no config.json", hint="is this a model that transformers can load?"))
    config = _json(located, "config.json", store)
    if is_quantised(config):
        what = "is quantised; its stored numbers must not be merged as they are"
        raise ModelError(Problem(what, hint="use the unquantised model: dequantising is not built yet"))
    return config


def _json(located: Located, file: str, store: Store) -> Mapping[str, Any]:
    try:
        content = json.loads(store.fetch(located, file))
    except (ValueError, RecursionError) as error:
        raise ModelError(Problem(f"{file} is no JSON ({error})", hint="download the model again")) from None
    if not isinstance(content, dict):
        raise ModelError(Problem(f"{file} is no JSON object", hint="download the model again"))
    return content


def _tensors(located: Located, store: Store, pool: ThreadPoolExecutor) -> dict[str, TensorInfo]:
    index = store.fetch(located, INDEX).decode("utf-8", "replace") if INDEX in located.files else None
    files = weight_files(located.files, index)
    tensors = gather(pool.map(lambda file: _header(located, store, file), files), index)
    if not tensors:
        raise ModelError(Problem("its safetensors hold no tensor", hint="the model is incomplete: download it again"))
    return tensors


def _header(located: Located, store: Store, file: str) -> tuple[TensorInfo, ...]:
    size = located.files[file].size
    length = header_length(store.fetch(located, file, 0, min(8, size)), file, size)
    return read_header(store.fetch(located, file, 8, 8 + length), file, size)


def _card(located: Located, store: Store) -> Mapping[str, Any]:
    """The front matter of README.md; a card that cannot be read counts as none: it is no reason to refuse a model."""
    info = located.files.get("README.md")
    if info is None or info.size > _CARD_BYTES:
        return {}
    text = store.fetch(located, "README.md").decode("utf-8", "replace").replace("\r\n", "\n")
    parts = text.split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        metadata = yaml.safe_load(parts[1])
    except Exception:  # on strange input the YAML library raises whatever it comes across, not only its own errors
        return {}
    return metadata if isinstance(metadata, dict) else {}
