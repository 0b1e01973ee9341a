"""The command that publishes the Space, and what it publishes: it starts from those files alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from loopback import LoopbackHub
from served import ROOT, ServedSpace
from thorough import thorough_only
from waiting import HANGS_SECONDS

TOKEN = "hf_token_of_the_maker"


def publish(hub: LoopbackHub, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **hub.env(home, TOKEN), "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "space.publish", *arguments]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=HANGS_SECONDS, check=False)


@pytest.fixture(scope="module")
def published(served: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the published Space in a folder; the command was run twice."""
    served.add_user("maker", token=TOKEN)
    for _ in range(2):
        done = publish(served, tmp_path_factory.mktemp("home"), "maker/merger")
        assert done.returncode == 0, done.stderr
    folder = tmp_path_factory.mktemp("published")
    for name, content in served.files("spaces/maker/merger").items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def test_the_space_and_its_models(published: Path, hub: LoopbackHub) -> None:
    """One command makes the Space and the models of its first recipes; a second time it changes nothing."""
    assert len(hub.commits("spaces/maker/merger")) == 2
    assert (published / "app.py").read_bytes() == (ROOT / "space/__main__.py").read_bytes()
    for name in ("base", "kjv", "python"):
        assert "model.safetensors" in hub.tree(f"maker/merger-zoo-{name}")
    assert not [name for name in hub.tree("spaces/maker/merger") if "test" in name or "pycache" in name]


@thorough_only
def test_it_starts_from_its_files_alone(published: Path, served: LoopbackHub, tmp_path: Path) -> None:
    """`python app.py` in the Space's folder serves the page, and knows the package's version without installing it."""
    pytest.importorskip("gradio")
    space = ServedSpace(served, tmp_path, {"PYTHONPATH": ""}, root=published, line=("app.py",))
    space.start()
    space.kill()
    told = "import importlib.metadata as about; print(about.distribution('hub-merger').locate_file(''))"
    found = subprocess.run(
        [sys.executable, "-c", told], cwd=published, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert Path(found).resolve() in (published.resolve(), Path(".").resolve())


def test_no_name_no_space(hub: LoopbackHub, tmp_path: Path) -> None:
    """Without a repo's name nothing is done."""
    done = publish(hub, tmp_path, "merger")
    assert done.returncode == 2
    assert done.stderr == "usage: python -m space.publish owner/name\n"
    assert hub.log == []


def test_the_front_matter() -> None:
    """The Space asks for the least that it needs, and for the gradio that is tested."""
    text = (ROOT / "space/README.md").read_text("utf-8")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["hf_oauth"] is True
    assert front["hf_oauth_scopes"] == ["contribute-repos", "gated-repos"]
    assert len(front["short_description"]) <= 60
    assert f"gradio=={front['sdk_version']}" in (ROOT / "constraints.txt").read_text("utf-8").splitlines()


def test_the_requirements_are_the_tested_ones() -> None:
    """The Space installs what the package and its extra need, at the versions that the tests run with."""
    lines = (ROOT / "space/requirements.txt").read_text("utf-8").splitlines()
    wanted = [re.sub(r"\[.*\]", "", line) for line in lines if not line.startswith("#")]
    pinned = (ROOT / "constraints.txt").read_text("utf-8").lower().splitlines()
    assert [line for line in wanted if line.lower() not in pinned] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["space"]]
    names = {re.split(r"[\[<>=]", line)[0].lower() for line in needed}
    assert names <= {line.split("==")[0].lower() for line in wanted}
