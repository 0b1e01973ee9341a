"""LockedRecipe -> Plan: shards and their jobs, peak memory, disk, bytes to read; all in integers.

Not here: how a tensor is made (jobs), and making it (engine).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from merger.checkpoints.adapter import CONFIG, TENSORS
from merger.checkpoints.checkpoint import ITEM_BYTES
from merger.checkpoints.shard import header, shard_name
from merger.checkpoints.sidefiles import side_files
from merger.errors import BudgetError, Problem
from merger.methods.registry import Method
from merger.plan.jobs import Job, make
from merger.plan.leftovers import LeftOut, config, left_out
from merger.plan.lock import LockedRecipe
from merger.plan.loras import make_lora
from merger.plan.sources import Stored

FORMAT = 1
"""Counts up whenever the same plan would give other bytes than before: part of every plan's hash."""

BLOCK_ENTRIES = 1 << 19
"""How many entries of a tensor are worked on at once; fixed, so that no budget changes a bit of the result."""

SHARD_BYTES = 5_000_000_000
BLOCKS_IN_FLIGHT = 4
"""How many finished or half-made blocks a thread may be ahead of the writing."""

JOBS_AHEAD = 2
"""How many tensors a thread may have measured before their blocks are made: more would only hold more disk."""

READ_AHEAD_BYTES = 256 << 20
_LEAST_READ_AHEAD = 64 << 20
_BASELINE_BYTES = 420 << 20
_MEASURE_BYTES = 24 << 20
_BYTES_A_JOB = 6_000


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
    """One output file: its name and the jobs that fill it, in the order of their places."""

    name: str
    jobs: tuple[Job, ...]

    @property
    def size(self) -> int:
        """The file's size in bytes, header included."""
        return len(header(self.jobs)) + sum(job.nbytes for job in self.jobs)


@dataclass(frozen=True)
class Plan:
    """All that will be made, before a tensor's byte is read.

    Args:
        locked: the recipe and its models.
        shards: the output files.
        left_out: the tensors of the models that nothing is made of.
        config: the output's config.json, of an adapter its adapter_config.json.
        side_files: the donor's files that are taken over.
        seed: for methods that draw random numbers.
        threads: how many threads compute.
        read_ahead: bytes that may be held of what is read from the Hub ahead of need.
        peak_memory: the most bytes of memory that the run will use.
        read_bytes: how many bytes of tensors are read.
        spool: the most bytes of temporary disk for tensors that are read twice.
        hash: names what is made: equal for equal results.
    """

    locked: LockedRecipe = field(repr=False)
    shards: tuple[Shard, ...] = field(repr=False)
    left_out: tuple[LeftOut, ...] = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)
    side_files: tuple[str, ...]
    seed: int
    threads: int
    read_ahead: int
    peak_memory: int
    read_bytes: int
    spool: int
    hash: str

    @property
    def config_name(self) -> str:
        """The name of the output's config, which makes it look like a model or like an adapter."""
        return "config.json" if self.locked.recipe.lora is None else CONFIG

    @property
    def jobs(self) -> tuple[Job, ...]:
        """Every job in the order of the output."""
        return tuple(job for shard in self.shards for job in shard.jobs)

    @property
    def size(self) -> int:
        """How many bytes all shards take."""
        return sum(shard.size for shard in self.shards)

    @property
    def entries(self) -> int:
        """How many numbers the result holds."""
        return sum(job.entries for job in self.jobs)

    def disk(self, staged: bool, shards: Sequence[Shard] | None = None) -> int:
        """The most bytes of disk that are in use at once, to make some of the shards or all.

        Args:
            staged: a shard is gone once it is uploaded.
            shards: those that are made; None: all.
        """
        sizes = [shard.size for shard in (self.shards if shards is None else shards)]
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
        return {
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
            "side_files": self.side_files,
            "shards": [
                {"name": shard.name, "size": shard.size, "jobs": [dataclasses.asdict(job) for job in shard.jobs]}
                for shard in self.shards
            ],
            "left_out": [dataclasses.asdict(item) for item in self.left_out],
        }


def plan(locked: LockedRecipe, table: Mapping[str, Method], budget: Budget, seed: int | None = None) -> Plan:
    """Decide what will be made and what it takes.

    Args:
        locked: the recipe and its models.
        table: the merge methods by name.
        budget: what the run may use.
        seed: in place of the recipe's own.

    Raises:
        RecipeError, MismatchError: from `jobs.make`.
        BudgetError: it cannot fit into the memory.
    """
    seed = locked.recipe.seed if seed is None else seed
    making = make(locked, table) if locked.recipe.lora is None else make_lora(locked, table, seed)
    edited = config(locked, making)
    shards = _whole_file(making.jobs) if locked.recipe.lora else _files_of(locked, making.jobs, budget.shard_bytes)
    remote = [number for number, model in enumerate(locked.models) if model.located.commit is not None]
    draft = Plan(
        locked=locked,
        shards=shards,
        left_out=tuple(left_out(locked, making)),
        config=edited,
        side_files=_side_files(locked),
        seed=seed,
        threads=budget.threads,
        read_ahead=READ_AHEAD_BYTES if remote else 0,
        peak_memory=0,
        read_bytes=sum(entry.tensor.nbytes for job in making.jobs for entry in job.reads),
        spool=_spool([job for shard in shards for job in shard.jobs], table, remote, budget.threads * JOBS_AHEAD),
        hash=_hash(locked, shards, edited, seed),
    )
    return _fitted(draft, table, budget)


def _side_files(locked: LockedRecipe) -> tuple[str, ...]:
    """The donor's; an adapter is used with its model's."""
    donor = locked.donor
    return () if locked.recipe.lora else side_files(donor.located.files, donor.checkpoint.config)


def _whole_file(jobs: tuple[Job, ...]) -> tuple[Shard, ...]:
    """An adapter: one file, whatever its size. A and B stay side by side, for they are made together."""
    return (Shard(TENSORS, _aligned(jobs)),)


def _files_of(locked: LockedRecipe, jobs: tuple[Job, ...], limit: int) -> tuple[Shard, ...]:
    return tuple(_shards(_in_file_order(jobs, locked.index(locked.donor.ref)), limit))


def _spool(jobs: Sequence[Job], table: Mapping[str, Method], remote: Collection[int], ahead: int) -> int:
    """The most bytes that a job and those prepared ahead of it hold on disk, because they are read twice."""
    held = [sum(leaf.tensor.nbytes for leaf in kept(job, table[job.method]) if leaf.model in remote) for job in jobs]
    sums = [0, *accumulate(held)]
    return max(sums[min(start + ahead + 1, len(held))] - sums[start] for start in range(len(sums)))


def kept(job: Job, method: Method) -> tuple[Stored, ...]:
    """The stored tensors of a job that are read more than once: a copy of them is kept, if that costs a transfer."""
    if method.measure is not None and not job.is_copy:
        return job.reads
    return tuple(dict.fromkeys(leaf for source in job.sources for leaf in source.again))


def _in_file_order(jobs: tuple[Job, ...], donor: int) -> tuple[Job, ...]:
    """The jobs as the donor's files hold its tensors, if each job reads one of them; else as they stand.

    A file that is read front to back needs few requests, and its SHA-256 can be checked on the way.
    """
    places = [
        next(((entry.tensor.file, entry.tensor.start) for entry in job.reads if entry.model == donor), None)
        for job in jobs
    ]
    if None in places:
        return jobs
    return tuple(jobs[number] for number in sorted(range(len(jobs)), key=lambda number: places[number] or ("", 0)))


def _shards(jobs: tuple[Job, ...], limit: int) -> list[Shard]:
    """Cut the jobs into files of at most `limit` bytes; a tensor larger than that has a file of its own."""
    groups: list[list[Job]] = [[]]
    held = 0
    for job in jobs:
        if groups[-1] and held + job.nbytes > limit:
            groups.append([])
            held = 0
        groups[-1].append(job)
        held += job.nbytes
    ordered = [_aligned(group) for group in groups]
    return [Shard(shard_name(number, len(ordered)), group) for number, group in enumerate(ordered, 1)]


def _aligned(jobs: Sequence[Job]) -> tuple[Job, ...]:
    """Loaders want each tensor aligned to its own item size; larger items first keep them so."""
    return tuple(sorted(jobs, key=lambda job: -ITEM_BYTES[job.dtype]))


def _fitted(draft: Plan, table: Mapping[str, Method], budget: Budget) -> Plan:
    """The plan with as many threads and as much read-ahead as fit into the memory."""
    least = _LEAST_READ_AHEAD if draft.read_ahead else 0
    choices = [(threads, ahead) for ahead in (draft.read_ahead, least) for threads in range(draft.threads, 0, -1)]
    for threads, ahead in choices:
        candidate = replace(draft, threads=threads, read_ahead=ahead)
        candidate = replace(candidate, peak_memory=_peak_memory(candidate, table) + budget.sending)
        if budget.memory is None or candidate.peak_memory <= budget.memory:
            return candidate
    what = f"this merge needs {candidate.peak_memory:,} bytes of memory, and {budget.memory:,} are allowed"
    raise BudgetError(Problem(what, hint="raise --max-memory: this is the least, with one thread and small buffers"))


def _peak_memory(plan: Plan, table: Mapping[str, Method]) -> int:
    """The interpreter with torch, each thread's buffers, finished blocks on their way out, and what is read ahead."""
    thread = max((_thread_memory(job, table[job.method]) for job in plan.jobs), default=0)
    waiting = (
        BLOCKS_IN_FLIGHT
        * plan.threads
        * 8
        * max((block_entries(job, table[job.method]) for job in plan.jobs), default=0)
    )
    jobs = _BYTES_A_JOB * (len(plan.jobs) + len(plan.left_out))
    return _BASELINE_BYTES + plan.threads * thread + waiting + 2 * plan.read_ahead + jobs


def _thread_memory(job: Job, method: Method) -> int:
    """One thread's buffers: an input as stored, all in float32, what the method holds besides, and its measuring."""
    sources = job.sources
    buffers = 2 + len(sources) + len(job.shared) + method.scratch
    measuring = len(sources) * _MEASURE_BYTES if method.measure else 0
    return buffers * 4 * block_entries(job, method) + max(source.scratch for source in sources) + measuring


def block_entries(job: Job, method: Method) -> int:
    """How many entries of a job's output tensor are made at once."""
    if method.unit == "entries" or job.is_copy:
        return BLOCK_ENTRIES
    row = job.shape[-1] if len(job.shape) > 1 else job.entries
    whole = method.unit == "matrix" or row == 0
    return max(1, job.entries) if whole else max(1, BLOCK_ENTRIES // row) * row


def _hash(locked: LockedRecipe, shards: tuple[Shard, ...], config: Mapping[str, Any], seed: int) -> str:
    """Of all that decides the result's bytes: the inputs' identity, the jobs, the layout, the seed."""
    models = [
        {"where": model.located.commit or model.located.name, "files": _files(model.located.files)}
        for model in locked.models
    ]
    work = [[shard.name, shard.jobs] for shard in shards]
    content = {"format": FORMAT, "models": models, "shards": work, "config": config, "seed": seed}
    # `vars` of a dataclass is what `asdict` copies at eight times the price.
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=vars).encode()).hexdigest()


def _files(files: Mapping[str, Any]) -> list[tuple[str, int, str | None]]:
    return [(name, info.size, info.sha256) for name, info in sorted(files.items()) if name.endswith(".safetensors")]
