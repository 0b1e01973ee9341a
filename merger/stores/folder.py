"""Models in local folders, results written to one, and temporary folders, which the next run removes if one is killed.

Not here: what the files mean.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from merger import runtime
from merger.errors import BudgetError, MissingError, ModelError, Problem, UploadError, few
from merger.models.checkpoint import is_single, is_weights
from merger.models.formats.safetensors import Outlet, WrittenShard, file_sha256
from merger.models.plain_yaml import load_yaml
from merger.models.side_files import CARD_NAME, LOCK_NAME, in_pipeline
from merger.safety import limits, paths, secrets
from merger.safety.paths import ANYWHERE, BarredError
from merger.stores.ports import Content, FileInfo, Leftover, Located, Published, Ticket, refuse_large, write

_MARK, _WORK = ".merger-in-work", ".merging"
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
        written_as_one = path.startswith(("./", "../", "/", "~", ".\\")) or path[1:2] == ":"
        alone = "/" not in path and is_single(path)
        return written_as_one or alone or (self._root is not None and os.path.exists(os.path.expanduser(path)))

    def locate(self, path: str, revision: str | None) -> Located:
        """Find the folder's files, or the one file; they have no revisions."""
        root = self._root
        paths.resolve(path, root)
        folder, kind = Path(os.path.expanduser(path)), "file" if is_single(path) else "folder"
        if not os.path.lexists(folder):
            hint = "paths are relative to the working directory"
            raise MissingError(Problem(f"there is no {kind} {path!r}", hint=hint))
        if revision is not None:
            raise ModelError(Problem(f"{path!r} is a {kind}, which has no revision {revision!r}", hint="drop the '@…'"))
        if not os.path.isdir(folder):
            info = _info(folder.parent, folder.name, root)
            return Located(folder.name, str(folder.parent), None, {folder.name: info})
        files = {name: _info(folder, name, root) for name in _files(folder)}
        return Located(folder.resolve().name, str(folder), None, files)

    def fetch(self, model: Located, file: str, start: int = 0, stop: int | None = None) -> bytes:
        """Read a file or a part of it."""
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
    return paths.reach(folder, file, root, leaves=is_weights(file) and not in_pipeline(file))


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
        found += [os.path.join(os.path.relpath(at, folder), name) for name in (*files, *links)]
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


class FolderReader:
    """Reads tickets with pread: mapped pages would count as this process's memory."""

    def __init__(self, tickets: Sequence[Ticket], root: Path | None = ANYWHERE) -> None:
        self._tickets = tickets
        self._root = root
        self._open: dict[tuple[str, str], _Open] = {}
        self._lock = threading.Lock()

    def read(self, ticket: int, offset: int, out: memoryview) -> None:
        """Fill `out` from the ticket's file."""
        wanted = self._tickets[ticket]
        done = 0
        with _readable(wanted.model, wanted.file), self._opened(wanted.model.where, wanted.file) as descriptor:
            while done < len(out):
                got = os.preadv(descriptor, [out[done:]], wanted.start + offset + done)
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
        """Close the files."""
        with self._lock:
            self._close_all_but(0)


@dataclass
class _Open:
    """A file that is open, and how many threads read it at this moment."""

    descriptor: int
    readers: int = 0


class ResultFolder:
    """A folder that a result goes to, or lies in: it appears, complete, when a run is finished.

    The model is made in ``<folder>.merging`` beside it (see `_Work`), and renamed.

    Args:
        folder: where the result shall lie.
        force: replace a model that lies there.
        parents: folders that must not be replaced, since the merge reads from them.
    """

    def __init__(self, folder: Path, force: bool = False, parents: Sequence[Path] = ()) -> None:
        self.folder = Path(os.path.realpath(os.path.expanduser(folder)))
        self.name = self.folder.name
        self._force = force
        self._parents = [parent.resolve() for parent in parents]

    def open(self, identity: str, shared: bool = False) -> FolderSession | Published:
        """Refuse a destination that would lose something; clear away what another run left."""
        with self.refusals():
            if not self._is_done(identity):
                self.refuse_loss()
            work = _Work(self.folder, shared)
            try:
                work.restore()
                if self._is_done(identity):
                    work.remove()
                    return Published(str(self.folder))
                self.refuse_loss()
                work.resume(identity, self._force)
                work.share(shared)
            except BaseException:
                work.leave()
                raise
        return FolderSession(self, work)

    def _is_done(self, identity: str) -> bool:
        return not self._force and _holds(self.folder, identity)

    def refuse_loss(self) -> None:
        """Refuse to replace what is no model, a parent, or a model without --force.

        Raises:
            UploadError: such a thing is there.
        """
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
        if not any((self.folder / name).is_file() for name in ("config.json", "adapter_config.json", LOCK_NAME)):
            what = f"the destination {self.name!r} holds something that is no model"
            raise UploadError(Problem(what, hint=f"--force replaces models only: {another}"))

    def check_card(self, text: str) -> None:
        """A folder takes any without a token in it."""
        secrets.refuse_tokens({CARD_NAME: text})

    def amend(self, small: Mapping[str, bytes], message: str, seen: Located) -> Published:
        """Write each file beside the old one, then give it its name."""
        secrets.refuse_tokens(small)
        with self.refusals():
            for name, content in small.items():
                target = self.folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if not target.parent.resolve().is_relative_to(self.folder):
                    raise OSError(errno.EINVAL, f"{name} lies behind a link that leads out of it")
                unfinished = target.with_name(f".{target.name}.unfinished")
                unfinished.unlink(missing_ok=True)  # whoever made the folder may have made it a link
                with unfinished.open("xb") as file:
                    file.write(content)
                unfinished.replace(target)
        return Published(str(self.folder))

    def leftovers(self) -> list[Leftover]:
        """The work of a run that is not finished."""
        with self.refusals():
            return _Work.leftover(self.folder)

    def clean(self, leftover: Leftover) -> None:
        """Remove it, unless a run is at work there."""
        with self.refusals():
            work = _Work(self.folder)
            work.restore()
            work.remove()

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Turn the disk's errors into a sentence and a next step."""
        try:
            yield
        except OSError as error:
            what, hint = f"cannot write to the destination {str(self.folder)!r}", "look at its disk, or choose another"
            raise runtime.refusal(what, error, UploadError, hint) from None


class _Work:
    """The folder beside a result in which it is made, held by this run from its making to `remove` or `leave`.

    The model is made in ``new``, without config.json until the end; an old model waits in ``old`` meanwhile. What is
    written in ``done`` of a finished shard lets another run go on from it. A mark tells the folder as ours, names the
    run, and is locked while that lives: so the leftover of a killed run is told from another run.

    Args:
        folder: the result's.
        shared: whether other runs of the same identity may be at work there.

    Raises:
        UploadError: another run is at work there, or something that is not ours lies there.
    """

    def __init__(self, folder: Path, shared: bool = False) -> None:
        self._folder, self._place = folder, _place_beside(folder)
        self.new, self._old, self._done = self._place / "new", self._place / "old", self._place / "done"
        self._mark = self._place / _MARK
        if not _is_free(self._place) and not self._mark.is_file():
            what = f"{self._place.name!r} beside the destination is needed for the work, but something else is there"
            raise UploadError(Problem(what, hint="move it away, or choose another destination"))
        self._place.mkdir(parents=True, exist_ok=True)
        opened = os.open(self._mark, os.O_RDWR | os.O_CREAT)
        self._alone = _flock(opened, fcntl.LOCK_EX)
        if not self._alone and not (shared and _flock(opened, fcntl.LOCK_SH)):
            os.close(opened)
            raise self._busy()
        self._lock: int | None = opened  # the system takes it back when this process ends, however it ends

    @staticmethod
    def leftover(folder: Path) -> list[Leftover]:
        """What lies beside a result of a run that is not finished."""
        place = _place_beside(folder)
        if not (place / _MARK).is_file():
            return []
        shards = _written_down(place / "done").values()
        opened = os.open(place / _MARK, os.O_RDWR)
        try:
            busy = not _flock(opened, fcntl.LOCK_EX)
        finally:
            os.close(opened)
        return [Leftover(str(place), len(shards), sum(shard.size for shard in shards), busy)]

    def _busy(self) -> UploadError:
        what = f"another run is writing to {self._folder.name!r}"
        return UploadError(Problem(what, hint="wait for it, or choose another destination"))

    def _waiting(self, names: Sequence[str]) -> UploadError:
        """What another recipe's run has finished is not thrown away without a word."""
        what = f"finished files of another merge wait in {self._place.name!r}: {few(names)}"
        hint = f"run that one on; `merger clean {self._folder} --yes` removes them, and so does --force"
        return UploadError(Problem(what, hint=hint))

    def restore(self) -> None:
        """Undo the first half of a replacement whose second half did not come about; else end it."""
        if not self._alone or not self._old.exists():
            return
        if not self._folder.exists():
            self._old.rename(self._folder)
        elif not self.new.exists():
            _remove(self._old)

    def resume(self, identity: str, force: bool) -> None:
        """Keep the finished shards of a run of the same identity, and clear away all else if nobody is at work.

        Raises:
            UploadError: finished shards of another merge lie there, and are not to be replaced.
        """
        if self._mark.read_text() != identity:
            if not self._alone:
                raise self._busy()
            if (waiting := sorted(self.held())) and not force:
                raise self._waiting(waiting)
            self._empty()
            self._mark.write_text(identity)
        for folder in (self.new, self._done):
            folder.mkdir(exist_ok=True)
        if self._alone:
            self._forget_damaged()
            self._remove_unfinished()

    def share(self, shared: bool) -> None:
        """From here on parts of the same run may come in."""
        if shared and self._alone and self._lock is not None:
            self._alone = not _flock(self._lock, fcntl.LOCK_SH)

    def free_bytes(self) -> int:
        """What the disk has left."""
        return shutil.disk_usage(self._place).free

    def _forget_damaged(self) -> None:
        """A shard counts as finished only if its file is, to the byte, what was written down of it."""
        for name, shard in self.held().items():
            path = self.new / name
            if not path.is_file() or path.stat().st_size != shard.size or file_sha256(path) != shard.sha256:
                (self._done / name).unlink()

    def _remove_unfinished(self) -> None:
        for leftover in set(os.listdir(self.new)) - self.held().keys():
            _remove(self.new / leftover)

    def _empty(self) -> None:
        for leftover in self._place.iterdir():
            if leftover != self._mark:
                _remove(leftover)

    def held(self) -> dict[str, WrittenShard]:
        """The finished shards by name."""
        return _written_down(self._done)

    def write_down(self, shard: WrittenShard, note: str) -> None:
        """Note that a shard is whole."""
        entry = self._done / f"{shard.name}.unfinished"
        entry.write_text(json.dumps({**asdict(shard), "note": note}))
        entry.rename(self._done / shard.name)

    def notes(self) -> Iterator[str]:
        """What was noted with the finished shards."""
        return (entry["note"] for entry in _entries(self._done) if entry.get("note"))

    def forget(self, name: str) -> None:
        """Remove the note first, then the shard."""
        (self._done / name).unlink()
        (self.new / name).unlink()

    def finish(self) -> None:
        """Give the new model its name. An old one is moved aside first, and removed only once the new one stands."""
        if not _is_free(self._folder):
            self._folder.rename(self._old)
        self.new.rename(self._folder)
        self.remove()

    def leave(self) -> None:
        """Remove the unfinished shard, and all of the work if no shard is finished; once it is let go, do nothing."""
        if self._lock is None:
            return
        with suppress(OSError):
            self.restore()
            if self._alone and not self.held():
                self.remove()
            elif self._alone:
                self._remove_unfinished()
        self._release()

    def remove(self) -> None:
        """The mark goes last, so that a leftover is always ours."""
        try:
            self._empty()
            self._mark.unlink()
            self._place.rmdir()
        finally:
            self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None


class FolderSession:
    """One run's work on a result's folder.

    Args:
        place: the folder.
        work: what the run holds beside it.
    """

    def __init__(self, place: ResultFolder, work: _Work) -> None:
        self._place, self._work = place, work

    def held(self) -> Mapping[str, WrittenShard]:
        """The finished shards in the work folder."""
        return self._work.held()

    def reserve(self, needed: int) -> None:
        """Look at the disk on which the result shall lie."""
        if (free := self._work.free_bytes()) < needed:
            what = f"the result needs {needed:,} bytes of disk, {free:,} are free where {self._place.name!r} shall lie"
            raise BudgetError(Problem(what, hint="choose a destination on another disk, or publish to hf://owner/name"))

    def open(self, name: str) -> Outlet:
        """A file where it shall stay."""
        return (self._work.new / name).open("wb", buffering=0)

    def take(self, shard: WrittenShard, note: str = "") -> None:
        """Keep it where it was made, and write down that it is whole."""
        with self._place.refusals():
            self._work.write_down(shard, note)

    def notes(self) -> Iterator[str]:
        """They stand in the entries of the finished shards."""
        return self._work.notes()

    def forget(self, names: Sequence[str]) -> None:
        """Remove them."""
        with self._place.refusals():
            for name in names:
                self._work.forget(name)

    def export(self, folder: Path) -> None:
        """Links to them."""
        for name in self.held():
            (folder / name).symlink_to(self._work.new / name)

    def finish(self, files: Mapping[str, Content], message: str) -> Published:
        """Write the small files and give the folder its name."""
        with self._place.refusals():
            self._place.refuse_loss()  # the destination may have been filled in the meantime
            for name, content in files.items():
                write(content, self._work.new / name)
            self._work.finish()
        return Published(str(self._place.folder))

    def leave(self) -> None:
        """Remove what is not finished."""
        self._work.leave()


def _place_beside(folder: Path) -> Path:
    return folder.parent / f"{folder.name}{_WORK}"


def _is_free(path: Path) -> bool:
    """Whether nothing is there, or an empty folder."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def _holds(folder: Path, identity: str) -> bool:
    """Whether the finished result of this very run lies there, as its lock file says."""
    try:
        content = load_yaml(
            paths.read_file(_reach(str(folder), LOCK_NAME, ANYWHERE), limit=limits.LOCK).decode(), limits.LOCK
        )
        shards = {item["file"]: item["size"] for item in content["output"]}
        sizes = {name: (folder / name).stat().st_size for name in shards}
    except (BarredError, ModelError, OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return False
    return bool(content.get("identity") == identity and sizes == shards)


def _written_down(done: Path) -> dict[str, WrittenShard]:
    found = (WrittenShard(entry["name"], entry["size"], entry["sha256"]) for entry in _entries(done))
    return {shard.name: shard for shard in found}


def _entries(done: Path) -> Iterator[dict[str, Any]]:
    return (json.loads(entry.read_text()) for entry in sorted(done.glob("*.safetensors")))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _flock(opened: int, kind: int) -> bool:
    """Whether the lock was to be had; a file system without locks gives it to everybody."""
    try:
        fcntl.flock(opened, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


# ---- temporary folders ----------------------------------------------------------------------------------------------


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
