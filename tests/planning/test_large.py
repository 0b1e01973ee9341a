"""The largest open models are planned quickly, in little memory and two shards of disk; work grows with the tensors."""

from __future__ import annotations

import cProfile
import pstats
from dataclasses import replace
from pathlib import Path

import big
import pytest
from thorough import thorough_only

from merger.run.options import Options
from merger.run.prepare import plan, read_recipe

PARENTS = 4


def recipe(folder: Path, layout: big.Layout) -> Path:
    """A TIES merge of three models and their base."""
    parents = [big.write(folder / str(number), layout) for number in range(PARENTS)]
    (folder / "recipe.yaml").write_text(big.recipe(parents))
    return folder / "recipe.yaml"


@pytest.mark.parametrize(
    ("layout", "tensors", "files", "numbers"),
    [(big.LLAMA_70B, 723, 30, 70_553_706_496), (big.LLAMA_405B, 1137, 191, 405_853_388_800)],
    ids=["70B", "405B"],
)
def test_a_large_model_is_planned_within_bounds(
    layout: big.Layout, tensors: int, files: int, numbers: int, tmp_path: Path
) -> None:
    """Three fine-tunes and their base: at most 6 GB of memory, two shards of disk on the way to the Hub."""
    planned, _ = plan(read_recipe(recipe(tmp_path, layout)), Options(threads=8))
    assert len(list((tmp_path / "0").glob("*.safetensors"))) == files
    assert (len(planned.jobs), len(planned.shards), planned.entries) == (tensors, files, numbers)
    assert planned.read_bytes == PARENTS * 2 * numbers
    assert planned.peak_memory <= 6_000_000_000
    assert planned.disk(staged=True) <= 2 * max(shard.size for shard in planned.shards) < 10_100_000_000


def calls(folder: Path, layout: big.Layout) -> float:
    """How many functions are called to plan a merge, for each tensor of it and each file that is looked into."""
    path = recipe(folder, layout)
    plan(read_recipe(path), Options())  # what is imported and looked up once is no part of it
    profile = cProfile.Profile()
    profile.enable()
    planned, _ = plan(read_recipe(path), Options())
    profile.disable()
    counted: int = pstats.Stats(profile).total_calls  # type: ignore[attr-defined]
    return counted / (len(planned.jobs) + PARENTS * len(planned.shards))


@thorough_only
def test_the_work_of_planning_grows_with_the_tensors_and_no_faster(tmp_path: Path) -> None:
    """Four times the layers, or larger tensors in many more files, take no more steps for each of them."""
    usual = calls(tmp_path / "70B", big.LLAMA_70B)
    assert calls(tmp_path / "405B", big.LLAMA_405B) < 1.1 * usual
    assert calls(tmp_path / "deep", replace(big.LLAMA_70B, num_hidden_layers=320)) < 1.1 * usual
