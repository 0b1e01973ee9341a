"""A source's entries in float32, a run of them at a time: how each kind of plan.sources is read.

Not here: where a leaf's bytes come from and in which order (blocks).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from merger.engine.adapters import with_added, with_low_rank
from merger.plan.sources import Added, LowRank, Source, Stored


class Leaves(Protocol):
    """The stored tensors of a job."""

    def entries(self, leaf: Stored, start: int, stop: int, out: Tensor, step: int = 1) -> Tensor:
        """The leaf's entries ``[start, stop)`` as float32, in the front of `out`.

        Of the tensor's entries only those whose number is a multiple of `step`.

        Raises:
            ModelError: the bytes cannot be had.
        """


def load(source: Source, start: int, stop: int, out: Tensor, leaves: Leaves, step: int = 1) -> Tensor:
    """The source's entries ``[start, stop)`` as float32, in the front of `out`; with `step` every so many."""
    if isinstance(source, Stored):
        return leaves.entries(source, start, stop, out, step)
    full = _READINGS[type(source)](source, start, stop, out, leaves)
    return full[-start % step :: step]


def _low_rank(source: LowRank, start: int, stop: int, out: Tensor, leaves: Leaves) -> Tensor:
    return with_low_rank(source, start, stop, out, partial(load, leaves=leaves))


def _added(source: Added, start: int, stop: int, out: Tensor, leaves: Leaves) -> Tensor:
    return with_added(source, start, stop, out, partial(load, leaves=leaves))


_READINGS: Mapping[type, Callable[[Any, int, int, Tensor, Leaves], Tensor]] = {LowRank: _low_rank, Added: _added}
"""How each kind of source but the plain one fills the front of `out` with its entries ``[start, stop)``."""
