"""How long to wait for the Hub's answer, when to ask again, and after how long. Not here: what is asked.

The client by itself waits for ever, and its words about a second try show addresses whose signature is as good as a
token: from here on, for the whole process, it does neither.
"""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub import set_client_factory
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx, parse_ratelimit_headers
from huggingface_hub.utils._http import default_client_factory

TIMEOUT_SECONDS = 30.0
"""How long a connection may stand still while bytes travel."""

ANSWER_SECONDS = 150.0
"""How long an answer may take to begin: the Hub gives a commit a minute, the end of a large upload may take longer."""

TRIES = 4
LONGEST_PAUSE_SECONDS = 300.0
TOO_MANY = 429
PASSING = frozenset({408, TOO_MANY, 500, 502, 503, 504})
"""Answers that another try may mend."""

T = TypeVar("T")


def patiently(ask: Callable[[], T]) -> T:
    """The answer of a call that may be made several times without harm.

    Raises:
        HfHubHTTPError, TransportError: as the last try did.
    """
    for tries in range(1, TRIES):
        try:
            return ask()
        except (HfHubHTTPError, httpx.TransportError) as error:
            if not is_passing(error):
                raise
            time.sleep(pause(tries, asked(error)))
    return ask()


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
    return 0.0 if response is None else asked_pause(response)


def asked_pause(answer: httpx.Response) -> float:
    """How many seconds an answer asks us to wait, in one of the two ways it may say so."""
    after = answer.headers.get("Retry-After", "")
    limit = parse_ratelimit_headers(answer.headers) if answer.status_code == TOO_MANY else None
    return float(after) if after.isdigit() else float(limit.reset_in_seconds) if limit else 0.0


def pause(tries: int, asked: float) -> float:
    """Seconds until the next try: twice as long each time, spread so that many workers do not come back at once."""
    return max(min(asked, LONGEST_PAUSE_SECONDS), min(30.0, 0.25 * 2.0**tries) * random.uniform(0.5, 1.0))


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
