"""A sample of the parents' matrices, read before anything is made: how they relate, and why a merge may mean little.

By numpy alone, so that a plan answers at once. Not here: what is seen on the way of a merge (engine.geometry), and the
sentences (card.relations).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merger.card.relations import Relations, relations
from merger.models.checkpoint import ITEM_BYTES
from merger.models.formats.packed import NUMPY_DTYPES, decode
from merger.planning.geometry import Geometry
from merger.planning.inputs.base import Job, Stored
from merger.planning.plan import Plan
from merger.stores.ports import Reader, Store, Ticket

_JOBS, _RANGES = 32, 160
"""Of so many tensors, unless that takes more ranges: those come in under 4 s where each takes 0.2 s, 8 at a time."""

_GOLDEN = 0.618034
_ENTRIES = 16_384
_READ_AHEAD_BYTES = 8 << 20


def sample_relations(planned: Plan, store: Store) -> Relations:
    """How the parents relate, by some of their matrices.

    Raises:
        ModelError: bytes of a model cannot be read.
    """
    return relations(planned, dict(sample_geometry(planned, store)))


def sampled_doubts(planned: Plan, store: Store) -> tuple[str, ...]:
    """Sentences on why the merge may mean little; none where nothing speaks against it.

    Raises:
        ModelError: bytes of a model cannot be read.
    """
    return sample_relations(planned, store).doubts


def sample_geometry(planned: Plan, store: Store) -> Iterator[tuple[str, Geometry]]:
    """The geometry of the inputs of some matrices, spread over the model; the result counts as zero.

    Only of those that are merged as they are stored.

    Raises:
        ModelError: bytes of a model cannot be read.
    """
    merged = [job for job in planned.jobs if job.is_compared and job.entries and len(_stored(job)) == len(job.sources)]
    chosen = list(_spread(merged, min(_JOBS, _RANGES // max((len(job.sources) for job in merged), default=1))))
    tickets = [_ticket(planned, entry) for job in chosen for entry in _stored(job)]
    with closing(store.reader(tickets, _READ_AHEAD_BYTES)) as reader:
        first = 0
        for job in chosen:
            rows = [_read(reader, first + place, tickets[first + place], of) for place, of in enumerate(_stored(job))]
            yield job.name, _geometry(np.array(rows), job)
            first += len(rows)


def _stored(job: Job) -> list[Stored]:
    """Those of its sources that are read as they are stored, the base last."""
    return [source for source in job.sources if isinstance(source, Stored)]


def _spread(jobs: Sequence[Job], most: int) -> Iterator[Job]:
    """One of each stretch of them; not the same of each, for that might be one kind of tensor throughout."""
    count = min(len(jobs), max(1, most))
    for number in range(count):
        start, stop = (len(jobs) * place // count for place in (number, number + 1))
        yield jobs[start + int(number * _GOLDEN % 1 * (stop - start))]


def _ticket(planned: Plan, entry: Stored) -> Ticket:
    """A run of entries from the tensor's middle, the same in all of a job's inputs."""
    tensor, size = entry.tensor, ITEM_BYTES[entry.tensor.dtype]
    count = min(_ENTRIES, tensor.entries)
    start = tensor.start + (tensor.entries - count) // 2 * size
    return Ticket(planned.locked.models[entry.model].located, tensor.file, start, start + count * size)


def _read(reader: Reader, number: int, ticket: Ticket, entry: Stored) -> NDArray[np.float64]:
    raw = bytearray(ticket.stop - ticket.start)
    reader.read(number, 0, memoryview(raw))
    found = decode(np.frombuffer(raw, NUMPY_DTYPES[entry.tensor.dtype]), entry.tensor.dtype).astype(np.float64)
    return np.where(np.isfinite(found), found, 0.0)  # a recipe may allow it; a product of it would say nothing


def _geometry(rows: NDArray[np.float64], job: Job) -> Geometry:
    """Of the inputs, the base last where there is one."""
    inputs = rows if job.base is None else rows[:-1] - rows[-1]
    up, down = (inputs > 0).any(axis=0), (inputs < 0).any(axis=0)
    none = (0,) * len(inputs)
    return Geometry(
        products=_table([*inputs, np.zeros_like(inputs[0])]),
        opposed=int((up & down).sum()),
        sampled=int((up | down).sum()),
        against=none,
        moved=none,
        base=() if job.base is None else (*(float(row @ rows[-1]) for row in inputs), 0.0, float(rows[-1] @ rows[-1])),
    )


def _table(rows: Sequence[NDArray[Any]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(one @ other) for other in rows) for one in rows)
