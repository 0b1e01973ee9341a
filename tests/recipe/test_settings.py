"""What a setting is worth for one tensor at one layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merger.recipe.model import Parameters, Recipe, Rule, Setting, first_value

LAYER = "model.layers.3.mlp.up_proj.weight"


def setting(*rules: tuple[float, ...] | float | tuple[str, float]) -> Setting:
    """Rules from numbers, gradients and (filter, number) pairs."""
    return Setting(tuple(_rule(rule) for rule in rules))


def _rule(rule: tuple[float, ...] | float | tuple[str, float]) -> Rule:
    if not isinstance(rule, tuple):
        return Rule((rule,))
    head, *rest = rule
    return Rule((float(rest[0]),), head) if isinstance(head, str) else Rule((head, *map(float, rest)))


@pytest.mark.parametrize(("values", "position", "value"), [
    ((0, 0.5, 0.3, 0.7, 1), 0.0, 0.0), ((0, 0.5, 0.3, 0.7, 1), 0.125, 0.25), ((0, 0.5, 0.3, 0.7, 1), 0.25, 0.5),
    ((0, 0.5, 0.3, 0.7, 1), 0.5, 0.3), ((0, 0.5, 0.3, 0.7, 1), 1.0, 1.0), ((1, 0), 1 / 3, 2 / 3), ((7,), 0.4, 7.0),
])  # fmt: skip
def test_a_gradient_is_linear_between_its_values(values: tuple[float, ...], position: float, value: float) -> None:
    """The values stand evenly from a slice's first layer to its last, and between two of them it is a straight line."""
    assert setting(values).value_at(LAYER, position) == pytest.approx(value, abs=1e-15)


@given(values=st.lists(st.floats(-10, 10), min_size=1, max_size=6), position=st.floats(0, 1))
def test_a_gradient_stays_between_its_extremes(values: list[float], position: float) -> None:
    """A gradient begins with its first value, ends with its last and never leaves the range of its values."""
    rule = Rule(tuple(values))
    assert (rule.value_at(0.0), rule.value_at(1.0)) == (values[0], values[-1])
    assert min(values) - 1e-9 <= rule.value_at(position) <= max(values) + 1e-9


def test_the_first_rule_that_matches_counts() -> None:
    """Filters are tried in the recipe's order."""
    assert setting(("mlp", 0.1), ("up_proj", 0.2), 0.3).value_at(LAYER, 0.0) == 0.1
    assert setting(0.3, ("mlp", 0.1)).value_at(LAYER, 0.0) == 0.3


@pytest.mark.parametrize(("word", "matches"), [("mlp", True), ("MLP", False), ("layers.3.", True), ("m*p", False)])
def test_a_filter_is_a_part_of_the_name(word: str, matches: bool) -> None:
    """A filter is a plain part of the tensor's name, case and all; only a lone * means every tensor."""
    assert Rule((1.0,), word).matches(LAYER) is matches
    assert Rule((1.0,), "*").matches(LAYER)
    assert Rule((1.0,)).matches(LAYER)


def test_no_rule_no_value() -> None:
    """A setting that says nothing about a tensor has no value for it."""
    assert setting(("self_attn", 0.5)).value_at(LAYER, 0.0) is None


def test_the_nearest_level_counts() -> None:
    """Source, slice, module, top: the first that speaks about the tensor gives the value."""
    levels: tuple[Parameters, ...] = tuple({"t": setting(value)} for value in (0.1, 0.2, 0.3, 0.4))
    for first in range(4):
        assert first_value(levels[first:], "t", LAYER, 0.0) == pytest.approx(0.1 + 0.1 * first)
    assert first_value((), "t", LAYER, 0.0) is None


def test_a_level_that_does_not_match_is_passed_over() -> None:
    """A setting whose filters all miss falls through to the next level, and at last to nothing: the default."""
    levels: tuple[Parameters, ...] = (
        {"t": setting(("self_attn", 0.1))},
        {"u": setting(1)},
        {"t": setting(("mlp", 0.2))},
    )
    assert first_value(levels, "t", LAYER, 0.0) == 0.2
    assert first_value(levels[:2], "t", LAYER, 0.0) is None


FOUR_LEVELS = """
merge_method: passthrough
parameters: {scale: 4}
modules:
  text:
    parameters: {scale: [{filter: norm, value: 3}]}
    slices:
      - parameters: {scale: {filter: attn, value: 2}}
        sources:
          - model: org/a
            layer_range: [0, 2]
            parameters: {scale: [{filter: mlp, value: [1, 0]}]}
"""


@pytest.mark.parametrize(
    ("tensor", "position", "value"),
    [("mlp", 0.0, 1.0), ("mlp", 0.5, 0.5), ("attn", 0.5, 2.0), ("norm", 0.5, 3.0), ("lm_head", 0.0, 4.0)],
)
def test_the_levels_of_a_recipe(read: Callable[[str], Recipe], tensor: str, position: float, value: float) -> None:
    """A recipe's source, slice, module and top settings are kept apart, so that each tensor finds its own."""
    recipe = read(FOUR_LEVELS)
    module = recipe.modules[0]
    piece = module.slices[0]
    levels = (piece.sources[0].parameters, piece.parameters, module.parameters, recipe.parameters)
    assert first_value(levels, "scale", tensor, position) == value


@pytest.mark.parametrize(("written", "values"), [
    ("0.5", (0.5,)), ("true", (1.0,)), ("off", (0.0,)), ("1e-10", (1e-10,)), ("'2'", (2.0,)),
    ("[0, 1e-3, yes]", (0.0, 0.001, 1.0)), ("{value: [1, 2]}", (1.0, 2.0)), ("[{value: 3, filter: }]", (3.0,)),
])  # fmt: skip
def test_the_ways_to_write_a_number(read: Callable[[str], Recipe], written: str, values: tuple[float, ...]) -> None:
    """Booleans are 1 and 0, numbers may stand in quotes, and one {value, filter} map needs no list around it."""
    recipe = read(f"merge_method: passthrough\nmodels: [{{model: org/a}}]\nparameters:\n  scale: {written}\n")
    assert recipe.parameters["scale"].rules[0].values == values
