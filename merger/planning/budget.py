"""What a run takes: each rule of bytes of memory and of disk; and as much of both as a run may use.

Not here: which tensors are made of which (jobs), and what measuring a result takes (evaluation.budget).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, product

from merger.errors import BudgetError, Problem
from merger.methods.registry import Method
from merger.methods.steps.step import TILE
from merger.models.architecture import is_buffer
from merger.models.checkpoint import ITEM_BYTES, TensorInfo
from merger.models.formats.fp8 import Fp8File
from merger.models.gguf.layout import GgufFile
from merger.models.mixtures import EMBEDDING, GATE, STACK
from merger.planning.inputs.base import PASSTHROUGH, Job, Operand, StageTensor, Stored
from merger.planning.inputs.derived import Routed
from merger.planning.inputs.rows import held_bytes
from merger.planning.jobs.blocks import BLOCK_ENTRIES, COPY_BYTES, below, block_entries, needs, spooled, stages_of
from merger.planning.stage_model import StagedRecipe
from merger.safety.numbers import DOWN, UP, size, typed_size
from merger.stores.ports import HELD_BYTES

SHARD_BYTES = 5_000_000_000

GGUF_BYTES = 45_000_000_000
"""For GGUF alone, which few programs read in parts; the Hub takes files of 50 GB."""

BLOCKS_IN_FLIGHT = 4
"""How many finished or half-made blocks a thread may be ahead of the writing."""

JOBS_AHEAD = 2
"""How many tensors a thread may have measured before their blocks are made: more would only hold more disk."""

READ_AHEAD_BYTES = 256 << 20

_LEAST_READ_AHEAD = 64 << 20

KEPT_BYTES = 512 << 20
"""So much of what is read twice from the Hub stays in memory; the rest waits on disk."""

BASELINE_BYTES, _TORCH_BYTES = 256 << 20, 200 << 20
"""Of the first 40 MB are for steps that are compiled on the way, by the first run on a machine."""

_BYTES_A_JOB = 6_000

_TOLD = 3
"""How many of the things that take memory a refusal names, the largest first."""

_BYTES_QUANTISED = 24
"""For an entry that is written to a GGUF file, or in fp8: as it is stored, twice, in float32, twice, and rounded."""

_COMMITTED_BYTES, _TIMES_COMMITTED = 10_000_000, 3
"""The Hub takes files beyond that as large ones, piece by piece; the others are text in the commit."""

_TIMES_PARSED = 8
"""How many times its size a tokenizer.json takes in memory while it is read or written: 6.4 to 6.8 were measured."""

_SEARCH_BYTES = 21 << 20
"""What a search for ranks holds of an input: a sample, and what lies between two values (`methods.steps.select`)."""

_SUMS_BYTES = 1 << 20


@dataclass(frozen=True)
class Budget:
    """What a run may use.

    Args:
        memory: bytes of memory; None: whatever is needed.
        threads: how many threads compute.
        shard_bytes: the largest size of a shard's tensors.
        sending: bytes of memory that sending shards away takes.
    """

    memory: int | None = None
    threads: int = 1
    shard_bytes: int = SHARD_BYTES
    sending: int = 0


@dataclass(frozen=True)
class Takes:
    """What a run takes.

    Args:
        threads: how many threads compute.
        read_ahead: bytes that may be held of what is read from the Hub ahead of need.
        kept: bytes that may be held of tensors that are read twice from the Hub.
        peak_memory: the most bytes of memory that the run will use.
        read_bytes: how many bytes of tensors are read.
        spool: the most bytes of temporary disk for tensors that are read twice, and for what stages make.
    """

    threads: int
    read_ahead: int
    kept: int
    peak_memory: int
    read_bytes: int
    spool: int


@dataclass(frozen=True)
class Workload:
    """What there is to do, as far as it takes memory or disk.

    Args:
        locked: the recipe and its models.
        table: the merge methods by name.
        jobs: how each tensor is made.
        left_out: how many tensors of the models nothing is made of.
        passed: the sizes of the files that are passed on.
        gguf: the files of one shard that are written as GGUF.
        fp8: the shards' own that are written in eight bits, one after the other.
    """

    locked: StagedRecipe
    table: Mapping[str, Method]
    jobs: tuple[Job, ...]
    left_out: int
    passed: Sequence[int]
    gguf: Sequence[GgufFile]
    fp8: Sequence[Fp8File]


def allot(work: Workload, budget: Budget) -> Takes:
    """As many threads and as much read-ahead as fit into the memory, and what is kept there or on disk.

    Raises:
        BudgetError: not even the least fits.
    """
    locked, jobs, table = work.locked, work.jobs, work.table
    remote = frozenset(number for number, model in enumerate(locked.models) if model.located.commit is not None)
    jobs_ahead = budget.threads * JOBS_AHEAD
    made, all_of_it = (_most_at_once(jobs, table, models, jobs_ahead) for models in (frozenset[int](), remote))
    read_bytes = sum(job_read_bytes(job) for job in jobs) + router_read_bytes(locked, jobs)
    on_disk = max((spool(job, table, remote) for job in _for_routers(locked, jobs)), default=0)
    kept = min(KEPT_BYTES, all_of_it) if all_of_it > made else 0
    buffers = (READ_AHEAD_BYTES, _LEAST_READ_AHEAD) if remote else (0,)
    for ahead, threads, held in product(buffers, range(budget.threads, 0, -1), (kept, 0)):
        memory = {**_memory(work, threads, ahead, held), "what is sent at once": budget.sending}
        if budget.memory is None or sum(memory.values()) <= budget.memory:
            waits = made if held == all_of_it else all_of_it
            return Takes(threads, ahead, held, sum(memory.values()), read_bytes, max(on_disk, waits))
    least, there = sum(memory.values()), size(budget.memory or 0, DOWN)
    what = f"this merge needs {size(least, UP)} of memory, and {there} are allowed"
    largest = sorted(memory.items(), key=lambda item: -item[1])[:_TOLD]
    told = ", ".join(f"{size(nbytes)} for {name}" for name, nbytes in largest if nbytes)
    hint = f"raise --max-memory to {typed_size(least, UP)}, the least, with one thread and small buffers: {told}"
    raise BudgetError(Problem(what, hint=hint))


def disk_bytes(files: Sequence[int], spool: int, staged: bool) -> int:
    """The most bytes of disk that are in use at once.

    Args:
        files: the bytes of each shard's files.
        spool: those of what is kept for a while.
        staged: a shard is gone once it is uploaded.
    """
    return (min(2 * max(files, default=0), sum(files)) if staged else sum(files)) + spool


def job_read_bytes(job: Job) -> int:
    """How many bytes of tensors are read for a job."""
    return sum(stored.tensor.nbytes for stored in job.reads)


def _most_at_once(jobs: Sequence[Job], table: Mapping[str, Method], remote: frozenset[int], ahead: int) -> int:
    """The most bytes that are kept for a job, for those prepared ahead of it and for the one that is being ended."""
    nbytes = [spool(job, table, remote) for job in jobs]
    sums = [0, *accumulate(nbytes)]
    return max(sums[min(start + ahead + 2, len(nbytes))] - sums[start] for start in range(len(sums)))


def _memory(work: Workload, threads: int, read_ahead: int, kept: int) -> dict[str, int]:
    """The interpreter, each thread's buffers, finished blocks on their way out, and what is read ahead.

    Of what is computed before the first block: what that takes, if it is more, and what is held of it.
    """
    jobs, table = work.jobs, work.table
    taken = ((thread_memory(job, table), job.name) for job in jobs)
    thread, widest = max(taken, key=lambda item: item[0], default=(0, "no tensor"))
    largest = max((block_bytes(job, table[job.method]) for job in jobs), default=0)
    waiting = BLOCKS_IN_FLIGHT * threads * max(COPY_BYTES, largest)
    tensors = len(jobs) + work.left_out
    made = [*jobs, *(made.job for made in stages_of(jobs))]
    tokens = _tokenizer_memory(work.locked) + sum(held_bytes(source) for job in made for source in job.sources)
    before, held = router_memory(work.locked, jobs, table, threads)
    most, what = max(
        (threads * thread + waiting, f"the work on {widest}"),
        (before, "what is worked out before the first tensor"),
        (_side_memory(work.passed), "the files beside the tensors"),
    )
    return {
        "Python and its libraries": BASELINE_BYTES + _TORCH_BYTES * takes_torch(made, table),
        what: most + held,
        "what is read ahead": 2 * read_ahead,
        "what is read twice": kept,
        f"the list of {tensors:,} tensors": _BYTES_A_JOB * tensors,
        "tokenizers": tokens,
        "GGUF": sum(map(_gguf_memory, work.gguf)),
        "fp8": max(map(_writing_memory, work.fp8), default=0),
    }


def _side_memory(passed: Sequence[int]) -> int:
    """What is held of files that are passed on, once the tensors are done: in a commit as text, but for large ones."""
    small = sum(size for size in passed if size <= _COMMITTED_BYTES)
    return min(small, HELD_BYTES) + _TIMES_COMMITTED * small


def _gguf_memory(file: GgufFile) -> int:
    """Its metadata twice, for it is copied to be written, and of a tensor what is written at once."""
    return 2 * sum(map(len, file.metadata)) + _writing_memory(file)


def _writing_memory(file: GgufFile | Fp8File) -> int:
    """Of a tensor what is written at once."""
    return _BYTES_QUANTISED * max([BLOCK_ENTRIES, *(tensor.unit for tensor in file.tensors)])


def _tokenizer_memory(locked: StagedRecipe) -> int:
    """The models' tokenizers, and the largest of them taken apart to be read or written anew."""
    sizes = [sum(map(len, model.texts.values())) for model in locked.models]
    return sum(sizes) + _TIMES_PARSED * max(sizes)


def block_bytes(job: Job, method: Method) -> int:
    """How many bytes a block of a job's output takes."""
    return COPY_BYTES if job.is_copy else ITEM_BYTES[job.dtype] * block_entries(job, method)


def spool(job: Job, table: Mapping[str, Method], remote: frozenset[int]) -> int:
    """The bytes of temporary disk that a job holds from its preparing to its last block.

    Args:
        remote: the numbers of the models that are read from afar.
    """
    read = sum(stored.tensor.nbytes for stored in needs(job, table).kept if stored.model in remote) if remote else 0
    return read + sum(made.job.nbytes for made in spooled(job, tuple(below(job, set())), table))


def thread_memory(job: Job, table: Mapping[str, Method]) -> int:
    """The bytes that a thread takes for a job: its stages that are kept are made before, the others with it."""
    stages = tuple(below(job, set()))
    whole, taken = spooled(job, stages, table), dict[StageTensor, int]()
    for made in stages:
        taken[made] = _with_streamed(made.job, table, whole, taken)
    return max([_with_streamed(job, table, whole, taken), *(taken[made] for made in whole)])


def takes_torch(jobs: Sequence[Job], table: Mapping[str, Method]) -> bool:
    """Whether torch is imported for these: for routers from hidden states, and for methods that want it."""
    hidden = any(router.mode != EMBEDDED for router in routers_of(jobs))
    return hidden or any(table[job.method].needs == "torch" for job in jobs)


def _with_streamed(
    job: Job, table: Mapping[str, Method], whole: frozenset[StageTensor], taken: Mapping[StageTensor, int]
) -> int:
    made = [source for source in job.sources if isinstance(source, StageTensor) and source not in whole]
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
    computing = max(source.workspace_bytes for source in sources) + _measured_bytes(job, block)
    return read * block + tiles * 4 * _tile_entries(job, method) + searching + computing


def _measured_bytes(job: Job, block: int) -> int:
    """A block of what was measured of each input; of what has another shape one whole, and its sum twice in float64.

    Of Gram matrices in blocks those of all inputs.
    """
    alike, others = ([each for each in job.statistics if (each.shape == job.shape) == same] for same in (True, False))
    in_blocks = sum(4 * each.tensor.entries for each in others if len(each.shape) == 3)
    return 4 * block * len(alike) + in_blocks + max((20 * each.tensor.entries for each in others), default=0)


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
    return [layer_jobs(locked, layer) for layer in range(count)]


def layer_jobs(locked: StagedRecipe, layer: int | None) -> list[Job]:
    """The trained tensors of a layer of the config model, in float32; for None those outside all stacks."""
    held = locked.config_model.layer(None if layer is None else STACK, layer)
    return [_whole(locked, tensor) for tensor in held if not is_buffer(tensor.name)]


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
    embedded = rows * of_a_row if isinstance(source, Stored) else job_read_bytes(table)
    return embedded + sum(job_read_bytes(job) for layer in layers(locked, routers) for job in layer)


def _for_routers(locked: StagedRecipe, jobs: Sequence[Job]) -> list[Job]:
    """What of the base model is made for the routers of these jobs, one tensor at a time."""
    routers = routers_of(jobs)
    return [embedding(locked), *(job for of in layers(locked, routers) for job in of)] if routers else []


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
    making = max(thread_memory(job, table) for job in _for_routers(locked, jobs))
    if not run:
        return making + 4 * states, held
    layer = max(sum(job.nbytes for job in of) for of in run)
    middle = next(job.shape[0] for job in run[0] if job.name == f"{STACK}.0.{GATE}")
    running = threads * max(texts) * (_HIDDEN_STATES * width + 4 * middle)
    return layer + max(making, 4 * running) + 4 * states, held + _TRANSFORMERS_BYTES


def _tokens(text: str) -> int:
    """The most tokens that a prompt can have, with the one that begins it."""
    return len(text.encode()) + 1
