"""Texts of the page: what methods are of one family, examples to begin with, and what to do where the Space cannot.

Not here: whether it is too big (work.admission).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from merger.methods.registry import START, Method, methods_by_use

_ROOT = Path(__file__).resolve().parents[2]
_EXAMPLES = _ROOT / "examples"

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


def for_the_page(words: str) -> str:
    """The words of a problem for who is at the page, where no command, token or folder is at hand."""
    for pattern, here in _HERE:
        words = pattern.sub(here, words)
    return words


_HERE = [
    (re.compile(pattern), here)
    for pattern, here in (
        (r"publish to another name, or replace it in one commit with --force", "choose below what shall happen to it"),
        (r"; a private model needs HF_TOKEN; a folder starts with \./", "; a private model needs you to be signed in"),
        (r"(?:;|,? or) (?:(?:source_)?model: )?\./folder", ""),
        (r"(?:;|(?<=\?)) a folder of (?:that|the other) name is \./\S+", ""),
        (r"name the folders? (?:of the result|(?:that it|they) made)", "publish it, and name its repo"),
        (r"give a token of that account as HF_TOKEN", "sign in with that account"),
        (r"set HF_TOKEN(?: anew, or unset it)?", "sign out, and in again"),
        (r", then HF_ENDPOINT|, and check HF_ENDPOINT", ""),
        (r", or --to\b| \(--exclude\)|(?<=\| disk \| )[^|,]+ for a folder, | for the Hub(?= \|)", ""),
        (r"(?:write a )?smaller (?:--[a-z-]+(?: and )?)+", "a smaller merge"),
    )
]


# ---- methods --------------------------------------------------------------------------------------------------------


_FAMILIES = {
    "task_vectors": ("task vectors", "Adds up what each model changed in the base."),
    "averaging": ("averages", "Averages the models' numbers."),
    "spherical": ("arcs", "Goes from one model to the other along an arc, so that norms are kept."),
    "sparsify": ("thinned", "Adds up what is left of the changes once many of them are left out."),
    "consensus": ("agreement", "Adds up the changes that matter to several models."),
    "importance": ("importance", "Takes the changes that matter most."),
    "spectral": ("singular values", "Adds up the changes by their main directions."),
    "subspace": ("subspaces", "Adds up the changes in directions that they share."),
}


def _family(method: Method) -> str:
    return method.function.__module__.rpartition(".")[2]


def family_sentence(method: Method) -> str:
    """A sentence on what a method and its like do; empty for one of somebody's own."""
    return _FAMILIES.get(_family(method), ("", ""))[1]


def method_choices() -> list[tuple[str, str]]:
    """The methods' titles and names, those to start with first, then family by family."""
    order = sorted(methods_by_use(), key=lambda method: -1 if method.name in START else _kind(method))
    return [(_title(method), method.name) for method in order]


def _kind(method: Method) -> int:
    """Where its family stands; somebody's own stand last."""
    return next((place for place, kind in enumerate(_FAMILIES) if kind == _family(method)), len(_FAMILIES))


def _title(method: Method) -> str:
    kind = _FAMILIES.get(_family(method), ("your own", ""))[0]
    return f"{'★ ' if method.name in START else ''}{method.title} · {kind}"


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
    """Recipe by the words for it; all are of the zoo, so that each runs as it stands."""
    owner = zoo_owner()
    return {title: _of_the_zoo(name, owner) for name, title in _NAMES.items()}


def _of_the_zoo(name: str, owner: str) -> str:
    text = (_EXAMPLES / "recipes" / f"{name}.yaml").read_text("utf-8")
    return _LOCAL.sub(lambda found: zoo_repo(owner, found[1]), _FOR_FILES.sub("", text))
