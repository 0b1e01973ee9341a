"""A source's entries in float32, a run of them at a time: how each kind of plan.sources is read.

Not here: where a leaf's bytes come from and in which order (blocks).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from merger.engine.adapters import with_added, with_low_rank
from merger.engine.leaves import Leaves
from merger.engine.pursuit import pursued
from merger.engine.rows import rows_of_map
from merger.engine.scaled import dequantised
from merger.plan.geometry import Geometry
from merger.plan.sources import Added, Dequantised, Difference, Factor, LowRank, Made, Pursuit, Rows, Source, Stored


def load(source: Source, start: int, stop: int, out: Tensor, leaves: Leaves, step: int = 1) -> Tensor:
    """The source's entries ``[start, stop)`` as float32, in the front of `out`; with `step` every so many."""
    if isinstance(source, Stored | Made):
        return leaves.entries(source, start, stop, out, step)
    full = _READINGS[type(source)](source, start, stop, out, leaves)
    return full[-start % step :: step]


def _low_rank(source: LowRank, start: int, stop: int, out: Tensor, leaves: Leaves) -> Tensor:
    return with_low_rank(source, start, stop, out, partial(load, leaves=leaves))


def _added(source: Added, start: int, stop: int, out: Tensor, leaves: Leaves) -> Tensor:
    return with_added(source, start, stop, out, partial(load, leaves=leaves))


def _difference(source: Difference, start: int, stop: int, out: Tensor, leaves: Leaves) -> Tensor:
    less = load(source.subtrahend, start, stop, torch.empty(stop - start), leaves)
    return load(source.minuend, start, stop, out, leaves).sub_(less)


def _factor(source: Factor, start: int, stop: int, out: Tensor, leaves: Leaves) -> Tensor:
    entries, seen = leaves.pairs.entries(source, start, stop, partial(load, leaves=leaves))
    leaves.tell(start, seen if start == 0 else Geometry(((0.0, 0.0), (0.0, 0.0)), 0, 0))
    return out[: stop - start].copy_(entries)


_READINGS: Mapping[type, Callable[[Any, int, int, Tensor, Leaves], Tensor]] = {
    Rows: rows_of_map,
    Pursuit: pursued,
    Dequantised: dequantised,
    LowRank: _low_rank,
    Added: _added,
    Difference: _difference,
    Factor: _factor,
}
"""How each kind of source but the plain one fills the front of `out` with its entries ``[start, stop)``."""
