"""The process and its machine: the signals by which a run ends; what is set for a whole process, by those alone whose
process it is; the system's refusals in the midst of the work, put into words; and where this package is had from.

Not here: what the system has (system), and what a run needs (plan).
"""

from __future__ import annotations

import atexit
import errno
import gc
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, lru_cache
from types import FrameType
from typing import Any

from merger import system
from merger.errors import BudgetError, MergerError, Problem

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


in_our_process(system.keep_freed_memory)


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
