"""The stored tensors of a job, as the readings of its inputs ask for them, and rows of them.

Not here: where their bytes come from (runner).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merger.methods.steps.dtypes import Held
from merger.methods.steps.step import tile
from merger.planning.geometry import Geometry
from merger.planning.inputs.base import Input, StageTensor, Stored
from merger.planning.inputs.derived import Routed
from merger.planning.inputs.low_rank import Factor
from merger.planning.inputs.rows import ALL_ROWS, CHUNK_ENTRIES, Numbers, RowMap, Rows

T = TypeVar("T")
TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
Load = Callable[[Input, int, int, Tensor], Tensor]
"""Entries ``[start, stop)`` of a source in float32, in the front of a buffer."""


def read_whole(source: Input, load: Load) -> Tensor:
    """All entries of a small source, in its shape."""
    entries = math.prod(source.shape)
    return load(source, 0, entries, torch.empty(entries)).view(source.shape)


class Pairs(Protocol):
    """The pairs of small matrices of a run that are under way."""

    def entries(self, source: Factor, start: int, stop: int, load: Load) -> tuple[Tensor, Geometry]:
        """The entries of A or B, and how the matrix and ``scale * B @ A`` lie to each other."""


class Leaves(Protocol):
    """The stored tensors of a job, what stages make for it, and what was computed beforehand."""

    def entries(self, part: Stored | StageTensor, start: int, stop: int, out: Tensor, step: int = 1) -> Tensor:
        """The leaf's entries ``[start, stop)`` as float32, in the front of `out`.

        Of the tensor's entries only those whose number is a multiple of `step`.

        Raises:
            ModelError: the bytes cannot be had.
            MismatchError: an entry that a stage makes is not finite.
        """

    def rows(self, part: Stored | StageTensor, numbers: Numbers, out: Tensor) -> None:
        """Fill `out`, of as many rows, with the leaf's rows of these numbers as float32.

        Raises:
            ModelError: the bytes cannot be had.
        """

    def raw(self, part: Stored, start: int, stop: int) -> NDArray[np.uint8]:
        """The leaf's bytes ``[start, stop)``.

        Raises:
            ModelError: they cannot be had.
        """

    def router(self, source: Routed) -> Tensor:
        """A router's rows."""

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, made once a job."""

    @property
    def pairs(self) -> Pairs:
        """What two jobs of the run make together."""

    def tell(self, start: int, seen: Geometry) -> None:
        """What was seen of the block that starts there, in place of what its entries tell."""


class Origin(Protocol):
    """A job's stored tensors, what stages make for it, and what was computed beforehand, in numpy's memory."""

    pairs: Pairs | None

    def bits(self, part: Stored | StageTensor, start: int, stop: int, step: int = 1) -> Held:
        """The entries of a tensor as they are stored; good within a tile."""

    def rows(self, part: Stored | StageTensor, numbers: Numbers, width: int) -> Held:
        """The rows of a tensor of these numbers."""

    def raw(self, part: Stored, start: int, stop: int) -> NDArray[np.uint8]:
        """The leaf's bytes."""

    def router(self, source: Routed) -> Tensor:
        """A router's rows."""

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, made once a job."""

    def tell(self, start: int, seen: Geometry) -> None:
        """What was seen of the block that starts there."""


class TensorLeaves:
    """The stored tensors of a job for readings with torch, whose memory is numpy's.

    Args:
        origin: the job.
        shared: what several sources read of the block at hand, which begins and ends there.
    """

    def __init__(
        self, origin: Origin, block: tuple[int, int, int] | None = None, shared: Mapping[Stored, Held] | None = None
    ) -> None:
        self._origin, self._block, self._shared = origin, block, shared or {}
        self.raw, self.router, self.once, self.tell = origin.raw, origin.router, origin.once, origin.tell

    @property
    def pairs(self) -> Pairs:
        assert self._origin.pairs is not None
        return self._origin.pairs

    def entries(self, part: Stored | StageTensor, start: int, stop: int, out: Tensor, step: int = 1) -> Tensor:
        with tile():
            known = self._shared.get(part) if isinstance(part, Stored) and (start, stop, step) == self._block else None
            found = known or self._origin.bits(part, start, stop, step)
            return torch.from_numpy(found.floats(0, found.bits.size, out.numpy()))

    def rows(self, part: Stored | StageTensor, numbers: Numbers, out: Tensor) -> None:
        found = self._origin.rows(part, numbers, out.shape[-1])
        found.floats(0, found.bits.size, out.view(-1).numpy())


# ---- rows -----------------------------------------------------------------------------------------------------------


def rows_of_map(source: Rows, start: int, stop: int, out: Tensor, leaves: Leaves) -> Tensor:
    """Rows of a map: a run of one tensor's rows as it lies there, else a few rows at a time."""
    width = source.width
    first, last = start // width, -(-stop // width)
    if (shift := _run(source.map, first, last)) is not None:
        part, rows = shift
        return leaves.entries(source.parts[part], start + rows * width, stop + rows * width, out)
    step = max(1, CHUNK_ENTRIES // width)
    for row in range(first, last, step):
        until = min(row + step, last)
        made = _gathered(source, np.arange(row, until), leaves).view(-1)
        begin, end = max(start, row * width), min(stop, until * width)
        out[begin - start : end - start] = made[begin - row * width : end - row * width]
    return out[: stop - start]


def _run(rows: RowMap, first: int, last: int) -> tuple[int, int] | None:
    """If these rows are consecutive ones of a single leaf: its number, and how many rows later they lie there."""
    begin, end = rows.starts[first], rows.starts[last]
    numbers = rows.rows[begin:end]
    if end - begin != last - first or numbers[0] == ALL_ROWS:
        return None
    ahead = numbers - np.arange(first, last)
    single = (np.diff(rows.starts[first : last + 1]) == 1).all() and (
        rows.tensors[begin:end] == rows.tensors[begin]
    ).all()
    return (int(rows.tensors[begin]), int(ahead[0])) if single and (ahead == ahead[0]).all() else None


def _gathered(source: Rows, places: Numbers, leaves: Leaves) -> Tensor:
    """These rows of a map, each the mean of the stored rows that it is made of."""
    begins, counts = source.map.starts[places], source.map.starts[places + 1] - source.map.starts[places]
    if (counts == 1).all():
        return _stored(source, begins, leaves)
    made = torch.zeros(len(places), source.width)
    for turn in range(int(counts.max(initial=0))):
        at = np.flatnonzero(counts > turn)
        made[torch.from_numpy(at)] += _stored(source, begins[at] + turn, leaves)
    return made.div_(torch.from_numpy(np.maximum(counts, 1)).view(-1, 1))


def _stored(source: Rows, entries: Numbers, leaves: Leaves) -> Tensor:
    """The stored rows that a map's lists name at these places."""
    found = torch.empty(len(entries), source.width)
    of, numbers = source.map.tensors[entries], source.map.rows[entries]
    for part in np.unique(of):
        stored = source.parts[part]
        at = np.flatnonzero((of == part) & (numbers != ALL_ROWS))
        rows = torch.empty(len(at), source.width)
        leaves.rows(stored, numbers[at], rows)
        found[torch.from_numpy(at)] = rows
        if len(averaged := np.flatnonzero((of == part) & (numbers == ALL_ROWS))):
            found[torch.from_numpy(averaged)] = leaves.once(("mean", stored), partial(_mean, stored, leaves))
    return found


def _mean(part: Stored | StageTensor, leaves: Leaves) -> Tensor:
    """The mean of all rows of a tensor, summed in float64."""
    count, width = part.shape[0], math.prod(part.shape[1:])
    total = torch.zeros(width, dtype=torch.float64)
    step = max(1, CHUNK_ENTRIES // width)
    for row in range(0, count, step):
        rows = torch.empty(min(step, count - row), width)
        leaves.rows(part, np.arange(row, row + len(rows)), rows)
        total += rows.sum(dim=0, dtype=torch.float64)
    return (total / count).float()
