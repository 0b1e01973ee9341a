"""Bytes of remote files by range: resolved once, retried, checked, read ahead under a byte budget.

A file's address on the Hub answers with another there, if its repo was renamed, and then with a signed address
elsewhere, good for about an hour; ranges are asked there, without the token. Not here: what the Hub knows about a
model (hub), and what the bytes mean.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from http import HTTPStatus
from itertools import pairwise
from operator import attrgetter

import numpy as np
from huggingface_hub import constants, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import get_session, hf_raise_for_status, httpx
from numpy.typing import NDArray
from urllib3 import BaseHTTPResponse
from urllib3.exceptions import HTTPError, ProtocolError, TimeoutError

from merger import runtime
from merger.errors import ModelError, Problem
from merger.stores import http
from merger.stores.http import PASSING, Connections, asked_pause, chunks, pause
from merger.stores.ports import Located, Ticket
from merger.stores.uploads import Beginnings, Digest, File

TRIES = 6
CONNECTIONS = 8
PIECE_BYTES = 16 << 20
_GAP_BYTES = 64 << 10
_NEAR_TICKETS = 64
_REASON_BYTES = 64 << 10
_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_HOPS = 20  # as many as the Hub's client follows
_SHARE_KEPT = 8
"""One part in so many of the budget may be bytes of a file that wait to be hashed in their turn."""

_SHARE_SHARED = 4
"""And one in so many such that wait for another ticket of the same bytes: an adapter's B is read for each expert."""


class RangeClient:
    """Asks for byte ranges of files on the Hub.

    Args:
        token: the reader's token, True for the one of the environment, False for none.
    """

    def __init__(self, token: str | bool | None = None) -> None:
        self._token = token
        self._addresses: dict[_Key, _Address] = {}
        self._connections = Connections(CONNECTIONS)

    def fill(self, model: Located, file: str, start: int, out: memoryview) -> None:
        """Fill `out` with the file's bytes from `start` on; what arrived before a failure is kept.

        Raises:
            ModelError: the bytes did not come after several tries.
            HfHubHTTPError: the Hub refuses the file.
        """
        done, tries = 0, 0
        while done < len(out):
            try:
                for chunk in self._stream(model, file, start + done, start + len(out)):
                    out[done : done + len(chunk)] = chunk
                    done += len(chunk)
            except _Astray as error:
                what = f"{model.name}: {file} cannot be read: the Hub {error}"
                raise ModelError(Problem(what, hint="try again later, and check HF_ENDPOINT")) from None
            except (HTTPError, httpx.TransportError, _TryAgain) as error:
                tries += 1
                if tries == TRIES:
                    what = f"{model.name}: {file} could not be read after {TRIES} tries ({_in_words(error)})"
                    hint = "the Hub or the network is in trouble: run it again"
                    raise runtime.lacking(error) or ModelError(Problem(what, hint=hint)) from None
                time.sleep(pause(tries, error.seconds if isinstance(error, _TryAgain) else 0.0))

    def _stream(self, model: Located, file: str, start: int, stop: int) -> Iterator[bytes]:
        """The answer to one request, in chunks; anything but exactly the range asked for is an error."""
        key = (model.where, model.commit, model.inside + file)
        while True:
            address = self._address(key, model.files[file].sha256)
            headers = self._headers(address) | {"Range": f"bytes={start}-{stop - 1}"}
            with self._connections.get(address.url, headers) as answer:
                if (further := address.further(answer.status, answer.headers)) is not None:
                    self._addresses[key] = further
                    continue
                if address.is_foreign and answer.status in (401, 403):
                    self._addresses.pop(key, None)
                    raise _TryAgain("the signed address expired")
                _check(_as_response(answer, address.url), start, stop, model.files[file].size)
                got = 0
                for chunk in chunks(answer):
                    got += len(chunk)
                    if got > stop - start:
                        raise _TryAgain("the answer is longer than the range")
                    yield chunk
                if got < stop - start:
                    raise _TryAgain("the answer was cut short")
                return

    def _address(self, key: _Key, sha256: str | None) -> _Address:
        """Where the file's bytes are: the last address on the Hub, or the first that is elsewhere."""
        known = self._addresses.get(key)  # once: another thread may forget it at any moment
        if known is None:
            where, commit, file = key
            known = _Address(hf_hub_url(where, file, revision=commit, endpoint=constants.ENDPOINT))
            further: _Address | None = known
            while further is not None and not further.is_foreign:
                known, further = further, self._looked(further, sha256)
            known = self._addresses[key] = further or known
        return known

    def _looked(self, address: _Address, sha256: str | None) -> _Address | None:
        """Where an address on the Hub leads on to."""
        answer = get_session().request(
            "HEAD",
            address.url,
            headers=self._headers(address),
            timeout=http.TIMEOUT_SECONDS,
            follow_redirects=False,
        )
        _raise_for(answer)
        _check_identity(answer, sha256)
        return address.further(answer.status_code, answer.headers)

    def _headers(self, address: _Address) -> dict[str, str]:
        try:
            who = {} if address.is_foreign else http.headers_now(self._token)
        except HfHubHTTPError as error:
            if not http.is_passing(error):
                raise
            raise _TryAgain(f"HTTP {http.status_of(error)} for a new token", http.seconds_asked(error)) from None
        return who | {"Accept-Encoding": "identity"}


_Key = tuple[str, str | None, str]
"""A file: its repo, commit and name there."""


@dataclass(frozen=True)
class _Address:
    """Where bytes may be, after so many others that led there.

    `is_foreign`: another origin than the Hub's was on the way, and from there on nobody sees the token.
    """

    url: str
    is_foreign: bool = False
    hops: int = 0

    def further(self, status: int, headers: Mapping[str, str]) -> _Address | None:
        """Where an answer sends us; None: here is the right place.

        Raises:
            _Astray: it must not be gone there.
        """
        location = headers.get("Location")
        if status not in _REDIRECTS or location is None:
            return None
        if self.hops == _MOST_HOPS:
            raise _Astray(f"sends us on from place to place, {_MOST_HOPS} times by now")
        try:
            here, there = httpx.URL(self.url), httpx.URL(self.url).join(location)
        except httpx.InvalidURL:
            raise _Astray("sends us to what is no address") from None
        if there.scheme not in ("https", here.scheme) or not there.host:
            raise _Astray(f"sends us from {here.scheme} to {there.scheme}, where others could read along")
        return _Address(str(there), self.is_foreign or _origin(here) != _origin(there), self.hops + 1)


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


class _Astray(Exception):
    """A redirect that is not followed, and why, in words that go on from "the Hub"."""


class _TryAgain(Exception):
    """An answer that another try may mend; `seconds` is how long the server asked us to wait."""

    def __init__(self, why: str, seconds: float = 0.0) -> None:
        super().__init__(why)
        self.seconds = seconds


def _raise_for(answer: httpx.Response) -> None:
    if answer.status_code in PASSING:
        raise _TryAgain(f"HTTP {answer.status_code}", asked_pause(answer.status_code, answer.headers))
    hf_raise_for_status(answer)


def _check_identity(answer: httpx.Response, sha256: str | None) -> None:
    """The Hub tells a large file's SHA-256 with its address; it must be the locked one."""
    told = answer.headers.get("X-Linked-Etag", "").removeprefix("W/").strip('"')
    if sha256 and told and told != sha256:
        raise _TryAgain("the Hub offers another file than the locked one")


def _as_response(answer: BaseHTTPResponse, address: str) -> httpx.Response:
    """What an answer says of itself, as the Hub's client would have it; the body only of a refusal."""
    why = answer.read(_REASON_BYTES) if answer.status >= 400 else b""
    request = httpx.Request("GET", address)
    return httpx.Response(answer.status, headers=dict(answer.headers), content=why, request=request)


def _check(answer: httpx.Response, start: int, stop: int, size: int) -> None:
    whole = (start, stop) == (0, size) and answer.headers.get("Content-Length") == str(size)
    if answer.status_code < 300 and answer.headers.get("Content-Encoding", "identity") != "identity":
        raise _TryAgain("the answer is compressed")
    if answer.status_code == HTTPStatus.OK and whole:
        return  # a server may ignore a range; here that is the same bytes
    if answer.status_code != HTTPStatus.PARTIAL_CONTENT:
        if answer.status_code >= 400:
            _raise_for(answer)
        raise _TryAgain(f"HTTP {answer.status_code} in place of a part of the file")
    told, _, total = answer.headers.get("Content-Range", "").partition("/")
    if told != f"bytes {start}-{stop - 1}":
        raise _TryAgain("another range than the one asked for")
    if total != str(size):
        raise _TryAgain(f"the file has {total or 'an unknown number of'} bytes there, the locked one {size}")


def _in_words(error: Exception) -> str:
    """What went wrong, without the address: a signed address is as good as a token."""
    if isinstance(error, ProtocolError):
        return "the connection broke off"
    if isinstance(error, TimeoutError):
        return "the connection stood still"
    if isinstance(error, http.UnreadableAnswer):
        return "an answer that is none of the Hub's"
    return str(error) if isinstance(error, _TryAgain) else type(error).__name__


# ---- reading ahead --------------------------------------------------------------------------------------------------


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
        """Room for so many bytes."""
        if size <= PIECE_BYTES // 2:
            return np.empty(size, np.uint8)  # a bytearray would be filled with zeros first
        return self._free.pop() if self._free else np.empty(PIECE_BYTES, np.uint8)

    def give(self, room: NDArray[np.uint8]) -> None:
        """Nobody looks at it any more."""
        if room.nbytes == PIECE_BYTES:
            self._free.append(room)


class RangeReader:
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
        """Nobody wants its bytes any more."""
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
    """A ticket's pieces."""
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
