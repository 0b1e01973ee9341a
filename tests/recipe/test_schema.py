"""The JSON Schema agrees with the language, as far as a schema can."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from merger.methods.registry import Method, methods
from merger.recipe import parse
from merger.recipe.blocks import mixture, tokenizer
from merger.recipe.schema import schema

from .conftest import WILD
from .test_mergekit import SAME

FORMS = {name: pair for name, pair in SAME.items() if "anchor" not in name}

RECIPE = """
merge_method: ties
base_model: org/base
models:
  - model: org/a
    parameters: {density: [0.5, 1], weight: 1e-3}
  - model: {model: {path: org/b, revision: main}}
    parameters:
      weight:
        - {value: yes, filter: mlp}
        - value: [0, 1]
dtype: torch.bfloat16
seed: 42
tokenizer:
  source: org/b
  tokens:
    <|im_start|>: {source: org/b, force: true}
    <|im_end|>: {source: {kind: model_token, model: org/b, token_id: 2}}
    <pad>: {source: {kind: zero}}
    <new>:
  pad_to_multiple_of: 64
  missing: omp
  k: 32
chat_template: "{{ messages }}"
publish: {repo: org/merged, private: true, license: mit, create_pr: no, template: }
"""

Spoil = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def validator(table: Mapping[str, Method]) -> Draft202012Validator:
    found = schema(table)
    Draft202012Validator.check_schema(found)
    return Draft202012Validator(found)


def test_it_is_json(table: Mapping[str, Method]) -> None:
    """The schema goes through JSON unchanged."""
    assert json.loads(json.dumps(schema(table))) == schema(table)


@pytest.mark.parametrize("file", WILD, ids=lambda file: file.stem)
def test_recipes_of_the_field_are_valid(validator: Draft202012Validator, file: Path) -> None:
    """Every document of every published recipe is valid, method built or not."""
    for document in yaml.safe_load_all(file.read_text()):
        validator.validate(document)


MIXTURE = """
merge_method: moe
base_model: org/base
gate_mode: cheap_embed
experts_per_token: 1
architecture: qwen
experts:
  - {source_model: org/a, positive_prompts: [one], negative_prompts: [two], noise_scale: 1e-3, residual_scale: 2}
  - {source_model: org/b, positive_prompts: [two]}
shared_experts:
  - {source_model: org/base, positive_prompts: [all]}
dtype: bfloat16
"""


def test_a_mixture_is_valid(validator: Draft202012Validator) -> None:
    """All keys of a mixture are valid, with or without a merge method."""
    recipe = yaml.safe_load(MIXTURE)
    validator.validate(recipe)
    del recipe["merge_method"]
    validator.validate(recipe)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda recipe: recipe.pop("base_model"),
        lambda recipe: recipe.update(gate_mode="hiden"),
        lambda recipe: recipe.update(models=[{"model": "org/a"}]),
        lambda recipe: recipe["experts"][0].update(prompts=["one"]),
        lambda recipe: recipe["experts"][0].pop("source_model"),
        lambda recipe: recipe["experts"][0].update(noise_scale=-1),
        lambda recipe: recipe.pop("experts"),
        lambda recipe: recipe.update(experts_per_token=0),
    ],
)
def test_mistakes_in_a_mixture_are_invalid(validator: Draft202012Validator, spoil: Spoil) -> None:
    """What a mixture lacks, or has too much of, is underlined by an editor."""
    recipe = yaml.safe_load(MIXTURE)
    spoil(recipe)
    assert not validator.is_valid(recipe)


def test_the_language_is_valid(validator: Draft202012Validator) -> None:
    """References, gradients, filters, booleans, numbers as text and empty keys are all valid."""
    validator.validate(yaml.safe_load(RECIPE))


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_of_mergekit_are_valid(form: str) -> None:
    """Texts for numbers, null and empty forms, empty texts; but for keys that hold anchors alone."""
    Draft202012Validator(schema(methods())).validate(yaml.safe_load(FORMS[form][0]))


def _set(path: str, value: Any) -> Spoil:
    def spoil(recipe: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        level: Any = recipe
        for step in parents:
            level = level[int(step) if step.isdigit() else step]
        level[last] = value

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        _set("modles", []),
        _set("models/0/parameters/densty", 0.5),
        _set("models/0/parameters/density", 1.5),
        _set("models/0/parameters/density", [0.5, 1.5]),
        _set("models/0/parameters/density", [{"value": 1.5}]),
        _set("models/0/parameters/density", [{"value": []}]),
        _set("tokenizer/rows", "bass"),
        _set("publish/private", "maybe"),
        _set("seed", "some"),
        _set("models/0/parameters/weight", "heavy"),
        _set("models/0/weight", 1),
        _set("models/0/model", "org/a@x@y"),
        _set("models", []),
        _set("slices", [{"sources": [{"model": "org/a", "layer_range": [0, 4]}]}]),
        _set("merge_method", "tise"),
        _set("dtype", "bf16"),
        _set("seed", -1),
        _set("tokenizer/sources", "union"),
        _set("tokenizer/missing", "median"),
        _set("tokenizer/k", 0),
        _set("tokenizer/tokens/<pad>", {"source": {"kind": "one"}}),
        _set("tokenizer/tokens/<pad>", {"from": "org/b"}),
        _set("publish/repo", "merged"),
        _set("publish/licence", "mit"),
    ],
)
def test_mistakes_are_invalid(validator: Draft202012Validator, spoil: Spoil) -> None:
    """A misspelt key, a number out of bounds or a wrong shape is underlined by an editor."""
    recipe = copy.deepcopy(yaml.safe_load(RECIPE))
    spoil(recipe)
    assert not validator.is_valid(recipe)


def test_every_key_of_the_language_is_there(table: Mapping[str, Method]) -> None:
    """The schema's keys are the parser's keys, and each is described."""
    found = schema(table)
    assert set(found["properties"]) == {*parse.TOP, *mixture.TOP}
    slices = found["$defs"]["slices"]["items"]
    assert set(slices["properties"]) == set(parse.SLICE)
    assert set(found["$defs"]["tokenizer"]["properties"]) == set(tokenizer.TOKENIZER)
    assert set(slices["properties"]["sources"]["items"]["properties"]) == set(parse.SOURCE)
    assert all(shape["description"] for shape in found["properties"].values())


def test_methods_are_named_with_their_summaries(table: Mapping[str, Method]) -> None:
    """An editor offers every method with its first sentence, and says which are not built."""
    offered = {shape.get("const"): shape.get("description") for shape in schema(table)["$defs"]["method"]["anyOf"]}
    assert offered["ties"] == "Trim, elect, merge."
    assert offered["della"] == "della (not built yet)"


def test_parameters_have_their_descriptions(table: Mapping[str, Method]) -> None:
    """Hovering over a parameter tells what it does, for each method that tells it differently."""
    density = schema(table)["$defs"]["parameters"]["properties"]["density"]
    assert density["description"] == (
        "ties: share of entries kept in each task vector, by magnitude.\n\n"
        "dare_ties: share of entries kept in each task vector, at random."
    )


def test_the_real_table_makes_a_schema() -> None:
    """The schema of the methods that are built is valid and accepts the recipes that use them."""
    found = schema(methods())
    Draft202012Validator.check_schema(found)
    Draft202012Validator(found).validate(yaml.safe_load(RECIPE))


def test_the_language_needs_neither_torch_nor_the_hub() -> None:
    """Importing the whole wing loads no torch, no huggingface_hub and no method."""
    code = (
        "import sys; "
        "from merger.recipe import checks, model, parse, schema, spans, values; "
        "from merger.recipe.blocks import tokenizer; "
        "sys.exit(', '.join({'torch', 'huggingface_hub', 'merger.methods'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
