"""A look at a plan's parents before anything is merged: a few thousand entries of some tensors, read by range.

Not here: looking at blocks on their way (observe), and what it means (card.relations).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import torch
from torch import Tensor

from merger.engine.leaves import TORCH_DTYPES
from merger.engine.observe import observe
from merger.plan.geometry import Geometry
from merger.plan.jobs import Job
from merger.plan.plan import Plan
from merger.plan.sources import Stored
from merger.stores.ports import Reader, Store, Ticket

_JOBS = 32
_ENTRIES = 16_384
_READ_AHEAD_BYTES = 8 << 20


def look(plan: Plan, store: Store) -> Iterator[tuple[str, Geometry]]:
    """The geometry of the inputs of some tensors, spread over the model; the result counts as zero.

    Only of tensors that are merged as they are stored.

    Raises:
        ModelError: bytes of a model cannot be read.
    """
    merged = [job for job in plan.jobs if len(job.inputs) > 1 and job.entries and job.sources == job.reads]
    chosen = merged[:: max(1, len(merged) // _JOBS)]
    tickets = [_ticket(plan, entry) for job in chosen for entry in job.reads]
    with closing(store.reader(tickets, _READ_AHEAD_BYTES)) as reader:
        first = 0
        for job in chosen:
            yield job.name, _seen(job, reader, tickets, first)
            first += len(job.reads)


def _ticket(plan: Plan, entry: Stored) -> Ticket:
    """A run of entries from the tensor's middle, the same in all of a job's inputs."""
    tensor = entry.tensor
    size = TORCH_DTYPES[tensor.dtype].itemsize
    count = min(_ENTRIES, tensor.nbytes // size)
    start = tensor.start + (tensor.nbytes // size - count) // 2 * size
    return Ticket(plan.locked.models[entry.model].located, tensor.file, start, start + count * size)


def _seen(job: Job, reader: Reader, tickets: list[Ticket], first: int) -> Geometry:
    read = [_read(reader, tickets, first + place, entry) for place, entry in enumerate(job.reads)]
    inputs = read if job.base is None else [tensor - read[-1] for tensor in read[:-1]]
    return observe(inputs, torch.zeros_like(inputs[0]), 0, _ENTRIES)


def _read(reader: Reader, tickets: list[Ticket], number: int, entry: Stored) -> Tensor:
    raw = bytearray(tickets[number].stop - tickets[number].start)
    reader.read(number, 0, memoryview(raw))
    return torch.frombuffer(raw, dtype=TORCH_DTYPES[entry.tensor.dtype]).float()
