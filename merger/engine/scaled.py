"""Tensors that are stored as numbers and scales, read as their products. Not here: which they are (checkpoints)."""

from __future__ import annotations

import torch
from torch import Tensor

from merger.engine.leaves import Leaves
from merger.plan.sources import Dequantised


def dequantised(source: Dequantised, start: int, stop: int, out: Tensor, leaves: Leaves) -> Tensor:
    """The numbers times the scales of their blocks, whole rows at once and what is left of rows at both ends."""
    made, columns = leaves.entries(source.numbers, start, stop, out), source.shape[1]
    first, last = start // columns, -(-stop // columns)
    scales = _of_rows(source, first, last, leaves)
    begin, end = -(-start // columns), stop // columns
    if begin > end:  # within one row
        return made.mul_(_spread(source, scales[0])[start - first * columns : stop - first * columns])
    head, tail = begin * columns - start, stop - end * columns
    if head:
        made[:head].mul_(_spread(source, scales[0])[columns - head :])
    _multiply(made[head : len(made) - tail].view(-1, columns), scales[begin - first : end - first], source.block[1])
    if tail:
        made[len(made) - tail :].mul_(_spread(source, scales[-1])[:tail])
    return made


def _of_rows(source: Dequantised, first: int, last: int, leaves: Leaves) -> Tensor:
    """The scales of these rows, one for each block of columns."""
    down, across = source.block
    width = -(-source.shape[1] // across)
    begin, end = first // down, -(-last // down)
    held = leaves.entries(source.scales, begin * width, end * width, torch.empty((end - begin) * width))
    return held.view(-1, width)[torch.arange(first, last) // down - begin]


def _spread(source: Dequantised, scales: Tensor) -> Tensor:
    """A row's scales, one for each column."""
    return scales.repeat_interleave(source.block[1])[: source.shape[1]]


def _multiply(rows: Tensor, scales: Tensor, across: int) -> None:
    """Each row by its scales, each of which stands for `across` columns; the last one may stand for fewer."""
    blocks = rows.shape[1] // across
    whole = blocks * across
    rows[:, :whole].view(len(rows), blocks, across).mul_(scales[:, :blocks, None])
    rows[:, whole:].mul_(scales[:, blocks:])
