"""Tensors that hold a share for each layer, read with other layers in their place. Not here: which (plan.shares)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from merger.plan.rows import CHUNK_ENTRIES
from merger.plan.sources import Source, Stacked

Load = Callable[[Source, int, int, Tensor], Tensor]
"""Entries ``[start, stop)`` of a source in float32, in the front of a buffer."""


def stacked(source: Stacked, start: int, stop: int, out: Tensor, load: Load) -> Tensor:
    """The layers' shares in their new order: run by run along the first axis, else some rows at a time."""
    run = source.run
    if source.axis == 0:
        for place in range(start // run, -(-stop // run)):
            giver, layer = source.taken[place]
            low, high, shift = max(start, place * run), min(stop, (place + 1) * run), (layer - place) * run
            load(source.givers[giver], low + shift, high + shift, out[low - start : high - start])
        return out[: stop - start]
    width = run * len(source.taken)
    step = max(1, CHUNK_ENTRIES // width)
    for row in range(start // width, -(-stop // width), step):
        until = min(row + step, -(-stop // width))
        made = _rows(source, row, until, load).view(-1)
        begin, end = max(start, row * width), min(stop, until * width)
        out[begin - start : end - start] = made[begin - row * width : end - row * width]
    return out[: stop - start]


def _rows(source: Stacked, first: int, last: int, load: Load) -> Tensor:
    """Some rows, of shape (rows, layers, entries of a share)."""
    made = torch.empty(last - first, len(source.taken), source.run)
    for number, giver in enumerate(source.givers):
        width = math.prod(giver.shape[source.axis :])
        held = load(giver, first * width, last * width, torch.empty((last - first) * width))
        places = [place for place, (of, _) in enumerate(source.taken) if of == number]
        layers = [layer for of, layer in source.taken if of == number]
        made[:, places] = held.view(last - first, -1, source.run)[:, layers]
    return made
