"""Trusted publishing: a CI job's identity for a token that may write to one repo. Signatures are not looked at.

Its address is that of signing in (openid).
"""

import base64
import json
import secrets

from .repos import HubError, User
from .wire import Answer, Context, Exchange, reply

EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"


def exchange(context: Context, x: Exchange) -> Answer:
    """A token for the repo that was asked for, if it trusts the repository in which the job runs."""
    asked = x.json()
    repo, claims = str(asked.get("resource")), _claims(str(asked.get("subject_token")))
    if asked.get("grant_type") != EXCHANGE or claims.get("aud") != context.url:
        raise HubError(400, "invalid_request")
    if repo not in context.world.repos or context.world.publishers.get(repo) != claims.get("repository"):
        raise HubError(403, "No trusted publisher matches this job")
    token = f"hf_jwt_{secrets.token_hex(16)}"
    context.world.users[token] = User(f"publisher of {repo}", token, repo=repo)
    return reply({"access_token": token, "token_type": "bearer", "expires_in": 3600})


def _claims(token: str) -> dict[str, str]:
    try:
        middle = token.split(".")[1]
        found: dict[str, str] = json.loads(base64.urlsafe_b64decode(middle + "=" * (-len(middle) % 4)))
    except (IndexError, ValueError):
        raise HubError(400, "invalid_grant") from None
    return found
