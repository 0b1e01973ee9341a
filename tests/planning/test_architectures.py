"""Models of many classes, written by transformers, merged and stacked by us, and loaded by transformers again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from architectures import page
from architectures.cases import CASES
from architectures.trial import Row, check_built, load, merge, tried
from safetensors.torch import save_file
from transformers.utils import logging


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    """Saving and loading a few hundred models draws no progress bars."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.mark.parametrize("name", CASES, ids=[name.replace(" ", "-") for name in CASES])
def test_a_class_does_what_the_page_says(name: str, tmp_path: Path) -> None:
    """Merged and stacked: nothing is lost or wrong, and the page has the row that comes of it."""
    row = tried(CASES[name], tmp_path)
    assert page.line(page.cells(name, row)) in page.PAGE.read_text("utf-8").splitlines()


def test_the_page_has_a_row_for_each_class() -> None:
    """docs/architectures.md is what `make tables` writes, but for the rows' last cells, which the trials compare."""
    rows = {name: Row(case.model, {}, 0) for name, case in CASES.items()}

    def heads(text: str) -> list[str]:
        return [" | ".join(line.split(" | ")[:2]) for line in text.splitlines()]

    assert heads(page.PAGE.read_text("utf-8")) == heads(page.text(rows))


@pytest.mark.parametrize(("name", "stacks"), [
    ("T5", ("encoder.block", "decoder.block")),
    ("LLaVA", ("language_model.model.layers", "vision_tower.encoder.layers")),
])  # fmt: skip
def test_modules_merge_one_stack_and_copy_the_others(name: str, stacks: tuple[str, str], tmp_path: Path) -> None:
    """`modules:` with one stack: that is the mean of both models, all else is the first model's."""
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, seed in ((one, 1), (other, 2)):
        CASES[name].make(seed).save_pretrained(folder)
    recipe = f"merge_method: linear\nmodules:\n  {stacks[0]}:\n    models: [{{model: {one}}}, {{model: {other}}}]\n"
    merged = merge(recipe, tmp_path / "merged")
    first, second = tiny.read(one), tiny.read(other)
    assert set(merged) == set(first)
    for tensor, found in merged.items():
        mean = (first[tensor] + second[tensor]) / 2
        assert torch.allclose(found, mean if tensor.startswith(stacks[0]) else first[tensor]), tensor
    load(CASES[name], tmp_path / "merged")


def _stack(model: Path, module: str = "default") -> str:
    slices = "".join(f"    - sources: [{{model: {model}, layer_range: {taken}}}]\n" for taken in ("[0, 2]", "[1, 4]"))
    return f"merge_method: passthrough\nmodules:\n  {module}:\n    slices:\n{slices}"


LAYERS = (0, 1, 1, 2, 3)


def _lettered(config: dict[str, Any]) -> None:
    del config["layers_block_type"]
    config |= {"num_hidden_layers": 4, "hybrid_override_pattern": "ME*-", "mtp_hybrid_override_pattern": "*E-M"}


def _renamed(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update({new: config.pop(old)})


PUBLISHED: Mapping[str, tuple[str, str, Callable[[dict[str, Any]], None], Callable[[dict[str, Any]], None]]] = {
    "a letter for a layer": ("Nemotron H", "default", _lettered, lambda config: None),
    "llm_config": ("InternVL", "language_model.model.layers", _renamed("text_config", "llm_config"),
                   _renamed("llm_config", "text_config")),
    "the tower beside llm_config": ("InternVL", "vision_tower.encoder.layer", _renamed("text_config", "llm_config"),
                                    _renamed("llm_config", "text_config")),
    "language_config": ("LLaVA", "language_model.model.layers", _renamed("text_config", "language_config"),
                        _renamed("language_config", "text_config")),
}  # fmt: skip


@pytest.mark.parametrize("form", PUBLISHED)
def test_layers_are_counted_as_the_models_authors_write_it(form: str, tmp_path: Path) -> None:
    """In words that transformers does not save, but reads; or that only the code beside the model reads."""
    name, module, written, read = PUBLISHED[form]
    made, model, out = CASES[name].make(1), tmp_path / "model", tmp_path / "out"
    made.save_pretrained(model)
    for folder, edit in ((model, written), (out, read)):
        if folder == out:
            merge(_stack(model, module), out)
        config = json.loads((folder / "config.json").read_text())
        edit(config)
        (folder / "config.json").write_text(json.dumps(config))
    check_built(made, load(CASES[name], out), LAYERS)
    if form == "a letter for a layer":
        assert (config["hybrid_override_pattern"], config["mtp_hybrid_override_pattern"]) == ("MEE*-", "*E-M")


ALIKE = ["full_attention"]
SPOILT: Mapping[str, Callable[[dict[str, torch.Tensor], dict[str, Any]], object]] = {
    "a tensor less": lambda tensors, config: tensors.pop("model.layers.4.mlp.up_proj.weight"),
    "a tensor more": lambda tensors, config: tensors.update({"model.layers.5.mlp.up_proj.weight": torch.ones(24, 16)}),
    "another shape": lambda tensors, config: tensors.update({"model.norm.weight": torch.ones(8)}),
    "a layer less in the config": lambda tensors, config: config.update(num_hidden_layers=4, layer_types=ALIKE * 4),
    "other kinds of layers": lambda tensors, config: config.update(layer_types=ALIKE * 5),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_trial_sees_what_is_wrong_with_a_result(spoilt: str, tmp_path: Path) -> None:
    """A result that transformers loads otherwise than it should, or not at all, passes no trial."""
    case, made = CASES["Gemma 2"], CASES["Gemma 2"].make(1)
    made.save_pretrained(tmp_path / "model")
    tensors = merge(_stack(tmp_path / "model"), tmp_path / "out")
    check_built(made, load(case, tmp_path / "out"), LAYERS)
    config = json.loads((tmp_path / "out/config.json").read_text())
    SPOILT[spoilt](tensors, config)
    save_file(tensors, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    with pytest.raises((AssertionError, RuntimeError)):
        check_built(made, load(case, tmp_path / "out"), LAYERS)


FUSED = ("Qwen 3 MoE", "Mixtral", "DeepSeek V3", "GLM 4 MoE", "Phi 3.5 MoE", "Jamba")


@pytest.mark.parametrize("name", FUSED)
def test_experts_in_one_tensor_are_merged_with_experts_in_many(name: str, tmp_path: Path) -> None:
    """A model saved as transformers holds it in memory, and one as it is published: the published layout comes out."""
    one, other = CASES[name].make(1), CASES[name].make(2)
    one.save_pretrained(tmp_path / "one")
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "fused").mkdir()
    shutil.copy(tmp_path / "one/config.json", tmp_path / "fused")
    save_file(
        {key: tensor.contiguous() for key, tensor in one.state_dict().items()}, tmp_path / "fused/model.safetensors"
    )

    def mean(*folders: str) -> dict[str, torch.Tensor]:
        listed = ", ".join(f"{{model: {tmp_path / folder}, parameters: {{weight: 0.5}}}}" for folder in folders)
        return merge(f"merge_method: linear\nmodels: [{listed}]\n", tmp_path / "-".join(folders))

    expected = mean("one", "other")
    for order in (("fused", "other"), ("other", "fused")):
        merged = mean(*order)
        assert set(merged) == set(expected)
        assert all(torch.equal(merged[key], tensor) for key, tensor in expected.items())
    load(CASES[name], tmp_path / "fused-other")
