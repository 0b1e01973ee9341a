"""Reading tensors of the Hub ahead of need, under a byte budget, and the SHA-256 of files read whole, on the way.

Not here: how bytes of a range come (ranges).
"""

from __future__ import annotations

import hashlib
import threading
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from operator import attrgetter, itemgetter
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from merger.errors import DamagedError, Problem
from merger.stores.hub.ranges import CONNECTIONS
from merger.stores.ports import Located, Reader, Ticket

PIECE_BYTES = 16 << 20
_GAP_BYTES = 64 << 10
_NEAR_TICKETS = 64
_SHARE_KEPT = 8
"""One part in so many of the budget may be bytes of a file that wait to be hashed in their turn."""

_SHARE_SHARED = 4
"""And one in so many such that wait for another ticket of the same bytes: an adapter's B is read for each expert."""


@dataclass(eq=False)
class _Piece:
    """A run of bytes fetched by one request; `left` counts those that tickets still want, `digest` may wait for it.

    `due` sorts pieces by their first need: the number of the turn, and how far into its ticket the piece begins.
    """

    model: Located
    file: str
    start: int
    stop: int
    due: tuple[int, float]
    last_ticket: int
    left: int = 0
    data: Future[memoryview] | None = field(default=None, repr=False)
    room: NDArray[np.uint8] | None = field(default=None, repr=False)
    digest: Digest[_Piece] | None = field(default=None, repr=False)

    @property
    def size(self) -> int:
        return self.stop - self.start


class _Rooms:
    """Buffers that pieces were in, for the next ones: the kernel clears fresh memory, which costs more than filling it.

    They have the size of the largest piece, and pieces of at most half of it get their own, so that less than twice
    the budget is taken. Not safe for threads: its owner locks.
    """

    def __init__(self) -> None:
        self._free: list[NDArray[np.uint8]] = []

    def take(self, size: int) -> NDArray[np.uint8]:
        if size <= PIECE_BYTES // 2:
            return np.empty(size, np.uint8)  # a bytearray would be filled with zeros first
        return self._free.pop() if self._free else np.empty(PIECE_BYTES, np.uint8)

    def give(self, room: NDArray[np.uint8]) -> None:
        if room.nbytes == PIECE_BYTES:
            self._free.append(room)


class RangeReader(Reader):
    """Reads tickets through pieces of up to 16 MiB that are fetched ahead, in the tickets' order.

    A piece that somebody waits for is fetched even when the budget is used up, so a run can't wait for itself.

    Args:
        tickets: everything that will be read, in about the order it will be read in.
        budget: how many bytes may be held.
        fill: how to get bytes.
        connections: how many requests may be under way at once.
        beginnings: what was read before of the same files; such a file's SHA-256 is checked if it is read whole.
    """

    def __init__(
        self,
        tickets: Sequence[Ticket],
        budget: int,
        fill: Callable[[Located, str, int, memoryview], None],
        connections: int = CONNECTIONS,
        beginnings: Beginnings | None = None,
    ) -> None:
        self._tickets = tickets
        self._budget = budget
        self._fill = fill
        self._pieces, self._of = _pieces(tickets, budget // _SHARE_SHARED)
        if beginnings is not None:
            spans = (((piece.model, piece.file), (piece.start, piece.stop)) for piece in self._pieces)
            digests: Mapping[File, Digest[_Piece]] = beginnings.whole(spans, budget // _SHARE_KEPT)
            for piece in self._pieces:
                piece.digest = digests.get((piece.model, piece.file))
        self._next = 0
        self._held = 0
        self._rooms = _Rooms()
        self._closed = False
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(connections, thread_name_prefix="range")
        self._advance()

    def read(self, ticket: int, offset: int, out: memoryview) -> None:
        """Fill `out` from the ticket's pieces, waiting for them if need be."""
        place = self._tickets[ticket].start + offset
        for piece in self._of[ticket]:
            if piece.stop <= place or not len(out):
                continue
            data = self._wanted(piece).result()
            size = min(len(out), piece.stop - place)
            out[:size] = data[place - piece.start : place - piece.start + size]
            self._taken(piece, size)
            out, place = out[size:], place + size

    def _wanted(self, piece: _Piece) -> Future[memoryview]:
        with self._lock:
            return self._fetch(piece)

    def _fetch(self, piece: _Piece) -> Future[memoryview]:
        if piece.data is None:
            self._held += piece.size
            piece.data = self._pool.submit(self._get, piece)
        return piece.data

    def _get(self, piece: _Piece) -> memoryview:
        with self._lock:
            piece.room = self._rooms.take(piece.size)
        data = piece.room.data[: piece.size]
        self._fill(piece.model, piece.file, piece.start, data)
        if (digest := piece.digest) is not None:
            for hashed in digest.add(piece.start, data, piece):
                self._hashed(hashed)
        return data

    def _hashed(self, piece: _Piece) -> None:
        with self._lock:
            piece.digest = None
            if piece.left == 0:
                self._let_go(piece)
        self._advance()

    def _taken(self, piece: _Piece, size: int) -> None:
        with self._lock:
            piece.left -= size
            if piece.left == 0 and piece.digest is None:
                self._let_go(piece)
        self._advance()

    def _let_go(self, piece: _Piece) -> None:
        assert piece.room is not None
        self._held -= piece.size
        self._rooms.give(piece.room)
        piece.data = piece.room = None

    def _advance(self) -> None:
        with self._lock:
            while self._next < len(self._pieces) and not self._closed:
                piece = self._pieces[self._next]
                if piece.left and piece.data is None:
                    if self._held + piece.size > self._budget:
                        return
                    self._fetch(piece)
                self._next += 1

    def repeatable(self, ticket: int) -> bool:
        """Reading twice would transfer twice."""
        return False

    def close(self) -> None:
        """Stop fetching; what is under way is given up."""
        with self._lock:
            self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)


def _pieces(tickets: Sequence[Ticket], room: int) -> tuple[list[_Piece], list[list[_Piece]]]:
    """The pieces in the order of their first need, and for each ticket its own, front to back.

    Tickets of the same bytes have the same pieces, as long as no more than `room` bytes wait for such a ticket.
    """
    of: list[list[_Piece]] = []
    last: dict[File, _Piece] = {}
    starts, turns, sharing = _starts(tickets), dict[int, int](), _Sharing(tickets, room)
    for number, ticket in enumerate(tickets):
        key = (ticket.model, ticket.file)
        if (first := sharing.first(number)) is not None:
            turn = number if ticket.turn is None else turns.setdefault(ticket.turn, number)
            of.append(_cut(ticket, turn, number) if first == number else of[first])
            for piece in of[first] if first != number else ():
                piece.left += piece.size
            continue
        if key in last and _join(last[key], ticket, number, starts[key]):
            of.append([last[key]])
            continue
        turn = number if ticket.turn is None else turns.setdefault(ticket.turn, number)
        of.append(_cut(ticket, turn, number))
        if of[-1]:  # a tensor without entries has none
            last[key] = of[-1][-1]
    return sorted(dict.fromkeys(piece for own in of for piece in own), key=attrgetter("due")), of


class _Sharing:
    """Which tickets take the bytes that an earlier one of the same bytes had fetched.

    Args:
        tickets: all.
        room: how many bytes may wait for a later ticket.
    """

    def __init__(self, tickets: Sequence[Ticket], room: int) -> None:
        places = [(ticket.model, ticket.file, ticket.start, ticket.stop) for ticket in tickets]
        self._places, self._room = places, room
        self._last = {place: number for number, place in enumerate(places)}
        self._firsts: dict[tuple[Located, str, int, int], int] = {}

    def first(self, number: int) -> int | None:
        """The ticket whose bytes this one takes, itself if it is the first of several; asked in order. None: alone."""
        place = self._places[number]
        size, is_last = place[3] - place[2], self._last[place] == number
        if place in self._firsts:
            self._room += size if is_last else 0
            return self._firsts.pop(place) if is_last else self._firsts[place]
        if is_last or not 0 < size <= self._room:
            return None
        self._room -= size
        self._firsts[place] = number
        return number


def _cut(ticket: Ticket, turn: int, number: int) -> list[_Piece]:
    model, file, size = ticket.model, ticket.file, ticket.stop - ticket.start
    edges = [*range(ticket.start, ticket.stop, PIECE_BYTES), ticket.stop]
    return [
        _Piece(model, file, start, stop, (turn, (start - ticket.start) / size), number, left=stop - start)
        for start, stop in pairwise(edges)
    ]


def _starts(tickets: Sequence[Ticket]) -> dict[File, list[int]]:
    """Where in each file tickets begin, sorted."""
    starts: dict[File, list[int]] = {}
    for ticket in tickets:
        starts.setdefault((ticket.model, ticket.file), []).append(ticket.start)
    return {key: sorted(found) for key, found in starts.items()}


def _join(piece: _Piece, ticket: Ticket, number: int, starts: Sequence[int]) -> bool:
    """Lengthen a piece by a ticket that follows closely in file and time: one request instead of two."""
    gap = ticket.start - piece.stop
    near = 0 <= gap <= _GAP_BYTES and number - piece.last_ticket <= _NEAR_TICKETS
    if not near or ticket.stop - piece.start > PIECE_BYTES:
        return False
    if bisect_left(starts, piece.stop) < bisect_left(starts, ticket.start):
        return False  # another ticket lies in the gap: those bytes would be fetched twice
    piece.stop, piece.last_ticket = ticket.stop, number
    piece.left += ticket.stop - ticket.start
    return True


# ---- checksums on the way --------------------------------------------------------------------------------------------


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
