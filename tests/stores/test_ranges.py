"""Bytes of remote files by range: what is asked for and when (a fake `fill`), and how (the loopback Hub)."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count, pairwise
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from huggingface_hub.utils import httpx
from hypothesis import example, given, settings
from hypothesis import strategies as st
from loopback import Client, ClientError, LoopbackHub, Request
from loopback.wire import Answer
from waiting import HANGS_SECONDS

from merger.stores.hub import ranges, reading
from merger.stores.hub.ranges import RangeClient
from merger.stores.hub.reading import RangeReader
from merger.stores.ports import FileInfo, Located, Ticket

MODELS = [Located(f"org/{name}", f"org/{name}", "c" * 40, {}) for name in "ab"]
TIMEOUT = HANGS_SECONDS


# ---- reading ahead: pure logic --------------------------------------------------------------------------------------


def content(model: Located, file: str, start: int, stop: int) -> bytes:
    """What stands in a file; every place and file differs from its neighbours."""
    salt = sum(f"{model.where}/{file}".encode())
    return bytes((salt + 7 * place + place // 251) % 256 for place in range(start, stop))


class Source:
    """A `fill` that remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[Located, str, int, int]] = []

    def fill(self, model: Located, file: str, start: int, out: memoryview) -> None:
        self.asked.append((model, file, start, start + len(out)))
        out[:] = content(model, file, start, start + len(out))


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    """Pieces of 64 bytes, gaps of 8: the logic is the same, the examples are small."""
    with patch.multiple(reading, PIECE_BYTES=64, _GAP_BYTES=8, _NEAR_TICKETS=4):
        yield


def ticket(model: int = 0, file: str = "x", start: int = 0, size: int = 10, turn: int | None = None) -> Ticket:
    return Ticket(MODELS[model], file, start, start + size, turn)


def read_all(reader: RangeReader, tickets: Sequence[Ticket], numbers: Sequence[int], step: int) -> dict[int, bytes]:
    """Read some tickets front to back, `step` bytes at a time."""
    found = {}
    for number in numbers:
        data = bytearray(tickets[number].stop - tickets[number].start)
        for offset in range(0, len(data), step):
            reader.read(number, offset, memoryview(data)[offset : offset + step])
        found[number] = bytes(data)
    return found


TICKETS = st.lists(
    st.builds(
        ticket,
        st.integers(0, 1),
        st.sampled_from("xy"),
        st.integers(0, 300),
        st.integers(0, 20) | st.integers(0, 300),
        st.none() | st.integers(0, 2),
    ),
    max_size=12,
)


@given(TICKETS, st.integers(0, 500), st.integers(1, 4), st.integers(1, 80), st.integers(1, 3))
@example([ticket(size=0), ticket(), ticket(1, size=0), ticket(start=12), ticket(1, start=20)], 100, 1, 10, 1)
@settings(deadline=None, max_examples=150)
def test_any_tickets_any_budget_any_threads_give_the_right_bytes(
    tickets: list[Ticket], budget: int, threads: int, step: int, connections: int
) -> None:
    """Overlapping, repeated, empty, tiny or huge; read by several at once; nobody waits for ever."""
    source = Source()
    reader = RangeReader(tickets, budget, source.fill, connections)
    shares = [range(first, len(tickets), threads) for first in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        jobs = [pool.submit(read_all, reader, tickets, share, step) for share in shares]
        found = {number: data for job in jobs for number, data in job.result(TIMEOUT).items()}
    reader.close()
    assert found == {n: content(t.model, t.file, t.start, t.stop) for n, t in enumerate(tickets)}
    for wanted in tickets:
        places = {p for m, f, a, z in source.asked if (m, f) == (wanted.model, wanted.file) for p in range(a, z)}
        assert places >= set(range(wanted.start, wanted.stop))


def in_a_row(sizes: Sequence[int], gaps: Sequence[int] = ()) -> list[Ticket]:
    """Tickets that follow each other in two files by turns; none overlaps another."""
    ends, tickets = [0, 0], []
    for number, size in enumerate(sizes):
        start = ends[number % 2] + (gaps[number % len(gaps)] if gaps else 0)
        tickets.append(ticket(number % 2, "x", start, size))
        ends[number % 2] = start + size
    return tickets


@given(st.lists(st.integers(1, 150), min_size=1, max_size=12), st.integers(0, 400), st.lists(st.integers(0, 12)))
@settings(deadline=None, max_examples=100)
def test_no_more_is_held_than_the_budget_and_what_is_being_read(sizes: list[int], budget: int, gaps: list[int]) -> None:
    """A piece counts from when it is asked for until its last wanted byte is taken; the budget bounds the others."""
    tickets, lock = in_a_row(sizes, gaps), threading.Lock()
    taken: list[Ticket] = []
    current: list[Ticket] = []
    pieces: list[tuple[Located, int, int]] = []
    most: list[str] = []

    def within(piece: tuple[Located, int, int], some: Sequence[Ticket]) -> list[Ticket]:
        return [t for t in some if t.model == piece[0] and t.start < piece[2] and piece[1] < t.stop]

    def fill(model: Located, file: str, start: int, out: memoryview) -> None:
        with lock:
            pieces.append((model, start, start + len(out)))
            held = [piece for piece in pieces if len(within(piece, taken)) < len(within(piece, tickets))]
            ahead = sum(piece[2] - piece[1] for piece in held if not within(piece, [*taken, *current]))
            if ahead > budget:
                most.append(f"{ahead} bytes held ahead of {budget}")

    reader = RangeReader(tickets, budget, fill, connections=2)
    for number, wanted in enumerate(tickets):
        with lock:
            current[:] = [wanted]
        reader.read(number, 0, memoryview(bytearray(wanted.stop - wanted.start)))
        with lock:
            taken.append(wanted)
    reader.close()
    assert not most
    assert len(pieces) == len(set(pieces))  # nothing is transferred twice
    assert sum(stop - start for _, start, stop in pieces) >= sum(sizes)


REQUESTS: dict[str, tuple[list[Ticket], dict[str, list[tuple[int, int]]]]] = {
    "neighbours come by one request, also of two models by turns": (
        in_a_row([10] * 12, [0, 2]), {"org/a x": [(0, 60)], "org/b x": [(2, 60), (62, 72)]}),
    "a wide gap is skipped": (
        [ticket(start=0), ticket(start=18), ticket(start=37)], {"org/a x": [(0, 28), (37, 47)]}),
    "a gap that another ticket fills is not fetched along: its bytes would come twice": (
        [ticket(start=0), ticket(start=13), ticket(start=10, size=3)], {"org/a x": [(0, 10), (13, 23), (10, 13)]}),
    "a neighbour that is needed much later is not fetched along: it would fill the budget early": (
        [ticket(), *(ticket(1, "y", 100 * n) for n in range(6)), ticket(start=10)],
        {"org/a x": [(0, 10), (10, 20)], "org/b y": [(100 * n, 100 * n + 10) for n in range(6)]}),
    "no request is larger than a piece": (
        [ticket(size=200)], {"org/a x": [(0, 64), (64, 128), (128, 192), (192, 200)]}),
}  # fmt: skip
"""Tickets, and what is asked for of each file."""


@pytest.mark.parametrize("what", REQUESTS)
def test_what_is_asked_for(what: str) -> None:
    """In the order of the tickets, as few requests as lose no bytes."""
    (tickets, expected), source, found = REQUESTS[what], Source(), defaultdict(list)
    reader = RangeReader(tickets, 1000, source.fill, connections=1)
    read_all(reader, tickets, range(len(tickets)), 10)
    reader.close()
    for model, file, start, stop in source.asked:
        found[f"{model.name} {file}"].append((start, stop))
    assert found == expected


@pytest.mark.parametrize(("budget", "times"), [(400, 1), (39, 4)])
def test_what_several_tickets_want_is_transferred_once_where_it_may_wait(budget: int, times: int) -> None:
    """As an adapter's B that is read for each expert; never more than a quarter of the budget waits."""
    tickets, source = [ticket(n % 2, "x" if n % 2 else "y", 0 if n % 2 else 10 * n) for n in range(8)], Source()
    reader = RangeReader(tickets, budget, source.fill, connections=1)
    found = read_all(reader, tickets, range(8), 3)
    reader.close()
    assert found == {n: content(t.model, t.file, t.start, t.stop) for n, t in enumerate(tickets)}
    assert len([asked for asked in source.asked if asked[1] == "x"]) == times


def test_tickets_of_one_turn_are_fetched_side_by_side() -> None:
    """Else the first of several large tensors would fill the budget, and each block would wait for all the others."""
    tickets = [ticket(model, "x", size=150, turn=3) for model in (0, 1)] + [ticket(start=500, size=70)]
    source = Source()
    reader = RangeReader(tickets, 10_000, source.fill, connections=1)
    reader._pool.shutdown(wait=True)
    asked = [(model.name, start) for model, _, start, _ in source.asked]
    abreast = [(f"org/{name}", start) for start in (0, 64, 128) for name in "ab"]
    assert asked == [*abreast, ("org/a", 500), ("org/a", 564)]


def test_room_for_a_piece_is_used_again() -> None:
    """Pieces of various sizes that are taken one after the other lie in one buffer, and none shows another's bytes."""
    sizes = [64, 40, 63, 33, 64]
    tickets = [ticket(start=1000 * n, size=size) for n, size in enumerate(sizes)]
    rooms: set[int] = set()

    def fill(model: Located, file: str, start: int, out: memoryview) -> None:
        rooms.add(np.frombuffer(out, np.uint8).ctypes.data)
        out[:] = content(model, file, start, start + len(out))

    reader = RangeReader(tickets, 0, fill, connections=1)
    found = read_all(reader, tickets, range(len(tickets)), 16)
    reader.close()
    assert len(rooms) == 1
    assert found == {n: content(t.model, t.file, t.start, t.stop) for n, t in enumerate(tickets)}


@pytest.mark.parametrize(("budget", "ahead"), [(0, 0), (64, 1), (200, 3), (10_000, 10)])
def test_as_much_is_read_ahead_as_the_budget_allows(budget: int, ahead: int) -> None:
    """Requests go out before anybody asks, in the tickets' order, up to the budget and no further."""
    source = Source()
    reader = RangeReader([ticket(start=100 * n, size=64) for n in range(10)], budget, source.fill, connections=1)
    reader._pool.shutdown(wait=True)
    assert [asked[2] for asked in source.asked] == [100 * n for n in range(ahead)]


def test_what_is_taken_makes_room_for_what_comes_next() -> None:
    """Read-ahead goes on while the tickets are read: after each the next request goes out by itself."""
    asked: queue.SimpleQueue[int] = queue.SimpleQueue()
    tickets = [ticket(start=100 * n, size=64) for n in range(6)]
    reader = RangeReader(tickets, 128, lambda model, file, start, out: asked.put(start), connections=1)
    assert [asked.get(timeout=TIMEOUT) for _ in range(2)] == [0, 100]
    for number in range(4):
        reader.read(number, 0, memoryview(bytearray(64)))
        assert asked.get(timeout=TIMEOUT) == 100 * (number + 2)
    reader.close()


def test_a_failed_request_reaches_whoever_waits_for_its_bytes() -> None:
    """And nobody else."""

    def fill(model: Located, file: str, start: int, out: memoryview) -> None:
        if start == 100:
            raise ConnectionError("no such luck")

    tickets = [ticket(start=100 * n) for n in range(3)]
    reader = RangeReader(tickets, 1000, fill)
    read_all(reader, tickets, [0, 2], 10)
    with pytest.raises(ConnectionError, match="no such luck"):
        reader.read(1, 0, memoryview(bytearray(10)))
    reader.close()


def test_a_closed_reader_asks_for_nothing_more() -> None:
    """What waits for a connection is given up."""
    begun, go = threading.Event(), threading.Event()
    asked: list[int] = []

    def fill(model: Located, file: str, start: int, out: memoryview) -> None:
        asked.append(start)
        begun.set()
        assert go.wait(TIMEOUT)

    reader = RangeReader([ticket(start=100 * n) for n in range(5)], 1000, fill, connections=1)
    assert begun.wait(TIMEOUT)
    reader.close()
    go.set()
    reader._pool.shutdown(wait=True)
    assert asked == [0]


def test_reading_twice_would_transfer_twice() -> None:
    """So the engine is told to keep what it needs again."""
    reader = RangeReader([ticket()], 0, Source().fill)
    assert not reader.repeatable(0)
    reader.close()


# ---- asking: the real client against the loopback Hub ----------------------------------------------------------------

REPO, FILE = "org/remote", "model.safetensors"
BYTES = bytes(n * 7 % 256 for n in range(100_000))
CARD = b"---\nlicense: mit\n---\n# a card\n"
FILES = {FILE: FileInfo(len(BYTES), hashlib.sha256(BYTES).hexdigest()), "README.md": FileInfo(len(CARD))}


@pytest.fixture(scope="module", autouse=True)
def remote(served: LoopbackHub) -> str:
    """A model with one large file and one small one."""
    return served.add_model(REPO, {FILE: BYTES, "README.md": CARD}, private=True)


# What the child runs; it keeps its client, as a store does.

_CLIENT: list[RangeClient] = []


def fill(commit: str, start: int, size: int, file: str = FILE, fresh: bool = False) -> tuple[bytes, list[float]]:
    """The bytes, and how long the client would have waited between its tries."""
    if fresh or not _CLIENT:
        _CLIENT[:] = [RangeClient()]
    model, out, pauses = Located(REPO, REPO, commit, FILES), bytearray(size), list[float]()
    with patch.object(ranges, "time", SimpleNamespace(sleep=pauses.append)):
        _CLIENT[0].fill(model, file, start, memoryview(out))
    return bytes(out), pauses


def fill_of(repo: str, commit: str) -> None:
    """Ask another repo for what is locked here."""
    with patch.object(ranges, "time", SimpleNamespace(sleep=lambda seconds: None)):
        RangeClient().fill(Located(repo, repo, commit, FILES), FILE, 0, memoryview(bytearray(10)))


def fill_side_by_side(commit: str, count: int) -> bool:
    """Many ranges of one file by eight threads at once."""
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: fill(commit, 100 * number, 100)[0], range(count)))
    return b"".join(found) == BYTES[: 100 * count]


def on_cdn(request: Request) -> bool:
    return request.host == "cdn" and request.method == "GET"


def on_resolve(request: Request) -> bool:
    return "/resolve/" in request.path


@pytest.fixture
def ask(hub: LoopbackHub, client: Client, remote: str) -> Callable[..., tuple[bytes, list[float]]]:
    """Ask for bytes 1000 to 51000 with a client that has not asked before."""

    def call(start: int = 1000, size: int = 50_000, fresh: bool = True, **options: Any) -> tuple[bytes, list[float]]:
        return client(fill, remote, start, size, options.get("file", FILE), fresh)

    return call


Ask = Callable[..., tuple[bytes, list[float]]]


def test_one_look_up_then_ranges_from_the_second_origin_without_the_token(hub: LoopbackHub, ask: Ask) -> None:
    """The Hub is asked once where a file's bytes are; the place where they are never sees who asks."""
    assert ask() == (BYTES[1000:51_000], [])
    assert ask(start=7, size=3, fresh=False) == (BYTES[7:10], [])
    asked = [r for r in hub.log if on_resolve(r) or r.host == "cdn"]
    assert [(r.method, r.host, r.range, r.status, r.sent) for r in asked] == [
        ("HEAD", "hub", None, 302, 0),
        ("GET", "cdn", "bytes=1000-50999", 206, 50_000),
        ("GET", "cdn", "bytes=7-9", 206, 3),
    ]
    assert [r.authorization for r in asked] == [True, False, False]


def test_a_small_file_comes_from_the_hub_itself(hub: LoopbackHub, ask: Ask) -> None:
    """Files that are not LFS are not redirected: there the token is needed and sent."""
    assert ask(start=4, size=12, file="README.md")[0] == CARD[4:16]
    assert [(r.method, r.host, r.authorization) for r in hub.log] == [("HEAD", "hub", True), ("GET", "hub", True)]


def test_a_cut_answer_is_taken_up_where_it_ended(hub: LoopbackHub, ask: Ask) -> None:
    """What arrived is kept: together the two answers hold each byte once."""
    hub.fail(on_cdn, cut_body_at=20_000)
    assert ask()[0] == BYTES[1000:51_000]
    parts = [(r.range, r.sent) for r in hub.log if on_cdn(r)]
    assert parts == [("bytes=1000-50999", 20_000), ("bytes=21000-50999", 30_000)]


@pytest.mark.parametrize("spoilt", [{}, {"Content-Range": "bytes 0-49999/100000"}], ids=["200", "another range"])
def test_an_answer_that_is_not_the_range_asked_for_is_not_taken(
    hub: LoopbackHub, ask: Ask, spoilt: dict[str, str]
) -> None:
    """A whole file, or the wrong part of it, never ends up in a tensor: it is asked for again."""
    fault = hub.fail(on_cdn, status=206 if spoilt else 200, headers=spoilt)
    data, pauses = ask()
    assert (data == BYTES[1000:51_000], len(pauses), fault.left) == (True, 1, 0)


@pytest.mark.parametrize(
    ("status", "headers", "why"),
    [
        (206, {"Content-Range": "bytes 0-9/21"}, "the file has 21 bytes there, the locked one 20"),
        (206, {"Content-Range": "bytes 0-9/*"}, "the file has * bytes there, the locked one 20"),
        (206, {"Content-Range": "bytes 0-9"}, "the file has an unknown number of bytes there, the locked one 20"),
        (206, {"Content-Range": "bytes 0-99/20"}, "another range than the one asked for"),
        (206, {"Content-Range": "bytes 0-9/20", "Content-Encoding": "gzip"}, "the answer is compressed"),
        (200, {"Content-Length": "10"}, "HTTP 200 in place of a part of the file"),
        (204, {"Content-Range": "bytes 0-9/20"}, "HTTP 204 in place of a part of the file"),
    ],
)
def test_an_answer_must_be_the_range_of_the_locked_file(status: int, headers: dict[str, str], why: str) -> None:
    """Status, range, the file's size and the encoding are looked at before a byte is taken."""
    with pytest.raises(ranges._TryAgain) as refusal:
        ranges._check(httpx.Response(status, headers=headers), 0, 10, 20)
    assert str(refusal.value) == why


def test_a_file_of_another_size_than_the_locked_one_is_refused(hub: LoopbackHub, ask: Ask, remote: str) -> None:
    """Although the bytes that were asked for are all there."""
    blob = hub.blob_path(REPO, FILE)
    blob.write_bytes(BYTES + b"!")
    try:
        with pytest.raises(ClientError, match=r"\(the file has 100001 bytes there, the locked one 100000\)"):
            ask()
    finally:
        blob.write_bytes(BYTES)


def test_a_file_that_the_hub_gives_another_name_is_refused(hub: LoopbackHub, client: Client, remote: str) -> None:
    """The SHA-256 that comes with the address must be the locked one, also where the size is the same."""
    hub.add_model("org/other", {FILE: bytes(len(BYTES))})
    with pytest.raises(ClientError, match=r"\(the Hub offers another file than the locked one\)"):
        client(fill_of, "org/other", hub.head("org/other"))
    assert not [r for r in hub.log if on_cdn(r)]


def test_an_expired_address_is_asked_for_again(hub: LoopbackHub, ask: Ask) -> None:
    """A run that lasts longer than a signed address goes on with a new one."""
    ask()
    hub.expire_urls()
    hub.clear_log()
    assert ask(fresh=False)[0] == BYTES[1000:51_000]
    assert [(r.method, r.host, r.status) for r in hub.log] == [
        ("GET", "cdn", 403), ("HEAD", "hub", 302), ("GET", "cdn", 206),
    ]  # fmt: skip


def test_many_threads_survive_addresses_that_expire_again_and_again(
    hub: LoopbackHub, client: Client, remote: str
) -> None:
    """One thread forgets an address while another looks it up: all get their bytes."""
    hub.fail(on_cdn, status=403, times=5)
    assert client(fill_side_by_side, remote, 200)


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("where", [on_cdn, on_resolve])
def test_trouble_is_waited_out_as_long_as_the_server_asks(
    hub: LoopbackHub, ask: Ask, status: int, where: Callable[[Request], bool]
) -> None:
    """Each answer that speaks of passing trouble is followed by a pause of at least Retry-After."""
    hub.fail(where, status=status, times=2, headers={"Retry-After": "17"})
    data, pauses = ask()
    assert (data == BYTES[1000:51_000], pauses) == (True, [17.0, 17.0])


def test_a_rate_limit_is_waited_out_and_no_server_can_stop_us_for_hours(hub: LoopbackHub, ask: Ask) -> None:
    """The Hub's own header for limits is understood; a pause ends after five minutes at most."""
    hub.fail(on_resolve, status=429, headers={"RateLimit": '"resolvers";r=0;t=55'})
    assert ask()[1] == [55.0]
    hub.fail(on_cdn, status=503, headers={"Retry-After": "86400"})
    assert ask()[1] == [300.0]


def test_pauses_grow(hub: LoopbackHub, ask: Ask) -> None:
    """Without a word from the server each pause is about twice as long as the one before."""
    hub.fail(on_cdn, status=None, times=5)
    data, pauses = ask()
    assert data == BYTES[1000:51_000]
    assert len(pauses) == 5
    assert all(0.125 * 2**n <= pause <= 0.25 * 2**n for n, pause in enumerate(pauses, 1))
    assert all(later > earlier / 2 for earlier, later in pairwise(pauses))


@pytest.mark.parametrize("status", [None, 503, 403, 200], ids=["dropped", "503", "expired", "whole file"])
def test_it_gives_up_in_a_sentence_without_secrets(hub: LoopbackHub, ask: Ask, status: int | None) -> None:
    """After six tries the model, the file and the trouble are named, and neither token nor signed address is."""
    hub.fail(on_cdn, status=status, times=6)
    with pytest.raises(ClientError) as refusal:
        ask()
    words = str(refusal.value)
    assert "ModelError" in refusal.value.kinds
    assert f"{REPO}: {FILE} could not be read after 6 tries" in words
    assert "run it again" in words
    assert not any(secret in words for secret in ("hf_", "Signature", "http://", hub.cdn_url))
    assert len([r for r in hub.log if on_cdn(r)]) == 6


# ---- redirects ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("file", [FILE, "README.md"])
def test_a_repo_that_was_renamed_is_read_at_its_new_name(
    hub: LoopbackHub, client: Client, times: int, file: str
) -> None:
    """Also one that was renamed again: each name leads to the next, with the token, and then to the second origin."""
    content = BYTES if file == FILE else CARD
    first = f"org/former-{times}-{file.partition('.')[0].lower()}"
    commit = hub.add_model(first, {FILE: BYTES, "README.md": CARD}, private=True)
    for number in range(times):
        hub.rename(f"{first}-{number}" if number else first, f"{first}-{number + 1}")
    hub.clear_log()
    assert client(bytes_of, first, commit, file, len(content)) == content
    moved = [r for r in hub.log if r.status == 307]
    assert len(moved) == times
    assert all(r.authorization for r in hub.log if r.host == "hub" and on_resolve(r))
    assert not any(r.authorization for r in hub.log if r.host == "cdn")


def bytes_of(repo: str, commit: str, file: str, size: int) -> bytes:
    """A file by a client that has not asked before."""
    out = bytearray(size)
    with patch.object(ranges, "time", SimpleNamespace(sleep=lambda seconds: None)):
        RangeClient().fill(Located(repo, repo, commit, FILES), file, 0, memoryview(out))
    return bytes(out)


def test_names_that_lead_in_a_circle_are_told(hub: LoopbackHub, client: Client) -> None:
    """After as many steps as the Hub's client takes."""
    hub.world.renamed |= {"org/here": "org/there", "org/there": "org/here"}
    with pytest.raises(
        ClientError, match=r"cannot be read: the Hub sends us on from place to place, 20 times by now\n    "
    ):
        client(bytes_of, "org/here", "c" * 40, FILE, 10)
    assert len(hub.log) == 21


def test_an_address_elsewhere_may_lead_on(hub: LoopbackHub, ask: Ask) -> None:
    """As a mirror's does; back at the Hub the token is not shown again."""
    first = count()

    def on(answer: Answer) -> Answer:
        there = next(request for request in reversed(places))
        return Answer(302, {"Location": f"{hub.cdn_url}{there}"}) if next(first) < 2 else answer

    places: list[str] = []
    hub.fail(lambda r: on_cdn(r) and places.append(f"{r.path}?{r.query}") is None, spoil=on, times=3)
    assert ask()[0] == BYTES[1000:51_000]
    assert [r.status for r in hub.log if on_cdn(r)] == [302, 302, 206]
    assert not any(r.authorization for r in hub.log if on_cdn(r))


HUB = "https://hub.example/org/a/resolve/c/x"
FURTHER: list[tuple[str, str, tuple[str, bool] | str]] = [
    (HUB, "/org/b/resolve/c/x", ("https://hub.example/org/b/resolve/c/x", False)),
    (HUB, "https://hub.example:443/b", ("https://hub.example:443/b", False)),
    (HUB, "//hub.example/b", ("https://hub.example/b", False)),
    (HUB, "https://HUB.example/b", ("https://hub.example/b", False)),
    (HUB, "https://hub.example:8443/b", ("https://hub.example:8443/b", True)),
    (HUB, "https://cdn.example/b?Signature=1", ("https://cdn.example/b?Signature=1", True)),
    (HUB, "https://hub.example@evil.example/b", ("https://hub.example@evil.example/b", True)),
    (HUB, "https://hub.example.evil.example/b", ("https://hub.example.evil.example/b", True)),
    (HUB, "http://hub.example/b", "from https to http"),
    (HUB, "http://cdn.example/b", "from https to http"),
    (HUB, "file:///etc/passwd", "from https to file"),
    (HUB, "ftp://hub.example/b", "from https to ftp"),
    (HUB, "https://[::1/b", "no address"),
    ("http://hub.example/a", "http://hub.example:80/b", ("http://hub.example:80/b", False)),
    ("http://hub.example/a", "https://hub.example/b", ("https://hub.example/b", True)),
    ("http://hub.example/a", "file:///etc/passwd", "from http to file"),
]


@pytest.mark.parametrize(("here", "location", "there"), FURTHER)
def test_where_a_redirect_is_followed_to(here: str, location: str, there: tuple[str, bool] | str) -> None:
    """Never from https to anything else; whoever is not the same scheme, host and port does not see the token."""
    address = ranges._Address(here)
    if isinstance(there, str):
        with pytest.raises(ranges._Astray, match=there):
            address.further(302, {"Location": location})
        return
    found = address.further(302, {"Location": location})
    assert found is not None
    assert (httpx.URL(found.url), found.is_foreign) == (httpx.URL(there[0]), there[1])
    back = found.further(307, {"Location": here.replace("http:", "https:")})
    assert back is not None
    assert back.is_foreign >= found.is_foreign


@pytest.mark.parametrize(
    ("status", "headers"), [(200, {"Location": "/b"}), (206, {}), (302, {}), (404, {"Location": "/b"})]
)
def test_what_is_no_redirect_leads_nowhere(status: int, headers: dict[str, str]) -> None:
    """A status and a place belong to it."""
    assert ranges._Address(HUB).further(status, headers) is None
