"""What follows from the jobs: the tensors that no job takes, each with its reason, and the output's config.json.

Nothing a model holds is lost in silence. Not here: the jobs themselves (jobs).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merger.errors import Problem, RecipeError, Span
from merger.lock.locked import LockedModel
from merger.models import config as configs
from merger.models.architecture import Place, is_buffer, is_head, parse_place
from merger.models.formats.gguf import PLAIN_FORMS
from merger.models.tokenizer_files import rows_of
from merger.planning.inputs.base import Job
from merger.planning.jobs.common import NOT_ALL_PREDICT, PREDICTION, JobSet
from merger.planning.stage_model import StagedRecipe
from merger.planning.tokens import Tokens
from merger.recipe.model import Checkpoints, Recipe

_OF_ADAPTER = re.compile(r"\.(base_layer|lora_[AB])(?=\.weight$)")
_NOT_THERE = "the result has no such layers"
_SHOWN = 4


@dataclass(frozen=True)
class LeftOut:
    """A tensor of a model that no output tensor is made of; `model` is its number in the locked recipe."""

    model: int
    tensor: str
    why: str


@dataclass(frozen=True)
class _Document:
    """A document of the recipe: which tensors it reads, by their model's number, and why it leaves others out."""

    locked: StagedRecipe
    reasons: Mapping[str, str]
    giver: LockedModel | None
    read: Mapping[int, set[str]]


def find_unused(locked: StagedRecipe, making: JobSet) -> Iterator[LeftOut]:
    """Every stored tensor that is read for no tensor of the output; the first document that has its model says why."""
    read = _read(making.jobs)
    documents = [
        _Document(stage.locked, stage.reasons, stage.giver, _read(stage.jobs.values())) for stage in locked.stages
    ]
    documents.append(_Document(locked, making.reasons, making.prediction, read))
    for number, model in enumerate(locked.parents):
        taken = {*read.get(number, ()), *model.brought}
        rest = [name for name in model.checkpoint.tensors if name not in taken]
        if locked.owner(number) != number:
            continue
        if model.lora is not None:
            yield from (
                LeftOut(number, name, making.reasons.get(name) or _why_of_adapter(model, name)) for name in rest
            )
            continue
        document = next(each for each in documents if model.ref in each.locked.recipe.parents)
        mine = document.read.get(number, set())
        layers = {(place.stack, place.layer) for place in map(model.architecture.place, mine if rest else ())}
        for name in rest:
            made = f"nothing is made of what the stage {document.locked.recipe.name} makes of it"
            why = made if name in mine else document.reasons.get(name) or _why(document, model, name, layers)
            yield LeftOut(number, name, why)
        yield from (LeftOut(number, name, "only a quantised model has a use for it") for name in model.aside)


def _why_of_adapter(model: LockedModel, name: str) -> str:
    lora = model.lora
    assert lora is not None
    tied = "the head is the embedding" if lora.tied and is_head(rows_of(name) or _OF_ADAPTER.sub("", name)) else None
    return lora.aside.get(name) or tied or "nothing is made of the tensor that it changes"


def _read(jobs: Iterable[Job]) -> dict[int, set[str]]:
    """The names of the stored tensors that are read, by their model's number."""
    found: dict[int, set[str]] = {}
    for job in jobs:
        for source in job.sources:
            for stored in source.stored_tensors:
                found.setdefault(stored.model, set()).add(stored.tensor.name)
    return found


def _why(document: _Document, model: LockedModel, name: str, layers: set[tuple[str | None, int | None]]) -> str:
    config_model, recipe = document.locked.config_model, document.locked.recipe
    place: Place = model.architecture.place(name)
    if recipe.lora is not None:
        return "the adapter holds the fine-tune's in its place"
    if name in model.changes and model.changes[name].whole is not None:
        return "its adapter holds the tensor whole"
    if model.ref not in recipe.merged:
        return "the recipe takes only tokens of this model"
    if model.architecture.predicts(name):
        giver = document.giver
        return f"{PREDICTION}: " + (_NOT_THERE if giver is None else f"the result has the layers of {giver.name}")
    if not layers or (model.architecture.stacks and all(stack is None for stack, _ in layers)):
        return "the method takes no base model, so this one gives no tensors"
    if place.stack is not None and (place.stack, place.layer) not in layers:
        ranges = any(source.layer_range for piece in recipe.slices for source in piece.sources)
        return "its layer is in no layer_range" if ranges else f"{config_model.name} has no such layer"
    if is_buffer(name):
        return "a constant, not a trained tensor"
    if model.is_tied_head(name):
        return "the head is the embedding, as the model's config says"
    if name in config_model.checkpoint.tensors:
        return "the recipe takes this tensor from another model"
    return f"{config_model.name}, whose tensors name the output's, has no such tensor"


def notes(locked: StagedRecipe, making: JobSet) -> tuple[str, ...]:
    """What was decided on the way that no line of the recipe says, in sentences."""
    models = [locked.numbered(number) for number in locked.own]
    own = [model.name for model in models if making.has_head and any(is_head(name) for name in model.brought)]
    told = f"head: a tensor of its own, for {', '.join(own)} changes it, and not the embedding that it was"
    means = (_of_mean(stage, stage.mean_of) for stage in locked.recipe.stages if stage.mean_of is not None)
    own_head = [told] if own else []
    beside = *_of_names(locked, making), *_of_prediction(locked, making, models)
    return (*means, *_of_quantised(locked), *own_head, *beside, *_of_statistics(locked))


def _of_statistics(locked: StagedRecipe) -> Iterator[str]:
    """What was measured of which model on what."""
    for model in locked.models:
        if (said := model.statistics) is not None:
            whose, widest = (
                " and ".join(parent.model for parent in said.models),
                max(tensor.shape[-1] for tensor in model.checkpoint.tensors.values()),
            )
            few = said.kind == "gram" and said.tokens < widest
            singular = f", fewer than the {widest:,} inputs of a layer: only alpha below 1 can be" if few else ""
            fed = ", fed by the merge's own layers" if said.merge else ""
            yield f"{said.kind} of {whose}, measured on {said.tokens:,} tokens of {said.data}{fed}{singular}"


def _of_names(locked: StagedRecipe, making: JobSet) -> Iterator[str]:
    """What was matched to what, and which stacks are the config model's alone."""
    config_model = locked.config_model
    for model in locked.parents:
        pairs = dict.fromkeys((_without_number(own), _without_number(name)) for name, own in model.matched.items())
        shown = [f"{own} as {name}" for own, name in pairs][:_SHOWN]
        more = f" and {len(pairs) - _SHOWN} more" if len(pairs) > _SHOWN else ""
        if shown:
            yield f"matched by structure: of {model.name} {', '.join(shown)}{more}"
    unnamed = all(module.name is None for module in locked.recipe.modules)
    kept = [stack for stack in config_model.architecture.stacks if stack not in making.layers]
    if making.layers and unnamed and kept:
        yield f"kept as {config_model.name} has it, for no other model has such layers: {', '.join(kept)}"


def _without_number(name: str) -> str:
    """A tensor's name; of one that is numbered what is before its number."""
    place = parse_place(name)
    return name if place.stack is None else f"{place.stack}.N"


def _of_mean(stage: Recipe, of: Checkpoints) -> str:
    """Which checkpoints it is the mean of, and how much each goes in."""
    sources = stage.slices[0].sources
    names = [(source.model.revision or source.model.path.rstrip("/")).rpartition("/")[2] for source in sources]
    how = "weights" if of.weights else of.by if of.ema is None else f"ema {of.ema:g}"
    shares = [f"{rule.values[0]:.3g}" for source in sources for rule in source.parameters["weight"].rules]
    several = shares if len(shares) <= 2 * _SHOWN else [*shares[:2], "...", *shares[-2:]]
    each = ", ".join(several) if len(set(shares)) > 1 else f"{shares[0]} each"
    return f"{stage.name}: {names[0]} to {names[-1]}, {how} ({each})"


def _of_quantised(locked: StagedRecipe) -> Iterator[str]:
    forms = {
        model.name: dict.fromkeys(held.form for held in model.quantised.values() if held.form not in PLAIN_FORMS)
        for model in locked.models
    }
    if told := ", ".join(f"{name} ({', '.join(of)})" for name, of in forms.items() if of):
        yield f"read back from few bits: {told}; what is made of them carries the error of their quantisation"


def _of_prediction(locked: StagedRecipe, making: JobSet, models: Sequence[LockedModel]) -> tuple[str, ...]:
    giver = making.prediction
    promised = configs.predicted_layers(locked.config_model.checkpoint.config)
    if making.config is not None or not (promised or any(model.prediction for model in models)):
        return ()
    if giver is None:
        theirs = ", ".join(model.name for model in models if model.prediction)
        why = (
            f"those of {theirs} are left out, for {locked.config_model.name} has none" if theirs else "no model has any"
        )
        return (f"{PREDICTION}: {_NOT_THERE} ({why})",)
    if any(job.why == NOT_ALL_PREDICT for job in making.jobs):
        return (f"{PREDICTION}: the layers of {giver.name} are kept as they are, for not every model has such",)
    return (f"{PREDICTION}: {giver.predicted_layers} behind the last layer, as {giver.name} has",)


def config(locked: StagedRecipe, making: JobSet) -> Mapping[str, Any]:
    """The config model's config.json with the dtype, the layers and the head that the output has; empty if it has none.

    Raises:
        RecipeError: no config could describe the layers in this order, or a token that it names.
    """
    if making.config is not None:
        return making.config
    config_model = locked.config_model
    edited: Mapping[str, Any] = config_model.checkpoint.config
    if not edited:
        return edited
    for stack, taken in making.layers.items():
        if list(taken) != [(config_model, layer) for layer in range(config_model.architecture.stacks[stack])]:
            edited = _with_layers(locked, edited, stack, taken)
    giver = making.prediction or config_model
    edited = configs.with_prediction(edited, giver.predicted_layers, giver.checkpoint.config)
    if making.has_head and (config_model.is_tied or config_model.head is None):
        edited = configs.without_tie(edited)
    if making.tokens is not None:
        edited = _with_tokens(locked, making.tokens, edited)
    dtype = locked.recipe.dtype
    return configs.with_dtype(edited, dtype) if dtype else edited


def _with_tokens(locked: StagedRecipe, tokens: Tokens, edited: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config with the result's number of rows, and its own ids for the tokens that it names."""
    sized = configs.with_vocabulary(edited, locked.config_model.token_rows or 0, tokens.rows)
    if tokens.follow is None:
        return sized
    source = locked.numbered(tokens.source)
    found, lost = configs.renumber_tokens(sized, tokens.follow, source.checkpoint.config)
    if lost:
        told = ", ".join(f"{key}: {number}" for key, number in lost)
        what = (
            f"config.json of {locked.config_model.name} names tokens that the tokenizer of {source.name} lacks ({told})"
        )
        block = locked.recipe.tokenizer
        hint = "list these tokens under tokens:, or take another tokenizer"
        raise RecipeError(Problem(what, block.at if block else None, "tokenizer", hint))
    return found


def _with_layers(
    locked: StagedRecipe, edited: Mapping[str, Any], stack: str, taken: Sequence[tuple[LockedModel, int]]
) -> Mapping[str, Any]:
    """The config with the output's layers of a stack."""
    config_model, stacks = locked.config_model, locked.config_model.architecture.stacks
    kinds = [_kind(config_model, stack, layer) for layer in range(stacks[stack])]
    layers = [configs.Layer(model.checkpoint.config, layer, _kind(model, stack, layer)) for model, layer in taken]
    try:
        return configs.with_layers(edited, kinds, layers, configs.section(edited, stack, stacks))
    except ValueError as error:
        hint = (
            f"{config_model.name} would load with other layers than these: take them in the order in which it has them"
        )
        raise RecipeError(Problem(f"{config_model.name}: {error}", *_place(locked, stack), hint)) from None


def _place(locked: StagedRecipe, stack: str) -> tuple[Span | None, str]:
    """Where the recipe says what the stack is made of."""
    named = next((module for module in locked.recipe.modules if module.name == stack), None)
    return (locked.recipe.slices[0].at, "slices") if named is None else (named.at, f"modules.{stack}")


def _kind(model: LockedModel, stack: str, layer: int) -> configs.Kind:
    return frozenset(
        f"{model.architecture.place(tensor.name).role} {tensor.shape}" for tensor in model.layer(stack, layer)
    )
