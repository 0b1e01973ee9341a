"""What comes out of a study: recipes that are the user's own but for what was found, tables, and pictures."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest
from thorough import THOROUGH

from merger.methods.registry import methods
from merger.recipe.parse import parse
from merger.recipe.searched import Values
from merger.searching.outcome import filled_text, pictures_of, table_text
from merger.searching.trials import Aims

from .test_study import TWO, hill, run, searched, two

BLOCK = """\
# mine
merge_method: {search: [linear, ties]}  # the method
base_model: ./base
search:
  objectives:
    - loss: ./search.txt
  report:
    - loss: ./report.txt  # another
  trials: 3
models:
  - model: ./a
    parameters:
      weight: &w {search: [0.00001, 1], log: true}   # how much
  - model: ./b
    parameters:
      weight: *w
      density:
        search: [0, 1]
        anchors: 2
        # of layers
      normalize: {search: [true, false]}
seed: 3
"""
BLOCK_FOUND = """\
# found
# mine
merge_method: ties  # the method
base_model: ./base
models:
  - model: ./a
    parameters:
      weight: &w 0.00002   # how much
  - model: ./b
    parameters:
      weight: *w
      density:
        [0.25, 1]
        # of layers
      normalize: false
seed: 3
"""
FLOW = """{merge_method: linear, models: [{model: ./a, parameters: {weight: {search: [0, 1]}}},
  {model: ./b, parameters: {weight: 1}}], search: {objectives: [{loss: ./a.txt}]}}
"""
FLOW_FOUND = """# found
{merge_method: linear, models: [{model: ./a, parameters: {weight: 0.5}},
  {model: ./b, parameters: {weight: 1}}]}
"""
STAGES = """\
name: first
merge_method: linear
models:
  - {model: ./a, parameters: {weight: {search: [0, 1]}}}
  - {model: ./b, parameters: {weight: 1}}
---
search: {objectives: [{loss: ./a.txt}]}
merge_method: linear
models:
  - {model: first, parameters: {weight: 1}}
  - {model: ./c, parameters: {weight: {search: [0, 1], step: 0.25}}}
"""
STAGES_FOUND = """\
# found
name: first
merge_method: linear
models:
  - {model: ./a, parameters: {weight: 1}}
  - {model: ./b, parameters: {weight: 1}}
---
merge_method: linear
models:
  - {model: first, parameters: {weight: 1}}
  - {model: ./c, parameters: {weight: 0.75}}
"""
CASES: dict[str, tuple[str, list[float | str], str]] = {
    "block": (BLOCK, ["ties", 0.00002, 0.25, 1, "false"], BLOCK_FOUND),
    "flow": (FLOW, [0.5], FLOW_FOUND),
    "flow, the block first": (
        FLOW.replace(", search: {objectives: [{loss: ./a.txt}]}", "").replace(
            "{merge", "{search: {objectives: [{loss: ./a.txt}]}, merge"
        ),
        [0.5],
        FLOW_FOUND,
    ),
    "stages": (STAGES, [1.0, 0.75], STAGES_FOUND),
    "a mark of the file's encoding": ("\ufeff" + FLOW, [0.5], FLOW_FOUND),
}


@pytest.mark.parametrize("case", CASES)
def test_the_found_recipe_is_the_users_own(case: str) -> None:
    """All but holes and block is as it was, comments too; and it means what was tried."""
    text, drawn, expected = CASES[case]
    found = parse(text, "r.yaml", methods()).search
    assert found is not None
    values: Values = dict(zip(found.variables, drawn, strict=True))
    written = filled_text(text, found, values, "found")
    assert written == expected
    tried, made = (
        [replace(document, text="", stages=()) for document in recipe.documents]
        for recipe in (parse(text, "r.yaml", methods(), values), parse(written, "r.yaml", methods()))
    )
    assert tried == made


def test_the_table_has_a_line_for_each_trial() -> None:
    """With what the recipe had, not what was drawn; a failed one has its reason, and no score."""
    work, _ = run(
        searched(trials=5), lambda values, step: [float("nan")] if values["merge_method"] == "linear" else hill(values)
    )
    rows = list(csv.DictReader(table_text(work.trials(), work.aims).splitlines()))
    assert [row["trial"] for row in rows] == ["0", "1", "2", "3", "4"]
    for row, trial in zip(rows, work.trials(), strict=True):
        assert float(row["models[a].weight"]) == work.searched.settle(trial.drawn)["models[a].weight"]
        assert (row["state"] == "failed") == (row["merge_method"] == "linear") == (row["loss of search.txt"] == "")
        assert (row["why"] == "the scores are nan") == (row["state"] == "failed")


@pytest.mark.parametrize(
    ("objectives", "judge", "higher", "names"),
    [
        ("{loss: ./search.txt}", hill, (False,), ["search-progress", "search-importance", "search-slices"]),
        (TWO, two, (False, True), ["search-front", "search-importance", "search-slices"]),
    ],
)
def test_a_study_is_drawn(objectives: str, judge: object, higher: tuple[bool, ...], names: list[str]) -> None:
    """The best so far or the front, what matters, and slices; nothing is drawn of nothing."""
    work, _ = run(searched(objectives, trials=12), judge, higher)  # type: ignore[arg-type]
    importance = work.importance()
    assert set(importance) == set(work.searched.variables)
    found = pictures_of(work.trials(), work.aims, importance)
    assert [picture.name for picture in found] == names
    for picture in found if THOROUGH else found[2:]:
        assert picture.files[picture.place].startswith(b"\x89PNG")
    assert pictures_of([], Aims(work.searched, higher), {}) == []
