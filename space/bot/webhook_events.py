"""What was asked of the bot: one record for each event of the Hub, kept in the queue's file until it is answered.

An event that comes twice is one record: that is what a replayed webhook comes to. Not here: answering (bot).
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from huey.storage import BaseStorage

KEPT = 2_000
"""How many records are kept: an event older than all of them would be taken for a new one."""

_KEY = "ask:"


@dataclass(frozen=True)
class Ask:
    """An event that asks for something.

    Args:
        key: names the event; the same event sent again has the same.
        repo: ``owner/name`` where it happened.
        num: the discussion's number; None for a commit, until one is opened about it.
        comment: the comment's id; empty for a commit.
        old, new: main before and after a commit.
        state: new, waits (for its turn), job (a merge is under way), or over.
        job: the job's id.
        main: the commit that main stood at when the merge was queued.
        is_begun: whether it was said that the merge has begun.
        is_meant: whether it is known that it asks us.
        again: when it is looked at again, in seconds since 1970.
        tries: how many times the Hub failed us.
        at: seconds since 1970.
    """

    key: str
    repo: str
    num: int | None = None
    comment: str = ""
    old: str = ""
    new: str = ""
    state: Literal["new", "waits", "job", "over"] = "new"
    job: str = ""
    main: str = ""
    is_begun: bool = False
    is_meant: bool = False
    again: float = 0.0
    tries: int = 0
    at: float = field(default_factory=time.time)


class Asks:
    """All records.

    Args:
        disk: the storage of the queue.
    """

    def __init__(self, disk: BaseStorage) -> None:
        self._disk = disk

    def add(self, ask: Ask) -> bool:
        """Note an event; False if it is known already."""
        return bool(self._disk.put_if_empty(_KEY + ask.key, _written(ask)))

    def get(self, key: str) -> Ask:
        """One that is known."""
        return Ask(**json.loads(self._disk.peek_data(_KEY + key)))

    def change(self, ask: Ask, **changes: Any) -> Ask:
        """Change what is known of one."""
        ask = replace(ask, **changes)
        self._disk.put_data(_KEY + ask.key, _written(ask))
        return ask

    def open(self) -> list[Ask]:
        """Those that are not over, the oldest first."""
        found = sorted(self._all(), key=lambda ask: ask.at)
        for old in found[: max(0, len(found) - KEPT)]:
            if old.state == "over":
                self._disk.pop_data(_KEY + old.key)
        return [ask for ask in found if ask.state != "over"]

    def is_busy(self, repo: str) -> bool:
        """Whether a merge into a repo is under way."""
        return any(ask.repo == repo and ask.state == "job" for ask in self._all())

    def _all(self) -> list[Ask]:
        items = self._disk.result_items().items()
        return [Ask(**json.loads(data)) for key, data in items if str(key).startswith(_KEY)]


def _written(ask: Ask) -> bytes:
    return json.dumps(asdict(ask)).encode()
