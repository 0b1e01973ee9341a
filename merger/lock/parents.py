"""What a lock says of the models that something was made from, and whether they are still those.

Not here: the locks themselves (planning.lockfile of merges, statistics of statistics).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from merger.models.side_files import CARD_NAME
from merger.safety import numbers
from merger.stores.ports import FileInfo, Located

_SHA256, _COMMIT = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
Checksum = Callable[[Located, str], str | None] | None


@dataclass(frozen=True)
class Parent:
    """A model that was merged.

    Args:
        model: as the recipe writes it, of a folder its last part.
        commit: on the Hub; None for a folder.
        licence: the one that its card stated.
        files: those that were read, with the SHA-256 where it is known.
        now: how its repo was called by then, where the recipe writes a former name.
        measured: of statistics their kind, and on what they were measured.
    """

    model: str
    commit: str | None
    licence: str | None
    files: Mapping[str, FileInfo]
    now: str | None = None
    measured: Mapping[str, Any] = field(default_factory=dict)

    def encode(self) -> dict[str, Any]:
        """As a lock writes it."""
        return {
            "model": self.model,
            **({"now": self.now} if self.now else {}),
            "commit": self.commit,
            "licence": self.licence,
            **({"measured": dict(self.measured)} if self.measured else {}),
            "files": list_files(self.files),
        }


def list_files(files: Mapping[str, FileInfo]) -> list[dict[str, Any]]:
    """A checksum that nobody has found out is said to be unknown: null."""
    return [{"file": name, "size": info.size, "sha256": info.sha256} for name, info in files.items()]


def read_parent(item: Any) -> Parent:
    """A model, from plain data."""
    commit, licence, now = item["commit"], item["licence"], item.get("now")
    return Parent(
        need_kind(str, item["model"]),
        None if commit is None else _match(_COMMIT, commit),
        None if licence is None else need_kind(str, licence),
        read_files(item["files"]),
        None if now is None else need_kind(str, now),
        need_kind(dict, item.get("measured", {})),
    )


def read_files(items: Any) -> dict[str, FileInfo]:
    """Files by name, from plain data; what it is not raises, as in all that is read here."""
    return {need_kind(str, item["file"]): _file(item) for item in need_kind(list, items)}


def _file(item: Any) -> FileInfo:
    sha256 = item.get("sha256")
    return FileInfo(need_within(numbers.SIZE, item["size"]), None if sha256 is None else _match(_SHA256, sha256))


def need_kind(kind: type[Any], value: Any) -> Any:
    """The value, if it is of that kind."""
    if type(value) is not kind:
        raise TypeError
    return value


def need_within(range: numbers.Range, value: Any) -> int:
    """The value, if it is a whole number in the range."""
    if not range.holds(need_kind(int, value)):
        raise ValueError
    return int(value)


def _match(pattern: re.Pattern[str], value: Any) -> str:
    if pattern.fullmatch(value) is None:
        raise ValueError
    return str(value)


def changed_files(located: Located, files: Mapping[str, FileInfo], checksum: Checksum) -> dict[str, str]:
    """Those of a model's files that are others than a lock says, and in what.

    Args:
        located: the model as it is.
        files: what the lock says. Nothing of a card goes into a tensor: it may be another one by now.
        checksum: finds out the SHA-256 of a file in a folder by reading it; None: only sizes are compared there.
    """
    others = {name: _other(located, name, info, checksum) for name, info in files.items() if name != CARD_NAME}
    return {name: what for name, what in others.items() if what}


def _other(located: Located, name: str, info: FileInfo, checksum: Checksum) -> str | None:
    """In what a file is another one than the locked."""
    found = located.files.get(name)
    if found is None:
        return "is not there"
    is_read = info.sha256 is not None and located.commit is None
    return other_content(info, found, partial(checksum, located, name) if checksum and is_read else None)


def other_content(locked: FileInfo, found: FileInfo, checksum: Callable[[], str | None] | None) -> str | None:
    """The same of one that is there; of one of the same size its SHA-256 is found out, if that can be."""
    if found.size != locked.size:
        return f"has {found.size:,} bytes, the lock says {locked.size:,}"
    sha256 = checksum() if checksum else found.sha256
    same = None in (sha256, locked.sha256) or sha256 == locked.sha256
    return None if same else f"is another file: its SHA-256 is {sha256}, the lock says {locked.sha256}"
