"""What the Hub reads off a card: all Hub parents, no path, and only what the Hub itself would take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from hypothesis import given
from hypothesis import strategies as st
from loopback import Client, LoopbackHub
from loopback.cards import problems

import merger
from merger.card.metadata import front_matter
from merger.card.render import render
from merger.methods.registry import methods

RECIPE = """\
merge_method: task_arithmetic
base_model: org/base
models:
  - model: org/one@main
    parameters: {weight: 0.5}
  - model: ./two
    parameters: {weight: 0.5}
"""
CARDS = {
    "base": {"license": "mit", "language": ["en", "no"], "datasets": ["org/a", "b"], "pipeline_tag": "text-generation",
             "library_name": "transformers", "base_model": "meta/x"},
    "one": {"license": "mit", "language": "NO", "datasets": "org/c", "tags": ["not-ours"]},
    "two": {"license": "mit", "language": ["de", "no", {"x": 1}, "a b"], "datasets": ["org/a", "../../etc", "/root/d"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def home(served: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of the models, where the others are on the Hub."""
    folder = tmp_path_factory.mktemp("home")
    for seed, (name, card) in enumerate(CARDS.items()):
        made = tiny.model(folder / name, seed)
        (made / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
        if name != "two":
            served.add_model(f"org/{name}", made)
    return folder


def metadata(folder: str, recipe: str) -> tuple[dict[str, Any], str]:
    """The metadata of a recipe's card as data, and the card."""
    import os

    os.chdir(folder)
    Path("mine.yaml").write_text(recipe)
    card = render(merger.plan("mine.yaml"), methods(), "org/x")
    return yaml.safe_load(card.split("---\n", 2)[1]), card


@pytest.fixture(scope="module")
def made(home: Path, client: Client) -> tuple[dict[str, Any], str]:
    """The card of a merge of models on the Hub and in a folder."""
    found: tuple[dict[str, Any], str] = client(metadata, str(home), RECIPE)
    return found


def test_what_the_hub_is_told(made: tuple[dict[str, Any], str]) -> None:
    """Parents by repo id, the relation, what they are for, and the union of languages and datasets that are any."""
    assert made[0] == {
        "license": "mit",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "language": ["de", "no", "en"],
        "datasets": ["org/c", "org/a", "b"],
        "tags": ["merge", "merger", "task_arithmetic"],
        "base_model": ["org/one", "org/base"],
        "base_model_relation": "merge",
    }


def test_the_hub_takes_it(made: tuple[dict[str, Any], str]) -> None:
    """By the rules of the Hub's own check."""
    assert problems(made[1]) == ([], [])


def test_no_path_stands_in_it(made: tuple[dict[str, Any], str], home: Path) -> None:
    """A parent in a folder is named nowhere in the metadata."""
    assert "two" not in yaml.safe_dump(made[0])
    assert str(home) not in made[1]


@pytest.mark.parametrize("text", ["no", "on", "yes", "null", "~", "true", "1e5", "0o17", "1.10", "12:30", "0x1f",
                                  "2024-01-01", "- a", "a: b", "#", "", "a\nb", "---", "!!str", "&a", "*a", "@x", "%a",
                                  ".inf", "<<", "=", "y", "Ä", "\u2028"])  # fmt: skip
def test_text_that_yaml_would_take_for_something_else(text: str) -> None:
    """It is quoted, for each version of YAML; and comes back as it was."""
    written = front_matter({"license_name": text})
    assert yaml.safe_load(written.split("---\n")[1]) == {"license_name": text}
    assert written.splitlines()[1].startswith("license_name: " + ("" if text == "y" else '"'))
    assert written.endswith("\n---\n")
    assert len(written.splitlines()) == 3 or "\u2028" in text


plain = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=20)


@given(st.dictionaries(st.sampled_from(["license_name", "license_link"]), plain), st.lists(plain))
def test_whatever_goes_in_comes_back(texts: Mapping[str, str], many: list[str]) -> None:
    """Metadata is data: no value of it can add a key, end the front matter, or change its kind."""
    data = {**texts, "tags": many}
    lines = front_matter(data).splitlines()
    assert (lines[0], lines[-1]) == ("---", "---")
    assert "---" not in lines[1:-1]
    assert yaml.safe_load("\n".join(lines[1:-1])) == data
