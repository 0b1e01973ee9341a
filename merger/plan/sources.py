"""Where an input's entries come from: a tensor of a model as it is stored, or stored tensors and a step on the way in.

Adapters, tokenizers' row maps, scales and stages are such steps; each is one dataclass here, and one reading of it in
engine.sources. Not here: reading bytes (engine), and which source an input has (jobs).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from merger.checkpoints.checkpoint import TensorInfo


class Source(Protocol):
    """The entries of an input, in its own shape.

    Its fields are part of the plan's hash: two kinds of source must not have the same names of fields.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what it gives."""

    @property
    def dtype(self) -> str:
        """The dtype, as safetensors writes it, that a result has which follows this input."""

    @property
    def leaves(self) -> tuple[Stored, ...]:
        """The stored tensors that it reads; the one that names it is the first."""

    @property
    def again(self) -> tuple[Stored, ...]:
        """Those leaves of which a block reads more than its own entries: from afar they are kept on disk."""

    @property
    def scratch(self) -> int:
        """Bytes of memory that reading a block of it takes, beside the block's float32 entries."""


@dataclass(frozen=True)
class Stored:
    """A tensor of a model as it is stored.

    Args:
        model: the model's number in the locked recipe.
        tensor: the tensor and its place.
    """

    model: int
    tensor: TensorInfo

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's."""
        return self.tensor.shape

    @property
    def dtype(self) -> str:
        """The tensor's."""
        return self.tensor.dtype

    @property
    def leaves(self) -> tuple[Stored, ...]:
        """Itself."""
        return (self,)

    @property
    def again(self) -> tuple[Stored, ...]:
        """None: a block reads its own entries."""
        return ()

    @property
    def scratch(self) -> int:
        """None: the bytes as stored are counted for every job."""
        return 0


# ---- rows of tokens -------------------------------------------------------------------------------------------------

Numbers = NDArray[np.int64]
ALL_ROWS = -1
"""In a row map, in place of a row's number: the mean of all rows of that tensor."""

CHUNK_ENTRIES = 1 << 17
"""How many entries of rows that come from here and there are put together at once."""


class RowMap:
    """For each row of a tensor the rows that it is the mean of; a row of none is zeros.

    Two are equal if they say the same; as text a map is its digest.

    Args:
        starts: row r is the mean of the rows number ``starts[r]`` to ``starts[r + 1]`` of the following lists.
        leaves: for each of them the number of the tensor that it is a row of.
        rows: its number there, or ALL_ROWS.
    """

    def __init__(self, starts: Numbers, leaves: Numbers, rows: Numbers) -> None:
        self.starts, self.leaves, self.rows = starts, leaves, rows

    def __len__(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def digest(self) -> str:
        """Names what it says."""
        parts = (part.astype("<i8").tobytes() for part in (self.starts, self.leaves, self.rows))
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def __str__(self) -> str:
        return f"{len(self)} rows {self.digest}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowMap) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def is_identity(self, leaf: int) -> bool:
        """Whether each row is the row of the same number of this tensor."""
        whole = np.arange(len(self))
        return len(self.rows) == len(self) and bool((self.leaves == leaf).all() and (self.rows == whole).all())

    def among(self, leaves: Sequence[int]) -> RowMap:
        """The same map with each leaf's place in this list for its number."""
        places = np.zeros(max(leaves) + 1, dtype=np.int64)
        places[list(leaves)] = range(len(leaves))
        return RowMap(self.starts, places[self.leaves], self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes."""
        return self.starts.nbytes + self.leaves.nbytes + self.rows.nbytes


@dataclass(frozen=True)
class Rows:
    """A tensor with a row for each token of another vocabulary, put together from tensors with one for each of theirs.

    Args:
        leaves: those tensors; the first is the one in whose place it stands.
        map: which rows of them make which row.
    """

    leaves: tuple[Stored, ...]
    map: RowMap

    @property
    def shape(self) -> tuple[int, ...]:
        """As many rows as the map has, as wide as the tensors."""
        return (len(self.map), *self.leaves[0].shape[1:])

    @property
    def width(self) -> int:
        """How many entries a row has."""
        return math.prod(self.leaves[0].shape[1:])

    @property
    def dtype(self) -> str:
        """The first tensor's."""
        return self.leaves[0].dtype

    @property
    def again(self) -> tuple[Stored, ...]:
        """All: rows are read in any order."""
        return self.leaves

    @property
    def scratch(self) -> int:
        """Two chunks of rows in float32, one as stored."""
        return 16 * max(CHUNK_ENTRIES, 2 * self.width)


def held(source: Source) -> int:
    """Bytes of memory that a source keeps for as long as its job is planned or under way."""
    return source.map.nbytes if isinstance(source, Rows) else 0
