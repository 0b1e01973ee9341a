"""The two ports of the line: a Store that models come from, a Sink that shards go to. Protocols and their data only.

A run reads tensors through a Reader, which is told beforehand what will be read in which order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from merger.checkpoints.shard import Written


@dataclass(frozen=True)
class FileInfo:
    """A file of a model: its size in bytes, and its SHA-256 where the store knows it without reading."""

    size: int
    sha256: str | None = None


@dataclass(frozen=True)
class Located:
    """A model that was found: what it is, and at which commit.

    Args:
        name: the name that readers of a card may see: a repo id, or a folder's last part.
        where: what its store needs to find it again: repo id or path.
        commit: 40 hex digits on the Hub; None for a folder.
        files: all its files by name.
    """

    name: str
    where: str
    commit: str | None
    files: Mapping[str, FileInfo] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Ticket:
    """A run of bytes ``[start, stop)`` of a model's file that a run will read once, front to back."""

    model: Located
    file: str
    start: int
    stop: int


class Reader(Protocol):
    """Hands out the bytes of tickets, which should be taken about in their order."""

    def read(self, ticket: int, offset: int, out: memoryview) -> None:
        """Fill `out` with the bytes that stand `offset` bytes into the ticket of this number.

        Raises:
            ModelError: the bytes cannot be had.
        """

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

    def fetch(self, model: Located, file: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes of a small file, or a small part of a large one.

        Raises:
            ModelError: they cannot be read.
        """

    def reader(self, tickets: Sequence[Ticket], budget: int) -> Reader:
        """A reader of these tickets that holds about `budget` bytes at most beyond what it is asked for."""


@dataclass(frozen=True)
class Published:
    """Where a finished model lies: a folder or a page, and its commit on the Hub."""

    where: str
    commit: str | None = None


class Sink(Protocol):
    """Where shards go. Nothing that looks like a model exists there before `finish`."""

    name: str
    """What the card calls the result: ``owner/name``, or the folder's last part."""

    def prepare(self, identity: str, needed: int) -> None:
        """Make sure, before any tensor is read, that the result can be taken.

        Args:
            identity: the plan's hash.
            needed: the bytes of disk that will be used.

        Raises:
            UploadError: something else is there, or we may not write.
            BudgetError: not enough disk.
        """

    def workspace(self) -> Path:
        """The folder in which shards are made."""

    def take(self, shard: Written) -> None:
        """Take over a finished shard's file."""

    def finish(self, files: Mapping[str, bytes], message: str) -> Published:
        """Put the small files beside the shards and make the whole visible at once.

        Raises:
            UploadError: the destination refuses.
        """

    def abandon(self) -> None:
        """The run failed: leave nothing that looks like a model."""
