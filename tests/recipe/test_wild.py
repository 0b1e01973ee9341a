"""Recipes that people published run on models made to their shape: as many layers, and a few thousand numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
import vocabularies
from merging import merged
from places import ROOT

from merger.methods.registry import methods
from merger.recipe.parse import parse
from recipe.conftest import WILD

LAYERS = {"03-gradient-slerp-slices": 40, "04-passthrough-44layer": 40, "22-passthrough-scale-filters": 40}
"""How many layers a recipe's ranges speak of; the others speak of none."""

RUN = (
    "01-linear", "02-ties-gradients-filters", "03-gradient-slerp-slices", "04-passthrough-44layer",
    "05-multimerge-docs", "09-slerp-v-curve-models-form", "10-dare-ties-three",
    "13-della-linear-filters-union-chatml", "14-model-stock-ignored-weights", "20-breadcrumbs",
    "22-passthrough-scale-filters", "24-raw-pytorch",
)  # fmt: skip
ELSEWHERE = {
    "07-moe-hidden-clowncar": "test_mixtures", "08-moe-random-upcycle": "test_mixtures",
    "25-moe-yaml-anchors": "test_mixtures", "15-model-stock-lora-refs": "test_lora_sources",
    "18-sce-lora-base": "test_lora_sources",
}  # fmt: skip
"""Those that do not run here, and where they do."""


def test_every_published_recipe_runs_somewhere() -> None:
    """Here, or in the tests of its kind, which name it."""
    assert {file.stem for file in WILD} == {*RUN, *ELSEWHERE}
    for name, module in ELSEWHERE.items():
        (place,) = (ROOT / "tests").rglob(f"{module}.py")
        assert f'"{name}"' in place.read_text()


@pytest.mark.parametrize("name", RUN)
def test_a_published_recipe_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the text as it was published, with folders in the place of the models: a whole model of finite numbers."""
    monkeypatch.chdir(tmp_path)
    text = next(file for file in WILD if file.stem == name).read_text()
    refs = parse(text, "wild.yaml", methods()).models
    for seed, ref in enumerate(sorted({ref.path for ref in refs}, key=len, reverse=True)):
        text = text.replace(ref, f"./{_model(tmp_path, name, ref, seed)}")
    planned = merged(text, Path("out"))
    found = tiny.read(Path("out"))
    assert set(found) == {job.name for job in planned.jobs}
    assert all(torch.isfinite(tensor).all() for tensor in found.values())
    assert {tensor.dtype for tensor in found.values()} == {_dtype(text)}


def _model(folder: Path, name: str, ref: str, seed: int) -> str:
    """A model in the place of `ref`; its new name."""
    made = f"model-{seed}"
    if ref.endswith(".safetensors"):
        (tiny.model(folder / f"{made}-whole", seed) / "model.safetensors").rename(folder / f"{made}.safetensors")
        return f"{made}.safetensors"
    if name.startswith("13"):
        vocabularies.model(folder / made, seed, ["<|im_start|>", "<|im_end|>"][: seed % 3])
        return made
    tiny.model(folder / made, seed, layers=LAYERS.get(name, 3))
    return made


def _dtype(text: str) -> torch.dtype:
    """What the recipe says; without a word, the models' own."""
    said = [line.split()[1] for key in ("out_dtype:", "dtype:") for line in text.splitlines() if line.startswith(key)]
    return getattr(torch, said[0]) if said else torch.bfloat16
