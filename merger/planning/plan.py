"""StagedRecipe -> Plan: shards and their jobs, peak memory, disk, bytes to read; all in integers.

Not here: how a tensor is made (jobs), and making it (engine).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import accumulate, groupby, islice, product
from operator import itemgetter, methodcaller
from typing import Any, Self

from merger.errors import BudgetError, Problem
from merger.lock import formats
from merger.lock.locked import LockedRecipe
from merger.methods.registry import Method
from merger.models.checkpoint import ITEM_BYTES, SINGLE
from merger.models.formats.safetensors import header, shard_name
from merger.models.gguf.layout import GgufFile
from merger.models.lora.adapter import CONFIG, TENSORS
from merger.models.side_files import module_of
from merger.planning.budget import (
    BLOCK_ENTRIES,
    COPY_BYTES,
    below,
    block_bytes,
    router_memory,
    router_read_bytes,
    router_spool,
    spool,
    takes_torch,
    thread_memory,
)
from merger.planning.inputs.base import Job, StageTensor
from merger.planning.inputs.rows import held_bytes
from merger.planning.jobs.common import JobSet
from merger.planning.jobs.make import make_jobs
from merger.planning.makers import moe
from merger.planning.makers.gguf import gguf_files, stacks
from merger.planning.makers.lora import make_lora
from merger.planning.makers.side_files import beside_adapter, left_out_files, other_pipelines, passed_files, texts
from merger.planning.makers.stages import with_stages
from merger.planning.stage_model import StagedRecipe, Texts
from merger.planning.tokens import Tokens
from merger.planning.unused_tensors import LeftOut, config, find_unused, notes
from merger.safety import numbers
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
"""For an entry that is written to a GGUF file: as it is stored, twice, in float32, twice, and rounded."""

_COMMITTED_BYTES, _TIMES_COMMITTED = 10_000_000, 3
"""The Hub takes files beyond that as large ones, piece by piece; the others are text in the commit."""

_TIMES_PARSED = 8
"""How many times its size a tokenizer.json takes in memory while it is read or written: 6.4 to 6.8 were measured."""


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
class Shard:
    """One output file: its name, the jobs that fill it, in the order of their places, and files made of the same.

    One that is not written as safetensors has the name of the first of those, which are all that there is of it.
    """

    name: str
    jobs: tuple[Job, ...]
    beside: tuple[GgufFile, ...] = ()
    written: bool = True

    @cached_property
    def size(self) -> int:
        """The file's size in bytes, header included."""
        return self.header_size + sum(job.nbytes for job in self.jobs)

    @property
    def header_size(self) -> int:
        """How many bytes stand in it before its tensors."""
        return len(header(self.jobs, self.name))

    @property
    def files(self) -> dict[str, int]:
        """The size by name of each file that is made with it, its own last."""
        return {file.name: file.size for file in self.beside} | ({self.name: self.size} if self.written else {})


@dataclass(frozen=True)
class Plan:
    """All that will be made, before a tensor's byte is read.

    Args:
        locked: the recipe and its models.
        shards: the output files.
        left_out: the tensors of the models that nothing is made of.
        notes: sentences on what was decided that no line of the recipe says.
        config: the output's config.json, of an adapter its adapter_config.json; empty: it has none.
        tokens: the result's vocabulary, where the recipe has a tokenizer block.
        texts: the small files beside the tensors.
        seed: for methods that draw random numbers.
        shard_bytes: the largest size of a shard's tensors.
        threads: how many threads compute.
        read_ahead: bytes that may be held of what is read from the Hub ahead of need.
        kept: bytes that may be held of tensors that are read twice from the Hub.
        peak_memory: the most bytes of memory that the run will use.
        read_bytes: how many bytes of tensors are read.
        spool: the most bytes of temporary disk for tensors that are read twice, and for what stages make.
        hash: names what is made: equal for equal results.
        format: by whose meaning it is hashed: ours, or that of the lock that it is made from again.
    """

    locked: StagedRecipe = field(repr=False)
    shards: tuple[Shard, ...] = field(repr=False)
    left_out: tuple[LeftOut, ...] = field(repr=False)
    notes: tuple[str, ...] = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)
    tokens: Tokens | None = field(repr=False)
    texts: Texts = field(repr=False)
    seed: int
    shard_bytes: int
    threads: int
    read_ahead: int
    kept: int
    peak_memory: int
    read_bytes: int
    spool: int
    hash: str
    format: int

    @property
    def config_name(self) -> str:
        """The name of the output's config, which makes it look like a model or like an adapter."""
        return "config.json" if self.locked.recipe.lora is None else CONFIG

    @property
    def left_beside(self) -> Mapping[str, str]:
        """The base's files beside its tensors that the result lacks, each with the reason."""
        return left_out_files(self.locked, self.texts)

    @property
    def doubts(self) -> list[str]:
        """Sentences on files beside the tensors that are of one parent, and other ones in others."""
        return other_pipelines(self.locked, self.texts)

    @cached_property
    def jobs(self) -> tuple[Job, ...]:
        """Every job in the order of the output."""
        return tuple(job for shard in self.shards for job in shard.jobs)

    @property
    def size(self) -> int:
        """How many bytes all files of tensors take."""
        return sum(self.files.values())

    @property
    def files(self) -> dict[str, int]:
        """The size by name of each file of tensors."""
        return {name: size for shard in self.shards for name, size in shard.files.items()}

    @property
    def gguf(self) -> dict[str, int]:
        """The size by name of each GGUF file."""
        return {file.name: file.size for shard in self.shards for file in shard.beside}

    @property
    def entries(self) -> int:
        """How many numbers the result holds."""
        return sum(job.entries for job in self.jobs)

    @property
    def nbytes(self) -> int:
        """How many bytes they take."""
        return sum(job.nbytes for job in self.jobs)

    @property
    def traffic(self) -> int:
        """How many bytes are read and written."""
        return self.read_bytes + self.size

    @cached_property
    def stages(self) -> tuple[StageTensor, ...]:
        """What stages make on the way, each once."""
        return _stages(self.jobs)

    def disk(self, staged: bool, shards: Sequence[Shard] | None = None) -> int:
        """The most bytes of disk that are in use at once, to make some of the shards or all.

        Args:
            staged: a shard is gone once it is uploaded.
            shards: those that are made; None: all.
        """
        sizes = [sum(shard.files.values()) for shard in (self.shards if shards is None else shards)]
        return (min(2 * max(sizes, default=0), sum(sizes)) if staged else sum(sizes)) + self.spool

    @property
    def identity(self) -> str:
        """Names what is made also where parents are folders, whose files may change without a trace in the hash."""
        stamps = [
            [(name, info.changed) for name, info in sorted(model.located.files.items())]
            for model in self.locked.models
            if model.located.commit is None
        ]
        return hashlib.sha256(json.dumps([self.hash, stamps]).encode()).hexdigest() if stamps else self.hash

    def as_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        content = {
            "hash": self.hash,
            "models": [
                {"model": str(model.ref), "commit": model.located.commit, "licence": model.licence}
                for model in self.locked.models
            ],
            "seed": self.seed,
            "threads": self.threads,
            "peak_memory": self.peak_memory,
            "disk": {"folder": self.disk(staged=False), "hub": self.disk(staged=True)},
            "read_bytes": self.read_bytes,
            "size": self.size,
            "config": self.config,
            "tokens": self.tokens
            and {
                "rows": self.tokens.rows,
                "new": self.tokens.new,
                "cut": self.tokens.cut,
                "source": self.tokens.source,
            },
            "side_files": list(self.texts.taken),
            "side_files_left_out": dict(self.left_beside),
            "shards": [{"name": shard.name, "size": shard.size, "jobs": shard.jobs} for shard in self.shards],
            "gguf": self.gguf,
            "stages": [
                {
                    "name": stage.name,
                    "seed": stage.seed,
                    "jobs": [made.job for made in self.stages if made.stage == number],
                }
                for number, stage in enumerate(self.locked.stages, len(self.locked.models))
            ],
            "left_out": [asdict(each) for each in self.left_out],
            "notes": self.notes,
        }
        plain: dict[str, Any] = json.loads(json.dumps(content, default=methodcaller("encode")))
        return plain


def make_plan(
    found: LockedRecipe,
    table: Mapping[str, Method],
    budget: Budget,
    seed: int | None = None,
    format: int | None = None,
) -> Plan:
    """Decide what will be made and what it takes.

    Args:
        found: the recipe and its models.
        table: the merge methods by name.
        budget: what the run may use.
        seed: in place of the recipe's own.
        format: of the lock that it is planned from again; None: ours.

    Raises:
        RecipeError, MismatchError: from `jobs.make`.
        BudgetError: it cannot fit into the memory.
    """
    lora = found.recipe.lora is not None
    locked = with_stages(found, table, seed)
    seed = locked.recipe.seed if seed is None else seed
    format = formats.FORMAT if format is None else format
    making, edited = _make_jobs(locked, table, seed)
    small = beside_adapter(locked, making.tokenizer_model) if lora else texts(locked, making.tokens)
    passed_files(locked, small)  # a file that is too large is told before all else is worked out
    shards = _whole_file(making.jobs) if lora else _files_of(locked, making.jobs, budget.shard_bytes)
    beside = gguf_files(locked, [shard.jobs for shard in shards], edited, small)
    shards = tuple(_with_beside(locked, *each) for each in zip(shards, beside, strict=True))
    remote = frozenset(number for number, model in enumerate(locked.models) if model.located.commit is not None)
    draft = Plan(
        locked=locked,
        shards=shards,
        left_out=tuple(find_unused(locked, making)),
        notes=notes(locked, making),
        config=edited,
        tokens=making.tokens,
        texts=small if locked.recipe.publish.safetensors else Texts({}),
        seed=seed,
        shard_bytes=budget.shard_bytes,
        threads=budget.threads,
        read_ahead=READ_AHEAD_BYTES if remote else 0,
        kept=0,
        peak_memory=0,
        read_bytes=sum(stored.tensor.nbytes for job in making.jobs for stored in job.reads)
        + router_read_bytes(locked, making.jobs),
        spool=router_spool(locked, making.jobs, table, remote),
        hash=_hash(locked, shards, edited, seed, small, format),
        format=format,
    )
    ahead = budget.threads * JOBS_AHEAD
    made, all_of_it = (_most_at_once(draft.jobs, table, models, ahead) for models in (frozenset[int](), remote))
    return _fit(draft, table, budget, made, all_of_it)


def _whole_file(jobs: tuple[Job, ...]) -> tuple[Shard, ...]:
    """An adapter: one file, whatever its size. A and B stay side by side, for they are made together."""
    return (Shard(TENSORS, _align(jobs)),)


def _files_of(locked: StagedRecipe, jobs: tuple[Job, ...], limit: int) -> tuple[Shard, ...]:
    """The jobs in files as the config model's are, where as many are needed and all fit in; else cut by size alone."""
    config_owner = locked.config_owner
    ordered, files = _in_file_order(jobs, locked.owner(locked.index(config_owner.ref)))
    within = {job.name: module_of(job.name) if config_owner.pipeline else "" for job in ordered}
    modules = [
        Shard(f"{folder}/{SINGLE}", _align([job for job in ordered if within[job.name] == folder]))
        for folder in dict.fromkeys(filter(None, within.values()))  # loaders know no second file of a module
    ]
    own = [job for job in ordered if not within[job.name]]
    files = [held for file in files if (held := [job for job in file if not within[job.name]])]
    together = stacks(locked, own)
    groups, alone = _cut(together, limit), len(together) == len(own)
    small = all(sum(job.nbytes for job in file) <= limit for file in files if len(file) > 1)
    if alone and small and len(files) == len(groups):
        groups = files
    if modules and not any(groups):
        return tuple(modules)
    names = (shard_name(number, len(groups), config_owner.checkpoint.stem) for number in range(1, len(groups) + 1))
    return (*(Shard(name, _align(group)) for name, group in zip(names, groups, strict=True)), *modules)


def _with_beside(locked: StagedRecipe, shard: Shard, files: tuple[GgufFile, ...]) -> Shard:
    written = locked.recipe.publish.safetensors
    return replace(shard, name=shard.name if written else files[0].name, beside=files, written=written)


def _make_jobs(locked: StagedRecipe, table: Mapping[str, Method], seed: int) -> tuple[JobSet, Mapping[str, Any]]:
    """The jobs, and the output's config.json."""
    if locked.recipe.mixture is not None:
        return moe.make_mixture(locked, locked.recipe.mixture, seed)
    making = make_jobs(locked, table) if locked.recipe.lora is None else make_lora(locked, table, seed)
    return making, config(locked, making)


def _most_at_once(jobs: Sequence[Job], table: Mapping[str, Method], remote: frozenset[int], ahead: int) -> int:
    """The most bytes that are kept for a job, for those prepared ahead of it and for the one that is being ended."""
    nbytes = [spool(job, table, remote) for job in jobs]
    sums = [0, *accumulate(nbytes)]
    return max(sums[min(start + ahead + 2, len(nbytes))] - sums[start] for start in range(len(sums)))


def _in_file_order(jobs: tuple[Job, ...], config_model: int) -> tuple[tuple[Job, ...], list[list[Job]]]:
    """The jobs as the config model's files hold its tensors, if each job reads one of them, and those of each file;
    else as they stand.

    A file that is read front to back needs few requests, and its SHA-256 can be checked on the way.
    """
    found = [(place, job) for job in jobs for place in islice(_places(job, config_model), 1)]
    if len(found) < len(jobs):
        return jobs, []
    ordered = sorted(found, key=itemgetter(0))
    files = [[job for _, job in of] for _, of in groupby(ordered, lambda each: each[0][0])]
    return tuple(job for _, job in ordered), files


def _places(job: Job, model: int) -> Iterator[tuple[str, int]]:
    """Where the files of a model hold what a job reads of it."""
    read = (stored for source in job.sources for stored in source.stored_tensors)
    return ((stored.tensor.file, stored.tensor.start) for stored in read if stored.model == model)


def _cut(stacks: Sequence[Sequence[Job]], limit: int) -> list[list[Job]]:
    """The jobs of files of at most `limit` bytes; what is larger, and stays together, has a file of its own."""
    groups: list[list[Job]] = [[]]
    held = 0
    for stack in stacks:
        size = sum(job.nbytes for job in stack)
        if groups[-1] and held + size > limit:
            groups.append([])
            held = 0
        groups[-1] += stack
        held += size
    return groups


def _align(jobs: Sequence[Job]) -> tuple[Job, ...]:
    """Loaders want each tensor aligned to its own item size; larger items first keep them so."""
    return tuple(sorted(jobs, key=lambda job: -ITEM_BYTES[job.dtype]))


def _fit(draft: Plan, table: Mapping[str, Method], budget: Budget, made: int, all_of_it: int) -> Plan:
    """The plan with as many threads and as much read-ahead as fit into the memory, and what is kept there or on disk.

    Args:
        draft, table, budget: the plan without them, the methods, and what it may use.
        made: the most bytes that are kept at once of what stages make.
        all_of_it: and of what is read twice from the Hub beside it.
    """
    least, kept = _LEAST_READ_AHEAD if draft.read_ahead else 0, min(KEPT_BYTES, all_of_it) if all_of_it > made else 0
    for ahead, threads, held in product((draft.read_ahead, least), range(draft.threads, 0, -1), (kept, 0)):
        on_disk = max(draft.spool, made if held == all_of_it else all_of_it)
        candidate = replace(draft, threads=threads, read_ahead=ahead, kept=held, spool=on_disk)
        candidate = replace(candidate, peak_memory=_peak_memory(candidate, table) + budget.sending)
        if budget.memory is None or candidate.peak_memory <= budget.memory:
            return candidate
    takes = {**_takes(candidate, table), "what is sent at once": budget.sending}
    what = f"this merge needs {candidate.peak_memory:,} bytes of memory, and {budget.memory:,} are allowed"
    largest = sorted(takes.items(), key=lambda item: -item[1])[:_TOLD]
    told = ", ".join(f"{nbytes:,} for {name}" for name, nbytes in largest if nbytes)
    hint = f"raise --max-memory: this is the least, with one thread and small buffers: {told}"
    raise BudgetError(Problem(what, hint=hint))


def _peak_memory(plan: Plan, table: Mapping[str, Method]) -> int:
    return sum(_takes(plan, table).values())


def _takes(plan: Plan, table: Mapping[str, Method]) -> dict[str, int]:
    """The interpreter, each thread's buffers, finished blocks on their way out, and what is read ahead.

    Of what is computed before the first block: what that takes, if it is more, and what is held of it.
    """
    taken = ((thread_memory(job, table), job.name) for job in plan.jobs)
    thread, widest = max(taken, key=lambda item: item[0], default=(0, "no tensor"))
    largest = max((block_bytes(job, table[job.method]) for job in plan.jobs), default=0)
    waiting = BLOCKS_IN_FLIGHT * plan.threads * max(COPY_BYTES, largest)
    jobs = _BYTES_A_JOB * (len(plan.jobs) + len(plan.left_out))
    made = [*plan.jobs, *(made.job for made in plan.stages)]
    tokens = _tokenizer_memory(plan) + sum(held_bytes(source) for job in made for source in job.sources)
    before, kept = router_memory(plan.locked, plan.jobs, table, plan.threads)
    work, what = max(
        (plan.threads * thread + waiting, f"the work on {widest}"),
        (before, "what is worked out before the first tensor"),
        (_side_memory(plan), "the files beside the tensors"),
    )
    return {
        "Python and its libraries": BASELINE_BYTES + _TORCH_BYTES * takes_torch(made, table),
        what: work + kept,
        "what is read ahead": 2 * plan.read_ahead,
        "what is read twice": plan.kept,
        f"the list of {len(plan.jobs) + len(plan.left_out):,} tensors": jobs,
        "tokenizers": tokens,
        "GGUF": sum(map(_gguf_memory, next(iter(plan.shards)).beside)),
    }


def _side_memory(plan: Plan) -> int:
    """What is held of files that are passed on, once the tensors are done: in a commit as text, but for large ones."""
    small = sum(info.size for info in passed_files(plan.locked, plan.texts) if info.size <= _COMMITTED_BYTES)
    return min(small, HELD_BYTES) + _TIMES_COMMITTED * small


def _gguf_memory(file: GgufFile) -> int:
    """Its metadata twice, for it is copied to be written, and of a tensor what is written at once."""
    unit = max((tensor.unit for tensor in file.tensors), default=0)
    return 2 * sum(map(len, file.metadata)) + _BYTES_QUANTISED * max(unit, BLOCK_ENTRIES)


def _tokenizer_memory(plan: Plan) -> int:
    """The models' tokenizers, and the largest of them taken apart to be read or written anew."""
    sizes = [sum(map(len, model.texts.values())) for model in plan.locked.models]
    return sum(sizes) + _TIMES_PARSED * max(sizes)


def _hash(
    locked: StagedRecipe, shards: tuple[Shard, ...], config: Mapping[str, Any], seed: int, small: Texts, format: int
) -> str:
    """Of all that decides the result's bytes: the inputs' identity, the jobs, the layout, the seed."""
    models = [
        {"where": model.located.commit or model.located.name, "files": _files(model.located.files)}
        for model in locked.models
    ]
    work = [[shard.name, shard.jobs] for shard in shards]
    content = {"format": format, "models": models, "shards": work, "config": config, "seed": seed}
    if written := small.encode():
        content["texts"] = written
    if locked.recipe.publish.gguf:
        content["gguf"] = [list(shard.files) for shard in shards]
    if locked.recipe.allow_non_finite:
        content["allow_non_finite"] = True
    if stages := _stages([job for shard in shards for job in shard.jobs]):
        content["stages"] = [[made, made.job] for made in stages]
    digest = hashlib.sha256()
    for text in _json(content):
        digest.update(text.encode())
    return digest.hexdigest()


def _json(content: Mapping[str, Any]) -> Iterator[str]:
    """The JSON of a map, shard by shard: in one text it would take as much memory as the jobs."""
    for number, (key, value) in enumerate(sorted(content.items())):
        yield f'{", " if number else "{"}"{key}": '
        if key == "shards":
            yield from (f"{', ' if place else '['}{_ENCODER.encode(shard)}" for place, shard in enumerate(value))
            yield "]" if value else "[]"
        else:
            yield _ENCODER.encode(value)
    yield "}"


def _stages(jobs: Sequence[Job]) -> tuple[StageTensor, ...]:
    """What stages make for these jobs, each once."""
    seen: set[StageTensor] = set()
    return tuple(made for job in jobs for made in below(job, seen))


def identify(job: Job) -> str:
    """What decides the bytes of a job's result, beside the plan's seed and the models' bytes."""
    return _ENCODER.encode([job, *([made, made.job] for made in below(job, set()))])


_ENCODER = json.JSONEncoder(sort_keys=True, check_circular=False, default=methodcaller("encode"))
"""Of what a job is made of."""


def _files(files: Mapping[str, Any]) -> list[tuple[str, int, str | None]]:
    return [(name, info.size, info.sha256) for name, info in sorted(files.items()) if name.endswith(".safetensors")]


# ---- parts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """The `number`-th of `count` parts, from 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """A part from what a user writes.

        >>> Part.parse("3/8")
        Part(number=3, count=8)

        Raises:
            ValueError: it is not written like that, or there is no such part.
        """
        first, _, second = text.partition("/")
        try:
            count = numbers.parse_whole(second, numbers.PARTS)
            return cls(numbers.parse_whole(first, numbers.Range(1, count)), count)
        except ValueError:
            told = numbers.quoted_short(text)
            raise ValueError(f"{told} is no part; write for example 3/8 for the third of eight") from None

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def share(shards: Sequence[Shard], part: Part | None) -> tuple[Shard, ...]:
    """The shards of a part, all for None: each shard, the largest first, goes to the part with the least to do so far.

    What a shard costs is taken to be the bytes that are read and written for it.
    """
    if part is None:
        return tuple(shards)
    loads = [0] * part.count
    mine = set()
    for place, shard in sorted(enumerate(shards), key=lambda item: -_work(item[1])):
        lightest = loads.index(min(loads))
        loads[lightest] += _work(shard)
        if lightest == part.number - 1:
            mine.add(place)
    return tuple(shard for place, shard in enumerate(shards) if place in mine)


def _work(shard: Shard) -> int:
    return sum(job.nbytes + sum(entry.tensor.nbytes for entry in job.reads) for job in shard.jobs)
