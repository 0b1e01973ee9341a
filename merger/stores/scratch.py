"""Temporary folders, which the next run removes if one is killed."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from merger import system

_PREFIX, _SUFFIX, _ALIVE = "merger-", ".scratch", ".alive"


class Scratch:
    """A folder that is made when it is first asked for, and gone after `close`.

    A file in it is held while this process lives, however it ends: so `sweep` tells a leftover from another run's.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._alive: system.FileLock | None = None

    def folder(self) -> Path:
        """Where it is."""
        while self._folder is None:
            made = Path(tempfile.mkdtemp(prefix=_PREFIX, suffix=_SUFFIX))
            with suppress(FileNotFoundError):  # another run swept it before it was held
                alive = system.FileLock(made / _ALIVE)
                if alive.take() and (made / _ALIVE).exists():
                    self._folder, self._alive = made, alive
                else:
                    alive.close()
        return self._folder

    def close(self) -> None:
        """Remove it, with all that is in it."""
        if self._alive is not None and self._folder is not None:
            self._alive.remove()
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = self._alive = None


def sweep() -> None:
    """Remove the folders of this user's runs that are no longer alive."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*{_SUFFIX}"):
        with suppress(OSError):  # another user's, a run that lives, or gone meanwhile
            _remove_dead(folder)


def _remove_dead(folder: Path) -> None:
    if folder.is_symlink() or not system.is_ours(folder):
        return
    alive = system.FileLock(folder / _ALIVE)
    try:
        if alive.take(without_locks=False):
            alive.remove()
            shutil.rmtree(folder)
    finally:
        alive.close()
