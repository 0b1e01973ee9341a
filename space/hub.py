"""What the page asks of the Hub besides merging: models by a part of their name, and whose a token is.

Not here: reading and writing models (merger.stores).
"""

from __future__ import annotations

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import httpx

from merger.errors import Problem
from space.jobs import JobError

FOUND = 12


def search(words: str, token: str | None) -> list[str]:
    """Names of models that hold these words, the most downloaded first; none where the Hub gives no answer."""
    if len(words.strip()) < 2:
        return []
    try:
        found = HfApi(token=token or False).list_models(search=words.strip()[:100], sort="downloads", limit=FOUND)
        return [model.id for model in found if "/" in model.id]
    except (HfHubHTTPError, httpx.HTTPError, ValueError):
        return []


def owner_of(token: str) -> str:
    """The user's name behind a token.

    Raises:
        JobError: the Hub does not know it, or does not answer.
    """
    try:
        return str(HfApi(token=token).whoami()["name"])
    except (HfHubHTTPError, httpx.HTTPError, LocalTokenNotFoundError, ValueError, KeyError) as error:
        what = f"the Hub does not say whose this token is ({type(error).__name__})"
        raise JobError(Problem(what, hint="send a token of yours in the header Authorization: Bearer hf_…")) from None


def page_of(repo: str) -> str:
    """A repo's address."""
    return f"{constants.ENDPOINT}/{repo}"
