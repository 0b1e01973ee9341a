"""The recipe language: the keys of each level and what stands behind them. Text -> Recipe, or every problem at once.

It reads like a grammar: one table of keys and one function for each level. Not here: YAML itself (spans), how a model
is named and a parameter given (values), and whether methods, models and parameters fit (checks).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from merger.errors import Problem, RecipeError, Span
from merger.recipe import checks, spans
from merger.recipe.blocks import lora as loras
from merger.recipe.blocks import mixture
from merger.recipe.blocks.evaluate import evaluate
from merger.recipe.blocks.publish import PUBLISH, publish_block
from merger.recipe.blocks.search import find_search, without_block
from merger.recipe.blocks.stages import join_stages
from merger.recipe.blocks.statistics import statistics
from merger.recipe.blocks.tokenizer import chat_template, tokenizer
from merger.recipe.checks import Choice, Found
from merger.recipe.mergekit import FLOAT64
from merger.recipe.model import ModelRef, Module, Parameters, Recipe, Rule, Setting, Slice, Source, Taken
from merger.recipe.references import MEAN, UNREADABLE, identity, read_model, reference, refuse_mean
from merger.recipe.searched import Searched, Values, fill_holes
from merger.recipe.spans import Documents, Node, number
from merger.recipe.values import Fields, Hints, Notes, SettingsBlock, Value, filter_of, nearest, read_parameters
from merger.safety import numbers

if TYPE_CHECKING:
    from merger.methods.registry import Method

PASSTHROUGH = "passthrough"
FORMS = ("models", "slices", "modules", "adapters")
TOKENS = ("tokenizer", "tokenizer_source", "chat_template")
TOP = (
    "name", "merge_method", *FORMS, "tensors", "base_model", "parameters", "dtype", "out_dtype", "seed",
    "allow_non_finite", *TOKENS, "evaluate", "publish", "lora", "extract_lora", "search",
)  # fmt: skip
EXTRACTING = ("name", "extract_lora", "dtype", "out_dtype", "seed", "allow_non_finite", "publish")
MODEL = ("model", *MEAN, "statistics", "parameters")
SLICE = ("sources", "merge_method", "base_model", "parameters", "residual_weight")
SOURCE = ("model", *MEAN, "layer_range", "statistics", "parameters")
MODULE = ("slices", "models", "parameters")
TENSORS = ("filter", "model")

DTYPES = ("float32", "float16", "bfloat16")


_MEANT_DTYPES = {
    "float64": "float32",
    "double": "float32",
    "fp64": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
    "float8_e4m3fn": "publish: {fp8: block}, or channel",
    "fp8": "publish: {fp8: block}, or channel",
}
_A_MODEL = "write model: org/name, or model: ./folder"
_RANGE = "a pair [start, end]"
_RANGE_HINT = "write [start, end]: the layers from start up to, but not including, end, counted from 0"
_UNDER_PARAMETERS: Hints = {name: f"move {name} into parameters: here" for name in checks.FIELD_PARAMETERS}
_PINNED: Hints = {"revision": "write the revision into the model's name: org/name@revision"}
_TOP_HINTS = _UNDER_PARAMETERS | {
    **{key: f"move {key} into publish:" for key in PUBLISH},
    "pad_to_multiple_of": "write it into the tokenizer's block: tokenizer: {source: base, pad_to_multiple_of: 64}",
    "random_seed": "write seed: in its place",
    "tasks": "tasks that the result is tried on belong into evaluate: {tasks: [...]}",
}
_SEARCH = "genome"
"""The key by which a file of mergekit-evolve is known."""
_MODEL_HINTS = _UNDER_PARAMETERS | _PINNED | {"layer_range": "layer ranges belong to the sources of slices:"}
_SOURCE_HINTS = _UNDER_PARAMETERS | _PINNED


def parse(text: str, path: str, table: Mapping[str, Method], drawn: Values | None = None) -> Recipe:
    """The recipe that `text` holds.

    Args:
        path: the file's name as the user gave it; positions in errors begin with it.
        drawn: what its holes are filled with, if something is searched in it. None: what they start with; problems are
            then those of all that they may be filled with.

    Raises:
        RecipeError: with every problem of the file.
    """
    documents, notes = spans.read_nodes(text, path), Notes()
    search = find_search(documents.roots, notes)
    if search is None or notes.errors:
        recipe = None if notes.errors else _documents(documents, documents.roots, path, text, table, notes)
    else:
        recipe = _searched(search, documents, path, text, table, notes, drawn)
    problems = [*documents.problems, *notes.errors.values()]
    if recipe is None or problems:
        raise RecipeError(problems)
    return replace(recipe, warnings=tuple(warning for _, warning in sorted(notes.warnings.items())))


def _searched(
    search: Searched,
    documents: Documents,
    path: str,
    text: str,
    table: Mapping[str, Method],
    notes: Notes,
    drawn: Values | None,
) -> Recipe:
    """The recipe that its holes make when they are filled; of several fillings each has its errors told."""
    roots = [without_block(root) for root in documents.roots]
    recipes, warnings = list[Recipe](), list[Mapping[tuple[Span, str], Problem]]()
    for values in search.probes() if drawn is None else (drawn,):
        nodes, found = search.nodes(values), Notes(errors=notes.errors)
        recipes.append(_documents(documents, [fill_holes(root, nodes) for root in roots], path, text, table, found))
        warnings.append(found.warnings)
    notes.warnings |= {key: each for key, each in warnings[0].items() if all(key in others for others in warnings)}
    for what, is_there in (("an adapter", recipes[0].lora), ("a mixture of experts", recipes[0].mixture)):
        if is_there is not None and search.at is not None:
            problem = Problem(f"{what} is not searched", search.at, hint="search what it is made of")
            notes.errors[(search.at, problem.what)] = problem
    return replace(recipes[0], search=search if drawn is None else None)


def _documents(
    documents: Documents, roots: Sequence[Node], path: str, text: str, table: Mapping[str, Method], notes: Notes
) -> Recipe:
    """The recipe of a file's documents; problems go to the notes."""
    tops = [Value(_without_anchors(root, documents.shared), "", notes) for root in roots]
    if not tops:
        hint = "name a merge_method and the models it merges; `merger methods` lists the methods"
        raise RecipeError([*documents.problems, Problem("the recipe is empty", Span(path, 1, 1), hint=hint)])
    recipes = [_recipe(top, table, path, text) for top in tops]
    for top, of in zip(tops, recipes, strict=True):
        if of.lora is not None and len(tops) > 1:
            top.error("an adapter is made by a recipe of one document", "put it into a file of its own")
    return recipes[0] if len(recipes) == 1 else join_stages(recipes, notes)


def _without_anchors(root: Node, shared: frozenset[Span]) -> Node:
    """The document without keys of no meaning that hold what aliases stand for; one that is misspelt stays.

    A key is no misspelling of one that is there too.
    """
    if not isinstance(root, spans.Mapping):
        return root
    there, known = {entry.key for entry in root.entries}, {*TOP, *mixture.TOP}
    kept = [
        entry
        for entry in root.entries
        if entry.key in known or nearest(entry.key, known - there) or not spans.holds_shared(entry, shared)
    ]
    return replace(root, entries=tuple(kept))


@dataclass(frozen=True)
class _Scope:
    """What holds at a level unless a level below says otherwise; `levels`: the settings so far, the nearest first."""

    method: Choice | None
    base_model: ModelRef | None
    levels: tuple[Parameters, ...]

    def below(self, fields: Fields, block: SettingsBlock, table: Mapping[str, Method]) -> _Scope:
        """The scope inside a level that may name its own method and base model."""
        method, base_model = fields.get("merge_method"), fields.get("base_model")
        return _Scope(
            checks.choose_method(method, table) if method else self.method,
            reference(base_model) if base_model else self.base_model,
            (block.settings, *self.levels),
        )


def _recipe(top: Value, table: Mapping[str, Method], path: str, text: str) -> Recipe:
    if mixture.is_mixture(top):
        return _mixture(top, path, text)
    fields = _fields(top)
    if fields is None:
        return Recipe(path, text, (), at=top.at)
    if "extract_lora" in fields.places:
        return _extraction(top, path, text, fields)
    block, levels = read_parameters(fields), _Levels(table)
    scope = _Scope(None, None, ()).below(fields, block, table)
    modules = levels.modules(fields, scope)
    pieces = [piece for module in modules for piece in module.slices]
    if scope.method is None and not (pieces and all(piece.method for piece in pieces)):
        top.error("missing merge_method", checks.choices(table))
    levels.block(block, pieces)
    place = fields.get("tensors")
    items = place.items("a list of tensors, each - filter: self_attn with a model", filter_of) if place else []
    made = _of(
        top,
        path,
        text,
        fields,
        modules=tuple(replace(of, slices=tuple(map(levels.merging, of.slices))) for of in modules),
        base_model=scope.base_model,
        tensors=tuple(rule for item in items if (rule := _parse_taken(item)) is not None),
        parameters=block.settings,
        tokenizer=tokenizer(fields),
    )
    method = scope.method.method if scope.method else None
    if method is not None and made.lora is not None and not made.lora.core:
        checks.few_directions(method, scope.levels, fields.places["adapters"])
    return made


def _fields(top: Value) -> Fields | None:
    """The document's keys; None where they make no recipe."""
    found = top.node if isinstance(top.node, spans.Mapping) else spans.Mapping((), top.at)
    given = {entry.key: entry for entry in found.entries}
    if _SEARCH in given:
        hint = "run the recipe that it found: best_config.yaml in its folder"
        top.error("this is a search of mergekit-evolve, and no recipe", hint, given[_SEARCH].at)
        return None
    for key in checks.OUTDATED.keys() & given.keys():
        checks.warn_outdated(key, replace(top, node=given[key].value, where=key, key_at=given.pop(key).at))
    kept = replace(top, node=replace(found, entries=tuple(given.values()))) if given else top
    return kept.fields("a map with the key merge_method", TOP, _TOP_HINTS)


def _mixture(top: Value, path: str, text: str) -> Recipe:
    fields = top.fields("a map with the key experts", mixture.TOP, mixture.TOP_HINTS)
    if fields is None:
        return Recipe(path, text, (), at=top.at)
    base_model = read_model(
        fields, "base_model", "name the model that gives everything but the experts: base_model: org/name"
    )
    return _of(top, path, text, fields, modules=(), base_model=base_model, mixture=mixture.mixture(fields))


def _of(top: Value, path: str, text: str, fields: Fields, **read: Any) -> Recipe:
    """The recipe, with what every form says in the same keys."""
    name, allow = fields.get("name"), fields.get("allow_non_finite")
    dtype, out_dtype = _dtype(fields, "dtype"), _dtype(fields, "out_dtype")
    return Recipe(
        path=path,
        text=text,
        **read,
        name=fields.text("name", "a name"),
        dtype=out_dtype or dtype,
        seed=fields.whole("seed", numbers.SEED, "any whole number will do, such as seed: 42") or 0,
        allow_non_finite=fields.flag("allow_non_finite"),
        chat_template=chat_template(fields),
        evaluate=evaluate(fields),
        publish=publish_block(fields),
        lora=loras.lora(fields),
        at=top.at,
        name_at=name.at if name else None,
        allow_at=allow.key if allow else None,
    )


def _extraction(top: Value, path: str, text: str, fields: Fields) -> Recipe:
    """A recipe that takes from a fine-tune what it changed: it merges nothing."""
    for key in [key for key in fields.places if key not in EXTRACTING]:
        fields.place.error(f"{key} has no meaning beside extract_lora", "take it out", fields.places[key].key)
    found, module = loras.read_extraction(fields.places["extract_lora"])
    base = module.slices[0].base_model if module.slices else None
    return replace(_of(top, path, text, fields, modules=(module,), base_model=base), lora=found)


@dataclass(frozen=True)
class _Levels:
    """What a recipe is made of: modules, slices, sources, and the parameters of each."""

    table: Mapping[str, Method]

    def modules(self, fields: Fields, scope: _Scope) -> tuple[Module, ...]:
        return tuple(module for key in _form(fields, FORMS) for module in self._read_form(key, fields, scope))

    def _read_form(self, key: str, fields: Fields, scope: _Scope) -> list[Module]:
        place = fields.places[key]
        if key == "adapters":
            for other in (fields.get(name) for name in ("base_model", "tensors", *TOKENS)):
                if other is not None:
                    other.error("has no meaning beside adapters", "take it out", other.key)
            method = loras.adapter_method(scope.method) if scope.method else None
            pieces = self._slices("models", place, replace(scope, method=method, base_model=None))
            for source in pieces[0].sources:
                refuse_mean(place, source.model, "checkpoints of an adapter", "list them, each as a model of its own")
                if source.model.adapter is not None:
                    place.error(f"{source.model} is a model and an adapter", "name the adapter alone", source.model.at)
            return [Module(None, pieces)]
        if key != "modules":
            return [Module(None, self._slices(key, place, scope), at=place.key)]
        entries = place.entries("a map from the names of modules to what they are made of")
        if entries == {}:
            place.error("an empty map", "name the modules, or write slices: or models: instead", place.key)
        return [self._module(name, module, scope) for name, module in (entries or {}).items()]

    def _module(self, name: str, place: Value, scope: _Scope) -> Module:
        fields = place.fields("a map with the key slices or models", MODULE, _UNDER_PARAMETERS)
        if fields is None:
            return Module(name, (), at=place.key)
        block = read_parameters(fields)
        scope = replace(scope, levels=(block.settings, *scope.levels))
        given = [(key, fields.places[key]) for key in _form(fields, ("models", "slices"))]
        pieces = tuple(piece for key, form in given for piece in self._slices(key, form, scope))
        self.block(block, pieces)
        return Module(name, pieces, block.settings, place.key)

    def _slices(self, key: str, place: Value, scope: _Scope) -> tuple[Slice, ...]:
        if key == "models":
            return (self._all_layers(place, scope),)
        found = tuple(self._slice(item, scope) for item in place.items("a list of slices, each with - sources:"))
        checks.last_slice(found, place)
        return found

    def _all_layers(self, place: Value, scope: _Scope) -> Slice:
        """The one slice of the `models:` form; a base model that is not listed joins its sources."""
        places = place.items("a list of models, each - model: org/name", identity)
        sources = [self._source(item, scope, MODEL) for item in places]
        base = scope.base_model
        if base is not None and base not in (UNREADABLE, *(source.model for source in sources)):
            sources.append(Source(base, added=True, at=base.at))
        return self._piece(scope, SettingsBlock({}, {}, None), sources, place, places)

    def _slice(self, place: Value, scope: _Scope) -> Slice:
        fields = place.fields("a map with the key sources", SLICE, _UNDER_PARAMETERS)
        if fields is None:
            return Slice((), UNREADABLE.path, at=place.at)
        block = read_parameters(fields)
        scope = scope.below(fields, block, self.table)
        unused = fields.get("residual_weight")
        if unused:
            unused.warn("residual_weight has no effect", "take it out", unused.key)
        listed = fields.need("sources", "list the models of this slice, each with its layer_range")
        places = listed.items("a list of sources, each with model and layer_range", identity) if listed else []
        sources = [self._source(item, scope, SOURCE) for item in places]
        piece = self._piece(scope, block, sources, listed or place, places)
        self.block(block, [piece])
        return replace(piece, at=place.at)

    def _piece(
        self, scope: _Scope, own: SettingsBlock, sources: list[Source], listed: Value, places: list[Value]
    ) -> Slice:
        """The slice of these sources, looked at as a whole; `listed` is their list, `places` they themselves."""
        method = scope.method
        piece = Slice(tuple(sources), method.name if method else "", scope.base_model, own.settings, listed.key)
        if method and places:
            checks.fit(Found(piece, method, listed, places, scope.levels))
        return piece

    def _source(self, place: Value, scope: _Scope, keys: tuple[str, ...]) -> Source:
        hints = _SOURCE_HINTS if keys == SOURCE else _MODEL_HINTS
        fields = place.fields("a map with the key model", keys, hints, "write - model: {}")
        if fields is None:
            return Source(UNREADABLE, at=place.at)
        block = read_parameters(fields)
        method = scope.method.method if scope.method else None
        checks.check_block(block, [method], self.table, per_model=True)
        ranged = fields.need("layer_range", _RANGE_HINT) if "layer_range" in keys else None
        model, measured = read_model(fields, "model", _A_MODEL), fields.get("statistics")
        return Source(
            model=model,
            layer_range=_layer_range(ranged) if ranged else None,
            parameters=block.settings,
            statistics=statistics(measured, model, method.statistics if method else None) if measured else None,
            at=place.at,
            range_at=ranged.at if ranged else None,
        )

    def merging(self, piece: Slice) -> Slice:
        """The slice; where its method would have one model alone, as passthrough makes it."""
        method = self.table.get(piece.method)
        single = checks.alone(piece, method) if method else None
        if single is None:
            return piece
        base = None if single.model == piece.base_model else piece.base_model
        as_it_is = replace(single, parameters={"scale": Setting((Rule((1.0,)),))})
        return replace(piece, sources=(as_it_is,), method=PASSTHROUGH, base_model=base)

    def block(self, block: SettingsBlock, pieces: Sequence[Slice]) -> None:
        """Look at a level's parameters with the methods in force anywhere below it."""
        checks.check_block(block, [self.table.get(piece.method) for piece in pieces], self.table)


def _form(fields: Fields, forms: tuple[str, ...]) -> list[str]:
    """Those of `forms` that are there: one, or it is an error. Beside one that holds anything, empty ones count not."""
    given = [form for form in forms if form in fields.places]
    full = [form for form in given if not fields.places[form].hollow]
    for form in set(given) - set(full) if full else ():
        del fields.places[form]
    given = full or given
    if not given:
        hint = "list what is merged: models: with - model: org/name"
        fields.place.error(f"one of {', '.join(forms)} is missing", hint)
    for form in given[1:]:
        what = f"{given[0]} and {form} exclude each other"
        fields.place.error(what, "keep one of them", fields.places[form].key)
    return given


def _parse_taken(place: Value) -> Taken | None:
    keys = place.fields("a map with the keys filter and model", TENSORS, _PINNED)
    if keys is None:
        return None
    keys.need("filter", "write filter: and a part of the tensors' names, such as self_attn")
    text, model = keys.text("filter", "a part of a tensor's name"), read_model(keys, "model", _A_MODEL)
    return Taken(text, model, place.at) if text else None


def _layer_range(place: Value) -> tuple[int, int] | None:
    if not isinstance(place.node, spans.Sequence):
        place.expected(_RANGE, _RANGE_HINT)
        return None
    ends = [item.whole(numbers.LAYERS, _RANGE_HINT) for item in place.items(_RANGE)]
    if len(ends) > 2 or len(ends) == 1:
        place.error(f"expected {_RANGE}, found a list of {len(ends)}", _RANGE_HINT)
    if len(ends) != 2 or ends[0] is None or ends[1] is None:
        return None
    start, end = ends[0], ends[1]
    if start >= end:
        place.error(f"[{number(start)}, {number(end)}] holds no layer", _RANGE_HINT)
        return None
    return start, end


def _dtype(fields: Fields, key: str) -> str | None:
    place = fields.get(key)
    text = fields.text(key, f"one of {', '.join(DTYPES)}")
    if place is None or text is None:
        return None
    name = text.removeprefix("torch.")
    if name in DTYPES:
        return name
    if name == "float64" and key == "dtype" and fields.get("out_dtype") is not None:
        FLOAT64.warn(place, name)
        return None
    if name == "auto":
        hint = f"leave {key} out: the result then has the base model's dtype, else the first model's"
    else:
        hint = f"write {_MEANT_DTYPES.get(name) or nearest(name, DTYPES) or 'one of ' + ', '.join(DTYPES)}"
    place.error(f"{text!r} is no dtype that a result can have", hint)
    return None
