"""The ports of the line: a Store that models come from, a Destination that results go to. Protocols and their data.

A run reads tensors through a Reader, which is told beforehand what will be read in which order.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from merger import system
from merger.errors import DamagedError, ModelError, Problem
from merger.models.formats.safetensors import Outlet, WrittenShard
from merger.safety import secrets
from merger.safety.limits import Limit, excess

PIECE_BYTES = 4 << 20
"""How much of a file that is copied is held at once."""


@dataclass(frozen=True)
class FileInfo:
    """A file of a model: its size in bytes, and its SHA-256 where the store knows it without reading.

    In a folder, where nothing pins a file, also when it was last changed (nanoseconds since 1970), and why nothing may
    be read of it, where that is so; on the Hub also the name that git gives to its content. What stands in no file, but
    is made of what another says, is held here.
    """

    size: int
    sha256: str | None = None
    changed: int | None = None
    oid: str | None = None
    barred: str | None = None
    made: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Located:
    """A model that was found: what it is, and at which commit.

    Args:
        name: the name that readers of a card may see: a repo id, or a folder's last part.
        where: what its store needs to find it again: repo id or path.
        commit: 40 hex digits on the Hub; None for a folder.
        files: all its files by name.
        inside: the folder of a repo that it is, with a ``/`` at the end; what its files' names begin with there.
        card: the metadata of its card, where the store was told without reading it; else None.
        gated: whether its files are for those alone who accepted its terms.
        private: whether nothing of it is for everybody.
        moved: the repo's former name, if that is what it was asked for by.
    """

    name: str
    where: str
    commit: str | None
    files: Mapping[str, FileInfo] = field(repr=False, compare=False)
    inside: str = ""
    card: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)
    gated: bool = field(default=False, compare=False)
    private: bool = field(default=False, compare=False)
    moved: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Kept:
    """Statistics that are measured on the way, by the name under which they are kept.

    Args:
        name: their kind, and what all that decides their numbers is called.
        heads: of those that this run may measure, each file's size and as much of its beginning as a plan reads.
        folder: where they lie, if that is not where they are kept: they are read before the last of them is measured.
    """

    name: str
    heads: Mapping[str, tuple[int, bytes]] = field(default_factory=dict, repr=False)
    folder: str | None = None


@dataclass(frozen=True)
class Ticket:
    """A run of bytes ``[start, stop)`` of a model's file that a run will read once, front to back.

    Tickets of one `turn` are read side by side, a part of each in turn; one without a turn is read by itself.
    """

    model: Located
    file: str
    start: int
    stop: int
    turn: int | None = None


def refuse_large(model: Located, file: str, size: int, limit: Limit) -> None:
    """Of a file that would be read whole, before it is.

    Raises:
        ModelError: it is larger than its limit.
    """
    if problem := excess(f"{model.name}: {file}", size, limit):
        raise ModelError(problem)


class Reader(Protocol):
    """Hands out the bytes of tickets, which should be taken about in their order."""

    def read(self, ticket: int, offset: int, out: memoryview) -> None:
        """Fill `out` with the bytes that stand `offset` bytes into the ticket of this number.

        Raises:
            ModelError: the bytes cannot be had.
        """

    def view(self, ticket: int, offset: int, nbytes: int) -> memoryview | None:
        """The same bytes where they lie in memory, to be left as they are; None: they have to be read."""
        return None

    def repeatable(self, ticket: int) -> bool:
        """Whether reading the same bytes again costs no transfer."""

    def close(self) -> None:
        """Let go of connections and buffers."""


class Store(Protocol):
    """Where models come from."""

    def has(self, path: str) -> bool:
        """Whether this store is the one that the path speaks of."""

    def locate(self, path: str, revision: str | None) -> Located:
        """Find a model and pin it to a commit.

        Raises:
            ModelError: there is no such model or revision, or it may not be read.
        """

    def names(self, path: str, of_folders: bool) -> list[str]:
        """What a pattern may choose among: the folders that a path with a * stands for, else a model's revisions.

        Raises:
            ModelError: there is no such model, or it may not be read.
        """

    def fetch(self, model: Located, file: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes of a small file, or a small part of a large one.

        Without an end the file is read whole: at most as much as `limits.of` says of its name.

        Raises:
            ModelError: they cannot be read, or are more than are read whole.
        """

    def reader(self, tickets: Sequence[Ticket], budget: int) -> Reader:
        """A reader of these tickets that holds about `budget` bytes at most beyond what it is asked for."""


@dataclass(frozen=True)
class Copy:
    """A model's file as it is, of which nothing is held.

    Args:
        store: where the model is.
        model: the model.
        file: its file.
        sha256: what it was when that was found out.
    """

    store: Store = field(repr=False)
    model: Located
    file: str
    sha256: str

    @property
    def size(self) -> int:
        """In bytes."""
        return self.model.files[self.file].size

    def pieces(self) -> Iterator[bytes]:
        """Its bytes.

        Raises:
            ModelError: they cannot be read.
            DamagedError: they are others by now; the last piece has been handed out then.
        """
        found = hashlib.sha256()
        for start in range(0, self.size, PIECE_BYTES):
            piece = self.store.fetch(self.model, self.file, start, min(start + PIECE_BYTES, self.size))
            found.update(piece)
            yield piece
        if found.hexdigest() != self.sha256:
            what = f"{self.model.name}: {self.file} changed while it was copied"
            raise DamagedError(Problem(what, hint="let nothing write to the models, and run it again"))


Content: TypeAlias = bytes | Copy


@dataclass(frozen=True)
class Published:
    """Where a finished model lies: a folder or a page, and its commit on the Hub."""

    where: str
    commit: str | None = None


@dataclass(frozen=True)
class Leftover:
    """The work of a run that is not finished, at its destination.

    Args:
        where: a branch, or a folder.
        shards: how many shards are finished.
        nbytes: how many bytes they have.
        busy: whether a run is at work there right now, as far as can be known.
    """

    where: str
    shards: int
    nbytes: int
    busy: bool = False


class Taker(Protocol):
    """Takes shards as they are made."""

    def open(self, name: str) -> Outlet:
        """A place for the bytes of a shard, which count for nothing until it is taken.

        Raises:
            UploadError: the destination refuses.
        """

    def take(self, shard: WrittenShard, note: str = "") -> None:
        """Take over a finished shard, whose bytes went into the place that was opened under its name.

        Args:
            shard: what is known of it.
            note: what another run that goes on from it shall know besides.

        Raises:
            UploadError: an earlier one could not be taken.
        """


class Session(Taker, Protocol):
    """One run's work at a place. Nothing that looks like a model exists there before `finish`.

    What was taken outlives the run: another one of the same identity goes on from there.
    """

    def held(self) -> Mapping[str, WrittenShard]:
        """The shards by name that a run of this identity finished before."""

    def reserve(self, needed: int) -> None:
        """Make sure that so many bytes of disk are free for the work.

        Raises:
            BudgetError: they are not.
        """

    def notes(self) -> Iterator[str]:
        """What earlier runs of this identity noted of the shards that they finished.

        Raises:
            MergerError: the notes cannot be read.
        """

    def forget(self, names: Sequence[str]) -> None:
        """Take back shards that were taken: their bytes are not to be trusted.

        Raises:
            UploadError: that failed, and another run would go on from them.
        """

    def export(self, folder: Path) -> None:
        """Put all shards that were taken into a folder, to be read there: as links, or as copies.

        Raises:
            UploadError, ModelError: they cannot be had.
            DamagedError: they are not what was made.
        """

    def finish(self, files: Mapping[str, Content], message: str) -> Published:
        """Put the small files beside the shards and make the whole visible at once.

        Raises:
            UploadError: the place refuses, or a token stands in one of them.
        """

    def leave(self) -> None:
        """End without `finish`: keep what was taken, and nothing else; once finished, do nothing.

        Raises:
            UploadError: a shard under way could not be taken.
        """


class Destination(Protocol):
    """Where a result goes, or lies: a folder, or a repo on the Hub."""

    name: str
    """What the card calls the result: ``owner/name``, or the folder's last part."""

    def open(self, identity: str, shared: bool = False) -> Session | Published:
        """Begin a run's work, before any tensor is read; where the result lies, if it is there already.

        Args:
            identity: the plan's hash, and whatever else decides the bytes.
            shared: whether other runs of the same identity may be at work there at the same time.

        Raises:
            UploadError: something else is there, or we may not write.
        """

    def refuse_loss(self, identity: str) -> None:
        """See what a run would, without a change: nothing to refuse where there is nothing, or the result itself.

        Raises:
            UploadError: something is there that a run would not replace; OccupiedError: it is a model.
        """

    def check_card(self, text: str) -> None:
        """Make sure, before any tensor is read, that the place will accept a card with this front matter.

        Raises:
            UploadError: it will not, or a token stands in the card.
        """

    def amend(self, small: Mapping[str, bytes], message: str, seen: Located) -> Published:
        """Put small files into a finished model, in place of those of the same names.

        Args:
            small: their contents by name.
            message: what is done, in a line.
            seen: the model as it was found: on the Hub it must not have moved on since.

        Raises:
            UploadError: the place refuses.
        """

    def leftovers(self) -> list[Leftover]:
        """What unfinished runs left here.

        Raises:
            MissingError: there is no such place.
            UploadError: the place cannot be asked.
        """

    def clean(self, leftover: Leftover) -> None:
        """Remove one of them.

        Raises:
            UploadError: a run is at work there, or we may not write.
        """


# ---- what files hold ------------------------------------------------------------------------------------------------


HELD_BYTES = 32 << 20
"""So much of files that are taken over is read at once: one request each, and not two."""


def take_files(
    files: Iterable[tuple[Located, str]], store: Store, checksum: Callable[[Located, str], str]
) -> list[Content]:
    """What some files hold: those that are small at once, the others as copies.

    Args:
        files: models and the names of their files.
        checksum: finds out the SHA-256 of a model's file.

    Raises:
        ModelError: one of them cannot be read.
    """
    found: list[Content] = []
    left = HELD_BYTES
    for model, file in files:
        size = model.files[file].size
        if size <= min(left, PIECE_BYTES):
            left -= size
            found.append(store.fetch(model, file, 0, size))
        else:
            found.append(Copy(store, model, file, checksum(model, file)))
    return found


def bytes_of(content: Content) -> bytes:
    """All of it at once; for what is known to be small.

    Raises:
        ModelError, DamagedError: as `Copy.pieces` does.
    """
    return content if isinstance(content, bytes) else b"".join(content.pieces())


def size_of(content: Content) -> int:
    """In bytes."""
    return len(content) if isinstance(content, bytes) else content.size


def sha256_of(content: Content) -> str:
    """As 64 hex digits."""
    return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else content.sha256


def write(content: Content, folder: Path, name: str) -> None:
    """Make a file of it, and the folder that it is in.

    Raises:
        UploadError: a token stands in it.
        ModelError, DamagedError: as `Copy.pieces` does.
        OSError: the disk refuses, or the system has no such name.
    """
    with in_folder(folder, name).open("wb") as file:
        for piece in secrets.pass_pieces(
            name.rpartition("/")[2], (content,) if isinstance(content, bytes) else content.pieces()
        ):
            file.write(piece)


def in_folder(folder: Path, name: str) -> Path:
    """The place of a repo's file in a folder of this machine; the folder that it is in is there now.

    Raises:
        OSError: the system calls no file so.
    """
    if not system.can_name(name):
        raise OSError(errno.EINVAL, f"here no file can be called {name!r}")
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def readers(placed: Sequence[tuple[Store, Ticket]], budget: int) -> Reader:
    """One reader of tickets that each have their own store; the stores share the budget."""
    shares: dict[Store, list[Ticket]] = {store: [] for store, _ in placed}
    places: list[tuple[Store, int]] = []
    for store, ticket in placed:
        places.append((store, len(shares[store])))
        shares[store].append(ticket)
    share = budget // max(1, len(shares))
    return _Readers({store: store.reader(tickets, share) for store, tickets in shares.items()}, places)


class _Readers(Reader):
    """Sends each ticket to its own store's reader."""

    def __init__(self, readers: dict[Store, Reader], places: Sequence[tuple[Store, int]]) -> None:
        self._readers, self._places = readers, places

    def read(self, ticket: int, offset: int, out: memoryview) -> None:
        store, number = self._places[ticket]
        self._readers[store].read(number, offset, out)

    def repeatable(self, ticket: int) -> bool:
        store, number = self._places[ticket]
        return self._readers[store].repeatable(number)

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()
