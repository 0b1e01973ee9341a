"""Sums over the rows or the columns of tensors, in float64, for methods whose blocks are whole rows.

A row is summed by itself and a column row after row, so neither threads nor how the rows were put into blocks change a
bit. Not here: sums over runs of any entries (`arithmetic`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING

from merger.methods.steps.arithmetic import CHUNK, Blocks, array

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


def as_rows(tensor: Tensor) -> Tensor:
    """The same entries in two dimensions, the last one kept; one row for a tensor of one dimension or none."""
    return tensor.flatten(0, -2) if tensor.ndim > 1 else tensor.reshape(1, -1)


def row_chunks(tensors: Sequence[Tensor]) -> Iterator[list[NDArray[np.float64]]]:
    """The tensors' rows in float64, several at a time, in buffers that the next ones reuse; they may be overwritten."""
    import numpy as np

    rows = [array(tensor).reshape(as_rows(tensor).shape) for tensor in tensors]
    count, width = rows[0].shape
    step = max(1, CHUNK // max(1, width))
    buffers = [np.empty((min(step, count), width)) for _ in rows]
    for start in range(0, count, step):
        chunks = [buffer[: count - start] for buffer in buffers]
        for chunk, row in zip(chunks, rows, strict=True):
            np.copyto(chunk, row[start : start + step])
        yield chunks


def row_dots(tensors: Sequence[Tensor]) -> NDArray[np.float64]:
    """For each row (the second dimension) the dot products of all pairs (the first), in the order of `dot_sums`."""
    import numpy as np

    def dots(chunks: Sequence[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
        return [np.add.reduce(one * other, axis=1) for one, other in combinations_with_replacement(chunks, 2)]

    return np.concatenate([dots(chunks) for chunks in row_chunks(tensors)], axis=1)


def whole_dots(blocks: Blocks) -> NDArray[np.float64]:
    """The dot products of all pairs of whole tensors that come in blocks of whole rows, as a single column."""
    import numpy as np

    rows = np.concatenate([row_dots(block) for block in blocks], axis=1)
    return np.array([[math.fsum(sums)] for sums in rows])


def column_dots(blocks: Blocks) -> NDArray[np.float64]:
    """For each column (the second dimension) the dot products of all pairs (the first); a single row is one column."""
    import numpy as np

    total, count = np.zeros(()), 0
    for block in blocks:
        for chunks in row_chunks(block):
            pairs = [one * other for one, other in combinations_with_replacement(chunks, 2)]
            for row in np.stack(pairs, axis=1):  # one after the other: numpy's own order depends on how many there are
                total = total + row if not count else np.add(total, row, out=total)
                count += 1
    return total if count > 1 else np.array([[math.fsum(sums)] for sums in total])
