"""Sources that are products of two small matrices: what a LoRA adapter adds, and what becomes an adapter.

Not here: which adapter changes what (models.adapter, loras), and the arithmetic (engine.inputs).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from merger.models.lora.modules import AdaptedModule
from merger.planning.inputs.base import Input, Stored
from merger.planning.inputs.derived import Constant

PRODUCT_ENTRIES = 1 << 17
"""How many entries of a product of two small matrices are made at once: whole rows, at the same places always."""


@dataclass(frozen=True)
class LowRank(Input):
    """A matrix and what a LoRA adapter adds to it: ``scale * B @ A``, transposed where the matrix is.

    Args:
        of: the matrix.
        a: A, one column for each input.
        b: B, one row for each output.
        scale: what the product is multiplied by.
        transposed: whether the matrix has its inputs as rows.
        magnitude: of DoRA the length that each row of the sum is brought to.
    """

    kind = "low-rank"
    words: ClassVar = {"transposed": "turned"}
    of: Input
    a: Input
    b: Input
    scale: float
    transposed: bool = False
    magnitude: Stored | None = None

    @property
    def rank(self) -> int:
        """How many directions the product has."""
        return self.a.shape[0]

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns; of a kernel its first side against all others."""
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def chunk_rows(self) -> int:
        """How many rows are made at once."""
        return max(1, PRODUCT_ENTRIES // max(1, self.matrix[1]))

    @property
    def reread(self) -> tuple[Stored, ...]:
        """The adapter's; the matrix's too where whole rows of it are looked at."""
        small = (*self.a.stored_tensors, *self.b.stored_tensors)
        return (*self.stored_tensors, *self.of.reread) if self.magnitude else (*self.of.reread, *small)

    @property
    def workspace_bytes(self) -> int:
        """The one small matrix as stored and in float32, some rows of the other, and of the product and the sum."""
        rows, columns = self.chunk_rows, self.matrix[1]
        small = 12 * self.rank * columns + 4 * rows * (2 * self.rank + 3 * columns)
        return self.of.workspace_bytes + max(self.a.workspace_bytes, self.b.workspace_bytes) + small


@dataclass(frozen=True)
class ExpertColumns(Input):
    """Of a B of several experts the columns of one of them.

    Args:
        of: B, in whose rows the experts' entries take turns.
        expert: the expert.
        experts: how many there are.
    """

    kind = "expert columns"
    scattered = True  # rows of B are read more than once
    of: Stored
    expert: int
    experts: int

    @property
    def shape(self) -> tuple[int, ...]:
        """As many rows, and a column for each direction."""
        return (self.of.shape[0], self.of.shape[1] // self.experts)

    @property
    def chunk_rows(self) -> int:
        """How many rows of B are read at once."""
        return max(1, PRODUCT_ENTRIES // self.of.shape[1])

    @property
    def workspace_bytes(self) -> int:
        """Some whole rows of B, as stored and in float32."""
        return 8 * max(PRODUCT_ENTRIES, self.of.shape[1])


@dataclass(frozen=True)
class ExpertsLowRank(Input):
    """Matrices of several experts, one behind the other, and what a LoRA adapter adds to each of them.

    Args:
        of: the matrices.
        a: A of one expert behind that of the other.
        b: B, in whose rows the experts' entries take turns.
        scale: what the products are multiplied by.
        transposed: whether the matrices have their inputs as rows.
    """

    kind = "low-rank experts"
    words: ClassVar = {"transposed": "turned"}
    of: Input
    a: Stored
    b: Stored
    scale: float
    transposed: bool

    def encode(self) -> dict[str, Any]:
        return {**super().encode(), "experts": self.shape[0]}

    @property
    def rank(self) -> int:
        """How many directions the product of one expert has."""
        return self.a.shape[0] // self.shape[0]

    @property
    def chunk_rows(self) -> int:
        """How many rows of one expert are made at once."""
        return max(1, PRODUCT_ENTRIES // max(1, self.shape[2]))

    @property
    def reread(self) -> tuple[Stored, ...]:
        """The adapter's."""
        return (*self.of.reread, self.a, self.b)

    @property
    def workspace_bytes(self) -> int:
        """B as stored and in float32, and of one expert A, some rows of the product and of the sum."""
        _, rows, columns = self.shape
        small = 12 * self.rank * (rows + columns) + 8 * self.chunk_rows * columns
        return self.of.workspace_bytes + 8 * self.b.tensor.entries + small


@dataclass(frozen=True)
class Added(Input):
    """A tensor and a small one of its shape that is added to it, times `scale`."""

    kind = "added"
    to: Input
    plus: Stored
    scale: float

    @property
    def workspace_bytes(self) -> int:
        """The other's entries in float32."""
        return self.to.workspace_bytes + 4 * self.plus.tensor.entries


@dataclass(frozen=True)
class Transposed(Input):
    """A small matrix that is stored as its transpose."""

    kind = "transposed"
    scattered = True  # some rows are some of every stored row
    transpose: Stored

    @property
    def shape(self) -> tuple[int, ...]:
        """The stored one's the other way round."""
        return self.transpose.shape[::-1]

    @property
    def workspace_bytes(self) -> int:
        """All of it in float32, once more than those have it who read it."""
        return 4 * self.transpose.tensor.entries


def factors(adapter: int, module: AdaptedModule) -> tuple[Input, Input]:
    """A and B of a module, in the files of the adapter of that number."""
    if not module.transposed:
        return Stored(adapter, module.a), Stored(adapter, module.b)
    a, b = (Stored(adapter, replace(one, shape=one.shape[::-1])) for one in (module.a, module.b))
    return Transposed(a), Transposed(b)


def with_product(source: Input, adapter: int, module: AdaptedModule, transposed: bool) -> Input:
    """A tensor and what the adapter of that number adds to it for a module."""
    a, b = factors(adapter, module)
    if len(source.shape) != 3 and module.experts == 1:
        lengths = None if module.magnitude is None else Stored(adapter, module.magnitude)
        return LowRank(source, a, b, module.scale, transposed, lengths)
    assert isinstance(a, Stored)
    assert isinstance(b, Stored), "experts are stored as PEFT has them"
    if module.expert is None:
        return ExpertsLowRank(source, a, b, module.scale, transposed)
    return LowRank(source, a, ExpertColumns(b, module.expert, module.experts), module.scale)


# ---- what becomes an adapter ----------------------------------------------------------------------------------------

FACTOR_ENTRIES = 1 << 20
"""How many entries of a matrix are looked at at once while it is taken apart: whole rows."""

OVERSAMPLING = 16
"""How many directions more than wanted are followed while a matrix is taken apart."""


@dataclass(frozen=True)
class Difference(Input):
    """What one tensor has more than another of its shape; who reads it counts the second's block."""

    kind = "difference"
    minuend: Input
    subtrahend: Input


@dataclass(frozen=True)
class MergedDeltas(Input):
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

    kind = "merged deltas"
    scattered = True
    deltas: tuple[LowRank | Constant, ...]
    method: str
    arguments: tuple[tuple[str, Any], ...]
    random: tuple[int, str] | None
    space: Literal["full", "rows", "columns", "core"]
    blocks: int

    @property
    def dtype(self) -> str:
        """That of the first adapter's numbers."""
        return self.stored_tensors[0].dtype

    @property
    def rank(self) -> int:
        """How many directions the adapters have together."""
        return sum(delta.rank for delta in self.deltas if isinstance(delta, LowRank))

    @property
    def workspace_bytes(self) -> int:
        """The deltas in the space where they are merged, what the method holds besides, and the bases of that space."""
        rows, columns = self.shape
        bases = 6 * 8 * self.rank * (rows + columns)
        rows = min(rows, self.rank) if self.space in ("rows", "core") else rows
        columns = min(columns, self.rank) if self.space in ("columns", "core") else columns
        return bases + (len(self.deltas) + self.blocks + 2) * 4 * rows * columns


@dataclass(frozen=True)
class Factor(Input):
    """One of the two small matrices A and B of an adapter whose ``scale * B @ A`` is as near as can be to a matrix.

    Args:
        product: the matrix.
        rank: how many directions they have.
        part: which of them.
        scale: see there.
        transposed: whether the matrix has the inputs as rows: then it is the transpose that B A is near to.
        spread: whether the singular values are shared between both; else B has them.
    """

    kind = "factor"
    scattered = True  # a matrix is read several times
    words: ClassVar = {"transposed": "turned"}
    product: Difference | MergedDeltas
    rank: int
    part: Literal["A", "B"]
    scale: float = 1.0
    transposed: bool = False
    spread: bool = False

    @property
    def pair(self) -> Factor:
        """Names both parts: they are made together, when the first of them, A, is asked for."""
        return replace(self, part="A")

    @property
    def shape(self) -> tuple[int, ...]:
        """A has a column for each input, B a row for each output."""
        outputs, inputs = self.product.shape[::-1] if self.transposed else self.product.shape
        return (self.rank, inputs) if self.part == "A" else (outputs, self.rank)

    @property
    def stored_tensors(self) -> tuple[Stored, ...]:
        """The matrix's for A, with which B is made."""
        return self.product.stored_tensors if self.part == "A" else ()

    @property
    def workspace_bytes(self) -> int:
        """Directions of rows and columns in float64, some rows of the matrix, and the two pairs that may be waiting."""
        ends = sum(self.product.shape)
        chunk = max(FACTOR_ENTRIES, self.product.shape[1])
        return self.product.workspace_bytes + 40 * (self.rank + OVERSAMPLING) * ends + 8 * self.rank * ends + 16 * chunk
