"""Sums over the rows or the columns of tensors, in float64, for methods whose blocks are whole rows.

A row is summed by itself and a column row after row, so neither threads nor how the rows were put into blocks change a
bit. Not here: sums over runs of any entries (`arithmetic`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, Any

from merger.methods.steps.arithmetic import LANES, Blocks, array, sum_products
from merger.methods.steps.step import ZERO, Array, step, wide

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

_CHUNK = 1 << 16


def as_rows(tensor: Array) -> Array:
    """The same entries in two dimensions, the last one kept; one row for a tensor of one dimension or none."""
    width = tensor.shape[-1] if tensor.ndim > 1 else math.prod(tensor.shape)
    return tensor.reshape(math.prod(tensor.shape[:-1]), width)


@step("void(float32[::1], int64, int64, float64[::1], float64[::1], uint8[::1], int64[::1])")
def compare_rows(rows: Array, many: int, start: int, lanes: Floats, products: Floats, signs: Any, counts: Any) -> None:
    """How some rows, inputs and then their result, lie to each other in as many entries as `signs` has room for.

    `products` is a table of the sums of products. `counts` are the entries that inputs pull both ways; those that they
    pull at all; for each input those in which the result has the other sign; and those in which it is not zero.
    """
    size, entries, inputs, whole = rows.size // many, signs.size, counts.size // 2 - 1, signs.size // LANES
    result = rows[inputs * size + start : inputs * size + start + entries]
    for one in range(many):
        x = rows[one * size + start : one * size + start + entries]
        ones = x[: whole * LANES].reshape(whole, LANES)
        for other in range(one + 1):
            y = rows[other * size + start : other * size + start + entries]
            others = y[: whole * LANES].reshape(whole, LANES)
            lanes[:] = 0
            for at in range(whole):
                for lane in range(LANES):
                    lanes[lane] += wide(ones[at, lane]) * wide(others[at, lane])
            for lane in range(entries - whole * LANES):
                lanes[lane] += wide(x[whole * LANES + lane]) * wide(y[whole * LANES + lane])
            for lane in range(1, LANES):
                lanes[0] += lanes[lane]
            products[one * many + other] = products[other * many + one] = lanes[0]
    signs[:] = 0
    for one in range(inputs):
        x = rows[one * size + start : one * size + start + entries]
        against, moved = 0, 0
        for at in range(entries):
            up, down = x[at] > ZERO, x[at] < ZERO
            signs[at] |= (1 if up else 0) + (2 if down else 0)
            moved += up or down
            against += (up and result[at] < ZERO) or (down and result[at] > ZERO)
        counts[2 + one], counts[2 + inputs + one] = against, moved
    opposed, pulled = 0, 0
    for at in range(entries):
        opposed += signs[at] == 3
        pulled += signs[at] != 0
    counts[0], counts[1] = opposed, pulled


@step("void(float32[::1], float32[::1], float64[::1])")
def sum_column_products(x: Array, y: Array, out: Floats) -> None:
    """To each column's sum its products, row after row."""
    rows, others = x.reshape(x.size // max(1, out.size), out.size), y.reshape(x.size // max(1, out.size), out.size)
    for row in range(len(rows)):
        for column in range(out.size):
            out[column] += wide(rows[row, column]) * wide(others[row, column])


@sum_column_products.torch
def _(x: Any, y: Any, out: Floats) -> None:
    import torch

    terms = (x.double() * y.double()).view(-1, len(out))
    before = torch.from_numpy(out).to(terms.device)[None]
    out[...] = torch.cat([before, terms]).cumsum(0)[-1].cpu().numpy()


def row_dots(tensors: Sequence[Array]) -> Floats:
    """For each row (the second dimension) the dot products of all pairs (the first), in the order of `dots`."""
    import numpy as np

    lanes = np.empty(LANES)
    found = np.empty((len(tensors) * (len(tensors) + 1) // 2, as_rows(tensors[0]).shape[0]))
    for place, (one, other) in enumerate(combinations_with_replacement(tensors, 2)):
        sum_products(one, other, lanes, found[place])
    return found


def whole_dots(blocks: Blocks) -> Floats:
    """The dot products of all pairs of whole tensors that come in blocks of whole rows, as a single column."""
    import numpy as np

    rows = np.concatenate([row_dots(block) for block in blocks], axis=1)
    return np.array([[math.fsum(sums)] for sums in rows])


def column_dots(blocks: Blocks) -> Floats:
    """For each column (the second dimension) the dot products of all pairs (the first); a single row is one column."""
    import numpy as np

    totals: list[Floats] = []
    count = 0
    for block in blocks:
        rows = as_rows(block[0])
        pairs = list(combinations_with_replacement(block, 2))
        totals = totals or [np.zeros(rows.shape[1]) for _ in pairs]
        for (one, other), total in zip(pairs, totals, strict=True):
            sum_column_products(one, other, total)
        count += len(rows)
    return np.array(totals if count > 1 else [[math.fsum(sums)] for sums in totals])


def row_chunks(tensors: Sequence[Array]) -> Iterator[list[Floats]]:
    """The tensors' rows in float64, several at a time, in buffers that the next ones reuse; they may be overwritten."""
    import numpy as np

    count, width = math.prod(tensors[0].shape[:-1]), tensors[0].shape[-1] if tensors[0].ndim else 1
    rows = [array(tensor).reshape(count, width) for tensor in tensors]
    step = max(1, _CHUNK // max(1, width))
    buffers = [np.empty((min(step, count), width)) for _ in rows]
    for start in range(0, count, step):
        chunks = [buffer[: count - start] for buffer in buffers]
        for chunk, row in zip(chunks, rows, strict=True):
            np.copyto(chunk, row[start : start + step])
        yield chunks
