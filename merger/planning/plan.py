"""StagedRecipe -> Plan: shards and their jobs, peak memory, disk, bytes to read; all in integers.

Not here: how a tensor is made (jobs), and making it (engine).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from operator import methodcaller
from typing import Any

from merger.lock import formats
from merger.lock.locked import LockedRecipe
from merger.methods.registry import Method
from merger.models.formats.fp8 import with_fp8
from merger.models.gguf.layout import GgufFile
from merger.models.lora.adapter import CONFIG
from merger.planning.budget import Budget, Takes, Workload, allot, disk_bytes
from merger.planning.inputs.base import Job, StageTensor
from merger.planning.jobs.blocks import stages_of
from merger.planning.jobs.common import JobSet
from merger.planning.jobs.make import make_jobs
from merger.planning.makers import moe
from merger.planning.makers.fp8 import describe_fp8, fp8_tensors
from merger.planning.makers.gguf import gguf_files
from merger.planning.makers.lora import make_lora
from merger.planning.makers.side_files import beside_adapter, left_out_files, other_pipelines, passed_files, texts
from merger.planning.makers.stages import with_stages
from merger.planning.shards import Shard, files_of, in_eight_bits, whole_file
from merger.planning.stage_model import StagedRecipe, Texts
from merger.planning.tokens import Tokens
from merger.planning.unused_tensors import LeftOut, config, find_unused, notes


@dataclass(frozen=True)
class Plan(Takes):
    """All that will be made, before a tensor's byte is read, and what that takes.

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
        return other_pipelines(self.locked)

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
        return stages_of(self.jobs)

    def disk(self, staged: bool, shards: Sequence[Shard] | None = None) -> int:
        """The most bytes of disk that are in use at once, to make some of the shards or all.

        Args:
            staged: a shard is gone once it is uploaded.
        """
        sizes = [sum(shard.files.values()) for shard in (self.shards if shards is None else shards)]
        return disk_bytes(sizes, self.spool, staged)

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
            "tokens": self.tokens and {key: getattr(self.tokens, key) for key in ("rows", "new", "cut", "source")},
            "side_files": list(self.texts.taken),
            "side_files_left_out": dict(self.left_beside),
            "shards": [
                {"name": shard.name, "size": shard.files[shard.name], "jobs": shard.jobs} for shard in self.shards
            ],
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
    passed = [info.size for info in passed_files(locked, small)]  # one that is too large is told before all else
    shards = whole_file(making.jobs) if lora else files_of(locked, making.jobs, budget.shard_bytes)
    eight = fp8_tensors(locked, making.jobs)
    shards = tuple(in_eight_bits(shard, eight) for shard in shards) if eight else shards
    beside = gguf_files(locked, [shard.jobs for shard in shards], edited, small)
    shards = tuple(_with_beside(locked, *each) for each in zip(shards, beside, strict=True))
    edited = with_fp8(edited, eight.values(), locked.recipe.publish.fp8 or "") if eight else edited
    jobs = tuple(job for shard in shards for job in shard.jobs)
    left_out = tuple(find_unused(locked, making))
    fp8 = [shard.fp8 for shard in shards if shard.fp8]
    takes = allot(Workload(locked, table, jobs, len(left_out), passed, next(iter(shards)).beside, fp8), budget)
    return Plan(
        **vars(takes),
        locked=locked,
        shards=shards,
        left_out=left_out,
        notes=(*notes(locked, making), *([describe_fp8(list(eight.values()))] if eight else [])),
        config=edited,
        tokens=making.tokens,
        texts=small if locked.recipe.publish.safetensors else Texts({}),
        seed=seed,
        shard_bytes=budget.shard_bytes,
        hash=_hash(locked, shards, edited, seed, small, format),
        format=format,
    )


def _with_beside(locked: StagedRecipe, shard: Shard, files: tuple[GgufFile, ...]) -> Shard:
    publish = locked.recipe.publish
    name = shard.name if publish.safetensors else files[0].name
    return replace(shard, name=name, beside=files, written=publish.plain)


def _make_jobs(locked: StagedRecipe, table: Mapping[str, Method], seed: int) -> tuple[JobSet, Mapping[str, Any]]:
    """The jobs, and the output's config.json."""
    if locked.recipe.mixture is not None:
        return moe.make_mixture(locked, locked.recipe.mixture, seed)
    making = make_jobs(locked, table) if locked.recipe.lora is None else make_lora(locked, table, seed)
    return making, config(locked, making)


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
    if stages := stages_of([job for shard in shards for job in shard.jobs]):
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


def identify(job: Job) -> str:
    """What decides the bytes of a job's result, beside the plan's seed and the models' bytes."""
    return _ENCODER.encode([job, *([made, made.job] for made in stages_of([job]))])


_ENCODER = json.JSONEncoder(sort_keys=True, check_circular=False, default=methodcaller("encode"))
"""Of what a job is made of."""


def _files(files: Mapping[str, Any]) -> list[tuple[str, int, str | None]]:
    return [(name, info.size, info.sha256) for name, info in sorted(files.items()) if name.endswith(".safetensors")]
