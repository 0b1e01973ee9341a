"""Looks at a few entries of each block on its way through: how inputs and result lie to each other.

Which entries are looked at depends on their places alone, so neither threads nor memory change what is found. Not here:
what it means (plan.geometry, card.relations).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merger.plan.geometry import Geometry

_SMALL = 1 << 16
_RUN = 64
_PERIOD = _RUN * 127
"""Of a larger tensor the first 64 of every 8,128 entries are looked at: a hundredth of the loop's time, some 1e-2 of a
cosine. Runs, since single entries so far apart cost a cache miss each, and that ten times the time."""


def observe(inputs: Sequence[Tensor], result: Tensor, start: int, entries: int, base: Tensor | None = None) -> Geometry:
    """The geometry of a block.

    Args:
        inputs: what the method was given, in float32.
        result: what it made of them, before a base is added.
        start: the block's place in its tensor.
        entries: how many entries the whole tensor has.
        base: what was subtracted from each input.
    """
    rows = [tensor.reshape(-1) for tensor in (*inputs, result, *(() if base is None else (base,)))]
    sample = torch.stack(rows if entries <= _SMALL else [_runs(row, start) for row in rows]).cpu().double()
    held = sample.view(len(rows), -1).numpy()  # in numpy small steps cost a third
    count = len(inputs)
    above, below = held[: count + 1] > 0, held[: count + 1] < 0
    up, down = above[:count].any(0), below[:count].any(0)
    products = (held @ held.T).tolist()
    return Geometry(
        products=tuple(tuple(row[: count + 1]) for row in products[: count + 1]),
        opposed=_count(up & down),
        sampled=_count(up | down),
        against=tuple(_count(above[row] & below[count]) + _count(below[row] & above[count]) for row in range(count)),
        moved=tuple(_count(above[row]) + _count(below[row]) for row in range(count)),
        base=() if base is None else tuple(products[count + 1]),
    )


def _count(entries: NDArray[np.bool_] | np.bool_) -> int:
    return int(np.count_nonzero(entries))


def _runs(row: Tensor, start: int) -> Tensor:
    """What a block holds of the runs: it may begin and end within one."""
    phase = start % _PERIOD
    begun = row[: max(0, _RUN - phase)] if phase else row[:0]
    rest = row[-phase % _PERIOD :]
    whole = len(rest) // _PERIOD
    full = rest[: whole * _PERIOD].view(whole, _PERIOD)[:, :_RUN].reshape(-1)
    return torch.cat([begun, full, rest[whole * _PERIOD :][:_RUN]])
