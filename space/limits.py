"""What this Space lets a job take, and how many jobs it keeps. Not here: what a job needs (merger.plan)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merger import machine
from merger.safety import numbers

_PAGE_BYTES = 1_000_000_000
"""What the page with plans of many users at once, and the nursery, may come to."""

_LEAST_A_WORKER = 6_000_000_000
_MOST_WORKERS = 2


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes.

    Args:
        memory: for one job; None: nobody knows how much there is.
        disk: for one job.
        traffic: that one job may read and write.
        workers: how many jobs run at the same time.
        jobs_each: of one owner that are not over.
        jobs: of all owners together.
        shard_size: the largest size of a file; None: the default.
    """

    memory: int | None = None
    disk: int | None = None
    traffic: int = 200_000_000_000
    workers: int = 1
    jobs_each: int = 3
    jobs: int = 100
    shard_size: int | None = None

    @classmethod
    def here(cls, folder: Path, environment: Mapping[str, str] = os.environ) -> Limits:
        """Those of this machine, or what the variables ``MERGER_SPACE_…`` say.

        Raises:
            ValueError: a variable is no size or no number.
        """

        def given(name: str) -> str | None:
            return environment.get(f"MERGER_SPACE_{name}") or None

        room = _size(given("MEMORY")) or machine.memory()
        free = _size(given("DISK")) or shutil.disk_usage(folder).free * 9 // 10
        most = 1 if room is None else max(1, min(_MOST_WORKERS, (room - _PAGE_BYTES) // _LEAST_A_WORKER))
        workers = _count(given("WORKERS")) or most
        return cls(
            memory=None if room is None else max(0, room - _PAGE_BYTES) // workers,
            disk=free // workers,
            traffic=_size(given("TRAFFIC")) or cls.traffic,
            workers=workers,
            jobs_each=_count(given("JOBS_EACH")) or cls.jobs_each,
            jobs=_count(given("JOBS")) or cls.jobs,
            shard_size=_size(given("SHARD_SIZE")),
        )

    def for_a_job(self) -> dict[str, Any]:
        """What a child is told."""
        threads = max(1, machine.cores() // self.workers)
        return {"memory": self.memory, "disk": self.disk, "threads": threads, "shard_size": self.shard_size}


def _count(text: str | None) -> int | None:
    return numbers.whole(text, numbers.COUNT) if text else None


def _size(text: str | None) -> int | None:
    return numbers.nbytes(text) if text else None
