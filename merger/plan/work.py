"""What it takes to make a tensor: the size of its blocks, what is computed first or read twice, and a thread's memory.

Not here: which tensors are made of which (jobs), and making them (engine).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from merger.checkpoints.architecture import matrix_shape
from merger.methods.registry import Method
from merger.plan.jobs import Job
from merger.plan.sources import Made, Stored, ends

BLOCK_ENTRIES = 1 << 19
"""How many entries of a tensor are worked on at once; fixed, so that no budget changes a bit of the result."""

_MEASURE_BYTES = 24 << 20


def block_entries(job: Job, method: Method) -> int:
    """How many entries of a job's output tensor are made at once."""
    if method.unit == "entries" or job.is_copy:
        return BLOCK_ENTRIES
    if method.unit == "matrix":
        return max(1, math.prod(matrix_shape(job.name, job.shape)))
    row = job.shape[-1] if len(job.shape) > 1 else job.entries
    return max(1, BLOCK_ENTRIES // row) * row if row else max(1, job.entries)


@dataclass(frozen=True)
class Needs:
    """What has to be there before a job's first block.

    Args:
        stages: the stages' tensors that it is made of, each after those that it is made of itself.
        spooled: those that are computed whole and kept on disk; the others are computed block by block, on the way.
        kept: the stored tensors that are read more than once: a copy of them is kept, if reading costs a transfer.
    """

    stages: tuple[Made, ...] = ()
    spooled: frozenset[Made] = frozenset()
    kept: tuple[Stored, ...] = ()


def needs(job: Job, table: Mapping[str, Method]) -> Needs:
    """What has to be there before a job's first block."""
    stages = tuple(dict.fromkeys(below(job, set())))
    jobs = (*(made.job for made in stages), job)
    uses = Counter(end for each in jobs for source in each.sources for end in ends(source) if isinstance(end, Made))
    streamed = {made for each in jobs for made in _streamed(each, table) if uses[made] == 1}
    reads = Counter(leaf for each in jobs for leaf in _read(each, table))
    return Needs(stages, frozenset(stages) - streamed, tuple(leaf for leaf, times in reads.items() if times > 1))


def below(job: Job, seen: set[Made]) -> Iterator[Made]:
    """The stages' tensors that a job is made of, each once, after those that it is made of itself."""
    for source in job.sources:
        for end in ends(source):
            if isinstance(end, Made) and end not in seen:
                seen.add(end)
                yield from below(end.job, seen)
                yield end


def _streamed(job: Job, table: Mapping[str, Method]) -> Iterator[Made]:
    """The stages' tensors that a job reads once, in just the blocks in which they are made."""
    if table[job.method].measure is None:
        size = block_entries(job, table[job.method])
        for source in job.sources:
            if isinstance(source, Made) and block_entries(source.job, table[source.job.method]) == size:
                yield source


def _read(job: Job, table: Mapping[str, Method]) -> Iterator[Stored]:
    """The stored tensors that a job reads itself, twice those that it reads more than once."""
    own = tuple(dict.fromkeys(end for source in job.sources for end in ends(source) if isinstance(end, Stored)))
    yield from own
    if table[job.method].measure is not None and not job.is_copy:
        yield from own
    yield from (leaf for source in job.sources for leaf in source.again if leaf in own)


def spool(job: Job, table: Mapping[str, Method], remote: frozenset[int]) -> int:
    """The bytes of temporary disk that a job holds from its preparing to its last block.

    Args:
        job: the job.
        table: the merge methods by name.
        remote: the numbers of the models that are read from afar.
    """
    wanted = needs(job, table)
    read = sum(leaf.tensor.nbytes for leaf in wanted.kept if leaf.model in remote)
    return read + sum(made.job.nbytes for made in wanted.spooled)


def memory(job: Job, table: Mapping[str, Method]) -> int:
    """The bytes that a thread takes for a job: its stages that are kept are made before, the others with it."""
    wanted = needs(job, table)
    taken: dict[Made, int] = {}
    for made in wanted.stages:
        taken[made] = _with_streamed(made.job, table, wanted, taken)
    whole = _with_streamed(job, table, wanted, taken)
    return max([whole, *(taken[made] for made in wanted.spooled)])


def _with_streamed(job: Job, table: Mapping[str, Method], wanted: Needs, taken: Mapping[Made, int]) -> int:
    made = [source for source in job.sources if isinstance(source, Made) and source not in wanted.spooled]
    return _own(job, table[job.method]) + max((taken[source] for source in made), default=0)


def _own(job: Job, method: Method) -> int:
    """An input as stored, all in float32, what the method holds besides, and its measuring."""
    sources = job.sources
    buffers = 2 + len(sources) + len(job.shared) + method.scratch
    measuring = len(sources) * _MEASURE_BYTES if method.measure else 0
    return buffers * 4 * block_entries(job, method) + max(source.scratch for source in sources) + measuring
