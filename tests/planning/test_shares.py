"""Tensors outside of the layers that hold something of every layer: stacked with them, or refused.

Not here: one slice after another of single models, in transformers' own classes (test_architectures).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from architectures.cases import CASES
from calls import called

EMBEDDING, PROJECTION = "model.embed_tokens_per_layer.weight", "model.per_layer_model_projection.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models with per-layer embeddings, and one with weights of layers that nobody knows how to take apart."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("abc"):
        CASES["Gemma 4, text"].make(seed).save_pretrained(root / name)
    CASES["ESM"].make(1).save_pretrained(root / "contacts")
    return root


def _slice(start: int, stop: int, *names: str, more: str = "") -> str:
    sources = ", ".join(f"{{model: ./{name}, layer_range: [{start}, {stop}]}}" for name in names)
    return f"  - sources: [{sources}]\n{more}"


MERGED = "merge_method: linear\nparameters: {weight: 0.5}\nslices:\n"
TASKS = "merge_method: task_arithmetic\nbase_model: ./c\nparameters: {weight: 0.5}\nslices:\n"
RECIPES: Mapping[str, tuple[str, Callable[..., torch.Tensor]]] = {
    "merged": (MERGED + _slice(0, 4, "a", "b") + _slice(2, 4, "b", "c"),
               lambda a, b, c: torch.cat([(a + b) / 2, ((b + c) / 2)[2:]])),
    "as task vectors": (TASKS + _slice(0, 3, "a", "c") + _slice(1, 3, "b", "c"),
                        lambda a, b, c: torch.cat([(c + (a - c) / 2)[:3], (c + (b - c) / 2)[1:3]])),
    "from other layers": ("merge_method: passthrough\nslices:\n" + _slice(2, 4, "b") + _slice(0, 4, "a"),
                          lambda a, b, c: torch.cat([b[2:], a])),
    "fewer": ("merge_method: passthrough\nslices:\n" + _slice(0, 2, "b"), lambda a, b, c: b[:2]),
}  # fmt: skip


@pytest.mark.parametrize("case", RECIPES)
def test_they_are_made_of_the_layers_that_are_taken(
    case: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share for each layer, in the layers' new order, and by their method; and the result loads."""
    recipe, expected = RECIPES[case]
    monkeypatch.chdir(models)
    (models / "recipe.yaml").write_text(recipe)
    done = called(["run", "recipe.yaml", "--to", str(tmp_path / "out"), "--quiet"])
    assert done.code == 0, done.err
    made, held = tiny.read(tmp_path / "out"), [tiny.read(models / name) for name in "abc"]
    rows = expected(*(parent[PROJECTION].view(4, 4, 16) for parent in held))
    assert torch.allclose(made[PROJECTION], rows.reshape(-1, 16), atol=1e-6)
    columns = expected(*(parent[EMBEDDING].view(40, 4, 4).transpose(0, 1) for parent in held))
    assert torch.allclose(made[EMBEDDING], columns.transpose(0, 1).reshape(40, -1), atol=1e-6)
    _, found = transformers.Gemma4ForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found.values())


PASSED = "merge_method: passthrough\nslices:\n"
REFUSED: Mapping[str, tuple[str, str]] = {
    "by two methods": (
        "slices:\n" + _slice(0, 4, "a", more="    merge_method: passthrough\n")
        + _slice(2, 4, "a", "b", more="    merge_method: linear\n    parameters: {weight: 0.5}\n"),
        f"{EMBEDDING}, {PROJECTION}: one tensor holds something for every layer of model.layers, and the recipe makes "
        "its parts unlike",
    ),
    "by two weights": (
        "merge_method: linear\nslices:\n" + _slice(0, 4, "a", "b", more="    parameters: {weight: 0.5}\n")
        + _slice(2, 4, "a", "b", more="    parameters: {weight: 0.4}\n"),
        f"{EMBEDDING}, {PROJECTION}: one tensor holds something",
    ),
    "whole from another": (
        f"tensors: [{{filter: per_layer_model, model: ./b}}]\n{PASSED}" + _slice(0, 4, "a") + _slice(2, 4, "a"),
        f"{PROJECTION}: one tensor holds something",
    ),
    "in a way that is not known": (
        PASSED + _slice(0, 4, "contacts") + _slice(2, 4, "contacts"),
        "esm.contact_head.regression.weight: how the size depends on the layers of esm.encoder.layer is not known here",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_tensor_could_hold_is_refused_by_name(case: str, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 2, before anything is read; never a result that does not load."""
    recipe, says = REFUSED[case]
    monkeypatch.chdir(models)
    (models / "recipe.yaml").write_text(recipe)
    done = called(["plan", "recipe.yaml"])
    assert (done.code, says in done.err) == (2, True), done.err
