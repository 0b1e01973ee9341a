"""Looks at a few entries of each block on its way through: how a job's inputs lie to each other and to the result.

Which entries are looked at depends on their places alone, so neither threads nor memory change what is found. Not here:
what it means (planning.geometry, card.relations), and a look beforehand (run.look).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from merger.methods.steps.arithmetic import LANES
from merger.methods.steps.rows import compare_rows
from merger.methods.steps.step import Array
from merger.planning.geometry import Geometry

_SMALL = 1 << 16
_RUN = 64
_PERIOD = _RUN * 127
_OF_A_RUN = np.arange(_RUN)
_STRETCH, _EVERY = 1 << 19, 4
"""Of a larger tensor the first 64 of every 8,128 entries are looked at, of the first of every four stretches if there
are as many: some 1e-2 of a cosine, for one to four hundredths of the loop's time. Runs, since single entries so far
apart cost a cache miss each, and that ten times the time."""


class BlockSample:
    """Entries of a block that are looked at, taken tile by tile.

    Args:
        start: the block's place in its tensor.
        stop: its end.
        entries: how many entries the whole tensor has.
    """

    def __init__(self, start: int, stop: int, entries: int) -> None:
        self._entries, self.passes_by = entries, _is_passed_by(start, stop - start, entries)
        self._held: list[Array] = []

    def take(self, start: int, tensors: Sequence[Array]) -> None:
        """Those of a tile.

        Args:
            start: the tile's place in its tensor.
            tensors: what the method was given, in float32; what it made of that, before a base is added; and the base,
                if one was subtracted from each input.
        """
        if self.passes_by:
            return
        rows = [tensor.reshape(-1) for tensor in tensors]
        places = np.arange(len(rows[0])) if self._entries <= _SMALL else _runs(start, len(rows[0]), self._entries)
        if len(places):
            held = np.array(rows if len(places) == len(rows[0]) else [row.take(places) for row in rows], np.float32)
            if not np.isfinite(held).all():  # a recipe may allow it; a product of it would say nothing
                held[~np.isfinite(held)] = 0
            self._held.append(held)

    def geometry(self, count: int, has_base: bool, part: slice = slice(None)) -> Geometry:
        """The geometry of what was taken of the block, or of a part of that, of so many inputs."""
        if not self._held:
            return _nothing(count, has_base)
        if len(self._held) > 1:
            self._held = [np.concatenate(self._held, axis=1)]
        return _geometry(self._held[0], count, part)


def _geometry(rows: Array, count: int, part: slice) -> Geometry:
    """Of some of the entries of each row: the inputs, the result, and the base where there is one."""
    many, size = rows.shape
    start, stop, _ = part.indices(size)
    products, counts = np.empty(many * many), np.empty(2 + 2 * count, np.int64)
    compare_rows(rows, many, start, np.empty(LANES), products, np.empty(stop - start, np.uint8), counts)
    table, (opposed, sampled, *others) = products.reshape(many, many).tolist(), counts.tolist()
    return Geometry(
        products=tuple(tuple(row[: count + 1]) for row in table[: count + 1]),
        opposed=opposed,
        sampled=sampled,
        against=tuple(others[:count]),
        moved=tuple(others[count:]),
        base=() if many == count + 1 else tuple(table[count + 1]),
    )


def _is_passed_by(start: int, count: int, entries: int) -> bool:
    """Whether the block lies in a single stretch that is not looked at: most do, and this is what they cost."""
    stretch = start // _STRETCH
    return entries > _STRETCH * _EVERY and stretch % _EVERY > 0 and (start + count - 1) // _STRETCH == stretch


@cache
def _nothing(inputs: int, has_base: bool) -> Geometry:
    row = (0.0,) * (inputs + 1)
    return Geometry((row,) * (inputs + 1), 0, 0, (0,) * inputs, (0,) * inputs, (*row, 0.0) if has_base else ())


def _runs(start: int, count: int, entries: int) -> NDArray[np.intp]:
    """Which places of a block belong to a run: it may begin and end within one."""
    found = (np.arange(-(start % _PERIOD), count, _PERIOD)[:, None] + _OF_A_RUN).reshape(-1)
    found = found[(found >= 0) & (found < count)]
    return found if entries <= _STRETCH * _EVERY else found[(found + start) // _STRETCH % _EVERY == 0]
