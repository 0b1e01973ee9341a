"""Which number a recipe gives which tensor: levels, filters, gradients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from merger.errors import RecipeError

from .models import jobs, model

UP = "model.layers.{}.mlp.up_proj.weight"
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@pytest.fixture
def models(tmp_path: Path) -> tuple[str, str]:
    """Two models of four layers."""
    return model(tmp_path / "one", layers=4), model(tmp_path / "other", layers=4)


def weights(recipe: object, name: str = UP.format(0), parameter: str = "weight") -> list[float]:
    """The per-model numbers with which a tensor is made."""
    return [entry.settings[parameter] for entry in jobs(yaml.safe_dump(recipe))[name].inputs]


def lambdas(recipe: object, names: Sequence[str]) -> list[float]:
    """The global numbers with which tensors are made."""
    found = jobs(yaml.safe_dump(recipe))
    return [found[name].settings["lambda"] for name in names]


LEVELS = ("source", "slice", "module", "top")


@pytest.mark.parametrize("given", [LEVELS[first:] for first in range(5)])
def test_the_nearest_level_that_gives_a_weight_counts(models: tuple[str, str], given: tuple[str, ...]) -> None:
    """Source, slice, module, top, the method's default; the other source has none of its own."""
    value = {"source": 0.1, "slice": 0.2, "module": 0.3, "top": 0.4, "default": 1.0}
    block = {level: {"parameters": {"weight": value[level]}} if level in given else {} for level in LEVELS}
    sources = [{"model": path, "layer_range": [0, 4]} for path in models]
    sources[0] |= block["source"]
    piece = {"sources": sources, **block["slice"]}
    recipe = {"merge_method": "linear", "modules": {"default": {"slices": [piece], **block["module"]}}, **block["top"]}
    shared = next((value[level] for level in given if level != "source"), 1.0)
    own = value[given[0]] if given else 1.0
    for name in (UP.format(0), UP.format(3), EMBEDDING, NORM, HEAD):
        assert weights(recipe, name) == [own, shared]


@pytest.mark.parametrize("given", [LEVELS[first:] for first in range(1, 5)])
def test_a_global_number_is_never_a_sources(models: tuple[str, str], given: tuple[str, ...]) -> None:
    """Slice, module, top, default; what stands in a source has no effect."""
    value = {"slice": 0.2, "module": 0.3, "top": 0.4}
    block = {level: {"parameters": {"lambda": value[level]}} if level in given else {} for level in LEVELS[1:]}
    sources = [{"model": path, "layer_range": [0, 4], "parameters": {"lambda": 9.0}} for path in models]
    piece = {"sources": sources, **block["slice"]}
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": models[0],
        "modules": {"default": {"slices": [piece], **block["module"]}},
        **block["top"],
    }
    assert lambdas(recipe, [UP.format(1), HEAD]) == [value[given[0]] if given else 1.0] * 2


def test_each_model_of_the_models_form_has_its_own_number(models: tuple[str, str]) -> None:
    """Where one gives none, the top does."""
    recipe = {
        "merge_method": "linear",
        "models": [{"model": models[0], "parameters": {"weight": 0.7}}, {"model": models[1]}],
        "parameters": {"weight": 0.2},
    }
    assert weights(recipe) == [0.7, 0.2]


def test_a_level_whose_filters_do_not_match_passes_to_the_next(models: tuple[str, str]) -> None:
    """The first matching rule of the nearest level that has one; a rule without filter or with * matches all."""
    recipe = {
        "merge_method": "linear",
        "models": [
            {"model": models[0], "parameters": {"weight": [{"filter": "mlp", "value": 0.1}]}},
            {"model": models[1], "parameters": {"weight": [{"filter": "*", "value": 0.9}]}},
        ],
        "parameters": {
            "weight": [{"filter": "self_attn", "value": 0.2}, {"filter": "q_proj", "value": 5}, {"value": 0.3}]
        },
    }
    assert weights(recipe, UP.format(2)) == [0.1, 0.9]
    assert weights(recipe, "model.layers.2.self_attn.q_proj.weight") == [0.2, 0.9]
    assert weights(recipe, NORM) == [0.3, 0.9]


def test_filters_are_substrings_with_their_case(models: tuple[str, str]) -> None:
    """`MLP` is nowhere in a name; `layers.1.` is."""
    rules = [{"filter": "MLP", "value": 1}, {"filter": "layers.1.", "value": 2}, {"value": 3}]
    recipe = {"merge_method": "linear", "models": [{"model": models[0]}], "parameters": {"weight": rules}}
    assert [weights(recipe, UP.format(layer)) for layer in (0, 1)] == [[3], [2]]


def test_filters_see_input_names_for_weights_and_output_names_for_global_numbers(models: tuple[str, str]) -> None:
    """In a stack a layer has another number in the output than in its model."""
    base, other = models
    sources = [{"model": base, "layer_range": [2, 4]}, {"model": other, "layer_range": [1, 3]}]
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": base,
        "slices": [{"sources": sources}],
        "parameters": {
            "weight": [{"filter": "layers.1.", "value": 0.1}, {"filter": "layers.2.", "value": 0.2}, {"value": 0.5}],
            "lambda": [{"filter": "layers.0.", "value": 0.6}, {"filter": "layers.1.", "value": 0.7}, {"value": 0.8}],
        },
    }
    assert [weights(recipe, UP.format(layer)) for layer in (0, 1)] == [[0.1], [0.2]]
    assert lambdas(recipe, [UP.format(0), UP.format(1), NORM]) == [0.6, 0.7, 0.8]


def test_a_gradient_runs_from_the_first_layer_to_the_last(models: tuple[str, str]) -> None:
    """Evenly, through all its values; embedding, norm and head take the first one."""
    recipe = {
        "merge_method": "linear",
        "models": [{"model": models[0], "parameters": {"weight": [1, 0, 4]}}, {"model": models[1]}],
    }
    found = [weights(recipe, UP.format(layer))[0] for layer in range(4)]
    assert found == pytest.approx([1, 1 / 3, 4 / 3, 4])
    assert [weights(recipe, name)[0] for name in (EMBEDDING, NORM, HEAD)] == [1, 1, 1]


def test_a_gradient_starts_anew_in_each_slice(models: tuple[str, str]) -> None:
    """And a slice of one layer takes its last value."""
    ranges = [(0, 3), (1, 2), (2, 4)]
    slices = [{"sources": [{"model": models[0], "layer_range": list(of)}]} for of in ranges]
    recipe = {"merge_method": "linear", "slices": slices, "parameters": {"weight": [1, 3]}}
    assert [weights(recipe, UP.format(layer))[0] for layer in range(6)] == [1, 2, 3, 3, 1, 3]
    assert [weights(recipe, name)[0] for name in (EMBEDDING, NORM, HEAD)] == [1, 1, 1]


def test_a_gradient_behind_a_filter_runs_over_the_slices_layers(models: tuple[str, str]) -> None:
    """SLERP's usual recipe: attention one way, the rest the other way."""
    recipe = {
        "merge_method": "slerp",
        "base_model": models[0],
        "models": [{"model": models[0]}, {"model": models[1]}],
        "parameters": {
            "t": [{"filter": "self_attn", "value": [0, 1]}, {"filter": "mlp", "value": [1, 0]}, {"value": 0.5}]
        },
    }
    found = jobs(yaml.safe_dump(recipe))
    attention = [found[f"model.layers.{layer}.self_attn.q_proj.weight"].settings["t"] for layer in range(4)]
    assert attention == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert [found[UP.format(layer)].settings["t"] for layer in range(4)] == pytest.approx([1, 2 / 3, 1 / 3, 0])
    norms = ["model.layers.3.input_layernorm.weight", EMBEDDING, NORM, HEAD]
    assert [found[name].settings["t"] for name in norms] == [0.5] * 4


def test_embedding_takes_the_first_slices_numbers_and_head_the_last_ones(models: tuple[str, str]) -> None:
    """They are made with the slice beside them."""
    slices = [
        {"sources": [{"model": models[0], "layer_range": [0, 2]}], "parameters": {"weight": 0.25}},
        {"sources": [{"model": models[1], "layer_range": [2, 4]}], "parameters": {"weight": 0.75}},
    ]
    recipe = {"merge_method": "linear", "slices": slices}
    assert [weights(recipe, name) for name in (EMBEDDING, NORM, HEAD)] == [[0.25], [0.75], [0.75]]


def test_the_base_model_has_no_weight_where_it_is_subtracted(models: tuple[str, str]) -> None:
    """Its place is the job's base; where it is one of the models, it has one, and comes first for SLERP."""
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": models[1],
        "models": [{"model": models[0], "parameters": {"weight": 0.7}}],
    }
    job = jobs(yaml.safe_dump(recipe))[HEAD]
    assert [(entry.model, entry.settings["weight"]) for entry in job.inputs] == [(0, 0.7)]
    assert job.base is not None
    assert (job.base.model, job.base.settings) == (1, {})
    slerp = {
        "merge_method": "slerp",
        "base_model": models[1],
        "models": [{"model": models[0]}, {"model": models[1]}],
        "parameters": {"t": 0.5},
    }
    assert [entry.model for entry in jobs(yaml.safe_dump(slerp))[HEAD].inputs] == [1, 0]


def test_a_number_that_is_needed_and_missing_for_some_tensors_is_told_with_one_of_them(models: tuple[str, str]) -> None:
    """A list of filters alone leaves the rest without a value."""
    recipe = {
        "merge_method": "slerp",
        "base_model": models[0],
        "models": [{"model": models[0]}, {"model": models[1]}],
        "parameters": {"t": [{"filter": "mlp", "value": 0.5}]},
    }
    with pytest.raises(RecipeError) as caught:
        jobs(yaml.safe_dump(recipe))
    (problem,) = caught.value.problems
    assert problem.what == f"slerp needs t, and no rule gives one for {EMBEDDING}"
    assert problem.hint == "end the list with a value that has no filter"


def test_numbers_that_cannot_be_meant_together_are_told(models: tuple[str, str]) -> None:
    """Weights whose sum is zero, in the one layer where they are."""
    recipe = {
        "merge_method": "linear",
        "models": [
            {"model": models[0], "parameters": {"weight": [3, 0]}},
            {"model": models[1], "parameters": {"weight": -1}},
        ],
    }
    with pytest.raises(RecipeError, match=r"model\.layers\.2\..*the weights 1, -1 sum to zero"):
        jobs(yaml.safe_dump(recipe))
