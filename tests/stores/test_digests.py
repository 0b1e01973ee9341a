"""Files that are read whole are checked against the locked SHA-256, in whatever order their bytes come."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import HANGS_SECONDS

from merger.errors import DamagedError
from merger.stores.hub import reading
from merger.stores.hub.reading import Beginnings, RangeReader, confirm
from merger.stores.ports import FileInfo, Located, Ticket

SIZE, HEADER = 3000, 24
BYTES = bytes(n * 7 % 251 for n in range(SIZE))
MODEL = Located("org/a", "org/a", "c" * 40, {"x": FileInfo(SIZE, hashlib.sha256(BYTES).hexdigest())})
WIDE, TIMEOUT = 100 * SIZE, HANGS_SECONDS


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    """Pieces of 64 bytes."""
    with patch.multiple(reading, PIECE_BYTES=64, _GAP_BYTES=8):
        yield


def beginnings(until: int = HEADER) -> Beginnings:
    """The file's length and header are read, as locking does."""
    found = Beginnings()
    found.add((MODEL, "x"), 0, BYTES[:8])
    found.add((MODEL, "x"), 8, BYTES[8:until])
    return found


def read(
    spans: Sequence[tuple[int, int]], bad: int | None = None, budget: int = WIDE, begun: Beginnings | None = None,
    threads: int = 1,
) -> RangeReader:  # fmt: skip
    """Read these spans to the end by several threads; the byte at `bad` comes damaged."""

    def fill(model: Located, file: str, start: int, out: memoryview) -> None:
        out[:] = BYTES[start : start + len(out)]
        if bad is not None and start <= bad < start + len(out):
            out[bad - start] ^= 1

    tickets = [Ticket(MODEL, "x", *span) for span in spans]
    reader = RangeReader(tickets, budget, fill, connections=3, beginnings=begun or beginnings())

    def take(number: int) -> None:
        reader.read(number, 0, memoryview(bytearray(tickets[number].stop - tickets[number].start)))

    with ThreadPoolExecutor(threads) as pool:
        for job in [pool.submit(take, number) for number in range(len(tickets))]:
            job.result(TIMEOUT)
    reader.close()
    reader._pool.shutdown(wait=True)
    return reader


@st.composite
def orders(draw: st.DrawFn) -> list[tuple[int, int]]:
    """All tensors of the file in any order, some of them read twice."""
    cuts = sorted(draw(st.sets(st.integers(HEADER + 1, SIZE - 1), max_size=12)))
    spans = list(zip([HEADER, *cuts], [*cuts, SIZE], strict=True))
    return draw(st.permutations([*spans, *draw(st.lists(st.sampled_from(spans), max_size=3))]))


@given(orders(), st.integers(HEADER, SIZE - 1), st.integers(1, 3))
@settings(deadline=None, max_examples=60)
def test_one_damaged_byte_anywhere_in_a_file_read_whole_is_found(
    spans: list[tuple[int, int]], bad: int, threads: int
) -> None:
    """Whatever the order, the pieces and the threads; and a sound file passes, with all that was held let go."""
    assert read(spans, threads=threads)._held == 0
    with pytest.raises(DamagedError, match=r"org/a: x came damaged: its SHA-256 is [0-9a-f]{64}, that of the locked"):
        read(spans, bad, threads=threads)


def test_a_damaged_header_is_found() -> None:
    """It was read long before, when the model was locked, and is not asked for again."""
    begun = Beginnings()
    begun.add((MODEL, "x"), 0, BYTES[: HEADER - 1] + b"!")
    with pytest.raises(DamagedError):
        read([(HEADER, SIZE)], begun=begun)


@pytest.mark.parametrize(("spans", "budget"), [
    ([(HEADER, 1000), (1100, SIZE)], WIDE), ([(HEADER, SIZE - 1)], WIDE), ([(HEADER + 100, SIZE)], WIDE),
    ([(1000, SIZE), (HEADER, 1000)], 8 * 1999),
], ids=["a gap", "no end", "no start", "too far out of order"])  # fmt: skip
def test_what_cannot_be_checked_is_read_all_the_same(spans: list[tuple[int, int]], budget: int) -> None:
    """A file that is not read whole, or in an order in which too much would have to be kept."""
    assert read(spans, bad=1500, budget=budget)._held == 0


def test_out_of_order_is_checked_as_far_as_a_share_of_the_budget_goes() -> None:
    """One byte more of budget than above."""
    with pytest.raises(DamagedError):
        read([(1000, SIZE), (HEADER, 1000)], bad=1500, budget=8 * 2000)


def test_bytes_that_wait_for_their_turn_count_as_held() -> None:
    """What is taken but not hashed yet takes memory, so less is read ahead meanwhile."""
    go = threading.Event()

    def fill(model: Located, file: str, start: int, out: memoryview) -> None:
        assert start != HEADER or go.wait(TIMEOUT)
        out[:] = BYTES[start : start + len(out)]

    tickets = [Ticket(MODEL, "x", *span) for span in [(1000, 1064), (HEADER, 1000), (1064, SIZE)]]
    reader = RangeReader(tickets, WIDE, fill, connections=2, beginnings=beginnings())
    reader.read(0, 0, memoryview(bytearray(64)))
    held = reader._held
    go.set()
    reader._pool.shutdown(wait=True)
    assert held == SIZE - HEADER
    for number, ticket in enumerate(tickets[1:], 1):
        reader.read(number, 0, memoryview(bytearray(ticket.stop - ticket.start)))
    assert reader._held == 0


def test_a_file_without_a_locked_sum_passes() -> None:
    """Small files of a repo have none."""
    plain = Located("org/b", "org/b", "c" * 40, {"x": FileInfo(3)})
    confirm((plain, "x"), "0" * 64)
