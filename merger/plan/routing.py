"""What it takes to compute routers from prompts before the first block is made: bytes read, and memory.

Not here: computing them (engine.gates). No prompt becomes tokens here: it has no more of them than bytes, and one.
"""

from __future__ import annotations

from collections.abc import Sequence

from merger.checkpoints.architecture import is_buffer
from merger.checkpoints.checkpoint import ITEM_BYTES, TensorInfo
from merger.checkpoints.mixtures import EMBEDDING, GATE, STACK
from merger.plan.jobs import Job
from merger.plan.lock import LockedRecipe
from merger.plan.sources import Routed

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


def layers(locked: LockedRecipe, routers: Sequence[Routed]) -> list[list[TensorInfo]]:
    """The tensors of the layers that the prompts run through for these routers, each made of its layer's input."""
    count = max((router.layer for router in routers if router.mode != EMBEDDED), default=0)
    found = [locked.donor.layer(STACK, layer) for layer in range(count)]
    return [[tensor for tensor in layer if not is_buffer(tensor.name)] for layer in found]


def read_bytes(locked: LockedRecipe, jobs: Sequence[Job]) -> int:
    """How many bytes of tensors are read at most."""
    routers = routed(jobs)
    if not routers:
        return 0
    embedding = locked.donor.checkpoint.tensors[EMBEDDING]
    rows = min(sum(_tokens(text) for text in prompts(routers)), embedding.shape[0])
    stored = sum(tensor.nbytes for layer in layers(locked, routers) for tensor in layer)
    return stored + rows * embedding.shape[1] * ITEM_BYTES[embedding.dtype]


def memory(locked: LockedRecipe, jobs: Sequence[Job], threads: int) -> tuple[int, int]:
    """The most bytes that computing the routers takes at once, and what is held from then on, beside that."""
    routers = routed(jobs)
    if not routers:
        return 0, 0
    donor = locked.donor
    width = donor.checkpoint.tensors[EMBEDDING].shape[1]
    texts = [_tokens(text) for text in prompts(routers)]
    states = 2 * sum(texts) * width
    held = 4 * sum(len(router.prompts) * router.width for router in routers) + _TOKENIZER_BYTES
    run = layers(locked, routers)
    if not run:
        return 4 * states, held
    layer = max(4 * sum(tensor.nbytes // ITEM_BYTES[tensor.dtype] for tensor in of) for of in run)
    raw = max(tensor.nbytes for of in run for tensor in of)
    middle = donor.checkpoint.tensors[f"{STACK}.0.{GATE}"].shape[0]
    working = threads * max(texts) * (_HIDDEN_STATES * width + 4 * middle)
    return layer + raw + 4 * (states + working), held + _TRANSFORMERS_BYTES


def _tokens(text: str) -> int:
    """The most tokens that a prompt can have, with the one that begins it."""
    return len(text.encode()) + 1
