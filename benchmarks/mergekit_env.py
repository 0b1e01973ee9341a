"""mergekit in an environment of its own beside these benchmarks, made on first use. It is never imported here.

Its code is LGPL and stays outside: the benchmarks only run its command on the same recipes and look at what it wrote.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

VERSION = "0.1.5"
_HERE = Path(__file__).resolve().parent
_FOLDER = Path(os.environ.get("MERGEKIT_ENV", _HERE / ".mergekit"))


def command() -> Path:
    """The program mergekit-yaml; about two minutes and 1.5 GB of disk the first time."""
    program = _FOLDER / "bin" / "mergekit-yaml"
    if not program.exists():
        print(f"installing mergekit {VERSION} into {_FOLDER.name}/ ...", file=sys.stderr, flush=True)
        venv.create(_FOLDER, with_pip=True)
        wanted = ["torch==2.13.0", f"mergekit=={VERSION}"]
        subprocess.run([_FOLDER / "bin" / "pip", "install", "--quiet", *wanted], check=True)
    return program


def arguments(recipe: Path, out: Path, seed: int = 0) -> Sequence[str]:
    """The command line that merges `recipe` into `out`, with its own settings for a machine without a GPU."""
    return [str(command()), str(recipe), str(out), "--random-seed", str(seed), "--lazy-unpickle", "--no-copy-tokenizer"]


def merge(recipe: Path, out: Path, seed: int = 0) -> None:
    """Run it; its whole output is shown if it fails."""
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(arguments(recipe, out, seed), capture_output=True, text=True, env=offline)
    if done.returncode:
        raise RuntimeError(f"mergekit failed on {recipe}:\n{done.stdout}\n{done.stderr}")
