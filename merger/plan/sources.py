"""Where an input's entries come from: a tensor of a model as it is stored, or stored tensors and a step on the way in.

Adapters, tokenizers' row maps, scales and stages are such steps; each is one dataclass here, and one reading of it in
engine.sources. Not here: reading bytes (engine), and which source an input has (jobs).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

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
