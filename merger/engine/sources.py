"""A source's entries in float32, a run of them at a time: how each kind of plan.sources is read.

Not here: where a leaf's bytes come from and in which order (blocks).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from merger.engine.leaves import Leaves
from merger.engine.pursuit import pursued
from merger.engine.rows import rows_of_map
from merger.engine.scaled import dequantised
from merger.plan.sources import Dequantised, Made, Pursuit, Rows, Source, Stored


def load(source: Source, start: int, stop: int, out: Tensor, leaves: Leaves, step: int = 1) -> Tensor:
    """The source's entries ``[start, stop)`` as float32, in the front of `out`; with `step` every so many."""
    if isinstance(source, Stored | Made):
        return leaves.entries(source, start, stop, out, step)
    full = _READINGS[type(source)](source, start, stop, out, leaves)
    return full[-start % step :: step]


_READINGS: Mapping[type, Callable[[Any, int, int, Tensor, Leaves], Tensor]] = {
    Rows: rows_of_map,
    Pursuit: pursued,
    Dequantised: dequantised,
}
"""How each kind of source but the plain one fills the front of `out` with its entries ``[start, stop)``."""
