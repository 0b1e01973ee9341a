"""Models in local folders, and results written to one. Not here: what the files mean."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from merger.checkpoints.shard import Written
from merger.errors import BudgetError, ModelError, Problem, UploadError
from merger.stores.ports import FileInfo, Located, Published, Ticket

_MARK = ".merger-in-work"


class FolderStore:
    """Models in folders of this machine, written with ``/`` or ``~`` and relative to the working directory."""

    def has(self, path: str) -> bool:
        """A path is a folder's when it exists or is written as one; a name such as ``org/model`` is not."""
        written_as_one = path.startswith(("./", "../", "/", "~", ".\\")) or path[1:2] == ":"
        return written_as_one or os.path.isdir(os.path.expanduser(path))

    def locate(self, path: str, revision: str | None) -> Located:
        """Find the folder's files; a folder has no revisions."""
        folder = Path(os.path.expanduser(path))
        if not os.path.isdir(folder):
            hint = "paths are relative to the working directory"
            raise ModelError(Problem(f"there is no folder {path!r}", hint=hint))
        if revision is not None:
            raise ModelError(Problem(f"{path!r} is a folder, which has no revision {revision!r}", hint="drop the '@…'"))
        files = {item.relative_to(folder).as_posix(): FileInfo(item.stat().st_size) for item in _files(folder)}
        return Located(folder.resolve().name, str(folder), None, files)

    def fetch(self, model: Located, file: str, start: int = 0, stop: int | None = None) -> bytes:
        """Read a file or a part of it."""
        with _readable(model, file), (Path(model.where) / file).open("rb") as source:
            source.seek(start)
            return source.read(-1 if stop is None else stop - start)

    def reader(self, tickets: Sequence[Ticket], budget: int) -> FolderReader:
        """A reader that asks the disk each time: the system's page cache is the read-ahead."""
        return FolderReader(tickets)


def _files(folder: Path) -> list[Path]:
    """The files directly in the folder and one level below, sorted, so that every machine lists them alike."""
    return sorted(item for pattern in ("*", "*/*") for item in folder.glob(pattern) if item.is_file())


@contextmanager
def _readable(model: Located, file: str) -> Iterator[None]:
    """Turn the disk's errors into a sentence and a next step."""
    try:
        yield
    except OSError as error:
        what = f"{model.name}: {file} cannot be read ({error.strerror})"
        raise ModelError(Problem(what, hint=f"look at its rights and its disk: {model.where}")) from None


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
        with _readable(wanted.model, wanted.file):
            while done < len(out):
                got = os.preadv(self._descriptor(path), [out[done:]], wanted.start + offset + done)
                if got == 0:
                    what = f"{wanted.model.name}: {wanted.file} became shorter while it was read"
                    raise ModelError(Problem(what, hint="let nothing write to the models, and run it again"))
                done += got

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

    The model is made in ``<folder>.merging/new`` beside it, without config.json until the end, and renamed; an old
    model waits in ``<folder>.merging/old`` meanwhile. A file in there marks it as ours and is locked while its run
    lives, so that the leftover of a killed run is told from another run.

    Args:
        folder: where the result shall lie.
        force: replace a model that lies there.
        parents: folders that must not be replaced, since the merge reads from them.
    """

    def __init__(self, folder: Path, force: bool = False, parents: Sequence[Path] = ()) -> None:
        self.folder = Path(os.path.realpath(os.path.expanduser(folder)))
        self.name = self.folder.name
        self._work = self.folder.parent / f"{self.name}.merging"
        self._mark, self._new, self._old = self._work / _MARK, self._work / "new", self._work / "old"
        self._force = force
        self._parents = [parent.resolve() for parent in parents]
        self._lock: int | None = None

    def prepare(self, identity: str, needed: int) -> None:
        """Refuse a destination that would lose something; clear away what a killed run left."""
        with self._refusals():
            self._refuse_loss()
            self._lock = self._locked()
            try:
                self._put_back()
                self._refuse_loss()
                self._empty()
                self._mark.write_text(identity)
                self._new.mkdir()
                self._refuse_disk(needed)
            except BaseException:
                self.abandon()
                raise

    def _refuse_loss(self) -> None:
        another = "choose another destination"
        if any(self.folder in (parent, *parent.parents) for parent in self._parents):
            what = f"the destination {self.name!r} is or holds one of the models that are merged"
            raise UploadError(Problem(what, hint=another))
        if _is_free(self.folder):
            return
        if not self.folder.is_dir():
            raise UploadError(Problem(f"the destination {self.name!r} is a file", hint=another))
        if not self._force:
            what = f"the destination {self.name!r} exists and is not empty"
            raise UploadError(Problem(what, hint=f"{another}, or replace it with --force"))
        if not (self.folder / "config.json").is_file():
            what = f"the destination {self.name!r} holds something that is no model"
            raise UploadError(Problem(what, hint=f"--force replaces models only: {another}"))

    def _refuse_disk(self, needed: int) -> None:
        free = shutil.disk_usage(self._work).free
        if free < needed:
            what = f"the result needs {needed:,} bytes of disk, {free:,} are free where {self.name!r} shall lie"
            raise BudgetError(Problem(what, hint="choose a destination on another disk, or publish to hf://owner/name"))

    def _locked(self) -> int:
        """The mark, open, with a lock that the system takes back when this process ends, however it ends."""
        if not _is_free(self._work) and not self._mark.is_file():
            what = f"{self._work.name!r} beside the destination is needed for the work, but something else is there"
            raise UploadError(Problem(what, hint="move it away, or choose another destination"))
        self._work.mkdir(parents=True, exist_ok=True)
        opened = os.open(self._mark, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(opened)
            what = f"another run is writing to {self.name!r}"
            raise UploadError(Problem(what, hint="wait for it, or choose another destination")) from None
        except OSError:
            pass  # a file system without locks
        return opened

    def _put_back(self) -> None:
        """Undo the first half of a replacement whose second half did not come about."""
        if self._old.exists() and not self.folder.exists():
            self._old.rename(self.folder)

    def _empty(self) -> None:
        for leftover in self._work.iterdir():
            if leftover.is_dir():
                shutil.rmtree(leftover)
            elif leftover != self._mark:
                leftover.unlink()

    def workspace(self) -> Path:
        """The folder beside the destination."""
        return self._new

    def take(self, shard: Written) -> None:
        """Keep it where it was made."""

    def finish(self, files: Mapping[str, bytes], message: str) -> Published:
        """Write the small files and give the folder its name."""
        with self._refusals():
            self._refuse_loss()  # the destination may have been filled in the meantime
            for name, content in files.items():
                target = self._new / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
            self._rename()
            self._leave()
        return Published(str(self.folder))

    def _rename(self) -> None:
        """The old folder, if any, is moved aside first and removed only once the new one stands."""
        if not _is_free(self.folder):
            self.folder.rename(self._old)
        self._new.rename(self.folder)

    def abandon(self) -> None:
        """Remove what was made."""
        if self._lock is not None:
            with suppress(OSError):
                self._put_back()
                self._leave()

    def _leave(self) -> None:
        """Remove the work; the mark goes last, so that a leftover is always ours."""
        try:
            self._empty()
            self._mark.unlink()
            self._work.rmdir()
        finally:
            if self._lock is not None:
                os.close(self._lock)
            self._lock = None

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Turn the disk's errors into a sentence and a next step."""
        try:
            yield
        except OSError as error:
            what = f"cannot write to the destination {str(self.folder)!r} ({error.strerror})"
            raise UploadError(Problem(what, hint="look at its rights and its disk, or choose another")) from None


def _is_free(path: Path) -> bool:
    """Whether nothing is there, or an empty folder."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))
