"""Looks at a few entries of each block on its way through, or of a plan's inputs alone: how they lie to each other.

Which entries are looked at depends on their places alone, so neither threads nor memory change what is found. Not here:
what it means (planning.geometry, card.relations).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merger.engine.stored import TORCH_DTYPES
from merger.planning.geometry import Geometry
from merger.planning.inputs.base import Job, Stored
from merger.planning.plan import Plan
from merger.stores.ports import Reader, Store, Ticket

_SMALL = 1 << 16
_RUN = 64
_PERIOD = _RUN * 127
_OF_A_RUN = np.arange(_RUN)
_STRETCH, _EVERY = 1 << 19, 4
"""Of a larger tensor the first 64 of every 8,128 entries are looked at, of the first of every four stretches if there
are as many: some 1e-2 of a cosine, for one to four hundredths of the loop's time. Runs, since single entries so far
apart cost a cache miss each, and that ten times the time."""


def observe(inputs: Sequence[Tensor], result: Tensor, start: int, entries: int, base: Tensor | None = None) -> Geometry:
    """The geometry of a block.

    Args:
        inputs: what the method was given, in float32.
        result: what it made of them, before a base is added.
        start: the block's place in its tensor.
        entries: how many entries the whole tensor has.
        base: what was subtracted from each input.
    """
    if _is_passed_by(start, inputs[0].numel(), entries):
        return _nothing(len(inputs), base is not None)
    rows = [tensor.reshape(-1) for tensor in (*inputs, result, *(() if base is None else (base,)))]
    places = np.arange(len(rows[0])) if entries <= _SMALL else _runs(start, len(rows[0]), entries)
    held = np.array([_taken(row, places) for row in rows], dtype=np.float64)
    if not np.isfinite(held).all():  # a recipe may allow it; a product of it would say nothing
        held = np.where(np.isfinite(held), held, 0.0)
    count = len(inputs)
    above, below = held[: count + 1] > 0, held[: count + 1] < 0
    up, down = above[:count].any(0), below[:count].any(0)
    products = (held @ held.T).tolist()
    return Geometry(
        products=tuple(tuple(row[: count + 1]) for row in products[: count + 1]),
        opposed=_count(up & down),
        sampled=_count(up | down),
        against=tuple(_count(above[row] & below[count]) + _count(below[row] & above[count]) for row in range(count)),
        moved=tuple(_count(above[row]) + _count(below[row]) for row in range(count)),
        base=() if base is None else tuple(products[count + 1]),
    )


def _count(entries: NDArray[np.bool_] | np.bool_) -> int:
    return int(np.count_nonzero(entries))


def _is_passed_by(start: int, count: int, entries: int) -> bool:
    """Whether the block lies in a single stretch that is not looked at: most do, and this is what they cost."""
    stretch = start // _STRETCH
    return entries > _STRETCH * _EVERY and stretch % _EVERY > 0 and (start + count - 1) // _STRETCH == stretch


@cache
def _nothing(inputs: int, has_base: bool) -> Geometry:
    row = (0.0,) * (inputs + 1)
    return Geometry((row,) * (inputs + 1), 0, 0, (0,) * inputs, (0,) * inputs, (*row, 0.0) if has_base else ())


def _runs(start: int, count: int, entries: int) -> NDArray[np.intp]:
    """Which places of a block belong to a run: it may begin and end within one."""
    found = (np.arange(-(start % _PERIOD), count, _PERIOD)[:, None] + _OF_A_RUN).reshape(-1)
    found = found[(found >= 0) & (found < count)]
    return found if entries <= _STRETCH * _EVERY else found[(found + start) // _STRETCH % _EVERY == 0]


def _taken(row: Tensor, places: NDArray[np.intp]) -> NDArray[np.float32]:
    """The entries in these places. On the CPU by numpy, whose small steps cost a third of torch's."""
    if row.device.type == "cpu":
        taken: NDArray[np.float32] = row.numpy().take(places)
        return taken
    return row[torch.from_numpy(places).to(row.device)].cpu().numpy()


# ---- inputs alone ---------------------------------------------------------------------------------------------------


_JOBS = 32
_ENTRIES = 16_384
_READ_AHEAD_BYTES = 8 << 20


def measure_geometry(plan: Plan, store: Store) -> Iterator[tuple[str, Geometry]]:
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
