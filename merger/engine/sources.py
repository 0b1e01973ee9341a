"""A source's entries in float32, a run of them at a time: how each kind of plan.sources is read.

Not here: where a leaf's bytes come from and in which order (blocks).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merger.engine.adapters import with_added, with_low_rank
from merger.engine.leaves import Leaves
from merger.engine.pursuit import pursued
from merger.engine.rows import rows_of_map
from merger.engine.scaled import dequantised
from merger.engine.stacked import stacked
from merger.methods._normal import normal, uniform
from merger.methods._ops import Rng
from merger.plan.geometry import Geometry
from merger.plan.products import Added, Difference, Factor, LowRank
from merger.plan.rows import Pursuit, Rows
from merger.plan.sources import DRAWN_AT_ONCE, Dequantised, Drawn, Made, Noised, Routed, Source, Stacked, Stored, Zeros


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


def _drawn(source: Drawn, start: int, stop: int, out: Tensor, leaves: Leaves) -> Tensor:
    for first in range(start, stop, DRAWN_AT_ONCE):
        last = min(first + DRAWN_AT_ONCE, stop)
        out[first - start : last - start].copy_(torch.from_numpy(_draws(source, first, last)))
    return out[: stop - start]


def _draws(source: Drawn, start: int, stop: int) -> Any:
    bits = Rng(source.seed, source.stream).bits(0, np.arange(start, stop), "entries")
    if source.law == "normal":
        return source.spread * normal(bits)
    return source.spread * (2.0 * uniform(bits) - 1.0)


def _noised(source: Noised, start: int, stop: int, out: Tensor, leaves: Leaves) -> Tensor:
    quiet = load(source.quiet, start, stop, out, leaves)
    for first in range(start, stop, DRAWN_AT_ONCE):
        last = min(first + DRAWN_AT_ONCE, stop)
        quiet[first - start : last - start] += torch.from_numpy(_draws(source.noise, first, last)).float()
    return quiet


def _zeros(source: Zeros, start: int, stop: int, out: Tensor, leaves: Leaves) -> Tensor:
    return out[: stop - start].zero_()


def _stacked(source: Stacked, start: int, stop: int, out: Tensor, leaves: Leaves) -> Tensor:
    return stacked(source, start, stop, out, partial(load, leaves=leaves))


def _routed(source: Routed, start: int, stop: int, out: Tensor, leaves: Leaves) -> Tensor:
    return out[: stop - start].copy_(leaves.router(source).reshape(-1)[start:stop])


_READINGS: Mapping[type, Callable[[Any, int, int, Tensor, Leaves], Tensor]] = {
    Rows: rows_of_map,
    Pursuit: pursued,
    Dequantised: dequantised,
    LowRank: _low_rank,
    Added: _added,
    Difference: _difference,
    Factor: _factor,
    Drawn: _drawn,
    Noised: _noised,
    Zeros: _zeros,
    Stacked: _stacked,
    Routed: _routed,
}
"""How each kind of source but the plain one fills the front of `out` with its entries ``[start, stop)``."""
