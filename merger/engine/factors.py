"""Takes a matrix apart into the two small ones of an adapter: directions, and how much of the matrix they hold.

Follows the randomised range finder with power iterations of Halko, Martinsson & Tropp 2011, "Finding structure with
randomness", https://arxiv.org/abs/0909.4061 (algorithms 4.4 and 5.1). The matrix is read four times, some rows at a
time, and is never held; directions are made orthonormal in float64, the products are float32.
Not here: merging adapters (blend), and which matrices are taken apart (plan.loras).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from merger.engine.adapters import Load
from merger.engine.blend import blended
from merger.plan.geometry import Geometry
from merger.plan.products import FACTOR_ENTRIES, OVERSAMPLING, Factor, MergedDeltas
from merger.plan.sources import Source

_ROUNDS = 3
"""How often the directions are turned towards the large singular values: the error's part of the small ones falls with
the sixth power of their ratio."""

_SEED = 0x5EED


@dataclass(frozen=True)
class Decomposition:
    """L diag(values) R, as near as can be to a matrix; the squares of the norms of that matrix, and of what is left."""

    left: Tensor
    values: Tensor
    right: Tensor
    square: float
    missed: float


@dataclass
class _Pair:
    """A and B, whether anybody has begun to make them, and how many of their entries are still to be handed out."""

    left: int
    begun: bool = False
    made: Future[tuple[Tensor, Tensor, Geometry]] = field(default_factory=Future)


class Pairs:
    """The pairs of a run that are under way: made when A is first asked for, gone when all entries are handed out."""

    def __init__(self) -> None:
        self._pairs: dict[Factor, _Pair] = {}
        self._lock = threading.Lock()

    def entries(self, source: Factor, start: int, stop: int, load: Load) -> tuple[Tensor, Geometry]:
        """The entries of A or B, and how the matrix and ``scale * B @ A`` lie to each other."""
        pair = self._begun(source, load)
        a, b, seen = pair.made.result()
        found = (a if source.part == "A" else b).view(-1)[start:stop]
        with self._lock:
            pair.left -= stop - start
            if pair.left == 0:
                del self._pairs[source.pair]
        return found, seen

    def _begun(self, source: Factor, load: Load) -> _Pair:
        """The pair, made here by the first who asks for A; those who ask for B wait, for A's job was begun before."""
        with self._lock:
            pair = self._pairs.setdefault(source.pair, _Pair(source.rank * sum(source.product.shape)))
            mine = source.part == "A" and not pair.begun
            pair.begun |= mine
        if mine:
            try:
                pair.made.set_result(_made(source, load))
            except BaseException as error:
                pair.made.set_exception(error)
        return pair


def _made(source: Factor, load: Load) -> tuple[Tensor, Tensor, Geometry]:
    product = source.product
    if isinstance(product, MergedDeltas):
        merged = blended(product, load)
        found = decomposed(lambda: _rows_of(merged.middle), merged.middle.shape, source.rank)
        left, right = merged.outside(found.left, found.right)
        found = replace(found, left=left, right=right)
    else:
        found = decomposed(lambda: _rows(product, load), product.shape, source.rank)
    kept = found.square - found.missed
    return *_shared_out(source, found), Geometry(((found.square, kept), (kept, kept)), 0, math.prod(product.shape))


def _shared_out(source: Factor, found: Decomposition) -> tuple[Tensor, Tensor]:
    """A and B in float32: the singular values go to B, or their roots to both. Of a turned matrix B has the columns."""
    a, b = (found.left.T, found.right.T) if source.turned else (found.right, found.left)
    shares = found.values.sqrt() if source.spread else found.values
    a = a * shares[:, None] if source.spread else a
    return a.float().contiguous(), (b * (shares / source.scale)).float().contiguous()


def decomposed(rows: Callable[[], Iterator[tuple[int, Tensor]]], shape: tuple[int, ...], rank: int) -> Decomposition:
    """The leading singular triples of a matrix, nearly; exactly if it has no more of them than `rank` + 16.

    Args:
        rows: walks the matrix: some rows of it in float32, and the number of the first of them.
        shape: its shape.
        rank: how many triples.
    """
    count, width = shape
    wanted = min(rank + OVERSAMPLING, count, width)
    draw = torch.Generator().manual_seed(_SEED)
    basis = torch.randn(width, wanted, generator=draw)
    for _ in range(_ROUNDS):
        total = torch.zeros(width, wanted, dtype=torch.float64)
        for _, part in rows():
            total += part.T @ (part @ basis)
        basis = torch.linalg.qr(total).Q.float()
    reached, square, missed = torch.empty(count, wanted, dtype=torch.float64), 0.0, 0.0
    for first, part in rows():
        along = part @ basis
        reached[first : first + len(part)] = along
        square += _square(part)
        missed += _square(part.addmm(along, basis.T, alpha=-1))
    left, values, turn = torch.linalg.svd(reached, full_matrices=False)
    left, right = left[:, :rank], turn[:rank] @ basis.T.double()
    signs = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()  # else they would be LAPACK's choice
    return Decomposition(
        left * signs, values[:rank], right * signs.T, square, missed + float(values[rank:].square().sum())
    )


def _square(part: Tensor) -> float:
    return float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2


def _rows(source: Source, load: Load) -> Iterator[tuple[int, Tensor]]:
    count, width = source.shape
    step = max(1, FACTOR_ENTRIES // max(1, width))
    room = torch.empty(min(step, count) * width)
    for first in range(0, count, step):
        last = min(first + step, count)
        yield first, load(source, first * width, last * width, room).view(last - first, width)


def _rows_of(matrix: Tensor) -> Iterator[tuple[int, Tensor]]:
    yield 0, matrix
