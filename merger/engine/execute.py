"""Plan + Reader + Sink -> a finished model: the loop. Yields what happens, so that shells can show it.

Blocks are made by threads, in the plan's order, a few ahead; this loop hashes and writes them in that order.
Not here: what a block is made of (blocks).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from merger.checkpoints.shard import ShardWriter, Written
from merger.engine.blocks import Block, Work, blocks
from merger.errors import BudgetError, Problem
from merger.methods.registry import Method
from merger.plan.jobs import Job
from merger.plan.plan import BLOCK_ENTRIES, BLOCKS_IN_FLIGHT, Plan, Shard
from merger.stores.ports import Reader, Sink, Store, Ticket


@dataclass(frozen=True)
class Made:
    """Some bytes of the output were written."""

    nbytes: int
    job: Job


@dataclass(frozen=True)
class ShardDone:
    """A shard is finished and handed to the sink."""

    shard: Written


Event = Made | ShardDone


def tickets(plan: Plan) -> list[Ticket]:
    """All that a run reads, in its order: each job's inputs, then its base."""
    return [
        Ticket(plan.locked.models[entry.model].located, entry.tensor.file, entry.tensor.start, entry.tensor.stop)
        for job in plan.jobs
        for entry in job.reads
    ]


def execute(plan: Plan, table: Mapping[str, Method], store: Store, sink: Sink, device: str = "cpu") -> Iterator[Event]:
    """Make the plan's shards, one after the other.

    Args:
        plan: what is made.
        table: the merge methods by name.
        store: where the models' bytes come from.
        sink: what takes the shards.
        device: ``cpu`` or ``cuda``.

    Raises:
        ModelError: bytes of a model cannot be read.
        MismatchError: a result is not finite.
        BudgetError: there is no such device, or the disk is full.
        UploadError: the sink refuses a shard.
    """
    place = _device(device)
    torch.set_num_threads(1)  # one thread a block: torch's own threads cost more than they give on small blocks
    with closing(store.reader(tickets(plan), plan.read_ahead)) as reader, _Pool(plan.threads) as pool:
        made = pool.in_order(_work(plan, table, reader, place))
        for shard in plan.shards:
            yield from _shard(sink, shard, table, made)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise BudgetError(Problem("this machine has no CUDA device that torch can use", hint="leave out --device cuda"))
    return torch.device(name)


def _work(plan: Plan, table: Mapping[str, Method], reader: Reader, device: torch.device) -> Iterator[Work]:
    first = 0
    for job in plan.jobs:
        yield Work(job, table[job.method], first, reader, plan.seed, device)
        first += len(job.reads)


def _shard(sink: Sink, shard: Shard, table: Mapping[str, Method], made: Iterator[memoryview]) -> Iterator[Event]:
    try:
        with ShardWriter(sink.workspace() / shard.name, shard.jobs) as writer:
            for job in shard.jobs:
                for _ in blocks(job, table[job.method]):
                    data = next(made)
                    writer.write(data)
                    yield Made(len(data), job)
            written = writer.close()
    except OSError as error:
        raise BudgetError(
            Problem(f"{shard.name} cannot be written ({error.strerror})", hint="free some disk")
        ) from None
    sink.take(written)
    yield ShardDone(written)


class _Pool:
    """Threads that make blocks, and the ring of buffers the blocks are made in."""

    def __init__(self, threads: int) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="merge")
        count = threads * BLOCKS_IN_FLIGHT
        self._free = deque(torch.empty(8 * BLOCK_ENTRIES, dtype=torch.uint8) for _ in range(count))
        self._open: list[Work] = []

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        for work in self._open:
            work.close()

    def in_order(self, works: Iterator[Work]) -> Iterator[memoryview]:
        """Each block of each job in turn, made a few ahead; a block is good until the next one is asked for."""
        waiting: deque[tuple[Future[memoryview], Tensor, Work | None]] = deque()
        for work, block, last in self._measured_early(works):
            if not self._free:
                yield from self._first(waiting)
            buffer = self._free.popleft()
            if buffer.numel() < 8 * (block.stop - block.start):
                buffer = torch.empty(8 * (block.stop - block.start), dtype=torch.uint8)
            waiting.append((self._threads.submit(work.make, block, buffer), buffer, work if last else None))
        while waiting:
            yield from self._first(waiting)

    def _first(self, waiting: deque[tuple[Future[memoryview], Tensor, Work | None]]) -> Iterator[memoryview]:
        future, buffer, ended = waiting.popleft()
        data = future.result()
        if ended in self._open:
            self._open.remove(ended)
            ended.close()
        yield data
        self._free.append(buffer)

    def _measured_early(self, works: Iterator[Work]) -> Iterator[tuple[Work, Block, bool]]:
        """The blocks of each job; the next job's measuring starts before this one's blocks, not after them."""
        ahead = next(works, None)
        self._start_measuring(ahead)
        while (work := ahead) is not None:
            ahead = next(works, None)
            self._start_measuring(ahead)
            parts = blocks(work.job, work.method)
            for number, block in enumerate(parts, 1):
                yield work, block, number == len(parts)

    def _start_measuring(self, work: Work | None) -> None:
        if work is not None and work.method.measure is not None and not work.job.is_copy:
            self._open.append(work)
            work.measured = self._threads.submit(work.measure)
