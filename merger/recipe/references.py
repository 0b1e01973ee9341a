"""How recipes name a model: one, or the mean of several checkpoints of one run, wherever a model may stand.

    reference := PATH[@REVISION][+ADAPTER[@REVISION]] | {model: {path, revision}, lora: {path, revision}, MEAN}
    row       := {model: reference, MEAN}; MEAN stands beside model or source_model, or in the reference's own map:
                 revisions: revisions, average: average; of folders average: average, revisions: {last: 8}
    revisions := PATTERN | {match: PATTERN, last: 8, every: 1000}
    average   := SCHEME | {by: SCHEME} | {ema: 0.9} | {weights: [1, 2, 4]}

Not here: whether there is such a model (stores), which checkpoints there are (lock.checkpoints), and making the mean
(planning).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from merger.errors import did_you_mean
from merger.recipe import spans
from merger.recipe.mergekit import OVERRIDE
from merger.recipe.model import Checkpoints, ModelRef
from merger.recipe.spans import Node, Scalar
from merger.recipe.values import Fields, Value
from merger.safety.limits import CHECKPOINTS
from merger.safety.names import parse_name
from merger.safety.numbers import COUNT, Range

# ---- a model -------------------------------------------------------------------------------------------------------


MEAN = ("revisions", "average")
REFERENCE = ("model", "lora", "override_architecture", *MEAN)
PATH = ("path", "revision")

UNREADABLE = ModelRef("?")
"""Stands for a model that could not be read, while the rest of the recipe is looked at."""

_A_MODEL = "a model such as org/name or ./folder"
_PARTS = "write org/name, org/name@revision or ./folder; a path that itself holds @ or + as a map: {model: {path: ...}}"
_MAP = "write {model: {path: org/name, revision: main}}"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


def reference(place: Value) -> ModelRef:
    """The model that stands at `place`, else UNREADABLE."""
    if isinstance(place.node, spans.Mapping):
        fields = place.fields(_A_MODEL, REFERENCE, {"path": _MAP, "revision": _MAP})
        found = _of_map(fields) if fields else UNREADABLE
    else:
        text = place.text(_A_MODEL)
        found = _of_text(place, text) if text is not None else UNREADABLE
    return replace(found, at=place.at)


def read_model(fields: Fields, key: str, hint: str) -> ModelRef:
    """The model behind `key`, which must be there, else UNREADABLE; a mean, if what stands beside it says so."""
    place = fields.need(key, hint)
    return _with_mean(fields, reference(place)) if place else UNREADABLE


def refuse_mean(place: Value, found: ModelRef, what: str, hint: str) -> None:
    """Say so where the model at `place` is a mean, and none is made of `what`."""
    if found.checkpoints is not None:
        place.error(f"no mean is made of {what}", hint, found.at)


def identity(node: Node) -> str | None:
    """What a recipe calls the model at `node`, read without judging it."""
    if isinstance(node, spans.Mapping):
        inner = {entry.key: entry.value for entry in node.entries}
        return identity(inner[key]) if (key := next((k for k in ("model", "path") if k in inner), None)) else None
    return node.value if isinstance(node, Scalar) and isinstance(node.value, str) else None


def _of_text(place: Value, text: str) -> ModelRef:
    model, *adapters = text.split("+")
    if len(adapters) > 1:
        place.error(f"{text!r} holds more than one +", "one adapter a model: org/name+adapter")
        return UNREADABLE
    found = _parse_pinned(place, model)
    return replace(found, adapter=replace(_parse_pinned(place, adapters[0]), at=place.at)) if adapters else found


def _parse_pinned(place: Value, text: str) -> ModelRef:
    """The ``PATH[@REVISION]`` in a part of a reference."""
    path, *revisions = parse_name(text.strip()).split("@")
    if len(revisions) > 1:
        place.error(f"{text!r} holds more than one @", _PARTS)
    if not all([path, *revisions]):
        place.error("a part of the model's name is empty", _PARTS)
    return _check_ref(place, ModelRef(path, revisions[0] if revisions else None))


def _of_map(fields: Fields) -> ModelRef:
    lora, named = fields.get("lora"), fields.get("override_architecture")
    if named:
        OVERRIDE.warn(named, "override_architecture", named.key)
    model = fields.need("model", _MAP)
    found = _path(model) if model else UNREADABLE
    found = replace(found, adapter=replace(_path(lora), at=lora.at)) if lora else found
    return _with_mean(fields, found)


def _path(place: Value) -> ModelRef:
    """One half of a reference in a map: a text, or a map of path and revision."""
    if not isinstance(place.node, spans.Mapping):
        text = place.text(_A_MODEL)
        return _parse_pinned(place, text) if text is not None else UNREADABLE
    fields = place.fields(_A_MODEL, PATH)
    path = fields.need("path", _MAP) if fields else None
    name = path.text(_A_MODEL) if path else None
    pin = fields.text("revision", "a branch, a tag or a commit") if fields else None
    if name is None:
        return UNREADABLE
    if parse_name(name) == name:
        return _check_ref(place, ModelRef(name, pin))
    found = _parse_pinned(place, name)
    return replace(found, revision=pin or found.revision)


def _check_ref(place: Value, found: ModelRef) -> ModelRef:
    if found.path.endswith(_PICKLED):
        hint = "such files can run code when they are read: convert it to safetensors first"
        place.error(f"{found.path} is not in safetensors", hint)
    return found


# ---- the mean of several ---------------------------------------------------------------------------------------------


REVISIONS = ("match", "last", "every")
AVERAGE = ("by", "ema", "weights")
LAST = Range(2, CHECKPOINTS.most)
DECAY = Range(0, 0.999999)
_A_PATTERN = "a pattern such as step-*"
_MATCH = "write revisions: {match: step-*}; of folders the path is the pattern: model: ./run/checkpoint-*"


def _decay(remaining: Callable[[float], float]) -> Callable[[int, int], float]:
    """The weights that stand for a decay of the learning rate, by Tian et al. 2025, https://arxiv.org/abs/2507.17634.

    A mean in which checkpoint j and all after it have the weight w together is where steps times w would have led
    from checkpoint j - 1 on: so each has what the rate loses between it and the next.
    """
    return lambda place, count: remaining(place / count) - remaining((place + 1) / count)


SCHEMES: Mapping[str, Callable[[int, int], float]] = {
    "uniform": lambda place, count: 1.0,
    "linear": lambda place, count: place + 1.0,
    "wsm-cosine": _decay(lambda x: (1 + math.cos(math.pi * x)) / 2),
    "wsm-linear": _decay(lambda x: 1 - x),
    "wsm-1-sqrt": _decay(lambda x: 1 - math.sqrt(x)),
}
"""The weight of the checkpoint at a place, of so many, the oldest at 0."""


def weigh(of: Checkpoints, count: int) -> list[float]:
    """How much each of so many checkpoints goes in, the oldest first; together 1.

    >>> weigh(Checkpoints("step-*", by="linear"), 4)
    [0.1, 0.2, 0.3, 0.4]
    >>> [round(share, 3) for share in weigh(Checkpoints("step-*", ema=0.5), 4)]
    [0.125, 0.125, 0.25, 0.5]
    """
    found = list(of.weights) or [SCHEMES[of.by](place, count) for place in range(count)]
    if of.ema is not None:
        found = [of.ema ** (count - 1 - place) * (1 - of.ema if place else 1) for place in range(count)]
    total = math.fsum(found)
    return [weight / total for weight in found]


def _with_mean(fields: Fields, model: ModelRef) -> ModelRef:
    """The model; or the mean of its checkpoints, if `fields` ask for several."""
    revisions, average = fields.get("revisions"), fields.get("average")
    of_folders = "*" in model.path
    if revisions is None and (average is None or not of_folders):
        if average is not None:
            average.error("average is for several checkpoints of one run", _MATCH, average.key)
        return model
    found = Checkpoints(model.path, True) if of_folders else Checkpoints("")
    if revisions is not None:
        found = _revisions(revisions, found)
        if model.revision is not None:
            what = f"{model} names one revision, and revisions: several"
            revisions.error(what, f"write model: {model.path}", revisions.key)
    found = found if average is None else _average(average, found)
    return replace(model, revision=model.revision if of_folders else found.match, checkpoints=found)


def _revisions(place: Value, found: Checkpoints) -> Checkpoints:
    if not isinstance(place.node, spans.Mapping):
        pattern: Value | None = place
    else:
        keys = place.fields("a map with the key match", REVISIONS)
        if keys is None:
            return found
        found = replace(
            found,
            last=keys.whole("last", LAST, "the last so many, such as last: 8"),
            every=keys.whole("every", COUNT, "steps from one to the next, such as every: 1000"),
        )
        pattern = keys.get("match") if found.of_folders else keys.need("match", _MATCH)
    if pattern is not None and found.of_folders:
        pattern.error("folders have no revisions: their path is the pattern", "take it out", pattern.key)
    return found if pattern is None or found.of_folders else replace(found, match=pattern.text(_A_PATTERN) or "")


def _average(place: Value, found: Checkpoints) -> Checkpoints:
    if not isinstance(place.node, spans.Mapping):
        return replace(found, by=_scheme(place))
    keys = place.fields(f"a map with one of {', '.join(AVERAGE)}", AVERAGE)
    given = [] if keys is None else [(key, value) for key in AVERAGE if (value := keys.get(key)) is not None]
    for key, value in given[1:]:
        value.error(f"{given[0][0]} and {key} exclude each other", "keep one of them", value.key)
    for key, value in given[:1]:
        if key == "by":
            return replace(found, by=_scheme(value))
        if key == "ema":
            return replace(found, ema=value.number("write a number such as 0.9", DECAY))
        return replace(found, weights=_weights(value))
    return found


def _scheme(place: Value) -> str:
    text = place.text(f"one of {', '.join(SCHEMES)}")
    if text is None or text in SCHEMES:
        return text or "uniform"
    place.error(f"there is no way {text!r} to weigh checkpoints", did_you_mean(text, SCHEMES))
    return "uniform"


def _weights(place: Value) -> tuple[float, ...]:
    read = [item.number() for item in place.items("a list of numbers, one for each checkpoint, the oldest first")]
    found = tuple(weight for weight in read if weight is not None)
    if len(found) == len(read) and found and abs(math.fsum(found)) < 1e-8:
        place.error("the weights sum to zero, and are divided by their sum", "write other weights")
        return ()
    return found
