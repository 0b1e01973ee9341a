"""Recipes to begin with: some of the small models in examples/zoo, and one of placeholders for each method.

The zoo's models lie on the Hub under the name of the Space's owner, where the command that publishes the Space puts
them. Not here: the recipes themselves (examples/recipes, templates/recipes).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
ZOO = ("base", "kjv", "python")
FIRST = "Two skills in one small model"
_NAMES = {
    "task-arithmetic": FIRST,
    "linear": "The plain mean of two models",
    "ties": "TIES: the larger changes, by vote",
    "slerp": "SLERP, by layer and kind of tensor",
    "stack": "A deeper model, of slices",
    "two-methods": "Two methods in one model",
}
_LOCAL = re.compile(r"\./examples/zoo/(\w+)")
_COMMAND = re.compile(r"^# Run it from the root.*\n", re.MULTILINE)


def zoo_owner(environment: Mapping[str, str] = os.environ) -> str:
    """Whose the zoo's models are."""
    return environment.get("MERGER_SPACE_ZOO") or environment.get("SPACE_ID", "your-name/merger").split("/")[0]


def zoo_repo(owner: str, name: str) -> str:
    """Where a model of the zoo lies."""
    return f"{owner}/merger-zoo-{name}"


@cache
def examples() -> Mapping[str, str]:
    """Recipe by the words for it; those of the zoo come first."""
    owner = zoo_owner()
    ready = {title: _of_the_zoo(name, owner) for name, title in _NAMES.items()}
    blank = {f"Blank: {path.stem}": path.read_text("utf-8") for path in sorted(_folder().glob("*.yaml"))}
    return {**ready, **blank}


def _folder() -> Path:
    return _ROOT / "templates" / "recipes"


def _of_the_zoo(name: str, owner: str) -> str:
    text = (_ROOT / "examples" / "recipes" / f"{name}.yaml").read_text("utf-8")
    return _LOCAL.sub(lambda found: zoo_repo(owner, found[1]), _COMMAND.sub("", text))
