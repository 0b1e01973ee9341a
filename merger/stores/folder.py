"""Models in local folders.

Not here: what the files mean, and results (results).
"""

from __future__ import annotations

import glob
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from merger import runtime, system
from merger.errors import MissingError, ModelError, Problem
from merger.models.checkpoint import is_single, is_weights
from merger.models.gguf.header import parts_of
from merger.safety import limits, paths
from merger.safety.paths import ANYWHERE, BarredError
from merger.stores.ports import FileInfo, Located, Reader, Ticket, refuse_large

_OPEN_FILES = 64
"""So many stay open for the next read: a process may have about a thousand, and a merge may read more."""


class FolderStore:
    """Models in folders of this machine, written with ``/`` or ``~`` and relative to the working directory.

    A single file of safetensors is one, too. What is not weights is read only where it lies in the model's own folder.

    Args:
        root: inside of which models have to lie, by whose words they are named (safety.paths); None: nowhere.
    """

    def __init__(self, root: Path | None = ANYWHERE) -> None:
        self._root = root

    def has(self, path: str) -> bool:
        """A path is ours when it exists or is written as one; a name such as ``org/model`` is not."""
        written_as_one = path.startswith(("./", "../", "/", "~", ".\\", "..\\")) or path[1:2] == ":" or "*" in path
        alone = "/" not in path and is_single(path)
        return written_as_one or alone or (self._root is not None and os.path.exists(os.path.expanduser(path)))

    def locate(self, path: str, revision: str | None) -> Located:
        """Find the folder's files, or the one file; they have no revisions."""
        root = self._root
        paths.resolve(path, root)
        folder, kind = Path(os.path.expanduser(path)), "file" if is_single(path) else "folder"
        if not os.path.lexists(folder):
            several = "for the mean of all that fit write average: uniform beside it"
            hint = several if "*" in path else "paths are relative to the working directory"
            raise MissingError(Problem(f"there is no {kind} {path!r}", hint=hint))
        if revision is not None:
            raise ModelError(Problem(f"{path!r} is a {kind}, which has no revision {revision!r}", hint="drop the '@…'"))
        if not os.path.isdir(folder):
            parts = parts_of(folder.name, [each.name for each in folder.parent.glob(f"*{folder.suffix}")])
            return Located(
                folder.name, str(folder.parent), None, {name: _info(folder.parent, name, root) for name in parts}
            )
        files = {name: _info(folder, name, root) for name in _files(folder)}
        return Located(folder.resolve().name, str(folder), None, files)

    def names(self, path: str, of_folders: bool) -> list[str]:
        """The folders that fit a pattern, and single files of safetensors."""
        if not of_folders:
            hint = "write the pattern into the path: ./run/checkpoint-*"
            raise ModelError(Problem(f"{path!r} is a folder, which has no revisions", hint=hint))
        paths.resolve(path, self._root)
        found = glob.glob(os.path.expanduser(path.rstrip("/")))
        return [each.replace(os.sep, "/") for each in found if os.path.isdir(each) or is_single(each)]

    def fetch(self, model: Located, file: str, start: int = 0, stop: int | None = None) -> bytes:
        limit = limits.of(file)
        if stop is None:
            refuse_large(model, file, model.files[file].size, limit)
        with _readable(model, file):
            return paths.read_file(_reach(model.where, file, self._root), start, stop, limit)

    def reader(self, tickets: Sequence[Ticket], budget: int) -> FolderReader:
        """A reader that asks the disk each time: the system's page cache is the read-ahead."""
        return FolderReader(tickets, self._root)


def _reach(folder: str, file: str, root: Path | None) -> Path:
    """What lies behind a name; a link out of the folder is followed to its own weights: all else may be published."""
    return paths.reach(folder, file, root, leaves=is_weights(file) or is_single(file))


def _info(folder: Path, name: str, root: Path | None) -> FileInfo:
    try:
        place = _reach(str(folder), name, root)
    except BarredError as why:
        return FileInfo(0, barred=str(why))
    stat = place.stat()
    return FileInfo(stat.st_size, changed=stat.st_mtime_ns, barred=paths.POINTER if paths.points(place) else None)


def _files(folder: Path) -> list[str]:
    """The files directly in the folder and one level below, sorted, so that every machine lists them alike."""
    found = sorted(item for pattern in ("*", "*/*") for item in folder.glob(pattern) if not os.path.isdir(item))
    return [item.relative_to(folder).as_posix() for item in found]


def tree(folder: str) -> list[str]:
    """The names of all files below a folder, however deep; of a link to a folder its own alone, and a ``/``.

    Raises:
        ModelError: a folder cannot be looked into.
    """

    def refuse(error: OSError) -> NoReturn:
        what = f"{error.filename!r} cannot be looked into ({error.strerror})"
        raise ModelError(Problem(what, hint="look at its rights and its disk")) from None

    found = []
    for at, folders, files in os.walk(folder, onerror=refuse):
        links = (f"{name}/" for name in folders if os.path.islink(os.path.join(at, name)))
        found += [f"{Path(at).relative_to(folder).as_posix()}/{name}" for name in (*files, *links)]
    return sorted(name.removeprefix("./") for name in found)


@contextmanager
def _readable(model: Located, file: str) -> Iterator[None]:
    """Turn the disk's errors into a sentence and a next step."""
    try:
        yield
    except BarredError as why:
        raise ModelError(Problem(f"{_name_file(model, file)} {why}", hint=paths.COPY)) from None
    except OSError as error:
        hint = f"look at its rights and its disk: {model.where}"
        raise runtime.refusal(f"{_name_file(model, file)} cannot be read", error, ModelError, hint) from None


def _name_file(model: Located, file: str) -> str:
    """Several models have files of the same name; a single file is its own."""
    return file if file == model.name else f"{model.name}: {file}"


class FolderReader(Reader):
    """Reads tickets at their places: mapped pages would count as this process's memory."""

    def __init__(self, tickets: Sequence[Ticket], root: Path | None = ANYWHERE) -> None:
        self._tickets = tickets
        self._root = root
        self._open: dict[tuple[str, str], _Open] = {}
        self._lock = threading.Lock()

    def read(self, ticket: int, offset: int, out: memoryview) -> None:
        wanted = self._tickets[ticket]
        done = 0
        with _readable(wanted.model, wanted.file), self._opened(wanted.model.where, wanted.file) as descriptor:
            while done < len(out):
                got = system.read_at(descriptor, out[done:], wanted.start + offset + done)
                if got == 0:
                    what = f"{wanted.model.name}: {wanted.file} became shorter while it was read"
                    raise ModelError(Problem(what, hint="let nothing write to the models, and run it again"))
                done += got

    @contextmanager
    def _opened(self, folder: str, file: str) -> Iterator[int]:
        with self._lock:
            found = self._open.pop((folder, file), None) or _Open(paths.open_regular(_reach(folder, file, self._root)))
            self._open[folder, file] = found  # the last in the row now
            found.readers += 1
        try:
            yield found.descriptor
        finally:
            with self._lock:
                found.readers -= 1
                self._close_all_but(_OPEN_FILES)

    def _close_all_but(self, most: int) -> None:
        """Close those that were read longest ago, and that nobody reads."""
        idle = [key for key, file in self._open.items() if file.readers == 0]
        for key in idle[: max(0, len(self._open) - most)]:
            os.close(self._open.pop(key).descriptor)

    def repeatable(self, ticket: int) -> bool:
        """A disk can be read again."""
        return True

    def close(self) -> None:
        with self._lock:
            self._close_all_but(0)


@dataclass
class _Open:
    """A file that is open, and how many threads read it at this moment."""

    descriptor: int
    readers: int = 0
