"""The Hub's jobs: each is a real process on this machine, with the environment and the secrets of its request.

They are no containers: a job's `pip` installs nothing, and its `merger` is this checkout's.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .repos import HubError
from .rights import need_namespace
from .wire import Answer, Context, Exchange, Route, reply

STAND_INS = {"pip": "exit 0", "merger": f'exec {sys.executable} -m merger "$@"'}


@dataclass
class Job:
    """A job: its request as it came, what it printed, and the process."""

    number: str
    owner: str
    asked: dict[str, Any] = field(repr=False)
    log: Path
    process: subprocess.Popen[bytes]
    cancelled: bool = False

    @property
    def stage(self) -> str:
        """In the Hub's words."""
        code = self.process.poll()
        return "RUNNING" if code is None else "CANCELED" if self.cancelled else "ERROR" if code else "COMPLETED"


class Jobs:
    """All jobs of a Hub, in the order in which they were started."""

    def __init__(self) -> None:
        self.all: dict[str, Job] = {}
        self._lock = threading.Lock()

    def start(self, context: Context, x: Exchange) -> Answer:
        """Start one in a process of its own."""
        need_namespace(x.user, x.args["owner"])
        asked = x.json()
        with self._lock:
            number = f"{len(self.all) + 1:024x}"
            log = context.root / f"job-{number}.log"
            self.all[number] = Job(number, x.args["owner"], asked, log, _process(context.root, asked, log))
        return reply(_shown(self.all[number]))

    def look(self, context: Context, x: Exchange) -> Answer:
        """How it is."""
        return reply(_shown(self._found(x)))

    def cancel(self, context: Context, x: Exchange) -> Answer:
        """End it."""
        job = self._found(x)
        job.cancelled = True
        job.process.kill()
        job.process.wait()
        return reply({"ok": True})

    def close(self) -> None:
        """End those at work."""
        for job in self.all.values():
            job.process.kill()
            job.process.wait()

    def _found(self, x: Exchange) -> Job:
        need_namespace(x.user, x.args["owner"])
        job = self.all.get(x.args["number"])
        if job is None or job.owner != x.args["owner"]:
            raise HubError(404, "Job not found")
        return job

    def routes(self) -> Iterable[Route]:
        """This room's part of the table."""
        yield Route("POST", "/api/jobs/{owner}", self.start)
        yield Route("GET", "/api/jobs/{owner}/{number}", self.look)
        yield Route("POST", "/api/jobs/{owner}/{number}/cancel", self.cancel)


def _programs(root: Path) -> Path:
    """A folder to stand first in PATH: `merger` is this checkout's, and `pip` installs nothing."""
    folder = root / "bin"
    folder.mkdir(exist_ok=True)
    for name, line in STAND_INS.items() if not any(folder.iterdir()) else ():  # what an earlier job runs stays as it is
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    return folder


def _process(root: Path, asked: dict[str, Any], log: Path) -> subprocess.Popen[bytes]:
    """Nothing of our own environment goes in but what finds this checkout and keeps the client off the network."""
    path = {"PATH": f"{_programs(root)}:{os.environ['PATH']}", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    own = {"HOME": str(root), "TMPDIR": str(root), "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
    environment = {**path, **own, **asked["environment"], **asked.get("secrets", {})}
    with log.open("wb") as out:
        return subprocess.Popen(asked["command"], env=environment, stdout=out, stderr=subprocess.STDOUT)


def _shown(job: Job) -> dict[str, Any]:
    """As the Hub tells of it: a secret's value never."""
    asked = {**job.asked, "secrets": dict.fromkeys(job.asked.get("secrets", {}), "")}
    status = {"stage": job.stage, "message": None}
    owner = {"id": "0" * 24, "name": job.owner, "type": "user"}
    return {**asked, "id": job.number, "createdAt": "2026-01-01T00:00:00.000Z", "status": status, "owner": owner}
