"""What follows from the jobs: the tensors that no job takes, each with its reason, and the output's config.json.

Nothing a model holds is lost in silence. Not here: the jobs themselves (jobs).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from merger.checkpoints.architecture import Place, is_buffer, is_head
from merger.checkpoints.config import Kind, Layer, untied, with_dtype, with_layers
from merger.errors import Problem, RecipeError
from merger.plan.jobs import Making
from merger.plan.lock import LockedModel, LockedRecipe


@dataclass(frozen=True)
class LeftOut:
    """A tensor of a model that no output tensor is made of; `model` is its number in the locked recipe."""

    model: int
    tensor: str
    why: str


def left_out(locked: LockedRecipe, making: Making) -> Iterator[LeftOut]:
    """Every tensor that is no job's input."""
    used: dict[int, set[str]] = {number: set() for number in range(len(locked.models))}
    for job in making.jobs:
        for entry in job.reads:
            used[entry.model].add(entry.tensor.name)
    for number, model in enumerate(locked.models):
        if locked.holder(number) != number:
            continue
        places = [model.architecture.place(name) for name in used[number]]
        layers = {(place.stack, place.layer) for place in places}
        for name in model.checkpoint.tensors:
            if name not in used[number]:
                why = making.reasons.get(name) or _why(locked, model, name, layers)
                yield LeftOut(number, name, why)


def _why(locked: LockedRecipe, model: LockedModel, name: str, layers: set[tuple[str | None, int | None]]) -> str:
    donor = locked.donor
    place: Place = model.architecture.place(name)
    if locked.recipe.lora is not None:
        return "the adapter holds the fine-tune's in its place"
    if model.lora is not None:
        tied = model.lora.tied and is_head(name)
        return "the head is the embedding" if tied else "nothing is made of the tensor that it changes"
    if name in model.changes and model.changes[name].whole is not None:
        return "its adapter holds the tensor whole"
    if not layers:
        return "the method takes no base model, so this one gives no tensors"
    if place.stack is not None and (place.stack, place.layer) not in layers:
        return "its layer is in no layer_range"
    if is_buffer(name):
        return "a constant, not a trained tensor"
    if model.head is not None and name == model.head.name and model.is_tied:
        return "the head is the embedding, as the model's config says"
    if name in donor.checkpoint.tensors:
        return "the recipe takes this tensor from another model"
    return f"{donor.name}, whose tensors name the output's, has no such tensor"


def config(locked: LockedRecipe, making: Making) -> Mapping[str, Any]:
    """The donor's config.json with the dtype, the layers and the head that the output has.

    Raises:
        RecipeError: no config could describe the layers in this order.
    """
    if making.config is not None:
        return making.config
    donor = locked.donor
    edited: Mapping[str, Any] = donor.checkpoint.config
    stacks = list(donor.architecture.stacks.items())
    if len(stacks) == 1 and list(making.layers) != [(donor, layer) for layer in range(stacks[0][1])]:
        edited = _layered(locked, making, *stacks[0])
    if making.has_head and (donor.is_tied or donor.head is None):
        edited = untied(edited)
    dtype = locked.recipe.dtype
    return with_dtype(edited, dtype) if dtype else edited


def _layered(locked: LockedRecipe, making: Making, stack: str, count: int) -> Mapping[str, Any]:
    """The donor's config with the output's layers."""
    donor = locked.donor
    kinds = [_kind(donor, stack, layer) for layer in range(count)]
    taken = [Layer(model.checkpoint.config, layer, _kind(model, stack, layer)) for model, layer in making.layers]
    try:
        return with_layers(donor.checkpoint.config, kinds, taken)
    except ValueError as error:
        hint = f"{donor.name} would load with other layers than these: take them in the order in which it has them"
        raise RecipeError(Problem(f"{donor.name}: {error}", locked.recipe.slices[0].at, "slices", hint)) from None


def _kind(model: LockedModel, stack: str, layer: int) -> Kind:
    return frozenset(model.architecture.place(tensor.name).role for tensor in model.layer(stack, layer))
