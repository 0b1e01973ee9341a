"""Jobs: what somebody asked to be merged, how far it is, and what became of it.

No token is ever among it. Not here: whose turn it is, and the work (queue).
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import IntEnum
from typing import Any, Literal

from merger.errors import MergerError, Problem
from space.work.records import Records

State = Literal["queued", "running", "waiting", "done", "failed", "cancelled"]
OVER: tuple[State, ...] = ("done", "failed", "cancelled")
LOG_LINES = 200
KEPT = 20
"""How many jobs of one owner that are over are kept."""

_KIND = "job"


class Reach(IntEnum):
    """What a token may write: nothing, what it names, or whatever its owner may."""

    READS = 0
    SOME = 1
    ALL = 2


class JobError(MergerError):
    """A job is not there, not yours, or one too many."""


@dataclass(frozen=True)
class How:
    """How a merge is made besides what its recipe says.

    Args:
        is_public: the models are read without a token.
        create_pr: a pull request is opened, whatever the recipe says.
        force: a model at the destination is replaced.
    """

    is_public: bool = False
    create_pr: bool = False
    force: bool = False


DEFAULT = How()


@dataclass(frozen=True)
class QueuedMerge:
    """One merge that somebody asked for, or the search for a recipe's numbers.

    Args:
        id: a name nobody can guess.
        owner: whose it is: the user's name on the Hub.
        recipe: the recipe's text.
        to: where it goes, ``hf://owner/name``; a search goes nowhere.
        pins: the commits that the plan saw, by model as the recipe writes it.
        total: bytes that will be made; of a search the candidates that will be tried, and so with `kept` and `made`.
        state: queued, running, waiting (for its owner to come back), done, failed or cancelled.
        turn: the round of the queue it belongs to; rounds go one after the other, each with one job of each owner.
        created, started, ended: seconds since 1970; 0 where it has not come to that.
        kept: bytes that an earlier run had made.
        made: bytes made, those among them.
        log: what was said on the way.
        problems: why it failed.
        where, commit: the result.
        is_new: whether this job put it there.
        card: the result's, where this job put it there.
        how: how it is made besides.
        texts: of a search, what lies beside its recipe, by file; gone once it is over.
        found: of a search, the best recipe so far.
        picture: of a search, the best so far over the trials, a PNG in base64.
        outcome: of a search, all trials as CSV (`table`), by its name how much each number matters (`importance`), and
            once it has ended what was found, in Markdown (`told`).
    """

    id: str
    owner: str
    recipe: str
    to: str
    pins: Mapping[str, str]
    total: int
    state: State = "queued"
    turn: int = 0
    created: float = 0.0
    started: float = 0.0
    ended: float = 0.0
    kept: int = 0
    made: int = 0
    log: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    where: str = ""
    commit: str = ""
    is_new: bool = False
    card: str = field(default="", repr=False)
    how: How = DEFAULT
    texts: Mapping[str, str] = field(default_factory=dict, repr=False)
    found: str = ""
    picture: str = field(default="", repr=False)
    outcome: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def is_search(self) -> bool:
        """Whether numbers are searched, and nothing is made."""
        return not self.to

    @property
    def is_over(self) -> bool:
        """Whether nothing will happen any more."""
        return self.state in OVER

    def speed(self, now: float) -> float:
        """Bytes made a second, in this run; of a search candidates."""
        return (self.made - self.kept) / max(0.001, (self.ended or now) - self.started) if self.started else 0.0

    def seconds_left(self, now: float) -> float | None:
        """How long it will take at this speed; None while nobody knows."""
        speed = self.speed(now)
        return (self.total - self.made) / speed if self.state == "running" and speed > 0 else None


def new_id() -> str:
    """A name for a job."""
    return secrets.token_urlsafe(9)


class JobTable:
    """All jobs on disk; those that are not over in memory too, with how far they are.

    Args:
        records: where they are kept.
    """

    def __init__(self, records: Records) -> None:
        self.lock = threading.RLock()
        self._records = records
        self._open = {job.id: job for job in self._find(is_over=False)}

    def open(self) -> list[QueuedMerge]:
        """Every job that is not over, the oldest first."""
        with self.lock:
            return list(self._open.values())

    def of(self, owner: str) -> list[QueuedMerge]:
        """Those of one owner, the oldest first."""
        with self.lock:
            return [self._open.get(job.id, job) for job in self._find(owner=owner)]

    def get(self, id: str) -> QueuedMerge | None:
        """A job, if there is one of this name."""
        with self.lock:
            return self._open.get(id) or next(iter(self._find(key=id)), None)

    def put(self, job: QueuedMerge) -> None:
        """Add a job, or put it in place of what it was."""
        with self.lock:
            self._records.put(_KIND, job.id, asdict(job), job.owner, job.is_over)
            if job.is_over:
                self._open.pop(job.id, None)
                self._records.forget(_KIND, KEPT, job.owner)
            else:
                self._open[job.id] = job

    def change(self, id: str, **changes: Any) -> QueuedMerge:
        """Change some of what is known of a job that is not over, on disk too."""
        with self.lock:
            job = replace(self._open[id], **changes)
            self.put(job)
            return job

    def progress(self, id: str, made: int | None = None, say: str | None = None, **seen: Any) -> None:
        """So much is made in this run; in memory alone, for after a kill the Hub tells what is kept."""
        with self.lock:
            if (job := self._open.get(id)) is not None:
                log = job.log if say is None else (*job.log, say)[-LOG_LINES:]
                self._open[id] = replace(job, made=job.made if made is None else job.kept + made, log=log, **seen)

    def _find(self, **columns: str | bool) -> list[QueuedMerge]:
        return list(map(_parse, self._records.find(_KIND, **columns)))


def _parse(known: dict[str, Any]) -> QueuedMerge:
    plain = {"log": tuple(known["log"]), "problems": tuple(known["problems"]), "how": How(**known["how"])}
    return QueuedMerge(**{**known, **plain})


def not_yours(id: str) -> JobError:
    """The same words for a job that is not there and one that is somebody else's."""
    return JobError(Problem(f"you have no job {id[:40]!r}", hint="your jobs are listed under Merges once you sign in"))
