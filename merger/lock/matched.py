"""A model under the names that the result's tensors have, where its own class calls them otherwise.

A stack of layers is matched to one whose first layer has the same roles and shapes, and what is outside of stacks to
what lies in the same place beside it. Not here: what a name's words say (models.lora.counterparts).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from merger.lock.locked import LockedModel
from merger.models.architecture import is_embedding, is_head
from merger.models.checkpoint import TensorInfo
from merger.models.lora.counterparts import Shape, counterparts


def with_names_of(like: LockedModel, model: LockedModel) -> LockedModel:
    """The model with another's names, as far as it is clear which of its tensors are which; else as it is."""
    ours, theirs = like.architecture.stacks, model.architecture.stacks
    if model.lora is not None or like.lora is not None or (ours and ours.keys() <= theirs.keys()):
        return model
    homes = candidates(like, model)
    rivals = [home for alike in homes.values() for home in alike]
    stacks = {stack: alike[0] for stack, alike in homes.items() if len(alike) == 1 and rivals.count(alike[0]) == 1}
    if ours and not stacks:
        return model
    places = {tensor.name: model.architecture.place(tensor.name) for tensor in model.checkpoint.tensors.values()}
    named = {
        name: replace(place, stack=stacks[place.stack]).at_layer(place.layer)
        for name, place in places.items()
        if place.layer is not None and place.stack in stacks
    } | _loose(like, model)
    return model if named.values() & model.checkpoint.tensors.keys() else _renamed(model, named)


def candidates(like: LockedModel, model: LockedModel) -> Mapping[str, Sequence[str]]:
    """For each stack of a model that another lacks those of the other's that it may be."""
    found, homes = _counterparts(like, model), dict[str, Sequence[str]]()
    for stack in model.architecture.stacks:
        names = (name for tensor in model.layer(stack, 0) for name in found.get(tensor.name, ()))
        stacks = dict.fromkeys(like.architecture.place(name).stack for name in names)
        homes[stack] = [home for home in stacks if home and _layer(like, home) == _layer(model, stack)]
    return {stack: alike for stack, alike in homes.items() if alike}


def _loose(like: LockedModel, model: LockedModel) -> dict[str, str]:
    """The other's names for tensors outside of all stacks."""
    found, held = _counterparts(like, model), like.checkpoint.tensors
    alone = [(own, held[found[own.name][0]]) for own in model.layer(None, None) if len(found.get(own.name, ())) == 1]
    named = {own.name: place.name for own, place in alone if _is_same(own, place, like)}
    taken = list(named.values())
    return {own: name for own, name in named.items() if taken.count(name) == 1}


def _counterparts(like: LockedModel, model: LockedModel) -> Mapping[str, Sequence[str]]:
    return counterparts(_own(model, like), _own(like, model))


def _own(model: LockedModel, other: LockedModel) -> dict[str, Shape]:
    """What another has no tensor of the same name for; layers of multi-token prediction lie apart."""
    apart = model.architecture.predicts
    held = ((name, tensor.shape) for name, tensor in model.checkpoint.tensors.items())
    return {name: shape for name, shape in held if name not in other.checkpoint.tensors and not apart(name)}


def _layer(model: LockedModel, stack: str) -> frozenset[tuple[str, Shape]]:
    """The roles and shapes of a stack's first layer."""
    return frozenset((model.architecture.place(tensor.name).role, tensor.shape) for tensor in model.layer(stack, 0))


def _is_same(own: TensorInfo, place: TensorInfo, like: LockedModel) -> bool:
    """Whether a tensor has another's shape, but for its number of tokens, and that is outside of stacks too."""
    rows = is_embedding(place.name) or is_head(place.name)
    loose = like.architecture.place(place.name).stack is None
    return loose and own.shape[rows:] == place.shape[rows:] and len(own.shape) == len(place.shape)


def _renamed(model: LockedModel, named: Mapping[str, str]) -> LockedModel:
    """The model with other names for some of its tensors, and for what is told of them by name."""

    def by_name(of: Mapping[str, Any]) -> dict[str, Any]:
        return {named.get(name, name): each for name, each in of.items()}

    tensors = {name: replace(tensor, name=name) for name, tensor in by_name(model.checkpoint.tensors).items()}
    return replace(
        model,
        checkpoint=replace(model.checkpoint, tensors=tensors),
        quantised=by_name(model.quantised),
        changes=by_name(model.changes),
        brought=tuple(named.get(name, name) for name in model.brought),
        matched={name: own for own, name in named.items()},
    )
