"""A merge made again and compared with what was published: pieces of it, or whole shards. By the same work as a run.

Not here: which pieces (verification.sample), and what else is compared (verify).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np

from merger.engine.execute import BytesWritten, execute, single_threaded
from merger.engine.finite import NotFinite, explain
from merger.engine.router_init import gates
from merger.engine.runner import Work, blocks
from merger.engine.tensors import Block, RunSetup
from merger.lock.read import REQUESTS_AT_ONCE
from merger.methods.registry import Method
from merger.models.checkpoint import FLOATS, ITEM_BYTES, TensorInfo
from merger.models.formats.safetensors import Outlet, WrittenShard
from merger.planning.inputs.base import Job
from merger.planning.jobs.blocks import BLOCK_ENTRIES
from merger.planning.plan import Plan
from merger.planning.shards import Shard
from merger.stores.ports import Located, Reader, Store, Ticket
from merger.verification.distance import as_numbers
from merger.verification.sample import Mismatch, Piece

_READ_AHEAD_BYTES = 64 << 20


@dataclass(frozen=True)
class PublishedTensors:
    """The result as it was published.

    Args:
        located: where it is.
        store: reads it.
        tensors: those of its tensors that are where the plan has them, by name.
    """

    located: Located
    store: Store
    tensors: Mapping[str, TensorInfo]

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes ``[start, stop)`` of a tensor."""
        tensor = self.tensors[name]
        return self.store.fetch(self.located, tensor.file, tensor.start + start, tensor.start + stop)


class _AsAsked(Reader):
    """Reads a job's inputs only where they are asked for: where a few entries are wanted, nothing is read ahead."""

    def __init__(self, planned: Plan, job: Job, store: Store) -> None:
        self._models, self._stored, self._store = planned.locked.models, job.reads, store

    def read(self, ticket: int, offset: int, out: memoryview) -> None:
        stored = self._stored[ticket]
        start = stored.tensor.start + offset
        out[:] = self._store.fetch(self._models[stored.model].located, stored.tensor.file, start, start + len(out))

    def repeatable(self, ticket: int) -> bool:
        return self._models[self._stored[ticket].model].located.commit is None

    def close(self) -> None:
        """Nothing is held."""


def compare_pieces(
    planned: Plan, pieces: Sequence[Piece], table: Mapping[str, Method], store: Store, published: PublishedTensors
) -> Iterator[tuple[Piece, Mismatch | None]]:
    """Make the pieces again; each with what differs in it.

    Args:
        store: where the parents' bytes come from.
        published: what they are compared with.

    Raises:
        ModelError: bytes of a parent or of the result cannot be read.
        MismatchError: what is made again is not finite.
    """
    routers = gates(planned, [piece.job for piece in pieces], table, store)

    def compared(piece: Piece) -> tuple[Piece, Mismatch | None]:
        reader, allow = _AsAsked(planned, piece.job, store), planned.locked.recipe.allow_non_finite
        try:
            work = Work(piece.job, RunSetup(table, reader, planned.seed, routers=routers, allow=allow))
            return piece, _compare(work, piece, published)
        except NotFinite as found:
            raise explain(found, planned, (), store) from found.__cause__

    # A block of entries takes short requests, whose answers are waited for; a whole tensor takes a thread's memory.
    small, large = list[Piece](), list[Piece]()
    for piece in pieces:
        is_small = table[piece.job.method].measure is None and piece.stop - piece.start <= BLOCK_ENTRIES
        (small if is_small else large).append(piece)
    for threads, some in ((REQUESTS_AT_ONCE, small), (planned.threads, large)):
        with single_threaded(), ThreadPoolExecutor(threads, thread_name_prefix="compare") as pool:
            yield from pool.map(compared, some)


def _compare(work: Work, piece: Piece, published: PublishedTensors) -> Mismatch | None:
    with closing(work):
        if work.wants_preparing:
            work.prepare()
        job, parts = piece.job, list[Mismatch | None]()
        for start, made in _make(work, piece):
            found = published.read(job.name, start, start + len(made))
            parts.append(difference(piece.file, job, start, made, found))
    return join_mismatches(parts, piece.stop - piece.start)


def _make(work: Work, piece: Piece) -> Iterator[tuple[int, memoryview]]:
    """The piece's bytes and where in the tensor they begin; blocks are as in a run, so that their sums are."""
    size = ITEM_BYTES[piece.job.dtype]
    unit = 1 if work.job.is_copy else size
    run = Block(piece.start * size // unit, piece.stop * size // unit)
    for block in blocks(work.job, work.method) if piece.is_whole else [run]:
        buffer = np.empty((block.stop - block.start) * unit, np.uint8)
        yield block.start * unit, work.make(block, buffer)


def difference(file: str, job: Job, start: int, made: memoryview, found: bytes | bytearray) -> Mismatch | None:
    """In what bytes of a tensor, from byte `start` on, differ from those that are made again."""
    if bytes(made) == found:
        return None
    size = ITEM_BYTES[job.dtype]
    here, there = (np.frombuffer(data, np.uint8).reshape(-1, size) for data in (made, found))
    others = np.flatnonzero((here != there).any(axis=1))
    first = int(others[0])
    was, is_now = (_number(side[first].tobytes(), job.dtype) for side in (there, here))
    return Mismatch(job.name, file, start // size + first, was, is_now, len(others), len(here))


def _number(raw: bytes, dtype: str) -> str:
    found = as_numbers(raw, dtype) if dtype in FLOATS else None
    return f"0x{raw[::-1].hex()}" if found is None else repr(float(found[0]))


def join_mismatches(parts: Sequence[Mismatch | None], compared: int) -> Mismatch | None:
    """What differs in a tensor, of what differs in its parts in their order."""
    found = [part for part in parts if part is not None]
    return replace(found[0], count=sum(part.count for part in found), compared=compared) if found else None


# ---- whole shards ---------------------------------------------------------------------------------------------------


def compare_shards(
    planned: Plan, shards: Sequence[Shard], table: Mapping[str, Method], store: Store, against: Against
) -> Iterator[BytesWritten]:
    """Make shards again, as a run makes them; what comes of it is in `against`.

    Raises:
        ModelError, MismatchError: as a run does.
    """
    with closing(against):
        for event in execute(planned, shards, table, store, against):
            if isinstance(event, BytesWritten):
                yield event


class Against:
    """Takes shards as a session does, but compares them with what was published.

    Args:
        shards: those that will come, in this order.
        published: what they are compared with.
    """

    def __init__(self, shards: Sequence[Shard], published: PublishedTensors) -> None:
        self.made: dict[str, str] = {}
        self.differences: list[Mismatch] = []
        self._shards = {shard.name: shard for shard in shards if shard.written}
        names = [job.name for shard in shards for job in shard.jobs if job.name in published.tensors]
        places = [published.tensors[name] for name in names]
        tickets = [Ticket(published.located, place.file, place.start, place.stop) for place in places]
        self._tickets = {name: number for number, name in enumerate(names)}
        self._reader: Reader = published.store.reader(tickets, _READ_AHEAD_BYTES)

    def open(self, name: str) -> Outlet:
        """The comparison of one shard; of a file beside it the checksum is compared."""
        return _Stream(self, self._shards[name]) if name in self._shards else _Passed()

    def take(self, shard: WrittenShard, note: str = "") -> None:
        """Note what its checksum has to be."""
        self.made[shard.name] = shard.sha256

    def theirs(self, job: Job, start: int, size: int) -> bytearray | None:
        """The published bytes of a tensor; None where it is not published as the plan has it."""
        number = self._tickets.get(job.name)
        if number is None:
            return None
        data = bytearray(size)
        self._reader.read(number, start, memoryview(data))
        return data

    def close(self) -> None:
        """Let go of what was published."""
        self._reader.close()


class _Passed:
    """Bytes of which no more is wanted than their checksum."""

    def write(self, data: memoryview, /) -> int:
        return len(data)

    def close(self) -> None:
        """Nothing is held."""


class _Stream:
    """The bytes of a shard on their way: its header, then one tensor after the other."""

    def __init__(self, against: Against, shard: Shard) -> None:
        self._against, self._shard = against, shard
        self._header = shard.header_size
        self._jobs = iter([job for job in shard.jobs if job.nbytes])
        self._job: Job | None = None
        self._place = 0
        self._found: list[Mismatch | None] = []

    def write(self, data: memoryview, /) -> int:
        if self._header:
            size = min(len(data), self._header)
            self._header -= size
            return size
        if self._job is None:
            self._job, self._place = next(self._jobs), 0
        size = min(len(data), self._job.nbytes - self._place)
        self._compare(self._job, data[:size])
        return size

    def _compare(self, job: Job, data: memoryview) -> None:
        theirs = self._against.theirs(job, self._place, len(data))
        if theirs is not None:
            self._found.append(difference(self._shard.name, job, self._place, data, theirs))
        self._place += len(data)
        if self._place == job.nbytes:
            if (found := join_mismatches(self._found, job.entries)) is not None:
                self._against.differences.append(found)
            self._job, self._found = None, []

    def close(self) -> None:
        """The next shard follows."""
