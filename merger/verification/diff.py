"""Two checkpoints compared tensor by tensor, from folders or the Hub, by ranges and in bounded memory.

Not here: the arithmetic (verification.distance), and whether a merge is what its lock says (verify).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from merger.errors import ModelError
from merger.lock.read import REQUESTS_AT_ONCE, tensors_of
from merger.models.architecture import Architecture
from merger.models.checkpoint import ITEM_BYTES, TensorInfo
from merger.run.pipeline import ignore
from merger.stores.ports import Located, Reader, Ticket
from merger.stores.resolve import Library, find

if TYPE_CHECKING:
    from merger.verification.distance import Distance

_READ_AHEAD_BYTES = 64 << 20


@dataclass(frozen=True)
class Side:
    """One of the two.

    Args:
        store: reads it.
        located: where it is, at which commit.
        tensors: its tensors by name.
    """

    store: Library = field(repr=False)
    located: Located
    tensors: Mapping[str, TensorInfo] = field(repr=False)


@dataclass(frozen=True)
class TensorDiff:
    """A tensor that both have, or several seen as one.

    Args:
        name: the tensor's name, or what the several have in common.
        dtypes: the tensor's dtype in A and in B; of several, empty.
        distance: how far they are from each other.
    """

    name: str
    dtypes: tuple[str, ...]
    distance: Distance


@dataclass(frozen=True)
class Contrast:
    """What the two have and have not in common.

    Args:
        one, other: the two.
        only_one, only_other: names of tensors that the other one does not have.
        shapes: the tensors of two shapes: name, dtype and shape in A, and in B.
        tensors: those of one shape, the most different ones first.
        layers: the same by layer, from the first to the last.
    """

    one: Side
    other: Side
    only_one: tuple[str, ...]
    only_other: tuple[str, ...]
    shapes: tuple[tuple[str, TensorInfo, TensorInfo], ...]
    tensors: tuple[TensorDiff, ...]
    layers: tuple[TensorDiff, ...]

    @property
    def differing(self) -> int:
        """How many of the tensors that both have are not the same, or not of the same dtype."""
        return sum(row.distance.differing > 0 or len(set(row.dtypes)) > 1 for row in self.tensors)

    @property
    def same(self) -> bool:
        """Whether both hold the same tensors, bit for bit."""
        return not (self.only_one or self.only_other or self.shapes or self.differing)


@dataclass(frozen=True)
class Pair:
    """Two checkpoints whose headers are read."""

    one: Side
    other: Side

    @property
    def shared(self) -> list[str]:
        """The tensors that both have in one shape, as they stand in A."""
        one, other = self.one.tensors, self.other.tensors
        return [name for name in one if name in other and one[name].shape == other[name].shape]

    def is_known_same(self, name: str) -> bool:
        """Whether two tensors lie in the same place of the same file, so that nobody has to read them."""
        a, b = self.one.tensors[name], self.other.tensors[name]
        here, there = self.one.located.files[a.file].sha256, self.other.located.files[b.file].sha256
        return here is not None and here == there and (a.start, a.stop) == (b.start, b.stop)

    @property
    def wanted(self) -> list[str]:
        """The tensors that have to be read."""
        return [name for name in self.shared if not self.is_known_same(name)]

    @property
    def nbytes(self) -> int:
        """How many bytes of A are read."""
        return sum(self.one.tensors[name].nbytes for name in self.wanted)


def pair(one: str, other: str) -> Pair:
    """Find two checkpoints and read their headers.

    Args:
        one: a folder, or ``owner/name[@revision]`` on the Hub, with or without ``hf://``.
        other: another one, or the same at another revision.

    Raises:
        ModelError: one of them cannot be read.
    """
    return Pair(_side(one), _side(other))


def _side(target: str) -> Side:
    store, located = find(target)
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        try:
            return Side(store, located, tensors_of(located, store, pool))
        except ModelError as error:
            raise ModelError(replace(problem, where=target) for problem in error.problems) from None


def contrast(both: Pair, threads: int, on_bytes: Callable[[int], object] = ignore) -> Contrast:
    """Compare them.

    Args:
        on_bytes: is told after each block how many bytes of A it held.

    Raises:
        ModelError: bytes cannot be read.
    """
    from merger.verification import distance

    names = both.wanted
    parts: dict[str, list[Distance]] = {name: [] for name in both.shared}
    for name in parts.keys() - set(names):
        parts[name] = [distance.Distance(entries=both.one.tensors[name].entries)]
    pairs = [(both.one.tensors[name], both.other.tensors[name]) for name in names]
    with closing(_reader(both.one, names)) as one, closing(_reader(both.other, names)) as other:
        for number, found in distance.distances(pairs, one, other, threads):
            parts[names[number]].append(found)
            on_bytes(found.entries * ITEM_BYTES[pairs[number][0].dtype])
    return _contrast(both, {name: distance.total_distance(found) for name, found in parts.items()})


def _reader(side: Side, names: Sequence[str]) -> Reader:
    tensors = [side.tensors[name] for name in names]
    tickets = [Ticket(side.located, tensor.file, tensor.start, tensor.stop) for tensor in tensors]
    return side.store.reader(tickets, _READ_AHEAD_BYTES)


def _contrast(both: Pair, found: Mapping[str, Distance]) -> Contrast:
    one, other = both.one.tensors, both.other.tensors
    rows = [TensorDiff(name, (one[name].dtype, other[name].dtype), distance) for name, distance in found.items()]
    return Contrast(
        one=both.one,
        other=both.other,
        only_one=tuple(name for name in one if name not in other),
        only_other=tuple(name for name in other if name not in one),
        shapes=tuple((name, one[name], other[name]) for name in one if name in other and name not in found),
        tensors=tuple(sorted(rows, key=lambda row: (-row.distance.relative, -row.distance.differing))),
        layers=tuple(_layers(Architecture({**one, **other}), rows)),
    )


def _layers(architecture: Architecture, rows: Sequence[TensorDiff]) -> Iterator[TensorDiff]:
    """What lies outside of the layers first, then each layer of each stack."""
    from merger.verification import distance

    groups: dict[tuple[str, int], list[Distance]] = {}
    for row in rows:
        place = architecture.place(row.name)
        groups.setdefault((place.stack or "", -1 if place.layer is None else place.layer), []).append(row.distance)
    several = len(architecture.stacks) > 1
    for (stack, layer), found in sorted(groups.items()):
        where = f"layer {layer}" + (f" of {stack}" if several else "") if stack else "outside of the layers"
        yield TensorDiff(where, (), distance.total_distance(found))
