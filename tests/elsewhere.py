"""A machine that has none but the plain forms of `merger.system`, as Windows does, made of this one.

Taken away is what only POSIX has, put in is what only Windows has; and as there, what is open cannot be removed or
renamed, and nothing takes another's name. Not here: paths with drives and backslashes, and other encodings.
"""

from __future__ import annotations

import errno
import importlib
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

from merger import system

if sys.platform == "linux":
    import fcntl

TAKEN = (
    "O_CLOEXEC", "O_DIRECT", "O_DIRECTORY", "O_NOCTTY", "O_NOFOLLOW", "O_NONBLOCK", "O_TMPFILE", "getuid",
    "posix_fadvise", "pread", "preadv", "pwrite", "pwritev", "sched_getaffinity", "sendfile", "set_blocking", "sysconf",
)  # fmt: skip
"""Names of `os` that Windows does not have, and that Python's own library does without, too."""


class Msvcrt(ModuleType):
    """Locks of ranges of bytes that belong to who opened the file, by those that Linux has of the same kind."""

    LK_NBLCK, LK_UNLCK = 2, 0

    @staticmethod
    def locking(descriptor: int, mode: int, count: int) -> None:
        """Of the bytes from the file's place on."""
        kind = fcntl.F_UNLCK if mode == Msvcrt.LK_UNLCK else fcntl.F_WRLCK
        start = os.lseek(descriptor, 0, os.SEEK_CUR)
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack("hhqqi", kind, os.SEEK_SET, start, count, 0))
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "Permission denied") from None


def _refuse_open(path: Any) -> None:
    """As Windows does for what is open, or has something open in it."""
    place = Path(os.path.abspath(path))
    for number in os.listdir("/proc/self/fd"):
        try:
            opened = Path(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            continue
        if opened.is_relative_to(place):
            raise PermissionError(errno.EACCES, f"in use: {opened}", str(path))


def _careful(real: Callable[..., None], over: bool = True) -> Callable[..., None]:
    def done(path: Any, *others: Any, **more: Any) -> None:
        _refuse_open(path)
        if others and (os.path.isdir(others[0]) or (not over and os.path.lexists(others[0]))):
            raise FileExistsError(errno.EEXIST, "exists", str(others[0]))
        real(path, *others, **more)

    return done


@contextmanager
def elsewhere() -> Iterator[None]:
    """Inside, this process runs on such a machine; on a real one of another kind than Linux it does so anyway."""
    if sys.platform != "linux":
        yield
        return
    careful = {
        "unlink": _careful(os.unlink), "remove": _careful(os.remove), "rmdir": _careful(os.rmdir),
        "rename": _careful(os.rename, over=False), "replace": _careful(os.replace),
    }  # fmt: skip
    kept = {name: vars(os)[name] for name in TAKEN if hasattr(os, name)}
    with (
        patch.multiple(os, **careful),
        patch.object(tempfile, "TemporaryFile", tempfile.NamedTemporaryFile),
        patch.object(shutil, "_use_fd_functions", False),
        patch.dict(sys.modules, {"msvcrt": Msvcrt("msvcrt"), "fcntl": None, "resource": None}),
    ):
        for name in kept:
            delattr(os, name)
        try:
            with patch.object(sys, "platform", "win32"):
                importlib.reload(system)
            yield
        finally:
            vars(os).update(kept)
    importlib.reload(system)
