"""What was asked of the bot: one record for each event of the Hub, kept in the file of jobs until it is answered.

An event that comes twice is one record: that is what a replayed webhook comes to. Not here: answering (bot).
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from huggingface_hub import WebhookPayload

from merger.safety.names import is_repo
from space.work.records import Records

KEPT = 2_000
"""How many that are over are kept: an event older than all of them would be taken for a new one."""

_KIND = "event"
_MOST_NUM = 1 << 31
_SHA = re.compile(r"(?!0+$)[0-9a-f]{40}(?:[0-9a-f]{24})?", re.ASCII)
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)


@dataclass(frozen=True)
class WebhookEvent:
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


class WebhookEvents:
    """All events that are known.

    Args:
        records: where they are kept.
    """

    def __init__(self, records: Records) -> None:
        self._records = records

    def add(self, event: WebhookEvent) -> bool:
        """Note an event; False if it is known already."""
        return self._records.add(_KIND, event.key, asdict(event))

    def get(self, key: str) -> WebhookEvent:
        """One that is known."""
        return WebhookEvent(**self._records.find(_KIND, key=key)[0])

    def change(self, event: WebhookEvent, **changes: Any) -> WebhookEvent:
        """Change what is known of one."""
        event = replace(event, **changes)
        is_over = event.state == "over"
        self._records.put(_KIND, event.key, asdict(event), is_over=is_over)
        if is_over:
            self._records.forget(_KIND, KEPT)
        return event

    def open(self) -> list[WebhookEvent]:
        """Those that are not over, the oldest first."""
        return [WebhookEvent(**known) for known in self._records.find(_KIND, is_over=False)]

    def is_busy(self, repo: str) -> bool:
        """Whether a merge into a repo is under way."""
        return any(event.repo == repo and event.state == "job" for event in self.open())


def parse_event(payload: WebhookPayload) -> WebhookEvent | None:
    """The event, if it is one that may ask for something."""
    repo, scope = payload.repo.name, payload.event.scope
    if payload.repo.type != "model" or not is_repo(repo):
        return None
    comment, talk = payload.comment, payload.discussion
    if talk is not None and comment is not None and payload.event.action == "create":
        is_one = 0 < talk.num < _MOST_NUM and _ID.fullmatch(comment.id)
        return WebhookEvent(f"{repo}/{talk.num}/{comment.id}", repo, talk.num, comment.id) if is_one else None
    if scope.startswith("repo"):
        for moved in payload.updatedRefs or ():
            old, new = moved.oldSha or "", moved.newSha or ""
            if moved.ref == "refs/heads/main" and _SHA.fullmatch(new):
                return commit_event(repo, old if _SHA.fullmatch(old) else "", new)
    return None


def commit_event(repo: str, old: str, new: str) -> WebhookEvent:
    """That main moved."""
    return WebhookEvent(f"{repo}@{new}", repo, old=old, new=new)
