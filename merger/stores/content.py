"""The small files of a result, taken over and written without holding what is large.

Not here: which files a result has (beside), and where they go (folder, staging).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from merger.safety import secrets
from merger.stores.ports import PIECE_BYTES, Content, Copy, Located, Store

HELD_BYTES = 32 << 20
"""So much of files that are taken over is read at once: one request each, and not two."""


def taken(files: Iterable[tuple[Located, str]], store: Store, checksum: Callable[[Located, str], str]) -> list[Content]:
    """What some files hold: those that are small at once, the others as copies.

    Args:
        files: models and the names of their files.
        store: where the models are.
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


def write(content: Content, target: Path) -> None:
    """Make a file of it, and the folder that it is in.

    Raises:
        UploadError: a token stands in it.
        ModelError, DamagedError: as `Copy.pieces` does.
        OSError: the disk refuses.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        for piece in secrets.passed(target.name, (content,) if isinstance(content, bytes) else content.pieces()):
            file.write(piece)
