"""Models in local folders, and results written to one. Not here: what the files mean."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from merger.checkpoints.shard import Written
from merger.errors import BudgetError, ModelError, Problem, UploadError
from merger.stores.ports import FileInfo, Located, Published, Ticket

_MARK = ".merger-in-work"


class FolderStore:
    """Models in folders of this machine, written with ``/`` or ``~`` and relative to the working directory."""

    def has(self, path: str) -> bool:
        """A path is a folder's when it exists or is written as one; a name such as ``org/model`` is not."""
        return Path(path).expanduser().is_dir() or path.startswith(("./", "../", "/", "~", ".\\")) or path[1:2] == ":"

    def locate(self, path: str, revision: str | None) -> Located:
        """Find the folder's files; a folder has no revisions."""
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise ModelError(Problem(f"there is no folder {path!r}", hint="paths are relative to the working directory"))
        if revision is not None:
            raise ModelError(Problem(f"{path!r} is a folder, which has no revision {revision!r}", hint="drop the '@…'"))
        files = {item.relative_to(folder).as_posix(): FileInfo(item.stat().st_size) for item in _files(folder)}
        return Located(folder.resolve().name, str(folder), None, files)

    def fetch(self, model: Located, file: str, start: int = 0, stop: int | None = None) -> bytes:
        """Read a file or a part of it."""
        try:
            with (Path(model.where) / file).open("rb") as source:
                source.seek(start)
                return source.read(-1 if stop is None else stop - start)
        except OSError as error:
            raise _unreadable(file, error) from None

    def reader(self, tickets: Sequence[Ticket], budget: int) -> FolderReader:
        """A reader that asks the disk each time: the system's page cache is the read-ahead."""
        return FolderReader(tickets)


def _files(folder: Path) -> list[Path]:
    """The files directly in the folder and one level below, sorted, so that every machine lists them alike."""
    return sorted(item for pattern in ("*", "*/*") for item in folder.glob(pattern) if item.is_file())


def _unreadable(file: str, error: OSError) -> ModelError:
    return ModelError(Problem(f"{file}: cannot be read ({error.strerror})"))


class FolderReader:
    """Reads tickets with pread: mapped pages would count as this process's memory."""

    def __init__(self, tickets: Sequence[Ticket]) -> None:
        self._tickets = tickets
        self._open: dict[Path, int] = {}

    def read(self, ticket: int, offset: int, out: memoryview) -> None:
        """Fill `out` from the ticket's file."""
        wanted = self._tickets[ticket]
        path = Path(wanted.model.where) / wanted.file
        done = 0
        try:
            while done < len(out):
                got = os.preadv(self._descriptor(path), [out[done:]], wanted.start + offset + done)
                if got == 0:
                    raise ModelError(Problem(f"{wanted.file} became shorter while it was read"))
                done += got
        except OSError as error:
            raise _unreadable(wanted.file, error) from None

    def _descriptor(self, path: Path) -> int:
        if path not in self._open:
            # Two threads may open the same file at once: the loser's descriptor is closed again.
            opened = os.open(path, os.O_RDONLY)
            if self._open.setdefault(path, opened) != opened:
                os.close(opened)
        return self._open[path]

    def repeatable(self, ticket: int) -> bool:
        """A disk can be read again."""
        return True

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


class FolderSink:
    """A folder that appears, complete, when the run is finished.

    The model is made in ``<folder>.merging`` beside it, without config.json until the end, and renamed.

    Args:
        folder: where the result shall lie.
        force: replace a model that lies there.
        parents: folders that must not be replaced, since the merge reads from them.
    """

    def __init__(self, folder: Path, force: bool = False, parents: Sequence[Path] = ()) -> None:
        self.folder = folder.expanduser().absolute()
        self.name = self.folder.name
        self._work = self.folder.with_name(f"{self.name}.merging")
        self._force = force
        self._parents = [parent.resolve() for parent in parents]

    def prepare(self, identity: str, needed: int) -> None:
        """Refuse a destination that would lose something; clear away what a killed run left."""
        self._refuse_loss()
        if self._work.exists():
            self._clear_leftover()
        try:
            self._work.mkdir(parents=True)
            (self._work / _MARK).write_text(identity)
        except OSError as error:
            raise UploadError(Problem(f"cannot write to {self._work} ({error.strerror})")) from None
        free = shutil.disk_usage(self._work).free
        if free < needed:
            self.abandon()
            what = f"the result needs {needed:,} bytes of disk, {free:,} are free where {self.name!r} shall lie"
            raise BudgetError(Problem(what, hint="choose a destination on another disk, or publish to hf://owner/name"))

    def _refuse_loss(self) -> None:
        if self.folder.resolve() in self._parents:
            what = f"the destination {self.name!r} is one of the models that are merged"
            raise UploadError(Problem(what, hint="choose another destination"))
        if self.folder.is_file():
            raise UploadError(Problem(f"the destination {self.name!r} is a file", hint="choose another destination"))
        if self.folder.is_dir() and any(self.folder.iterdir()):
            if not self._force:
                what = f"the destination {self.name!r} exists and is not empty"
                raise UploadError(Problem(what, hint="choose another destination, or replace it with --force"))
            if not (self.folder / "config.json").is_file():
                what = f"the destination {self.name!r} holds something that is no model"
                raise UploadError(Problem(what, hint="--force replaces models only: choose another destination"))

    def _clear_leftover(self) -> None:
        if not (self._work / _MARK).is_file():
            what = f"{self._work.name!r} beside the destination is needed for the work, but something else is there"
            raise UploadError(Problem(what, hint="move it away, or choose another destination"))
        shutil.rmtree(self._work)

    def workspace(self) -> Path:
        """The folder beside the destination."""
        return self._work

    def take(self, shard: Written) -> None:
        """Keep it where it was made."""

    def finish(self, files: Mapping[str, bytes], message: str) -> Published:
        """Write the small files and give the folder its name."""
        try:
            for name, content in files.items():
                target = self._work / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
            (self._work / _MARK).unlink()
            self._rename()
        except OSError as error:
            raise UploadError(Problem(f"cannot write {self.name!r} ({error.strerror})")) from None
        return Published(str(self.folder))

    def _rename(self) -> None:
        """The old folder, if any, is moved aside first and removed only once the new one stands."""
        aside = self.folder.with_name(f"{self.name}.replaced")
        if self.folder.exists():
            self.folder.rename(aside)
        self._work.rename(self.folder)
        if aside.exists():
            shutil.rmtree(aside)

    def abandon(self) -> None:
        """Remove what was made."""
        if (self._work / _MARK).is_file():
            shutil.rmtree(self._work)
