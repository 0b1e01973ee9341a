"""The exact magnitude at a rank, in tensors that come block by block, in bounded memory and few passes.

A first pass draws a strided sample and from it a bracket around the wanted rank; a second counts what lies above the
bracket and collects what lies inside. A small tensor ends after the first. What defeats the bracket (the sample misled,
or more entries inside than there is room for) is settled by at most two passes of histograms.

Magnitudes are handled as the bit patterns of float32 without the sign: unsigned integers in the same order, compared
exactly, denormals included. Not here: what a method does with the threshold (`_ops.trim`), and any use of torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from merger.methods._ops import CHUNK, array

if TYPE_CHECKING:
    from merger.methods._ops import Blocks

Bits = NDArray[np.uint32]
Ranks: TypeAlias = Callable[[int], Sequence[int]]
"""From a tensor's number of entries to the ranks wanted in it; the largest magnitude has rank 1."""

_MAGNITUDE = 0x7FFFFFFF
_SAMPLE = 1 << 20  # 4 MiB a model: at a billion entries the bracket then holds about 4 million of them
_THINNING = 5  # odd, so that a stride visits every column of a matrix whose rows are a power of two
_ROOM = 1 << 22  # 16 MiB a model for what lies inside the bracket
_BINS_LOG2 = 16


class Search(Protocol):
    """One pass of the search for one rank; `outcome` is the bit pattern found, or the next pass."""

    def feed(self, chunk: Bits) -> None: ...

    def outcome(self) -> int | Search: ...


def kth_magnitudes(blocks: Blocks, density: Sequence[float]) -> tuple[float, ...]:
    """For each tensor the magnitude of its k-th largest entry, k being ``int(density * entries)``, but at least 1.

    Density 1 gives 0 (all entries reach it), density 0 gives infinity (none does); neither reads anything.
    """

    def rank(share: float) -> Ranks:
        return lambda entries: [max(1, int(share * entries))]

    found = magnitudes_at(blocks, {model: rank(share) for model, share in enumerate(density) if 0 < share < 1})
    known = (np.inf if share <= 0 else 0.0 for share in density)
    return tuple(found[model][0] if model in found else value for model, value in enumerate(known))


def magnitudes_at(blocks: Blocks, ranks: Mapping[int, Ranks]) -> dict[int, tuple[float, ...]]:
    """The magnitudes at some ranks of some models' tensors, all found in the same passes.

    Args:
        blocks: the blocks of the tensors; walked twice as a rule, not at all if nothing is asked for.
        ranks: what is wanted of which model.
    """
    samples = {model: _Sample() for model in ranks}
    for block in blocks if samples else ():
        for model, sample in samples.items():
            sample.take(array(block[model]).view(np.uint32))
    found: dict[tuple[int, int], int | Search] = {
        (model, rank): sample.search(rank) for model, sample in samples.items() for rank in ranks[model](sample.seen)
    }
    while searches := {key: search for key, search in found.items() if not isinstance(search, int)}:
        _read(blocks, searches)
        found |= {key: search.outcome() for key, search in searches.items()}
    bits = {key: outcome for key, outcome in found.items() if isinstance(outcome, int)}
    return {
        model: tuple(_magnitude(bits[model, rank]) for rank in ranks[model](sample.seen))
        for model, sample in samples.items()
    }


def _read(blocks: Blocks, searches: Mapping[tuple[int, int], Search]) -> None:
    buffer = np.empty(CHUNK, np.uint32)
    by_model = {model: [search for (of, _), search in searches.items() if of == model] for model, _ in searches}
    for block in blocks:
        for model, its_searches in by_model.items():
            for chunk in _magnitudes(array(block[model]), buffer):
                for search in its_searches:
                    search.feed(chunk)


def _magnitudes(entries: NDArray[np.float32], buffer: Bits) -> Iterator[Bits]:
    """The entries' magnitudes as bit patterns, chunk by chunk, each in `buffer`."""
    bits = entries.view(np.uint32)
    for start in range(0, bits.size, buffer.size):
        part = bits[start : start + buffer.size]
        yield np.bitwise_and(part, np.uint32(_MAGNITUDE), out=buffer[: part.size])


def _magnitude(bits: int) -> float:
    return float(np.uint32(bits).view(np.float32))


def _nth_largest(entries: Bits, rank: int) -> int:
    entries.partition(entries.size - rank)
    return int(entries[entries.size - rank])


def _nth_largest_of_many(entries: Bits, rank: int) -> int:
    """By a bracket here too, if it holds: partition takes ten times as long an entry as counting does."""
    search = _bracketed(entries, rank, entries.size)
    search.feed(entries)
    found = search.outcome()
    return found if isinstance(found, int) else _nth_largest(entries, rank)


@dataclass
class _Sample:
    """Every `stride`-th entry; the stride grows with the tensor, so that a small one is held entirely."""

    stride: int = 1
    seen: int = 0
    held: int = 0
    pieces: list[Bits] = field(default_factory=list)

    def take(self, bits: Bits) -> None:
        """Look at the next entries, signs and all: they are taken off the sample, not off every entry."""
        piece = bits[-self.seen % self.stride :: self.stride] & np.uint32(_MAGNITUDE)
        self.pieces.append(piece)
        self.held += piece.size
        self.seen += bits.size
        if self.held > _SAMPLE:
            self._thin()

    def _thin(self) -> None:
        self.pieces = [np.concatenate(self.pieces)[::_THINNING].copy()]
        self.held = self.pieces[0].size
        self.stride *= _THINNING

    def search(self, rank: int) -> int | Search:
        if not self.seen:
            return 0
        sample = np.concatenate(self.pieces)
        if self.stride == 1:
            return _nth_largest_of_many(sample, rank) if sample.size > CHUNK else _nth_largest(sample, rank)
        return _bracketed(sample, rank, self.seen)


def _bracketed(entries: Bits, rank: int, total: int) -> _Count:
    """The search for the `rank`-th largest of `total`, in a bracket drawn from these entries.

    Of them total^(2/3) are used: what sorting out a sample costs and what a wider bracket costs are then about equal.
    """
    step = int(entries.size / total ** (2 / 3)) | 1
    return _Count(rank, *_bracket(entries[::step].copy(), rank / total))


def _bracket(sample: Bits, share: float) -> tuple[int, int]:
    """Two values, four standard deviations of a random sample's rank to either side of the wanted one."""
    centre = share * sample.size
    margin = 4 * math.sqrt(centre * (1 - share)) + 4
    low, high = math.ceil(sample.size - centre - margin), math.floor(sample.size - centre + margin)
    inner = [place for place in (low, high) if 0 < place < sample.size]
    if inner:
        sample.partition(inner)
    return (
        int(sample[low]) if low > 0 else 0,
        int(sample[high]) if high < sample.size else _MAGNITUDE,
    )


@dataclass
class _Count:
    """What lies above, at and inside a bracket; its ends are counted apart, for they may be half of the tensor."""

    rank: int
    low: int
    high: int
    above: int = 0
    at_high: int = 0
    inside: int = 0
    at_low: int = 0
    room: Bits = field(default_factory=lambda: np.empty(_ROOM, np.uint32))

    def feed(self, chunk: Bits) -> None:
        self.above += int(np.count_nonzero(chunk > np.uint32(self.high)))
        self.at_high += int(np.count_nonzero(chunk == np.uint32(self.high)))
        if self.low < self.high:
            self.at_low += int(np.count_nonzero(chunk == np.uint32(self.low)))
        if self.low + 1 < self.high:
            self._collect(_shifted_inside(chunk, self.low + 1, self.high - 1))

    def _collect(self, entries: Bits) -> None:
        room = self.room[self.inside : self.inside + entries.size]
        room[:] = entries[: room.size]
        self.inside += entries.size

    def outcome(self) -> int | Search:
        rank = self.rank
        if rank <= self.above:
            return _Histogram(rank, self.high + 1, _MAGNITUDE)
        rank -= self.above
        if rank <= self.at_high:
            return self.high
        rank -= self.at_high
        if rank <= self.inside <= self.room.size:
            return self.low + 1 + _nth_largest(self.room[: self.inside], rank)
        if rank <= self.inside:
            return _Histogram(rank, self.low + 1, self.high - 1)
        rank -= self.inside
        return self.low if rank <= self.at_low else _Histogram(rank - self.at_low, 0, self.low - 1)


@dataclass
class _Histogram:
    """How many entries of the interval [low, high] fall in each of 65,536 equal parts; `rank` counts from its top."""

    rank: int
    low: int
    high: int
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1 << _BINS_LOG2, np.int64))

    @property
    def _shift(self) -> int:
        return max(0, (self.high - self.low).bit_length() - _BINS_LOG2)

    def feed(self, chunk: Bits) -> None:
        entries = _shifted_inside(chunk, self.low, self.high)
        self.counts += np.bincount(entries >> np.uint32(self._shift), minlength=self.counts.size)

    def outcome(self) -> int | Search:
        from_top = np.cumsum(self.counts[::-1])
        place = int(np.searchsorted(from_top, self.rank))
        low = self.low + ((self.counts.size - 1 - place) << self._shift)
        if self._shift == 0:
            return low
        above = int(from_top[place - 1]) if place else 0
        return _Histogram(self.rank - above, low, min(self.high, low + (1 << self._shift) - 1))


def _shifted_inside(chunk: Bits, low: int, high: int) -> Bits:
    """The entries of [low, high] less `low`. Below `low` wraps round to far above."""
    shifted = chunk - np.uint32(low)
    kept: Bits = shifted[shifted <= np.uint32(high - low)]
    return kept
