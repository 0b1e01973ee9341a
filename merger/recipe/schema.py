"""The recipe language as JSON Schema 2020-12, for editors: completion, hover texts and red lines while typing.

Made from what is there already: the keys (parse, values), the dataclasses' docs (model) and the table of methods. It is
wider than the language: what takes more than one key to tell, and every sentence of help, only parse has. But it marks
what does nothing: keys at the top that hold anchors alone, which no schema sees, and keys of mergekit's old releases.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from merger.recipe import parse, references, spans, values
from merger.recipe.blocks import evaluate as evaluation
from merger.recipe.blocks import holes, mixture, tokenizer
from merger.recipe.blocks import lora as loras
from merger.recipe.blocks import publish as publishing
from merger.recipe.blocks import search as searching
from merger.recipe.blocks import statistics as measuring
from merger.recipe.checks import FIELD_METHODS, FIELD_PARAMETERS
from merger.recipe.model import (
    Checkpoints,
    Evaluate,
    Expert,
    Lora,
    Measure,
    Mixture,
    ModelRef,
    Module,
    Perplexity,
    Publish,
    Recipe,
    Slice,
    Source,
    Taken,
    Tokenizer,
    TokenOf,
    TokenRow,
)
from merger.recipe.searched import Hole, Objective, Searched
from merger.safety import names, numbers

if TYPE_CHECKING:
    from merger.methods.registry import Method, Param

Json = dict[str, Any]

_NOT_BUILT = "(not built yet)"
# a number may stand in quotes, and YAML 1.1 takes 1e-10 for text
_NUMBER = r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)?"
_TRUTH = "|".join("".join(f"[{letter.upper()}{letter}]" for letter in word) for word in spans.TRUTHS)
_NUMERIC = rf"^\s*({_NUMBER}|{_TRUTH})\s*$"
_PART = r"[^@+]+(@[^@+]+)?"

_WORDS = {
    "merge_method": "How the models become one.",
    "models": "The models to merge, all of their layers each.",
    "slices": "The runs of layers that the result is made of, from the first layer to the last.",
    "modules": "The parts of the model by name, each with its own models or slices.",
    "adapters": "The LoRA adapters to merge into one.",
    "extract_lora": "The result is a LoRA adapter of what a fine-tune changed in its base model.",
    "out_dtype": "The dtype of the result; counts before dtype.",
    "tokenizer_source": "The source of the result's tokenizer: as much as tokenizer: {source: ...}.",
    "kind": "zero: a row of zeros; model_token: the row of another token.",
    "token_id": "The token's id in that model.",
    "residual_weight": "Has no effect.",
    "override_architecture": "Has no effect.",
    "lora": "A LoRA adapter that is added to the model.",
    "revisions": "The model is the mean of several checkpoints: a pattern for branches and tags, such as step-*.",
    "statistics": "Where what was measured of the model lies, for methods that ask for it: org/name or a folder; or "
    "how it is measured on the way.",
    "average": "How much each of these checkpoints goes in; without it all alike.",
    "filter": "A part of the tensors' names that this value is for, case and all; without it: every tensor.",
    "value": "A number, or a gradient: numbers from the slice's first layer to its last.",
}

_SEARCH_WORDS = {
    "search": "Two ends of a range, a list of choices, or the name of another searched value.",
    "sum": "The sum of the numbers in this place of each model of the list: what is drawn is divided by its own sum.",
    "name": "By which other places can have the same value.",
    "loss": "A text: the mean loss of a token.",
    "accuracy": "Lines of JSON with prompt, choices and answer: how often the answer is the likeliest of the choices.",
    "exact_match": "Lines of JSON with prompt and answer: how often the model writes the answer.",
    "length": "Lines of JSON with prompt: how many tokens the model writes.",
    "task": "A task of lm-evaluation-harness.",
    "function": "module:function(model, tokenizer), which returns a number: more is better.",
}


def schema(table: Mapping[str, Method]) -> Json:
    """The JSON Schema of a recipe."""
    described = _WORDS | _describe_fields(Module)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "merger recipe",
        "description": "Which models are merged, and how.",
        **_top(),
        "$defs": {
            "reference": _reference(),
            "path": _or_null(
                _map(references.PATH, _describe_fields(ModelRef), {key: _text() for key in references.PATH}, ["path"])
            ),
            "method": {"anyOf": [*_methods(table), _ref("hole"), {"type": "null"}]},
            "hole": _hole(),
            "search": _search(),
            "parameters": _parameters(table),
            "models": _list(_source(parse.MODEL)),
            "slices": _list(_slice()),
            "module": _map(parse.MODULE, described) | {"oneOf": [_given("slices"), _given("models")]},
            "expert": _expert(),
            "publish": _publish(),
            "lora": _lora(loras.LORA),
            "extract_lora": _lora(loras.EXTRACT) | {"required": ["model", "base_model", "rank"]},
            "evaluate": _evaluate(),
            "tokenizer": _tokenizer(),
        },
    }


def _top() -> Json:
    described = _WORDS | _describe_fields(Mixture) | _describe_fields(Recipe)
    dtypes = {"enum": [*parse.DTYPES, *(f"torch.{name}" for name in parse.DTYPES), None]}
    computed = {"enum": [*dtypes["enum"], "float64", "torch.float64"]}
    shapes = {
        "modules": {"type": ["object", "null"], "additionalProperties": _ref("module")},
        "tensors": _list(_map(parse.TENSORS, _describe_fields(Taken), required=parse.TENSORS)),
        "dtype": computed,
        "out_dtype": dtypes,
        "chat_template": {"type": ["string", "null"]},
        "adapters": _maybe(_ref("models")),
        "experts": _list(_ref("expert")),
        "shared_experts": _or_null(_list(_ref("expert")) | {"maxItems": 1}),
        "gate_mode": {"enum": [*mixture.GATE_MODES, None]},
        "experts_per_token": _or_null(_whole(numbers.COUNT)),
    }
    return _map((*parse.TOP, *mixture.MIXTURE), described, shapes) | {
        "oneOf": [_given(form) for form in (*parse.FORMS, "experts", "extract_lora")],
        "anyOf": [{"required": [key]} for key in ("merge_method", "slices", "modules", "experts", "extract_lora")],
        "dependentRequired": {key: ["experts"] for key in mixture.MIXTURE[1:]} | {"experts": ["base_model"]},
    }


def _reference() -> Json:
    hover = "org/name, org/name@revision, or a folder such as ./name"
    described = _WORDS | _describe_fields(ModelRef) | {"model": "The model."}
    path = {"anyOf": [_text(pattern=f"^{_PART}$"), _ref("path")]}
    as_map = _map(references.REFERENCE, described, {"model": path, "lora": path, **_mean()}, ["model"])
    return {"description": hover, "anyOf": [_text(pattern=rf"^{_PART}(\+{_PART})?$"), as_map, {"type": "null"}]}


def _source(keys: tuple[str, ...]) -> Json:
    ends = {"type": "array", "items": _or_hole(_whole(numbers.LAYERS)), "minItems": 2, "maxItems": 2}
    shapes = {"layer_range": _or_hole(ends), "statistics": {"anyOf": [_ref("reference"), _measure()]}}
    needed = [key for key in ("model", "layer_range") if key in keys]
    return _map(keys, _WORDS | _describe_fields(Source), shapes | _mean(), needed)


def _measure() -> Json:
    numbered = {key: _or_null(_whole(within)) for key, within in measuring.WHOLES.items()}
    return _map(measuring.MEASURE, _describe_fields(Measure), numbered, ["measure"])


def _mean() -> Json:
    described, pattern = _describe_fields(Checkpoints), _text()
    number, scheme = {"type": ["number", "string"], "pattern": _NUMERIC}, {"enum": list(references.SCHEMES)}
    which = {
        "match": pattern,
        **{key: _or_null(_whole(within)) for key, within in (("last", references.LAST), ("every", numbers.COUNT))},
    }
    how = {"by": scheme, "ema": number | _ends(references.DECAY), "weights": _list(number)}
    return {
        "revisions": {"anyOf": [pattern, _map(references.REVISIONS, described, which), {"type": "null"}]},
        "average": {"anyOf": [scheme, _map(references.AVERAGE, described, how), {"type": "null"}]},
    }


def _slice() -> Json:
    shapes = {"sources": _list(_source(parse.SOURCE))}
    return _map(parse.SLICE, _WORDS | _describe_fields(Slice), shapes, ["sources"])


def _expert() -> Json:
    prompts, number = _or_null(_list(_text())), {"type": ["number", "string", "null"], "pattern": _NUMERIC}
    shapes = {
        "positive_prompts": prompts,
        "negative_prompts": prompts,
        "noise_scale": number | _ends(numbers.Range(0)),
        "residual_scale": number | _ends(numbers.Range()),
    }
    return _map(mixture.EXPERT, _WORDS | _describe_fields(Expert), shapes | _mean(), ["source_model"])


def _publish() -> Json:
    shapes = {
        "repo": _or_null(_text(pattern=f"{names.REPO}|{names.PAGE}")),
        "gguf": _or_null(_list({"enum": list(publishing.GGUF)})),
        "fp8": {"enum": [*publishing.FP8, None]},
    }
    return _or_null(_map(publishing.PUBLISH, _describe_fields(Publish), shapes))


def _lora(keys: tuple[str, ...]) -> Json:
    alpha = {"type": ["number", "string", "null"], **_ends(numbers.ALPHA)}
    shapes = {"rank": _or_null(_whole(numbers.RANK)), "alpha": alpha}
    words = {"model": "The fine-tune.", "base_model": "The model that it was made from."}
    return _map(keys, _describe_fields(Lora) | words, shapes)


def _evaluate() -> Json:
    limit, window = _or_null(_whole(evaluation.LIMIT)), numbers.Range(2, evaluation.MAX_WINDOW)
    stride = _or_null(_whole(numbers.Range(1, evaluation.MAX_WINDOW)))
    shapes = {"window": _or_null(_whole(window)), "stride": stride, "limit": limit}
    perplexity = _map(evaluation.PERPLEXITY, _describe_fields(Perplexity), shapes, ["text"])
    shapes = {
        "perplexity": {"anyOf": [perplexity, _list(perplexity), {"type": "null"}]},
        "tasks": _or_null(_list(_text())),
        "limit": limit,
        "dtype": {"enum": [*evaluation.DTYPES, None]},
    }
    return _or_null(_map(evaluation.EVALUATE, _describe_fields(Evaluate), shapes))


def _or_hole(shape: Json) -> Json:
    """What may be searched where it stands."""
    return {"anyOf": [shape, _ref("hole")]}


def _hole() -> Json:
    number = {"type": ["number", "string"], "pattern": _NUMERIC}
    shapes = {
        "search": {"anyOf": [{"type": "array", "minItems": 2}, _text()]},
        "step": number,
        "anchors": _whole(holes.ANCHORS),
        "sum": number,
        "name": _text(),
    }
    return _map(holes.HOLE, _describe_fields(Hole) | _SEARCH_WORDS, shapes, ["search"])


def _search() -> Json:
    number, count = {"type": ["number", "string", "null"], "pattern": _NUMERIC}, _or_null(_whole(numbers.COUNT))
    described = _describe_fields(Searched) | _describe_fields(Objective) | _SEARCH_WORDS
    shapes = dict.fromkeys(searching.KINDS, _text()) | {"limit": count}
    objective = _map(searching.OBJECTIVE, described, shapes | dict.fromkeys(("weight", "guard"), number))
    shapes = {
        **dict.fromkeys(("objectives", "report"), _list(objective)),
        "trials": _or_null(_whole(searching.TRIALS)),
        "minutes": number | _ends(numbers.MINUTES),
        "sampler": {"enum": [*searching.SAMPLERS, None]},
        "prune": {"enum": [True, False, *searching.PRUNING, None]},
        "subset": {"enum": [*searching.SUBSETS, None]},
        "patience": count,
    }
    return _map(searching.SEARCH, described, shapes, ["objectives"])


def _tokenizer() -> Json:
    words = _WORDS | _describe_fields(TokenOf) | _describe_fields(TokenRow) | _describe_fields(Tokenizer)
    token = {"kind": {"enum": list(tokenizer.KINDS)}, "token_id": _whole(numbers.TOKENS)}
    words |= {"model": "The model.", "token": "The token's text in that model."}
    row = {"source": {"anyOf": [_map(tokenizer.ROW_SOURCE, words, token, ["kind"]), _ref("reference")]}}
    rows = {"type": ["object", "null"], "additionalProperties": _or_null(_map(tokenizer.ROW, words, row))}
    shapes = {
        "source": _ref("reference"),
        "tokens": rows,
        "pad_to_multiple_of": _or_null(_whole(numbers.Range(1, tokenizer.MAX_PADDING))),
        "rows": {"enum": [*tokenizer.ROWS, None]},
        "missing": {"enum": [*tokenizer.MISSING, None]},
        "k": _or_null(_whole(numbers.Range(1, tokenizer.MAX_ATOMS))),
    }
    return _or_null(_map(tokenizer.TOKENIZER, words | _describe_fields(Tokenizer), shapes))


def _whole(within: numbers.Range) -> Json:
    return {"type": ["integer", "string"], "pattern": _NUMERIC, **_ends(within)}


def _ends(within: numbers.Range) -> Json:
    return {"minimum": within.least, "maximum": within.most}


def _flag() -> Json:
    return {"type": ["boolean", "string", "null"], "pattern": rf"^\s*({_TRUTH})\s*$"}


def _methods(table: Mapping[str, Method]) -> list[Json]:
    built = [{"const": method.name, "description": method.summary} for method in table.values()]
    missing = [name for name in FIELD_METHODS if name not in table]
    built.append({"const": mixture.METHOD, "description": "A mixture of experts: see experts."})
    return built + [{"const": name, "description": f"{name} {_NOT_BUILT}"} for name in missing]


def _parameters(table: Mapping[str, Method]) -> Json:
    """A block of settings, of whichever method: which methods are in force may stand elsewhere in the recipe."""
    owners: dict[str, list[tuple[Method, Param]]] = {}
    for method in table.values():
        for param in method.params:
            owners.setdefault(param.name, []).append((method, param))
    known = {name: _setting(_hover(pairs), [param for _, param in pairs]) for name, pairs in owners.items()}
    others = [name for name in FIELD_PARAMETERS if name not in known]
    return _or_null(_open_map(known | {name: _setting(f"{name}: of methods {_NOT_BUILT}", []) for name in others}))


def _hover(pairs: list[tuple[Method, Param]]) -> str:
    """What a parameter means: said once where the methods agree."""
    said: dict[str, list[str]] = {}
    for method, param in pairs:
        said.setdefault(param.description, []).append(method.name)
    return "\n\n".join(f"{', '.join(names)}: {text}" for text, names in said.items())


def _setting(hover: str, params: list[Param]) -> Json:
    number = _or_hole({"type": ["number", "boolean", "string"], "pattern": _NUMERIC, **_bounds(params)})
    value = {"anyOf": [number, _list(number)]}
    nothing = {"type": "array", "maxItems": 0}
    filters = {"value": value, "filter": {"type": ["string", "null"]}}
    rule = _map(values.RULE, _WORDS, filters, ["value"])
    return {"description": hover, "anyOf": [number, _list(number), _list(rule), rule, nothing]}


def _bounds(params: list[Param]) -> Json:
    """The widest of the methods' bounds: which of them is in force, a schema cannot tell."""
    ranges = [param.range for param in params] or [numbers.Range()]
    return _ends(numbers.Range(min(one.least for one in ranges), max(one.most for one in ranges)))


def _describe_fields(of: type) -> dict[str, str]:
    """What stands under ``Args:`` in a dataclass's docstring, by key."""
    block = inspect.getdoc(of).partition("\nArgs:\n")[2]  # type: ignore[union-attr]  # every dataclass of model has one
    found = re.findall(r"^    (\w+): ((?:.|\n {8,})*)", block, flags=re.MULTILINE)
    return {key: " ".join(words.split()).replace("``", "`") for key, words in found}


def _map(
    keys: Iterable[str], described: Mapping[str, str], own: Mapping[str, Any] = {}, required: Iterable[str] = ()
) -> Json:
    """A map with these keys and no others; `own`: what may stand behind those that are not as in `_SHAPES`."""
    shapes = {**_SHAPES, **own}
    properties = {key: {"description": described[key], **shapes[key]} for key in keys}
    return _open_map(properties) | ({"required": list(required)} if required else {})


def _open_map(properties: Json) -> Json:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _list(items: Json) -> Json:
    return {"type": "array", "items": items, "minItems": 1}


def _text(**more: str) -> Json:
    return {"type": "string", "minLength": 1, **more}


def _ref(name: str) -> Json:
    return {"$ref": f"#/$defs/{name}"}


def _given(key: str) -> Json:
    """That a key is there, and holds anything."""
    held = {"type": ["array", "object"], "minItems": 1, "minProperties": 1}
    return {"required": [key], "properties": {key: held}}


def _maybe(shape: Json) -> Json:
    """A list that may be empty, or nothing, beside another form that is not."""
    return {"anyOf": [shape, {"type": ["array", "null"], "maxItems": 0}]}


def _or_null(shape: Json) -> Json:
    """YAML's `key:` with nothing behind it says as much as no key."""
    types = shape["type"] if isinstance(shape["type"], list) else [shape["type"]]
    return {**shape, "type": [*types, "null"]}


_FLAGS = (
    "private", "create_pr", "safetensors", "core", "embeddings", "distribute_scale", "skip_rest", "parents",
    "allow_non_finite", "force", "log", "merged",
)  # fmt: skip
_TEXTS = ("name", "license", "license_name", "license_link", "license_override", "template", "include", "exclude",
          "storage", "architecture")  # fmt: skip
_SHAPES: Mapping[str, Json] = {
    **dict.fromkeys(("model", "base_model", "source_model", "tokenizer_source"), _ref("reference")),
    **{key: _ref(key) for key in ("parameters", "tokenizer", "evaluate", "search", "publish", "lora", "extract_lora")},
    **{key: _maybe(_ref(key)) for key in ("models", "slices")},
    **dict.fromkeys(_FLAGS, _flag()),
    **dict.fromkeys(_TEXTS, _or_null(_text())),
    **dict.fromkeys(("text", "filter", "measure", "token", "column"), _text()),
    **{key: {} for key in ("residual_weight", "override_architecture", "start")},
    "merge_method": _ref("method"),
    "seed": _or_null(_whole(numbers.SEED)),
}
"""What may stand behind a key wherever it stands, unless its map says otherwise."""
