"""When to ask a server again, and after how long: the Hub's and GitHub's alike. Not here: what an answer means."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

TRIES = 4
LONGEST_PAUSE_SECONDS = 300.0
TOO_MANY = 429
PASSING = frozenset({408, TOO_MANY, 500, 502, 503, 504})
"""Answers that another try may mend."""

T = TypeVar("T")


def again(ask: Callable[[], T], asked: Callable[[Exception], float | None]) -> T:
    """The answer of a call that may be made several times without harm.

    Args:
        ask: the call.
        asked: how many seconds the server asked us to wait, by what it raised; None: another try mends nothing.

    Raises:
        Exception: as the last try did.
    """
    for tries in range(1, TRIES):
        try:
            return ask()
        except Exception as error:
            seconds = asked(error)
            if seconds is None:
                raise
        time.sleep(pause(tries, seconds))
    return ask()


def pause(tries: int, asked: float) -> float:
    """Seconds until the next try: twice as long each time, spread so that many workers do not come back at once."""
    return max(min(asked, LONGEST_PAUSE_SECONDS), min(30.0, 0.25 * 2.0**tries) * random.uniform(0.5, 1.0))
