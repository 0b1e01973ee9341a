"""Bytes on disk, filed under their sha256. It knows nothing of repos, paths or HTTP, and it never forgets a blob."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

CHUNK = 1 << 20


@dataclass(frozen=True)
class Blob:
    """A stored run of bytes."""

    sha256: str
    size: int


def chunks_of(path: Path) -> Iterator[bytes]:
    """The file in pieces, so that a shard is never whole in memory."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


class Blobs:
    """A folder of files named by their own sha256."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        """Where a blob lies, or would lie."""
        return self.root / sha256[:2] / sha256

    def has(self, sha256: str) -> bool:
        """Whether the bytes are here."""
        return self.path(sha256).is_file()

    def put(self, chunks: Iterable[bytes]) -> Blob:
        """Store what the chunks make. A source that breaks off (an exception) leaves nothing behind."""
        number, name = tempfile.mkstemp(dir=self.root, prefix="incoming-")
        try:
            with os.fdopen(number, "wb") as file:
                blob = _copy(chunks, file.write)
            self.path(blob.sha256).parent.mkdir(exist_ok=True)
            os.replace(name, self.path(blob.sha256))  # atomic: two threads that store the same bytes do not meet
        finally:
            Path(name).unlink(missing_ok=True)
        return blob


def _copy(chunks: Iterable[bytes], write: Callable[[bytes], int]) -> Blob:
    digest, size = hashlib.sha256(), 0
    for chunk in chunks:
        digest.update(chunk)
        size += write(chunk)
    return Blob(digest.hexdigest(), size)
