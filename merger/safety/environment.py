"""Secrets of the environment: which variables they are, what a child gets, and a process with none in /proc.

Not here: texts that leave this process (secrets).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from merger import system

LEAST = 8
"""A shorter text is no secret: it would be found everywhere."""

CLIENTS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Where the Hub's client looks for its token, in this order."""

OURS = (
    *CLIENTS, "HF_OIDC_ID_TOKEN", "INPUT_HF_TOKEN", "INPUT_HF_READ_TOKEN", "INPUT_GITHUB_TOKEN",
    "ACTIONS_ID_TOKEN_REQUEST_TOKEN", "OAUTH_CLIENT_SECRET", "MERGER_BOT_TOKEN", "MERGER_BOT_SECRET",
)  # fmt: skip
"""What the client, the Action, the Space and the bot read."""

_LAST_WORDS = ("TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIALS", "KEY")
_HANDED_OVER = "MERGER_HANDED_OVER"


def is_secret(name: str, value: str) -> bool:
    """Whether a variable is a secret, ours or another's, by the last word of its name.

    >>> is_secret("AWS_SECRET_ACCESS_KEY", "0123456789"), is_secret("HF_TOKEN_PATH", "/home/me/token")
    (True, False)
    """
    return len(value) >= LEAST and name.upper().rpartition("_")[2] in _LAST_WORDS


def public(given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What of an environment a child gets: all but secrets."""
    return {name: value for name, value in given.items() if not is_secret(name, value)}


def of_the_client() -> dict[str, str]:
    """The Hub's tokens in the environment, for a child that has to ask the Hub: to be told, not to be inherited."""
    return {name: os.environ[name] for name in CLIENTS if name in os.environ}


def hand_over() -> None:
    """Start this process anew without secrets in its first environment, which /proc shows to others for ever.

    To be called first of all. Those that we use come back by a pipe, and from then on only this process's own memory
    has them; the others are let go of.
    """
    told = os.environ.pop(_HANDED_OVER, None)
    if told is not None:
        with os.fdopen(int(told), "rb") as pipe:
            os.environ.update(json.load(pipe))
    elif len(kept := public()) < len(os.environ):
        secrets = {name: os.environ[name] for name in OURS if name in os.environ}
        system.replace_process(kept, json.dumps(secrets).encode(), _HANDED_OVER)
