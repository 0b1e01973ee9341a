"""The keeper of the queue: whose turn it is, the token of each job, and the children that do the work.

The queue is Huey's, on SQLite. A job goes through it by its name alone; what is known of it is in the store. A job's
token is held in memory while the job is not over, and reaches its child by a socket. After a restart there are none:
every job that was not over waits until its owner is back. Not here: what a job makes (child).
"""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huey import SqliteHuey
from huey.consumer import Consumer

from merger.errors import Problem
from merger.safety import secrets
from space.work.admission import Limits
from space.work.forkserver import Nursery
from space.work.job_table import AS_SAID, How, JobError, JobTable, QueuedMerge, Reach, new_id, not_yours
from space.work.worker import RECIPE

_SPARE_SECONDS = 120
_NO_WORD = (
    "the work ended without a word, for want of memory perhaps\n"
    "    submit it again, and it goes on from its finished files; please report it if it ends like this each time"
)


@dataclass(frozen=True)
class Token:
    """What lets a child act as an owner, until when (seconds since 1970), and what it may write as far as is known."""

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


class _Workers(Consumer):  # type: ignore[misc]
    """Huey's consumer in a process that has other things to do: it leaves the process's signals alone."""

    def _set_signal_handlers(self) -> None:
        pass


class Keeper:
    """The queue and its workers.

    Args:
        folder: where the queue's file lies and the children work.
        limits: what one job may take, and how many jobs there may be.
        nursery: where children come from, unless it is one of the keeper's own.
    """

    def __init__(self, folder: Path, limits: Limits, nursery: Nursery | None = None) -> None:
        self.limits = limits
        self._work = folder / "work"
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir(parents=True)
        self._huey = SqliteHuey("space", filename=str(folder / "jobs.db"), fsync=True)
        self._huey.storage.flush_queue()
        self._turn = self._huey.task(name="turn")(self._take_turn)
        self.storage = self._huey.storage
        self.store = JobTable(self._huey)
        self._tokens: dict[str, Token] = {}
        self._nursery = nursery or Nursery(self._work)
        self._children: dict[str, socket.socket] = {}
        self._round = 0
        self._workers: _Workers | None = None
        self._is_stopping = False
        for job in self.store.all():
            if not job.is_over:
                self.store.change(job.id, state="waiting", made=0, kept=0)

    # ---- what others ask ---------------------------------------------------------------------------------------------

    def submit(
        self, owner: str, token: Token, recipe: str, to: str, pins: Mapping[str, str], total: int, how: How = AS_SAID
    ) -> QueuedMerge:
        """Queue a merge.

        Args:
            owner: whose job it is.
            token: what it reads the models and writes the result with.
            recipe: the recipe's text, which has been planned.
            to: ``hf://owner/name``.
            pins: the commits that the plan saw.
            total: bytes that will be made.
            how: how it is made besides.

        Raises:
            JobError: the token only reads, the owner has too many jobs that are not over, or the queue is full.
        """
        if token.reach == Reach.READS:
            raise JobError(Problem("this token only reads", hint="send one that may write: the result is published"))
        with self.store.lock:
            mine = [job for job in self.store.of(owner) if not job.is_over]
            if len(mine) >= self.limits.jobs_each:
                what = f"you have {len(mine)} merges that are not over, and {self.limits.jobs_each} is the limit"
                raise JobError(Problem(what, hint="wait for one of them, or cancel it"))
            if any(job.to == to for job in mine):
                raise JobError(Problem(f"a merge into {to} is not over yet", hint="wait for it, or cancel it"))
            if sum(not job.is_over for job in self.store.all()) >= self.limits.jobs:
                raise JobError(Problem("the queue of this Space is full", hint="try again in a while"))
            job = QueuedMerge(new_id(), owner, recipe, to, dict(pins), total, created=time.time(), how=how)
            self.store.put(job)
            self._tokens[job.id] = token
            return self._enqueue(job)

    def welcome(self, owner: str, token: Token) -> None:
        """Somebody is here: their jobs that want a better token take this one, those that waited for it are queued."""
        with self.store.lock:
            for job in [job for job in self.store.of(owner) if not job.is_over]:
                if token.is_better(self._tokens.get(job.id)):
                    self._tokens[job.id] = token
                if job.state == "waiting" and self._has_good_token(job):
                    self._enqueue(self.store.change(job.id, state="queued"))

    def job(self, owner: str, id: str) -> QueuedMerge:
        """One of somebody's own jobs.

        Raises:
            JobError: there is none of that name, or it is another's.
        """
        job = self.store.get(id)
        if job is None or job.owner != owner:
            raise not_yours(id)
        return job

    def ahead(self, job: QueuedMerge) -> int:
        """How many jobs are running or come before this one."""
        others = [other for other in self.store.all() if other.state in ("queued", "running")]
        return sum(other.state == "running" or _order(other) < _order(job) for other in others if other.id != job.id)

    def cancel(self, owner: str, id: str) -> QueuedMerge:
        """Stop one of somebody's own jobs; one that is over stays as it is.

        Raises:
            JobError: there is none of that name, or it is another's.
        """
        with self.store.lock:
            job = self.job(owner, id)
            if job.is_over:
                return job
            job = self.store.change(id, state="cancelled", ended=time.time())
            self._tokens.pop(id, None)
            if (child := self._children.get(id)) is not None:
                _end(child)
            return job

    def start(self) -> None:
        """Let the workers begin."""
        self._nursery.open()
        workers = self.limits.workers
        self._workers = _Workers(self._huey, workers=workers, periodic=False, initial_delay=0.05, max_delay=0.2)
        self._workers.start()

    def stop(self) -> None:
        """End the workers and their children; what is not over waits for the next start."""
        self._is_stopping = True
        if self._workers is not None:
            self._workers.stop(graceful=False)
            with self.store.lock:
                for child in self._children.values():
                    _end(child)
            for _, thread in self._workers.worker_threads:
                thread.join()
        self._nursery.close()

    # ---- turns -------------------------------------------------------------------------------------------------------

    def _enqueue(self, job: QueuedMerge) -> QueuedMerge:
        """Into the round after that of the owner's last job, so that who asks for much waits for those who do not."""
        rounds = [other.turn for other in self.store.of(job.owner) if other.state == "queued" and other.id != job.id]
        turn = max([self._round, *(number + 1 for number in rounds)])
        job = self.store.change(job.id, turn=turn)
        self._huey.enqueue(self._turn.s(job.id, priority=-turn))
        return job

    def _take_turn(self, id: str) -> None:
        with self.store.lock:
            job = self.store.get(id)
            if job is None or job.state != "queued":
                return
            self._round = max(self._round, job.turn)
            if not self._has_good_token(job):
                self.store.change(id, state="waiting")
                return
            token = self._tokens[id]
            job = self.store.change(id, state="running", started=time.time(), made=0, kept=0)
        folder = self._work / id
        try:
            self._make(job, token, folder)
        except Exception:
            self._settle(id, token, {})
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            with self.store.lock:
                self._children.pop(id, None)
                self._forget_token(id)

    def _make(self, job: QueuedMerge, token: Token, folder: Path) -> None:
        folder.mkdir()
        (folder / RECIPE).write_text(job.recipe, "utf-8")
        pins = {"models": [{"model": model, "commit": commit} for model, commit in job.pins.items()]}
        (folder / RECIPE).with_suffix(".lock.yaml").write_text(yaml.safe_dump(pins), "utf-8")
        asked = {"to": job.to, "token": token.value, **vars(job.how), **self.limits.for_a_job()}
        told: dict[str, Any] = {}
        with self._begin(job, folder) as child, suppress(ConnectionError):  # it is gone already: it was cancelled
            child.sendall(json.dumps(asked).encode() + b"\n")
            for line in child.makefile("r"):
                told |= self._heard(job.id, json.loads(line)) if line.endswith("\n") else {}
        self._settle(job.id, token, told)

    def _begin(self, job: QueuedMerge, folder: Path) -> socket.socket:
        child = self._nursery.child(folder)
        with self.store.lock:
            self._children[job.id] = child
            if self._is_stopping or self.store.get(job.id) != job:  # it was cancelled a moment ago
                _end(child)
        return child

    def _heard(self, id: str, line: dict[str, Any]) -> dict[str, Any]:
        """Note a line of the child's; what is left of it is about the end."""
        kept, made, say = line.pop("kept", None), line.pop("made", None), line.pop("say", None)
        with self.store.lock:
            if kept is not None:
                self.store.change(id, kept=kept, made=kept)
            if made is not None:
                self.store.progress(id, made, say)
        return line

    def _settle(self, id: str, token: Token, told: Mapping[str, Any]) -> None:
        """Write down how it ended."""
        with self.store.lock:
            job = self.store.get(id)
            if job is None or job.state != "running" or self._is_stopping:
                return
            if "where" in told:
                log = (*job.log, *(f"warning: {doubt}" for doubt in told["doubts"]))
                found = {"where": told["where"], "commit": told["commit"], "is_new": told["is_new"]}
                self.store.change(id, state="done", made=job.total, ended=time.time(), log=log, **found)
            elif time.time() > token.expires:
                self.store.change(id, state="waiting")
            else:
                problems = tuple(told.get("failed") or [_NO_WORD])
                self.store.change(id, state="failed", problems=problems, ended=time.time())

    def _has_good_token(self, job: QueuedMerge) -> bool:
        token = self._tokens.get(job.id)
        return token is not None and token.is_good

    def _forget_token(self, id: str) -> None:
        job = self.store.get(id)
        if job is None or job.is_over:
            self._tokens.pop(id, None)


def _order(job: QueuedMerge) -> tuple[int, float]:
    return job.turn, job.created


def _end(child: socket.socket) -> None:
    """The child's end, and that of whoever listens to it."""
    with suppress(OSError):  # it may have ended by itself
        child.shutdown(socket.SHUT_RDWR)
