"""What is left open in a recipe: which values, how they are drawn from, and the recipe that a drawing makes."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import yaml
from jsonschema import Draft202012Validator

from merger.errors import RecipeError
from merger.methods.registry import Method
from merger.recipe.model import Recipe
from merger.recipe.parse import parse
from merger.recipe.schema import schema

RECIPE = """
base_model: org/base
merge_method: {search: [ties, dare_ties]}
slices:
  - sources:
      - model: org/a
        layer_range: {search: [[0, 8], [4, 12]]}
        parameters:
          weight: {search: [0, 2], sum: 1}
          density: {search: [0.1, 1], log: true, name: kept}
      - model: org/b
        layer_range: [0, {search: [8, 8.5], step: 8}]
        parameters:
          weight: {search: [0, 2], sum: 1}
          density:
            - {filter: mlp, value: {search: [0.25, 1], step: 0.25, anchors: 3, start: 1}}
            - value: {search: kept}
      - {model: org/base, layer_range: [0, 8]}
search:
  objectives: [{loss: ./search.txt, limit: 10}]
  report: [{loss: ./report.txt}]
"""


def searched(values: str, text: str = "linear") -> str:
    """A recipe of two models with a setting of the first one's weight."""
    return f"""
merge_method: {text}
models:
  - {{model: ./a, parameters: {{weight: {values}}}}}
  - {{model: ./b, parameters: {{weight: 1}}}}
search: {{objectives: [{{loss: ./a.txt}}], report: [{{loss: ./b.txt}}]}}
"""


def weights(recipe: Recipe) -> list[tuple[float, ...]]:
    """The values of each model's weight."""
    return [source.parameters["weight"].rules[0].values for source in recipe.slices[0].sources]


@pytest.mark.parametrize(
    ("hole", "drawn", "values"),
    [
        ("{search: [0, 1.2]}", [0.123456], (0.1235,)),
        ("{search: [0.12344, 1]}", [0.123441], (0.12344,)),
        ("{search: [0, 1], start: 0.25}", None, (0.25,)),
        ("{search: [0, 1]}", None, (0.5,)),
        ("{search: [0.01, 1], log: true}", None, (0.1,)),
        ("{search: [0, 1], anchors: 3}", [0, 0.5, 1], (0, 0.5, 1)),
        ("[{search: [0, 1]}, 0.5, {search: [0, 1]}]", [0.1, 0.2], (0.1, 0.5, 0.2)),
        ("{search: [0.5, 1, 2]}", ["2"], (2,)),
        ("{search: [[0, 1], [1, 0]]}", ["[1, 0]"], (1, 0)),
        ("{search: [0, 1], step: 0.3}", [0.9], (0.9,)),
        ("{value: {search: [0, 1]}, filter: mlp}", [1], (1,)),
    ],
)
def test_a_hole_is_filled(
    table: Mapping[str, Method], hole: str, drawn: list[float | str] | None, values: tuple[float, ...]
) -> None:
    """Numbers, gradients, rules and choices stand where they were searched; without a drawing it is the start."""
    text = searched(hole)
    search = parse(text, "r.yaml", table).search
    assert search is not None
    given = search.start if drawn is None else dict(zip(search.variables, drawn, strict=True))
    made = parse(text, "r.yaml", table, given)
    assert made.search is None
    assert weights(made) == [values, (1,)]


def test_all_places_are_found(table: Mapping[str, Method]) -> None:
    """Methods, layers and parameters, each by its place; sums and ties hold, and a step ends inside of its range."""
    with pytest.raises(RecipeError, match=r"\[8, 8.5\]|0.5"):
        parse(RECIPE, "r.yaml", table)
    text = RECIPE.replace("[8, 8.5]", "[8, 17]").replace("[4, 12]", "[2, 10]")
    with pytest.raises(RecipeError, match="must be equally long"):
        parse(text, "r.yaml", table)
    text = text.replace("{search: [8, 17], step: 8}", "8")
    search = parse(text, "r.yaml", table).search
    assert search is not None
    assert list(search.variables) == [
        "merge_method",
        "slices[0].sources[org/a].layer_range",
        "slices[0].sources[org/a].weight",
        "kept",
        "slices[0].sources[org/b].weight",
        *(f"slices[0].sources[org/b].density[0].value[{anchor}]" for anchor in range(3)),
    ]
    drawn = dict(zip(search.variables, ["dare_ties", "[2, 10]", 1.5, 0.33333, 0.5, 0.25, 0.5, 1], strict=True))
    piece = parse(text, "r.yaml", table, drawn).slices[0]
    one, two, _ = piece.sources
    assert (piece.method, one.layer_range) == ("dare_ties", (2, 10))
    assert [source.parameters["weight"].rules[0].values for source in (one, two)] == [(0.75,), (0.25,)]
    assert [rule.values for rule in two.parameters["density"].rules] == [(0.25, 0.5, 1), (0.3333,)]
    assert one.parameters["density"].rules[0].values == (0.3333,)


def test_a_sum_is_kept_whatever_is_drawn(table: Mapping[str, Method]) -> None:
    """Numbers of one sum are divided by their own; where all are 0 they are alike."""
    text = searched("{search: [0, 1], sum: 1}").replace("weight: 1}", "weight: {search: [0, 1], sum: 1}}")
    search = parse(text, "r.yaml", table).search
    assert search is not None
    for drawn, expected in (((0, 0), [0.5, 0.5]), ((0.5, 1), [0.3333, 0.6667]), ((0, 1), [0, 1])):
        settled = search.settle(dict(zip(search.variables, drawn, strict=True)))
        assert list(settled.values()) == expected


def test_what_an_alias_stands_for_is_searched_once(table: Mapping[str, Method]) -> None:
    """An anchor on a searched number ties all places that stand for it."""
    text = searched("&w {search: [0, 1]}").replace("weight: 1}", "weight: *w}")
    search = parse(text, "r.yaml", table).search
    assert search is not None
    assert weights(parse(text, "r.yaml", table, {"models[a].weight": 0.25})) == [(0.25,), (0.25,)]


def test_words_of_the_language_may_be_called_search(table: Mapping[str, Method]) -> None:
    """A token and a module of that name are none."""
    text = "merge_method: linear\nmodules: {search: {models: [{model: ./a, parameters: {weight: 1}}]}}\n"
    assert parse(text + "tokenizer: {tokens: {search: {source: ./a}}}\n", "r.yaml", table).search is None


@pytest.mark.parametrize("text", [RECIPE, searched("{search: [0, 1]}")])
def test_searched_recipes_are_valid(table: Mapping[str, Method], text: str) -> None:
    """Editors underline nothing of them, and an objective that is none."""
    validator, content = Draft202012Validator(schema(table)), yaml.safe_load(text)
    validator.validate(content)
    content["search"]["objectives"][0]["los"] = "./a.txt"
    assert not validator.is_valid(content)
