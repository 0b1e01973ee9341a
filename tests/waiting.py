"""Waiting in tests: for a condition, never for a time. The limit only ends what would hang for ever."""

import time
from collections.abc import Callable
from typing import TypeVar

HANGS_SECONDS = 600.0

T = TypeVar("T")


def until(holds: Callable[[], T], told: Callable[[], object] = str, pause: float = 0.01) -> T:
    """Ask again and again until the answer is true, and return it; `told` is what to say of one that never is."""
    end = time.monotonic() + HANGS_SECONDS
    while not (found := holds()):
        assert time.monotonic() < end, told()
        time.sleep(pause)
    return found
