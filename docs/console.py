"""What a person sees in a terminal, for README and docs: the very commands, run on the models of examples/zoo.

With two cores, whatever this machine has. Not here: where it stands on those pages (tables).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MERGE = ("run examples/recipes/task-arithmetic.yaml --to ./out/demo",)
MISTAKES = (
    "check merges/mine.yaml",
    "plan merges/deep.yaml",
    "plan examples/recipes/ties.yaml --max-memory 100MB",
    "run merges/mine.yaml --cuda",
)
_PROGRESS = re.compile(r"^merging: .*\n", re.MULTILINE)
"""Where a machine takes more than some seconds."""

_ZOO = "./examples/zoo"
RECIPES: Mapping[str, str] = {
    "merges/mine.yaml": f"""\
models:
  - model: {_ZOO}/kjv
    parameters:
      weight: 0.5
      densty: 0.5
  - model: {_ZOO}/python
    parameters:
      weight: 0.5
      density: 1.5
merge_method: ties
base_model: {_ZOO}/base
""",
    "merges/deep.yaml": f"""\
slices:
  - sources:
      - model: {_ZOO}/kjv
        layer_range: [0, 4]
  - sources:
      - model: {_ZOO}/python
        layer_range: [2, 8]
merge_method: passthrough
""",
}


def console(commands: tuple[str, ...]) -> str:
    """The commands, each after a prompt, and all that they print."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder).resolve()
        shutil.copytree(ROOT / "examples", here / "examples")
        for name, text in RECIPES.items():
            (here / name).parent.mkdir(exist_ok=True)
            (here / name).write_text(text, "utf-8")
        said = "".join(f"$ merger {command}\n{_run(command, here)}" for command in commands)
    said = _PROGRESS.sub("", said).replace(str(here), "~/merger")
    return f"```console\n{said}```"


def _run(command: str, here: Path) -> str:
    arguments = [sys.executable, "-m", "merger", *shlex.split(command)]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "GITHUB_"))}
    env |= {"COLUMNS": "120", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        arguments, cwd=here, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=_two_cores
    )
    return done.stdout


def _two_cores() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
