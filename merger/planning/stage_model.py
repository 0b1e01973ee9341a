"""What a recipe's stages make, as models beside those that were found: one table, in which each has its number.

Not here: planning a stage (makers.stages), and the models that were found (lock.locked).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from merger.lock.lock import GENERATION
from merger.lock.locked import LockedModel, LockedRecipe
from merger.models import chat, vocabulary
from merger.models.checkpoint import TensorInfo
from merger.models.formats.packed import PackedTensor
from merger.models.formats.quantised import Scaled
from merger.models.vocabulary import Json
from merger.planning.inputs.base import Input, Job, StageTensor, Stored
from merger.planning.inputs.derived import Dequantised, Packed
from merger.planning.inputs.low_rank import Added, with_product
from merger.planning.inputs.rows import with_rows
from merger.recipe.model import ModelRef


@dataclass(frozen=True)
class Texts:
    """The small files of the result.

    Args:
        taken: for each file that is taken over the number of the model that has it.
        added: what tokenizer.json must say of each added token; None: what it says.
        template: the chat template; None: the one that is there.
        generation: generation_config.json; None: the one that is there.
    """

    taken: Mapping[str, int]
    added: tuple[Json, ...] | None = field(default=None, repr=False)
    template: str | None = None
    generation: str | None = None

    def encode(self) -> dict[str, Any]:
        """What is written into them, as plain data for a plan's hash."""
        said = {"added": self.added, "template": self.template, "generation": self.generation}
        return {key: value for key, value in said.items() if value is not None}

    @property
    def is_edited(self) -> bool:
        """Whether anything is written into the files that are taken over."""
        return any(text is not None for text in (self.added, self.template, self.generation))

    @property
    def changing(self) -> tuple[str, ...]:
        """The names of those files that have to be read whole, since something is written into them."""
        tokens = vocabulary.EXTENDED if self.added is not None else ()
        return tuple(dict.fromkeys([*tokens, *(chat.FILES if self.template is not None else ())]))

    def edit(self, files: Mapping[str, bytes]) -> dict[str, bytes]:
        """The files `changing` that were taken over, with all that is to be written into them."""
        made = dict(files)
        if self.added is not None:
            made |= vocabulary.rewrite_files(made, self.added)
        if self.template is not None:
            made |= chat.with_template(made, self.template)
        if self.generation is not None:
            made[GENERATION] = self.generation.encode()
        return made


@dataclass(frozen=True)
class StageModel(LockedModel):
    """What a stage of the recipe makes, as a model of the documents after it: its tensors are in no file.

    `located` is where the files come from that are taken over: those of its own config model.

    Args:
        locked: the stage's document.
        jobs: how each of its tensors is made, by name.
        reasons: why tensors of its models are left out, where that was decided on the way.
        giver: the model whose layers of multi-token prediction it has; None: no model.
        small: which small files it would have.
        seed: for methods that draw random numbers.
    """

    locked: StagedRecipe = field(kw_only=True, repr=False)
    jobs: Mapping[str, Job] = field(kw_only=True, repr=False)
    reasons: Mapping[str, str] = field(kw_only=True, repr=False)
    giver: LockedModel | None = field(kw_only=True, repr=False)
    small: Texts = field(kw_only=True, repr=False)
    seed: int = field(kw_only=True)

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.ref.path


@dataclass(frozen=True)
class StagedRecipe(LockedRecipe):
    """A recipe, its models and, counted on after them, what its documents before the last make."""

    stages: tuple[StageModel, ...] = ()

    def index(self, ref: ModelRef) -> int:
        """The number of a model, or, counted on, of a stage."""
        return next(number for number, model in enumerate(self.all) if model.ref == ref)

    @cached_property
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

    def source(self, number: int, tensor: TensorInfo) -> Input:
        """Where the entries of a tensor of the model or stage of that number come from, as its adapter changes them."""
        model = self.all[number]
        if model.adapter is None or (change := model.changes.get(tensor.name)) is None:
            return self._published(number, tensor)
        adapter = self.index(model.adapter.ref)
        source = self._published(number, tensor) if change.whole is None else Stored(adapter, change.whole)
        if change.tokens is not None:
            source = with_rows(source, Stored(adapter, change.tokens.rows), change.tokens.numbers)
        if change.low_rank is not None:
            source = with_product(source, adapter, change.low_rank, change.transposed)
        return source if change.added is None else Added(source, Stored(adapter, change.added), change.scale)

    def _published(self, number: int, tensor: TensorInfo) -> Input:
        model, owner = self.all[number], self._owners[number]
        if model.quantised and (held := model.quantised.get(tensor.name)) is not None:
            return _dequantise(owner, held, tensor)
        if not isinstance(model, StageModel):
            return Stored(owner, tensor)
        job = model.jobs[tensor.name]
        passed = job.passed
        return passed if isinstance(passed, Stored | StageTensor) else StageTensor(number, tensor.name, model.seed, job)

    def owner(self, number: int) -> int:
        """The number of the first model with the same files: one that is named with several adapters is read once."""
        return self._owners[number]

    @cached_property
    def _owners(self) -> tuple[int, ...]:
        places = [model.located for model in self.models]
        return (*map(places.index, places), *range(len(places), len(self.all)))

    @property
    def config_model(self) -> LockedModel:
        """The model or stage whose config the result takes."""
        return self.model(self.recipe.config_model)

    @property
    def config_owner(self) -> LockedModel:
        """The model in whose files that config lies: the config model, or that of the stage which is it."""
        config_model = self.config_model
        return config_model.locked.config_owner if isinstance(config_model, StageModel) else config_model


def _dequantise(owner: int, held: Scaled | PackedTensor, tensor: TensorInfo) -> Input:
    """A tensor that is stored in few bits, whose codes go by its name."""
    if isinstance(held, Scaled):
        return Dequantised(
            Stored(owner, replace(held.numbers, name=tensor.name)), Stored(owner, held.scales), held.block, tensor.dtype
        )
    (role, codes), *others = held.parts.items()
    parts = {role: replace(codes, name=tensor.name), **dict(others)}
    stored = tuple((role, Stored(owner, part)) for role, part in parts.items())
    return Packed(held.form, stored, tensor.shape, tuple(held.settings.items()), tensor.dtype)
