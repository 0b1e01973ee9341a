"""The exact magnitude at a rank, in tensors that come block by block, in bounded memory and few passes.

Some spans of the tensor are a sample, which gives a bracket around the wanted rank; one pass over all of it counts what
lies above the bracket and collects what lies inside. A small tensor is its own sample. What defeats the bracket (the
sample misled, or more entries inside than there is room for) is settled by at most two passes of histograms.

Magnitudes are handled as the bit patterns of float32 without the sign: unsigned integers in the same order, compared
exactly, denormals included. Not here: what a method does with the threshold (`arithmetic.trim`), and any use of torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from merger.methods.steps.arithmetic import array, entries_of, read_spans
from merger.methods.steps.step import NONE, Array, step

if TYPE_CHECKING:
    from merger.methods.steps.arithmetic import Blocks

magnitude_bits: Any = None
tally: Any = None
within: Any = None
"""Words of compiled loops: `intrinsics` has them."""

Bits = NDArray[np.uint32]
Ranks: TypeAlias = Callable[[int], Sequence[int]]
"""From a tensor's number of entries to the ranks wanted in it; the largest magnitude has rank 1. It is asked twice, for
a sample comes first."""

_MAGNITUDE = 0x7FFFFFFF
_SMALL = 1 << 16  # entries; a tensor no larger is its own sample
_SPAN = 1 << 11  # entries of the sample that are read at once
_GOLDEN = (math.sqrt(5) - 1) / 2
_ROOM = 1 << 22  # 16 MiB a model for what lies inside the bracket
_BINS_LOG2 = 16
RUN = 32
"""Entries of which most have none in a bracket: then a loop without a branch, one of vectors, passes them."""


class Search(Protocol):
    """One pass of the search for one rank; `outcome` is the bit pattern found, or the next pass."""

    def feed(self, entries: Array) -> None: ...

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
    if not ranks:
        return {}
    entries = entries_of(blocks)
    samples = _samples(blocks, list(ranks), entries)
    found: dict[tuple[int, int], int | Search] = {
        (model, place): _search(samples[model], rank, entries)
        for model, wish in ranks.items()
        for place, rank in enumerate(wish(entries))  # by now a sample was seen
    }
    while searches := {key: search for key, search in found.items() if not isinstance(search, int)}:
        _read(blocks, searches)
        for (model, place), search in searches.items():
            if isinstance(search, _Count):
                search.rank = ranks[model](entries)[place]  # and by now all
            found[model, place] = search.outcome()
    bits = {key: outcome for key, outcome in found.items() if isinstance(outcome, int)}
    return {model: tuple(_magnitude(bits[key]) for key in sorted(bits) if key[0] == model) for model in ranks}


def quartiles(blocks: Blocks) -> tuple[float, float, float]:
    """Of the one tensor that comes in these blocks, its entries at a quarter, half and three quarters of their order.

    Exactly, and without a mean of two: the entry of rank ⌊q (N−1)⌋ from zero. They must not be negative.
    """

    def ranks(count: int) -> list[int]:
        return [count - quarters * (count - 1) // 4 for quarters in (1, 2, 3)]

    low, middle, high = magnitudes_at(blocks, {0: ranks})[0]
    return low, middle, high


def sample_spans(entries: int) -> list[tuple[int, int]]:
    """Where a tensor is looked at first: 65,536 entries, or N^(2/3) of a very large one.

    Sorting out a larger sample costs more, and so does collecting what a wider bracket holds. One span lies in each
    equal part of the tensor, at a place in it that no width of its rows divides.
    """
    parts = max(_SMALL, int(entries ** (2 / 3))) // _SPAN
    length = entries / parts
    starts = (int(part * length + part * _GOLDEN % 1 * (length - _SPAN)) for part in range(parts))
    return [(start, start + _SPAN) for start in starts]


def _samples(blocks: Blocks, models: Sequence[int], entries: int) -> dict[int, Bits]:
    """The magnitudes of a sample's entries, or of all."""
    pieces: dict[int, list[Bits]] = {model: [] for model in models}
    for block in blocks if entries <= _SMALL else read_spans(blocks, sample_spans(entries)):
        for model, held in pieces.items():
            held.append(_bits(array(block[model])))
    return {model: np.concatenate(held) for model, held in pieces.items()}


def _bits(entries: Array) -> Bits:
    return np.ascontiguousarray(entries).view(np.uint32) & np.uint32(_MAGNITUDE)


def _search(sample: Bits, rank: int, entries: int) -> int | Search:
    if sample.size == entries:
        return _nth_largest(sample, rank) if entries else 0
    return _Count(rank, *_bracket(sample, rank / entries))


def _read(blocks: Blocks, searches: Mapping[tuple[int, int], Search]) -> None:
    for block in blocks:
        for (model, _), search in searches.items():
            search.feed(array(block[model]))


def _magnitude(bits: int) -> float:
    return float(np.uint32(bits).view(np.float32))


def _nth_largest(entries: Bits, rank: int) -> int:
    entries.partition(entries.size - rank)
    return int(entries[entries.size - rank])


def _bracket(sample: Bits, share: float) -> tuple[int, int, bool, bool]:
    """Two values, four standard deviations of the sample's rank to either side of the wanted one.

    And for both whether the sample holds it several times: then it may be half of the tensor. Spans that lie in unlike
    parts of the tensor differ by more than chance: what they differ by is in that deviation.
    """
    centre = share * sample.size
    spans = sample.reshape(-1, min(_SPAN, sample.size))
    middle = np.partition(sample, place := min(sample.size - 1, int(sample.size - centre)))[place]
    found = np.count_nonzero(spans > middle, axis=1)
    margin = 4 * math.sqrt(max(centre * (1 - share), len(spans) * float(found.var()))) + 4
    places = math.ceil(sample.size - centre - margin), math.floor(sample.size - centre + margin)
    inner = [place for place in places if 0 < place < sample.size]
    if inner:
        sample.partition(inner)
    low = int(sample[places[0]]) if places[0] in inner else 0
    high = int(sample[places[1]]) if places[1] in inner else _MAGNITUDE
    return low, high, _is_frequent(sample, low), _is_frequent(sample, high)


def _is_frequent(sample: Bits, value: int) -> bool:
    return int(np.count_nonzero(sample == np.uint32(value))) > 1


@step("void(float32[::1], uint32, uint32, uint32, uint32, int64[::1], uint32[::1])")
def sift(x: Array, low: int, high: int, least: int, most: int, counts: NDArray[np.int64], room: Bits) -> None:
    """Count the magnitudes above, at `high`, at `low`, and from `least` to `most`; gather these, less `least`."""
    above = from_high = above_low = from_low = NONE
    for i in range(x.size):
        bits = magnitude_bits(x[i])
        above = tally(above, bits > high)
        from_high = tally(from_high, bits >= high)
        above_low = tally(above_low, bits > low)
        from_low = tally(from_low, bits >= low)
    place = counts[3]
    counts[0] += above
    counts[1] += from_high - above
    counts[2] += from_low - above_low
    counts[3] += above_low - (above if most == high else from_high)
    for start in range(0, x.size if place < counts[3] <= room.size - RUN else 0, RUN):
        run, hits = x[start : start + RUN], NONE
        for i in range(run.size):
            hits = tally(hits, within(magnitude_bits(run[i]), least, most))
        for i in range(run.size if hits > 0 else 0):
            bits = magnitude_bits(run[i])
            room[place] = bits - least
            place += within(bits, least, most)


@dataclass
class _Count:
    """What lies above, at and inside a bracket; an end that many entries share is counted apart, not collected."""

    rank: int
    low: int
    high: int
    low_apart: bool = True
    high_apart: bool = True
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(4, np.int64))
    room: Bits = field(default_factory=lambda: np.empty(_ROOM, np.uint32))

    def __post_init__(self) -> None:
        self.high_apart |= self.low == self.high

    @property
    def _inside(self) -> tuple[int, int]:
        """The least and the largest value that is collected; what is at or below `low` follows from the rest."""
        return self.low + 1, self.high - self.high_apart

    def feed(self, entries: Array) -> None:
        least, most = self._inside
        sift(entries, self.low, self.high, least, max(least - 1, most), self.counts, self.room)

    def outcome(self) -> int | Search:
        above, at_high, at_low, inside = self.counts.tolist()
        rank = self.rank
        if rank <= above:
            return _Histogram(rank, self.high + 1, _MAGNITUDE)
        rank -= above
        if self.high_apart:
            if rank <= at_high:
                return self.high
            rank -= at_high
        least, most = self._inside
        if rank <= inside <= self.room.size - RUN:
            return least + _nth_largest(self.room[:inside], rank)
        if rank <= inside:
            return _Histogram(rank, least, most)
        return self._below(rank - inside, at_low if self.low_apart and self.low < self.high else 0)

    def _below(self, rank: int, at_low: int) -> int | Search:
        if self.low == 0 or rank <= at_low:
            return self.low
        return _Histogram(rank - at_low, 0, self.low - 1 if self.low_apart else self.low)


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

    def feed(self, entries: Array) -> None:
        shifted = _bits(entries) - np.uint32(self.low)  # what is below wraps round to far above
        inside = np.compress(shifted <= np.uint32(self.high - self.low), shifted)
        self.counts += np.bincount(inside >> np.uint32(self._shift), minlength=self.counts.size)

    def outcome(self) -> int | Search:
        from_top = np.cumsum(self.counts[::-1])
        place = int(np.searchsorted(from_top, self.rank))
        low = self.low + ((self.counts.size - 1 - place) << self._shift)
        if self._shift == 0:
            return low
        above = int(from_top[place - 1]) if place else 0
        return _Histogram(self.rank - above, low, min(self.high, low + (1 << self._shift) - 1))
