"""Temporary folders, which the next run removes if one is killed."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

_PREFIX, _SUFFIX = "merger-", ".scratch"


class Scratch:
    """A folder that is made when it is first asked for, and gone after `close`.

    It is locked while this process lives, however it ends: so `sweep` tells a leftover from another run's.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._lock: int | None = None

    def folder(self) -> Path:
        """Where it is."""
        while self._folder is None:
            made = Path(tempfile.mkdtemp(prefix=_PREFIX, suffix=_SUFFIX))
            with suppress(FileNotFoundError, BlockingIOError):  # another run swept it before it was locked
                self._lock = _open_locked(made)
                self._folder = made
        return self._folder

    def close(self) -> None:
        """Remove it, with all that is in it."""
        if self._lock is not None and self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            os.close(self._lock)
        self._folder = self._lock = None


def sweep() -> None:
    """Remove the folders of this user's runs that are no longer alive."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*{_SUFFIX}"):
        with suppress(OSError):  # another user's, a run that lives, or gone meanwhile
            _remove_dead(folder)


def _remove_dead(folder: Path) -> None:
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        return
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
    finally:
        os.close(opened)


def _open_locked(folder: Path) -> int:
    """The folder, open and locked; where this disk has no locks it is only open, and nobody can sweep it either.

    Raises:
        FileNotFoundError, BlockingIOError: another run takes it for a dead one's.
    """
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.stat(folder)  # it may have been removed between the opening and the lock
    except (BlockingIOError, FileNotFoundError):
        os.close(opened)
        raise
    except OSError:
        pass
    return opened
