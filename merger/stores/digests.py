"""Whether remote files are the locked ones: the SHA-256 of all that are read whole, from pieces in the order they come.

SHA-256 takes a file front to back, so a piece that comes early is kept until those before it have come. A file is left
unchecked if it is not read whole (some of its tensors are not wanted, or another run or part reads the rest), or if it
is read so much out of order that too many bytes would have to be kept. Not here: asking for bytes (ranges).
"""

from __future__ import annotations

import hashlib
import threading
from bisect import insort
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Generic, TypeVar

from merger.errors import DamagedError, Problem
from merger.stores.ports import Located

File = tuple[Located, str]
Span = tuple[int, int]
Piece = TypeVar("Piece")


def confirm(file: File, found: str) -> None:
    """Compare a whole file's SHA-256 with the locked one.

    Raises:
        DamagedError: they differ.
    """
    model, name = file
    locked = model.files[name].sha256
    if locked not in (None, found):
        what = f"{model.name}: {name} came damaged: its SHA-256 is {found}, that of the locked file {locked}"
        hint = "run it again; if it stays so, a proxy or cache on the way is to blame, or the Hub"
        raise DamagedError(Problem(what, hint=hint))


class Beginnings:
    """The first bytes of files, their headers, which are read long before the rest: only their hash is kept."""

    def __init__(self) -> None:
        self._read: dict[File, tuple[hashlib._Hash, int]] = {}
        self._lock = threading.Lock()  # a recipe may name one model in two ways, and both are locked at once

    def add(self, file: File, start: int, data: bytes | bytearray) -> None:
        """Take note of bytes that were read, if they follow on those known so far."""
        with self._lock:
            begun, place = self._read.get(file, (hashlib.sha256(), 0))
            if start == place and file[0].files[file[1]].sha256 is not None:
                begun.update(data)
                self._read[file] = begun, place + len(data)

    def whole(self, spans: Iterable[tuple[File, Span]], most: int) -> Mapping[File, Digest[Piece]]:
        """A digest for each file that is read whole.

        Args:
            spans: all that will be read, in that order.
            most: how many bytes of a file may be kept at once for their turn.
        """
        wanted: dict[File, list[Span]] = {file: [] for file in self._read}
        for file, span in spans:
            if file in wanted:
                wanted[file].append(span)
        begun = {file: self._read[file] for file in wanted}
        return {
            file: Digest(file, begun[file][0].copy(), begun[file][1])
            for file, parts in wanted.items()
            if _reaches_the_end(parts, begun[file][1], file[0].files[file[1]].size, most)
        }


def _reaches_the_end(spans: Sequence[Span], place: int, size: int, most: int) -> bool:
    """Whether these leave no gap after `place`, and never more than `most` bytes wait for those before them."""
    waiting: list[Span] = []
    for span in spans:
        insort(waiting, span)
        while waiting and waiting[0][0] <= place:
            place = max(place, waiting.pop(0)[1])
        if sum(stop - start for start, stop in waiting) > most:
            return False
    return place == size


class Digest(Generic[Piece]):
    """The hash of one file under way."""

    def __init__(self, file: File, begun: hashlib._Hash, place: int) -> None:
        self._file, self._hash, self._place = file, begun, place
        self._size = file[0].files[file[1]].size
        self._waiting: list[tuple[int, memoryview, Piece]] = []
        self._lock = threading.Lock()

    def add(self, start: int, data: memoryview, piece: Piece) -> list[Piece]:
        """Take a piece's bytes; the pieces whose bytes are no longer needed.

        Raises:
            DamagedError: the file is complete and not the locked one.
        """
        done: list[Piece] = []
        with self._lock:
            insort(self._waiting, (start, data, piece), key=itemgetter(0))
            while self._waiting and self._waiting[0][0] <= self._place:
                start, data, piece = self._waiting.pop(0)
                fresh = data[self._place - start :]
                self._hash.update(fresh)
                self._place += len(fresh)
                done.append(piece)
            if self._place == self._size:
                confirm(self._file, self._hash.hexdigest())
        return done
