"""The mixture form of a recipe: experts, their prompts and their router, as mergekit-moe writes it.

    experts: [{source_model, positive_prompts, negative_prompts, noise_scale, residual_scale}, ...]

Not here: the other forms (parse), and which layout the models fit (planning.makers.moe).
"""

from __future__ import annotations

from merger.errors import did_you_mean
from merger.recipe import spans
from merger.recipe.model import Expert, Mixture, ModelRef
from merger.recipe.references import MEAN, UNREADABLE, identity, read_model
from merger.recipe.spans import number
from merger.recipe.values import Fields, Hints, Value
from merger.safety.numbers import COUNT, Range

METHOD = "moe"
"""What a recipe may write as merge_method to say that it is a mixture."""

MIXTURE = ("experts", "shared_experts", "gate_mode", "experts_per_token", "architecture")
TOP = ("name", "merge_method", "base_model", *MIXTURE, "dtype", "out_dtype", "seed", "allow_non_finite",
       "chat_template", "publish")  # fmt: skip
EXPERT = ("source_model", *MEAN, "positive_prompts", "negative_prompts", "noise_scale", "residual_scale")
GATE_MODES = ("hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random")
BY_CHANCE = GATE_MODES[4:]
"""The gate modes that need no prompts."""

ARCHITECTURES = ("Mixtral", "DeepSeek MoE", "Qwen MoE", "Qwen3 MoE", "Granite MoE", "FlexOlmo", "Gemma 4 MoE")

_SIGNS = ("experts", "gate_mode")
_AS_THEY_ARE = "experts are taken as they are: noise_scale and residual_scale are their only numbers"
_DONORS = "leave it out: the result takes the base model's"
TOP_HINTS: Hints = {
    **dict.fromkeys(("models", "slices", "modules"), "list them under experts:, each - source_model: org/name"),
    **dict.fromkeys(("tokenizer", "tokenizer_source"), _DONORS),
    **dict.fromkeys(("parameters", "tensors"), _AS_THEY_ARE),
}
_EXPERT_HINTS: Hints = {
    "model": "write source_model: org/name",
    "prompts": "write positive_prompts:",
    "revision": "write the revision into the model's name: org/name@revision",
    "layer_range": "an expert gives all of its layers",
    "parameters": _AS_THEY_ARE,
    "weight": _AS_THEY_ARE,
}
_A_MODEL = "write source_model: org/name, or source_model: ./folder"
_NOISE = "write a number such as 0.01: the standard deviation of what is added to its MLPs"
_SCALE = "write a number such as 0.1: what this expert's output is multiplied by"
_PROMPTS = "a list of texts such as this expert shall be chosen for"


def is_mixture(top: Value) -> bool:
    """Whether the document is a mixture: by the keys that only a mixture has, or by its merge_method."""
    entries = top.node.entries if isinstance(top.node, spans.Mapping) else ()
    named = any(entry.key == "merge_method" and identity(entry.value) == METHOD for entry in entries)
    return named or any(entry.key in _SIGNS for entry in entries)


def mixture(fields: Fields) -> Mixture:
    """The mixture that a document's keys tell of."""
    method = fields.get("merge_method")
    if method and identity(method.node) != METHOD:
        method.error("a recipe with experts is a mixture", f"write merge_method: {METHOD}, or leave it out")
    mode = fields.get("gate_mode")
    gate_mode = _gate_mode(mode) if mode else GATE_MODES[0]
    listed = fields.need("experts", "list the models that become experts, each - source_model: org/name")
    places = listed.items("a list of experts, each with source_model", _model_of) if listed else []
    experts = tuple(_expert(place, gate_mode, shared=False) for place in places)
    if listed and experts:
        _distinct(listed, places, experts, gate_mode)
    per_token, architecture = fields.get("experts_per_token"), fields.get("architecture")
    return Mixture(
        experts=experts,
        shared_experts=_shared_experts(fields, gate_mode),
        gate_mode=gate_mode,
        experts_per_token=_per_token(per_token, len(experts)) if per_token else None,
        architecture=_architecture(architecture) if architecture else None,
        at=listed.key if listed else None,
        gate_mode_at=mode.at if mode else None,
        architecture_at=architecture.at if architecture else None,
    )


def _model_of(node: spans.Node) -> str | None:
    entries = node.entries if isinstance(node, spans.Mapping) else ()
    return next((identity(entry.value) for entry in entries if entry.key == "source_model"), None)


def _gate_mode(place: Value) -> str:
    text = place.text("a gate mode")
    if text is not None and text not in GATE_MODES:
        place.error(f"there is no gate mode {text!r}", did_you_mean(text, GATE_MODES))
    return text if text in GATE_MODES else GATE_MODES[0]


def _expert(place: Value, gate_mode: str, shared: bool) -> Expert:
    fields = place.fields("a map with the key source_model", EXPERT, _EXPERT_HINTS, "write - source_model: {}")
    if fields is None:
        return Expert(UNREADABLE, at=place.at)
    model = read_model(fields, "source_model", _A_MODEL)
    by_chance = gate_mode in BY_CHANCE
    if not by_chance and not shared:
        fields.need("positive_prompts", f"gate_mode: {gate_mode} needs {_PROMPTS}; gate_mode: random needs none")
    scale = fields.number("residual_scale", _SCALE)
    return Expert(
        source_model=model,
        positive_prompts=_prompts(fields, "positive_prompts", by_chance),
        negative_prompts=_prompts(fields, "negative_prompts", by_chance),
        noise_scale=fields.number("noise_scale", _NOISE, Range(0)) or 0.0,
        residual_scale=1.0 if scale is None else scale,
        at=place.at,
    )


def _prompts(fields: Fields, key: str, by_chance: bool) -> tuple[str, ...]:
    place = fields.get(key)
    if place is None:
        return ()
    read = [item.text("a prompt") for item in place.items(_PROMPTS)]
    if by_chance:
        place.warn(f"{key} has no effect where the router is drawn by chance", "take it out", place.key)
        return ()
    return tuple(text for text in read if text is not None)


def _shared_experts(fields: Fields, gate_mode: str) -> tuple[Expert, ...]:
    place = fields.get("shared_experts")
    places = place.items("a list of one expert, with source_model", _model_of) if place else []
    for more in places[1:]:
        more.error("a mixture has one shared expert at most", "take it out, or move it to experts:")
    return tuple(_expert(item, gate_mode, shared=True) for item in places)


def _per_token(place: Value, experts: int) -> int | None:
    hint = "write how many experts each token goes through, such as 2"
    found = place.whole(COUNT, hint)
    if found is not None and experts and found > experts:
        place.error(f"each token shall go through {number(found)} experts, and there are {experts}", hint)
    return found


def _architecture(place: Value) -> str | None:
    """The beginning of a layout's name, as mergekit-moe takes it, case aside."""
    text = place.text("the name of a layout")
    if text is not None and not matching(text):
        place.error(f"there is no layout {text!r}", did_you_mean(text, ARCHITECTURES))
        return None
    return text


def matching(text: str) -> tuple[str, ...]:
    """The layouts whose name begins so.

    >>> matching("qwen")
    ('Qwen MoE', 'Qwen3 MoE')
    """
    return tuple(name for name in ARCHITECTURES if name.lower().startswith(text.strip().lower()))


def _distinct(listed: Value, places: list[Value], experts: tuple[Expert, ...], gate_mode: str) -> None:
    """Whether a router can tell the experts apart, and whether there is anything to tell."""
    models = {expert.source_model for expert in experts}
    quiet = all(expert.noise_scale == 0 for expert in experts)
    if len(experts) > 1 and len(models) == 1 and quiet and UNREADABLE not in models:
        what = f"all experts are {experts[0].source_model}: the mixture is that model until it is trained"
        listed.warn(what, "train the result, or give the experts a noise_scale", listed.key)
    if gate_mode in BY_CHANCE:
        return
    first: dict[tuple[tuple[str, ...], tuple[str, ...]], ModelRef] = {}
    for place, expert in zip(places, experts, strict=True):
        asked = (expert.positive_prompts, expert.negative_prompts)
        if asked in first and expert.positive_prompts:
            what = f"{expert.source_model} has the prompts of {first[asked]}: the router cannot tell them apart"
            place.warn(what, "give each expert prompts of its own")
        first.setdefault(asked, expert.source_model)
    if len(experts) > 1 and len(first) == 1 and experts[0].positive_prompts:
        what = "all experts have the same prompts, so the router cannot tell them apart"
        listed.error(what, "give each expert prompts of its own, or write gate_mode: random", listed.key)
