"""Where an input's entries come from: a tensor of a model as it is stored, or stored tensors and a step on the way in.

Scales, stages and noise are such steps, and so are tokenizers' row maps (rows) and adapters (products). Each is one
dataclass, and one reading of it in engine.sources. What a plan's hash has of it is its `encode`, whose words stay when
names change. Not here: reading bytes (engine), and an input's source (jobs).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from merger.checkpoints.checkpoint import TensorInfo

if TYPE_CHECKING:
    from merger.plan.jobs import Job


class Source:
    """The entries of an input, in its own shape.

    Unless a kind says otherwise it has the shape and the dtype of the first of its children, reads what they read, and
    takes the memory that they take.
    """

    kind: ClassVar[str]
    """A word for what is done, of which each kind has its own."""

    def encode(self) -> dict[str, Any]:
        """Plain data, and children, that name it in a plan's hash: no two kinds of source have the same keys."""
        raise NotImplementedError

    @property
    def children(self) -> tuple[Source, ...]:
        """What it is put together from, in a fixed order; the one that names it is the first."""
        return ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what it gives."""
        return self.children[0].shape

    @property
    def dtype(self) -> str:
        """The dtype, as safetensors writes it, that a result has which follows this input."""
        return self.children[0].dtype

    @property
    def leaves(self) -> tuple[Stored, ...]:
        """The stored tensors that it reads, each once; the one that names it is the first."""
        return tuple(dict.fromkeys(leaf for child in self.children for leaf in child.leaves))

    @property
    def again(self) -> tuple[Stored, ...]:
        """Those leaves of which a block reads more than its own entries: of remote ones a copy is kept on disk."""
        return tuple(leaf for child in self.children for leaf in child.again)

    @property
    def scratch(self) -> int:
        """Bytes of memory that reading a block of it takes, beside the block's float32 entries."""
        return sum(child.scratch for child in self.children)


@dataclass(frozen=True)
class Stored(Source):
    """A tensor of a model as it is stored.

    Args:
        model: the model's number in the locked recipe.
        tensor: the tensor and its place.
    """

    kind = "stored"
    model: int
    tensor: TensorInfo

    def encode(self) -> dict[str, Any]:
        return {"model": self.model, "tensor": self.tensor.encode()}

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    @property
    def leaves(self) -> tuple[Stored, ...]:
        return (self,)


@dataclass(frozen=True)
class Made(Source):
    """What a stage of the recipe makes, rounded to the stage's dtype; it is never stored as a model.

    Args:
        stage: the stage's number in the locked recipe.
        name: the tensor's name there.
        seed: the stage's, for methods that draw random numbers.
        job: how it is made; the plan's hash has it once, however often it is used.
    """

    kind = "stage"
    stage: int
    name: str
    seed: int
    job: Job = field(compare=False, repr=False)

    def encode(self) -> dict[str, Any]:
        return {"stage": self.stage, "name": self.name, "seed": self.seed}

    @property
    def shape(self) -> tuple[int, ...]:
        return self.job.shape

    @property
    def dtype(self) -> str:
        return self.job.dtype

    @cached_property
    def leaves(self) -> tuple[Stored, ...]:
        """All that is read for it; what is read more than once, and the memory of it, plan.work finds by its job."""
        return self.job.reads


@dataclass(frozen=True)
class Dequantised(Source):
    """A tensor that is stored as numbers of few bits and scales: each number times the scale of its block.

    Args:
        numbers: the stored numbers, in rows and columns.
        scales: a scale for each block of them.
        block: how many rows and columns a block has.
        restored: the dtype of the model that it was made from.
    """

    kind = "dequantised"
    numbers: Stored
    scales: Stored
    block: tuple[int, int]
    restored: str

    def encode(self) -> dict[str, Any]:
        return {"numbers": self.numbers, "scales": self.scales, "block": self.block, "dtype": self.restored}

    @property
    def children(self) -> tuple[Source, ...]:
        return (self.numbers, self.scales)

    @property
    def dtype(self) -> str:
        return self.restored

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
class Stacked(Source):
    """A tensor with a share for each layer along one axis, put together from other layers' shares.

    Args:
        givers: the tensors that the shares come from; the first is the one in whose place it stands.
        taken: for each layer the number of its giver, and its number there.
        axis: the axis along which a share follows the other.
        share: entries of a share along it.
    """

    kind = "stacked"
    givers: tuple[Source, ...]
    taken: tuple[tuple[int, int], ...]
    axis: int
    share: int

    def encode(self) -> dict[str, Any]:
        return {"givers": self.givers, "taken": self.taken, "axis": self.axis, "share": self.share}

    @property
    def children(self) -> tuple[Source, ...]:
        return self.givers

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
    def again(self) -> tuple[Stored, ...]:
        """All: shares are read in any order."""
        return self.leaves

    @property
    def scratch(self) -> int:
        """Rows of the result and of a giver, in float32, and what reading that takes."""
        row = math.prod(self.shape[self.axis :]) if self.axis else self.run
        return 12 * max(1 << 17, row) + max(giver.scratch for giver in self.givers)


DRAWN_AT_ONCE = 1 << 16
"""How many random numbers are made at once: this bounds memory, and changes no number."""


@dataclass(frozen=True)
class Drawn(Source):
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

    def encode(self) -> dict[str, Any]:
        return {
            "size": self.size, "law": self.law, "spread": self.spread, "seed": self.seed, "stream": self.stream,
        }  # fmt: skip

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    @property
    def dtype(self) -> str:
        return "F32"

    @property
    def scratch(self) -> int:
        """What the arithmetic takes, in float64."""
        return 12 * 8 * DRAWN_AT_ONCE


@dataclass(frozen=True)
class Noised(Source):
    """A source with random numbers added."""

    kind = "noised"
    quiet: Source
    noise: Drawn

    def encode(self) -> dict[str, Any]:
        return {"quiet": self.quiet, "noise": self.noise}

    @property
    def children(self) -> tuple[Source, ...]:
        return (self.quiet, self.noise)


@dataclass(frozen=True)
class Zeros(Source):
    """A tensor of zeros, for one that no model has; `like` is the dtype of what it stands beside."""

    kind = "zeros"
    zeros: tuple[int, ...]
    like: str

    def encode(self) -> dict[str, Any]:
        return {"zeros": self.zeros, "like": self.like}

    @property
    def shape(self) -> tuple[int, ...]:
        return self.zeros

    @property
    def dtype(self) -> str:
        return self.like


@dataclass(frozen=True)
class Routed(Source):
    """Rows of a layer's router, computed from prompts before the first block is made (plan.routing counts that).

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

    def encode(self) -> dict[str, Any]:
        return {"mode": self.mode, "layer": self.layer, "width": self.width, "prompts": self.prompts}

    @property
    def shape(self) -> tuple[int, ...]:
        """A row for each expert."""
        return (len(self.prompts), self.width)

    @property
    def dtype(self) -> str:
        return "F32"


def ends(source: Source) -> Iterator[Stored | Made]:
    """The stored tensors and the stages that a source reads itself; not those that a stage of it reads."""
    if isinstance(source, Stored | Made):
        yield source
        return
    for child in source.children:
        yield from ends(child)
