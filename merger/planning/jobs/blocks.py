"""In which blocks a job is made, which small jobs are made as one, and what has to be there before the first block.

Not here: which tensors are made of which (make), what a job takes (budget), and making it (engine).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from merger.methods.registry import Method
from merger.models.architecture import matrix_shape
from merger.planning.inputs.base import Input, Job, JoinedJob, Operand, StageTensor, Stored, unpack

BLOCK_ENTRIES = 1 << 19
"""How many entries of a tensor are worked on at once; fixed, so that no budget changes a bit of the result."""

COPY_BYTES = 4 * BLOCK_ENTRIES
"""How much of a tensor that is copied is read at once."""

JOINED_ENTRIES = 1 << 16
"""How many entries small tensors have together that are made as one: as many as are looked at without a gap."""


def block_entries(job: Job, method: Method) -> int:
    """How many entries of a job's output tensor are made at once."""
    if method.unit == "entries" or job.is_copy:
        return BLOCK_ENTRIES
    if method.unit == "matrix":
        return max(1, math.prod(matrix_shape(job.name, job.shape)))
    row = job.shape[-1] if len(job.shape) > 1 else job.entries
    return max(1, BLOCK_ENTRIES // row) * row if row else max(1, job.entries)


def join_small(jobs: Iterable[Job]) -> Iterator[Job]:
    """The jobs in their order, but as one those small ones that differ in nothing but which entries they take.

    One read, one task and one write do for all of them.
    """
    held, entries = list[Job](), 0
    for job in jobs:
        if held and (entries + job.entries > JOINED_ENTRIES or not _continues(held[-1], job)):
            yield _as_one(held)
            held, entries = [], 0
        held.append(job)
        entries += job.entries
    if held:
        yield _as_one(held)


def _continues(before: Job, job: Job) -> bool:
    """Whether a job differs from the one before only in that its inputs begin where that one's end."""
    if not (before.entries and job.entries) or before.statistics or job.statistics:
        return False
    alike = (before.method, before.dtype, before.settings) == (job.method, job.dtype, job.settings)
    if not alike or [of.settings for of in before.inputs] != [of.settings for of in job.inputs]:
        return False
    if len(before.sources) != len(job.sources) or (before.base is None) != (job.base is None):
        return False
    return all(map(_is_next, before.sources, job.sources))


def _is_next(before: Input, source: Input) -> bool:
    if not (isinstance(before, Stored) and isinstance(source, Stored) and before.model == source.model):
        return False
    last, tensor = before.tensor, source.tensor
    return (last.stop, last.file, last.dtype) == (tensor.start, tensor.file, tensor.dtype)


def _as_one(jobs: Sequence[Job]) -> Job:
    if len(jobs) == 1:
        return jobs[0]
    first, last, shape = jobs[0], jobs[-1], (sum(job.entries for job in jobs),)

    def span(begin: Operand, end: Operand) -> Operand:
        (stored,), (until,) = begin.source.stored_tensors, end.source.stored_tensors
        return replace(
            begin, source=replace(stored, tensor=replace(stored.tensor, shape=shape, stop=until.tensor.stop))
        )

    inputs = tuple(map(span, first.inputs, last.inputs))
    base = span(first.base, last.base) if first.base and last.base else None
    return JoinedJob(first.name, first.dtype, shape, first.method, inputs, base, first.settings, members=tuple(jobs))


@dataclass(frozen=True)
class Needs:
    """What has to be there before a job's first block.

    Args:
        stages: the stages' tensors that it is made of, each after those that it is made of itself.
        spooled: those that are computed whole and kept on disk; the others are computed block by block, on the way.
        kept: the stored tensors that are read more than once: a copy of them is kept, if reading costs a transfer.
    """

    stages: tuple[StageTensor, ...] = ()
    spooled: frozenset[StageTensor] = frozenset()
    kept: tuple[Stored, ...] = ()


def needs(job: Job, table: Mapping[str, Method]) -> Needs:
    """What has to be there before a job's first block."""
    stages = tuple(below(job, set()))
    jobs = (*(made.job for made in stages), job)
    reads = Counter(stored for each in jobs for stored in _read(each, table))
    kept = tuple(stored for stored, times in reads.items() if times > 1)
    return Needs(stages, spooled(job, stages, table), kept)


def spooled(job: Job, stages: tuple[StageTensor, ...], table: Mapping[str, Method]) -> frozenset[StageTensor]:
    """Those of the stages' tensors below a job that are computed whole, before it."""
    if not stages:
        return frozenset()
    jobs = (*(made.job for made in stages), job)
    uses = Counter(
        end for each in jobs for source in each.sources for end in unpack(source) if isinstance(end, StageTensor)
    )
    return frozenset(stages) - {made for each in jobs for made in _streamed(each, table) if uses[made] == 1}


def below(job: Job, seen: set[StageTensor]) -> Iterator[StageTensor]:
    """The stages' tensors that a job is made of, each once, after those that it is made of itself."""
    for source in job.sources:
        for end in () if isinstance(source, Stored) else unpack(source):
            if isinstance(end, StageTensor) and end not in seen:
                seen.add(end)
                yield from below(end.job, seen)
                yield end


def _streamed(job: Job, table: Mapping[str, Method]) -> Iterator[StageTensor]:
    """The stages' tensors that a job reads once, in just the blocks in which they are made."""
    if table[job.method].measure is None:
        size = block_entries(job, table[job.method])
        for source in job.sources:
            if isinstance(source, StageTensor) and block_entries(source.job, table[source.job.method]) == size:
                yield source


def _read(job: Job, table: Mapping[str, Method]) -> Iterator[Stored]:
    """The stored tensors that a job reads itself, twice those that it reads more than once."""
    own = tuple(dict.fromkeys(end for source in job.sources for end in unpack(source) if isinstance(end, Stored)))
    yield from own
    yield from job.statistics
    if table[job.method].measure is not None and not job.is_copy and not isinstance(job, JoinedJob):
        yield from own
    yield from (stored for source in job.sources for stored in source.reread if stored in own)


def stages_of(jobs: Sequence[Job]) -> tuple[StageTensor, ...]:
    """What stages make for these jobs, each once."""
    seen: set[StageTensor] = set()
    return tuple(made for job in jobs for made in below(job, seen))
