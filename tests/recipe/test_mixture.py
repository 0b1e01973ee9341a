"""Recipes of mixtures of experts: what they mean, and what is likely not meant. Mistakes stand in errors/."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from merger.errors import Span
from merger.methods.registry import Method
from merger.recipe.model import Expert, Mixture, ModelRef, Recipe
from merger.recipe.parse import parse

from .conftest import HERE
from .test_parse import MIXTURES, warnings

Read = Callable[[str], Recipe]

WHOLE = """\
merge_method: moe
base_model: org/base
gate_mode: hidden_avg
experts_per_token: 1
architecture: Qwen
experts:
  - source_model: org/a@v1
    positive_prompts: [one, "2"]
    negative_prompts: [three]
    noise_scale: 1e-2
    residual_scale: 0.5
  - {source_model: org/b, positive_prompts: [three]}
shared_experts:
  - {source_model: org/base, positive_prompts: [all]}
dtype: float32
out_dtype: bfloat16
seed: 3
publish: {repo: org/mixture}
"""


def test_every_key_is_read(read: Read) -> None:
    """A mixture keeps its experts, their prompts and numbers, its router and its layout, and what all recipes have."""
    recipe = read(WHOLE)
    assert recipe.mixture == Mixture(
        experts=(
            Expert(ModelRef("org/a", "v1"), ("one", "2"), ("three",), 0.01, 0.5),
            Expert(ModelRef("org/b"), ("three",)),
        ),
        shared_experts=(Expert(ModelRef("org/base"), ("all",)),),
        gate_mode="hidden_avg",
        experts_per_token=1,
        architecture="Qwen",
    )
    assert (recipe.dtype, recipe.seed, recipe.publish.repo) == ("bfloat16", 3, "org/mixture")
    assert (recipe.modules, recipe.warnings) == ((), ())


def test_models_and_places(read: Read) -> None:
    """The models are the experts', the shared one's and the base model, once each; refusals can point at them."""
    recipe = read(WHOLE)
    assert [str(model) for model in recipe.models] == ["org/a@v1", "org/b", "org/base"]
    assert str(recipe.config_model) == "org/base"
    assert recipe.mixture is not None
    assert recipe.mixture.experts[0].at == Span("mine.yaml", 7, 5)
    assert recipe.mixture.gate_mode_at == Span("mine.yaml", 3, 12)
    assert recipe.mixture.architecture_at == Span("mine.yaml", 5, 15)


def test_the_merge_method_may_be_left_out(read: Read) -> None:
    """A recipe of mergekit-moe has no merge_method, and means the same."""
    assert read(WHOLE.replace("merge_method: moe\n", "")).mixture == read(WHOLE).mixture


@pytest.mark.parametrize("name", MIXTURES)
def test_published_mixtures_parse(table: Mapping[str, Method], name: str) -> None:
    """A mixture of the field means what it says, aliases written out."""
    recipe = parse((HERE / "wild" / f"{name}.yaml").read_text(), "wild.yaml", table)
    mixture = recipe.mixture
    assert mixture is not None
    found = [
        (str(expert.source_model), len(expert.positive_prompts), len(expert.negative_prompts))
        for expert in mixture.experts
    ]
    assert (str(recipe.base_model), mixture.gate_mode, found) == MIXTURES[name]


@pytest.mark.parametrize("mode", ["random", "uniform_random"])
def test_by_chance_no_prompts_are_needed(read: Read, mode: str) -> None:
    """Both random modes do without prompts, and prompts that are there all the same have no effect."""
    text = f"base_model: org/a\ngate_mode: {mode}\nexperts: [{{source_model: org/a}}, {{source_model: org/b}}]\n"
    assert read(text).warnings == ()
    told = warnings(read(text.replace("org/b", "org/b, positive_prompts: [x]")))
    what = "positive_prompts has no effect where the router is drawn by chance"
    assert told == [f"3:56: experts[org/b].positive_prompts: {what}"]


def test_equal_experts_are_warned_of(read: Read) -> None:
    """Upcycling is allowed, and called what it is, unless noise tells the experts apart."""
    text = "base_model: org/a\ngate_mode: random\nexperts: [{source_model: org/a}, {source_model: org/a}]\n"
    assert warnings(read(text)) == [
        "3:1: experts: all experts are org/a: the mixture is that model until it is trained"
    ]
    assert read(text.replace("org/a}]", "org/a, noise_scale: 0.01}]")).warnings == ()


def test_two_experts_of_the_same_prompts_are_warned_of(read: Read) -> None:
    """Some experts may share their prompts, though the router will not tell them apart."""
    told = warnings(
        read(
            "base_model: org/a\nexperts:\n"
            "  - {source_model: org/a, positive_prompts: [x]}\n"
            "  - {source_model: org/b, positive_prompts: [y]}\n"
            "  - {source_model: org/c, positive_prompts: [x]}\n"
        )
    )
    assert told == ["5:5: experts[org/c]: org/c has the prompts of org/a: the router cannot tell them apart"]
