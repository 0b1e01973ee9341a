"""The tensors of a job under way: read as they are stored, kept where they are read again, made by stages on the way.

Not here: what is made of them (runner), and reading inputs of other kinds (inputs.readers).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from copy import copy
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from merger.engine.finite import not_finite
from merger.engine.inputs.decompose import RunPairs
from merger.engine.inputs.stored import Load
from merger.engine.spool import Allowance, Spool
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
        reader: where bytes come from.
        tickets: the numbers of the reader's tickets.
        needs: what is kept, and which stages are made before.
        routers, pairs, allow, memory: as `runner.Work` takes them.
    """

    def __init__(
        self,
        reader: Reader,
        tickets: Mapping[Stored, int],
        needs: Needs,
        routers: Mapping[Routed, Array],
        pairs: RunPairs | None,
        allow: bool,
        memory: Allowance | None,
    ) -> None:
        self._reader, self._tickets, self._needs = reader, tickets, needs
        self._routers, self._pairs, self._allow = routers, pairs or RunPairs(), allow
        self.odd: dict[tuple[Stored | StageTensor, int], int] = {}
        self.seen: dict[int, Geometry] = {}
        self.stages: dict[StageTensor, Any] = {}
        self.spool = Spool(memory or Allowance(0))
        self._read_already: Mapping[tuple[Stored | StageTensor, int, int], Held] = {}
        self._done: dict[Hashable, Future[Any]] = {}
        self._lock = threading.Lock()

    def keep(self) -> None:
        """Keep the stored tensors that are read more than once, where reading again would cost a transfer."""
        for stored in self._needs.kept:
            if self._reader.repeatable(self._tickets[stored]):
                continue
            if (held := self.spool.room(stored, stored.tensor.nbytes)) is not None:
                self._reader.read(self._tickets[stored], 0, held)
            else:
                self.spool.keep(stored, self._read(stored))

    def read_copy(self, stored: Stored, offset: int, out: memoryview) -> bool:
        """Fill `out` with a tensor's bytes from `offset` on; whether entries are as they may be."""
        self._reader.read(self._tickets[stored], offset, out)
        self._look(stored, offset, out)
        return self._allow or not self.odd

    def _read(self, stored: Stored) -> Iterator[memoryview]:
        room = memoryview(bytearray(min(_SPOOL_BYTES, stored.tensor.nbytes)))
        for offset in range(0, stored.tensor.nbytes, _SPOOL_BYTES):
            part = room[: min(_SPOOL_BYTES, stored.tensor.nbytes - offset)]
            self._reader.read(self._tickets[stored], offset, part)
            yield part

    def _look(self, stored: Stored | StageTensor, place: int, raw: Any) -> None:
        """Note how many of the entries that stand there are not finite."""
        if count := not_finite(raw, stored.dtype):
            self.odd[stored, place] = count

    def bits(self, stored: Stored | StageTensor, start: int, stop: int) -> Held:
        """The entries of a stored tensor, or of what a stage makes, as they are stored; good within a tile.

        Raises:
            ModelError: the bytes cannot be had.
            MismatchError: an entry that a stage makes is not finite.
        """
        if (known := self._read_already.get((stored, start, stop))) is not None:
            return known
        block = Block(start, stop)
        raw = block_room(stored.dtype, block)
        if isinstance(stored, StageTensor) and stored not in self._needs.spooled:
            self.stages[stored].round(block, raw)
        else:
            self._fill(stored, start * (len(raw) // max(1, stop - start)), raw.data)
            if self._allow:
                self._look(stored, start, raw)
        return Held(raw.view(HELD[stored.dtype]), stored.dtype)

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
            self._reader.read(self._tickets[what], offset, out)

    def rows(self, stored: Stored | StageTensor, numbers: NDArray[np.intp], width: int) -> Held:
        """The rows of a tensor of these numbers, by one read for each run of consecutive ones.

        Raises:
            ModelError: the bytes cannot be had.
        """
        held = np.dtype(HELD[stored.dtype])
        nbytes = width * held.itemsize
        raw = np.empty(len(numbers) * nbytes, np.uint8)
        view, starts = raw.data, np.flatnonzero(np.diff(numbers, prepend=-2) != 1)
        for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(numbers)], strict=False):
            self._fill(stored, int(numbers[start]) * nbytes, view[start * nbytes : stop * nbytes])
        for place, number in enumerate(numbers.tolist() if self._allow else ()):
            self._look(stored, number, view[place * nbytes : (place + 1) * nbytes])
        return Held(raw.view(held), stored.dtype)

    def raw(self, stored: Stored, start: int, stop: int) -> Bytes:
        """The bytes of a stored tensor."""
        found = np.empty(stop - start, np.uint8)
        self._fill(stored, start, found.data)
        if self._allow:
            self._look(stored, start, found)
        return found

    def router(self, source: Routed) -> Array:
        """The rows of a router that was computed beforehand."""
        return self._routers[source]

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
        """The entries of A or B, which two jobs make together; and how the matrix and ``scale * B @ A`` lie."""
        return self._pairs.entries(source, start, stop, load)

    def tell(self, start: int, seen: Geometry) -> None:
        """What was seen of the block that starts there while its source was read."""
        self.seen[start] = seen
