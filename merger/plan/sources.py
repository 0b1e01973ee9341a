"""Where an input's entries come from: a tensor of a model as it is stored, or stored tensors and a step on the way in.

Scales, stages and noise are such steps, and so are tokenizers' row maps (rows) and adapters (products). Each is one
dataclass, and one reading of it in engine.sources. Not here: reading bytes (engine), and an input's source (jobs).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from merger.checkpoints.checkpoint import TensorInfo

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


@dataclass(frozen=True)
class Stacked:
    """A tensor with a share for each layer along one axis, put together from other layers' shares.

    Args:
        givers: the tensors that the shares come from; the first is the one in whose place it stands.
        taken: for each layer the number of its giver, and its number there.
        axis: the axis along which a share follows the other.
        share: entries of a share along it.
    """

    givers: tuple[Source, ...]
    taken: tuple[tuple[int, int], ...]
    axis: int
    share: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The first giver's, with a share for each layer."""
        shape = self.givers[0].shape
        return (*shape[: self.axis], self.share * len(self.taken), *shape[self.axis + 1 :])

    @property
    def run(self) -> int:
        """How many entries of a share follow each other."""
        return self.share * math.prod(self.givers[0].shape[self.axis + 1 :])

    @property
    def dtype(self) -> str:
        """The first giver's."""
        return self.givers[0].dtype

    @property
    def leaves(self) -> tuple[Stored, ...]:
        """All givers'."""
        return tuple(dict.fromkeys(leaf for giver in self.givers for leaf in giver.leaves))

    @property
    def again(self) -> tuple[Stored, ...]:
        """All: shares are read in any order."""
        return self.leaves

    @property
    def scratch(self) -> int:
        """Rows of the result and of a giver, in float32, and what reading that takes."""
        row = math.prod(self.shape[self.axis :]) if self.axis else self.run
        return 12 * max(1 << 17, row) + max(giver.scratch for giver in self.givers)


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
