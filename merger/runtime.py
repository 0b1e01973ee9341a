"""What this machine lets a run use: memory and cores, as its control group (a container, a runner) allows; the
signals by which it ends a run; what is set for a whole process, by those alone whose process it is; and where this
package is had from.

Linux tells; elsewhere nothing is known, and nothing is refused. And its refusals in the midst of the work, put into
words. Not here: what a run needs (plan).
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from types import FrameType
from typing import Any

from merger.errors import BudgetError, MergerError, Problem

_ROOT = Path("/")

_USED_UP = {
    errno.ENOSPC: "free some disk, and run it again",
    errno.EDQUOT: "your share of that disk is used up: remove files of yours, or choose another disk",
    errno.EFBIG: "no file may be so large there: write a smaller --shard-size, or choose another disk",
    errno.EMFILE: "let this process open more files (ulimit -n 4096), or write a smaller --threads",
    errno.ENFILE: "all programs of this machine together have too many files open: end some, and run it again",
    errno.ENOMEM: "end other programs, or write a smaller --max-memory and --threads",
}
_REFUSED = {
    errno.EACCES: "look at the rights of it and of the folders above: this user may not",
    errno.EPERM: "look at the rights of it and of the folders above: this user may not",
    errno.EROFS: "that disk can only be read: choose another",
    errno.EIO: "the disk itself fails: the system's log says more; choose another",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "links lead in a circle there: name the folder itself",
    errno.ENOTDIR: "one of the folders above is a file: choose another place",
    errno.ESTALE: "a disk of the network went away: mount it again, and run it again",
}
_THREADS = "write a smaller --threads, or let this user or container have more (ulimit -u, or its limit of pids)"
_IN_WORDS = {"can't start new thread": _THREADS, "can't allocate memory": _USED_UP[errno.ENOMEM]}
"""What Python and torch say with no more than a RuntimeError."""


# ---- where this package is had from ---------------------------------------------------------------------------------


PACKAGE = "hub-merger"


@cache
def addresses() -> Mapping[str, str]:
    """[project.urls] of pyproject.toml: the repository, and a download where pip finds the package by its name."""
    from importlib.metadata import metadata  # not before --help

    return dict(each.split(", ", 1) for each in metadata(PACKAGE).get_all("Project-URL", ()))


def requirement(extras: str = "", version: str = "") -> str:
    """What pip is asked for: the package by its name once it is published, until then by its repository.

    >>> requirement("moe", "0.1.0")
    'hub-merger[moe] @ https://github.com/OWNER/merger/archive/v0.1.0.zip'
    """
    name = f"{PACKAGE}[{extras}]" if extras else PACKAGE
    if "Download" in addresses():
        return f"{name}=={version}" if version else name
    return f"{name} @ {addresses().get('Repository')}/archive/{f'v{version}' if version else 'HEAD'}.zip"


def install_command(extras: str = "", version: str = "") -> str:
    """The command that installs it."""
    return f"pip install '{requirement(extras, version)}'"


# ---- a process of ours ----------------------------------------------------------------------------------------------


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_settings: list[Callable[[], None]] = []
_is_ours = False


def in_our_process(setting: Callable[[], None]) -> Callable[[], None]:
    """Have this done once the process is known to be ours: at once, or by `take_over`."""
    _settings.append(setting)
    if _is_ours:
        setting()
    return setting


def take_over() -> None:
    """Say that this process does nothing but our work. Shells do; who calls the Python API keeps their own settings."""
    global _is_ours
    if not _is_ours:
        _is_ours = True
        for setting in _settings:
            setting()


@in_our_process
def _collect_seldom() -> None:
    """Torch's import makes so many lasting objects that looking for garbage in them took 0.3 s, at the exit 0.45 s."""
    gc.set_threshold(200_000)
    atexit.register(gc.freeze)


@in_our_process
def _keep_freed_memory() -> None:
    """Let glibc's malloc keep what a block's temporaries gave back: as new memory they took a third of some merges."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)


# ---- what there is --------------------------------------------------------------------------------------------------


def free_memory(root: Path = _ROOT) -> int | None:
    """Bytes that may still be taken: what the system has to give, but no more than the control groups leave."""
    known = [found for found in (_available(root), *_left_by_groups(root)) if found is not None]
    return min(known, default=None)


def cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
        return path.read_text()
    except OSError:
        return None


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """Matrices are multiplied and decomposed on the thread that asks for it; afterwards it is as it was."""
    import numpy  # noqa: F401  what is to be held back must be there

    with _blas(len(sys.modules)).limit(limits=1, user_api="blas"):
        yield


@lru_cache(maxsize=1)
def _blas(_: int) -> Any:
    """What holds BLAS libraries back; looking for them takes 10 ms, and pays when more is imported than before."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


# ---- what it refuses ------------------------------------------------------------------------------------------------


def refusal(what: str, error: OSError, otherwise: type[MergerError], hint: str | None = None) -> MergerError:
    """A refusal of the system's as one of ours: of the kind `otherwise`, or BudgetError where something is used up.

    Args:
        otherwise: the kind where nothing is used up.
    """
    known = _USED_UP | _REFUSED
    kind = BudgetError if error.errno in _USED_UP else otherwise
    return kind(Problem(f"{what} ({error.strerror or error})", hint=known.get(error.errno or 0, hint)))


def lacking(error: BaseException) -> BudgetError | None:
    """What this machine has no more of, where that lies at the bottom of an error, whoever came across it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _USED_UP:
            at = "" if cause.filename is None else f" at {cause.filename}"
            found = refusal(f"the work cannot go on{at}", cause, BudgetError)
            assert isinstance(found, BudgetError)
            return found
        if (hint := _hint_of(cause)) is not None:
            return BudgetError(Problem(f"the work cannot go on ({str(cause) or 'no memory is left'})", hint=hint))
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


def _hint_of(error: BaseException) -> str | None:
    if isinstance(error, MemoryError):
        return _USED_UP[errno.ENOMEM]
    told = (hint for words, hint in _IN_WORDS.items() if isinstance(error, RuntimeError) and words in str(error))
    return next(told, None)


@contextmanager
def tell_limits() -> Iterator[None]:
    """What this machine has no more of inside is told as a refusal; all else passes as it is.

    Raises:
        BudgetError: files, disk, memory or threads are used up.
    """
    try:
        yield
    except (OSError, RuntimeError, MemoryError) as error:
        if (found := lacking(error)) is None:
            raise
        raise found from None


# ---- how it ends a run ----------------------------------------------------------------------------------------------


class Halt(KeyboardInterrupt):
    """Somebody wants the process to end: Ctrl-C, or the system's own way."""

    def __init__(self, number: int) -> None:
        super().__init__(
            "interrupted: the destination is as it was; finished files wait there, and the same command goes on"
        )
        self.exit_code = 128 + number


@contextmanager
def halting() -> Iterator[None]:
    """SIGTERM ends what is under way as Ctrl-C does, and clears up as it does; the second signal ends it at once.

    Raises:
        Halt: one of them came.
    """

    def halt(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        raise Halt(number)

    wanted = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    # what was ignored (nohup) stays so
    before = {each: signal.getsignal(each) for each in wanted if signal.getsignal(each) != signal.SIG_IGN}
    for each in before:
        signal.signal(each, halt)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
