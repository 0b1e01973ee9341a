"""What only some systems have, each with a plain form for the others; and what this one has free.

No other room of the package names any of it, and mypy reads them as on Windows, too (make lint): so the line runs there
as on Linux and macOS. The Space runs on Linux alone. Not here: what a run does where the system refuses (runtime).
"""

from __future__ import annotations

import ctypes
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_ROOT = Path("/")
_FLAGS = ("O_NOFOLLOW", "O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY")

READING = os.O_RDONLY | sum(getattr(os, flag, 0) for flag in _FLAGS)
"""How a stranger's file is opened: no link is followed, nothing is waited for, and no byte is changed."""

KILLED, OUT_OF_TIME = (-int(getattr(signal, name, 0)) or None for name in ("SIGKILL", "SIGXCPU"))
"""The exit codes of a process that the system killed, and of one that took more time than `limit` lets it."""


if sys.platform == "win32":
    import msvcrt

    LINKS = False
    _HELD_IS_REMOVED = False
    _FAR, _SHARES = 1 << 30, 64  # a byte that is locked cannot be read
    _DEVICE = r"(^|/)(con|prn|aux|nul|com\d|lpt\d)(\.[^/]*)?(/|$)"
    _NO_NAME = re.compile(rf'[\\:*?"<>|\x00-\x1f]|[. ](/|$)|{_DEVICE}', re.IGNORECASE)
    _PLAIN = (
        "files are locked by bytes, and temporary ones have names",
        "a process of its own is limited by time alone",
        "tokens stay in the environment that the process began with",
    )

    def can_name(name: str) -> bool:
        """Whether a file in a repo may be called so in a folder of this machine."""
        return _NO_NAME.search(name) is None

    def limit(seconds: int, memory: int) -> None:
        """Have the system limit what this process may take: here it cannot."""

    def replace_process(environment: Mapping[str, str], content: bytes, told_by: str) -> None:
        """Begin this process anew with another environment: here a second one would run on beside this one's end."""

    def is_running(process: int) -> bool:
        """Whether there may be a process of this number: here to ask is to end it."""
        return True

    def _mallopt() -> Any:
        return None

    def _lock(descriptor: int, shared: bool) -> None:
        """Alone: all bytes. Shared: any one of them, after those that are held are let go."""
        if not shared:
            return _lock_bytes(descriptor, msvcrt.LK_NBLCK, 0, _SHARES)
        with suppress(OSError):
            _lock_bytes(descriptor, msvcrt.LK_UNLCK, 0, _SHARES)
        for share in range(_SHARES):
            with suppress(PermissionError):
                return _lock_bytes(descriptor, msvcrt.LK_NBLCK, share, 1)
        raise BlockingIOError

    def _lock_bytes(descriptor: int, mode: int, first: int, count: int) -> None:
        os.lseek(descriptor, _FAR + first, os.SEEK_SET)
        msvcrt.locking(descriptor, mode, count)

else:
    import fcntl
    import resource

    LINKS = True
    _HELD_IS_REMOVED = True
    _PLAIN = ()

    def can_name(name: str) -> bool:
        """Whether a file in a repo may be called so in a folder of this machine."""
        return True

    def limit(seconds: int, memory: int) -> None:
        """Have the system limit what this process may take, as far as it can: macOS leaves out memory."""
        wanted = {
            resource.RLIMIT_CPU: (seconds, seconds + 1),  # at the second one it is killed without a word
            resource.RLIMIT_CORE: (0, 0),
            resource.RLIMIT_FSIZE: (0, 0),
            resource.RLIMIT_AS: (_address_space() + memory,) * 2,
        }
        for kind, most in wanted.items():
            with suppress(OSError, ValueError):
                resource.setrlimit(kind, most)

    def _address_space() -> int:
        """The bytes of address space that are taken already; 0: nobody tells."""
        pages = (_text(_ROOT / "proc/self/statm") or "").split()
        return int(pages[0]) * os.sysconf("SC_PAGE_SIZE") if pages else 1 << 30

    def replace_process(environment: Mapping[str, str], content: bytes, told_by: str) -> None:
        """Begin this process anew with this environment, and with a pipe, holding `content`, that a variable tells."""
        reading, writing = os.pipe()
        os.set_inheritable(reading, True)
        os.set_blocking(writing, False)
        with os.fdopen(writing, "wb", buffering=0) as pipe:
            if pipe.write(content) != len(content):
                sys.exit("the secrets of the environment are too large")
        line = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, line, {**environment, told_by: str(reading)})

    def is_running(process: int) -> bool:
        """Whether there is a process of this number."""
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True

    def _mallopt() -> Any:
        return getattr(ctypes.CDLL(None), "mallopt", None)

    def _lock(descriptor: int, shared: bool) -> None:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def plain_forms() -> Iterator[str]:
    """What is done here in place of what the system lacks."""
    if not hasattr(os, "preadv"):
        yield "one thread at a time reads a file"
    if not hasattr(os, "sched_getaffinity"):
        yield "all cores of the machine count"
    if _mallopt() is None:
        yield "freed memory may go back to the system, which costs time"
    yield from _PLAIN


def keep_freed_memory() -> None:
    """Let glibc's malloc keep what a block's temporaries gave back: as new memory they took a third of some merges."""
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    if mallopt := _mallopt():
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, 1 << 30)


# ---- files ----------------------------------------------------------------------------------------------------------

_one_reader = threading.Lock()


def read_at(descriptor: int, out: memoryview, offset: int) -> int:
    """Fill `out` with what stands there in a file, whose own place stays; the number of bytes, fewer at its end."""
    if hasattr(os, "preadv"):
        got: int = os.preadv(descriptor, [out], offset)
        return got
    with _one_reader, io.FileIO(descriptor, closefd=False) as file:
        before = file.tell()
        file.seek(offset)
        got = file.readinto(out) or 0
        file.seek(before)
        return got


class FileLock:
    """A file that this process may hold, alone or beside others that share it, until it ends, however it ends.

    Args:
        place: where it is, or is made.
    """

    def __init__(self, place: Path) -> None:
        self._place = place
        self._opened: int | None = os.open(place, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0))

    def take(self, shared: bool = False, without_locks: bool = True) -> bool:
        """Whether it was to be had, and what is said of it where the disk has no locks: that everybody has it."""
        assert self._opened is not None
        try:
            _lock(self._opened, shared)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:
            return without_locks
        return True

    def close(self) -> None:
        """Let go of it; once that is done, do nothing."""
        if self._opened is not None:
            os.close(self._opened)
        self._opened = None

    def remove(self) -> None:
        """Remove the file, and let go of it first only where none that is held can be removed."""
        if not _HELD_IS_REMOVED:
            self.close()
        self._place.unlink()
        self.close()


def is_ours(place: Path) -> bool:
    """Whether it belongs to this user; where no such account is kept, all in a user's own folder does."""
    return not hasattr(os, "getuid") or place.stat().st_uid == os.getuid()


def link_file(place: Path, target: Path) -> None:
    """Have a file in a second place, too, without its bytes: Windows lets few make links by name."""
    try:
        place.symlink_to(target)
    except OSError:
        os.link(target, place)


# ---- what there is --------------------------------------------------------------------------------------------------


def free_memory(root: Path = _ROOT) -> int | None:
    """Bytes that may still be taken: what the system has to give, but no more than the control groups leave."""
    known = [found for found in (_available(root), *_left_by_groups(root)) if found is not None]
    return min(known, default=None)


def cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def computes_in(dtype: str, root: Path = _ROOT) -> bool:
    """Whether this processor has instructions for a dtype such as ``bfloat16``; where nobody tells, it has."""
    flags = set((_text(root / "proc/cpuinfo") or "").split())
    return not flags or dtype not in _INSTRUCTIONS or not flags.isdisjoint(_INSTRUCTIONS[dtype])


_INSTRUCTIONS = {
    "bfloat16": {"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"},
    "float16": {"avx512_fp16", "amx_fp16", "asimdhp"},
}


def _available(root: Path) -> int | None:
    text = _text(root / "proc/meminfo") or ""
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else None


def _left_by_groups(root: Path) -> Iterator[int]:
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
        return path.read_text("utf-8")
    except (OSError, ValueError):
        return None
