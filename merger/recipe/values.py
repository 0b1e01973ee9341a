"""What stands behind the keys: how recipes name a model, and how they give a parameter its value.

    reference := PATH[@REVISION][+ADAPTER[@REVISION]] | {model: {path, revision}, lora: {path, revision}}
    setting   := number | gradient | [rule, ...] | rule
    gradient  := [number, ...]
    rule      := {value: number | gradient, filter: text}

Not here: whether there is such a model (stores) and whether a method knows the parameter (checks).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from merger.recipe import spans
from merger.recipe.mergekit import OVERRIDE
from merger.recipe.model import ModelRef
from merger.recipe.places import Fields, Place
from merger.recipe.settings import Parameters, Rule, Setting
from merger.recipe.spans import Node, Scalar
from merger.safety.names import named

REFERENCE = ("model", "lora", "override_architecture")
PATH = ("path", "revision")
RULE = ("value", "filter")

UNREADABLE = ModelRef("?")
"""Stands for a model that could not be read, while the rest of the recipe is looked at."""

_A_MODEL = "a model such as org/name or ./folder"
_PARTS = "write org/name, org/name@revision or ./folder; a path that itself holds @ or + as a map: {model: {path: ...}}"
_MAP = "write {model: {path: org/name, revision: main}}"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


def reference(place: Place) -> ModelRef:
    """The model that stands at `place`, else UNREADABLE."""
    if isinstance(place.node, spans.Mapping):
        fields = place.fields(_A_MODEL, REFERENCE, {"path": _MAP, "revision": _MAP})
        found = _of_map(fields) if fields else UNREADABLE
    else:
        text = place.text(_A_MODEL)
        found = _of_text(place, text) if text is not None else UNREADABLE
    return replace(found, at=place.at)


def identity(node: Node) -> str | None:
    """What a recipe calls the model at `node`, read without judging it."""
    if isinstance(node, spans.Mapping):
        inner = {entry.key: entry.value for entry in node.entries}
        return identity(inner[key]) if (key := next((k for k in ("model", "path") if k in inner), None)) else None
    return node.value if isinstance(node, Scalar) and isinstance(node.value, str) else None


def _of_text(place: Place, text: str) -> ModelRef:
    model, *adapters = text.split("+")
    if len(adapters) > 1:
        place.error(f"{text!r} holds more than one +", "one adapter a model: org/name+adapter")
        return UNREADABLE
    found = _pinned(place, model)
    return replace(found, adapter=replace(_pinned(place, adapters[0]), at=place.at)) if adapters else found


def _pinned(place: Place, text: str) -> ModelRef:
    """The ``PATH[@REVISION]`` in a part of a reference."""
    path, *revisions = named(text.strip()).split("@")
    if len(revisions) > 1:
        place.error(f"{text!r} holds more than one @", _PARTS)
    if not all([path, *revisions]):
        place.error("a part of the model's name is empty", _PARTS)
    return _checked(place, ModelRef(path, revisions[0] if revisions else None))


def _of_map(fields: Fields) -> ModelRef:
    lora, named = fields.get("lora"), fields.get("override_architecture")
    if named:
        OVERRIDE.warn(named, "override_architecture", named.key)
    model = fields.need("model", _MAP)
    found = _path(model) if model else UNREADABLE
    return replace(found, adapter=replace(_path(lora), at=lora.at)) if lora else found


def _path(place: Place) -> ModelRef:
    """One half of a reference in a map: a text, or a map of path and revision."""
    if not isinstance(place.node, spans.Mapping):
        text = place.text(_A_MODEL)
        return _pinned(place, text) if text is not None else UNREADABLE
    fields = place.fields(_A_MODEL, PATH)
    path = fields.need("path", _MAP) if fields else None
    name = path.text(_A_MODEL) if path else None
    revision = fields.get("revision") if fields else None
    pin = revision.text("a branch, a tag or a commit") if revision else None
    if name is None:
        return UNREADABLE
    if named(name) == name:
        return _checked(place, ModelRef(name, pin))
    found = _pinned(place, name)
    return replace(found, revision=pin or found.revision)


def _checked(place: Place, found: ModelRef) -> ModelRef:
    if found.path.endswith(_PICKLED):
        hint = "such files can run code when they are read: convert it to safetensors first"
        place.error(f"{found.path} is not in safetensors", hint)
    return found


@dataclass(frozen=True)
class Number:
    """One number of a setting, and where it stands."""

    value: float
    place: Place


@dataclass(frozen=True)
class Written:
    """One parameter in a block.

    Args:
        place: its value.
        numbers: every number in that value, gradients and rules alike.
        even: whether it has no gradient whose numbers differ.
    """

    place: Place
    numbers: tuple[Number, ...]
    even: bool


@dataclass(frozen=True)
class Block:
    """A `parameters:` block: its settings, and where everything in them stands; no place where there is no block."""

    settings: Parameters
    written: Mapping[str, Written]
    place: Place | None


def parameters(fields: Fields) -> Block:
    """The block under the key ``parameters``; an empty one where there is none."""
    place = fields.get("parameters")
    entries = place.entries("a map from parameters to their values") if place else None
    for value in (entries or {}).values():
        if _says_nothing(value):
            value.warn("an empty list gives no value, so that of the level above holds", "take it out", value.key)
    read = {name: _setting(value) for name, value in (entries or {}).items() if not _says_nothing(value)}
    settings = {name: setting for name, (setting, _) in read.items()}
    return Block(settings, {name: written for name, (_, written) in read.items()}, place)


def _says_nothing(place: Place) -> bool:
    return isinstance(place.node, spans.Sequence) and not place.node.items


_GRADIENT = "a number, or a list of numbers: the values from the slice's first layer to its last"
_RULES = "write - value: 0.5 with or without filter: some_text for each item"


def _setting(place: Place) -> tuple[Setting, Written]:
    ruled = [(_rule(rule), rule) for rule in _rules(place)]
    pairs = ruled or [((_gradient(place), None), place)]
    rules = [Rule(tuple(n.value for n in numbers), of, at.at) for (numbers, of), at in pairs]
    _warn_unreached(rules, [at for _, at in pairs])
    even = all(len(set(rule.values)) <= 1 for rule in rules)
    return Setting(tuple(rules)), Written(place, tuple(n for (numbers, _), _ in pairs for n in numbers), even)


def _rules(place: Place) -> list[Place]:
    """The places of the {value, filter} maps, if that is what the setting is made of."""
    if isinstance(place.node, spans.Mapping):
        return [place]
    if not isinstance(place.node, spans.Sequence):
        return []
    if not any(isinstance(item, spans.Mapping) for item in place.node.items):
        return []
    return place.items("a list of numbers or of {value, filter} maps", filter_of)


def filter_of(node: Node) -> str | None:
    """The text behind the key ``filter``, read without judging it."""
    entries = node.entries if isinstance(node, spans.Mapping) else ()
    found = next((entry.value for entry in entries if entry.key == "filter"), None)
    return found.value if isinstance(found, Scalar) and isinstance(found.value, str) else None


def _rule(place: Place) -> tuple[tuple[Number, ...], str | None]:
    if not isinstance(place.node, spans.Mapping):
        place.expected("a {value, filter} map like the other items of the list", _RULES)
        return (), None
    fields = place.fields("a {value, filter} map", RULE)
    value, wanted = (fields.need("value", _RULES), fields.get("filter")) if fields else (None, None)
    if wanted is None or wanted.holds(""):
        return (_gradient(value) if value else ()), None
    return (_gradient(value) if value else ()), wanted.text("a part of a tensor's name")


def _gradient(place: Place) -> tuple[Number, ...]:
    if isinstance(place.node, Scalar):
        return _numbers([place], f"write {_GRADIENT}")
    return _numbers(place.items(_GRADIENT), "write a number such as 0.5")


def _numbers(places: list[Place], hint: str) -> tuple[Number, ...]:
    read = [(place.number(hint), place) for place in places]
    return tuple(Number(value, place) for value, place in read if value is not None)


def _warn_unreached(rules: list[Rule], places: list[Place]) -> None:
    ends = next((index for index, rule in enumerate(rules) if rule.matches("")), len(rules))
    for place in places[ends + 1 :]:
        hint = "put the rule without a filter last"
        place.warn("never reached: a rule above it already speaks about every tensor", hint)
