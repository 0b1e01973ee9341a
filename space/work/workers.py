"""The workers of the queue: a process for each job that is under way, what it is told, and what it tells.

A job's token reaches its worker by a socket alone. Not here: whose turn it is (queue), and what a worker does (worker).
"""

from __future__ import annotations

import json
import shutil
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from space.work.admission import Limits
from space.work.forkserver import ForkServer
from space.work.job_table import JobTable, QueuedMerge
from space.work.worker import RECIPE

_ON_THE_WAY = ("made", "say", "found", "picture", "outcome")


class Workers:
    """Those that are at work.

    Args:
        folder: they work in folders of it.
        studies: the folder of what searches have tried, which outlives them.
        limits: what one job may take.
        jobs: where it is noted how far they are.
        forkserver: where they come from, unless it is one of their own.
    """

    def __init__(
        self, folder: Path, studies: Path, limits: Limits, jobs: JobTable, forkserver: ForkServer | None = None
    ) -> None:
        self._folder, self._studies, self._limits, self._jobs = folder, studies, limits, jobs
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        studies.mkdir(exist_ok=True)
        self.sweep()
        self._forkserver = forkserver or ForkServer(folder)
        self._at_work: dict[str, socket.socket] = {}
        self._is_stopping = False

    def start(self) -> None:
        """Be ready for the first job."""
        self._forkserver.start()

    def stop(self) -> None:
        """End all, and let no other begin."""
        with self._jobs.lock:
            self._is_stopping = True
            for id in self._at_work:
                self.end(id)

    def close(self) -> None:
        """Let go of where they come from."""
        self._forkserver.close()

    def end(self, id: str) -> None:
        """End the worker of a job, if it has one."""
        if (worker := self._at_work.get(id)) is not None:
            _end(worker)

    def sweep(self) -> None:
        """Remove the studies of searches that are over."""
        going_on = {job.id for job in self._jobs.open()}
        for study in self._studies.iterdir():
            if study.name.partition(".")[0] not in going_on:
                study.unlink(missing_ok=True)

    def make(self, job: QueuedMerge, token: str) -> dict[str, Any]:
        """Have a job made; what its worker tells of the end, and nothing if it ends without a word."""
        folder, told = self._folder / job.id, dict[str, Any]()
        try:
            folder.mkdir()
            (folder / RECIPE).write_text(job.recipe, "utf-8")
            pins = {"models": [{"model": model, "commit": commit} for model, commit in job.pins.items()]}
            (folder / RECIPE).with_suffix(".lock.yaml").write_text(yaml.safe_dump(pins), "utf-8")
            for name, text in job.texts.items():
                (folder / name).write_text(text, "utf-8")
            study = str(self._studies.absolute() / f"{job.id}.log")
            asked = {"to": job.to, "token": token, "study": study, **vars(job.how), **self._limits.for_a_job()}
            with self._fork(job, folder) as worker, suppress(ConnectionError):  # it is gone already: it was cancelled
                worker.sendall(json.dumps(asked).encode() + b"\n")
                for line in worker.makefile("r"):
                    told |= self._note(job.id, json.loads(line)) if line.endswith("\n") else {}
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            with self._jobs.lock:
                self._at_work.pop(job.id, None)
        return told

    def _fork(self, job: QueuedMerge, folder: Path) -> socket.socket:
        worker = self._forkserver.fork(folder)
        with self._jobs.lock:
            self._at_work[job.id] = worker
            if self._is_stopping or self._jobs.get(job.id) != job:  # it was cancelled a moment ago
                _end(worker)
        return worker

    def _note(self, id: str, line: dict[str, Any]) -> dict[str, Any]:
        """Note a line of the worker's; what is left of it is about the end."""
        kept, news = line.pop("kept", None), {key: line.pop(key) for key in _ON_THE_WAY if key in line}
        with self._jobs.lock:
            if (job := self._jobs.get(id)) is not None and not job.is_over:
                if kept is not None:
                    self._jobs.change(id, kept=kept, made=kept)
                if news:
                    self._jobs.progress(id, **news)
        return line


def _end(worker: socket.socket) -> None:
    """The worker's end, and that of whoever listens to it."""
    with suppress(OSError):  # it may have ended by itself
        worker.shutdown(socket.SHUT_RDWR)
