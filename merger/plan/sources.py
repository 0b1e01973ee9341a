"""Where an input's entries come from: a tensor of a model as it is stored, or stored tensors and a step on the way in.

Adapters, tokenizers' row maps, scales, stages and noise are such steps; each is one dataclass here, and one reading of
it in engine.sources. Not here: reading bytes (engine), and which source an input has (jobs).
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
