"""What will be measured of a model and what that takes: files, memory, disk and operations, before a tensor is read.

Not here: measuring (inputs, gradients), and the order of it (measure).
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import yaml

from merger import runtime, system
from merger.engine.inputs.layers import TOKENIZER_FILES, load_encoder
from merger.errors import BudgetError, MismatchError, Problem, RecipeError
from merger.lock.lock import Pin, lock
from merger.lock.parents import Parent
from merger.lock.statistics import KINDS, STATISTICS_FORMAT, Statistics, statistic_name, statistic_shape
from merger.methods.registry import Statistic, methods
from merger.models.checkpoint import SINGLE, TensorInfo, index_name
from merger.models.formats.safetensors import header, index, shard_name
from merger.models.side_files import LOCK_NAME
from merger.planning.budget import embedding, layer_jobs, thread_memory
from merger.planning.inputs.base import Job
from merger.planning.makers.stages import with_stages
from merger.planning.plan import Plan
from merger.planning.stage_model import StagedRecipe
from merger.recipe.blocks.evaluate import HUB_FILE
from merger.recipe.model import Recipe
from merger.run.options import Options
from merger.run.prepare import parse_text, stores_of
from merger.safety.numbers import DOWN, UP, size
from merger.statistics.texts import RANDOM, Tokens, draw_tokens, read_tokens
from merger.stores.ports import FileInfo, Located
from merger.stores.resolve import Library

ARCHITECTURES = ("granite", "llama", "mistral", "olmo2", "qwen2", "qwen3")
"""The model_types of which a layer by itself computes as it does within the model."""

BATCH = 8
"""So many sequences are summed up at once: fixed, so that no number of threads changes a bit."""

BEFORE = -1
"""In place of a layer's number: what is before the first. What is behind the last has the number after it."""

ROWS_AT_ONCE = 512
"""Of a sum's matrix, which is made by as many products as it has such runs of rows."""

_LEAST_LENGTH = 2
_TRIED, _SLOWER = 512, 2.0
"""By what size of a product it is tried, and how much longer all takes than its products."""

_PROCESS_BYTES = 700 << 20
"""Of this process, with torch and transformers."""
_HIDDEN_STATES = 24
"""How many states of a sequence, and a third as many of the MLP's, a layer holds while it is walked back."""


@dataclass(frozen=True)
class StatisticsShard:
    """A file of statistics: those of a layer, of the embedding before the first, or of what is behind the last."""

    name: str
    layer: int
    tensors: tuple[TensorInfo, ...]

    @property
    def size(self) -> int:
        """The file's size in bytes."""
        return len(header(self.tensors)) + sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class Measurement:
    """All that will be measured.

    Args:
        locked: the model.
        kind: what is measured.
        tokens: what it is measured on, a row for each sequence.
        data: what that is called.
        seed: for tokens drawn by chance.
        threads: how many threads compute.
        layers: the tensors of each layer; `outside`: those outside of all layers.
        shards: the files.
        blocks: how many inputs the blocks of Gram matrices are of; None: all.
        peak_memory: the most bytes of memory that it takes.
        merge: the plan's hash of the merge whose layers feed what is measured; None: the model's own.
    """

    locked: StagedRecipe
    kind: Statistic
    tokens: Tokens = field(repr=False)
    data: str
    seed: int
    threads: int
    layers: tuple[tuple[Job, ...], ...] = field(repr=False)
    outside: Mapping[str, Job] = field(repr=False)
    shards: tuple[StatisticsShard, ...] = field(repr=False)
    blocks: int | None = None
    peak_memory: int = 0
    merge: str | None = None

    @property
    def width(self) -> int:
        """How many numbers a hidden state has."""
        return embedding(self.locked).shape[1]

    @property
    def head(self) -> Job | None:
        """The output head, where it is a tensor of its own."""
        head = self.locked.config_model.head
        return None if head is None or self.locked.config_model.is_tied else self.outside[head.name]

    @property
    def tables(self) -> tuple[str, ...]:
        """The names of embedding and head, as far as they are tensors."""
        model = self.locked.config_model
        return tuple(tensor.name for tensor in (model.embedding, model.head) if tensor is not None)

    @property
    def gradients(self) -> int:
        """Where gradients are kept, among hidden states: behind those of all boundaries."""
        return len(self.layers) + 1

    @property
    def spool(self) -> int:
        """The bytes of temporary disk."""
        return 4 * self.tokens.size * self.width * (self.gradients + 1 if self.kind == "fisher" else 1)

    @property
    def size(self) -> int:
        """The bytes of all files."""
        return sum(shard.size for shard in self.shards)

    @property
    def read_bytes(self) -> int:
        """How many bytes of tensors are read at most: for gradients, and for a merge, layers are read again."""
        layers = sum(stored.tensor.nbytes for layer in self.layers for job in layer for stored in job.reads)
        outside = sum(stored.tensor.nbytes for job in self.outside.values() for stored in job.reads)
        return (2 if self.kind == "fisher" or self.merge else 1) * layers + outside

    @property
    def operations(self) -> int:
        """About how many products are formed and added up."""
        weights = sum(job.entries for layer in self.layers for job in layer)
        if self.kind == "fisher":
            return self.tokens.size * (4 * weights + 3 * embedding(self.locked).entries)
        sums = sum(tensor.entries for shard in self.shards for tensor in shard.tensors) if self.kind == "gram" else 0
        return self.tokens.size * ((2 if self.merge else 1) * weights + sums // 2)

    @property
    def notes(self) -> list[str]:
        """Sentences on what may make the numbers less than they could be."""
        widest = max(tensor.shape[-1] for shard in self.shards for tensor in shard.tensors)
        if self.kind != "gram" or self.tokens.size >= widest:
            return []
        few = f"{self.tokens.size:,} tokens are fewer than the {widest:,} inputs of the widest layer"
        return [f"{few}: its Gram matrix is singular, and more tokens tell more"]

    @property
    def digest(self) -> str:
        """The SHA-256 of the tokens' ids, four bytes each."""
        return hashlib.sha256(self.tokens.astype("<i4").tobytes()).hexdigest()

    @property
    def identity(self) -> str:
        """Names all that decides the numbers."""
        models = [
            [model.located.commit or model.located.name, _weights(model.located.files)] for model in self.locked.models
        ]
        said = [
            STATISTICS_FORMAT,
            self.kind,
            self.digest,
            self.tokens.shape,
            models,
            *([self.blocks] if self.blocks else []),
            *([self.merge] if self.merge else []),
        ]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    @property
    def index(self) -> dict[str, bytes]:
        """The file that says where which tensor lies, by its name, where there are several."""
        tensors = {tensor.name: (shard.name, tensor.nbytes) for shard in self.shards for tensor in shard.tensors}
        where = {name: file for name, (file, _) in tensors.items()}
        text = index(where, sum(nbytes for _, nbytes in tensors.values()))
        return {index_name(SINGLE): text} if len(self.shards) > 1 else {}

    @property
    def heads(self) -> dict[str, tuple[int, bytes]]:
        """Of each file its size, and what a merge's plan reads of it."""
        small = self.index | {LOCK_NAME: self.said(lambda model, name: model.files[name].sha256).text().encode()}
        whole = {name: (len(text), text) for name, text in small.items()}
        return whole | {shard.name: (shard.size, header(shard.tensors)) for shard in self.shards}

    def said(self, checksum: Callable[[Located, str], str | None]) -> Statistics:
        """What the lock says beside what it was made with, and what came out.

        Args:
            checksum: finds out the SHA-256 of a model's file; None: it is not known.
        """
        sequences, length = self.tokens.shape
        return Statistics(
            kind=self.kind,
            tokens=sequences * length,
            length=length,
            data=self.data,
            digest=self.digest,
            seed=self.seed,
            identity=self.identity,
            models=self._parents(checksum),
            blocks=self.blocks,
            merge=self.merge,
        )

    def _parents(self, checksum: Callable[[Located, str], str | None]) -> tuple[Parent, ...]:
        """The model, and its adapter."""
        return tuple(
            Parent(
                str(replace(model.ref, adapter=None)) if model.located.commit else model.located.name,
                model.located.commit,
                model.licence,
                {
                    name: FileInfo(model.located.files[name].size, checksum(model.located, name))
                    for name in sorted({tensor.file for tensor in model.checkpoint.tensors.values()})
                },
                model.located.name if model.located.moved else None,
            )
            for model in self.locked.models
        )


def _weights(files: Mapping[str, FileInfo]) -> list[tuple[str, int, str | None, int | None]]:
    found = [(name, info.size, info.sha256, info.changed) for name, info in sorted(files.items())]
    return [each for each in found if each[0].endswith(".safetensors")]


def estimate_seconds(planned: Measurement) -> float:
    """About how long it takes on this machine, by the time that one product of matrices takes."""
    square = np.ones((_TRIED, _TRIED), np.float32)
    with runtime.single_threaded_blas():
        square @ square
        began = time.perf_counter()
        square @ square
        taken = time.perf_counter() - began
    return _SLOWER * planned.operations * taken / _TRIED**3 / planned.threads


def measured_recipe(model: str) -> Recipe:
    """The recipe that takes a model as it is.

    Raises:
        RecipeError: that is no model's name.
    """
    content = {"merge_method": "passthrough", "models": [{"model": model}]}
    return parse_text(yaml.safe_dump(content, allow_unicode=True), "measure")


def plan_measurement(
    model: str,
    kind: Statistic,
    data: str,
    tokens: int,
    length: int,
    options: Options,
    blocks: int | None = None,
    pinned: Mapping[str, Pin] | None = None,
) -> tuple[Measurement, Library]:
    """Find the model, make the tokens, and decide what will be measured.

    Args:
        model: as a recipe names it; with an adapter, as that changes it.
        kind: what is measured.
        data: a file of texts, one on the Hub, or random-tokens.
        tokens: on how many tokens.
        length: how many of them follow each other in one sequence.
        options: what it may use.
        blocks: of Gram matrices blocks of so many inputs along the diagonal; None: the whole matrices.
        pinned: the commits to take, by model.

    Raises:
        RecipeError: what it takes is not installed, or the texts cannot be read or are too short.
        ModelError: the model cannot be read.
        MismatchError: it is of a kind that is not measured.
        BudgetError: it cannot fit into the memory.
    """
    if kind not in KINDS:
        raise RecipeError(Problem(f"{kind!r} is no kind of statistics", hint=f"write one of {', '.join(KINDS)}"))
    if blocks is not None and kind != "gram":
        raise RecipeError(Problem(f"{kind} has no blocks", hint="leave them out: they are for Gram matrices"))
    if missing := [name for name in ("torch", "transformers") if find_spec(name) is None]:
        what = f"measuring takes {' and '.join(missing)}, which is not installed here"
        raise RecipeError(Problem(what, hint=runtime.install_command("moe")))
    recipe = measured_recipe(model)
    store = stores_of(recipe, options, options.root)
    found = lock(recipe, store, pinned, options.allow_pickle, options.tensors)
    locked = with_stages(found, methods(), None)
    _refuse_other(locked)
    length = min(length, locked.config_model.checkpoint.config.get("max_position_embeddings") or length, tokens)
    if length < _LEAST_LENGTH:
        what = f"sequences of {length:,} tokens predict nothing"
        raise RecipeError(Problem(what, hint=f"give --length {_LEAST_LENGTH} or more, and as many --tokens"))
    count, seed = tokens // length, options.seed or 0
    if data == RANDOM:
        ids = draw_tokens(embedding(locked).shape[0], count, length, seed)
    else:
        located = locked.config_model.tokenizer_model.located
        files = {name: store.fetch(located, name) for name in TOKENIZER_FILES if name in located.files}
        ids = read_tokens(
            data, load_encoder(locked.config_model, files), count, length, options.read_token, options.root
        )
    layers = tuple(tuple(layer_jobs(locked, layer)) for layer in range(_count(locked)))
    outside = {job.name: job for job in layer_jobs(locked, None)}
    threads = options.threads or system.cores()
    named = data if HUB_FILE.fullmatch(data) else Path(data).name  # nothing of this machine is published
    draft = Measurement(locked, kind, ids, named, seed, threads, layers, outside, (), blocks)
    return _fit(draft, _shards(draft), options.max_memory), store


def fed_by(planned: Measurement, merge: Plan) -> Measurement:
    """The same measurement, fed by the layers of a merge."""
    made = merged_part(planned, merge)
    weights = max(sum(4 * job.entries for job in layer) for layer in made.layers)
    table = made.outside[made.tables[0]]
    making = max(weights + thread_memory(job, methods()) for layer in made.layers for job in layer)
    embedding_bytes = 8 * table.entries + thread_memory(table, methods())  # rows of it are all of them at most
    peak = max(planned.peak_memory, _PROCESS_BYTES + max(making, embedding_bytes))
    return replace(planned, merge=merge.hash, peak_memory=peak)


def merged_part(planned: Measurement, merge: Plan) -> Measurement:
    """What a merge makes in place of this model, in float32.

    Raises:
        MismatchError: its layers are not those of this model, one by one.
    """
    made, pieces = {job.name: replace(job, dtype="F32") for job in merge.jobs}, merge.locked.recipe.slices
    named = [[job.name for job in layer] for layer in (*planned.layers, planned.outside.values())]
    if len(pieces) > 1 or merge.locked.recipe.stages or not all(name in made for names in named for name in names):
        what = f"{planned.locked.config_model.name} is not merged layer by layer, tensor by tensor"
        raise MismatchError(Problem(what, hint="leave out merged: true, which is for such merges alone"))
    *layers, outside = (tuple(made[name] for name in names) for names in named)
    return replace(planned, locked=merge.locked, layers=tuple(layers), outside={job.name: job for job in outside})


def _refuse_other(locked: StagedRecipe) -> None:
    """Raises MismatchError for a model that is not computed a layer at a time as it is as a whole."""
    model = locked.config_model
    kind = model.checkpoint.config.get("model_type")
    if kind not in ARCHITECTURES or model.has_experts or not (model.head or model.is_tied):
        said = f"a model of type {kind}" if kind else "no model of transformers"
        what = f"{model.name} is {said}, which is not measured"
        raise MismatchError(Problem(what, hint=f"language models of these types are: {', '.join(ARCHITECTURES)}"))


def _count(locked: StagedRecipe) -> int:
    stacks = locked.config_model.architecture.stacks
    return next(iter(stacks.values()))


def _shards(draft: Measurement) -> tuple[StatisticsShard, ...]:
    """A file a layer, in the model's order, and those of what is before and behind."""
    head, count = draft.head, len(draft.layers)
    tables = [draft.outside[name] for name in draft.tables[:1]]
    behind = [job for job in draft.outside.values() if job not in tables and not _is_dead(draft, job)]
    held = [(BEFORE, tables), *enumerate(draft.layers), (count, behind)]
    if draft.kind != "fisher":
        held = [*enumerate(draft.layers), *([(count, [head])] if head is not None else [])]
    files = [(layer, _tensors(draft, jobs)) for layer, jobs in held]
    names = [shard_name(number, len(files)) for number in range(1, len(files) + 1)]
    return tuple(StatisticsShard(name, *file) for name, file in zip(names, files, strict=True))


def _is_dead(draft: Measurement, job: Job) -> bool:
    """Whether a tensor is the head of a model whose head is the embedding."""
    return draft.locked.config_model.is_tied_head(job.name)


def _tensors(draft: Measurement, jobs: Sequence[Job]) -> tuple[TensorInfo, ...]:
    kind = draft.kind
    measured = [job for job in jobs if kind == "fisher" or len(job.shape) == 2]
    shapes = {statistic_name(kind, job.name): statistic_shape(kind, job.shape, draft.blocks) for job in measured}
    return tuple(TensorInfo(name, "F32", shape, "", 0, 4 * math.prod(shape)) for name, shape in shapes.items())


def _fit(draft: Measurement, shards: tuple[StatisticsShard, ...], allowed: int | None) -> Measurement:
    """With as many threads as fit.

    Raises:
        BudgetError: none do.
    """
    for threads in range(draft.threads, 0, -1):
        found = replace(draft, threads=threads, shards=shards)
        found = replace(found, peak_memory=_peak_memory(found))
        if allowed is None or found.peak_memory <= allowed:
            return found
    there = size(allowed or 0, DOWN)
    what = f"this takes {size(found.peak_memory, UP)} of memory with one thread, and {there} are allowed"
    raise BudgetError(Problem(what, hint="raise --max-memory, or measure on shorter sequences: --length"))


def inputs_of(tensor: TensorInfo) -> int:
    """How many inputs a statistic is of, those included that only fill up its last block."""
    return math.prod(tensor.shape[:2]) if len(tensor.shape) > 2 else tensor.shape[-1]


def _peak_memory(planned: Measurement) -> int:
    length, threads = int(planned.tokens.shape[1]), planned.threads
    weights = max(sum(4 * job.entries for job in layer) for layer in planned.layers)
    widest = max(max(job.shape) for layer in planned.layers for job in layer)
    states = 4 * length * (_HIDDEN_STATES * planned.width + _HIDDEN_STATES // 3 * widest)
    heads: int = planned.locked.config_model.checkpoint.config.get("num_attention_heads", 1)
    states += 4 * length * length * heads
    rows = 4 * min(planned.tokens.size, embedding(planned.locked).shape[0]) * planned.width
    reading = max(thread_memory(job, methods()) for layer in planned.layers for job in layer)
    sums = max(sum(tensor.nbytes for tensor in shard.tensors) for shard in planned.shards)
    if planned.kind == "fisher":
        table = embedding(planned.locked)
        logits = 3 * 4 * length * table.shape[0]
        top = 4 * table.entries * (1 if planned.head is None else 2) + 4 * table.entries + threads * logits
        return _PROCESS_BYTES + max(rows, 2 * weights + threads * (weights + 2 * states) + reading, top)
    inputs = BATCH * 4 * length * sum(map(inputs_of, planned.shards[0].tensors))
    products = threads * 4 * ROWS_AT_ONCE * widest if planned.kind == "gram" else 0
    return _PROCESS_BYTES + max(rows, weights + sums + threads * states + 2 * inputs + products + reading)
