"""What a repo may be called: one rule wherever a destination is named, and the Hub's own client never knows better."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from hypothesis import given, settings
from hypothesis import strategies as st

from merger.cli.commands import main
from merger.errors import MergerError, RecipeError
from merger.run.options import Options, destination
from merger.run.prepare import parse_text
from merger.safety.names import is_repo, parse_name
from space.page import form
from space.page.form import Form, ModelRow

NONE = [
    "alice/..", "alice/.", "../alice", "alice/a..b", "alice/a--b", "alice/-a", "alice/a-", "alice/.a", "alice/a.",
    "alice/a.git", "alice", "alice/", "/a", "alice/a/b", "alice/a b", "alice/a\n", "alice/ä", "alice/" + 97 * "a",
    97 * "a" + "/a", "al--ice/a", "-alice/a", "alice-/a", "datasets/a", "spaces/a", "models/a", "buckets/a",
    "kernels/a", "alice/a@main", "alice/%2e%2e", "alice\\a", "~/a", "", "https://huggingface.co/alice", "https://example.org/alice/a",
]  # fmt: skip
SOME = ["a/b", "alice/merged-7b", "Al_ice/a.b_c-d", "0/0", f"{96 * 'a'}/{96 * 'a'}", "alice/agit", "alice/a.git.b"]
BODY = "merge_method: linear\nmodels:\n  - model: org/a\nparameters: {weight: 1}\npublish:\n  repo: "
letters = st.text("ab9._-/", min_size=1, max_size=9)
part = st.text("aZ0._-", min_size=1, max_size=6)


def is_known_to_the_client(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


@pytest.mark.parametrize("name", NONE)
def test_what_the_hub_does_not_take_is_no_name(name: str) -> None:
    """Nowhere: as an option, in a recipe (at its place), and as a command's (2)."""
    assert not is_repo(name)
    recipe = parse_text(BODY + "a/b", "r.yaml")
    with pytest.raises(RecipeError, match="is no repo's name on the Hub"):
        destination(recipe, Options(to=f"hf://{name}"))
    with pytest.raises(MergerError) as told:
        parse_text(BODY + (f'"{name}"' if "\n" not in name else '"alice/a\\n"').replace("\\a", "\\\\a"), "r.yaml")
    assert str(told.value).startswith("r.yaml:6:9: publish.repo: ")
    assert told.value.exit_code == 2


@pytest.mark.parametrize("command", ["plan", "run", "status", "clean"])
def test_every_command_refuses_such_a_destination(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the Hub is asked: there is none here."""
    folder = tiny.model(tmp_path / "model", 0)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"merge_method: passthrough\nmodels:\n  - model: {folder}\n")
    line = {"plan": [str(recipe), "--to"], "run": [str(recipe), "--to"]}.get(command, [])
    assert main([command, *line, "hf://alice/.."]) == 2
    assert "'alice/..' is no repo's name on the Hub" in capsys.readouterr().err


PAGES = {
    "https://huggingface.co/alice/a": "alice/a",
    "https://huggingface.co/alice/a/": "alice/a",
    " http://www.huggingface.co/alice/a?library=transformers ": "alice/a",
    "huggingface.co/alice/a#usage": "alice/a",
    "https://hf.co/alice/a": "alice/a",
    "https://huggingface.co/alice/a/tree/main": "alice/a@main",
    "https://huggingface.co/alice/a/tree/refs%2Fpr%2F3": "alice/a@refs/pr/3",
    "https://huggingface.co/alice/a/tree/v1/onnx/deep": "alice/a/onnx/deep@v1",
    "https://huggingface.co/alice/a/commit/0123abc": "alice/a@0123abc",
    "https://huggingface.co/alice/a/commits/main": "alice/a@main",
    "https://huggingface.co/alice/a/blob/main/config.json": "alice/a@main",
    "https://huggingface.co/alice/a/resolve/v1/x/a.safetensors?download=true": "alice/a/x/a.safetensors@v1",
    "https://huggingface.co/alice/a/discussions/3": "alice/a",
    "hf://alice/a@v1": "alice/a@v1",
}


@pytest.mark.parametrize("page", PAGES)
def test_a_pasted_address_names_its_model(page: str, tmp_path: Path) -> None:
    """The same in a recipe, for a model in any form; a destination is a repo, and nothing inside of it."""
    name = PAGES[page]
    assert parse_name(page) == name
    path, _, revision = name.partition("@")
    for form_of in (f'"{page}"', f'{{model: "{page}"}}', f'{{model: {{path: "{page}"}}}}'):
        recipe = parse_text(f"merge_method: passthrough\nmodels:\n  - model: {form_of}\n", "r.yaml")
        assert [(ref.path, ref.revision) for ref in recipe.models] == [(path, revision or None)]
    if page.split("://")[0] != "hf" and name.removesuffix("@main") == "alice/a":
        published = parse_text(f'{BODY}"{page}"', "r.yaml")
        assert published.publish.repo == "alice/a"
        assert destination(recipe, Options(to=page)) == "hf://alice/a"
    else:
        with pytest.raises(RecipeError, match="is no repo's name on the Hub"):
            destination(recipe, Options(to=page))


@pytest.mark.parametrize(
    "words",
    ["./alice/a", "alice/a", "/hf.co/alice/a", "https://example.org/alice/a", "https://huggingface.co/alice",
     "https://huggingface.co/datasets/alice/a", "https://huggingface.co/spaces/alice/a/tree/main"],
)  # fmt: skip
def test_what_is_no_address_of_a_model_stays_as_it_is(words: str) -> None:
    """Pages of other kinds, other hosts, folders, names."""
    assert parse_name(words) == words


@pytest.mark.parametrize("name", SOME)
def test_what_the_hub_takes_is_a_name(name: str) -> None:
    """Long ones and short ones."""
    assert is_repo(name)
    validate_repo_id(name)


@given(letters | st.builds("{}/{}".format, part, part))
@settings(deadline=None, max_examples=500)
def test_the_client_says_the_same(name: str) -> None:
    """Of drawn names: the rule is that of huggingface_hub, with an owner."""
    assert is_repo(name) == is_known_to_the_client(name)


@given(st.lists(st.text("aZ0._-+ ä/", max_size=50), max_size=4), st.sampled_from(["ties", "task_arithmetic", ""]))
@settings(deadline=None, max_examples=300)
def test_the_name_that_the_form_suggests_is_one(models: list[str], method: str) -> None:
    """Whatever the models are called."""
    shown = Form(method=method, rows=tuple(ModelRow(name) for name in models))
    assert is_repo(form.suggest_repo(shown, "alice"))
