"""Where a path may lead, and whose words it follows: asked for every path that words name, and for every file there.

Whose words they are is one piece of data, the root: a person's own command line names any place of the machine
(`ANYWHERE`), a stranger's recipe what lies inside a checkout, and a form, a comment or a lock on the Hub nothing of the
machine (None). Not here: how much is read (limits), and what files mean (checkpoints).
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from merger import system
from merger.errors import ModelError, Problem
from merger.safety.limits import Limit, excess

ANYWHERE = Path("/")
"""The root of a person's own words."""

COPY = "put the file itself there, or take the link out"
"""The next step where a file in a folder is barred."""

POINTER = "is a pointer of Git LFS, not the file itself"
_FETCH = "git lfs pull, in its folder, fetches the files; or download the model with hf download owner/name"
_POINTS, _POINTER_BYTES = b"version https://git-lfs.github.com/spec/", 1024


class BarredError(Exception):
    """Nothing may be read of a file; its words are the end of a sentence that begins with the file's name."""


def remedy(barred: str) -> str:
    """The next step where a file in a folder is barred for this reason."""
    return _FETCH if barred == POINTER else COPY


def points(place: Path) -> bool:
    """Whether a clone without Git LFS left this in the file's place; of what cannot be read nothing is known."""
    try:
        size = place.stat().st_size
        return len(_POINTS) < size < _POINTER_BYTES and read_file(place, 0, len(_POINTS)) == _POINTS
    except OSError:
        return False


def resolve(path: str, root: Path | None) -> Path:
    """The place that words name, all links followed, whether or not anything is there.

    Args:
        path: relative to the working directory; `~` is its reader's home.
        root: inside of which it has to lie; None: no place of the machine may be named.

    Raises:
        ModelError: it lies elsewhere, or is no path.
    """
    if root is None:
        what = f"{path!r} is a place on a machine, and only what is on the Hub may be named here"
        raise ModelError(Problem(what, hint="name it as owner/name, or hf://owner/name/file"))
    place = inside(path, root)
    if place is None:
        what = f"{path!r} is outside of {root.name}, and its recipes name nothing else of the machine"
        raise ModelError(Problem(what, hint="name what lies inside of it, or what is on the Hub"))
    return place


def inside(path: str | Path, root: Path) -> Path | None:
    """The same place, None where it lies outside of the root."""
    place = _real(path)
    return place if place is not None and _holds(root, place) else None


def _holds(root: Path, place: Path) -> bool:
    """Whether it lies inside, all links followed; a machine may have several disks, which lie in no one folder."""
    return root == ANYWHERE or place.is_relative_to(os.path.realpath(root))


def _real(path: str | Path) -> Path | None:
    """All links followed; None for a NUL in it, or what no file system can spell."""
    try:
        return Path(os.path.realpath(os.path.expanduser(path)))
    except ValueError:
        return None


def reach(folder: str, file: str, root: Path | None, leaves: bool) -> Path:
    """The regular file that a name in a folder leads to, all links followed.

    Args:
        folder: the folder, which may be a link itself.
        file: the file's name in there.
        root: as in `resolve`.
        leaves: whether a link may lead out of the folder: what is never published, such as weights.

    Raises:
        BarredError: nothing may be read of it.
    """
    home, place = _real(folder), _real(os.path.join(folder, file))
    if home is None or place is None:
        raise BarredError("has a name that no file can have")
    try:
        mode = os.lstat(place).st_mode
    except OSError as error:
        raise BarredError(f"cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(mode):
        raise BarredError("is no regular file")
    if root is None or not _holds(root, place):
        raise BarredError("is a link that leads out of the repository")
    if not (leaves or place.is_relative_to(home) or place.parent == _blobs(home)):
        raise BarredError("is a link that leads out of its folder")
    return place


def _blobs(home: Path) -> Path | None:
    """Where the Hub's cache keeps the files of a snapshot, in which they are links: ``../../blobs``."""
    return next((each.parents[1] / "blobs" for each in (home, *home.parents) if each.parent.name == "snapshots"), None)


def open_regular(place: Path) -> int:
    """A descriptor of a regular file that was reached; opening it never waits, and follows no link any more.

    Raises:
        OSError: it cannot be opened, or is another thing by now.
    """
    descriptor = os.open(place, system.READING)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file")
    return descriptor


def read_file(place: Path, start: int = 0, stop: int | None = None, limit: Limit | None = None) -> bytes:
    """The bytes of a regular file, as many as the disk says; the kernel's own, such as /proc's, hold others.

    Args:
        limit: how much may be read up to that end, whatever the file's size was before.

    Raises:
        ModelError: it is larger.
        OSError: it cannot be read, or has more or fewer.
    """
    with os.fdopen(open_regular(place), "rb") as source:
        size = os.fstat(source.fileno()).st_size
        if stop is None and limit is not None and (problem := excess(str(place), size, limit)):
            raise ModelError(problem)
        wanted = (size if stop is None else stop) - start
        source.seek(start)
        data = source.read(wanted)
        if len(data) != wanted or (stop is None and source.read(1)):
            raise OSError(errno.EINVAL, "it has another length than the disk says")
    return data


def read_named(path: str, root: Path | None, limit: Limit) -> bytes:
    """The bytes of a file that words name, and that is not published as it is.

    Raises:
        ModelError: it lies outside of the root, is no regular file, or larger than the limit.
    """
    place = regular(path, root)
    try:
        return read_file(place, limit=limit)
    except OSError as error:
        raise ModelError(Problem(f"{path!r} cannot be read ({error.strerror})", hint=_RELATIVE)) from None


def regular(path: str, root: Path | None) -> Path:
    """The regular file that words name.

    Raises:
        ModelError: it lies outside of the root, or is no regular file.
    """
    place = resolve(path, root)
    try:
        return reach(str(place.parent), place.name, root, leaves=True)
    except BarredError as error:
        what = f"{path!r} {error}" if os.path.lexists(place) else f"{path!r} is not there"
        raise ModelError(Problem(what, hint=_RELATIVE)) from None


_RELATIVE = "paths are relative to the working directory"
