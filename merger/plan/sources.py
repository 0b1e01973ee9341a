"""Where an input's entries come from: a tensor of a model as it is stored, or stored tensors and a step on the way in.

Adapters, tokenizers' row maps, scales, stages and noise are such steps; each is one dataclass here, and one reading of
it in engine.sources. Not here: reading bytes (engine), and which source an input has (jobs).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from merger.checkpoints.checkpoint import ITEM_BYTES, TensorInfo

if TYPE_CHECKING:
    from merger.plan.jobs import Job


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


@dataclass(frozen=True)
class Made:
    """What a stage of the recipe makes, rounded to the stage's dtype; it is never stored as a model.

    Args:
        stage: the stage's number in the locked recipe.
        name: the tensor's name there.
        seed: the stage's, for methods that draw random numbers.
        job: how it is made; the plan's hash has it once, however often it is used.
    """

    stage: int
    name: str
    seed: int
    job: Job = field(compare=False, repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what the stage makes."""
        return self.job.shape

    @property
    def dtype(self) -> str:
        """The dtype to which the stage rounds."""
        return self.job.dtype

    @cached_property
    def leaves(self) -> tuple[Stored, ...]:
        """All that is read for it."""
        return self.job.reads

    @property
    def again(self) -> tuple[Stored, ...]:
        """None of its own: plan.work finds what is read more than once."""
        return ()

    @property
    def scratch(self) -> int:
        """None of its own: plan.work counts the memory of its job."""
        return 0


@dataclass(frozen=True)
class Dequantised:
    """A tensor that is stored as numbers of few bits and scales: each number times the scale of its block.

    Args:
        numbers: the stored numbers, in rows and columns.
        scales: a scale for each block of them.
        block: how many rows and columns a block has.
        dtype: the dtype of the model that it was made from.
    """

    numbers: Stored
    scales: Stored
    block: tuple[int, int]
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the numbers."""
        return self.numbers.shape

    @property
    def leaves(self) -> tuple[Stored, ...]:
        """Numbers and scales."""
        return (self.numbers, self.scales)

    @property
    def again(self) -> tuple[Stored, ...]:
        """The scales: those of a row of blocks belong to more rows than one block has."""
        return (self.scales,)

    @property
    def scratch(self) -> int:
        """The scales of some rows, once for each row."""
        rows, columns = self.shape
        return 4 * rows * -(-columns // self.block[1])


class _Unread:
    """What sources have in common that read no stored tensor."""

    @property
    def leaves(self) -> tuple[Stored, ...]:
        """None."""
        return ()

    @property
    def again(self) -> tuple[Stored, ...]:
        """None."""
        return ()

    @property
    def scratch(self) -> int:
        """None, unless it says so."""
        return 0


DRAWN_AT_ONCE = 1 << 16
"""How many random numbers are made at once: this bounds memory, and changes no number."""


@dataclass(frozen=True)
class Drawn(_Unread):
    """Random numbers by position: every entry has its own, whoever asks for it and when.

    Args:
        size: the shape.
        law: ``normal`` with mean 0, or ``uniform`` around 0.
        spread: the standard deviation, or the largest magnitude.
        seed: the recipe's.
        stream: other numbers for another one: the output tensor's name.
    """

    size: tuple[int, ...]
    law: str
    spread: float
    seed: int
    stream: str

    @property
    def shape(self) -> tuple[int, ...]:
        """As given."""
        return self.size

    @property
    def dtype(self) -> str:
        """What they are drawn in."""
        return "F32"

    @property
    def scratch(self) -> int:
        """What the arithmetic takes, in float64."""
        return 12 * 8 * DRAWN_AT_ONCE


@dataclass(frozen=True)
class Noised:
    """A source with random numbers added."""

    quiet: Source
    noise: Drawn

    @property
    def shape(self) -> tuple[int, ...]:
        """The quiet one's."""
        return self.quiet.shape

    @property
    def dtype(self) -> str:
        """The quiet one's."""
        return self.quiet.dtype

    @property
    def leaves(self) -> tuple[Stored, ...]:
        """The quiet one's."""
        return self.quiet.leaves

    @property
    def again(self) -> tuple[Stored, ...]:
        """The quiet one's."""
        return self.quiet.again

    @property
    def scratch(self) -> int:
        """Of both."""
        return self.quiet.scratch + self.noise.scratch


@dataclass(frozen=True)
class Zeros(_Unread):
    """A tensor of zeros, for one that no model has; `like` is the dtype of what it stands beside."""

    zeros: tuple[int, ...]
    like: str

    @property
    def shape(self) -> tuple[int, ...]:
        """As given."""
        return self.zeros

    @property
    def dtype(self) -> str:
        """As given."""
        return self.like


@dataclass(frozen=True)
class Routed(_Unread):
    """Rows of a layer's router, computed from prompts before the first block is made (plan.routing counts that).

    Args:
        mode: how, as recipes call it.
        layer: the layer.
        width: entries of a row.
        prompts: for each row the positive and the negative prompts.
    """

    mode: str
    layer: int
    width: int
    prompts: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """A row for each expert."""
        return (len(self.prompts), self.width)

    @property
    def dtype(self) -> str:
        """What it is computed in."""
        return "F32"


def ends(source: Source) -> Iterator[Stored | Made]:
    """The stored tensors and the stages that a source reads itself; not those that a stage of it reads."""
    if isinstance(source, Stored | Made):
        yield source
        return
    for value in vars(source).values():
        parts = value if isinstance(value, tuple) else (value,)
        if parts and hasattr(parts[0], "again"):
            for part in parts:
                yield from ends(part)


# ---- rows of tokens -------------------------------------------------------------------------------------------------

Numbers = NDArray[np.int64]
ALL_ROWS = -1
"""In a row map, in place of a row's number: the mean of all rows of that tensor."""

CHUNK_ENTRIES = 1 << 17
"""How many entries of rows that come from here and there are put together at once."""


class _Lists:
    """Lists of numbers: two are equal if they hold the same, and as text they are their digest."""

    def __init__(self, *lists: Numbers) -> None:
        self._lists = lists

    @cached_property
    def digest(self) -> str:
        """Names what they hold."""
        found = hashlib.sha256()
        for numbers in self._lists:
            found.update(f"{len(numbers)} ".encode())
            found.update(numbers.astype("<i8").tobytes())
        return found.hexdigest()

    def __str__(self) -> str:
        return self.digest

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Lists) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that they take."""
        return sum(numbers.nbytes for numbers in self._lists)


class RowMap(_Lists):
    """For each row of a tensor the rows that it is the mean of; a row of none is zeros.

    Args:
        starts: row r is the mean of the rows number ``starts[r]`` to ``starts[r + 1]`` of the following lists.
        leaves: for each of them the number of the tensor that it is a row of.
        rows: its number there, or ALL_ROWS.
    """

    def __init__(self, starts: Numbers, leaves: Numbers, rows: Numbers) -> None:
        super().__init__(starts, leaves, rows)
        self.starts, self.leaves, self.rows = starts, leaves, rows

    def __len__(self) -> int:
        return len(self.starts) - 1

    def is_identity(self, leaf: int) -> bool:
        """Whether each row is the row of the same number of this tensor."""
        whole = np.arange(len(self))
        return len(self.rows) == len(self) and bool((self.leaves == leaf).all() and (self.rows == whole).all())

    def among(self, leaves: Sequence[int]) -> RowMap:
        """The same map with each leaf's place in this list for its number."""
        places = np.zeros(max(leaves) + 1, dtype=np.int64)
        places[list(leaves)] = range(len(leaves))
        return RowMap(self.starts, places[self.leaves], self.rows)


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
class Rows:
    """A tensor with a row for each token of another vocabulary, put together from tensors with one for each of theirs.

    Args:
        parts: those tensors; the first is the one in whose place it stands.
        map: which rows of them make which row.
    """

    parts: tuple[Stored | Made, ...]
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
    def dtype(self) -> str:
        """The first tensor's."""
        return self.parts[0].dtype

    @property
    def leaves(self) -> tuple[Stored, ...]:
        """All that is read for its parts."""
        return tuple(dict.fromkeys(leaf for part in self.parts for leaf in part.leaves))

    @property
    def again(self) -> tuple[Stored, ...]:
        """All: rows are read in any order."""
        return self.leaves

    @property
    def scratch(self) -> int:
        """A chunk of rows, those read for it, and those of one tensor, in float32 and as stored."""
        return 24 * max(CHUNK_ENTRIES, self.width)


PURSUED_ROWS = 64
"""How many rows are pursued together: always the same ones, so that no block changes a bit of them."""

PURSUED_ATOMS = 1 << 22
"""How many entries of the shared rows are in float32 at once."""


@dataclass(frozen=True)
class Pursuit:
    """Rows of which some are put together from few others, as another model's rows of the same tokens tell.

    Args:
        known: the rows; those that are wanted are zeros in it.
        donor: the tensor of the model that has all tokens.
        pairs: which rows of `donor` and of the first leaf of `known` belong together, and which are wanted.
        k: how many rows a wanted one is put together from, at most.
    """

    known: Rows
    donor: Stored | Made
    pairs: RowPairs
    k: int

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the known rows."""
        return self.known.shape

    @property
    def dtype(self) -> str:
        """That of the known rows."""
        return self.known.dtype

    @property
    def leaves(self) -> tuple[Stored, ...]:
        """Those of the known rows, then the donor's."""
        return (*self.known.leaves, *self.donor.leaves)

    @property
    def again(self) -> tuple[Stored, ...]:
        """All: rows are read in any order."""
        return self.leaves

    @property
    def scratch(self) -> int:
        """Targets, what is left of them, basis and chosen rows; the shared rows in float32, and their scores."""
        width = self.donor.shape[1]
        chosen = min(self.k, width) * (PURSUED_ROWS * width + 6 * width + 2 * self.known.width)
        atoms = 2 * max(PURSUED_ATOMS, width) + PURSUED_ROWS * len(self.pairs.shared)
        return self.known.scratch + 4 * (chosen + atoms + 3 * PURSUED_ROWS * (width + self.known.width))


def held(source: Source) -> int:
    """Bytes of memory that a source keeps for as long as its job is planned or under way."""
    if isinstance(source, Pursuit):
        shared = len(source.pairs.shared) * (source.donor.shape[1] * ITEM_BYTES[source.donor.dtype] + 4)
        made = len(source.pairs.wanted) * source.known.width * 4
        return held(source.known) + source.pairs.nbytes + shared + made
    return source.map.nbytes if isinstance(source, Rows) else 0


# ---- adapters -------------------------------------------------------------------------------------------------------

PRODUCT_ENTRIES = 1 << 17
"""How many entries of a product of two small matrices are made at once: whole rows, at the same places always."""


@dataclass(frozen=True)
class LowRank:
    """A matrix and what a LoRA adapter adds to it: ``scale * B @ A``, the other way round where it is turned.

    Args:
        of: the matrix.
        a: A, one column for each input.
        b: B, one row for each output.
        scale: what the product is multiplied by.
        turned: whether the matrix has its inputs as rows.
        magnitude: of DoRA the length that each row of the sum is brought to.
    """

    of: Source
    a: Stored
    b: Stored
    scale: float
    turned: bool = False
    magnitude: Stored | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The matrix's."""
        return self.of.shape

    @property
    def dtype(self) -> str:
        """The matrix's."""
        return self.of.dtype

    @property
    def rank(self) -> int:
        """How many directions the product has."""
        return self.a.shape[0]

    @property
    def chunk_rows(self) -> int:
        """How many rows are made at once."""
        return max(1, PRODUCT_ENTRIES // max(1, self.shape[1]))

    @property
    def leaves(self) -> tuple[Stored, ...]:
        """The matrix's, then the adapter's."""
        return (*self.of.leaves, self.a, self.b, *([self.magnitude] if self.magnitude else []))

    @property
    def again(self) -> tuple[Stored, ...]:
        """The adapter's; the matrix's too where whole rows of it are looked at."""
        adapters = self.leaves[len(self.of.leaves) :]
        return (*self.leaves, *self.of.again) if self.magnitude else (*self.of.again, *adapters)

    @property
    def scratch(self) -> int:
        """The one small matrix as stored and in float32, some rows of the other, and of the product and the sum."""
        rows, columns = self.chunk_rows, self.shape[1]
        return self.of.scratch + 12 * self.rank * columns + 4 * rows * (2 * self.rank + 3 * columns)


@dataclass(frozen=True)
class Added:
    """A tensor and a small one of its shape that is added to it, times `scale`."""

    to: Source
    plus: Stored
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """The first one's."""
        return self.to.shape

    @property
    def dtype(self) -> str:
        """The first one's."""
        return self.to.dtype

    @property
    def leaves(self) -> tuple[Stored, ...]:
        """The first one's, then the other."""
        return (*self.to.leaves, self.plus)

    @property
    def again(self) -> tuple[Stored, ...]:
        """None but the first one's: a block reads its own entries of both."""
        return self.to.again

    @property
    def scratch(self) -> int:
        """The other's entries in float32."""
        return self.to.scratch + 4 * self.plus.tensor.entries


# ---- what becomes an adapter ----------------------------------------------------------------------------------------

FACTOR_ENTRIES = 1 << 20
"""How many entries of a matrix are looked at at once while it is taken apart: whole rows."""

OVERSAMPLING = 16
"""How many directions more than wanted are followed while a matrix is taken apart."""


@dataclass(frozen=True)
class Difference:
    """What one tensor has more than another of its shape."""

    minuend: Source
    subtrahend: Source

    @property
    def shape(self) -> tuple[int, ...]:
        """That of both."""
        return self.minuend.shape

    @property
    def dtype(self) -> str:
        """The first one's."""
        return self.minuend.dtype

    @property
    def leaves(self) -> tuple[Stored, ...]:
        """Those of both."""
        return (*self.minuend.leaves, *self.subtrahend.leaves)

    @property
    def again(self) -> tuple[Stored, ...]:
        """Those of both."""
        return (*self.minuend.again, *self.subtrahend.again)

    @property
    def scratch(self) -> int:
        """That of both; those who read it count its second block, whose size they know."""
        return self.minuend.scratch + self.subtrahend.scratch


@dataclass(frozen=True)
class MergedDeltas:
    """What a merge method makes of the deltas of several adapters, each of them ``scale * B @ A`` or zeros.

    Args:
        deltas: one of each adapter.
        method: the method's name.
        arguments: what it is called with besides, as pairs of name and value.
        random: what its random numbers are drawn by, if it draws some: a seed and a name.
        space: ``full``: the matrices themselves; ``rows``, ``columns``, ``core``: the directions in which the adapters
            write, read or both (Core Space), which is where their deltas lie.
        blocks: how many matrices the method may hold at once besides its inputs.
    """

    deltas: tuple[LowRank | Zeros, ...]
    method: str
    arguments: tuple[tuple[str, Any], ...]
    random: tuple[int, str] | None
    space: Literal["full", "rows", "columns", "core"]
    blocks: int

    @property
    def shape(self) -> tuple[int, ...]:
        """That of each delta."""
        return self.deltas[0].shape

    @property
    def dtype(self) -> str:
        """That of the first adapter's numbers."""
        return self.leaves[0].dtype

    @property
    def rank(self) -> int:
        """How many directions the adapters have together."""
        return sum(delta.rank for delta in self.deltas if isinstance(delta, LowRank))

    @property
    def leaves(self) -> tuple[Stored, ...]:
        """The adapters' small matrices."""
        return tuple(leaf for delta in self.deltas for leaf in delta.leaves)

    @property
    def again(self) -> tuple[Stored, ...]:
        """All."""
        return self.leaves

    @property
    def scratch(self) -> int:
        """The deltas in the space where they are merged, what the method holds besides, and the bases of that space."""
        rows, columns = self.shape
        bases = 6 * 8 * self.rank * (rows + columns)
        rows = min(rows, self.rank) if self.space in ("rows", "core") else rows
        columns = min(columns, self.rank) if self.space in ("columns", "core") else columns
        return bases + (len(self.deltas) + self.blocks + 2) * 4 * rows * columns


@dataclass(frozen=True)
class Factor:
    """One of the two small matrices A and B of an adapter whose ``scale * B @ A`` is as near as can be to a matrix.

    Args:
        product: the matrix.
        rank: how many directions they have.
        part: which of them.
        scale: see there.
        turned: whether the matrix has the inputs as rows: then it is the transpose that B A is near to.
        spread: whether the singular values are shared between both; else B has them.
    """

    product: Difference | MergedDeltas
    rank: int
    part: Literal["A", "B"]
    scale: float = 1.0
    turned: bool = False
    spread: bool = False

    @property
    def pair(self) -> Factor:
        """Names both parts: they are made together, when the first of them, A, is asked for."""
        return replace(self, part="A")

    @property
    def shape(self) -> tuple[int, ...]:
        """A has a column for each input, B a row for each output."""
        outputs, inputs = self.product.shape[::-1] if self.turned else self.product.shape
        return (self.rank, inputs) if self.part == "A" else (outputs, self.rank)

    @property
    def dtype(self) -> str:
        """The matrix's."""
        return self.product.dtype

    @property
    def leaves(self) -> tuple[Stored, ...]:
        """The matrix's for A, with which B is made."""
        return self.product.leaves if self.part == "A" else ()

    @property
    def again(self) -> tuple[Stored, ...]:
        """All: a matrix is read several times."""
        return self.leaves

    @property
    def scratch(self) -> int:
        """Directions of rows and columns in float64, some rows of the matrix, and the two pairs that may be waiting."""
        ends = sum(self.product.shape)
        chunk = max(FACTOR_ENTRIES, self.product.shape[1])
        return self.product.scratch + 40 * (self.rank + OVERSAMPLING) * ends + 8 * self.rank * ends + 16 * chunk
