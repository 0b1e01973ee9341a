"""Results written to a folder of this machine: made beside it, then put in its place.

Not here: models that are read (folder), and temporary folders (scratch).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from merger import runtime, system
from merger.errors import BudgetError, ModelError, Problem, UploadError, few
from merger.models.formats.safetensors import Outlet, WrittenShard, file_sha256
from merger.models.plain_yaml import load_yaml
from merger.models.side_files import CARD_NAME, LOCK_NAME
from merger.safety import limits, paths, secrets
from merger.safety.numbers import DOWN, UP, size
from merger.safety.paths import BarredError
from merger.stores.ports import Content, Leftover, Located, Published, in_folder, write

_MARK, _WORK, _UNFINISHED = ".merger-in-work", ".merging", ".unfinished"


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
            self.refuse_loss(identity)
            work = _Work(self.folder, shared)
            try:
                work.restore()
                if self._is_done(identity):
                    work.remove()
                    return Published(str(self.folder))
                self.refuse_loss(identity)
                work.resume(identity, self._force)
                work.share(shared)
            except BaseException:
                work.leave()
                raise
        return FolderSession(self, work)

    def _is_done(self, identity: str) -> bool:
        return not self._force and _holds(self.folder, identity)

    def refuse_loss(self, identity: str = "") -> None:
        """Refuse to replace what is no model, a parent, or a model without --force."""
        if self._is_done(identity):
            return
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
                target = in_folder(self.folder, name)
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
            return _leftover(self.folder)

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
        self.new, self._old, self._done = work_folder(folder), self._place / "old", self._place / "done"
        self._mark = self._place / _MARK
        if not _is_free(self._place) and not self._mark.is_file():
            what = f"{self._place.name!r} beside the destination is needed for the work, but something else is there"
            raise UploadError(Problem(what, hint="move it away, or choose another destination"))
        self._place.mkdir(parents=True, exist_ok=True)
        lock = system.FileLock(self._mark)
        self._alone = lock.take()
        if not self._alone and not (shared and lock.take(shared)):
            lock.close()
            raise self._busy()
        self._lock: system.FileLock | None = lock

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
        if self._mark.read_text("utf-8") != identity:
            if not self._alone:
                raise self._busy()
            if (waiting := sorted(self.held())) and not force:
                raise self._waiting(waiting)
            self._empty()
            self._mark.write_text(identity, "utf-8")
        for folder in (self.new, self._done):
            folder.mkdir(exist_ok=True)
        if self._alone:
            self._forget_damaged()
            self._remove_unfinished()

    def share(self, shared: bool) -> None:
        """From here on parts of the same run may come in."""
        if shared and self._alone and self._lock is not None:
            self._alone = not self._lock.take(shared)

    def _forget_damaged(self) -> None:
        """A shard counts as finished only if its file is, to the byte, what was written down of it."""
        for name, shard in self.held().items():
            path = self.new / name
            if not path.is_file() or path.stat().st_size != shard.size or file_sha256(path) != shard.sha256:
                self._entry(name).unlink()

    def _remove_unfinished(self) -> None:
        held = {self.new / name for name in self.held()}
        for leftover in {path for path in self.new.rglob("*") if not path.is_dir()} - held:
            _remove(leftover)

    def _entry(self, name: str) -> Path:
        """Where it is written down of a shard that it is finished."""
        return self._done / name.replace("/", "+")

    def _empty(self) -> None:
        for leftover in self._place.iterdir():
            if leftover != self._mark:
                _remove(leftover)

    def held(self) -> dict[str, WrittenShard]:
        return _written_down(self._done)

    def write_down(self, shard: WrittenShard, note: str) -> None:
        entry = self._entry(f"{shard.name}{_UNFINISHED}")
        entry.write_text(json.dumps({**asdict(shard), "note": note}), "utf-8")
        entry.replace(self._entry(shard.name))

    def notes(self) -> Iterator[str]:
        return (entry["note"] for entry in _entries(self._done) if entry.get("note"))

    def forget(self, name: str) -> None:
        """Remove the note first, then the shard."""
        self._entry(name).unlink()
        (self.new / name).unlink()

    def finish(self) -> None:
        """Give the new model its name. An old one is moved aside first, and removed only once the new one stands."""
        if not _is_free(self._folder):
            self._folder.rename(self._old)
        elif self._folder.exists():
            self._folder.rmdir()  # which is empty: Windows puts nothing in its place
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
        assert self._lock is not None
        try:
            self._empty()
            self._lock.remove()
            self._place.rmdir()
        finally:
            self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
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
        if (free := shutil.disk_usage(self._work.new).free) < needed:
            there = f"{size(free, DOWN)} are free where {self._place.name!r} shall lie"
            what = f"the result needs {size(needed, UP)} of disk, and {there}"
            raise BudgetError(Problem(what, hint="choose a destination on another disk, or publish to hf://owner/name"))

    def open(self, name: str) -> Outlet:
        """A file where it shall stay."""
        return in_folder(self._work.new, name).open("wb", buffering=0)

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
            system.link_file(in_folder(folder, name), self._work.new / name)

    def finish(self, files: Mapping[str, Content], message: str) -> Published:
        """Write the small files and give the folder its name."""
        with self._place.refusals():
            self._place.refuse_loss()  # the destination may have been filled in the meantime
            for name, content in files.items():
                write(content, self._work.new, name)
            self._work.finish()
        return Published(str(self._place.folder))

    def leave(self) -> None:
        """Remove what is not finished."""
        self._work.leave()


def _leftover(folder: Path) -> list[Leftover]:
    """What lies beside a result of a run that is not finished."""
    place = _place_beside(folder)
    if not (place / _MARK).is_file():
        return []
    shards = _written_down(place / "done").values()
    lock = system.FileLock(place / _MARK)
    busy = not lock.take()
    lock.close()
    return [Leftover(str(place), len(shards), sum(shard.size for shard in shards), busy)]


def work_folder(folder: Path) -> Path:
    """Where the finished files of a result lie until it has its name."""
    return _place_beside(folder) / "new"


def _place_beside(folder: Path) -> Path:
    return folder.parent / f"{folder.name}{_WORK}"


def _is_free(path: Path) -> bool:
    """Whether nothing is there, or an empty folder."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def _holds(folder: Path, identity: str) -> bool:
    """Whether the finished result of this very run lies there, as its lock file says."""
    try:
        place = paths.reach(str(folder), LOCK_NAME, paths.ANYWHERE, leaves=False)
        content = load_yaml(paths.read_file(place, limit=limits.LOCK).decode(), limits.LOCK)
        shards = {item["file"]: item["size"] for item in content["output"]}
        sizes = {name: (folder / name).stat().st_size for name in shards}
    except (BarredError, ModelError, OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return False
    return bool(content.get("identity") == identity and sizes == shards)


def _written_down(done: Path) -> dict[str, WrittenShard]:
    found = (WrittenShard(entry["name"], entry["size"], entry["sha256"]) for entry in _entries(done))
    return {shard.name: shard for shard in found}


def _entries(done: Path) -> Iterator[dict[str, Any]]:
    entries = sorted(done.iterdir()) if done.is_dir() else []
    return (json.loads(entry.read_text("utf-8")) for entry in entries if entry.suffix != _UNFINISHED)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
