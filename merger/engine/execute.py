"""Plan + Reader + Taker -> a finished model: the loop. Yields what happens, so that shells can show it.

Blocks are made by threads, in the plan's order, a few ahead; this loop hashes and writes them in that order.
Not here: what a block is made of (blocks).
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from merger import runtime, system
from merger.engine.finite import NotFinite, explain
from merger.engine.forms import Fp8Writer, GgufWriter, TensorWriter
from merger.engine.joined import start_work
from merger.engine.runner import Work, blocks
from merger.engine.spool import Allowance
from merger.engine.tensors import Block, Bytes, Memo, RunSetup
from merger.errors import BudgetError, Problem
from merger.methods.registry import Method
from merger.models.checkpoint import ITEM_BYTES
from merger.models.formats.safetensors import ShardWriter, WrittenShard, header
from merger.planning.budget import BLOCKS_IN_FLIGHT, JOBS_AHEAD, block_bytes, routers_of, takes_torch
from merger.planning.geometry import Geometry, dump_geometry
from merger.planning.inputs.base import Job
from merger.planning.inputs.derived import Routed
from merger.planning.jobs.blocks import COPY_BYTES, join_small, needs
from merger.planning.plan import Plan
from merger.planning.shards import Shard
from merger.stores.ports import Store, Taker, Ticket


@dataclass(frozen=True)
class BytesWritten:
    """Some bytes of the output were written."""

    nbytes: int
    job: Job


@dataclass(frozen=True)
class ShardDone:
    """A shard is finished and handed over."""

    shard: WrittenShard


@dataclass(frozen=True)
class Observed:
    """A tensor is merged: how its parents and the result lie to each other."""

    job: Job
    geometry: Geometry


@dataclass(frozen=True)
class Doubted:
    """Why the result may be of less use than it was meant to be, in a sentence."""

    what: str


Event = BytesWritten | Observed | ShardDone | Doubted


def tickets(plan: Plan, shards: Sequence[Shard], table: Mapping[str, Method]) -> list[Ticket]:
    """All that is read to make these shards, in that order: each job's inputs, then its base."""
    found: list[Ticket] = []
    for job in (job for shard in shards for job in shard.jobs):
        turn = None if needs(job, table).kept else len(found)  # one that is kept is read whole before the next
        for stored in job.reads:
            located, tensor = plan.locked.models[stored.model].located, stored.tensor
            found.append(Ticket(located, tensor.file, tensor.start, tensor.stop, turn))
    return found


def execute(
    plan: Plan, shards: Sequence[Shard], table: Mapping[str, Method], store: Store, sink: Taker, device: str = "cpu"
) -> Iterator[Event]:
    """Make some of the plan's shards, one after the other.

    Args:
        sink: what takes the shards.
        device: ``cpu`` or ``cuda``.

    Raises:
        ModelError: bytes of a model cannot be read.
        MismatchError: a result is not finite.
        BudgetError: there is no such device, or the disk is full.
        UploadError: the sink refuses a shard.
    """
    with make_blocks(plan, shards, table, store, device) as making:
        yield from map(Doubted, making.doubts)
        for shard in making.shards:
            yield from _shard(sink, shard, table, making.blocks)


@dataclass(frozen=True)
class UnderWay:
    """Shards under way.

    Args:
        shards: they, small jobs put together as they are made.
        blocks: those of all their jobs in turn, each good until the next one is asked for.
        doubts: why the result may be of less use.
    """

    shards: Sequence[Shard]
    blocks: Iterator[tuple[memoryview, Work]]
    doubts: Sequence[str] = ()


@contextmanager
def make_blocks(
    plan: Plan,
    shards: Sequence[Shard],
    table: Mapping[str, Method],
    store: Store,
    device: str,
    memo: Memo | None = None,
    place: Callable[[Job], Bytes | None] = lambda job: None,
) -> Iterator[UnderWay]:
    """Make the blocks of some of the plan's shards, as `execute` has them, wherever they go.

    Args:
        plan, shards, table, store, device: as of `execute`.
        memo: what earlier makings of the same models measured, and who looks at no result; None: all is looked at.
        place: where all bytes of a job, one or made of small ones, belong; None: in a buffer.

    Raises:
        ModelError, MismatchError, BudgetError: as `execute` does.
    """
    jobs = [job for shard in shards for job in shard.jobs]
    if device != "cpu" or takes_torch(jobs, table):
        import torch

        if device != "cpu" and not torch.cuda.is_available():
            hint = "leave out --device cuda"
            raise BudgetError(Problem("this machine has no CUDA device that torch can use", hint=hint))
    routers, doubts, joined = dict[Routed, Any](), list[str](), shards
    try:
        with single_threaded():
            if routers_of(jobs):
                from merger.engine import router_init

                routers |= router_init.gates(plan, jobs, table, store)
                doubts += router_init.doubts(routers)
            if not plan.locked.recipe.allow_non_finite:  # what is odd is counted tensor by tensor
                joined = [replace(shard, jobs=tuple(join_small(shard.jobs))) for shard in shards]
            reader = store.reader(tickets(plan, joined, table), plan.read_ahead)
            with closing(reader), _Pool(plan.threads, place) as pool:
                allow, memory = plan.locked.recipe.allow_non_finite, Allowance(plan.kept)
                run = RunSetup(table, reader, plan.seed, device, routers, allow, memory, memo)
                yield UnderWay(joined, pool.in_order(_works(joined, run)), doubts)
    except NotFinite as found:
        beside = next((shard.jobs for shard in shards if found.job in shard.jobs), ())
        raise explain(found, plan, beside, store) from found.__cause__


@contextmanager
def single_threaded() -> Iterator[None]:
    """One thread a block: the libraries' own threads cost more than they give on small blocks."""
    threads = None if (torch := sys.modules.get("torch")) is None else torch.get_num_threads()
    try:
        with runtime.single_threaded_blas():
            if torch is not None:
                torch.set_num_threads(1)
            yield
    finally:
        if (torch := sys.modules.get("torch")) is not None:
            torch.set_num_threads(threads or system.cores())


def _works(shards: Sequence[Shard], run: RunSetup) -> Iterator[Work]:
    first = 0
    for job in (job for shard in shards for job in shard.jobs):
        yield start_work(job, run, first)
        first += len(job.reads)


def _shard(
    sink: Taker, shard: Shard, table: Mapping[str, Method], made: Iterator[tuple[memoryview, Work]]
) -> Iterator[Event]:
    seen: dict[str, Geometry] = {}
    try:
        with ExitStack() as stack:
            written_jobs = [member for job in shard.jobs for member, _ in job.parts]
            made_files = (GgufWriter(file, sink.open(file.name), written_jobs) for file in shard.beside)
            writers: list[TensorWriter[Any] | ShardWriter] = [stack.enter_context(each) for each in made_files]
            if shard.fp8 is not None:
                writers.append(stack.enter_context(Fp8Writer(shard.fp8, sink.open(shard.name), written_jobs)))
            if shard.written:
                start = header(written_jobs, shard.name)
                size = len(start) + sum(member.nbytes for member in written_jobs)
                writers += [stack.enter_context(ShardWriter(shard.name, sink.open(shard.name), start, size))]
            for job in shard.jobs:
                for _ in blocks(job, table[job.method]):
                    data, work = next(made)
                    for writer in writers:
                        writer.write(data)
                    yield BytesWritten(len(data), job)
                for member, found in work.seen() if job.entries and job.reads else ():
                    seen[member.name] = found
                    yield Observed(member, found)
            *others, last = [writer.close() for writer in writers]
    except OSError as error:
        raise runtime.refusal(f"{shard.name} cannot be written", error, BudgetError, "look at its disk") from None
    for other in others:
        sink.take(other)
        yield ShardDone(other)
    sink.take(last, dump_geometry(seen))
    yield ShardDone(last)


_Waiting = tuple[Future[memoryview], Bytes, Work, bool]
"""A block under way, its buffer, its job, and whether it is the job's last."""


class _Pool:
    """Threads that measure tensors and make blocks, and the ring of buffers the blocks are made in."""

    def __init__(self, threads: int, place: Callable[[Job], Bytes | None]) -> None:
        self._place = place
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="merge")
        self._free = deque(np.empty(COPY_BYTES, np.uint8) for _ in range(threads * BLOCKS_IN_FLIGHT))
        self._ahead = threads * JOBS_AHEAD
        self._open: list[Work] = []

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        for work in self._open:
            work.close()

    def in_order(self, works: Iterator[Work]) -> Iterator[tuple[memoryview, Work]]:
        """Each block of each job in turn, made a few ahead; a block is good until the next one is asked for."""
        waiting: deque[_Waiting] = deque()
        for work, block, last in self._prepare_early(works):
            if not self._free:
                yield from self._first(waiting)
            buffer = self._free.popleft()
            place = self._place(work.job)
            if place is None and buffer.size < (needed := block_bytes(work.job, work.method)):
                buffer = np.empty(needed, np.uint8)
            begin = block.start * (1 if work.job.is_copy else ITEM_BYTES[work.job.dtype])
            out = buffer if place is None else place[begin:]
            waiting.append((self._threads.submit(work.make, block, out), buffer, work, last))
        while waiting:
            yield from self._first(waiting)

    def _first(self, waiting: deque[_Waiting]) -> Iterator[tuple[memoryview, Work]]:
        future, buffer, work, last = waiting.popleft()
        data = future.result()
        if last and work in self._open:
            self._open.remove(work)
            work.close()
        yield data, work
        self._free.append(buffer)

    def _prepare_early(self, works: Iterator[Work]) -> Iterator[tuple[Work, Block, bool]]:
        """The blocks of each job whose preparing is over; that of the next jobs runs meanwhile, one job a thread."""
        ahead: deque[Work] = deque()
        for work in works:
            if work.wants_preparing:
                self._open.append(work)
                work.prepared = self._threads.submit(work.prepare)
            ahead.append(work)
            if len(ahead) > self._ahead:
                yield from _blocks_of(ahead.popleft())
        while ahead:
            yield from _blocks_of(ahead.popleft())


def _blocks_of(work: Work) -> Iterator[tuple[Work, Block, bool]]:
    """The blocks of a job and whether each is the last; waits here, not on a thread, until it is prepared."""
    if work.prepared is not None:
        work.prepared.result()
    parts = blocks(work.job, work.method)
    for number, block in enumerate(parts, 1):
        yield work, block, number == len(parts)
