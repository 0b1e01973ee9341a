"""`merger init`: three questions, or options, become a recipe and a workflow. Not here: what recipes may say."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import yaml
from calls import called
from places import ROOT

from merger.methods.registry import methods
from merger.run.draft import Draft, schema_line
from merger.run.prepare import parse_text, read_recipe

MODELS = ("org/one", "org/two", "org/three")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and nobody at the keyboard."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    return tmp_path


def test_options_become_a_recipe_and_a_workflow(folder: Path) -> None:
    """Nothing is asked; the recipe is well formed as it stands, opens with its schema, and says where it goes."""
    said = called(["init", *MODELS[:2], "--method", "ties", "--base", "org/base", "--to", "hf://you/merged"])
    written = ["merges/merged.yaml", ".github/workflows/merge.yml"]
    assert (said.code, said.out) == (0, "".join(f"wrote {path}\n" for path in written))
    recipe = read_recipe(Path("merges/merged.yaml"))
    assert ([str(model) for model in recipe.models], recipe.publish.repo) == ([*MODELS[:2], "org/base"], "you/merged")
    assert recipe.text.startswith(schema_line())
    assert recipe.warnings == ()
    assert Path(written[1]).read_bytes() == (ROOT / "examples" / "workflow.yml").read_bytes()


def test_what_is_not_given_is_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base only where the method wants one."""
    monkeypatch.setattr("sys.stdin", io.StringIO("org/one ./two\nlinear\n./out\n"))
    said = called(["init"])
    assert said.code == 0, said.err
    assert said.out.count("\n> ") == 3
    recipe = read_recipe(Path("merges/out.yaml"))
    assert [str(model) for model in recipe.models] == ["org/one", "./two"]
    assert recipe.publish.repo is None


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "merger init asks, and nobody answers"),
        (["org/one", "org/two", "--method", "tie", "--to", "./out"], "did you mean 'ties'?"),
        (["org/one", "--method", "slerp", "--base", "org/one", "--to", "./out"], "merges/out.yaml:"),
        (["org/one", "org/two", "--method", "linear", "--to", "./there"], "merges/there.yaml is there already"),
    ],
)
def test_what_makes_no_recipe_is_refused_and_nothing_is_written(words: list[str], told: str, folder: Path) -> None:
    """With exit code 2; a file that is there stays as it is."""
    (folder / "merges").mkdir()
    (folder / "merges" / "there.yaml").write_text("mine\n")
    said = called(["init", *words])
    assert (said.code, told in said.err) == (2, True), said.err
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["there.yaml"]
    assert (folder / "merges" / "there.yaml").read_text() == "mine\n"


@pytest.mark.parametrize("method", [name for name in methods() if name != "passthrough"])
def test_a_draft_of_each_method_is_well_formed(method: str) -> None:
    """For the models of its own template, with the parameters that this has; passthrough stacks slices."""
    template = yaml.safe_load((ROOT / "templates" / "recipes" / f"{method}.yaml").read_text("utf-8"))
    models = tuple(each["model"] for each in template["models"])
    recipe = parse_text(Draft(models, method, "hf://you/merged", template.get("base_model")).text, method)
    assert recipe.warnings == ()
    assert {piece.method for piece in recipe.slices} == {method}
