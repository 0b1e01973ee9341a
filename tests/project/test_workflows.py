"""action.yml and the workflows: pinned, wired to the program, and free of spliced inputs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from places import REPOSITORY, ROOT

from merger.action import inputs
from merger.action.inputs import Inputs
from merger.safety.environment import OURS

ACTION = ROOT / "action.yml"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FILES = [ACTION, *WORKFLOWS, *sorted((ROOT / "examples").glob("*.yml"))]


def steps(node: Any) -> Iterator[dict[str, Any]]:
    """Every step of an action or a workflow."""
    if isinstance(node, dict):
        yield from node.get("steps") or ()
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from steps(inner)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_actions_of_others_are_pinned_by_commit_with_their_version(file: Path) -> None:
    """All but our own, which users follow by its major version."""
    lines = [line.split("uses:")[1].strip() for line in file.read_text().splitlines() if "uses:" in line]
    assert lines
    others = [line for line in lines if not line.startswith(("./", f"{REPOSITORY}@v1"))]
    assert [line for line in others if not re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_no_expression_stands_in_a_command(file: Path) -> None:
    """What an event or an input says comes in by the environment."""
    found = list(steps(yaml.safe_load(file.read_text())))
    assert found
    assert [step["run"] for step in found if "${{" in step.get("run", "")] == []


def test_every_input_reaches_the_program_and_is_described() -> None:
    """Under the name that the program reads; only what sets up Python is used before."""
    declared = yaml.safe_load(ACTION.read_text())
    (merge,) = [step for step in declared["runs"]["steps"] if step.get("id") == "merge"]
    before = {"python-version", "torch-index", "install"}
    wired = {inputs.variable(name): f"${{{{ inputs.{name} }}}}" for name in declared["inputs"] if name not in before}
    assert merge["env"] == wired
    assert {name for name in OURS if name.startswith("INPUT_")} == {name for name in wired if name.endswith("_TOKEN")}
    for about in (*declared["inputs"].values(), *declared["outputs"].values()):
        assert about["description"].endswith(".")


def test_the_defaults_of_the_action_are_understood(tmp_path: Path) -> None:
    """As the runner hands them over."""
    declared = yaml.safe_load(ACTION.read_text())["inputs"]
    given = {inputs.variable(name): str(about["default"]) for name, about in declared.items()}
    taken = Inputs.take({**given, "GITHUB_WORKSPACE": str(tmp_path)})
    assert (taken.recipe, taken.mode, taken.folder) == ("merges/*.yaml", "auto", tmp_path.resolve())
    assert (taken.part_size, taken.time_limit, taken.commit_lock, taken.comment) == (60 * 10**9, None, False, True)
    assert (taken.options.force, taken.options.to, taken.options.part, taken.options.read_token) == (False,) + (
        None,
    ) * 3


PIP = """\
#!/bin/sh
# A Python whose pip only writes down what it is asked for.
[ "$2 $3" = "-m pip" ] || [ "$2 $3" = "-m uv" ] || exec "{python}" "$@"
echo "$@" >> "{log}"
for word; do case "$word" in "$TMPDIR"/*) cat "$word" >> "{log}";; esac; done
"""


LINEAR = "merge_method: linear\nmodels: [{model: org/a}, {model: org/b}]\n"
MIXED = "base_model: org/a\nexperts:\n- source_model: org/b\n  positive_prompts: [code]\n"


@pytest.mark.parametrize(
    ("recipe", "settings", "count", "torch"),
    [
        (LINEAR, {}, 3, None),
        (LINEAR, {"INPUT_GGUF": "Q8_0"}, 4, None),
        ("what: is this", {}, 3, None),
        (LINEAR + "evaluate: {perplexity: {text: hf://org/a/b.txt}}\n", {}, 7, "--torch-backend cpu --no-deps"),
        (MIXED, {"TORCH_INDEX": "the-index"}, 6, "--no-deps --index-url the-index torch"),
    ],
)
def test_the_action_installs_no_torch_but_for_recipes_that_take_it(
    recipe: str, settings: dict[str, str], count: int, torch: str | None, tmp_path: Path
) -> None:
    """All with what the package needs besides, and with the Action's own extra; torch is one for CPUs."""
    (tmp_path / "mine.yaml").write_text(recipe)
    settings = {**settings, "GITHUB_WORKSPACE": str(tmp_path), "INPUT_RECIPE": "*.yaml"}
    stand_in, log = tmp_path / "bin", tmp_path / "log"
    stand_in.mkdir()
    (stand_in / "python").write_text(PIP.format(python=sys.executable, log=log))
    (stand_in / "python").chmod(0o755)
    path = f"{stand_in}{os.pathsep}{os.environ['PATH']}"
    settings = {"PATH": path, "TMPDIR": str(tmp_path / "bin"), "KEPT": str(tmp_path / "kept"), **settings}

    def install(*extras: str) -> str:
        line = ["bash", str(ROOT / ".ci" / "install"), *extras]
        return subprocess.run(line, env=settings, check=True, capture_output=True, text=True).stdout.strip()

    extras = install()
    assert (extras not in ("", "gguf")) == (torch is not None)
    if extras:
        install(*extras.split())
    told = log.read_text()
    assert told.count("pip install") == count
    assert ("torch" in told) == (torch is not None)
    assert torch is None or torch in told
    assert ("transformers>=" in told) == (torch is not None)
    for need in ("huggingface_hub", "jinja2", "numpy", "pyyaml", "requests"):
        assert re.search(rf"^{need}[><=]", told, re.MULTILINE)
