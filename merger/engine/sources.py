"""A source's entries in float32, a run of them at a time: how each kind of plan.sources is read.

Not here: where a leaf's bytes come from and in which order (blocks).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from merger.plan.sources import Made, Source, Stored


class Leaves(Protocol):
    """The stored tensors of a job, and what stages make for it."""

    def entries(self, leaf: Stored, start: int, stop: int, out: Tensor, step: int = 1) -> Tensor:
        """The leaf's entries ``[start, stop)`` as float32, in the front of `out`.

        Of the tensor's entries only those whose number is a multiple of `step`.

        Raises:
            ModelError: the bytes cannot be had.
        """

    def made(self, made: Made, start: int, stop: int, out: Tensor) -> Tensor:
        """The entries ``[start, stop)`` of what a stage makes as float32, in the front of `out`.

        Raises:
            ModelError: bytes of a model cannot be had.
            MismatchError: one of the entries is not finite.
        """


def load(source: Source, start: int, stop: int, out: Tensor, leaves: Leaves, step: int = 1) -> Tensor:
    """The source's entries ``[start, stop)`` as float32, in the front of `out`; with `step` every so many."""
    if isinstance(source, Stored):
        return leaves.entries(source, start, stop, out, step)
    full = _READINGS[type(source)](source, start, stop, out, leaves)
    return full[-start % step :: step]


def _made(source: Made, start: int, stop: int, out: Tensor, leaves: Leaves) -> Tensor:
    return leaves.made(source, start, stop, out)


_READINGS: Mapping[type, Callable[[Any, int, int, Tensor, Leaves], Tensor]] = {Made: _made}
"""How each kind of source but the plain one fills the front of `out` with its entries ``[start, stop)``."""
