"""What the page asks of the Hub besides merging: models by a part of their name, and whose a token is.

Not here: reading and writing models (merger.stores).
"""

from __future__ import annotations

from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import httpx

from merger.errors import Problem
from space.work.job_table import JobError, Reach

FOUND = 12
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
