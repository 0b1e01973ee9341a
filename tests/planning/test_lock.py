"""Finding and reading a recipe's models: what is known of them afterwards, and what is said of damaged ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from merger.errors import ModelError, RecipeError
from merger.lock.lock import Pin, pins

from .models import llama, locked, model, write


def linear(*models: str) -> str:
    return "merge_method: linear\nmodels:\n" + "".join(f"  - model: {path}\n" for path in models)


def refused(recipe: str) -> list[str]:
    """The sentences, each at the place where the recipe names the model."""
    with pytest.raises(ModelError) as caught:
        locked(recipe)
    assert all(problem.at is not None and problem.hint for problem in caught.value.problems)
    assert caught.value.exit_code == 3
    return [problem.what for problem in caught.value.problems]


def test_models_are_locked_in_the_order_of_the_recipe_each_once(tmp_path: Path) -> None:
    """With their tensors, their config and their names for readers."""
    one, other = model(tmp_path / "one"), model(tmp_path / "other", layers=3)
    found = locked(f"merge_method: task_arithmetic\nbase_model: {one}\nmodels: [{{model: {other}}}, {{model: {one}}}]")
    assert [held.name for held in found.models] == ["other", "one"]
    assert str(found.recipe.config_model) == one
    assert list(found.models[0].checkpoint.tensors) == list(llama(3))
    assert found.models[0].checkpoint.config["num_hidden_layers"] == 3
    assert found.models[0].checkpoint.nbytes == 2 * (3 * 656 + 2 * 20 * 8 + 8)


def test_every_model_that_cannot_be_read_is_told_at_once(tmp_path: Path) -> None:
    """Each at its own line, whatever is wrong with it."""
    missing, bare, pickled, cut = (str(tmp_path / name) for name in ("missing", "bare", "pickled", "cut"))
    for name in ("bare", "pickled"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "pickled" / "pytorch_model.bin").write_text("")
    model(tmp_path / "cut")
    content = (tmp_path / "cut" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(content[:-1])
    sentences = refused(linear(model(tmp_path / "sound"), missing, bare, pickled, cut))
    assert sentences == [
        f"there is no folder {missing!r}",
        "has no safetensors",
        "has no safetensors, only pytorch_model.bin",
        f"model.safetensors: has {len(content) - 1:,} bytes, its header promises {len(content):,}",
    ]


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null", "\ufeff", "[" * 100_000, '{"a": "\x00"}'])
def test_a_damaged_config_is_refused(tmp_path: Path, text: str) -> None:
    """Whatever stands there: a sentence about config.json."""
    one = model(tmp_path / "one")
    (tmp_path / "one" / "config.json").write_text(text)
    (sentence,) = refused(linear(one))
    assert sentence.startswith("config.json is no JSON")


def test_a_model_without_a_config_is_refused(tmp_path: Path) -> None:
    """Nothing could load its merge."""
    one = model(tmp_path / "one")
    (tmp_path / "one" / "config.json").unlink()
    assert refused(linear(one)) == ["has no config.json"]


def test_a_quantised_model_is_refused(tmp_path: Path) -> None:
    """Its numbers are codes, not parameters."""
    one = write(tmp_path / "one", llama(), quantization_config={"quant_method": "gptq"})
    assert refused(linear(one)) == ["is quantised by GPTQ; its stored numbers must not be merged as they are"]


def test_of_a_sharded_model_the_index_decides(tmp_path: Path) -> None:
    """All its files' tensors, and no file that the index does not name."""
    one = model(tmp_path / "one")
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    model(tmp_path / "two", layers=1)
    (tmp_path / "one" / "model.safetensors").rename(tmp_path / "one" / first)
    write(tmp_path / "three", {"extra.weight": ("BF16", (4,))})
    (tmp_path / "three" / "model.safetensors").rename(tmp_path / "one" / second)
    (tmp_path / "two" / "model.safetensors").rename(tmp_path / "one" / "model.safetensors")
    weight_map = {**dict.fromkeys(llama(), first), "extra.weight": second}
    (tmp_path / "one" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (found,) = locked(linear(one)).models
    assert {name: tensor.file for name, tensor in found.checkpoint.tensors.items()} == weight_map


@pytest.mark.parametrize(("card", "licence"), [
    ("---\nlicense: mit\n---\n# A model", "mit"),
    ("---\r\nlicense: mit\r\n---\r\n# A model", "mit"),
    ("---\nlicense: [mit, llama3]\n---\n", "mit AND llama3"),
    ("---\nlicense: other\nlicense_name: some-licence\n---\n", "some-licence"),
    ("---\nlicense: other\n---\n", "other"),
    ("---\nlicense: no\n---\n", "no"),
    ("---\nlicense:\n---\n", None),
    ("---\nlicense: [mit]\n---\n", "mit"),
    ("# A model\n---\nlicense: mit\n---\n", None),
    ("---\nlicense: mit\n", None),
    ("---\n- license\n---\n", None),
    ("---\nlicense: mit\nbroken: [\n---\n", None),
    ("---\nlicense: mit\nday: 2024-99-99\n---\n", "mit"),
    ("---\nlicense: mit\nday: !!timestamp never\n---\n", "mit"),
    ("---\n" + "{a: " * 2_000 + "\n---\n", None),
    ("", None),
])  # fmt: skip
def test_the_licence_is_read_from_the_card_if_it_can_be(tmp_path: Path, card: str, licence: str | None) -> None:
    """A card that cannot be read is no reason to refuse its model."""
    one = model(tmp_path / "one")
    (tmp_path / "one" / "README.md").write_bytes(card.encode())
    (found,) = locked(linear(one)).models
    assert found.licence == licence


def test_a_lock_file_names_the_commits_of_models_on_the_hub() -> None:
    """Folders have none."""
    models = "models:\n- {model: org/a@main, commit: 1f}\n- {model: folder, commit: null}\n"
    assert pins(models, "mine.lock.yaml") == {"org/a@main": Pin("1f")}


@pytest.mark.parametrize(
    "text", ["", "models:", "- 1", "models: [{model: a}]", "models: {a: b}", "a: [", "\x00", "[" * 100_000]
)
def test_what_is_no_lock_file_is_refused(text: str) -> None:
    """It might have pinned something."""
    with pytest.raises(RecipeError, match=r"^mine\.lock\.yaml is no lock file\n    take the merger\.lock\.yaml"):
        pins(text, "mine.lock.yaml")
