"""Recipes as mergekit takes them: forms that mean the same here, and what `check` says of those that do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from merger.methods.registry import methods
from merger.recipe import mergekit
from merger.recipe.mergekit import Point
from merger.recipe.model import ModelRef, Recipe, Rule, Setting
from merger.recipe.parse import parse

Read = Callable[[str], Recipe]
DOCS = Path(__file__).parents[2] / "docs" / "mergekit.md"

TWO = "models: [{model: org/a, parameters: {weight: 0.5}}, {model: org/b, parameters: {weight: 0.5}}]\n"
LINEAR = "merge_method: linear\n" + TWO
SLICED = (
    "merge_method: linear\nslices:\n  - sources:\n"
    "    - {{model: org/a, layer_range: [{0}, {1}], parameters: {{weight: 0.5}}}}\n"
    "    - {{model: org/b, layer_range: [{0}, {1}], parameters: {{weight: 0.5}}}}\n"
)
SLERP = "merge_method: slerp\nbase_model: org/a\nmodels: [{model: org/a}, {model: org/b}]\n"
STACK = """\
slices:
  - sources: [{model: ./a, layer_range: [0, 2]}]
  - sources: [{model: ./a, layer_range: [1, 3], parameters: {scale: [{filter: q_proj, value: 0.5}, {value: 1.0}]}}]
merge_method: passthrough
"""
STACK_BY_ANCHORS = """\
const_tag: &MODEL ./a
attenuate-env: &less
  parameters:
    scale: [{filter: q_proj, value: 0.5}, {value: 1.0}]
slices:
  - sources: [{model: *MODEL, layer_range: [0, 2]}]
  - sources:
      - model: *MODEL
        layer_range: [1, 3]
        <<: *less
merge_method: passthrough
"""
MODULES = "merge_method: passthrough\nmodules: {{text: {{models: [{{model: org/a}}]{}}}}}\n"

SAME: Mapping[str, tuple[str, str]] = {
    "null forms": (LINEAR + "slices: null\nmodules: {}\n", LINEAR),
    "empty forms": (LINEAR + "slices: []\nmodules:\nadapters: []\n", LINEAR),
    "a module's empty form": (MODULES.format(", slices: []"), MODULES.format("")),
    "numbers as texts": (SLICED.format('"0"', "'8'"), SLICED.format(0, 8)),
    "whole numbers with a point": (SLICED.format("0.0", "'8.0'"), SLICED.format(0, 8)),
    "a seed as text": (LINEAR + 'seed: "42"\n', LINEAR + "seed: 42\n"),
    "weights as texts": (LINEAR.replace("0.5", '"0.5"'), LINEAR),
    "a gradient of texts": (SLERP + 'parameters: {t: ["0.1", "1e-1"]}\n', SLERP + "parameters: {t: [0.1, 0.1]}\n"),
    "false as text": (LINEAR + 'parameters: {normalize: "false"}\n', LINEAR + "parameters: {normalize: false}\n"),
    "Off as text": (LINEAR + 'parameters: {normalize: "Off"}\n', LINEAR + "parameters: {normalize: false}\n"),
    "a flag as text": (LINEAR + 'publish: {private: "true"}\n', LINEAR + "publish: {private: true}\n"),
    "padding as text": (
        LINEAR + 'tokenizer: {pad_to_multiple_of: "64"}\n',
        LINEAR + "tokenizer: {pad_to_multiple_of: 64}\n",
    ),
    "a filter without text": (
        SLERP + 'parameters: {t: [{filter: "", value: 0.3}]}\n',
        SLERP + "parameters: {t: [{value: 0.3}]}\n",
    ),
    "a chat template without text": (LINEAR + 'chat_template: ""\n', LINEAR),
    "keys that hold anchors": (STACK_BY_ANCHORS, STACK),
    "an anchor under a name like a key that is there": (
        "models_all: &all [{model: org/a}]\nmodels: *all\nmerge_method: passthrough\n",
        "models: [{model: org/a}]\nmerge_method: passthrough\n",
    ),
    "float64 that is rounded in the end": (
        LINEAR + "dtype: float64\nout_dtype: bfloat16\n",
        LINEAR + "out_dtype: bfloat16\n",
    ),
}
"""Forms that mergekit takes, and the plain form that they mean."""


def meaning(recipe: Recipe) -> Recipe:
    """The recipe without its text, in which alone two of equal meaning differ."""
    return replace(recipe, text="")


@pytest.mark.parametrize("form", SAME)
def test_a_form_that_mergekit_takes_means_what_its_plain_form_does(read: Read, form: str) -> None:
    """Texts for numbers, null and empty forms, empty texts, keys that only hold anchors."""
    written, plain = SAME[form]
    assert meaning(read(written)) == meaning(read(plain))


def test_an_empty_list_gives_no_value(read: Read) -> None:
    """As in mergekit the level above is asked; that it does nothing is said."""
    recipe = read("merge_method: linear\nparameters: {weight: 2}\nmodels: [{model: org/a, parameters: {weight: []}}]\n")
    assert recipe.slices[0].sources[0].parameters == {}
    (warning,) = recipe.warnings
    assert str(warning).splitlines()[0] == (
        "mine.yaml:3:38: models[org/a].parameters.weight: "
        "an empty list gives no value, so that of the level above holds"
    )


# ---- one model alone ------------------------------------------------------------------------------------------------

ALONE = {
    "a base with its adapter": (
        "merge_method: task_arithmetic\nbase_model: org/base+org/lora\nmodels:\n"
        "  - {model: org/base+org/lora, parameters: {weight: 0.3}}\nparameters: {scale: 2}\n",
        ModelRef("org/base", adapter=ModelRef("org/lora")),
    ),
    "in slices": (
        "merge_method: ties\nbase_model: org/a\nslices: [{sources: [{model: org/a, layer_range: [0, 2]}]}]\n",
        ModelRef("org/a"),
    ),
    "one model of karcher": ("merge_method: karcher\nmodels: [{model: org/a}]\n", ModelRef("org/a")),
    "one besides the base of multislerp": (
        "merge_method: multislerp\nbase_model: org/base\nmodels: [{model: org/a, parameters: {weight: 0.2}}]\n",
        ModelRef("org/a"),
    ),
    "one for which a parameter is missing": (
        "merge_method: sce\nbase_model: a/b\nmodels: [{model: a/b}]\n",
        ModelRef("a/b"),
    ),
}


@pytest.mark.parametrize("name", ALONE)
def test_a_model_that_is_merged_with_nothing_comes_out_as_it_is(name: str) -> None:
    """As passthrough makes it, by no scale that stands somewhere above; and that nothing is merged is said."""
    text, model = ALONE[name]
    recipe = parse(text, "mine.yaml", methods())
    (piece,) = recipe.slices
    assert (piece.method, [source.model for source in piece.sources]) == ("passthrough", [model])
    assert piece.sources[0].parameters == {"scale": Setting((Rule((1.0,)),))}
    said = [warning.what for warning in recipe.warnings if "nothing is merged" in warning.what]
    assert said == [f"nothing is merged: {model} is the only model, and comes out as it is"]


@pytest.mark.parametrize("text", [
    "merge_method: nuslerp\nmodels: [{model: org/a}]\n",
    "merge_method: model_stock\nbase_model: org/base\nmodels: [{model: org/a}]\n",
    "merge_method: arcee_fusion\nbase_model: org/a\nmodels: [{model: org/a}]\n",
])  # fmt: skip
def test_a_method_that_needs_another_model_still_asks_for_it(text: str) -> None:
    """Where one model more is what is meant, it is missing."""
    with pytest.raises(Exception, match="found 1"):
        parse(text, "mine.yaml", methods())


# ---- what is otherwise here -----------------------------------------------------------------------------------------

OTHERWISE: Mapping[str, tuple[Point, str, str]] = {
    "base": (
        mergekit.BASE_ASIDE,
        "merge_method: linear\nbase_model: org/base\nparameters: {weight: 0.5}\nmodels: [{model: org/a}]\n",
        "2:13: base_model: org/base gives config and tokenizer and is not merged "
        "(mergekit: one model more, with the weight that stands above the models)",
    ),
    "twice": (
        mergekit.TWICE,
        "merge_method: linear\nparameters: {weight: 1}\nmodels:\n  - model: org/a\n  - model: org/a\n",
        "5:5: models[org/a]: org/a is listed twice, and counts twice (mergekit: once, with the numbers of the first)",
    ),
    "last slice": (
        mergekit.LAST_SLICE,
        "merge_method: linear\nparameters: {weight: 1}\nslices:\n"
        "  - sources: [{model: org/a, layer_range: [0, 2]}]\n"
        "  - sources: [{model: org/a, layer_range: [2, 4]}, {model: org/b, layer_range: [2, 4]}]\n",
        "5:5: slices: the sources of the last slice are all merged into what follows the layers: final norm and head "
        "(mergekit: only as many of them as the first slice has sources)",
    ),
    "float64": (
        mergekit.FLOAT64,
        LINEAR + "dtype: torch.float64\nout_dtype: float32\n",
        "3:8: dtype: float64 is not what methods compute in: that is float32, with sums, norms and angles in float64 "
        "(mergekit: all in float64)",
    ),
    "architecture": (
        mergekit.OVERRIDE,
        "merge_method: passthrough\nmodels: [{model: {model: org/a, override_architecture: LlamaForCausalLM}}]\n",
        "2:33: models[org/a].model.override_architecture: override_architecture has no effect: the architecture is "
        "learned from the tensors' names (mergekit: the table of tensors that it takes for the model)",
    ),
}
"""For each point of the table in docs/mergekit.md a recipe, and what `check` warns of in it."""


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_means_something_else_than_in_mergekit_is_warned_of(name: str) -> None:
    """The warning stands at the place, says what is done and what mergekit does, and is the recipe's only one."""
    point, text, says = OTHERWISE[name]
    (warning,) = parse(text, "mine.yaml", methods()).warnings
    assert str(warning).splitlines() == [f"mine.yaml:{says}", f"    {point.hint}"]


def test_the_table_in_the_docs_has_each_point_and_its_reason() -> None:
    """No warning without a row, no row without a recipe that shows it."""
    page = DOCS.read_text("utf-8")
    told = page.partition("<!-- warned:start -->")[2].partition("<!-- warned:end -->")[0]
    rows = [line.strip("| ").split(" | ") for line in told.strip().splitlines()[2:]]
    assert rows == [[point.recipe, point.here, point.there, point.why] for point in mergekit.POINTS]
    assert {point.recipe for point, _, _ in OTHERWISE.values()} == {point.recipe for point in mergekit.POINTS}


@pytest.mark.parametrize("text", [
    "merge_method: linear\nbase_model: org/base\n" + TWO,
    "merge_method: linear\nbase_model: org/a\nparameters: {weight: 0.5}\nmodels: [{model: org/a}, {model: org/b}]\n",
    "merge_method: passthrough\nbase_model: org/base\nmodels: [{model: org/a}]\n",
    SLICED.format(0, 4) + SLICED.format(4, 8).partition("slices:\n")[2],
])  # fmt: skip
def test_what_mergekit_does_alike_or_not_at_all_is_not_warned_of(text: str) -> None:
    """A base that no weight reaches fails there; one that is listed is merged in both."""
    assert parse(text, "mine.yaml", methods()).warnings == ()


def test_keys_of_old_releases_have_no_effect(read: Read) -> None:
    """Published recipes have them; mergekit drops them too, and here it is said."""
    recipe = read(
        "merge_method: slerp\nbase_model: org/a\nmodels: [{model: org/b}]\n"
        "parameters: {t: 0.5, embed_slerp: true}\ninput_model_parameters: {org/a: {weight: 1}}\n"
    )
    assert [str(warning).splitlines()[0] for warning in recipe.warnings] == [
        f"mine.yaml:{where}: {key} has no effect: only old releases of mergekit knew it"
        for where, key in [("4:22: parameters.embed_slerp", "embed_slerp"),
                           ("5:1: input_model_parameters", "input_model_parameters")]
    ]  # fmt: skip
    assert [source.model for source in recipe.slices[0].sources] == [ModelRef("org/b"), ModelRef("org/a")]
