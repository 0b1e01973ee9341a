"""Sources that have a row for each token of another vocabulary: whose rows they are put together from.

Not here: which rows those are (inputs.new_rows), and reading them (engine.inputs.stored, engine.inputs.pursuit).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from merger.models.checkpoint import ITEM_BYTES
from merger.planning.inputs.base import Input, StageTensor, Stored

Numbers = NDArray[np.int64]
ALL_ROWS = -1
"""In a row map, in place of a row's number: the mean of all rows of that tensor."""

CHUNK_ENTRIES = 1 << 17
"""How many entries of rows that come from here and there are put together at once."""


class _Lists:
    """Lists of numbers: two are equal if they hold the same."""

    def __init__(self, *lists: Numbers) -> None:
        self._lists = lists

    def encode(self) -> str:
        return self.digest

    @cached_property
    def digest(self) -> str:
        found = hashlib.sha256()
        for numbers in self._lists:
            found.update(f"{len(numbers)} ".encode())
            found.update(numbers.astype("<i8").tobytes())
        return found.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Lists) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def nbytes(self) -> int:
        return sum(numbers.nbytes for numbers in self._lists)


class RowMap(_Lists):
    """For each row of a tensor the rows that it is the mean of; a row of none is zeros.

    Args:
        starts: row r is the mean of the rows number ``starts[r]`` to ``starts[r + 1]`` of the following lists.
        tensors: for each of them the number of the tensor that it is a row of.
        rows: its number there, or ALL_ROWS.
    """

    def __init__(self, starts: Numbers, tensors: Numbers, rows: Numbers) -> None:
        super().__init__(starts, tensors, rows)
        self.starts, self.tensors, self.rows = starts, tensors, rows

    def __len__(self) -> int:
        return len(self.starts) - 1

    def is_identity(self, tensor: int) -> bool:
        """Whether each row is the row of the same number of this tensor."""
        whole = np.arange(len(self))
        return len(self.rows) == len(self) and bool((self.tensors == tensor).all() and (self.rows == whole).all())

    def among(self, tensors: Sequence[int]) -> RowMap:
        """The same map with each tensor's place in this list for its number."""
        places = np.zeros(max(tensors) + 1, dtype=np.int64)
        places[list(tensors)] = range(len(tensors))
        return RowMap(self.starts, places[self.tensors], self.rows)


class RowPairs(_Lists):
    """Rows of a model that lacks tokens, and of one that has them.

    Args:
        own: of each token that both have the row in the first one.
        shared: and in the second.
        wanted: of each token that the first lacks the row of the result, rising.
        theirs: and in the second.
    """

    def __init__(self, own: Numbers, shared: Numbers, wanted: Numbers, theirs: Numbers) -> None:
        super().__init__(own, shared, wanted, theirs)
        self.own, self.shared, self.wanted, self.theirs = own, shared, wanted, theirs


@dataclass(frozen=True)
class Rows(Input):
    """A tensor with a row for each token of another vocabulary, put together from tensors with one for each of theirs.

    Args:
        parts: those tensors; the first is the one in whose place it stands.
        map: which rows of them make which row.
    """

    kind = "rows"
    scattered = True  # rows are read in any order
    parts: tuple[Stored | StageTensor, ...]
    map: RowMap

    @property
    def shape(self) -> tuple[int, ...]:
        """As many rows as the map has, as wide as the tensors."""
        return (len(self.map), *self.parts[0].shape[1:])

    @property
    def width(self) -> int:
        """How many entries a row has."""
        return math.prod(self.parts[0].shape[1:])

    @property
    def workspace_bytes(self) -> int:
        """A chunk of rows, those read for it, and those of one tensor, in float32 and as stored."""
        return 24 * max(CHUNK_ENTRIES, self.width)


def with_rows(source: Input, rows: Stored, numbers: Sequence[int]) -> Rows:
    """A tensor with some of its rows replaced by these, each in the place of that number."""
    assert isinstance(source, Stored | StageTensor), "an embedding that is stored as it is"
    count = source.shape[0]
    tensors, taken = np.zeros(count, dtype=np.int64), np.arange(count)
    tensors[list(numbers)], taken[list(numbers)] = 1, range(len(numbers))
    return Rows((source, rows), RowMap(np.arange(count + 1), tensors, taken))


PURSUED_ROWS = 64
"""How many rows are pursued together: always the same ones, so that no block changes a bit of them."""

PURSUED_ATOMS = 1 << 22
"""How many entries of the shared rows are in float32 at once."""


@dataclass(frozen=True)
class Pursuit(Input):
    """Rows of which some are put together from few others, as another model's rows of the same tokens tell.

    Args:
        known: the rows; those that are wanted are zeros in it.
        complete: the tensor of the model that has all tokens.
        pairs: which rows of `complete` and of the first tensor of `known` belong together, and which are wanted.
        k: how many rows a wanted one is put together from, at most.
    """

    kind = "pursuit"
    scattered = True  # rows are read in any order
    words: ClassVar = {"complete": "donor"}
    known: Rows
    complete: Stored | StageTensor
    pairs: RowPairs
    k: int

    @property
    def workspace_bytes(self) -> int:
        """Targets, what is left of them, basis and chosen rows; the shared rows in float32, and their scores."""
        width = self.complete.shape[1]
        chosen = min(self.k, width) * (PURSUED_ROWS * width + 6 * width + 2 * self.known.width)
        atoms = 2 * max(PURSUED_ATOMS, width) + PURSUED_ROWS * len(self.pairs.shared)
        return self.known.workspace_bytes + 4 * (chosen + atoms + 3 * PURSUED_ROWS * (width + self.known.width))


def held_bytes(source: Input) -> int:
    """Bytes of memory that a source keeps for as long as its job is planned or under way."""
    if isinstance(source, Pursuit):
        shared = len(source.pairs.shared) * (source.complete.shape[1] * ITEM_BYTES[source.complete.dtype] + 4)
        made = len(source.pairs.wanted) * source.known.width * 4
        return held_bytes(source.known) + source.pairs.nbytes + shared + made
    return source.map.nbytes if isinstance(source, Rows) else 0
