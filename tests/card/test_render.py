"""The card says what was merged, in metadata that holds and words that nobody else's text can break out of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from merger.card.lineage import lock_file
from merger.card.relations import Relations
from merger.card.render import render
from merger.checkpoints.shard import Written
from merger.methods.registry import methods
from merger.plan.plan import Plan
from merger.run import Options, plan, read

UNSEEN = Relations((), (), ())
RECIPE = """\
merge_method: ties
base_model: ./base
models:
  - model: ./one
    parameters: {weight: 0.5, density: 0.6}
  - model: ./two
    parameters: {weight: 0.5, density: 0.6}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with three small models; one and two say that they are MIT, the base says nothing."""
    for seed, name in enumerate(("base", "one", "two")):
        tiny.model(tmp_path / name, seed)
        if name != "base":
            (tmp_path / name / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def planned(text: str) -> Plan:
    """The plan of a recipe in the working directory."""
    Path("mine.yaml").write_text(text)
    return plan(read(Path("mine.yaml")), Options())[0]


def card(text: str, name: str = "org/merged") -> tuple[dict[str, Any], str]:
    """A recipe's card: its metadata as data, and its body."""
    _, front, body = render(planned(text), methods(), name, UNSEEN).split("---\n", 2)
    return yaml.safe_load(front), body


def test_golden_card(folder: Path) -> None:
    """The whole card of a small merge, word for word."""
    golden = Path(__file__).with_name("golden.md")
    found = render(planned(RECIPE + "publish: {license: apache-2.0}\n"), methods(), "org/merged", UNSEEN)
    assert found.replace(planned(RECIPE).hash[:16], "PLAN") == golden.read_text()


def test_a_licence_that_all_parents_share_is_taken_over(folder: Path) -> None:
    """All parents MIT makes the merge MIT; one that says nothing leaves it open, and the card says so."""
    shared = RECIPE.replace("base_model: ./base", "base_model: ./one")
    assert card(shared)[0]["license"] == "mit"
    metadata, body = card(RECIPE)
    assert "license" not in metadata
    assert "The licence of this model is not settled" in body
    assert "what base (not stated) asks is not known here" in body


def test_local_parents_are_no_base_models(folder: Path) -> None:
    """The Hub is told of no parent that it does not hold, and no path of this machine stands anywhere."""
    metadata, body = card(RECIPE)
    assert "base_model" not in metadata
    assert str(folder) not in body
    assert "(a local folder)" in body


def test_text_of_others_stays_text(folder: Path) -> None:
    """A licence, a folder's name and a recipe full of Markdown, HTML and Jinja change nothing but their own text."""
    nasty = "x](http://evil) <script>alert(1)</script> | {{ 7 * 7 }}"
    (folder / "one" / "README.md").write_text(yaml.safe_dump({"license": nasty}).join(["---\n", "---\n"]))
    _, body = card(RECIPE + "# ```\n# </details> {{ 7 * 7 }}\n")
    assert "<script>" not in body
    assert "](http://evil)" not in body
    assert "49" not in body
    assert "````yaml" in body


def test_metadata_survives_any_licence(folder: Path) -> None:
    """Front matter is written as data: a licence that looks like YAML becomes a name that the Hub takes."""
    text = "mit\ntags: [evil]\n---\n"
    metadata, _ = card(RECIPE + yaml.safe_dump({"publish": {"license": text}}))
    assert (metadata["license"], metadata["license_name"]) == ("other", "mit-tags-evil")
    assert metadata["tags"] == ["merge", "merger", "ties"]


def test_lock_names_inputs_and_outputs(folder: Path) -> None:
    """The lock holds each parent's files and the checksum of each file written, and no path."""
    written = Written("model.safetensors", 123, "ab" * 32)
    lock = yaml.safe_load(lock_file(planned(RECIPE + "seed: 5\n"), (written,)))
    assert lock["seed"] == 5
    assert [model["model"] for model in lock["models"]] == ["one", "two", "base"]
    assert [file["file"] for file in lock["models"][0]["files"]] == ["config.json", "model.safetensors"]
    assert lock["output"] == [{"file": "model.safetensors", "size": 123, "sha256": "ab" * 32}]
    assert str(folder) not in str(lock)
