"""The tensors of a job under way: read as they are stored, kept where they are read again, made by stages on the way.

Not here: what is made of them (runner), and reading inputs of other kinds (inputs.readers).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from merger.engine.finite import not_finite
from merger.engine.inputs.decompose import RunPairs
from merger.engine.inputs.stored import Load
from merger.engine.spool import Allowance, Spool
from merger.methods.registry import Method
from merger.methods.steps.dtypes import HELD, Held
from merger.methods.steps.step import Array, room
from merger.planning.geometry import Geometry
from merger.planning.inputs.base import StageTensor, Stored
from merger.planning.inputs.derived import Routed
from merger.planning.inputs.low_rank import Factor
from merger.planning.jobs.blocks import Needs
from merger.stores.ports import Reader

T = TypeVar("T")
Bytes = NDArray[np.uint8]
_SPOOL_BYTES = 8 << 20
_REMEMBERED = 1 << 15


class Memo:
    """What methods measured of whole tensors, by all that it depends on: for who makes the same merge again and again.

    What was used last stays, of as many as `_REMEMBERED`.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, measure: Callable[[], T]) -> T:
        """What `measure` returned under this key, or returns now; two threads may both ask it."""
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                known: T = self._known[key]
                return known
        found = measure()
        with self._lock:
            self._known[key] = found
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        return found


@dataclass(frozen=True)
class RunSetup:
    """What all jobs of a run have in common.

    Args:
        table: the merge methods by name.
        reader: where bytes come from.
        seed: for methods that draw random numbers.
        device: where the arithmetic is done, ``cpu`` or ``cuda``.
        routers: those that were computed beforehand.
        allow: whether a parent's entries may be NaN or infinite.
        memory: what may be taken for tensors that are read more than once; the others are kept on disk.
        memo: what was measured before; with one nothing is noted of how inputs and result lie to each other.
        pairs: what two jobs make together.
    """

    table: Mapping[str, Method]
    reader: Reader
    seed: int
    device: str = "cpu"
    routers: Mapping[Routed, Array] = field(default_factory=dict)
    allow: bool = False
    memory: Allowance = field(default_factory=partial(Allowance, 0))
    memo: Memo | None = None
    pairs: RunPairs = field(default_factory=RunPairs)


@dataclass(frozen=True)
class Block:
    """Entries ``[start, stop)`` of a job's output tensor; of a copy, bytes."""

    start: int
    stop: int


def block_room(dtype: str, block: Block) -> Bytes:
    """Room for a block as it is stored, within a tile."""
    return room((block.stop - block.start) * np.dtype(HELD[dtype]).itemsize)


class JobTensors:
    """What a job and its stages read, as `inputs.stored.StoredTensors` says.

    Args:
        run: what the job has in common with others.
        tickets: the numbers of the reader's tickets.
        needs: what is kept, and which stages are made before.
    """

    def __init__(self, run: RunSetup, tickets: Mapping[Stored, int], needs: Needs) -> None:
        self._run, self._tickets, self._needs = run, tickets, needs
        self.odd: dict[tuple[Stored | StageTensor, int], int] = {}
        self.seen: dict[int, Geometry] = {}
        self.stages: dict[StageTensor, Any] = {}
        self.spool = Spool(run.memory)
        self._read_already: Mapping[tuple[Stored | StageTensor, int, int], Held] = {}
        self._done: dict[Hashable, Future[Any]] = {}
        self._lock = threading.Lock()

    def keep(self) -> None:
        """Keep the stored tensors that are read more than once, where reading again would cost a transfer."""
        for stored in self._needs.kept:
            if self._run.reader.repeatable(self._tickets[stored]):
                continue
            if (held := self.spool.room(stored, stored.tensor.nbytes)) is not None:
                self._run.reader.read(self._tickets[stored], 0, held)
            else:
                self.spool.keep(stored, self._read(stored))

    def read_copy(self, stored: Stored, offset: int, out: memoryview) -> bool:
        """Fill `out` with a tensor's bytes from `offset` on; whether entries are as they may be."""
        self._run.reader.read(self._tickets[stored], offset, out)
        self._look(stored, offset, out)
        return self._run.allow or not self.odd

    def _read(self, stored: Stored) -> Iterator[memoryview]:
        room = memoryview(bytearray(min(_SPOOL_BYTES, stored.tensor.nbytes)))
        for offset in range(0, stored.tensor.nbytes, _SPOOL_BYTES):
            part = room[: min(_SPOOL_BYTES, stored.tensor.nbytes - offset)]
            self._run.reader.read(self._tickets[stored], offset, part)
            yield part

    def _look(self, stored: Stored | StageTensor, place: int, raw: Any) -> None:
        """Note how many of the entries that stand there are not finite."""
        if count := not_finite(raw, stored.dtype):
            self.odd[stored, place] = count

    def bits(self, stored: Stored | StageTensor, start: int, stop: int) -> Held:
        """The entries of a stored tensor, or of what a stage makes, as they are stored."""
        if (known := self._read_already.get((stored, start, stop))) is not None:
            return known
        held = np.dtype(HELD[stored.dtype])
        if isinstance(stored, Stored) and not self._run.allow:
            place, size = start * held.itemsize, (stop - start) * held.itemsize
            there = self._run.reader.view(self._tickets[stored], place, size)
            if there is not None and (found := np.frombuffer(there, held)).flags.aligned:
                return Held(found, stored.dtype)
        block = Block(start, stop)
        raw = block_room(stored.dtype, block)
        if isinstance(stored, StageTensor) and stored not in self._needs.spooled:
            self.stages[stored].round(block, raw)
        else:
            self._fill(stored, start * held.itemsize, raw.data)
            if self._run.allow:
                self._look(stored, start, raw)
        return Held(raw.view(held), stored.dtype)

    def unnoted(self) -> JobTensors:
        """The same, which notes nothing of what it reads: all of that is read again as part of the whole."""
        found = copy(self)
        found.odd = {}
        return found

    def with_read(self, shared: Iterable[Stored], start: int, stop: int) -> JobTensors:
        """The same, of whose tensors these entries are read already; good within a tile."""
        found = copy(self)
        found._read_already = {(each, start, stop): self.bits(each, start, stop) for each in shared}
        return found

    def _fill(self, what: Stored | StageTensor, offset: int, out: memoryview) -> None:
        if what in self.spool:
            self.spool.read(what, offset, out)
        else:
            assert isinstance(what, Stored)  # what a stage makes is kept, but where it is read in its own blocks
            self._run.reader.read(self._tickets[what], offset, out)

    def rows(self, stored: Stored | StageTensor, numbers: NDArray[np.intp], width: int) -> Held:
        """The rows of a tensor, by one read for each run of consecutive ones."""
        held = np.dtype(HELD[stored.dtype])
        nbytes = width * held.itemsize
        raw = np.empty(len(numbers) * nbytes, np.uint8)
        view, starts = raw.data, np.flatnonzero(np.diff(numbers, prepend=-2) != 1)
        for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(numbers)], strict=False):
            self._fill(stored, int(numbers[start]) * nbytes, view[start * nbytes : stop * nbytes])
        for place, number in enumerate(numbers.tolist() if self._run.allow else ()):
            self._look(stored, number, view[place * nbytes : (place + 1) * nbytes])
        return Held(raw.view(held), stored.dtype)

    def raw(self, stored: Stored, start: int, stop: int) -> Bytes:
        found = np.empty(stop - start, np.uint8)
        self._fill(stored, start, found.data)
        if self._run.allow:
            self._look(stored, start, found)
        return found

    def router(self, source: Routed) -> Array:
        return self._run.routers[source]

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, made once for all blocks."""
        with self._lock:
            mine = key not in self._done
            found = self._done.setdefault(key, Future())
        if mine:
            try:
                found.set_result(make())
            except BaseException as error:
                found.set_exception(error)
        made: T = found.result()
        return made

    def factor(self, source: Factor, start: int, stop: int, load: Load) -> tuple[Array, Geometry]:
        return self._run.pairs.entries(source, start, stop, load)

    def tell(self, start: int, seen: Geometry) -> None:
        self.seen[start] = seen
