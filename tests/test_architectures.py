"""Models of many classes, written by transformers, merged and stacked by us, and loaded by transformers again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from architectures import page
from architectures.cases import CASES
from architectures.trial import Row, load, merge, tried
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
