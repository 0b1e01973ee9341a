"""Inputs that are made of stored tensors, or of none: read back from few bits, stacked by layers, drawn, zeros.

Not here: rows of other vocabularies (rows), and products of small matrices (low_rank).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from merger.methods.steps.step import TILE
from merger.planning.inputs.base import Input, Stored

UNPACKED_AT_ONCE = 1 << 19
"""How many entries of a packed tensor are made at once, if its rows are short enough."""

STRIDED_BYTES = 1 << 20
"""How many bytes of a stored tensor are read at once of which not all are wanted."""


@dataclass(frozen=True)
class Dequantised(Input):
    """A tensor that is stored as numbers of few bits and scales: each number times the scale of its block.

    Args:
        numbers: the stored numbers, in rows and columns.
        scales: a scale for each block of them.
        block: how many rows and columns a block has.
        restored: the dtype of the model that it was made from.
    """

    kind = "dequantised"
    words: ClassVar = {"restored": "dtype"}
    numbers: Stored
    scales: Stored
    block: tuple[int, int]
    restored: str

    @property
    def dtype(self) -> str:
        return self.restored

    @property
    def reread(self) -> tuple[Stored, ...]:
        """The scales: those of a row of blocks belong to more rows than one block has."""
        return (self.scales,)

    @property
    def workspace_bytes(self) -> int:
        """The scales of some rows, once for each row."""
        rows, columns = self.shape
        return 4 * rows * -(-columns // self.block[1])


@dataclass(frozen=True)
class Packed(Input):
    """A tensor that is stored as codes of a packed format.

    Args:
        form: the format's name.
        parts: the stored tensors by role, that of the codes first.
        size: its shape: a matrix, or several.
        settings: what reading it has to know besides.
        restored: the dtype of the model that it was made from.
    """

    kind = "packed"
    scattered = True  # rows are read whole, and in some formats those beside them
    form: str
    parts: tuple[tuple[str, Stored], ...]
    size: tuple[int, ...]
    settings: tuple[tuple[str, int | float | str], ...]
    restored: str

    def encode(self) -> dict[str, Any]:
        return {
            "form": self.form, "roles": tuple(role for role, _ in self.parts), "parts": self.children,
            "size": self.size, "settings": dict(self.settings), "dtype": self.restored,
        }  # fmt: skip

    @property
    def children(self) -> tuple[Input, ...]:
        return tuple(stored for _, stored in self.parts)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    @property
    def dtype(self) -> str:
        return self.restored

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of one of its matrices; of a vector each entry is a row."""
        return (self.size[0], 1) if len(self.size) == 1 else (self.size[-2], self.size[-1])

    @property
    def workspace_bytes(self) -> int:
        """Rows as they are stored, in float32 before and after they are scaled, and what looking them up takes."""
        return 24 * (UNPACKED_AT_ONCE + 32 * self.matrix[1]) + STRIDED_BYTES


@dataclass(frozen=True)
class Stacked(Input):
    """A tensor with a share for each layer along one axis, put together from other layers' shares.

    Args:
        givers: the tensors that the shares come from; the first is the one in whose place it stands.
        taken: for each layer the number of its giver, and its number there.
        axis: the axis along which a share follows the other.
        share: entries of a share along it.
        size: the shape, where it has another than the first giver but for that axis.
    """

    kind = "stacked"
    scattered = True  # shares are read in any order
    givers: tuple[Input, ...]
    taken: tuple[tuple[int, int], ...]
    axis: int
    share: int
    size: tuple[int, ...] | None = None

    def encode(self) -> dict[str, Any]:
        return {name: value for name, value in super().encode().items() if value is not None}

    @property
    def shape(self) -> tuple[int, ...]:
        """The first giver's, with a share for each layer."""
        shape = self.givers[0].shape
        return self.size or (*shape[: self.axis], self.share * len(self.taken), *shape[self.axis + 1 :])

    @property
    def run(self) -> int:
        """How many entries of a share follow each other."""
        return self.share * math.prod(self.givers[0].shape[self.axis + 1 :])

    @property
    def workspace_bytes(self) -> int:
        """Rows of the result and of a giver, in float32, and what reading that takes."""
        row = self.run * (len(self.taken) if self.axis else 1)
        return 12 * max(1 << 17, row) + max(giver.workspace_bytes for giver in self.givers)


@dataclass(frozen=True)
class Mean(Input):
    """The sum of tensors of one shape, each times its factor, one after the other: only two are held at once.

    Args:
        terms: the tensors.
        factors: a number for each.
    """

    kind = "mean"
    terms: tuple[Input, ...]
    factors: tuple[float, ...]

    @property
    def workspace_bytes(self) -> int:
        """A tile of one of them, as it is stored and in float32."""
        return 8 * TILE + max(term.workspace_bytes for term in self.terms)


DRAWN_AT_ONCE = 1 << 16
"""How many random numbers are made at once: this bounds memory, and changes no number."""


@dataclass(frozen=True)
class Drawn(Input):
    """Random numbers by position: every entry has its own, whoever asks for it and when.

    Args:
        size: the shape.
        law: ``normal`` with mean 0, or ``uniform`` around 0.
        spread: the standard deviation, or the largest magnitude.
        seed: the recipe's.
        stream: other numbers for another one: the output tensor's name.
    """

    kind = "drawn"
    size: tuple[int, ...]
    law: str
    spread: float
    seed: int
    stream: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    @property
    def dtype(self) -> str:
        return "F32"

    @property
    def workspace_bytes(self) -> int:
        """What the arithmetic takes, in float64."""
        return 12 * 8 * DRAWN_AT_ONCE


@dataclass(frozen=True)
class Noised(Input):
    """A source with random numbers added."""

    kind = "noised"
    quiet: Input
    noise: Drawn


@dataclass(frozen=True)
class Constant(Input):
    """A tensor of zeros, or of another value, for one that no model has; `like` is the dtype of what is beside it."""

    kind = "zeros"
    size: tuple[int, ...]
    like: str
    value: float = 0.0

    def encode(self) -> dict[str, Any]:
        return {"zeros": self.size, "like": self.like, **({"value": self.value} if self.value else {})}

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    @property
    def dtype(self) -> str:
        return self.like


@dataclass(frozen=True)
class Routed(Input):
    """Rows of a layer's router, computed from prompts before the first block is made (planning.budget counts that).

    Args:
        mode: how, as recipes call it.
        layer: the layer.
        width: entries of a row.
        prompts: for each row the positive and the negative prompts.
    """

    kind = "routed"
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
        return "F32"
