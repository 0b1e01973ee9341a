"""A recipe's models as they were found: names, shapes, places and configs, pinned to a commit; no tensor byte.

Not here: finding them (lock), and what is made of them (jobs).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from merger.lock.statistics import Statistics
from merger.models.architecture import Architecture, is_embedding, is_head, never_by_token
from merger.models.checkpoint import FLOATS, Checkpoint, TensorInfo
from merger.models.config import is_tied, predicted_layers
from merger.models.formats.packed import PackedTensor
from merger.models.formats.quantised import Scaled
from merger.models.lora.adapter import Adapter
from merger.models.lora.changes import Change
from merger.models.side_files import tokenizer_files
from merger.recipe.model import ModelRef, Recipe
from merger.stores.ports import Located


@dataclass(frozen=True)
class LockedModel:
    """A model of the recipe as it was found.

    Args:
        ref: what the recipe says.
        located: where it is, at which commit, with which files.
        checkpoint: its tensors' names, shapes, dtypes and places, and its config.json.
        card: the metadata of its own model card, empty where there is none.
        texts: of its tokenizer's files those that the plan needs, by name.
        quantised: the tensors that are stored as numbers and scales, or packed, by name.
        aside: the names of stored tensors that only a quantised model has a use for.
        lora: what its files hold, of a LoRA adapter; its config is adapter_config.json.
        adapter: the LoRA adapter that is added to it.
        changes: what that makes of its tensors, by their names.
        brought: the names of tensors that are in the adapter alone.
        licence_file: which licence the file beside it is, where its card names none.
        matched: its own names for tensors that are called as the result's are.
        pipeline: of the files of its pipeline what each of them holds: two with a name in common are equal.
        statistics: what its lock says, of statistics, whose tensors are its own.
        embeds: the class of sentence-transformers, or of PyLate, that loads it with its pipeline.
    """

    ref: ModelRef
    located: Located
    checkpoint: Checkpoint = field(repr=False)
    card: Mapping[str, Any] = field(default_factory=dict, repr=False)
    texts: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    quantised: Mapping[str, Scaled | PackedTensor] = field(default_factory=dict, repr=False)
    aside: tuple[str, ...] = field(default=(), repr=False)
    lora: Adapter | None = field(default=None, repr=False)
    adapter: LockedModel | None = field(default=None, repr=False)
    changes: Mapping[str, Change] = field(default_factory=dict, repr=False)
    brought: tuple[str, ...] = ()
    licence_file: str | None = None
    matched: Mapping[str, str] = field(default_factory=dict, repr=False)
    pipeline: Mapping[str, frozenset[str]] = field(default_factory=dict, repr=False)
    embeds: str | None = None
    statistics: Statistics | None = field(default=None, repr=False)

    @cached_property
    def architecture(self) -> Architecture:
        """What the tensors' names tell."""
        return Architecture(self.checkpoint.tensors, self.checkpoint.config)

    @cached_property
    def by_layer(self) -> Mapping[tuple[str | None, int | None], list[TensorInfo]]:
        """The tensors of each layer of each stack, under (None, None) those outside; none of multi-token prediction."""
        found: dict[tuple[str | None, int | None], list[TensorInfo]] = {}
        for tensor in self.checkpoint.tensors.values():
            if not self.architecture.predicts(tensor.name):
                place = self.architecture.place(tensor.name)
                found.setdefault((place.stack, place.layer), []).append(tensor)
        return found

    @cached_property
    def prediction(self) -> tuple[TensorInfo, ...]:
        """The tensors of its layers of multi-token prediction."""
        return tuple(tensor for tensor in self.checkpoint.tensors.values() if self.architecture.predicts(tensor.name))

    def layer(self, stack: str | None, layer: int | None) -> list[TensorInfo]:
        """The tensors of a layer, or with (None, None) those outside all stacks."""
        return self.by_layer.get((stack, layer), [])

    @property
    def predicted_layers(self) -> int:
        """How many they are: as many as its config says, unless that says there are none."""
        names = [tensor.name for tensor in self.prediction]
        return (predicted_layers(self.checkpoint.config) or self.architecture.predicted(names)) if names else 0

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

    @cached_property
    def token_rows(self) -> int | None:
        """How many rows its embeddings have, one a token; None where it has none, or of different numbers."""
        found = {each.shape[0] for each in self.layer(None, None) if is_embedding(each.name) and len(each.shape) == 2}
        return found.pop() if len(found) == 1 else None

    def by_token(self, tensor: TensorInfo) -> bool:
        """Whether a tensor has a row for each token: an embedding, a head, or what else goes with them."""
        loose = self.architecture.place(tensor.name).stack is None and tensor.dtype in FLOATS
        if not loose or tensor.shape[:1] != (self.token_rows,):
            return False
        named = is_embedding(tensor.name) or is_head(tensor.name)
        return named or (not self._as_wide_as_long and not never_by_token(tensor.name))

    def across_tokens(self, tensor: TensorInfo) -> bool:
        """Whether a tensor is one row with an entry for each token, as BART's final_logits_bias is."""
        loose = self.architecture.place(tensor.name).stack is None
        return loose and tensor.shape == (1, self.token_rows) and not self._as_wide_as_long

    @property
    def _as_wide_as_long(self) -> bool:
        """Whether rows are as long as there are many, so that a shape does not tell what has one for each token."""
        return self.token_rows in {one.shape[1] for one in (self.embedding, self.head) if one is not None}

    def differs_in(self, name: str, other: LockedModel) -> bool:
        """Whether a file of its pipeline is another one there, or only one of them has it."""
        mine, theirs = self.pipeline.get(name), other.pipeline.get(name)
        if mine is None or theirs is None:
            return mine is not theirs
        return mine != theirs and not mine & theirs

    @property
    def tokenizer_model(self) -> LockedModel:
        """In whose files its tokenizer lies: in its adapter's, if that has one and rows for its tokens."""
        trained = (name for name, change in self.changes.items() if change.whole or change.tokens)
        if self.adapter is None or not any(is_embedding(name) for name in trained):
            return self
        return self.adapter if tokenizer_files(self.adapter.located.files) else self

    @property
    def has_experts(self) -> bool:
        """Whether it is a mixture of experts."""
        return any(".experts." in name for name in self.checkpoint.tensors)

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embedding: its config says so, and the embedding is what its files hold."""
        return is_tied(self.checkpoint.config) and any(is_embedding(tensor.name) for tensor in self.layer(None, None))

    def is_tied_head(self, name: str) -> bool:
        """Whether a tensor is the head of a model whose head is the embedding, so that nothing reads it."""
        return self.head is not None and name == self.head.name and self.is_tied

    @property
    def name(self) -> str:
        """The name for readers: repo id, or the folder's last part; with that of its adapter."""
        return self.located.name if self.adapter is None else f"{self.located.name}+{self.adapter.name}"

    @property
    def licence(self) -> str | None:
        """The licence by the name that its card gives it, else as the file LICENSE beside it is known."""
        return stated_licence(self.card) or self.licence_file


@dataclass(frozen=True)
class LockedRecipe:
    """A recipe and its models, in the order of ``recipe.models``; then their adapters, and what was measured of them.

    Args:
        recipe: the recipe.
        models: its models and adapters.
        templates: its own templates for the card, by name, once they are read (templates).
    """

    recipe: Recipe
    models: tuple[LockedModel, ...]
    templates: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def merged(self) -> tuple[LockedModel, ...]:
        """The models that are merged, without the adapters that are added to some of them."""
        return tuple(model for model in self.parents if model.lora is None or self.recipe.merges_adapters)

    @property
    def parents(self) -> tuple[LockedModel, ...]:
        """The models and adapters, without what was measured of them, which is behind them."""
        return tuple(model for model in self.models if model.statistics is None)


def stated_licence(card: Mapping[str, Any]) -> str | None:
    """The name that a card gives to the licence; of several, all. None: it gives none."""
    stated = card.get("license")
    names = [name for name in (stated if isinstance(stated, list) else [stated]) if isinstance(name, str)]
    if [name.strip().lower() for name in names] == ["other"] and isinstance(card.get("license_name"), str):
        names = [card["license_name"]]
    return " AND ".join(" ".join(name.split()) for name in names) or None


def display_name(model: LockedModel) -> str:
    """A model's name for readers: as the recipe writes it on the Hub, of a folder its last part, of a stage its own."""
    if model.adapter is not None:
        alone = replace(model, ref=replace(model.ref, adapter=None), adapter=None)
        return f"{display_name(alone)}+{display_name(model.adapter)}"
    return str(model.ref) if model.located.commit else model.name
