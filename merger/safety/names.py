"""What a repo of models on the Hub may be called, in plain Python: for whoever names one before the Hub is asked.

Not here: whether there is such a repo, and who may write to it (stores).
"""

from __future__ import annotations

import re
from urllib.parse import unquote

from merger.errors import Problem, RecipeError

HUB = "hf://"
"""What stands before the name of what is on the Hub."""

HINT = (
    "write it as its address on the Hub ends, owner/name: letters, digits, -, _ and ., 96 at most in each; "
    "neither begins or ends with - or ., nowhere is -- or .., and .git is no ending"
)

_PART = "[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_NO_MODELS = ("datasets/", "spaces/", "kernels/", "buckets/", "docs/", "papers/", "collections/", "blog/")
_OTHER_KINDS = "(?:models|datasets|spaces|kernels|buckets)/"
REPO = rf"^(?!.*(?:--|\.\.|\.git$))(?!{_OTHER_KINDS}){_PART}/{_PART}$"
"""One pattern, for Python and for JSON Schema alike."""

PAGE = r"^https?://(?:huggingface\.co|hf\.co)/"
"""How the address of a page begins, in the same way."""

_REPO = re.compile(REPO)


_PAGE = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repo>[^/?#\s]+/[^/?#\s]+)"
    r"(?:/(?:tree|blob|resolve|raw|commits?)/(?P<revision>[^/?#\s]+)(?:/(?P<inside>[^?#\s]+))?)?(?:[/?#]\S*)?"
)


def parse_name(text: str) -> str:
    """The model that words name: of a page's address, or of what follows ``hf://``; other words are as they are.

    >>> named("https://huggingface.co/org/name/tree/v1"), named("hf://org/name"), named("./org/name")
    ('org/name@v1', 'org/name', './org/name')
    """
    page = _PAGE.fullmatch(text.strip())
    if page is None or page["repo"].startswith(_NO_MODELS):
        return text.removeprefix(HUB)
    inside = (page["inside"] or "").strip("/")
    within = f"/{inside}" if inside and ("/tree/" in text or inside.endswith(".safetensors")) else ""
    return page["repo"] + within + (f"@{unquote(page['revision'])}" if page["revision"] else "")


def hub_path(place: str) -> str | None:
    """What is named on the Hub, a repo or a file of one; None for a place on this machine.

    >>> hub_path("hf://alice/merged-7b"), hub_path("./merged")
    ('alice/merged-7b', None)
    """
    return place.removeprefix(HUB) if place.startswith(HUB) else None


def parse_repo(text: str) -> str:
    """The repo that words name as a destination: its page may be that of its main branch."""
    return parse_name(text).removesuffix("@main") if _PAGE.fullmatch(text.strip()) else parse_name(text)


def is_repo(name: str) -> bool:
    """Whether the Hub lets a repo of models be called so.

    >>> is_repo("alice/merged-7b"), is_repo("alice/.."), is_repo("datasets/merged")
    (True, False, False)
    """
    return _REPO.fullmatch(name) is not None


def need_repo(name: str) -> None:
    """Refuse what is no repo's name.

    Raises:
        RecipeError: with the Hub's rule.
    """
    if not is_repo(name):
        raise RecipeError(Problem(f"{name!r} is no repo's name on the Hub", hint=HINT))
