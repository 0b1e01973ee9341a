"""Whether the methods, models and parameters of a recipe fit each other, as far as the recipe alone can tell.

Not here: how they are written (parse, values), and what the models hold (plan).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat
from typing import TYPE_CHECKING

from merger.errors import did_you_mean
from merger.recipe.mergekit import BASE_ASIDE, LAST_SLICE, TWICE
from merger.recipe.model import ModelRef, Parameters, Slice, Source
from merger.recipe.references import UNREADABLE
from merger.recipe.spans import number
from merger.recipe.values import Number, SettingsBlock, Value, WrittenParameter, nearest

if TYPE_CHECKING:
    from merger.methods.registry import Method, Param

# fmt: off
FIELD_METHODS = (
    "linear", "slerp", "nuslerp", "multislerp", "karcher", "task_arithmetic", "ties", "dare_ties", "dare_linear",
    "breadcrumbs", "breadcrumbs_ties", "della", "della_linear", "sce", "ram", "ramplus_tl", "model_stock", "nearswap",
    "arcee_fusion", "passthrough",
)
"""The methods that recipes of the field name: those of them that the table lacks are not built yet."""

FIELD_PARAMETERS = (
    "weight", "density", "gamma", "epsilon", "select_topk", "t", "scale", "normalize", "lambda", "rescale", "int8_mask",
    "max_iter", "tol", "eps", "r", "alpha", "filter_wise", "normalize_weights", "nuslerp_row_wise", "nuslerp_flatten",
)
"""Their parameters: where a method has no use for one, that is a warning, as published recipes are full of it."""
# fmt: on

_NO_EFFECT_ANYWHERE = "int8_mask"
"""Only ever chose how much memory another tool took, so it is passed over in silence."""

OUTDATED = {
    "embed_slerp": "take it out",
    "input_model_parameters": "write them into parameters: of each model",
}
"""Keys that only old releases of mergekit knew: published recipes still have them."""

_FEW = 9
"""As many methods as are named in one sentence."""

_ELSEWHERE = {
    "random_seed": "write seed: at the top of the recipe",
    **dict.fromkeys(
        ("seed", "dtype", "out_dtype", "base_model", "merge_method", "tokenizer_source", "chat_template"),
        "it belongs at the top of the recipe, not into parameters:",
    ),
}
"""Keys that have their place elsewhere, found among parameters."""


@dataclass(frozen=True)
class Choice:
    """A merge method as a recipe names it.

    Args:
        name: the name.
        place: where it stands.
        method: what the table holds under that name; None where it holds nothing, and nothing can be said.
    """

    name: str
    place: Value
    method: Method | None


@dataclass(frozen=True)
class Found:
    """A slice, and where its parts stand.

    Args:
        piece: the slice.
        choice: the merge method in force.
        listed: the list of its sources.
        places: each of them; a base model that was added has none.
        levels: the settings of the levels above the sources, the nearest first.
    """

    piece: Slice
    choice: Choice
    listed: Value
    places: list[Value]
    levels: tuple[Parameters, ...]


def choices(table: Mapping[str, Method]) -> str:
    """What to do where a method is wanted: all are named where they are few."""
    if len(table) <= _FEW:
        return f"choose one of {', '.join(table)}"
    return f"choose one, such as linear, slerp, task_arithmetic or ties; merger methods lists all {len(table)}"


def choose_method(place: Value, table: Mapping[str, Method]) -> Choice:
    """The merge method named at `place`, with a problem if it cannot be used.

    Of one that is unknown nothing more is said: whether the rest of the recipe fits it, only a guess could tell.
    """
    name = place.text("the name of a merge method")
    method = None if name is None else table.get(name)
    built = choices(table)
    if name in FIELD_METHODS and method is None:
        place.error(f"{name} is not built yet", built)
    elif name is not None and method is None:
        near = nearest(name, [*table, *FIELD_METHODS], cutoff=0.6)
        place.error(f"there is no merge method {name!r}", f"did you mean {near!r}?" if near else built)
    return Choice(UNREADABLE.path if name is None else name, place, method)


def fit(found: Found) -> None:
    """Whether the sources of a slice are equally long, and they and the settings what its method needs."""
    _equally_long(found)
    _warn_of_twice(found)
    method = found.choice.method
    if method is None:
        return
    if method.needs_base and found.piece.base_model is None:
        hint = "add base_model: the model the others were made from, or the one to start from"
        found.choice.place.error(f"{method.name} needs a base_model", hint)
    elif UNREADABLE not in (found.piece.base_model, *(source.model for source in found.piece.sources)):
        if (single := alone(found.piece, method)) is not None:
            what = f"nothing is merged: {single.model} is the only model, and comes out as it is"
            found.listed.warn(what, "list more models, if some are missing", found.listed.key)
            return
        _base_among_sources(found, method)
        _count(found, method)
        _measured(found, method)
        _warn_of_base(found, method)
        _warn_of_base_aside(found, method)
        handed = [source.model for source in found.piece.sources if _is_counted(source, found.piece, method)]
        if all(replace(model, adapter=None) == found.piece.base_model for model in handed):
            few_directions(method, found.levels, found.listed)
    for param in method.params:
        if param.required:
            _require(found, method, param)


def alone(piece: Slice, method: Method) -> Source | None:
    """The one source that a method which merges any number gives back, having nothing to merge it with; else None.

    That is the base model by itself, or a single model where two are the least.
    """
    if method.models[1] is not None:
        return None
    counted = [source for source in piece.sources if _is_counted(source, piece, method)]
    if method.subtracts_base and not counted:
        return next((source for source in piece.sources if not source.added), None)
    lone = method.base in ("optional", "included") and len(counted) == 1 < method.models[0]
    return counted[0] if lone else None


def _base_among_sources(found: Found, method: Method) -> None:
    base = found.piece.base_model
    if method.takes_base and base is not None and base not in [source.model for source in found.piece.sources]:
        what = f"{method.name} needs the base model among the sources of each slice; {base} is not here"
        hint = f"add {base} with a layer_range, or name one of the sources as base_model"
        found.listed.error(what, hint, found.listed.key)


def _warn_of_base(found: Found, method: Method) -> None:
    """A base model that is subtracted has no weight, density or the like of its own."""
    for source, place in zip(found.piece.sources, found.places, strict=False):
        if method.subtracts_base and source.model == found.piece.base_model and source.parameters:
            names = ", ".join(source.parameters)
            place.warn(f"{source.model} is the base model; here {names} has no effect", "take its parameters: out")


def _measured(found: Found, method: Method) -> None:
    """Whether each model has the statistics that the method asks for, and none that nothing asks for."""
    for source, place in zip(found.piece.sources, chain(found.places, repeat(found.listed)), strict=False):
        asked = method.asks(base=not _is_counted(source, found.piece, method))
        if asked and source.statistics is None:
            whose, where = ("the base model", "in its row, here") if method.of_base else ("each model", "beside it")
            what = f"{method.name} asks for what was measured of {whose}, and {source.model} has no statistics"
            made = f"merger measure makes them, --kind {method.statistics}"
            place.error(what, f"write statistics: org/name {where}; {made}", place.key)
        elif source.statistics is not None and source.statistics.adapter is not None:
            place.error(f"{source.statistics} names an adapter, and statistics have none", "take +... out")
        elif not asked and source.statistics is not None:
            what = f"{method.name} asks for no statistics of {source.model}; here they have no effect"
            place.warn(what, "take statistics: out")


def _warn_of_twice(found: Found) -> None:
    seen: set[ModelRef] = set()
    for source, place in zip(found.piece.sources, found.places, strict=False):
        if source.model in seen - {UNREADABLE}:
            TWICE.warn(place, str(source.model))
        seen.add(source.model)


def _warn_of_base_aside(found: Found, method: Method) -> None:
    """A base model that the method has no use for, which a weight of the levels above would reach in mergekit."""
    names = [param.name for param in method.params if param.per_model]
    if method.takes_base or not any(_mentions(level, name) for level in found.levels for name in names):
        return
    for source in found.piece.sources:
        if source.added:
            BASE_ASIDE.warn(replace(found.listed, where="base_model"), str(source.model), source.at)


def few_directions(method: Method, levels: Sequence[Parameters], adapters: Value) -> None:
    """Warn where a method would spread the few directions of adapters over all that a matrix has."""
    if method.spreads and not any(_mentions(level, "lambda") for level in levels):
        what = f"{method.name} spreads the few directions of adapters over all of a matrix: at lambda 1 little is left"
        hint = "write a lambda near the matrices' smaller side, divided by the sum of the adapters' ranks"
        adapters.warn(what, hint, adapters.key)


def last_slice(slices: Sequence[Slice], place: Value) -> None:
    """More sources in the last slice than in the first."""
    if slices and len(slices[-1].sources) > len(slices[0].sources):
        LAST_SLICE.warn(place, "the sources of the last slice", slices[-1].at)


def _count(found: Found, method: Method) -> None:
    least, most = method.models
    counted = [source for source in found.piece.sources if _is_counted(source, found.piece, method)]
    if least <= len(counted) and (most is None or len(counted) <= most):
        return
    besides = " besides the base model" if method.subtracts_base else ""
    names = ", ".join(str(source.model) for source in counted)
    found_text = f"{len(counted)}: {names}" if counted else "none"
    what = f"{method.name} merges {_amount(least, most)}{besides}, found {found_text}"
    found.listed.error(what, _count_hint(found.piece, method, len(counted) < least), found.listed.key)


def _is_counted(source: Source, piece: Slice, method: Method) -> bool:
    """Whether a source is one of those that `Method.models` counts."""
    if method.subtracts_base:
        return source.model != piece.base_model
    return method.takes_base or not source.added


def _amount(least: int, most: int | None) -> str:
    if most is None:
        return f"{least} or more models"
    amount = str(least) if least == most else f"{least} to {most}"
    return f"exactly {amount} model{'' if most == 1 else 's'}"


def _count_hint(piece: Slice, method: Method, too_few: bool) -> str:
    if too_few:
        return "list more models"
    if method.base == "first" and any(source.added for source in piece.sources):
        return f"the base model {piece.base_model} counts too: take one away, or name one of the others as base_model"
    return "list fewer models, or take a method that merges more of them: `merger methods`"


def _require(found: Found, method: Method, param: Param) -> None:
    if any(_mentions(level, param.name) for level in found.levels):
        return
    needing = list(zip(found.piece.sources, found.places, strict=False))
    if method.subtracts_base:
        needing = [pair for pair in needing if pair[0].model != found.piece.base_model]
    lacking = [pair for pair in needing if not (param.per_model and _mentions(pair[0].parameters, param.name))]
    what = f"{method.name} needs {param.name}"
    if not param.per_model or (needing and lacking == needing):
        found.choice.place.error(what, f"{_where_to_write(param)}; {_describe(param)}")
        return
    for source, place in lacking:
        place.error(f"{what}, and {source.model} has none", f"{_where_to_write(param)}; {_describe(param)}")


def _where_to_write(param: Param) -> str:
    place = "parameters: of each model, or at the top for all" if param.per_model else "parameters: at the top"
    return f"write {param.name} into {place}"


def _mentions(level: Parameters, name: str) -> bool:
    """Whether a level gives `name`; a misspelling of it counts, as that is a problem of its own."""
    return name in level or any(nearest(key, [name]) for key in level if key not in FIELD_PARAMETERS)


def _describe(param: Param) -> str:
    return f"{param.name}: {param.description}"


def check_block(
    found: SettingsBlock, methods: list[Method | None], table: Mapping[str, Method], per_model: bool = False
) -> None:
    """Whether the methods in force have a use for the parameters of a block, and for their values.

    Args:
        methods: those in force anywhere below it; None for each that is unknown or not built.
        per_model: whether the block belongs to one model.
    """
    known = list({method.name: method for method in methods if method is not None}.values())
    for name, written in found.written.items():
        params = [param for method in known if (param := method.param(name)) is not None]
        if params and per_model and not any(param.per_model for param in params):
            what = f"{name} is one number for the whole merge; here it has no effect"
            written.place.warn(what, "move it to parameters: at the top", written.place.key)
        elif params:
            _values(written, params)
        elif found.place is not None and known and None not in methods:
            _warn_unused(name, found.place, written.place, known, table)


def warn_outdated(name: str, place: Value) -> None:
    """Say of one of the keys in OUTDATED that it does nothing."""
    place.warn(f"{name} has no effect: only old releases of mergekit knew it", OUTDATED[name], place.key)


def _warn_unused(name: str, block: Value, place: Value, methods: list[Method], table: Mapping[str, Method]) -> None:
    if name == _NO_EFFECT_ANYWHERE:
        return
    if name in OUTDATED:
        warn_outdated(name, place)
        return
    names = ", ".join(method.name for method in methods)
    if name in FIELD_PARAMETERS or any(method.param(name) for method in table.values()):
        place.warn(f"{name} has no meaning for {names}; it has no effect", "take it out", place.key)
        return
    own = list(dict.fromkeys(param.name for method in methods for param in method.params))
    hint = _ELSEWHERE.get(name) or did_you_mean(name, own) or f"{names} has no parameters"
    block.error(f"unknown key {name!r}", hint, place.key)


def _values(written: WrittenParameter, params: list[Param]) -> None:
    for param in params:
        for one in written.numbers:
            _value(one, param)
        if param.kind != "float" and not written.even:
            kind = "true or false" if param.kind == "bool" else "a whole number"
            hint = f"give tensors different values by filters; {_describe(param)}"
            written.place.error(f"{param.name} is {kind}; a gradient has values in between", hint)


def _value(one: Number, param: Param) -> None:
    if param.kind == "bool" and one.value not in (0, 1):
        one.place.error(f"expected true or false, found the number {number(one.value)}", _describe(param))
    elif not param.range.holds(one.value):
        one.place.outside(one.value, param.range, _describe(param))
    elif param.kind == "int" and not one.value.is_integer():
        one.place.error(f"expected a whole number, found the number {number(one.value)}", _describe(param))


def _equally_long(found: Found) -> None:
    """Whether the sources of a slice are runs of as many layers each."""
    ranged = [(source, source.layer_range) for source in found.piece.sources if source.layer_range is not None]
    lengths = [end - start for _, (start, end) in ranged]
    odd = next((index for index, length in enumerate(lengths) if length != lengths[0]), None)
    if odd is None:
        return
    described = ", ".join(
        f"{source.model} has {length} (layers {layers[0]}-{layers[1] - 1})"
        for (source, layers), length in zip(ranged, lengths, strict=True)
    )
    what = f"the sources of a slice must be equally long: {described}"
    found.listed.error(what, "change a layer_range; [start, end] counts end - start layers", ranged[odd][0].range_at)
