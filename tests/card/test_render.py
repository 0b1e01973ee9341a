"""The card says what was merged, in metadata that holds and words that nobody else's text can break out of."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from planning.models import model

from merger.card.facts import fold_alike, lock_file
from merger.card.render import render
from merger.methods.registry import methods
from merger.planning.plan import Plan
from merger.run.options import Options
from merger.run.prepare import plan, read_recipe
from merger.stores.ports import FileInfo
from merger.stores.resolve import Library

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
    tiny.models(tmp_path, "base", "one", "two")
    for name in ("one", "two"):
        (tmp_path / name / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def planned_with_store(text: str) -> tuple[Plan, Library]:
    """The plan of a recipe in the working directory, and where its models are."""
    Path("mine.yaml").write_text(text)
    return plan(read_recipe(Path("mine.yaml")), Options())


def planned(text: str) -> Plan:
    """The plan alone."""
    return planned_with_store(text)[0]


def card(text: str, name: str = "org/merged") -> tuple[dict[str, Any], str]:
    """A recipe's card: its metadata as data, and its body."""
    _, front, body = render(planned(text), methods(), name).split("---\n", 2)
    return yaml.safe_load(front), body


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


def test_lock_names_inputs_and_outputs(folder: Path) -> None:
    """The lock holds each file that is read and each that is written with its checksum, the recipe, and no path."""
    made, store = planned_with_store(RECIPE + "seed: 5\n")
    written = {"model.safetensors": FileInfo(123, "ab" * 32), "config.json": FileInfo(7, "cd" * 32)}
    lock = yaml.safe_load(lock_file(made, written, store.checksum))
    assert (lock["seed"], lock["recipe"]) == (5, RECIPE + "seed: 5\n")
    for parent in lock["models"]:
        files = {file["file"]: (file["size"], file["sha256"]) for file in parent["files"]}
        held = {path.name: path.read_bytes() for path in (folder / parent["model"]).iterdir()}
        assert held.keys() - {"README.md"} == {"config.json", "model.safetensors", "tokenizer_config.json"}
        assert files == {name: (len(held[name]), hashlib.sha256(held[name]).hexdigest()) for name in held}
    assert [parent["model"] for parent in lock["models"]] == ["one", "two", "base"]
    assert lock["output"] == [
        {"file": "model.safetensors", "size": 123, "sha256": "ab" * 32},
        {"file": "config.json", "size": 7, "sha256": "cd" * 32},
    ]
    assert {"python", "hub-merger", "numpy", "numba", "huggingface_hub"} <= lock["made_with"].keys()
    assert str(folder) not in str(lock)


def test_checksums_that_would_take_long_are_said_to_be_unknown(folder: Path) -> None:
    """Folders larger than a gigabyte are not read once more for them: their files' sizes stand there, and null."""
    for name in ("large", "larger"):
        model(folder / name, layers=1, hidden=2048, vocab=60_000)
    made, store = planned_with_store("merge_method: linear\nmodels: [{model: ./large}, {model: ./larger}]\n")
    for parent in yaml.safe_load(lock_file(made, {}, store.checksum))["models"]:
        sizes = {path.name: path.stat().st_size for path in (folder / parent["model"]).iterdir()}
        assert {file["file"]: (file["size"], file["sha256"]) for file in parent["files"]} == {
            name: (size, None) for name, size in sizes.items()
        }


MIXTURE = """\
base_model: ./base
gate_mode: random
experts:
  - {source_model: ./one, noise_scale: 0.001}
  - {source_model: ./one, residual_scale: 0.9}
  - {source_model: ./two}
"""


def test_a_mixture_is_told_in_sentences(folder: Path) -> None:
    """Experts, router, what is the base model's, and what was done to single experts; no method stands there."""
    metadata, body = card(MIXTURE)
    assert metadata["tags"] == ["merge", "merger", "moe"]
    assert "A merge of one and two over base by **Mixture of experts**" in body
    assert (
        "Each layer has 3 experts: the MLPs of one (2 times), two. A router sends each token through 2 of them; "
        "everything else is that of base. The router was drawn by chance, from a normal distribution: it knows nothing "
        "until it is trained. To the MLPs of one noise of deviation 0.001 was added. The output of the MLPs of one was "
        "multiplied by 0.9."
    ) in body


@pytest.mark.parametrize(
    ("rows", "shown"),
    [
        ("", []),
        ("a" * 8, ["a"] * 8),
        ("a" * 9, ["a", 7, "a"]),
        ("b" + "a" * 64 + "b", ["b", "a", 62, "a", "b"]),
        ("ab" * 9, ["a", "b"] * 9),
    ],
    ids=["none", "eight", "nine", "the checkpoints of a run", "no neighbours of a kind"],
)
def test_of_many_neighbours_of_a_kind_the_ends_are_shown_and_how_many_are_between(
    rows: str, shown: list[str | int]
) -> None:
    """No row is dropped without being counted."""
    found = fold_alike(list(rows), str)
    assert found == shown
    assert sum(row if isinstance(row, int) else 1 for row in found) == len(rows)
