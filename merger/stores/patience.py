"""How long to wait for the Hub's answer, and which of its answers are worth another try. Not here: what is asked.

The client by itself waits for ever, and its words about a second try show addresses whose signature is as good as a
token: from here on, for the whole process, it does neither.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from traceback import walk_tb
from typing import TypeVar

from huggingface_hub import set_client_factory
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers, httpx, parse_ratelimit_headers
from huggingface_hub.utils._http import default_client_factory

from merger.retries import PASSING, TOO_MANY, again
from merger.safety import secrets

TIMEOUT_SECONDS = 30.0
"""How long a connection may stand still while bytes travel."""

ANSWER_SECONDS = 150.0
"""How long an answer may take to begin: the Hub gives a commit a minute, the end of a large upload may take longer."""

T = TypeVar("T")


class UnreadableAnswer(httpx.TransportError):
    """An answer that says all is well, and is none that the Hub or GitHub gives: a proxy's page, JSON without a value.

    As good as no answer: another try may mend it.
    """


@contextmanager
def understood() -> Iterator[None]:
    """Around calls of the Hub's client, which takes it for granted that every answer is what it should be.

    Raises:
        UnreadableAnswer: it stumbled over one that is not.
    """
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        frames = (frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__))
        is_the_clients = any(name.partition(".")[0] == "huggingface_hub" for name in frames)
        said = not isinstance(error, ValueError) or isinstance(error, _NO_TEXT) or _MALFORMED.search(str(error))
        if is_the_clients and said:
            raise UnreadableAnswer(type(error).__name__) from None
        raise  # a fault of ours, or what the client refuses by itself


_NO_TEXT = (json.JSONDecodeError, UnicodeDecodeError)
_MALFORMED = re.compile("improperly formatted|Malformed response|Invalid (server response|etag)")
"""What the client says of answers that it does look at; its other ValueErrors are of what it is asked to do."""


def headers_now(token: str | bool | None) -> dict[str, str]:
    """The headers that tell the Hub who asks, for one request: a token of trusted publishing is renewed each hour.

    A token that the client finds or renews by itself is one in use, from now on.

    Raises:
        OIDCError, HTTPError: it could not be renewed.
    """
    with understood():
        headers: dict[str, str] = build_hf_headers(token=token)
    if not isinstance(token, str):
        secrets.keep(headers.get("authorization", "").removeprefix("Bearer "))
    return headers


def patiently(ask: Callable[[], T]) -> T:
    """The answer of a call that may be made several times without harm.

    Raises:
        HfHubHTTPError, TransportError: as the last try did.
    """

    def understand() -> T:
        with understood():
            return ask()

    return again(understand, _worth)


def _worth(error: Exception) -> float | None:
    is_known = isinstance(error, HfHubHTTPError | httpx.TransportError)
    return asked(error) if is_known and is_passing(error) else None


def is_passing(error: Exception) -> bool:
    """Whether another try may mend it: no answer at all, or one that speaks of trouble."""
    status = status_of(error)
    return status is None or status in PASSING


def status_of(error: Exception) -> int | None:
    """The HTTP status of the answer; None where there was none."""
    response = error.response if isinstance(error, HfHubHTTPError) else None
    return None if response is None else int(response.status_code)


def asked(error: Exception) -> float:
    """How many seconds the server asked us to wait."""
    response = error.response if isinstance(error, HfHubHTTPError) else None
    return 0.0 if response is None else asked_pause(response.status_code, response.headers)


def asked_pause(status: int, headers: Mapping[str, str]) -> float:
    """How many seconds an answer asks us to wait, in one of the two ways it may say so."""
    after = headers.get("Retry-After", "")
    limit = parse_ratelimit_headers(headers) if status == TOO_MANY else None
    return float(after) if after.isdecimal() else float(limit.reset_in_seconds) if limit else 0.0


def _client() -> httpx.Client:
    client = default_client_factory()
    client.event_hooks = {**client.event_hooks, "request": [*client.event_hooks["request"], _bounded]}
    return client


def _bounded(request: httpx.Request) -> None:
    """Some calls ask to wait for ever in so many words, so that a client's own timeout would not do."""
    if request.extensions.get("timeout", {}).get("read") is None:
        request.extensions["timeout"] = httpx.Timeout(TIMEOUT_SECONDS, read=ANSWER_SECONDS).as_dict()


def _unsigned(record: logging.LogRecord) -> bool:
    """Take the query from the addresses in a line of the client's log."""
    record.msg, record.args = re.sub(r"\?\S+", "", record.getMessage()), ()
    return True


set_client_factory(_client)
for _handler in logging.getLogger("huggingface_hub").handlers:
    _handler.addFilter(_unsigned)
