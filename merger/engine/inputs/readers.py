"""An input's entries in float32, a run of them at a time: how each kind of input is read.

Not here: where a stored tensor's bytes come from and in which order (runner).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from merger.engine.inputs.pursuit import pursue_rows
from merger.engine.inputs.stored import Load, StoredTensors, floats, read_entries, read_whole, rows_of_map
from merger.methods.steps.arithmetic import add_scaled, scale
from merger.methods.steps.random import Rng, normal, uniform
from merger.methods.steps.rows import row_dots
from merger.methods.steps.step import TILE, Array
from merger.models.formats.packed import NUMPY_DTYPES, PackedMatrix, decode
from merger.models.formats.quantised import format_of
from merger.planning.geometry import Geometry
from merger.planning.inputs import derived, low_rank
from merger.planning.inputs.base import Input, StageTensor, Stored
from merger.planning.inputs.rows import CHUNK_ENTRIES, Pursuit, Rows

# ---- few bits and scales --------------------------------------------------------------------------------------------


def _dequantise(source: derived.Dequantised, start: int, stop: int, out: Array, tensors: StoredTensors) -> Array:
    """The numbers times the scales of their blocks, whole rows at once and what is left of rows at both ends."""
    made, columns = read_entries(tensors, source.numbers, start, stop, out), source.shape[1]
    first, last = start // columns, -(-stop // columns)
    scales = _of_rows(source, first, last, tensors)
    begin, end = -(-start // columns), stop // columns
    if begin > end:  # within one row
        made *= _spread(source, scales[0])[start - first * columns : stop - first * columns]
        return made
    head, tail = begin * columns - start, stop - end * columns
    if head:
        made[:head] *= _spread(source, scales[0])[columns - head :]
    _multiply(made[head : len(made) - tail].reshape(-1, columns), scales[begin - first : end - first], source.block[1])
    if tail:
        made[len(made) - tail :] *= _spread(source, scales[-1])[:tail]
    return made


def _of_rows(source: derived.Dequantised, first: int, last: int, tensors: StoredTensors) -> Array:
    """The scales of these rows, one for each block of columns."""
    down, across = source.block
    width = -(-source.shape[1] // across)
    begin, end = first // down, -(-last // down)
    held = read_entries(tensors, source.scales, begin * width, end * width, floats((end - begin) * width))
    return held.reshape(-1, width)[np.arange(first, last) // down - begin]


def _spread(source: derived.Dequantised, scales: Array) -> Array:
    """A row's scales, one for each column."""
    return scales.repeat(source.block[1])[: source.shape[1]]


def _multiply(rows: Array, scales: Array, across: int) -> None:
    """Each row by its scales, each of which stands for `across` columns; the last one may stand for fewer."""
    blocks = rows.shape[1] // across
    whole = blocks * across
    made = rows[:, :whole].reshape(len(rows), blocks, across)  # a view
    made *= scales[:, :blocks, None]
    rows[:, whole:] *= scales[:, blocks:]


# ---- packed ---------------------------------------------------------------------------------------------------------

_SKIPPED_BYTES = 1 << 14
"""Up to here it is as fast to read on as to begin another read."""


def _unpack_rows(source: derived.Packed, start: int, stop: int, out: Array, tensors: StoredTensors) -> Array:
    """Whole rows, some at a time, of one matrix after another."""
    (rows, columns), form = source.matrix, format_of(source.form)
    step = max(1, derived.UNPACKED_AT_ONCE // (columns * form.step)) * form.step
    first, last = start // columns, -(-stop // columns)
    while first < last:
        number, row = divmod(first, rows)
        until = min(row // step * step + step, rows, row + last - first)
        made = form.unpack(_matrix(source, number, tensors), row, until).reshape(-1)
        low, high = max(start, first * columns), min(stop, (first + until - row) * columns)
        out[low - start : high - start] = made[low - first * columns : high - first * columns]
        first += until - row
    return out[: stop - start]


def _matrix(source: derived.Packed, number: int, tensors: StoredTensors) -> PackedMatrix:
    """One matrix of those that the tensor holds."""
    parts, several = dict(source.parts), len(source.shape) > 2

    def read(role: str, *ranges: tuple[int, int]) -> NDArray[Any]:
        return _read_part(parts[role], number if several else None, ranges, tensors)

    shapes = {role: part.shape[several:] for role, part in parts.items()}
    name = source.parts[0][1].tensor.name
    return PackedMatrix(name, source.matrix, source.dtype, shapes, dict(source.settings), read)


def _read_part(
    stored: Stored, number: int | None, ranges: Sequence[tuple[int, int]], tensors: StoredTensors
) -> NDArray[Any]:
    """Part of a stored tensor, or of one of the matrices in it: rows of it, and of these a range of columns."""
    shape = stored.shape if number is None else stored.shape[1:]
    dtype = np.dtype(NUMPY_DTYPES[stored.dtype])
    (top, bottom), (left, right) = (*ranges, *((0, side) for side in shape[len(ranges) :]), (0, 1), (0, 1))[:2]
    entry = math.prod(shape[2:]) * dtype.itemsize
    width, wanted = math.prod(shape[1:]) * dtype.itemsize, (right - left) * entry
    begin = (number or 0) * math.prod(shape) * dtype.itemsize + left * entry
    step = _rows_at_once(bottom - top, width, wanted)
    made = np.empty((bottom - top, wanted), dtype=np.uint8)
    for row in range(top, bottom, step):
        until = min(row + step, bottom)
        raw = tensors.raw(stored, begin + row * width, begin + (until - 1) * width + wanted)
        made[row - top : until - top] = as_strided(raw, (until - row, wanted), (width, 1))
    found = made.view(dtype).reshape(bottom - top, right - left, *shape[2:])
    return decode(found.reshape([stop - start for start, stop in ranges] + list(shape[len(ranges) :])), stored.dtype)


def _rows_at_once(rows: int, width: int, wanted: int) -> int:
    """How many rows of `width` bytes one read goes through, where `wanted` bytes of each are."""
    if wanted == width:
        return max(1, rows)
    return derived.STRIDED_BYTES // width if width <= _SKIPPED_BYTES else 1


# ---- low rank -------------------------------------------------------------------------------------------------------


def _add_low_rank(source: low_rank.LowRank, start: int, stop: int, out: Array, tensors: StoredTensors) -> Array:
    """The entries of W + scale B A; with a magnitude m of m (W + scale B A) / ‖W + scale B A‖, by rows (DoRA).

    Follows Hu et al. 2021, https://arxiv.org/abs/2106.09685, and Liu et al. 2024, https://arxiv.org/abs/2402.09353.
    """
    load = partial(load_input, tensors=tensors)
    entries = out[: stop - start] if source.magnitude else load(source.of, start, stop, out)
    right = read_whole(source.b, load).T if source.transposed else read_whole(source.a, load)
    for first, last, mine, place in _runs_of_rows(source.matrix, source.chunk_rows, start, stop):
        rows = (_left(source, first, last, load) @ right) * source.scale
        if source.magnitude is None:
            entries[place] += rows.reshape(-1)[mine]
        else:
            entries[place] = _bring_to_length(source, source.magnitude, rows, first, load).reshape(-1)[mine]
    return entries


def _runs_of_rows(shape: Sequence[int], step: int, start: int, stop: int) -> Iterator[tuple[int, int, slice, slice]]:
    """The rows that hold the entries, in runs that begin at the same rows whatever the block: no bit depends on it.

    Of each run which of its entries are wanted, and where among the wanted ones they are.
    """
    rows, columns = shape
    for first in range(start // columns // step * step, -(-stop // columns), step):
        last = min(first + step, rows)
        low, high = max(start, first * columns), min(stop, last * columns)
        yield first, last, slice(low - first * columns, high - first * columns), slice(low - start, high - start)


def _left(source: low_rank.LowRank, first: int, last: int, load: Load) -> Array:
    """Some rows of the small matrix that has as many as the large one: of B, or of Aᵀ, which are columns of A."""
    if not source.transposed:
        rank = source.rank
        return load(source.b, first * rank, last * rank, floats((last - first) * rank)).reshape(-1, rank)
    columns, width = floats(source.rank, last - first), source.a.shape[1]
    for number, row in enumerate(columns):
        load(source.a, number * width + first, number * width + last, row)
    return columns.T


def _bring_to_length(source: low_rank.LowRank, magnitude: Stored, added: Array, first: int, load: Load) -> Array:
    """Rows of the sum, each as long as the magnitude says; `added` is what the adapter adds to them."""
    count, columns = added.shape
    held = load(source.of, first * columns, (first + count) * columns, floats(count * columns))
    total: Array = np.add(held.reshape(count, columns), added)
    wanted = load(magnitude, first, first + count, floats(count))
    total *= (wanted / np.sqrt(row_dots([total])[0]).astype(np.float32))[:, None]
    return total


def _add_low_rank_experts(
    source: low_rank.ExpertsLowRank, start: int, stop: int, out: Array, tensors: StoredTensors
) -> Array:
    """The entries of each expert's W + scale B A, or of its transpose."""
    load = partial(load_input, tensors=tensors)
    entries = load(source.of, start, stop, out)
    b = tensors.once(("of experts", source.b), partial(read_whole, source.b, load))
    experts, *shape = source.shape
    size = math.prod(shape)
    for expert in range(start // size, -(-stop // size)):
        begin = expert * size
        low, high = max(start, begin), min(stop, begin + size)
        left, right = _of_expert(source, expert, b.reshape(len(b), -1, experts), load)
        mine = entries[low - start : high - start]
        for first, last, run, place in _runs_of_rows(shape, source.chunk_rows, low - begin, high - begin):
            mine[place] += ((left[first:last] @ right) * source.scale).reshape(-1)[run]
    return entries


def _of_expert(source: low_rank.ExpertsLowRank, expert: int, b: Array, load: Load) -> tuple[Array, Array]:
    """An expert's B and A, or the transpose of both, A's first."""
    entries = source.rank * source.a.shape[1]
    a = load(source.a, expert * entries, (expert + 1) * entries, floats(entries)).reshape(source.rank, -1)
    return (a.T, b[:, :, expert].T) if source.transposed else (b[:, :, expert], a)


def _take_expert_columns(
    source: low_rank.ExpertColumns, start: int, stop: int, out: Array, tensors: StoredTensors
) -> Array:
    """Some whole rows of B at a time, and of these the expert's columns."""
    rank, width = source.shape[1], source.of.shape[1]
    for first, last, run, place in _runs_of_rows(source.shape, source.chunk_rows, start, stop):
        room = floats((last - first) * width)
        rows = read_entries(tensors, source.of, first * width, last * width, room).reshape(-1, rank, source.experts)
        out[place] = rows[:, :, source.expert].reshape(-1)[run]
    return out[: stop - start]


def _transpose(source: low_rank.Transposed, start: int, stop: int, out: Array, tensors: StoredTensors) -> Array:
    """All of it at once, or some rows: a run of every stored row."""
    rows, columns = source.shape
    first, last = start // columns, -(-stop // columns)
    found = floats(columns, last - first)
    if last - first == rows:
        read_entries(tensors, source.transpose, 0, rows * columns, found.reshape(-1))
    else:
        for number, row in enumerate(found):
            read_entries(tensors, source.transpose, number * rows + first, number * rows + last, row)
    out[: stop - start] = found.T.reshape(-1)[start - first * columns : stop - first * columns]
    return out[: stop - start]


def _add(source: low_rank.Added, start: int, stop: int, out: Array, tensors: StoredTensors) -> Array:
    """The entries of a tensor and of the small one that is added to it, times the scale."""
    plus = load_input(source.plus, start, stop, floats(stop - start), tensors)
    made = load_input(source.to, start, stop, out, tensors)
    made += plus * source.scale
    return made


def _add_up(source: derived.Mean, start: int, stop: int, out: Array, tensors: StoredTensors) -> Array:
    """Tile by tile, so that what is added up stays in a core's cache."""
    held = floats(min(TILE, stop - start))
    for first in range(start, stop, TILE):
        last = min(first + TILE, stop)
        total = out[first - start : last - start]
        for place, (term, factor) in enumerate(zip(source.terms, source.factors, strict=True)):
            entries = load_input(term, first, last, held[: last - first], tensors)
            if place:
                add_scaled(total, entries, factor)
            else:
                scale(entries, factor, total)
    return out[: stop - start]


# ---- shares of layers -----------------------------------------------------------------------------------------------


def _stack(source: derived.Stacked, start: int, stop: int, out: Array, tensors: StoredTensors) -> Array:
    """The layers' shares in their new order: run by run along the first axis, else some rows at a time."""
    run = source.run
    if source.axis == 0:
        for place in range(start // run, -(-stop // run)):
            giver, layer = source.taken[place]
            low, high, shift = max(start, place * run), min(stop, (place + 1) * run), (layer - place) * run
            load_input(source.givers[giver], low + shift, high + shift, out[low - start : high - start], tensors)
        return out[: stop - start]
    width = run * len(source.taken)
    step = max(1, CHUNK_ENTRIES // width)
    for row in range(start // width, -(-stop // width), step):
        until = min(row + step, -(-stop // width))
        made = _rows(source, row, until, tensors).reshape(-1)
        begin, end = max(start, row * width), min(stop, until * width)
        out[begin - start : end - start] = made[begin - row * width : end - row * width]
    return out[: stop - start]


def _rows(source: derived.Stacked, first: int, last: int, tensors: StoredTensors) -> Array:
    """Some rows, of shape (rows, layers, entries of a share)."""
    made = floats(last - first, len(source.taken), source.run)
    for number, giver in enumerate(source.givers):
        width = math.prod(giver.shape[source.axis :])
        held = load_input(giver, first * width, last * width, floats((last - first) * width), tensors)
        places = [place for place, (of, _) in enumerate(source.taken) if of == number]
        layers = [layer for of, layer in source.taken if of == number]
        made[:, places] = held.reshape(last - first, -1, source.run)[:, layers]
    return made


# ---- sources --------------------------------------------------------------------------------------------------------


def load_input(source: Input, start: int, stop: int, out: Array, tensors: StoredTensors) -> Array:
    """The source's entries ``[start, stop)`` as float32, in the front of `out`."""
    if isinstance(source, Stored | StageTensor):
        return read_entries(tensors, source, start, stop, out)
    return _READINGS[type(source)](source, start, stop, out, tensors)


def _subtract(source: low_rank.Difference, start: int, stop: int, out: Array, tensors: StoredTensors) -> Array:
    less = load_input(source.subtrahend, start, stop, floats(stop - start), tensors)
    return np.subtract(load_input(source.minuend, start, stop, out, tensors), less, out=out[: stop - start])


def _read_factor(source: low_rank.Factor, start: int, stop: int, out: Array, tensors: StoredTensors) -> Array:
    entries, seen = tensors.factor(source, start, stop, partial(load_input, tensors=tensors))
    tensors.tell(start, seen if start == 0 else Geometry(((0.0, 0.0), (0.0, 0.0)), 0, 0))
    return _fill(out, entries)


def _draw(source: derived.Drawn, start: int, stop: int, out: Array, tensors: StoredTensors) -> Array:
    for first in range(start, stop, derived.DRAWN_AT_ONCE):
        last = min(first + derived.DRAWN_AT_ONCE, stop)
        out[first - start : last - start] = _draws(source, first, last)
    return out[: stop - start]


def _draws(source: derived.Drawn, start: int, stop: int) -> Any:
    bits = Rng(source.seed, source.stream).bits(0, np.arange(start, stop), "entries")
    if source.law == "normal":
        return source.spread * normal(bits)
    return source.spread * (2.0 * uniform(bits) - 1.0)


def _add_noise(source: derived.Noised, start: int, stop: int, out: Array, tensors: StoredTensors) -> Array:
    quiet = load_input(source.quiet, start, stop, out, tensors)
    for first in range(start, stop, derived.DRAWN_AT_ONCE):
        last = min(first + derived.DRAWN_AT_ONCE, stop)
        quiet[first - start : last - start] += _draws(source.noise, first, last).astype(np.float32)
    return quiet


def _fill_constant(source: derived.Constant, start: int, stop: int, out: Array, tensors: StoredTensors) -> Array:
    out[: stop - start] = source.value
    return out[: stop - start]


def _read_router(source: derived.Routed, start: int, stop: int, out: Array, tensors: StoredTensors) -> Array:
    return _fill(out, tensors.router(source).reshape(-1)[start:stop])


def _fill(out: Array, entries: Array) -> Array:
    out[: entries.size] = entries
    return out[: entries.size]


_READINGS: Mapping[type, Callable[[Any, int, int, Array, StoredTensors], Array]] = {
    Rows: rows_of_map,
    Pursuit: pursue_rows,
    derived.Dequantised: _dequantise,
    derived.Packed: _unpack_rows,
    low_rank.LowRank: _add_low_rank,
    low_rank.ExpertsLowRank: _add_low_rank_experts,
    low_rank.ExpertColumns: _take_expert_columns,
    low_rank.Transposed: _transpose,
    low_rank.Added: _add,
    low_rank.Difference: _subtract,
    low_rank.Factor: _read_factor,
    derived.Drawn: _draw,
    derived.Noised: _add_noise,
    derived.Constant: _fill_constant,
    derived.Mean: _add_up,
    derived.Stacked: _stack,
    derived.Routed: _read_router,
}
"""How each kind of source but the plain one fills the front of `out` with its entries ``[start, stop)``."""
