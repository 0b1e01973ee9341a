"""The lock file: what is written is what is read, and what is no lock file is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from merger.errors import RecipeError
from merger.lock.lock import Pin
from merger.lock.locked import LockedRecipe
from merger.lock.parents import Parent
from merger.planning.lockfile import Lock, changed_models, other_plan, read_lock
from merger.stores.ports import FileInfo, Located

from .models import locked, model, planned

SOME = FileInfo(12, "ab" * 32)
LOCK = Lock(
    plan="1" * 64, identity="2" * 64, seed=7, shard_bytes=5_000, made_with={"hub-merger": "0.0.1"},
    recipe="merge_method: linear\n", output={"model.safetensors": SOME, "config.json": FileInfo(3)},
    models=(Parent("org/a@main", "1f" * 20, "mit", {"model.safetensors": SOME}), Parent("folder", None, None, {})),
)  # fmt: skip


def held(recipe: LockedRecipe, **files: FileInfo) -> Lock:
    """A lock of the recipe's models, of folders; the first one with these files."""
    first, *others = (item.name for item in recipe.models)
    parents = (Parent(first, None, None, files), *(Parent(name, None, None, {}) for name in others))
    return Lock(**{**vars(LOCK), "models": parents})


def unread(model: Located, file: str) -> str:
    """Nobody asks for a checksum that is not needed."""
    raise AssertionError(file)


@given(st.text(st.characters(codec="utf-8")))
def test_what_is_written_is_read_again(recipe: str) -> None:
    """Whatever stands in the recipe."""
    lock = Lock(**{**vars(LOCK), "recipe": recipe})
    assert read_lock(lock.text(), "merger.lock.yaml") == lock


def test_it_is_readable_by_people() -> None:
    """The recipe stands there line by line; a checksum that is not known is null."""
    text = Lock(**{**vars(LOCK), "recipe": "# mine\nmerge_method: linear\nmodels: []\n"}).text()
    assert text.endswith("recipe: |\n  # mine\n  merge_method: linear\n  models: []\n")
    assert "- file: config.json\n  size: 3\n  sha256: null\n" in text
    assert read_lock(text, "x").pins == {"org/a@main": Pin("1f" * 20)}


@pytest.mark.parametrize(
    "text",
    ["", "[]", "7", "a: [", "\x00", "[" * 100_000, "plan: 1", "models: {a: b}\nrecipe: a\n", *(
        yaml.safe_dump(yaml.safe_load(LOCK.text()) | change)
        for change in (
            {"seed": "7"}, {"seed": True}, {"shard_size": 1.5}, {"models": {}}, {"output": {"a": 1}}, {"recipe": None},
            {"models": [{"model": "a", "commit": "main", "licence": None, "files": []}]}, {"made_with": []},
            {"output": [{"file": "a", "size": 1, "sha256": "../a"}]}, {"output": [{"file": 1, "size": 1}]},
        )
    )],
)  # fmt: skip
def test_what_is_no_lock_file_is_refused(text: str) -> None:
    """Whatever else it is."""
    with pytest.raises(RecipeError, match=r"^mine\.lock\.yaml is no lock file\n    take the merger\.lock\.yaml"):
        read_lock(text, "mine.lock.yaml")


def test_a_lock_from_before_they_held_a_recipe_is_told_from_no_lock() -> None:
    """Its commits can still be used, beside the recipe."""
    content = yaml.safe_load(LOCK.text())
    del content["recipe"]
    with pytest.raises(
        RecipeError, match=r"^old\.lock\.yaml holds no recipe: an earlier version .*\n    run the recipe"
    ):
        read_lock(yaml.safe_dump(content), "old.lock.yaml")


@pytest.mark.parametrize(
    ("info", "said"),
    [
        (FileInfo(1), "has 11 bytes, the lock says 1"),
        (FileInfo(11, "cd" * 32), f"is another file: its SHA-256 is {'ab' * 32}, the lock says {'cd' * 32}"),
        (FileInfo(11, "ab" * 32), None),
        (FileInfo(11), None),
    ],
)
def test_a_file_that_is_another_one_is_told(info: FileInfo, said: str | None, tmp_path: Path) -> None:
    """By its size, and by its checksum where the lock has one; else nothing is read for it."""
    recipe = locked(f"merge_method: linear\nmodels: [{{model: {model(tmp_path / 'one')}}}]")
    (tmp_path / "one/tokenizer.json").write_text("some words.")
    recipe = locked(recipe.recipe.text)
    lock = held(recipe, **{"tokenizer.json": info, "README.md": FileInfo(5)})
    problems = changed_models(recipe, lock, (lambda *_: "ab" * 32) if info.sha256 else unread)
    assert [problem.what for problem in problems] == ([] if said is None else [f"one: tokenizer.json {said}"])
    assert all(problem.hint == f"bring back the model as it was: {tmp_path / 'one'}" for problem in problems)


def test_a_missing_file_and_a_model_that_was_on_the_hub_are_told(tmp_path: Path) -> None:
    """And a lock whose list of models is not that of its recipe."""
    recipe = locked(f"merge_method: linear\nmodels: [{{model: {model(tmp_path / 'one')}}}]")
    missing = held(recipe, **{"tokenizer.json": SOME})
    on_hub = Lock(**{**vars(missing), "models": LOCK.models[:1]})
    said = [[problem.what for problem in changed_models(recipe, lock, unread)] for lock in (missing, on_hub, LOCK)]
    assert said == [
        ["one: tokenizer.json is not there"],
        ["org/a@main is a folder now, and was not then"],
        ["the lock lists other models than its recipe names"],
    ]


def test_another_plan_is_told_with_the_versions(tmp_path: Path) -> None:
    """The lock was changed, or another version plans otherwise: both are said where both may be."""
    plan = planned(f"merge_method: linear\nmodels: [{{model: {model(tmp_path / 'one')}}}]")
    (problem,) = other_plan(plan, LOCK)
    assert problem.what.endswith(f"the plan {plan.hash[:16]}")
    assert problem.hint is not None
    assert "it was 0.0.1 that made it" in problem.hint
    assert other_plan(plan, Lock(**{**vars(LOCK), "plan": plan.hash})) == []
