"""`--max-memory` and `--max-disk` are kept: what cannot fit is refused with the option that makes it fit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny

from merger.cli.commands import main
from merger.run.options import Options, with_free_memory


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A linear merge of two small models."""
    one, other = tiny.model(tmp_path / "one", 1), tiny.model(tmp_path / "other", 2)
    path = tmp_path / "mine.yaml"
    path.write_text(f"merge_method: linear\nmodels: [{{model: {one}}}, {{model: {other}}}]\n")
    return path


def test_too_little_disk_for_a_folder_is_refused(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is made, and the way to the Hub is named, which needs less."""
    out = recipe.parent / "out"
    assert main(["run", str(recipe), "--to", str(out), "--max-disk", "1kB", "--quiet"]) == 5
    said = capsys.readouterr().err
    assert "of disk at once, and 1.0 kB are allowed" in said
    assert "publish to hf://" in said
    assert sorted(item.name for item in recipe.parent.iterdir()) == ["mine.yaml", "one", "other"]


def test_the_shard_size_that_fits_is_named_and_fits(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the way to the Hub smaller files need less disk: with the size that the refusal names the plan is accepted."""
    tight = ["plan", str(recipe), "--to", "hf://org/out", "--max-disk", "2010kB"]
    held = tiny.tensors(1, hidden=512, middle=640, vocab=900)
    for name in ("one", "other"):
        tiny.write(recipe.parent / name, held, hidden_size=512, intermediate_size=640, vocab_size=900, head_dim=128)
    assert main([*tight[:-1], "6MB"]) == 5
    found = re.search(r"--shard-size (\S+) makes it fit", capsys.readouterr().err)
    assert found
    assert main([*tight[:-1], "6MB", "--shard-size", found[1]]) == 0
    assert main(tight) == 5
    found = re.search(r"raise --max-disk to ([\d.]+[kM]B): the largest tensor has", capsys.readouterr().err)
    assert found
    assert main([*tight[:-1], found[1], "--shard-size", "1MB"]) == 0


def test_a_run_takes_the_machines_memory_for_its_limit() -> None:
    """Unless it is told another."""
    limit = with_free_memory(Options()).max_memory
    assert limit is not None
    assert limit > 100_000_000
    assert with_free_memory(Options(max_memory=5)).max_memory == 5
