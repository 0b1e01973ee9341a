"""Models of many classes, written by transformers, merged and stacked by us, and loaded by transformers again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from architectures import page
from architectures.cases import CASES
from architectures.trial import Row, load, merge, tried
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
    """Merged, merged with itself, and stacked: nothing is lost or wrong, and the page has the row that comes of it."""
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


FUSED = ("Qwen 3 MoE", "Mixtral", "DeepSeek V3", "GLM 4 MoE", "Phi 3.5 MoE", "Jamba")


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("first", ["fused", "split"])
def test_experts_in_one_tensor_are_merged_with_experts_in_many(name: str, first: str, tmp_path: Path) -> None:
    """A model saved as transformers holds it in memory, and one as it is published: the published layout comes out."""
    one, other = CASES[name].make(1), CASES[name].make(2)
    one.save_pretrained(tmp_path / "one")
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "fused").mkdir()
    shutil.copy(tmp_path / "one/config.json", tmp_path / "fused")
    save_file(
        {key: tensor.contiguous() for key, tensor in one.state_dict().items()}, tmp_path / "fused/model.safetensors"
    )
    order = ["fused", "other"] if first == "fused" else ["other", "fused"]
    listed = ", ".join(f"{{model: {tmp_path / folder}, parameters: {{weight: 0.5}}}}" for folder in order)
    merged = merge(f"merge_method: linear\nmodels: [{listed}]\n", tmp_path / "out")
    plain = ", ".join(f"{{model: {tmp_path / folder}, parameters: {{weight: 0.5}}}}" for folder in ("one", "other"))
    expected = merge(f"merge_method: linear\nmodels: [{plain}]\n", tmp_path / "expected")
    assert set(merged) == set(expected)
    assert all(torch.equal(merged[key], tensor) for key, tensor in expected.items())
    load(CASES[name], tmp_path / "out")
