"""What it takes to compute routers from prompts before the first block is made: what is read, memory, disk.

The prompts run through the base model, whose layers are jobs like any others, one tensor after the other in float32.
Not here: running them (engine.gates). No prompt becomes tokens here: it has no more of them than bytes, and one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from merger.checkpoints.architecture import is_buffer
from merger.checkpoints.checkpoint import ITEM_BYTES, TensorInfo
from merger.checkpoints.mixtures import EMBEDDING, GATE, STACK
from merger.methods.registry import Method
from merger.plan import work
from merger.plan.jobs import PASSTHROUGH, Input, Job
from merger.plan.locked import LockedRecipe
from merger.plan.sources import Routed, Stored

EMBEDDED = "cheap_embed"
"""The mode that needs no layer of the model."""

_TOKENIZER_BYTES = 64 << 20
_TRANSFORMERS_BYTES = 224 << 20
_HIDDEN_STATES = 16
"""How many states of a prompt a layer holds at once, its MLP's apart: queries, keys, values, what is added."""


def routed(jobs: Sequence[Job]) -> list[Routed]:
    """The routers that are computed from prompts for these jobs, in their order."""
    return [source for job in jobs for source in job.sources if isinstance(source, Routed)]


def prompts(routers: Sequence[Routed]) -> list[str]:
    """Every prompt of these once."""
    asked = [text for router in routers for sides in router.prompts for side in sides for text in side]
    return list(dict.fromkeys(asked))


def embedding(locked: LockedRecipe) -> Job:
    """The base model's embedding in float32; only rows of it are made."""
    return _whole(locked, locked.donor.checkpoint.tensors[EMBEDDING])


def layers(locked: LockedRecipe, routers: Sequence[Routed]) -> list[list[Job]]:
    """The tensors of the layers that the prompts run through for these routers, each made of its layer's input."""
    count = max((router.layer for router in routers if router.mode != EMBEDDED), default=0)
    found = [locked.donor.layer(STACK, layer) for layer in range(count)]
    return [[_whole(locked, tensor) for tensor in layer if not is_buffer(tensor.name)] for layer in found]


def _whole(locked: LockedRecipe, tensor: TensorInfo) -> Job:
    source = locked.source(locked.index(locked.donor.ref), tensor)
    return Job(tensor.name, "F32", source.shape, PASSTHROUGH, (Input(source, {"scale": 1.0}),))


def read_bytes(locked: LockedRecipe, jobs: Sequence[Job]) -> int:
    """How many bytes of tensors are read at most."""
    routers = routed(jobs)
    if not routers:
        return 0
    table = embedding(locked)
    rows = min(sum(_tokens(text) for text in prompts(routers)), table.shape[0])
    source = table.sources[0]
    of_a_row = table.shape[1] * ITEM_BYTES[source.dtype]
    embedded = rows * of_a_row if isinstance(source, Stored) else _read(table)
    return embedded + sum(_read(job) for layer in layers(locked, routers) for job in layer)


def _read(job: Job) -> int:
    return sum(leaf.tensor.nbytes for leaf in job.reads)


def spooled(locked: LockedRecipe, jobs: Sequence[Job], table: Mapping[str, Method], remote: frozenset[int]) -> int:
    """The most bytes of temporary disk that are held at once: one tensor's, as there is one at a time."""
    routers = routed(jobs)
    if not routers:
        return 0
    made = [embedding(locked), *(job for of in layers(locked, routers) for job in of)]
    return max(work.spool(job, table, remote) for job in made)


def memory(locked: LockedRecipe, jobs: Sequence[Job], table: Mapping[str, Method], threads: int) -> tuple[int, int]:
    """The most bytes that computing the routers takes at once, and what is held from then on, beside that."""
    routers = routed(jobs)
    if not routers:
        return 0, 0
    first, run = embedding(locked), layers(locked, routers)
    width, texts = first.shape[1], [_tokens(text) for text in prompts(routers)]
    states = 2 * sum(texts) * width
    held = 4 * sum(len(router.prompts) * router.width for router in routers) + _TOKENIZER_BYTES
    making = max(work.memory(job, table) for job in (first, *(job for of in run for job in of)))
    if not run:
        return making + 4 * states, held
    layer = max(sum(job.nbytes for job in of) for of in run)
    middle = next(job.shape[0] for job in run[0] if job.name == f"{STACK}.0.{GATE}")
    running = threads * max(texts) * (_HIDDEN_STATES * width + 4 * middle)
    return layer + max(making, 4 * running) + 4 * states, held + _TRANSFORMERS_BYTES


def _tokens(text: str) -> int:
    """The most tokens that a prompt can have, with the one that begins it."""
    return len(text.encode()) + 1
