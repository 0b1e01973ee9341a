"""Reads a tensor with what a LoRA adapter adds to it, some rows at a time; the sum is never held as a whole.

Not here: which tensors an adapter changes (checkpoints.adapter), and other kinds of sources (sources).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from merger.plan.products import Added, LowRank
from merger.plan.sources import Source, Stored

Load = Callable[[Source, int, int, Tensor], Tensor]
"""Entries ``[start, stop)`` of a source in float32, in the front of a buffer."""


def with_low_rank(source: LowRank, start: int, stop: int, out: Tensor, load: Load) -> Tensor:
    """The entries of W + scale B A; with a magnitude m of m (W + scale B A) / ‖W + scale B A‖, by rows (DoRA).

    Follows Hu et al. 2021, https://arxiv.org/abs/2106.09685, and Liu et al. 2024, https://arxiv.org/abs/2402.09353.
    """
    entries = out[: stop - start] if source.magnitude else load(source.of, start, stop, out)
    columns, right = source.shape[1], _right(source, load)
    for first, last in _runs_of_rows(source, start, stop):
        rows = (_left(source, first, last, load) @ right).mul_(source.scale)
        low, high = max(start, first * columns), min(stop, last * columns)
        mine = slice(low - first * columns, high - first * columns)
        if source.magnitude is None:
            entries[low - start : high - start].add_(rows.view(-1)[mine])
        else:
            made = _brought_to_length(source, source.magnitude, rows, first, load)
            entries[low - start : high - start] = made.view(-1)[mine]
    return entries


def _runs_of_rows(source: LowRank, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The rows that hold the entries, in runs that begin at the same rows whatever the block: no bit depends on it."""
    step, (rows, columns) = source.chunk_rows, source.shape
    begin, end = start // columns // step * step, -(-stop // columns)
    return ((first, min(first + step, rows)) for first in range(begin, end, step))


def _right(source: LowRank, load: Load) -> Tensor:
    """The small matrix that has a column for each of the large one's: A, or Bᵀ."""
    return _whole(source.b, load).T if source.turned else _whole(source.a, load)


def _left(source: LowRank, first: int, last: int, load: Load) -> Tensor:
    """Some rows of the other one: of B, or of Aᵀ, which are columns of A."""
    if not source.turned:
        rank = source.rank
        return load(source.b, first * rank, last * rank, torch.empty((last - first) * rank)).view(-1, rank)
    columns = torch.empty(source.rank, last - first)
    for row, inputs in zip(columns, range(0, source.a.tensor.entries, source.a.shape[1]), strict=True):
        load(source.a, inputs + first, inputs + last, row)
    return columns.T


def _brought_to_length(source: LowRank, magnitude: Stored, added: Tensor, first: int, load: Load) -> Tensor:
    """Rows of the sum, each as long as the magnitude says; `added` is what the adapter adds to them."""
    count, columns = added.shape
    held = load(source.of, first * columns, (first + count) * columns, torch.empty(count * columns))
    total = held.view(count, columns).add_(added)
    wanted = load(magnitude, first, first + count, torch.empty(count))
    return total.mul_((wanted / torch.linalg.vector_norm(total, dim=1, dtype=torch.float64).float())[:, None])


def _whole(leaf: Stored, load: Load) -> Tensor:
    entries = leaf.tensor.entries
    return load(leaf, 0, entries, torch.empty(entries)).view(leaf.shape)


def with_added(source: Added, start: int, stop: int, out: Tensor, load: Load) -> Tensor:
    """The entries of a tensor and of the small one that is added to it, times the scale."""
    plus = load(source.plus, start, stop, torch.empty(stop - start))
    return load(source.to, start, stop, out).add_(plus.mul_(source.scale))
