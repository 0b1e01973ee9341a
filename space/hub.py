"""What the page asks of the Hub besides merging: models by a part of their name, recipes, and whose a token is.

Not here: reading and writing models (merger.stores).
"""

from __future__ import annotations

from typing import Any

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import build_hf_headers, get_session, httpx

from merger.errors import Problem
from merger.safety.names import need_repo
from space.work.admission import MOST_BYTES
from space.work.job_table import JobError, Reach

FOUND = 12
_RECIPES = ("recipe.yaml", "mergekit_config.yml")
_SECONDS = 10.0
_MOST_NAMES = 100
_WRITING = ("repo.write", "discussion.write")


def search(words: str, token: str | None) -> list[str]:
    """Names of models that hold these words, the most downloaded first; none where the Hub gives no answer."""
    if len(words.strip()) < 2:
        return []
    try:
        found = HfApi(token=token or False).list_models(search=words.strip()[:100], sort="downloads", limit=FOUND)
        return [model.id for model in found if "/" in model.id]
    except (HfHubHTTPError, httpx.HTTPError, ValueError):
        return []


def published_recipe(repo: str, token: str | None) -> str:
    """The recipe that a merge was made by, as it lies beside it.

    Raises:
        RecipeError: that is no repo's name.
        JobError: there is none that we may read, or it is longer than any recipe.
    """
    need_repo(repo)
    for name in _RECIPES:
        headers = {**build_hf_headers(token=token or False), "Range": f"bytes=0-{MOST_BYTES}"}
        try:
            how: dict[str, Any] = {"headers": headers, "timeout": _SECONDS, "follow_redirects": True}
            with get_session().stream("GET", hf_hub_url(repo, name), **how) as answer:
                text = next(answer.iter_bytes(MOST_BYTES + 1), b"") if answer.is_success else b""
        except httpx.HTTPError:
            text = b""
        if 0 < len(text) <= MOST_BYTES:
            return text.decode("utf-8", "replace")
    what = f"there is no recipe in {repo} that we may read"
    raise JobError(Problem(what, hint=f"it would be its file {' or '.join(_RECIPES)}"))


def free_name(repo: str, token: str | None) -> str:
    """The name with the first number behind it of which there is no repo, as far as the Hub says it."""
    api = HfApi(token=token or False)
    names = [f"{repo}-{number}" for number in range(2, _MOST_NAMES)]
    try:
        return next((name for name in names if not api.repo_exists(name)), repo)
    except (HfHubHTTPError, httpx.HTTPError):
        return names[0]


def owner_of(token: str) -> tuple[str, Reach]:
    """The user's name behind a token, and what the token may write as far as the Hub says it.

    Raises:
        JobError: the Hub does not know it, or does not answer.
    """
    try:
        about = HfApi(token=token).whoami()
        return str(about["name"]), _reach((about.get("auth") or {}).get("accessToken") or {})
    except (HfHubHTTPError, httpx.HTTPError, LocalTokenNotFoundError, ValueError, KeyError, AttributeError) as error:
        what = f"the Hub does not say whose this token is ({type(error).__name__})"
        raise JobError(Problem(what, hint="send a token of yours in the header Authorization: Bearer hf_…")) from None


def _reach(token: dict[str, Any]) -> Reach:
    """Of what whoami says of a token; an app's has no role."""
    named = token.get("fineGrained") or {}
    allowed = {
        *(named.get("global") or ()),
        *(right for each in named.get("scoped") or () for right in each["permissions"]),
    }
    if token.get("role") == "fineGrained":
        return Reach.SOME if allowed.intersection(_WRITING) else Reach.READS
    return Reach.READS if token.get("role") == "read" else Reach.ALL
