"""Texts of the page: examples to begin with, and where a merge goes that is too big for the Space.

Not here: whether it is too big (work.admission).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_EXAMPLES, _TEMPLATES = _ROOT / "examples", _ROOT / "templates" / "recipes"

STEPS = """\
**Make it with the GitHub Action**, which is free for public repositories: put this recipe into `merges/mine.yaml` of a
repository on GitHub, the workflow below into `.github/workflows/merge.yml`, and a token of the Hub that may write into
the repository's secret `HF_TOKEN`. The workflow shares the merge between several runners.

**Or as Jobs on the Hub**, which cost money, under your own account: `merger run mine.yaml --engine jobs --parts 4` on
your own machine. No button here starts them: that would take a right to spend your money, and signing in asks for none.
"""


@cache
def workflow() -> str:
    """A workflow that makes one big merge in parts."""
    return (_EXAMPLES / "workflow-parts.yml").read_text("utf-8")


# ---- examples -------------------------------------------------------------------------------------------------------


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
_FOR_FILES = re.compile(r"^# (?:Run it from the root|yaml-language-server).*\n", re.MULTILINE)


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
    blank = {
        f"Blank: {path.stem}": _FOR_FILES.sub("", path.read_text("utf-8")) for path in sorted(_TEMPLATES.glob("*.yaml"))
    }
    return {**ready, **blank}


def _of_the_zoo(name: str, owner: str) -> str:
    text = (_EXAMPLES / "recipes" / f"{name}.yaml").read_text("utf-8")
    return _LOCAL.sub(lambda found: zoo_repo(owner, found[1]), _FOR_FILES.sub("", text))
