"""The language's part about checkpoints of one run, of which a row of `models:` takes the mean.

    row       := {model: org/run, revisions: revisions, average: average}
               | {model: ./run/checkpoint-*, average: average, revisions: {last: 8}}
    revisions := PATTERN | {match: PATTERN, last: 8, every: 1000}
    average   := SCHEME | {by: SCHEME} | {ema: 0.9} | {weights: [1, 2, 4]}

Not here: which checkpoints there are (lock.checkpoints), and making the mean (planning).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from merger.errors import did_you_mean
from merger.recipe.model import Checkpoints, ModelRef
from merger.recipe.spans import Mapping as Map
from merger.recipe.values import Fields, Value
from merger.safety.limits import CHECKPOINTS
from merger.safety.numbers import COUNT, Range

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


def read_checkpoints(fields: Fields, model: ModelRef) -> Checkpoints | None:
    """Which checkpoints a row asks for, and how their mean is made; None: it names one model."""
    revisions, average = fields.get("revisions"), fields.get("average")
    of_folders = "*" in model.path
    if revisions is None and (average is None or not of_folders):
        if average is not None:
            average.error("average is for several checkpoints of one run", _MATCH, average.key)
        return None
    found = Checkpoints(model.path, True) if of_folders else Checkpoints("")
    if revisions is not None:
        found = _revisions(revisions, found)
        if model.revision is not None:
            what = f"{model} names one revision, and revisions: several"
            revisions.error(what, f"write model: {model.path}", revisions.key)
    return found if average is None else _average(average, found)


def _revisions(place: Value, found: Checkpoints) -> Checkpoints:
    if not isinstance(place.node, Map):
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
    if not isinstance(place.node, Map):
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
