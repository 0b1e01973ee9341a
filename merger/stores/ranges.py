"""Bytes of remote files by range: resolved once, retried, checked, read ahead under a byte budget.

A file's address on the Hub answers with a signed address elsewhere, good for about an hour; ranges are asked there,
without the token. Not here: what the Hub knows about a model (hub), and what the bytes mean.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from http import HTTPStatus

from huggingface_hub import constants, hf_hub_url
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, httpx

from merger.errors import ModelError, Problem
from merger.stores import patience
from merger.stores.patience import PASSING, asked_pause, pause
from merger.stores.ports import Located, Ticket

TRIES = 6
CONNECTIONS = 8
PIECE_BYTES = 16 << 20
_GAP_BYTES = 64 << 10
_NEAR_TICKETS = 64


class RangeClient:
    """Asks for byte ranges of files on the Hub.

    Args:
        token: the reader's token, True for the one of the environment, False for none.
    """

    def __init__(self, token: str | bool | None = None) -> None:
        self._headers = build_hf_headers(token=token) | {"Accept-Encoding": "identity"}
        self._addresses: dict[tuple[str, str | None, str], tuple[str, bool]] = {}

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
            except (httpx.TransportError, _TryAgain) as error:
                tries += 1
                if tries == TRIES:
                    what = f"{model.name}: {file} could not be read after {TRIES} tries ({_in_words(error)})"
                    raise ModelError(Problem(what, hint="the Hub or the network is in trouble: run it again")) from None
                time.sleep(pause(tries, error.seconds if isinstance(error, _TryAgain) else 0.0))

    def _stream(self, model: Located, file: str, start: int, stop: int) -> Iterator[bytes]:
        """The answer to one request, in chunks; anything but exactly the range asked for is an error."""
        address, foreign = self._address(model, file)
        headers = {"Accept-Encoding": "identity"} if foreign else dict(self._headers)
        headers["Range"] = f"bytes={start}-{stop - 1}"
        with get_session().stream("GET", address, headers=headers, timeout=patience.TIMEOUT_SECONDS) as answer:
            if foreign and answer.status_code in (401, 403):
                self._addresses.pop((model.where, model.commit, file), None)
                raise _TryAgain("the signed address expired")
            _check(answer, start, stop)
            got = 0
            for chunk in answer.iter_raw():
                got += len(chunk)
                if got > stop - start:
                    raise _TryAgain("the answer is longer than the range")
                yield chunk
            if got < stop - start:
                raise _TryAgain("the answer was cut short")

    def _address(self, model: Located, file: str) -> tuple[str, bool]:
        """Where the file's bytes are, and whether that is another host, which must not see the token."""
        key = (model.where, model.commit, file)
        known = self._addresses.get(key)  # once: another thread may forget it at any moment
        if known is None:
            url = hf_hub_url(model.where, file, revision=model.commit, endpoint=constants.ENDPOINT)
            answer = get_session().request(
                "HEAD", url, headers=self._headers, timeout=patience.TIMEOUT_SECONDS, follow_redirects=False
            )
            _raise_for(answer)
            location = answer.headers.get("Location")
            known = self._addresses[key] = (url, False) if location is None else _beside(url, location)
        return known


def _beside(url: str, location: str) -> tuple[str, bool]:
    there = httpx.URL(url).join(location)
    return str(there), there.netloc != httpx.URL(url).netloc


class _TryAgain(Exception):
    """An answer that another try may mend; `seconds` is how long the server asked us to wait."""

    def __init__(self, why: str, seconds: float = 0.0) -> None:
        super().__init__(why)
        self.seconds = seconds


def _raise_for(answer: httpx.Response) -> None:
    if answer.status_code in PASSING:
        raise _TryAgain(f"HTTP {answer.status_code}", asked_pause(answer))
    hf_raise_for_status(answer)


def _check(answer: httpx.Response, start: int, stop: int) -> None:
    whole = start == 0 and answer.headers.get("Content-Length") == str(stop)
    if answer.status_code == HTTPStatus.OK and whole:
        return  # a server may ignore a range; here that is the same bytes
    if answer.status_code != HTTPStatus.PARTIAL_CONTENT:
        if answer.status_code >= 400:
            answer.read()
            _raise_for(answer)
        raise _TryAgain(f"HTTP {answer.status_code} in place of a part of the file")
    if not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-{stop - 1}/"):
        raise _TryAgain("another range than the one asked for")


def _in_words(error: Exception) -> str:
    """What went wrong, without the address: a signed address is as good as a token."""
    return str(error) if isinstance(error, _TryAgain) else type(error).__name__


# ---- reading ahead --------------------------------------------------------------------------------------------------


@dataclass
class _Piece:
    """A run of bytes fetched by one request; `left` counts those that tickets still want."""

    model: Located
    file: str
    start: int
    stop: int
    last_ticket: int
    left: int = 0
    data: Future[bytearray] | None = field(default=None, repr=False)

    @property
    def size(self) -> int:
        return self.stop - self.start


class RangeReader:
    """Reads tickets through pieces of up to 16 MiB that are fetched ahead, in the tickets' order.

    A piece that somebody waits for is fetched even when the budget is used up, so a run can't wait for itself.

    Args:
        tickets: everything that will be read, in about the order it will be read in.
        budget: how many bytes may be held.
        fill: how to get bytes.
    """

    def __init__(
        self,
        tickets: Sequence[Ticket],
        budget: int,
        fill: Callable[[Located, str, int, memoryview], None],
        connections: int = CONNECTIONS,
    ) -> None:
        self._tickets = tickets
        self._budget = budget
        self._fill = fill
        self._pieces, self._first = _pieces(tickets)
        self._next = 0
        self._held = 0
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(connections, thread_name_prefix="range")
        self._advance()

    def read(self, ticket: int, offset: int, out: memoryview) -> None:
        """Fill `out` from the ticket's pieces, waiting for them if need be."""
        place = self._tickets[ticket].start + offset
        number = self._first[ticket]
        while len(out):
            while self._pieces[number].stop <= place:
                number += 1
            piece = self._pieces[number]
            data = self._wanted(piece).result()
            size = min(len(out), piece.stop - place)
            out[:size] = memoryview(data)[place - piece.start : place - piece.start + size]
            self._taken(piece, size)
            out, place = out[size:], place + size

    def _wanted(self, piece: _Piece) -> Future[bytearray]:
        with self._lock:
            return self._fetch(piece)

    def _fetch(self, piece: _Piece) -> Future[bytearray]:
        if piece.data is None:
            self._held += piece.size
            piece.data = self._pool.submit(self._get, piece)
        return piece.data

    def _get(self, piece: _Piece) -> bytearray:
        data = bytearray(piece.size)
        self._fill(piece.model, piece.file, piece.start, memoryview(data))
        return data

    def _taken(self, piece: _Piece, size: int) -> None:
        with self._lock:
            piece.left -= size
            if piece.left == 0:
                piece.data = None
                self._held -= piece.size
        self._advance()

    def _advance(self) -> None:
        with self._lock:
            while self._next < len(self._pieces):
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
        self._pool.shutdown(wait=False, cancel_futures=True)


def _pieces(tickets: Sequence[Ticket]) -> tuple[list[_Piece], list[int]]:
    """The pieces in the order of their first need, and for each ticket the number of its first piece."""
    pieces: list[_Piece] = []
    first: list[int] = []
    last: dict[tuple[Located, str], int] = {}
    for number, ticket in enumerate(tickets):
        key = (ticket.model, ticket.file)
        if key in last and _join(pieces[last[key]], ticket, number):
            first.append(last[key])
            continue
        first.append(len(pieces))
        if ticket.start == ticket.stop:
            continue  # a tensor without entries
        for start in range(ticket.start, ticket.stop, PIECE_BYTES):
            stop = min(start + PIECE_BYTES, ticket.stop)
            pieces.append(_Piece(ticket.model, ticket.file, start, stop, number, left=stop - start))
        last[key] = len(pieces) - 1
    return pieces, first


def _join(piece: _Piece, ticket: Ticket, number: int) -> bool:
    """Lengthen a piece by a ticket that follows closely in file and time: one request instead of two."""
    gap = ticket.start - piece.stop
    near = 0 <= gap <= _GAP_BYTES and number - piece.last_ticket <= _NEAR_TICKETS
    if not near or ticket.stop - piece.start > PIECE_BYTES:
        return False
    piece.stop, piece.last_ticket = ticket.stop, number
    piece.left += ticket.stop - ticket.start
    return True
