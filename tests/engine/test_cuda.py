"""`--device cuda` runs the same blocks on a GPU; where there is none, these tests are skipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from merger.run.options import Options
from merger.run.pipeline import merge
from merger.run.prepare import plan, read_recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU on this machine")
RECIPES = sorted((Path(__file__).parents[2] / "templates/recipes").glob("*.yaml"))
LIMIT = 8_000_000_000


@pytest.mark.parametrize("template", RECIPES, ids=[path.stem for path in RECIPES])
def test_a_gpu_makes_what_the_processor_makes(template: Path, tmp_path: Path) -> None:
    """Every method, to one rounding of the output's dtype, and in little of the GPU's memory."""
    text = template.read_text()
    for seed, name in enumerate(("base", "model-a", "model-b", "model-c")):
        text = text.replace(f"org/{name}", str(tiny.model(tmp_path / name, seed, hidden=64, middle=96, vocab=512)))
    (tmp_path / "mine.yaml").write_text(text)
    made = {}
    torch.cuda.reset_peak_memory_stats()
    for device in ("cpu", "cuda"):
        options = Options(to=str(tmp_path / device), device=device)
        merge(*plan(read_recipe(tmp_path / "mine.yaml"), options), options)
        made[device] = tiny.read(tmp_path / device)
    for name, tensor in made["cpu"].items():
        torch.testing.assert_close(made["cuda"][name], tensor, rtol=2**-7, atol=1e-4, msg=name)
    assert torch.cuda.max_memory_allocated() < LIMIT
