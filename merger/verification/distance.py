"""How far two tensors are from each other, by blocks, in float64. Not here: which ones, and what is told (diff)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merger.models.checkpoint import ITEM_BYTES, TensorInfo
from merger.models.formats.packed import NUMPY_DTYPES, decode
from merger.planning.geometry import add_up, cosine_of
from merger.planning.jobs.blocks import BLOCK_ENTRIES
from merger.stores.ports import Reader


@dataclass(frozen=True)
class Distance:
    """Of some entries of A and the same of B.

    Args:
        apart: the sum of (A − B)².
        one: the sum of A².
        other: the sum of B².
        product: the sum of A·B.
        largest: the largest magnitude of A − B; infinite where a number is not finite, and not the same in both.
        differing: how many entries differ, in their bits or, where the dtypes are two, in their numbers.
        entries: how many there are.
    """

    apart: float = 0.0
    one: float = 0.0
    other: float = 0.0
    product: float = 0.0
    largest: float = 0.0
    differing: int = 0
    entries: int = 0

    @property
    def relative(self) -> float:
        """The norm of A − B as a share of A's."""
        if self.differing == 0:
            return 0.0
        return math.sqrt(self.apart / self.one) if self.one and math.isfinite(self.largest) else math.inf

    @property
    def cosine(self) -> float | None:
        """Of the angle between A and B; None where one of them is zero or not finite."""
        return cosine_of(self.product, self.one, self.other) if math.isfinite(self.largest) else None


def total_distance(parts: Iterable[Distance]) -> Distance:
    """That of several runs of entries, or tensors, seen as one."""
    found = [Distance(), *parts]
    return replace(add_up(found), largest=max(part.largest for part in found))


def distances(
    pairs: Sequence[tuple[TensorInfo, TensorInfo]], one: Reader, other: Reader, threads: int
) -> Iterator[tuple[int, Distance]]:
    """The number of each pair and the distance of its tensors, block after block.

    Args:
        pairs: tensors of one shape each.
        one: reads the first ones, whose tickets are numbered as the pairs are.
        other: reads the second ones.
        threads: how many compute.

    Raises:
        ModelError: bytes cannot be read.
    """
    blocks = [
        (number, start, min(start + BLOCK_ENTRIES, pair[0].entries))
        for number, pair in enumerate(pairs)
        for start in range(0, pair[0].entries, BLOCK_ENTRIES)
    ]

    def measured(block: tuple[int, int, int]) -> Distance:
        number, start, stop = block
        sides = zip(pairs[number], (one, other), strict=True)
        return _distance(*(_read(reader, number, tensor, start, stop) for tensor, reader in sides))

    pool = ThreadPoolExecutor(threads, thread_name_prefix="distance")
    try:
        for (number, _, _), found in zip(blocks, pool.map(measured, blocks), strict=True):
            yield number, found
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _Run:
    """Some entries: their bits, and their numbers, if they are read as such."""

    dtype: str
    bits: NDArray[Any]
    numbers: NDArray[np.float64] | None


def _read(reader: Reader, number: int, tensor: TensorInfo, start: int, stop: int) -> _Run:
    size = ITEM_BYTES[tensor.dtype]
    data = bytearray((stop - start) * size)
    reader.read(number, start * size, memoryview(data))
    return _Run(tensor.dtype, np.frombuffer(data, f"u{size}"), as_numbers(data, tensor.dtype))


def as_numbers(raw: bytes | bytearray, dtype: str) -> NDArray[np.float64] | None:
    """What bytes of a dtype stand for; None where it is not one of numbers, or has two in each."""
    if dtype not in NUMPY_DTYPES:
        return None
    bits = np.frombuffer(raw, NUMPY_DTYPES[dtype])
    return (bits if dtype == "F64" else decode(bits, dtype)).astype(np.float64)


def _distance(one: _Run, other: _Run) -> Distance:
    same = _same(one, other)
    differing, entries, a, b = int((~same).sum()), len(same), one.numbers, other.numbers
    if a is None or b is None:
        return Distance(largest=math.inf if differing else 0.0, differing=differing, entries=entries)
    if not (np.isfinite(a) & np.isfinite(b)).all():
        if not (np.isfinite(a) & np.isfinite(b) | same).all():
            return Distance(largest=math.inf, differing=differing, entries=entries)
        a, b = (np.where(np.isfinite(side), side, 0.0) for side in (a, b))
    apart = a - b
    return Distance(
        apart=float(apart @ apart),
        one=float(a @ a),
        other=float(b @ b),
        product=float(a @ b),
        largest=float(abs(apart).max()),
        differing=differing,
        entries=entries,
    )


def _same(one: _Run, other: _Run) -> NDArray[np.bool_]:
    if one.dtype == other.dtype:
        return np.asarray(one.bits == other.bits)
    if one.numbers is None or other.numbers is None:
        return np.zeros(len(one.bits), np.bool_)
    return np.equal(one.numbers, other.numbers)
