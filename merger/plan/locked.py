"""A recipe's models as they were found: names, shapes, places and configs, pinned to a commit; no tensor byte.

Not here: finding them (lock), and what is made of them (jobs).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from merger.checkpoints.adapter import Adapter, Change
from merger.checkpoints.architecture import Architecture, is_embedding, is_head, never_by_token
from merger.checkpoints.checkpoint import FLOATS, Checkpoint, TensorInfo
from merger.checkpoints.config import is_tied, predicted_layers
from merger.checkpoints.quantised import Scaled
from merger.checkpoints.sidefiles import tokenizer_files
from merger.plan.products import Added, LowRank
from merger.plan.rows import with_rows
from merger.plan.sources import Dequantised, Made, Source, Stored
from merger.recipe.model import ModelRef, Recipe
from merger.stores.ports import Located

if TYPE_CHECKING:
    from merger.plan.jobs import Job, Making
    from merger.plan.texts import Texts


@dataclass(frozen=True)
class LockedModel:
    """A model of the recipe as it was found.

    Args:
        ref: what the recipe says.
        located: where it is, at which commit, with which files.
        checkpoint: its tensors' names, shapes, dtypes and places, and its config.json.
        card: the metadata of its own model card, empty where there is none.
        texts: of its tokenizer's files those that the plan needs, by name.
        scaled: the tensors that are stored as numbers and scales, by name.
        aside: the names of stored tensors that only a quantised model has a use for.
        lora: what its files hold, of a LoRA adapter; its config is adapter_config.json.
        adapter: the LoRA adapter that is added to it.
        changes: what that makes of its tensors, by their names.
        brought: the names of tensors that are in the adapter alone.
        licence_file: which licence the file beside it is, where its card names none.
        pipeline: of the files of its pipeline what each of them holds: two with a name in common are equal.
    """

    ref: ModelRef
    located: Located
    checkpoint: Checkpoint = field(repr=False)
    card: Mapping[str, Any] = field(default_factory=dict, repr=False)
    texts: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    scaled: Mapping[str, Scaled] = field(default_factory=dict, repr=False)
    aside: tuple[str, ...] = field(default=(), repr=False)
    lora: Adapter | None = field(default=None, repr=False)
    adapter: LockedModel | None = field(default=None, repr=False)
    changes: Mapping[str, Change] = field(default_factory=dict, repr=False)
    brought: tuple[str, ...] = ()
    licence_file: str | None = None
    pipeline: Mapping[str, frozenset[str]] = field(default_factory=dict, repr=False)

    @cached_property
    def architecture(self) -> Architecture:
        """What the tensors' names tell."""
        return Architecture(self.checkpoint.tensors, self.checkpoint.config)

    @cached_property
    def by_layer(self) -> Mapping[tuple[str | None, int | None], list[TensorInfo]]:
        """The tensors of each layer of each stack, under (None, None) those outside; in the order of their places.

        Those of multi-token prediction are not among them.
        """
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
        loose = self.layer(None, None)
        found = {tensor.shape[0] for tensor in loose if is_embedding(tensor.name) and len(tensor.shape) == 2}
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

    @property
    def speaker(self) -> LockedModel:
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
class StageModel(LockedModel):
    """What a stage of the recipe makes, as a model of the documents after it: its tensors are in no file.

    `located` is where the files come from that are taken over: those of its own donor.

    Args:
        locked: the stage's document.
        making: how its tensors are made.
        small: which small files it would have.
        seed: for methods that draw random numbers.
    """

    locked: LockedRecipe = field(kw_only=True, repr=False)
    making: Making = field(kw_only=True, repr=False)
    small: Texts = field(kw_only=True, repr=False)
    seed: int = field(kw_only=True)

    @cached_property
    def jobs(self) -> Mapping[str, Job]:
        """How each tensor is made."""
        return {job.name: job for job in self.making.jobs}

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.ref.path


@dataclass(frozen=True)
class LockedRecipe:
    """A recipe and its models, in the order of ``recipe.models``; then the adapters that are added to them.

    After them its stages count, once it is known what they make.

    Args:
        recipe: the recipe.
        models: its models and adapters.
        stages: what its documents make before the last.
        templates: its own templates for the card, by name, once they are read (templates).
    """

    recipe: Recipe
    models: tuple[LockedModel, ...]
    stages: tuple[StageModel, ...] = ()
    templates: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def index(self, ref: ModelRef) -> int:
        """The number of a model, or, counted on, of a stage."""
        return next(number for number, model in enumerate(self.all) if model.ref == ref)

    @property
    def all(self) -> tuple[LockedModel, ...]:
        """The models, and the stages after them."""
        return (*self.models, *self.stages)

    def numbered(self, number: int) -> LockedModel:
        """The model or stage of that number."""
        return self.all[number]

    def model(self, ref: ModelRef) -> LockedModel:
        """The model or stage that a reference means."""
        return self.numbered(self.index(ref))

    @property
    def own(self) -> tuple[int, ...]:
        """The numbers of the models and stages of this document."""
        return tuple(self.index(ref) for ref in self.recipe.parents)

    def source(self, number: int, tensor: TensorInfo) -> Source:
        """Where the entries of a tensor of the model or stage of that number come from, as its adapter changes them."""
        model = self.numbered(number)
        if model.adapter is None or (change := model.changes.get(tensor.name)) is None:
            return self._stored(number, tensor)
        adapter = self.index(model.adapter.ref)
        source = self._stored(number, tensor) if change.whole is None else Stored(adapter, change.whole)
        if change.tokens is not None:
            source = with_rows(source, Stored(adapter, change.tokens.rows), change.tokens.numbers)
        if (low := change.low_rank) is not None:
            lengths = None if low.magnitude is None else Stored(adapter, low.magnitude)
            source = LowRank(source, Stored(adapter, low.a), Stored(adapter, low.b), low.scale, change.turned, lengths)
        return source if change.added is None else Added(source, Stored(adapter, change.added), change.scale)

    def _stored(self, number: int, tensor: TensorInfo) -> Source:
        """The same without an adapter."""
        model, owner = self.numbered(number), self.owner(number)
        if (scaled := model.scaled.get(tensor.name)) is not None:
            numbers, scales = Stored(owner, scaled.numbers), Stored(owner, scaled.scales)
            return Dequantised(numbers, scales, scaled.block, tensor.dtype)
        if not isinstance(model, StageModel):
            return Stored(owner, tensor)
        job = model.jobs[tensor.name]
        passed = job.passed
        return passed if isinstance(passed, Stored | Made) else Made(number, tensor.name, model.seed, job)

    @property
    def merged(self) -> tuple[LockedModel, ...]:
        """The models that are merged, without the adapters that are added to some of them."""
        return tuple(model for model in self.models if model.lora is None or self.recipe.merges_adapters)

    def owner(self, number: int) -> int:
        """The number of the first model with the same files: one that is named with several adapters is read once."""
        here = self.numbered(number)
        if isinstance(here, StageModel):
            return number
        return next(first for first, model in enumerate(self.models) if model.located == here.located)

    @property
    def donor(self) -> LockedModel:
        """The model or stage whose config the result takes."""
        return self.model(self.recipe.donor)

    @property
    def holder(self) -> LockedModel:
        """The model in whose files that config lies: the donor, or the donor of the stage that is the donor."""
        donor = self.donor
        return donor.locked.holder if isinstance(donor, StageModel) else donor


def stated_licence(card: Mapping[str, Any]) -> str | None:
    """The name that a card gives to the licence; of several, all. None: it gives none."""
    stated = card.get("license")
    names = [name for name in (stated if isinstance(stated, list) else [stated]) if isinstance(name, str)]
    if [name.strip().lower() for name in names] == ["other"] and isinstance(card.get("license_name"), str):
        names = [card["license_name"]]
    return " AND ".join(" ".join(name.split()) for name in names) or None
