"""What it takes to make a tensor: the size of its blocks, what is computed first or read twice, and a thread's memory;
and what routers take that are computed from prompts.

Not here: which tensors are made of which (jobs), and making them (engine).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from merger.methods.registry import Method
from merger.methods.steps.step import TILE
from merger.models.architecture import is_buffer, matrix_shape
from merger.models.checkpoint import ITEM_BYTES, TensorInfo
from merger.models.mixtures import EMBEDDING, GATE, STACK
from merger.planning.inputs.base import PASSTHROUGH, Input, Job, JoinedJob, Operand, StageTensor, Stored, unpack
from merger.planning.inputs.derived import Routed
from merger.planning.stage_model import StagedRecipe

BLOCK_ENTRIES = 1 << 19
"""How many entries of a tensor are worked on at once; fixed, so that no budget changes a bit of the result."""

COPY_BYTES = 4 * BLOCK_ENTRIES
"""How much of a tensor that is copied is read at once."""

JOINED_ENTRIES = 1 << 16
"""How many entries small tensors have together that are made as one: as many as are looked at without a gap."""

_SEARCH_BYTES = 21 << 20
"""What a search for ranks holds of an input: a sample, and what lies between two values (`methods.steps.select`)."""

_SUMS_BYTES = 1 << 20


def block_entries(job: Job, method: Method) -> int:
    """How many entries of a job's output tensor are made at once."""
    if method.unit == "entries" or job.is_copy:
        return BLOCK_ENTRIES
    if method.unit == "matrix":
        return max(1, math.prod(matrix_shape(job.name, job.shape)))
    row = job.shape[-1] if len(job.shape) > 1 else job.entries
    return max(1, BLOCK_ENTRIES // row) * row if row else max(1, job.entries)


def block_bytes(job: Job, method: Method) -> int:
    """How many bytes a block of a job's output takes."""
    return COPY_BYTES if job.is_copy else ITEM_BYTES[job.dtype] * block_entries(job, method)


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
    if not (before.entries and job.entries):
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
    return Needs(stages, _spooled(job, stages, table), kept)


def _spooled(job: Job, stages: tuple[StageTensor, ...], table: Mapping[str, Method]) -> frozenset[StageTensor]:
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
    if table[job.method].measure is not None and not job.is_copy and not isinstance(job, JoinedJob):
        yield from own
    yield from (stored for source in job.sources for stored in source.reread if stored in own)


def spool(job: Job, table: Mapping[str, Method], remote: frozenset[int]) -> int:
    """The bytes of temporary disk that a job holds from its preparing to its last block.

    Args:
        job: the job.
        table: the merge methods by name.
        remote: the numbers of the models that are read from afar.
    """
    read = sum(stored.tensor.nbytes for stored in needs(job, table).kept if stored.model in remote) if remote else 0
    return read + sum(made.job.nbytes for made in _spooled(job, tuple(below(job, set())), table))


def thread_memory(job: Job, table: Mapping[str, Method]) -> int:
    """The bytes that a thread takes for a job: its stages that are kept are made before, the others with it."""
    stages = tuple(below(job, set()))
    spooled, taken = _spooled(job, stages, table), dict[StageTensor, int]()
    for made in stages:
        taken[made] = _with_streamed(made.job, table, spooled, taken)
    whole = _with_streamed(job, table, spooled, taken)
    return max([whole, *(taken[made] for made in spooled)])


def takes_torch(jobs: Sequence[Job], table: Mapping[str, Method]) -> bool:
    """Whether torch is imported for these: for routers from hidden states, and for methods that want it."""
    hidden = any(router.mode != EMBEDDED for router in routers_of(jobs))
    return hidden or any(table[job.method].needs == "torch" for job in jobs)


def _with_streamed(
    job: Job, table: Mapping[str, Method], spooled: frozenset[StageTensor], taken: Mapping[StageTensor, int]
) -> int:
    made = [source for source in job.sources if isinstance(source, StageTensor) and source not in spooled]
    return _own(job, table[job.method]) + max((taken[source] for source in made), default=0)


def _own(job: Job, method: Method) -> int:
    """A block of each input as it is stored, or in float32 where it is computed; tiles of float32; and its measuring.

    Of tiles there is one an input, what is made of them, as many to look at, and what the method holds besides.
    """
    sources, block = job.sources, block_entries(job, method)
    plain = [source for source in sources if isinstance(source, (Stored, StageTensor))]
    read = sum(ITEM_BYTES[source.dtype] for source in plain) + 4 * (len(sources) - len(plain) + len(job.shared))
    tiles = 2 * (2 + len(sources)) + method.workspace
    searching = len(job.inputs) * (_SEARCH_BYTES if method.searches else _SUMS_BYTES) if method.measure else 0
    computing = max(source.workspace_bytes for source in sources)
    return read * block + tiles * 4 * _tile_entries(job, method) + searching + computing


def _tile_entries(job: Job, method: Method) -> int:
    """How many entries are computed with at once, of a block."""
    if method.unit == "entries":
        return TILE
    return block_entries(job, method) if method.unit == "matrix" or len(job.shape) < 2 else max(TILE, job.shape[-1])


# ---- routers from prompts -------------------------------------------------------------------------------------------


EMBEDDED = "cheap_embed"
"""The mode that needs no layer of the model."""

_TOKENIZER_BYTES = 64 << 20
_TRANSFORMERS_BYTES = 224 << 20
_HIDDEN_STATES = 16
"""How many states of a prompt a layer holds at once, its MLP's apart: queries, keys, values, what is added."""


def routers_of(jobs: Sequence[Job]) -> list[Routed]:
    """The routers that are computed from prompts for these jobs, in their order."""
    return [source for job in jobs for source in job.sources if isinstance(source, Routed)]


def prompts(routers: Sequence[Routed]) -> list[str]:
    """Every prompt of these once."""
    asked = [text for router in routers for sides in router.prompts for side in sides for text in side]
    return list(dict.fromkeys(asked))


def embedding(locked: StagedRecipe) -> Job:
    """The base model's embedding in float32; only rows of it are made."""
    return _whole(locked, locked.config_model.checkpoint.tensors[EMBEDDING])


def layers(locked: StagedRecipe, routers: Sequence[Routed]) -> list[list[Job]]:
    """The tensors of the layers that the prompts run through for these routers, each made of its layer's input."""
    count = max((router.layer for router in routers if router.mode != EMBEDDED), default=0)
    found = [locked.config_model.layer(STACK, layer) for layer in range(count)]
    return [[_whole(locked, tensor) for tensor in layer if not is_buffer(tensor.name)] for layer in found]


def _whole(locked: StagedRecipe, tensor: TensorInfo) -> Job:
    source = locked.source(locked.index(locked.config_model.ref), tensor)
    return Job(tensor.name, "F32", source.shape, PASSTHROUGH, (Operand(source, {"scale": 1.0}),))


def router_read_bytes(locked: StagedRecipe, jobs: Sequence[Job]) -> int:
    """How many bytes of tensors are read at most."""
    routers = routers_of(jobs)
    if not routers:
        return 0
    table = embedding(locked)
    rows = min(sum(_tokens(text) for text in prompts(routers)), table.shape[0])
    source = table.sources[0]
    of_a_row = table.shape[1] * ITEM_BYTES[source.dtype]
    embedded = rows * of_a_row if isinstance(source, Stored) else _read_routing(table)
    return embedded + sum(_read_routing(job) for layer in layers(locked, routers) for job in layer)


def _read_routing(job: Job) -> int:
    return sum(stored.tensor.nbytes for stored in job.reads)


def router_spool(locked: StagedRecipe, jobs: Sequence[Job], table: Mapping[str, Method], remote: frozenset[int]) -> int:
    """The most bytes of temporary disk that are held at once: one tensor's, as there is one at a time."""
    routers = routers_of(jobs)
    if not routers:
        return 0
    made = [embedding(locked), *(job for of in layers(locked, routers) for job in of)]
    return max(spool(job, table, remote) for job in made)


def router_memory(
    locked: StagedRecipe, jobs: Sequence[Job], table: Mapping[str, Method], threads: int
) -> tuple[int, int]:
    """The most bytes that computing the routers takes at once, and what is held from then on, beside that."""
    routers = routers_of(jobs)
    if not routers:
        return 0, 0
    first, run = embedding(locked), layers(locked, routers)
    width, texts = first.shape[1], [_tokens(text) for text in prompts(routers)]
    states = 2 * sum(texts) * width
    held = 4 * sum(len(router.prompts) * router.width for router in routers) + _TOKENIZER_BYTES
    making = max(thread_memory(job, table) for job in (first, *(job for of in run for job in of)))
    if not run:
        return making + 4 * states, held
    layer = max(sum(job.nbytes for job in of) for of in run)
    middle = next(job.shape[0] for job in run[0] if job.name == f"{STACK}.0.{GATE}")
    running = threads * max(texts) * (_HIDDEN_STATES * width + 4 * middle)
    return layer + max(making, 4 * running) + 4 * states, held + _TRANSFORMERS_BYTES


def _tokens(text: str) -> int:
    """The most tokens that a prompt can have, with the one that begins it."""
    return len(text.encode()) + 1
