"""Safetensors that are no model of transformers: single files without a config, and parts of diffusion pipelines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import tiny
import torch
from loopback import LoopbackHub
from merging import merged
from safetensors.torch import save_file
from torch import Tensor

from merger.errors import MergerError

if TYPE_CHECKING:
    from conftest import Command

RAW = Path(__file__).parents[1] / "recipe/wild/24-raw-pytorch.yaml"
UNET = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.36.0", "sample_size": 8}


def tensors(seed: int) -> dict[str, Tensor]:
    """Some tensors of a part of a diffusion model; a stack of blocks and what is outside of it."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {f"down_blocks.{n}.resnets.{m}.conv1.weight": (8, 4, 3, 3) for n in range(2) for m in range(2)}
    shapes |= {"conv_in.weight": (8, 4, 3, 3), "conv_in.bias": (8,), "time_embedding.linear_1.weight": (16, 8)}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def part(folder: Path, seed: int, config: Mapping[str, object] = UNET, name: str = "diffusion_pytorch_model") -> Path:
    """A folder as diffusers writes one for each part of a pipeline."""
    folder.mkdir(parents=True)
    save_file(tensors(seed), folder / f"{name}.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_published_recipe_of_single_files_runs(command: Command, served: LoopbackHub, tmp_path: Path) -> None:
    """Files in the working directory, named without a path: what comes out is what whole models of them would give."""
    for seed, name in enumerate(("model_base", "model_a", "model_b")):
        save_file(tensors(seed), tmp_path / f"{name}.safetensors")
        part(tmp_path / name, seed)
    recipe = RAW.read_text()
    (tmp_path / "mine.yaml").write_text(recipe)
    done = command("run", "mine.yaml", "--to", "out", cwd=tmp_path, hub=served)
    assert done.returncode == 0, done.stderr
    for name in ("model_base", "model_a", "model_b"):
        recipe = recipe.replace(f"{name}.safetensors", str(tmp_path / name))
    merged(recipe, tmp_path / "expected")
    found, expected = tiny.read(tmp_path / "out"), tiny.read(tmp_path / "expected")
    assert set(found) == set(tensors(0))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    beside = {"README.md", "recipe.yaml", "merger.lock.yaml", "merger.measured.json", "pictures"}
    assert files == {"model.safetensors", *beside}
    card = (tmp_path / "out/README.md").read_text()
    assert 'load_file("./out/model.safetensors")' in card
    assert "library_name" not in card


def test_a_result_without_a_config_is_replaced_and_known_again(tmp_path: Path) -> None:
    """--force takes it for a model of ours; the same merge again has nothing to do."""
    for seed in range(2):
        save_file(tensors(seed), tmp_path / f"{seed}.safetensors")
    recipe = "merge_method: linear\nmodels: [{model: %s/0.safetensors}, {model: %s/1.safetensors}]\n"
    recipe = recipe.replace("%s", str(tmp_path))
    merged(recipe, tmp_path / "out")
    before = (tmp_path / "out/model.safetensors").stat().st_mtime_ns
    merged(recipe, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(MergerError, match="exists and is not empty"):
        merged(recipe.replace("linear", "karcher"), tmp_path / "out")
    merged(recipe.replace("linear", "karcher"), tmp_path / "out", force=True)


def test_layers_of_a_file_without_a_config_are_stacked_freely(tmp_path: Path) -> None:
    """No config has to tell of them."""
    save_file(tensors(0), tmp_path / "a.safetensors")
    ranges = ((0, 2), (1, 2))
    slices = "".join(f"- sources: [{{model: {tmp_path}/a.safetensors, layer_range: [{a}, {b}]}}]\n" for a, b in ranges)
    merged(f"merge_method: passthrough\nslices:\n{slices}", tmp_path / "out")
    found, first = tiny.read(tmp_path / "out"), tensors(0)
    assert torch.equal(found["down_blocks.2.resnets.1.conv1.weight"], first["down_blocks.1.resnets.1.conv1.weight"])


def test_a_part_of_a_pipeline_comes_out_under_its_librarys_names(tmp_path: Path) -> None:
    """Files and index as diffusers looks for them, its config as it was, and a card that names it."""
    one, other = part(tmp_path / "one/unet", 0), part(tmp_path / "other/unet", 1)
    save_file(tensors(5), one / "diffusion_pytorch_model.fp16.safetensors")
    recipe = f"merge_method: linear\ndtype: float16\nmodels: [{{model: {one}}}, {{model: {other}}}]\n"
    merged(recipe, tmp_path / "out", card=True)
    found = tiny.read(tmp_path / "out")
    for name, tensor in found.items():
        assert torch.equal(tensor, ((tensors(0)[name] + tensors(1)[name]) / 2).half()), name
    assert (tmp_path / "out/diffusion_pytorch_model.safetensors").exists()
    assert json.loads((tmp_path / "out/config.json").read_text()) == UNET
    card = (tmp_path / "out/README.md").read_text()
    assert "library_name: diffusers" in card
    assert 'getattr(diffusers, "UNet2DConditionModel").from_pretrained("./out")' in card
    merged(recipe, tmp_path / "shards", shard_size=1500)
    index = json.loads((tmp_path / "shards/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors(0))
    assert all(file.startswith("diffusion_pytorch_model-0000") for file in index["weight_map"].values())
    merged(recipe.replace(str(one), str(tmp_path / "shards")), tmp_path / "again")


@pytest.mark.parametrize("place", ["unet", "unet/diffusion_pytorch_model.safetensors"])
def test_a_part_of_a_repo_is_read_from_the_hub(
    place: str, served: LoopbackHub, command: Command, tmp_path: Path
) -> None:
    """By its folder or its file behind the repo's name; the card names the repo, the lock what was meant."""
    part(tmp_path / "repo/unet", 0)
    part(tmp_path / "repo/vae", 1)
    (tmp_path / "repo/model_index.json").write_text("{}")
    served.add_model("org/sd", tmp_path / "repo")
    (tmp_path / "mine.yaml").write_text(f"merge_method: passthrough\nmodels: [{{model: org/sd/{place}}}]\n")
    done = command("run", "mine.yaml", "--to", "out", cwd=tmp_path, hub=served)
    assert done.returncode == 0, done.stderr
    found = tiny.read(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors(0).items())
    assert "base_model:\n- org/sd\n" in (tmp_path / "out/README.md").read_text()
    assert f"model: org/sd/{place}" in (tmp_path / "out/merger.lock.yaml").read_text()


@pytest.mark.parametrize(("place", "sentence"), [
    ("org/whole", "is a pipeline of several models"), ("org/whole/text", "there is no 'text' in org/whole"),
    ("org/whole/unet/other.safetensors", "there is no 'unet/other.safetensors' in org/whole"),
])  # fmt: skip
def test_what_is_no_part_of_a_repo_is_refused(
    place: str, sentence: str, served: LoopbackHub, command: Command, tmp_path: Path
) -> None:
    """With the parts that there are, or where to look."""
    part(tmp_path / "repo/unet", 0)
    (tmp_path / "repo/model_index.json").write_text("{}")
    served.add_model("org/whole", tmp_path / "repo")
    (tmp_path / "mine.yaml").write_text(f"merge_method: passthrough\nmodels: [{{model: {place}}}]\n")
    done = command("plan", "mine.yaml", cwd=tmp_path, hub=served)
    assert done.returncode == 3
    assert f"mine.yaml:2:18: models[{place}]: {sentence}" in done.stderr
