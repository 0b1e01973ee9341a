"""The part of the language whose result is a LoRA adapter: `adapters:` with `lora:`, and `extract_lora:`.

    adapters: [{model: org/lora, parameters: ...}, ...]     merged into an adapter by the recipe's merge_method
    lora: {rank, alpha, core}
    extract_lora: {model, base_model, rank, ...}             what a fine-tune changed, as an adapter of its base

Not here: how models and parameters are written (values), and what the adapters hold (plan).
"""

from __future__ import annotations

from dataclasses import replace

from merger.recipe.checks import Choice
from merger.recipe.model import Lora, Module, Slice, Source
from merger.recipe.references import read_model, refuse_mean
from merger.recipe.values import Fields, Value
from merger.safety import numbers
from merger.safety.expressions import compiles
from merger.safety.numbers import quoted_short

LORA = ("rank", "alpha", "core")
EXTRACT = (
    "model", "base_model", "rank", "alpha", "include", "exclude", "embeddings", "distribute_scale", "skip_rest",
)  # fmt: skip
_RANK_HINT = "the rank is how many directions each matrix of the adapter has, such as 16"
_RANK = ("rank", numbers.RANK, _RANK_HINT)
_ALPHA = ("alpha", "write a number above 0, such as 16, or leave it out: it is then the rank", numbers.ALPHA)
_METHOD = "task_arithmetic"
"""What an extraction is: the fine-tune's delta, whole."""


def lora(fields: Fields) -> Lora | None:
    """What the recipe says of the adapter that `adapters:` makes; None where its result is a model."""
    place, adapters = fields.get("lora"), fields.places.get("adapters")
    if adapters is None:
        if place is not None:
            place.error("lora is for recipes with adapters:", "list the adapters to merge under adapters:", place.key)
        return None
    found = place.fields("a map with the key rank", LORA) if place is not None else None
    if found is None:
        return Lora()
    if "rank" not in found.places and (alpha := found.get("alpha")) is not None:
        alpha.error("alpha goes with a rank", _RANK_HINT, alpha.key)
    return Lora(rank=found.whole(*_RANK), alpha=found.number(*_ALPHA), core=found.flag("core"))


def adapter_method(found: Choice) -> Choice:
    """The merge method as it is used on adapters: their deltas are what it is handed, and there is no base model."""
    method = found.method
    if method is None:
        return found
    if method.base in ("first", "included"):
        hint = "take linear, ties, dare_ties, knots or another method that merges task vectors or weighs models"
        found.place.error(f"{method.name} merges models along a path from a base model, and adapters have none", hint)
    if method.statistics is not None:
        hint = "merge models with their adapters: models: with - model: org/base+org/adapter"
        found.place.error(f"{method.name} asks for what was measured of models, and adapters have no statistics", hint)
    return replace(found, method=replace(method, base="unused", statistics=None))


def read_extraction(place: Value) -> tuple[Lora | None, Module]:
    """What `extract_lora:` asks for, and the fine-tune and its base as a recipe has them."""
    fields = place.fields("a map with the keys model, base_model and rank", EXTRACT)
    if fields is None:
        return None, Module(None, ())
    one = read_model(fields, "model", "write model: org/fine-tune")
    base = read_model(fields, "base_model", "write base_model: the model that it was made from")
    for named in (one, base):
        refuse_mean(place, named, "what an adapter is taken from", "make the mean first, and name its folder")
    fields.need("rank", _RANK_HINT)
    found = Lora(
        rank=fields.whole(*_RANK),
        alpha=fields.number(*_ALPHA),
        extracted=True,
        include=_regex(fields, "include"),
        exclude=_regex(fields, "exclude"),
        embeddings=fields.flag("embeddings"),
        distribute_scale=fields.flag("distribute_scale"),
        skip_rest=fields.flag("skip_rest"),
    )
    sources = (Source(one, at=one.at), Source(base, added=True, at=base.at))
    return found, Module(None, (Slice(sources, _METHOD, base, at=place.key),), at=place.key)


def _regex(fields: Fields, key: str) -> str | None:
    place = fields.get(key)
    text = place.text("a regular expression") if place else None
    if place and text and (wrong := compiles(text)):
        place.error(f"{quoted_short(text)} is no regular expression ({wrong})", "write for example layers\\.[0-3]\\.")
    return text
