"""The queue of merges: whose turn it is, each job's token, and the threads that have the jobs made.

A job's token is held in memory while the job is not over. After a restart there are none: every job that was not over
waits until its owner is back. Not here: what is kept of a job (job_table), and its worker (workers).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from merger.errors import Problem
from merger.safety import secrets
from space.work.admission import Limits
from space.work.forkserver import ForkServer
from space.work.job_table import DEFAULT, How, JobError, JobTable, QueuedMerge, Reach, new_id, not_yours
from space.work.records import Records
from space.work.workers import Workers

NOTHING: Mapping[str, str] = {}
_SPARE_SECONDS = 120
_PAUSE = 1.0
_NO_WORD = (
    "the work ended without a word, for want of memory perhaps\n"
    "    submit it again, and it goes on from its finished files; please report it if it ends like this each time"
)

log = logging.getLogger("space.work.queue")


@dataclass(frozen=True)
class Token:
    """What lets a worker act as an owner, until when (seconds since 1970), and what it may write as far as is known."""

    value: str = field(repr=False)
    expires: float = float("inf")
    reach: Reach = Reach.ALL

    def __post_init__(self) -> None:
        secrets.hold(self, self.value)

    @property
    def is_good(self) -> bool:
        """Whether a merge can begin with it: it may write, and lasts for long enough."""
        return self.reach > Reach.READS and time.time() + _SPARE_SECONDS < self.expires

    def is_better(self, than: Token | None) -> bool:
        """Whether a job is better off with it: it may write as much and lasts longer, or the other is good no more."""
        if than is None or not than.is_good:
            return self.is_good
        return self.reach >= than.reach and self.expires > than.expires


class MergeQueue:
    """The queue and its workers.

    Args:
        folder: where the file of jobs lies and the workers work.
        limits: what one job may take, and how many jobs there may be.
        forkserver: where workers come from, unless it is one of the queue's own.
    """

    def __init__(self, folder: Path, limits: Limits, forkserver: ForkServer | None = None) -> None:
        self.limits = limits
        folder.mkdir(parents=True, exist_ok=True)
        self.records = Records(folder / "jobs.db")
        self.jobs = JobTable(self.records)
        self._changed = threading.Condition(self.jobs.lock)
        self._tokens: dict[str, Token] = {}
        self._workers = Workers(folder / "work", folder / "studies", limits, self.jobs, forkserver)
        self._threads: list[threading.Thread] = []
        self._round = 0
        self._is_stopping = False
        for job in self.jobs.open():
            self.jobs.change(job.id, state="waiting", made=0, kept=0)

    # ---- what others ask ---------------------------------------------------------------------------------------------

    def submit(
        self,
        owner: str,
        token: Token,
        recipe: str,
        to: str,
        pins: Mapping[str, str],
        total: int,
        how: How = DEFAULT,
        texts: Mapping[str, str] = NOTHING,
    ) -> QueuedMerge:
        """Queue a merge, or a search, of which an owner has one at a time.

        Args:
            owner: whose job it is.
            token: what it reads the models and writes the result with.
            recipe: the recipe's text, which has been planned.
            to: ``hf://owner/name``; empty: it is a search.
            pins: the commits that the plan saw.
            total: bytes that will be made, or candidates that will be tried.
            how: how it is made besides.
            texts: what lies beside the recipe, by file.

        Raises:
            JobError: the token only reads, the owner has too many jobs that are not over, or the queue is full.
        """
        if token.reach == Reach.READS:
            raise JobError(Problem("this token only reads", hint="send one that may write: the result is published"))
        with self.jobs.lock:
            everyones = self.jobs.open()
            mine = [job for job in everyones if job.owner == owner]
            if len(mine) >= self.limits.jobs_each:
                what = f"you have {len(mine)} jobs that are not over, and {self.limits.jobs_each} is the limit"
                raise JobError(Problem(what, hint="wait for one of them, or cancel it"))
            if any(job.to == to for job in mine):
                what = f"a merge into {to} is not over yet" if to else "a search of yours is not over yet"
                raise JobError(Problem(what, hint="wait for it, or cancel it"))
            if len(everyones) >= self.limits.jobs:
                raise JobError(Problem("the queue of this Space is full", hint="try again in a while"))
            job = QueuedMerge(new_id(), owner, recipe, to, dict(pins), total, created=time.time(), how=how)
            self._tokens[job.id] = token
            return self._enqueue(replace(job, texts=dict(texts)))

    def register_token(self, owner: str, token: Token) -> None:
        """Somebody is here: their jobs that want a better token take this one, those that waited for it are queued."""
        with self.jobs.lock:
            for job in [job for job in self.jobs.open() if job.owner == owner]:
                if token.is_better(self._tokens.get(job.id)):
                    self._tokens[job.id] = token
                if job.state == "waiting" and self._good_token(job):
                    self._enqueue(job)

    def job(self, owner: str, id: str) -> QueuedMerge:
        """One of somebody's own jobs.

        Raises:
            JobError: there is none of that name, or it is another's.
        """
        job = self.jobs.get(id)
        if job is None or job.owner != owner:
            raise not_yours(id)
        return job

    def ahead(self, job: QueuedMerge) -> int:
        """How many jobs are running or come before this one."""
        others = [other for other in self.jobs.open() if other.id != job.id]
        queued = [other for other in others if other.state == "queued" and _order(other) < _order(job)]
        return len(queued) + sum(other.state == "running" for other in others)

    def cancel(self, owner: str, id: str) -> QueuedMerge:
        """Stop one of somebody's own jobs; one that is over stays as it is.

        Raises:
            JobError: there is none of that name, or it is another's.
        """
        with self.jobs.lock:
            job = self.job(owner, id)
            if job.is_over:
                return job
            job = self.jobs.change(id, state="cancelled", ended=time.time(), texts={})
            self._tokens.pop(id, None)
            self._workers.end(id)
            return job

    def start(self) -> None:
        """Let the workers begin."""
        self._workers.start()
        names = [f"worker {number}" for number in range(self.limits.workers)]
        self._threads = [threading.Thread(target=self._run_jobs, name=name, daemon=True) for name in names]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the workers; what is not over waits for the next start."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
            self._workers.stop()
        for thread in self._threads:
            thread.join()
        self._workers.close()

    # ---- turns -------------------------------------------------------------------------------------------------------

    def _enqueue(self, job: QueuedMerge) -> QueuedMerge:
        """Into the round after that of the owner's last job, so that who asks for much waits for those who do not."""
        queued = [other for other in self.jobs.open() if other.owner == job.owner and other.state == "queued"]
        job = replace(job, state="queued", turn=max([self._round, *(other.turn + 1 for other in queued)]))
        self.jobs.put(job)
        self._changed.notify()
        return job

    def _run_jobs(self) -> None:
        """One job after the other, until the queue stops; what goes wrong here, a full disk say, ends no thread."""
        while not self._is_stopping:
            try:
                self._run_next()
            except Exception:
                log.exception("a fault of ours or of this machine")
                with self._changed:
                    self._changed.wait(_PAUSE)

    def _run_next(self) -> None:
        if (turn := self._next_turn()) is None:
            return
        job, token = turn
        told = dict[str, Any]()
        try:
            told = self._workers.make(job, token.value)
        finally:
            self._settle(job.id, token, told)

    def _next_turn(self) -> tuple[QueuedMerge, Token] | None:
        """Wait for the job whose turn it is and that has a good token; None: the queue stops."""
        with self._changed:
            while not self._is_stopping:
                queued = [job for job in self.jobs.open() if job.state == "queued"]
                if not queued:
                    self._changed.wait()
                    continue
                job = min(queued, key=_order)
                self._round = max(self._round, job.turn)
                if (token := self._good_token(job)) is not None:
                    return self.jobs.change(job.id, state="running", started=time.time(), made=0, kept=0), token
                self.jobs.change(job.id, state="waiting")
            return None

    def _settle(self, id: str, token: Token, told: Mapping[str, Any]) -> None:
        with self.jobs.lock:
            job = self.jobs.get(id)
            if job is not None and job.state == "running" and not self._is_stopping:
                outcome = _outcome(job, token, told)
                job = self.jobs.change(id, **outcome, texts=job.texts if outcome["state"] == "waiting" else {})
            if job is None or job.is_over:
                self._tokens.pop(id, None)
            self._workers.sweep()

    def _good_token(self, job: QueuedMerge) -> Token | None:
        token = self._tokens.get(job.id)
        return token if token is not None and token.is_good else None


def _outcome(job: QueuedMerge, token: Token, told: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a job once its worker has ended."""
    if "where" in told:
        lines = (*job.log, *(f"warning: {doubt}" for doubt in told["doubts"]))
        found = {name: told[name] for name in ("where", "commit", "is_new", "card")}
        return {
            "state": "done",
            "made": job.made if job.is_search else job.total,
            "ended": time.time(),
            "log": lines,
            **found,
        }
    if time.time() > token.expires:
        return {"state": "waiting"}
    return {"state": "failed", "problems": tuple(told.get("failed") or [_NO_WORD]), "ended": time.time()}


def _order(job: QueuedMerge) -> tuple[int, float]:
    return job.turn, job.created
