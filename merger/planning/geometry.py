"""How the inputs of a merge and its result lie to each other, in numbers measured on a sample of their entries.

Not here: the sampling, which needs the tensors (engine), and what is told of it (card).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from merger.safety.limits import MEASURED, parse_json

_Sums = TypeVar("_Sums")
Table = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Geometry:
    """Inner products of what a method was given (deltas, or tensors where no base is subtracted) and of its result.

    Args:
        products: a square table, each input with each, the result last.
        opposed: how many of the sampled entries have inputs of both signs.
        sampled: how many have inputs that are not zero.
        against: for each input, in how many entries the result has the other sign.
        moved: for each input, how many of its entries are not zero.
        base: the inner products of the base that was subtracted with each row of the table, and with itself last;
            empty where none was.
        odd: of how many models, by their numbers, how many entries are NaN or infinite; a recipe must allow them.
    """

    products: Table
    opposed: int
    sampled: int
    against: tuple[int, ...] = ()
    moved: tuple[int, ...] = ()
    base: tuple[float, ...] = ()
    odd: tuple[tuple[int, int], ...] = ()

    @property
    def inputs(self) -> int:
        """How many inputs there are."""
        return len(self.products) - 1

    def norm(self, place: int) -> float:
        """The Euclidean norm of an input, or with -1 of the result."""
        return math.sqrt(max(0.0, self.products[place][place]))

    def cosine(self, one: int, other: int) -> float | None:
        """The cosine of the angle between two of them; None where one is zero."""
        return cosine_of(self.products[one][other], self.products[one][one], self.products[other][other])

    def whole(self, place: int) -> float:
        """The squared norm of an input as it was before the base was subtracted."""
        return self.products[place][place] + (self.base[-1] + 2 * self.base[place] if self.base else 0.0)

    def base_cosine(self, place: int) -> float:
        """The cosine of the angle between such an input and the base; 1 where there is none, or one is zero."""
        if not self.base:
            return 1.0
        cosine = cosine_of(self.base[place] + self.base[-1], self.whole(place), self.base[-1])
        return 1.0 if cosine is None else cosine

    def cosines(self) -> list[float]:
        """Those of all pairs of inputs."""
        pairs = ((one, other) for one in range(self.inputs) for other in range(one))
        return [cosine for pair in pairs if (cosine := self.cosine(*pair)) is not None]

    def opposition(self) -> float:
        """The share of entries in which the inputs pull apart."""
        return self.opposed / self.sampled if self.sampled else 0.0


def total_geometry(parts: Iterable[Geometry]) -> Geometry:
    """That of several tensors, or blocks, seen as one; they have as many inputs."""
    return add_up([replace(part, odd=()) if part.odd else part for part in parts])


def add_up(parts: Sequence[_Sums]) -> _Sums:
    """Dataclasses of numbers, or of tuples of them, as one: the sum of each field, the same in whatever order."""
    return type(parts[0])(**{name: _add([vars(part)[name] for part in parts]) for name in vars(parts[0])})


def _add(values: Sequence[Any]) -> Any:
    if isinstance(values[0], tuple):
        return tuple(map(_add, zip(*values, strict=True)))
    return sum(values) if isinstance(values[0], int) else math.fsum(values)


def cosine_of(product: float, one: float, other: float) -> float | None:
    """Of the angle between two, from their inner product and the squares of their norms; None where one is zero."""
    norms = math.sqrt(max(0.0, one)) * math.sqrt(max(0.0, other))
    return max(-1.0, min(1.0, product / norms)) if norms > 0 else None


NOTHING = Geometry(((0.0, 0.0), (0.0, 0.0)), 0, 0, (0,), (0,))
"""What is known of a tensor that is copied."""


def dump_geometry(seen: Mapping[str, Geometry]) -> str:
    """What was measured of some tensors, by name, as text that gives the very same numbers back."""
    return json.dumps({name: _numbers(found) for name, found in seen.items()})


def _numbers(found: Geometry) -> list[object]:
    """Its numbers in order; the last are written only where there are any."""
    told = list(vars(found).values())
    return told if found.odd else told[:-1]


def load_geometry(text: str) -> dict[str, Geometry]:
    """What such a text says."""
    return {
        name: Geometry(
            tuple(map(tuple, products)),
            opposed,
            sampled,
            tuple(against),
            tuple(moved),
            tuple(base),
            tuple((model, count) for part in odd for model, count in part),
        )
        for name, (products, opposed, sampled, against, moved, base, *odd) in parse_json(text, MEASURED).items()
    }
