"""A safetensors file known in advance: its header from names, shapes and dtypes; then its tensors, one after the other.

Not here: which tensor goes into which shard (plan), and where the finished file goes (stores).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

from merger.models.checkpoint import STEM


class Outgoing(Protocol):
    """What a header needs to know of a tensor to be written."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True)
class WrittenShard:
    """A finished shard: what is known of its file, wherever it lies."""

    name: str
    size: int
    sha256: str


def header(tensors: Iterable[Outgoing], file: str = "") -> bytes:
    """The first bytes of the file that holds these tensors in this order: length, JSON, padding to 8 bytes.

    A folder that the file lies in is no part of their names there.
    """
    folder = file[: file.rfind("/") + 1]
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for tensor in tensors:
        name, offsets = tensor.name.removeprefix(folder), [place, place + tensor.nbytes]
        entries[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        place += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def shard_name(number: int, count: int, stem: str = STEM) -> str:
    """The name that loaders look for: the `number`-th (from 1) of `count` shards."""
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{number:05d}-of-{count:05d}.safetensors"


def index(weight_map: dict[str, str], total_size: int) -> bytes:
    """The text of the index; `total_size` counts the tensors' bytes."""
    content = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def file_sha256(path: Path) -> str:
    """Of a file on this disk."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Outlet(Protocol):
    """Where a shard's bytes go, front to back; a file opened without a buffer is one."""

    def write(self, data: memoryview, /) -> int:
        """Take the first bytes of these, and say how many; they may change afterwards."""

    def close(self) -> None:
        """No more bytes will come; whether the shard is whole is not said by this."""


class ShardWriter:
    """Writes one file front to back and hashes it on the way; use it as a context manager.

    `close` refuses a file that is shorter or longer than its header promises.

    Args:
        name: the file's.
        outlet: where its bytes go.
        start: its header.
        size: of all of it.
    """

    def __init__(self, name: str, outlet: Outlet, start: bytes, size: int) -> None:
        self._name, self._outlet = name, outlet
        self._hash = hashlib.sha256()
        self._expected, self._size = size, 0
        self.write(memoryview(start))

    def write(self, data: memoryview) -> None:
        """Append the next bytes."""
        rest = data
        while len(rest):
            rest = rest[self._outlet.write(rest) :]
        self._hash.update(data)
        self._size += len(data)

    def close(self) -> WrittenShard:
        """Close the outlet and say what was written."""
        if self._size != self._expected:
            raise AssertionError(f"{self._name}: wrote {self._size} bytes, promised {self._expected}")
        self._outlet.close()
        return WrittenShard(self._name, self._size, self._hash.hexdigest())

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._outlet.close()
