"""What a job reads more than once of the Hub, and what stages make: in memory as far as that may be, else in a file.

Not here: which tensors those are (planning.jobs.blocks).
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import IO

import numpy as np
from numpy.typing import NDArray

from merger import system
from merger.planning.inputs.base import StageTensor, Stored


class Allowance:
    """How many bytes of memory may be taken for tensors that are kept, by all jobs together."""

    def __init__(self, nbytes: int) -> None:
        self._left, self._lock = nbytes, threading.Lock()

    def take(self, nbytes: int) -> bool:
        """Whether so many bytes were left, which are taken now; what is given back is taken with a minus."""
        with self._lock:
            fits = nbytes <= self._left
            self._left -= nbytes if fits else 0
            return fits


class Spool:
    """What a job reads more than once of the Hub, as far as it may in memory; else, and what stages make, in a file.

    Args:
        memory: what may be taken.
    """

    def __init__(self, memory: Allowance) -> None:
        self._memory, self._held = memory, dict[Stored | StageTensor, NDArray[np.uint8]]()
        self._file: IO[bytes] | None = None
        self._starts: dict[Stored | StageTensor, int] = {}
        self._end = 0

    def room(self, what: Stored, nbytes: int) -> memoryview | None:
        """Room in memory for its bytes, which who asks fills at once; None: there is not so much left."""
        if not self._memory.take(nbytes):
            return None
        self._held[what] = np.empty(nbytes, np.uint8)
        return self._held[what].data

    def keep(self, what: Stored | StageTensor, parts: Iterable[memoryview]) -> None:
        """Write its bytes, front to back, into a temporary file without a name."""
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="merger-spool-")  # noqa: SIM115  closed by `close`
        self._starts[what] = self._end
        for part in parts:
            self._file.write(part)
            self._end += len(part)
        self._file.flush()

    def __contains__(self, what: Stored | StageTensor) -> bool:
        return what in self._held or what in self._starts

    def read(self, what: Stored | StageTensor, offset: int, out: memoryview) -> None:
        """Fill `out` with its bytes from `offset` on."""
        if (held := self._held.get(what)) is not None:
            out[:] = held.data[offset : offset + len(out)]
        elif self._file is not None:
            system.read_at(self._file.fileno(), out, self._starts[what] + offset)

    def close(self) -> None:
        """Give memory and disk back; what did not go onto a full one was told when it was written."""
        while self._held:
            self._memory.take(-self._held.popitem()[1].nbytes)
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
