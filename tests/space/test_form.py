"""The form's edits of a recipe's text: what is turned changes, and all else stays as it was written."""

from __future__ import annotations

from typing import Any

import pytest

from merger.methods.registry import START, methods
from space.page import form
from space.page.texts import examples, family_sentence, method_choices, zoo_repo
from space.work import admission

TEXT = """\
# mine
models:
  - model: org/a # the better one
    parameters:
      density: 0.5
  - model: "org/b@main"
merge_method: ties
base_model: org/base
parameters: {weight: 1, lambda: [0.2, 1.0]}
"""
TABLE = methods()


def changed(before: str, after: str) -> list[str]:
    """The lines that are new."""
    return [line for line in after.splitlines() if line not in before.splitlines()]


def test_reading() -> None:
    """The form shows method, models and values; a gradient is a curve."""
    shown = form.read_form(TEXT)
    assert shown is not None
    assert (shown.method, shown.base, shown.models) == ("ties", "org/base", ["org/a", "org/b@main"])
    assert shown.rows[0].settings["density"].numbers == (0.5,)
    assert shown.settings["lambda"].numbers == (0.2, 1.0)


def test_a_value_changes_its_line_alone() -> None:
    """A number goes where it stood, and comments stay."""
    density = TABLE["ties"].param("density")
    assert density is not None
    assert changed(TEXT, form.with_value(TEXT, 0, density, [0.25])) == ["      density: 0.25"]
    assert changed(TEXT, form.with_value(TEXT, 1, density, [0, 1])) == ["    parameters:", "      density: [0, 1]"][1:]


def test_models() -> None:
    """A model that is taken out goes with its parameters, a new one comes last, the others stay as they are."""
    text = form.with_models(TEXT, ["org/b@main", "org/c"])
    assert text.count("- model:") == 2
    assert '  - model: "org/b@main"\n  - model: org/c\n' in text
    assert "density" not in text


def test_a_method_takes_its_parameters_along() -> None:
    """What the new method has no use for goes, what it needs comes, so that the recipe stays well formed."""
    text = form.with_method(form.with_models(TEXT, ["org/a"]), TABLE["slerp"], TABLE)
    assert "density" not in text
    assert "lambda" not in text
    assert "t: 0.5" in text
    assert "# the better one" in text
    assert admission.check(text).problems == ()


def test_the_destination() -> None:
    """Publishing is a block of its own, which goes with the last of its keys."""
    text = form.with_publish(TEXT, "repo", "me/merged")
    assert text.endswith("publish:\n  repo: me/merged\n")
    text = form.with_publish(text, "private", True)
    assert text.endswith("  private: true\n")
    assert form.with_publish(form.with_publish(text, "private", False), "repo", "") == TEXT


@pytest.mark.parametrize(
    "text", ["a: [", "- a", "x", "a: 1\n---\nb: 2\n", "a: &a {<<: *a}\n", "# " + "x" * 20_000, "[" * 9_000]
)
def test_what_is_no_map_is_left_alone(text: str) -> None:
    """A text that the form cannot read is not touched by it."""
    assert form.read_form(text) is None
    assert form.with_text(text, "base_model", "org/b") == text


def test_strange_values_are_for_the_text() -> None:
    """Lists of filters are shown as curves and not turned, nor is what is searched; what is no number is not shown."""
    text = "parameters:\n  t: [{filter: mlp, value: [0, 1]}, {value: 0.5}]\n  x: many\n  y: [1, a]\n"
    text += "  z: {search: [0, 1]}\nmodels: [1, {model: 2}]\n"
    shown = form.read_form(text)
    assert shown is not None
    assert list(shown.settings) == ["t", "z"]
    assert shown.settings["t"].curves == {"mlp": (0.0, 1.0), "": (0.5,)}
    assert [each.is_simple for each in shown.settings.values()] == [False, False]
    assert shown.settings["z"].numbers == ()
    assert shown.rows == ()


@pytest.mark.parametrize("name", TABLE)
def test_every_method_begins_well(name: str) -> None:
    """Choosing any method in the first example leaves what a run takes, or says what is missing in its models."""
    text = form.with_method(next(iter(examples().values())), TABLE[name], TABLE)
    looked = admission.check(text)
    told = [problem.what for problem in looked.problems]
    needed = (" merges exactly ", "needs the base model", "asks for what was measured of ")
    assert all(any(words in what for words in needed) for what in told), told
    assert looked.warnings == ()


@pytest.mark.parametrize("title", examples())
def test_every_example_is_well_formed(title: str) -> None:
    """The recipes to begin with are without fault here."""
    assert admission.check(examples()[title]).problems == ()


def test_the_zoo_is_the_makers() -> None:
    """The first examples merge the small models that the command which publishes the Space puts beside it."""
    assert zoo_repo("maker", "kjv") == "maker/merger-zoo-kjv"
    assert "your-name/merger-zoo-kjv" in next(iter(examples().values()))
    assert "examples/zoo" not in "".join(examples().values())


def test_names_for_results() -> None:
    """A result is named after its models and method; what their names share is said once."""
    shown = form.read_form(TEXT.replace("org/a", "org/tiny-kjv").replace("org/b@main", "org/tiny-python"))
    assert shown is not None
    assert form.suggest_repo(shown, "me") == "me/tiny-kjv-python-ties"


def test_a_suggested_name_follows_the_recipe() -> None:
    """With other models or another method it is another, of whoever is signed in; a name somebody wrote stays."""
    first = form.with_destination(TEXT, "me")
    assert "repo: me/a-b-ties\n" in first
    linear = form.with_method(first, TABLE["linear"], TABLE)
    assert "repo: me/a-b-linear\n" in form.with_destination(linear, "me", first)
    assert "repo: you/a-b-ties\n" in form.with_destination(first, "you")
    written = form.with_publish(first, "repo", "me/mine")
    assert form.with_destination(form.with_method(written, TABLE["linear"], TABLE), "me", written).count("me/mine") == 1


def test_every_method_is_offered_once() -> None:
    """Where to begin stands first, and each has a sentence on its family."""
    offered = [name for _, name in method_choices()]
    assert sorted(offered) == sorted(TABLE)
    assert offered[: len(START)] == list(START)
    assert method_choices()[0][0] == "★ Linear · averages"
    assert all(map(family_sentence, TABLE.values()))


def test_numbers_that_are_typed() -> None:
    """Numbers may be written with commas, blanks or brackets; with anything else among them there are none."""
    assert form.parse_numbers("[0, 0.5,1]") == [0.0, 0.5, 1.0]
    for words in ("0, a", "nan", "1e999", "0, 1000001", "9" * 5000):
        assert form.parse_numbers(words) == []


@pytest.mark.parametrize("point", [None, "0.5", [1], float("nan"), float("inf"), 10**400, -1e7])
def test_what_is_no_number_of_a_recipe_changes_no_text(point: Any) -> None:
    """A field that was emptied, or a call that sends something else than the page's own fields do."""
    density = TABLE["ties"].param("density")
    assert density is not None
    assert form.with_value(TEXT, 0, density, [point]) == TEXT
    assert form.read_form(TEXT.replace("0.5", str(point))) is not None
