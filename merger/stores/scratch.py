"""A run's folder for temporary files, and the ones that killed runs left. Not here: what lies in them."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX, _MARK = "merger-", ".merger-in-work"


class Scratch:
    """A folder that is made when it is first asked for, and gone after `close`.

    A file in it is locked while this process lives, however it ends: so `sweep` tells a leftover from another run's.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._lock: int | None = None

    def folder(self) -> Path:
        """Where it is."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
            self._lock = _marked(self._folder)
        return self._folder

    def close(self) -> None:
        """Remove it, with all that is in it."""
        if self._lock is not None and self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            os.close(self._lock)
        self._folder = self._lock = None


def _marked(folder: Path) -> int:
    """The mark, open and locked before it has its name; without locks on this disk it never gets it: nobody sweeps."""
    unnamed = folder / f"{_MARK}.unlocked"
    opened = os.open(unnamed, os.O_RDWR | os.O_CREAT)
    with suppress(OSError):
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unnamed.rename(folder / _MARK)
    return opened


def sweep() -> None:
    """Remove the folders of this user's runs that are no longer alive."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError), _taken(folder):  # no mark, another user's, a run that lives, or gone meanwhile
            shutil.rmtree(folder)


@contextmanager
def _taken(folder: Path) -> Iterator[None]:
    """Hold a dead run's mark; an OSError if there is none to be had."""
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise PermissionError
    opened = os.open(folder / _MARK, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(opened)
