"""A method of another package is found by its entry point and is a method like any other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

GUIDE = Path(__file__).parents[2] / "docs" / "add-a-method.md"


@pytest.fixture
def outside(tmp_path: Path) -> dict[str, str]:
    """An environment in which a package offers the method of docs/add-a-method.md, word for word."""
    code = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)[0]
    site = tmp_path / "site"
    installed = site / "my_package-1.0.dist-info"
    (site / "my_package").mkdir(parents=True)
    installed.mkdir()
    (site / "my_package" / "__init__.py").write_text("")
    (site / "my_package" / "lower.py").write_text(code)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[merger.methods]\nlower = my_package.lower\n")
    return {**os.environ, "PYTHONPATH": str(site)}


def merger(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """The real command."""
    return subprocess.run([sys.executable, "-m", "merger", *arguments], env=env, capture_output=True, text=True)


def test_the_guides_method_merges_from_outside(outside: dict[str, str], tmp_path: Path) -> None:
    """The guide's method, installed elsewhere, is listed, checked with bounds, and merges two models."""
    one, two = tiny.model(tmp_path / "one", 1), tiny.model(tmp_path / "two", 2)
    recipe = tmp_path / "r.yaml"
    text = f"merge_method: lower\nmodels: [{{model: {one}}}, {{model: {two}}}]\nparameters: {{share: 0.5}}\n"
    recipe.write_text(text)
    assert "From the mean of two tensors" in merger("methods", env=outside).stdout
    done = merger("run", str(recipe), "--to", str(tmp_path / "out"), "--quiet", env=outside)
    assert done.returncode == 0, done.stderr
    a, b = tiny.read(one), tiny.read(two)
    for name, tensor in tiny.read(tmp_path / "out").items():
        mean = (a[name].float() + b[name].float()) / 2
        assert torch.equal(tensor, (mean + 0.5 * (torch.minimum(a[name], b[name]).float() - mean)).bfloat16())
    recipe.write_text(text.replace("0.5", "1.5"))
    refused = merger("check", str(recipe), env=outside)
    assert refused.returncode == 2
    assert f"{recipe}:3:21: parameters.share: 1.5 is outside 0 to 1\n    share: how far to go" in refused.stderr
