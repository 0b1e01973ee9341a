"""What a notebook shows of recipes, plans and results, and that examples/merge.ipynb runs from top to bottom."""

from __future__ import annotations

from pathlib import Path

import pytest
from places import ROOT
from thorough import thorough_only

import merger
from merger.cli.notebook import SHOWN
from merger.models.formats.safetensors import WrittenShard

RECIPE = "examples/recipes/linear.yaml"


def test_recipe_plan_and_result_are_shown_as_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe is its text; of a result the files, and the lineage's picture inside of the Markdown."""
    monkeypatch.chdir(ROOT)
    recipe, plan = merger.check(RECIPE), merger.plan(RECIPE)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "lineage.png").write_bytes(b"\x89PNG")
    shard = WrittenShard("model.safetensors", 2_750_000, "e" * 64)
    result = merger.Result(str(tmp_path), None, (shard,), 1)
    shown = {type(each): SHOWN[type(each)](each) for each in (recipe, plan, result)}
    assert shown[merger.Recipe] == f"```yaml\n{Path(RECIPE).read_text('utf-8').strip()}\n```"
    assert f"| plan | `{plan.hash[:16]}` |" in shown[merger.Plan]
    assert "| `kjv` | local folder | `apache-2.0` | 2.7 MB |" in shown[merger.Plan]
    assert f"| `model.safetensors` | 2,750,000 | `{'e' * 12}` |" in shown[merger.Result]
    assert shown[merger.Result].endswith("![lineage](data:image/png;base64,iVBORw==)")


@thorough_only
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a real kernel: the recipe, plan and result as Markdown, the plot as a picture, and the proof."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "examples" / "merge.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    done = nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}).execute()
    cells = [cell.outputs for cell in done.cells if cell.cell_type == "code"]
    kinds = [[output["data"].keys() for output in outputs if "data" in output] for outputs in cells]
    assert all("text/markdown" in of[-1] for of in kinds[:3])
    assert "image/png" in kinds[3][-1]
    assert cells[4][-1]["data"]["text/plain"] == "(True, ())"
