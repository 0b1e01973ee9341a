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
