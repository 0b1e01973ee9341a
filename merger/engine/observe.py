"""Looks at a few entries of each block on its way through: how inputs and result lie to each other.

Which entries are looked at depends on their places alone, so neither threads nor memory change what is found. Not here:
what it means (plan.geometry, card.relations).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from merger.plan.geometry import Geometry

_SMALL = 1 << 16
_STRIDE = 127
"""Every how many-th entry of a larger tensor is looked at: a hundredth of the loop's time, some 1e-2 of a cosine."""


def observe(inputs: Sequence[Tensor], result: Tensor, start: int, entries: int) -> Geometry:
    """The geometry of a block.

    Args:
        inputs: what the method was given, in float32.
        result: what it made of them, before a base is added.
        start: the block's place in its tensor.
        entries: how many entries the whole tensor has.
    """
    step = 1 if entries <= _SMALL else _STRIDE
    rows = [tensor.reshape(-1)[-start % step :: step].double() for tensor in (*inputs, result)]
    sample = torch.stack(rows).cpu()
    products = sample @ sample.T
    given = sample[:-1]
    above, below = (given > 0).any(0), (given < 0).any(0)
    return Geometry(
        tuple(tuple(row) for row in products.tolist()), int((above & below).sum()), int((above | below).sum())
    )
