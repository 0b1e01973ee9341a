"""A share of a plan's shards, for a run that makes a part of the whole. Not here: what starts such runs (engine)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from merger.plan.plan import Shard
from merger.safety import numbers


@dataclass(frozen=True)
class Part:
    """The `number`-th of `count` parts, from 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """A part from what a user writes.

        >>> Part.parse("3/8")
        Part(number=3, count=8)

        Raises:
            ValueError: it is not written like that, or there is no such part.
        """
        first, _, second = text.partition("/")
        try:
            count = numbers.whole(second, numbers.PARTS)
            return cls(numbers.whole(first, numbers.Range(1, count)), count)
        except ValueError:
            told = numbers.shortened(text)
            raise ValueError(f"{told} is no part; write for example 3/8 for the third of eight") from None

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def share(shards: Sequence[Shard], part: Part | None) -> tuple[Shard, ...]:
    """The shards of a part, all for None: each shard, the largest first, goes to the part with the least to do so far.

    What a shard costs is taken to be the bytes that are read and written for it.
    """
    if part is None:
        return tuple(shards)
    loads = [0] * part.count
    mine = set()
    for place, shard in sorted(enumerate(shards), key=lambda item: -_work(item[1])):
        lightest = loads.index(min(loads))
        loads[lightest] += _work(shard)
        if lightest == part.number - 1:
            mine.add(place)
    return tuple(shard for place, shard in enumerate(shards) if place in mine)


def _work(shard: Shard) -> int:
    return sum(job.nbytes + sum(entry.tensor.nbytes for entry in job.reads) for job in shard.jobs)
