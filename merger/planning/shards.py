"""The files of a result's tensors: which jobs fill each, and which of them a part makes.

Not here: how a tensor is made (jobs), and what a file holds besides (models.formats, models.gguf).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, islice
from operator import itemgetter
from typing import Self

from merger.models.checkpoint import ITEM_BYTES, SINGLE
from merger.models.formats.fp8 import Fp8File, Fp8Tensor
from merger.models.formats.safetensors import Outgoing, header, shard_name
from merger.models.gguf.layout import GgufFile
from merger.models.lora.adapter import TENSORS
from merger.models.side_files import module_of
from merger.planning.budget import job_read_bytes
from merger.planning.inputs.base import Job
from merger.planning.makers.gguf import stacks
from merger.planning.stage_model import StagedRecipe
from merger.safety import numbers


@dataclass(frozen=True)
class Shard:
    """One output file: its name, the jobs that fill it, in the order of their places, and files made of the same.

    One that is not written as safetensors has the name of the first of those, which are all that there is of it; one
    whose file is in eight bits is written as `fp8` says.
    """

    name: str
    jobs: tuple[Job, ...]
    beside: tuple[GgufFile, ...] = ()
    written: bool = True
    fp8: Fp8File | None = None

    @cached_property
    def size(self) -> int:
        """The file's size in bytes, header included; of one that is not written so, what is made for it."""
        return self.header_size + sum(job.nbytes for job in self.jobs)

    @property
    def header_size(self) -> int:
        """How many bytes stand in it before its tensors."""
        return len(header(self.jobs, self.name))

    @property
    def files(self) -> dict[str, int]:
        """The size by name of each file that is made with it, its own last."""
        beside = {file.name: file.size for file in self.beside}
        own = self.size if self.fp8 is None else self.fp8.size
        return beside | ({self.name: own} if self.written or self.fp8 else {})

    @property
    def stored(self) -> Sequence[Outgoing]:
        """The tensors of its file, as the header has them."""
        return self.jobs if self.fp8 is None else self.fp8.stored


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
    return sum(job.nbytes + job_read_bytes(job) for job in shard.jobs)


def whole_file(jobs: tuple[Job, ...]) -> tuple[Shard, ...]:
    """An adapter: one file, whatever its size. A and B stay side by side, for they are made together."""
    return (Shard(TENSORS, _align(jobs)),)


def files_of(locked: StagedRecipe, jobs: tuple[Job, ...], limit: int) -> tuple[Shard, ...]:
    """The jobs in files as the config model's are, where all of them are within the limit; else cut by size alone."""
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
    small = all(sum(job.nbytes for job in file) <= limit for file in files if len(file) > 1)
    groups = files if files and small and len(together) == len(own) else _cut(together, limit)
    if modules and not any(groups):
        return tuple(modules)
    names = (shard_name(number, len(groups), config_owner.checkpoint.stem) for number in range(1, len(groups) + 1))
    return (*(Shard(name, _align(group)) for name, group in zip(names, groups, strict=True)), *modules)


def in_eight_bits(shard: Shard, tensors: Mapping[str, Fp8Tensor]) -> Shard:
    """The shard whose file is written with these tensors, in the order in which they are aligned."""
    jobs = tuple(sorted(shard.jobs, key=lambda job: -tensors[job.name].item_bytes))
    return replace(shard, jobs=jobs, fp8=Fp8File(shard.name, tuple(tensors[job.name] for job in jobs)))


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
