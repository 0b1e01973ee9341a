"""Where an input's entries come from: a tensor of a model as it is stored, or stored tensors and a step on the way in.

Adapters, tokenizers' row maps, scales and stages are such steps; each is one dataclass here, and one reading of it in
engine.sources. Not here: reading bytes (engine), and which source an input has (jobs).
"""

from __future__ import annotations

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


def ends(source: Source) -> Iterator[Stored | Made]:
    """The stored tensors and the stages that a source reads itself; not those that a stage of it reads."""
    if isinstance(source, Stored | Made):
        yield source
        return
    for value in vars(source).values():
        parts = value if isinstance(value, tuple) else (value,)
        if parts and hasattr(parts[0], "leaves"):
            for part in parts:
                yield from ends(part)
