"""What this machine lets a run use: memory and cores, as its control group (a container, a runner) allows.

Linux tells; elsewhere nothing is known, and nothing is refused. Not here: what a run needs (plan).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")


def memory(root: Path = _ROOT) -> int | None:
    """Bytes that may still be taken: what the system has to give, but no more than the control groups leave."""
    known = [found for found in (_available(root), *_left(root)) if found is not None]
    return min(known, default=None)


def cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _available(root: Path) -> int | None:
    text = _text(root / "proc/meminfo") or ""
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else None


def _left(root: Path) -> Iterator[int]:
    """Of each control group from this process's own up to the first one: its limit less what cannot be taken back."""
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            top = root / "sys/fs/cgroup" / controllers
            names = ("memory.max", "memory.current", "file") if not controllers else (
                "memory.limit_in_bytes", "memory.usage_in_bytes", "cache")  # fmt: skip
            own = top / path.lstrip("/")
            for group in (own, *own.parents):
                if (left := _left_in(group, *names)) is not None:
                    yield left
                if group == top:
                    break


def _left_in(group: Path, limit_name: str, used_name: str, cache_name: str) -> int | None:
    limit, used = _text(group / limit_name), _text(group / used_name)
    if limit is None or used is None or not limit.strip().isdigit():
        return None
    counted = dict(line.split() for line in (_text(group / "memory.stat") or "").splitlines() if len(line.split()) == 2)
    return max(0, int(limit) - int(used) + int(counted.get(cache_name, 0)))


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None
