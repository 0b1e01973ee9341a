"""Looks at a few entries of each block on its way through: how inputs and result lie to each other.

Which entries are looked at depends on their places alone, so neither threads nor memory change what is found. Not here:
what it means (plan.geometry, card.relations).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from merger.plan.geometry import Geometry

_SMALL = 1 << 16
_RUN = 64
_PERIOD = _RUN * 127
"""Of a larger tensor the first 64 of every 8,128 entries are looked at: a hundredth of the loop's time, some 1e-2 of a
cosine. Runs, since single entries so far apart cost a cache miss each, and that ten times the time."""


def observe(inputs: Sequence[Tensor], result: Tensor, start: int, entries: int) -> Geometry:
    """The geometry of a block.

    Args:
        inputs: what the method was given, in float32.
        result: what it made of them, before a base is added.
        start: the block's place in its tensor.
        entries: how many entries the whole tensor has.
    """
    rows = [tensor.reshape(-1) for tensor in (*inputs, result)]
    sample = torch.stack(rows if entries <= _SMALL else [_runs(row, start) for row in rows]).cpu().double()
    held = sample.view(len(rows), -1).numpy()  # in numpy small steps cost a third
    above, below = (held[:-1] > 0).any(0), (held[:-1] < 0).any(0)
    products = tuple(tuple(row) for row in (held @ held.T).tolist())
    return Geometry(products, int(np.count_nonzero(above & below)), int(np.count_nonzero(above | below)))


def _runs(row: Tensor, start: int) -> Tensor:
    """What a block holds of the runs: it may begin and end within one."""
    phase = start % _PERIOD
    begun = row[: max(0, _RUN - phase)] if phase else row[:0]
    rest = row[-phase % _PERIOD :]
    whole = len(rest) // _PERIOD
    full = rest[: whole * _PERIOD].view(whole, _PERIOD)[:, :_RUN].reshape(-1)
    return torch.cat([begun, full, rest[whole * _PERIOD :][:_RUN]])
