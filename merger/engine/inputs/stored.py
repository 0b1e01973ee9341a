"""What the readings of a job's inputs ask for: its stored tensors, and rows of them, in float32.

Not here: where their bytes come from (runner).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from merger.methods.steps.dtypes import Held
from merger.methods.steps.step import Array, tile
from merger.planning.geometry import Geometry
from merger.planning.inputs.base import Input, StageTensor, Stored
from merger.planning.inputs.derived import Routed
from merger.planning.inputs.low_rank import Factor
from merger.planning.inputs.rows import ALL_ROWS, CHUNK_ENTRIES, Numbers, RowMap, Rows

T = TypeVar("T")
Load = Callable[[Input, int, int, Array], Array]
"""Entries ``[start, stop)`` of a source in float32, in the front of a buffer."""


class StoredTensors(Protocol):
    """The stored tensors of a job, what stages make for it, and what was computed beforehand."""

    def bits(self, part: Stored | StageTensor, start: int, stop: int) -> Held:
        """The entries ``[start, stop)`` of a tensor as they are stored; good within a tile.

        Raises:
            ModelError: the bytes cannot be had.
            MismatchError: an entry that a stage makes is not finite.
        """

    def rows(self, part: Stored | StageTensor, numbers: Numbers, width: int) -> Held:
        """The rows of a tensor of these numbers.

        Raises:
            ModelError: the bytes cannot be had.
        """

    def raw(self, stored: Stored, start: int, stop: int) -> NDArray[np.uint8]:
        """A stored tensor's bytes ``[start, stop)``.

        Raises:
            ModelError: they cannot be had.
        """

    def router(self, source: Routed) -> Array:
        """A router's rows."""

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, made once a job."""

    def factor(self, source: Factor, start: int, stop: int, load: Load) -> tuple[Array, Geometry]:
        """The entries of A or B, which two jobs make together; and how the matrix and ``scale * B @ A`` lie."""

    def tell(self, start: int, seen: Geometry) -> None:
        """What was seen of the block that starts there, in place of what its entries tell."""


def floats(*shape: int) -> Array:
    """Room for numbers in float32."""
    return np.empty(shape, np.float32)


def read_whole(source: Input, load: Load) -> Array:
    """All entries of a small source, in its shape."""
    entries = math.prod(source.shape)
    return load(source, 0, entries, floats(entries)).reshape(source.shape)


def read_entries(tensors: StoredTensors, part: Stored | StageTensor, start: int, stop: int, out: Array) -> Array:
    """A tensor's entries in float32, in the front of `out`; see `StoredTensors.bits`."""
    with tile():
        found = tensors.bits(part, start, stop)
        return found.floats(0, found.bits.size, out)


def read_rows(tensors: StoredTensors, part: Stored | StageTensor, numbers: Numbers) -> Array:
    """A tensor's rows of these numbers in float32."""
    out = floats(len(numbers), math.prod(part.shape[1:]))
    found = tensors.rows(part, numbers, out.shape[1])
    found.floats(0, found.bits.size, out.reshape(-1))
    return out


def rows_of_map(source: Rows, start: int, stop: int, out: Array, tensors: StoredTensors) -> Array:
    """Rows of a map: a run of one tensor's rows as it lies there, else a few rows at a time."""
    width = source.width
    first, last = start // width, -(-stop // width)
    if (shift := _run(source.map, first, last)) is not None:
        part, rows = shift
        return read_entries(tensors, source.parts[part], start + rows * width, stop + rows * width, out)
    step = max(1, CHUNK_ENTRIES // width)
    for row in range(first, last, step):
        until = min(row + step, last)
        made = _gather(source, np.arange(row, until), tensors).reshape(-1)
        begin, end = max(start, row * width), min(stop, until * width)
        out[begin - start : end - start] = made[begin - row * width : end - row * width]
    return out[: stop - start]


def _run(rows: RowMap, first: int, last: int) -> tuple[int, int] | None:
    """If these rows are consecutive ones of a single part: its number, and how many rows later they lie there."""
    begin, end = rows.starts[first], rows.starts[last]
    numbers = rows.rows[begin:end]
    if end - begin != last - first or numbers[0] == ALL_ROWS:
        return None
    ahead = numbers - np.arange(first, last)
    single = (np.diff(rows.starts[first : last + 1]) == 1).all() and (
        rows.tensors[begin:end] == rows.tensors[begin]
    ).all()
    return (int(rows.tensors[begin]), int(ahead[0])) if single and (ahead == ahead[0]).all() else None


def _gather(source: Rows, places: Numbers, tensors: StoredTensors) -> Array:
    """These rows of a map, each the mean of the stored rows that it is made of."""
    begins, counts = source.map.starts[places], source.map.starts[places + 1] - source.map.starts[places]
    if (counts == 1).all():
        return _read_listed(source, begins, tensors)
    made = np.zeros((len(places), source.width), np.float32)
    for turn in range(int(counts.max(initial=0))):
        at = np.flatnonzero(counts > turn)
        made[at] += _read_listed(source, begins[at] + turn, tensors)
    made /= np.maximum(counts, 1).astype(np.float32)[:, None]
    return made


def _read_listed(source: Rows, entries: Numbers, tensors: StoredTensors) -> Array:
    """The stored rows that a map's lists name at these places."""
    found = floats(len(entries), source.width)
    of, numbers = source.map.tensors[entries], source.map.rows[entries]
    for part in np.unique(of):
        stored = source.parts[part]
        at = np.flatnonzero((of == part) & (numbers != ALL_ROWS))
        found[at] = read_rows(tensors, stored, numbers[at])
        if len(averaged := np.flatnonzero((of == part) & (numbers == ALL_ROWS))):
            found[averaged] = tensors.once(("mean", stored), partial(_mean, stored, tensors))
    return found


def _mean(part: Stored | StageTensor, tensors: StoredTensors) -> Array:
    """The mean of all rows of a tensor, summed in float64."""
    count, width = part.shape[0], math.prod(part.shape[1:])
    total = np.zeros(width)
    step = max(1, CHUNK_ENTRIES // width)
    for row in range(0, count, step):
        total += read_rows(tensors, part, np.arange(row, min(row + step, count))).sum(axis=0, dtype=np.float64)
    return (total / count).astype(np.float32)
