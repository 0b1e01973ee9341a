"""Takes a matrix apart into the two small ones of an adapter: directions, and how much of the matrix they hold.

Follows the randomised range finder with power iterations of Halko, Martinsson & Tropp 2011, "Finding structure with
randomness", https://arxiv.org/abs/0909.4061 (algorithms 4.4 and 5.1). The matrix is read four times, some rows at a
time, and is never held; directions are made orthonormal in float64, the products are float32.
Not here: merging adapters (blend), and which matrices are taken apart (planning.makers.lora).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np

from merger.engine.inputs.stored import Load, floats, read_whole
from merger.methods.registry import methods
from merger.methods.steps.arithmetic import array, dot
from merger.methods.steps.decompose import TINY, Matrix
from merger.methods.steps.random import Rng, normal
from merger.methods.steps.step import Array
from merger.planning.geometry import Geometry
from merger.planning.inputs.base import Input
from merger.planning.inputs.derived import Constant
from merger.planning.inputs.low_rank import FACTOR_ENTRIES, OVERSAMPLING, Factor, LowRank, MergedDeltas

# ---- merged deltas --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blended:
    """A merged delta: ``rows @ middle @ columns``, where a basis that is None leaves the middle as it is."""

    middle: Array
    rows: Matrix | None
    columns: Matrix | None

    def outside(self, left: Matrix, right: Matrix) -> tuple[Matrix, Matrix]:
        """Directions of the middle as those of the whole."""
        return (
            left if self.rows is None else self.rows @ left,
            right if self.columns is None else right @ self.columns,
        )


def blend(source: MergedDeltas, load: Load) -> Blended:
    """What the method makes of the deltas."""
    parts = [_part(delta, load) for delta in source.deltas]
    rows = _basis([b for b, _ in parts]) if source.space in ("rows", "core") else None
    columns = _basis([a.T for _, a in parts]) if source.space in ("columns", "core") else None
    inner = [(b if rows is None else rows.T @ b, a if columns is None else a @ columns) for b, a in parts]
    given = dict(source.arguments)
    if source.random is not None:
        given["rng"] = Rng(*source.random)
    method = methods()[source.method]
    deltas = [_narrow(b) @ _narrow(a) if source.space == "full" else _product(b, a) for b, a in inner]
    merged = method.function(method.place(deltas), **given)
    return Blended(array(merged).reshape(deltas[0].shape), rows, None if columns is None else columns.T)


def _narrow(matrix: Matrix) -> Array:
    return np.ascontiguousarray(matrix, np.float32)


def _part(delta: LowRank | Constant, load: Load) -> tuple[Matrix, Matrix]:
    """scale B, and A, in float64; without a direction where the adapter changes nothing."""
    if isinstance(delta, Constant):
        rows, columns = delta.shape
        return np.zeros((rows, 0)), np.zeros((0, columns))
    return read_whole(delta.b, load).astype(np.float64) * delta.scale, read_whole(delta.a, load).astype(np.float64)


def _product(b: Matrix, a: Matrix) -> Array:
    """B A in a basis, where zeros come out as rounding: they are made zeros again, else they would have a vote."""
    found = b @ a
    return _narrow(np.where(abs(found) <= TINY * abs(found).max(initial=0.0), 0.0, found))


def _basis(parts: list[Matrix]) -> Matrix:
    """The left singular vectors of all parts side by side, each with its largest entry positive."""
    basis = np.linalg.svd(np.concatenate(parts, 1), full_matrices=False)[0]
    return basis * _signs(basis)


def _signs(basis: Matrix) -> Matrix:
    """Of each column that of its largest entry: else it would be LAPACK's choice."""
    found: Matrix = np.sign(np.take_along_axis(basis, abs(basis).argmax(0)[None], 0))
    return found


# ---- the two small matrices -----------------------------------------------------------------------------------------


_ROUNDS = 3
"""How often the directions are turned towards the large singular values: the error's part of the small ones falls with
the sixth power of their ratio."""

_SEED = 0x5EED


@dataclass(frozen=True)
class Decomposition:
    """L diag(values) R, as near as can be to a matrix; the squares of the norms of that matrix, and of what is left."""

    left: Matrix
    values: Matrix
    right: Matrix
    square: float
    missed: float


@dataclass
class _Pair:
    """A and B, whether anybody has begun to make them, and how many of their entries are still to be handed out."""

    left: int
    begun: bool = False
    made: Future[tuple[Array, Array, Geometry]] = field(default_factory=Future)


class RunPairs:
    """The pairs of a run that are under way: made when A is first asked for, gone when all entries are handed out."""

    def __init__(self) -> None:
        self._pairs: dict[Factor, _Pair] = {}
        self._lock = threading.Lock()

    def entries(self, source: Factor, start: int, stop: int, load: Load) -> tuple[Array, Geometry]:
        """The entries of A or B, and how the matrix and ``scale * B @ A`` lie to each other."""
        pair = self._begin(source, load)
        a, b, seen = pair.made.result()
        found = (a if source.part == "A" else b).reshape(-1)[start:stop]
        with self._lock:
            pair.left -= stop - start
            if pair.left == 0:
                del self._pairs[source.pair]
        return found, seen

    def _begin(self, source: Factor, load: Load) -> _Pair:
        """The pair, made here by the first who asks for A; those who ask for B wait, for A's job was begun before."""
        with self._lock:
            pair = self._pairs.setdefault(source.pair, _Pair(source.rank * sum(source.product.shape)))
            mine = source.part == "A" and not pair.begun
            pair.begun |= mine
        if mine:
            try:
                pair.made.set_result(_make(source, load))
            except BaseException as error:
                pair.made.set_exception(error)
        return pair


def _make(source: Factor, load: Load) -> tuple[Array, Array, Geometry]:
    product = source.product
    if isinstance(product, MergedDeltas):
        merged = blend(product, load)
        found = decompose(lambda: iter([(0, merged.middle)]), merged.middle.shape, source.rank)
        left, right = merged.outside(found.left, found.right)
        found = replace(found, left=left, right=right)
    else:
        found = decompose(lambda: _rows(product, load), product.shape, source.rank)
    kept = found.square - found.missed
    return *_share_out(source, found), Geometry(((found.square, kept), (kept, kept)), 0, math.prod(product.shape))


def _share_out(source: Factor, found: Decomposition) -> tuple[Array, Array]:
    """A and B in float32: the singular values go to B, or their roots to both. Transposed, B has the columns."""
    a, b = (found.left.T, found.right.T) if source.transposed else (found.right, found.left)
    shares = np.sqrt(found.values) if source.spread else found.values
    a = a * shares[:, None] if source.spread else a
    return _narrow(a), _narrow(b * (shares / source.scale))


def decompose(rows: Callable[[], Iterator[tuple[int, Array]]], shape: tuple[int, ...], rank: int) -> Decomposition:
    """The leading singular triples of a matrix, nearly; exactly if it has no more of them than `rank` + 16.

    Args:
        rows: walks the matrix: some rows of it in float32, and the number of the first of them.
        shape: its shape.
        rank: how many triples.
    """
    count, width = shape
    wanted = min(rank + OVERSAMPLING, count, width)
    drawn = normal(Rng(_SEED).bits(0, np.arange(width * wanted), "directions"))
    basis = _narrow(drawn.reshape(width, wanted))
    for _ in range(_ROUNDS):
        total = np.zeros((width, wanted))
        for _, part in rows():
            total += part.T @ (part @ basis)
        basis = _narrow(np.linalg.qr(total).Q)
    reached, square, missed = np.empty((count, wanted)), 0.0, 0.0
    for first, part in rows():
        along = part @ basis
        reached[first : first + len(part)] = along
        square += dot(part, part)
        rest = np.subtract(part, along @ basis.T)
        missed += dot(rest, rest)
    left, values, turn = np.linalg.svd(reached, full_matrices=False)
    left, right = left[:, :rank], turn[:rank] @ basis.T.astype(np.float64)
    signs, kept = _signs(left), values[:rank]
    return Decomposition(left * signs, kept, right * signs.T, square, missed + float((values[rank:] ** 2).sum()))


def _rows(source: Input, load: Load) -> Iterator[tuple[int, Array]]:
    count, width = source.shape
    step = max(1, FACTOR_ENTRIES // max(1, width))
    room = floats(min(step, count) * width)
    for first in range(0, count, step):
        last = min(first + step, count)
        yield first, load(source, first * width, last * width, room).reshape(last - first, width)
