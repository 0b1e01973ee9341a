"""One job's blocks: read into kept buffers, brought to float32, merged, rounded once to the output's dtype.

Not here: the order of jobs and what happens to finished blocks (execute).
"""

from __future__ import annotations

import math
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from merger.engine.factors import Pairs
from merger.engine.observe import observe
from merger.engine.sources import load
from merger.errors import MismatchError, Problem
from merger.methods._ops import Rng
from merger.methods.registry import Method, declared
from merger.plan.geometry import Geometry, total
from merger.plan.jobs import Job, arguments
from merger.plan.plan import BLOCK_ENTRIES, block_entries, kept
from merger.plan.sources import Stored
from merger.stores.ports import Reader

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_INFINITY = {
    dtype: int(torch.tensor(math.inf, dtype=dtype).view(_BITS[dtype.itemsize])) for dtype in TORCH_DTYPES.values()
}
"""The bit pattern of infinity: those of finite numbers are smaller, those of NaN larger, the sign left aside."""

_COPY_BYTES = 4 * BLOCK_ENTRIES
_SPOOL_BYTES = 8 << 20


@dataclass(frozen=True)
class Block:
    """Entries ``[start, stop)`` of a job's output tensor; of a copy, bytes."""

    start: int
    stop: int


def blocks(job: Job, method: Method) -> list[Block]:
    """The blocks of a job, in order. Their size never depends on a budget: so neither does the result."""
    size, step = (job.nbytes, _COPY_BYTES) if job.is_copy else (job.entries, block_entries(job, method))
    return [Block(start, min(start + step, size)) for start in range(0, size, step)]


class _Kept(threading.local):
    """This thread's buffers: new memory would cost more than the arithmetic."""

    def __init__(self) -> None:
        self.raw = torch.empty(0, dtype=torch.uint8)
        self.floats: list[Tensor] = []

    def raw_of(self, nbytes: int) -> None:
        if self.raw.numel() < nbytes:
            self.raw = torch.empty(nbytes, dtype=torch.uint8)

    def at_least(self, count: int, entries: int) -> None:
        self.raw_of(8 * entries)
        if self.floats and self.floats[0].numel() < entries:
            self.floats = []
        for _ in range(count - len(self.floats)):
            self.floats.append(torch.empty(entries, dtype=torch.float32))


_kept = _Kept()


def _bytes(buffer: Tensor) -> memoryview:
    """A uint8 tensor's memory."""
    return memoryview(buffer.numpy())  # type: ignore[arg-type]  # a numpy array is a buffer; its stub does not say so


class Spool:
    """Stored tensors in one temporary file without a name: for what is read more than once from afar.

    Args:
        tickets: the number of each one's ticket.
        reader: where bytes come from.
    """

    def __init__(self, tickets: Mapping[Stored, int], reader: Reader) -> None:
        self._file = tempfile.TemporaryFile(prefix="merger-spool-")  # noqa: SIM115  closed by `close`, at the last block
        self._starts: dict[Stored, int] = {}
        end = 0
        room = memoryview(bytearray(_SPOOL_BYTES))
        for leaf, ticket in tickets.items():
            self._starts[leaf] = end
            for offset in range(0, leaf.tensor.nbytes, _SPOOL_BYTES):
                part = room[: min(_SPOOL_BYTES, leaf.tensor.nbytes - offset)]
                reader.read(ticket, offset, part)
                self._file.write(part)
            end += leaf.tensor.nbytes
        self._file.flush()

    def __contains__(self, leaf: Stored) -> bool:
        return leaf in self._starts

    def read(self, leaf: Stored, offset: int, out: memoryview) -> None:
        """Fill `out` with a tensor's bytes from `offset` on."""
        os.preadv(self._file.fileno(), [out], self._starts[leaf] + offset)

    def close(self) -> None:
        """Give the disk back."""
        self._file.close()


@dataclass(eq=False)
class Work:
    """A job under way.

    Args:
        job: what is made.
        method: by which method.
        first: the number of the reader's ticket for the job's first input; the others follow.
        reader: where bytes come from.
        seed: for a method that draws random numbers.
        device: where the arithmetic is done.
        pairs: what several jobs of a run make together.
        prepared: what the method measured of the whole tensor, once it is known; None: nothing is to be prepared.
    """

    job: Job
    method: Method
    first: int
    reader: Reader
    seed: int
    device: torch.device
    pairs: Pairs
    prepared: Future[Any] | None = None
    _seen: dict[int, Geometry] = field(default_factory=dict, repr=False)
    _spool: Spool | None = field(default=None, repr=False)

    @cached_property
    def tickets(self) -> Mapping[Stored, int]:
        """The number of the ticket of each stored tensor."""
        return {leaf: self.first + place for place, leaf in enumerate(self.job.reads)}

    @property
    def wants_preparing(self) -> bool:
        """Whether `prepare` has to be called, and to be over, before the first block is made."""
        return bool(kept(self.job, self.method))

    def prepare(self) -> Any:
        """Keep what is read more than once, and let the method see the whole tensor, block by block."""
        far = {leaf: self.tickets[leaf] for leaf in kept(self.job, self.method)}
        far = {leaf: ticket for leaf, ticket in far.items() if not self.reader.repeatable(ticket)}
        if far:
            self._spool = Spool(far, self.reader)
        if self.method.measure is None:
            return None
        given = {**arguments(self.method, self.job), "rng": Rng(self.seed, self.job.name)}
        return self.method.measure(_Blocks(self), **declared(self.method.measure, given))

    def make(self, block: Block, out: Tensor) -> memoryview:
        """Make one block in the buffer `out` (bytes), and return the part of it that holds the result."""
        if self.job.is_copy:
            copied = _bytes(out)[: block.stop - block.start]
            self.reader.read(self.first, block.start, copied)
            return copied
        dtype = TORCH_DTYPES[self.job.dtype]
        result = out[: (block.stop - block.start) * dtype.itemsize]
        rounded = result.view(dtype).copy_(self._merged(block).reshape(-1))
        if not _finite(rounded):
            raise _not_finite(self.job, rounded)
        return _bytes(result)

    def _merged(self, block: Block) -> Tensor:
        given = arguments(self.method, self.job)
        if self.method.random:
            given["rng"] = Rng(self.seed, self.job.name, block.start)
        if self.method.measure is not None and self.prepared is not None:
            given["measured"] = self.prepared.result()
        inputs, base = self.load(block)
        merged: Tensor = self.method.function(inputs, **given)
        if block.start not in self._seen:
            self._seen[block.start] = observe(inputs, merged, block.start, self.job.entries)
        return merged if base is None else merged.add_(base)

    def seen(self) -> Geometry:
        """How inputs and result lie to each other, by the blocks made so far."""
        return total(self._seen[start] for start in sorted(self._seen))

    def load(self, block: Block, step: int = 1) -> tuple[list[Tensor], Tensor | None]:
        """The inputs' entries in float32, the base subtracted if the job has one; and the base.

        Of the tensor's entries every `step`-th; in one row, if these are not all.
        """
        sources, shared = self.job.sources, self.job.shared
        _kept.at_least(len(sources) + len(shared), max(BLOCK_ENTRIES, block.stop - block.start))
        leaves = _Leaves(self, block, step, dict(zip(shared, _kept.floats[len(sources) :], strict=False)))
        loaded = [
            load(source, block.start, block.stop, _kept.floats[number], leaves, step).to(self.device)
            for number, source in enumerate(sources)
        ]
        if step == 1:
            loaded = [self._shaped(entries) for entries in loaded]
        if self.job.base is None:
            return loaded, None
        return [tensor.sub_(loaded[-1]) for tensor in loaded[:-1]], loaded[-1]

    def _shaped(self, entries: Tensor) -> Tensor:
        """As the method wants its blocks: a run of entries, whole rows, or the tensor."""
        if self.method.unit == "matrix":
            return entries.view(self.job.shape)
        return entries.view(-1, self.job.shape[-1] if self.job.shape else 1) if self.method.unit == "rows" else entries

    def entries(self, leaf: Stored, start: int, stop: int, out: Tensor, step: int) -> Tensor:
        """The entries of a stored tensor in float32, in the front of `out`."""
        dtype = TORCH_DTYPES[leaf.dtype]
        _kept.raw_of((stop - start) * dtype.itemsize)
        raw = _kept.raw[: (stop - start) * dtype.itemsize]
        if self._spool is not None and leaf in self._spool:
            self._spool.read(leaf, start * dtype.itemsize, _bytes(raw))
        else:
            self.reader.read(self.tickets[leaf], start * dtype.itemsize, _bytes(raw))
        entries = raw.view(dtype)[-start % step :: step]
        return out[: len(entries)].copy_(entries)

    def tell(self, block: int, seen: Geometry) -> None:
        """What was seen of the block that starts there while its sources were read."""
        self._seen[block] = seen

    def close(self) -> None:
        """No more blocks will be asked for."""
        if self._spool is not None:
            self._spool.close()


class _Leaves:
    """A job's stored tensors while one block of it is loaded; what several sources read is read once.

    Args:
        shared: a buffer for each of those that several sources read.
    """

    def __init__(self, work: Work, block: Block, step: int, shared: Mapping[Stored, Tensor]) -> None:
        self._work, self._shared = work, shared
        self._block, self._loaded = (block.start, block.stop, step), dict[Stored, Tensor]()

    def entries(self, leaf: Stored, start: int, stop: int, out: Tensor, step: int = 1) -> Tensor:
        if leaf not in self._shared or (start, stop, step) != self._block:
            return self._work.entries(leaf, start, stop, out, step)
        if leaf not in self._loaded:
            self._loaded[leaf] = self._work.entries(leaf, start, stop, self._shared[leaf], step)
        return out[: len(self._loaded[leaf])].copy_(self._loaded[leaf])

    @property
    def pairs(self) -> Pairs:
        return self._work.pairs

    def tell(self, seen: Geometry) -> None:
        self._work.tell(self._block[0], seen)


class _Blocks:
    """The blocks of a whole tensor as a method's `measure` walks them, as often as it likes."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def __iter__(self) -> Iterator[list[Tensor]]:
        for block in blocks(self._work.job, self._work.method):
            yield self._work.load(block)[0]

    @property
    def entries(self) -> int:
        return self._work.job.entries

    def strided(self, step: int) -> Iterator[list[Tensor]]:
        """Every `step`-th entry of each input, in one row: only these are brought to float32."""
        for block in blocks(self._work.job, self._work.method):
            yield self._work.load(block, step)[0]


def _finite(entries: Tensor) -> bool:
    """Whether no entry is infinite or NaN, at the speed of reading: by the largest bit pattern of either sign."""
    size, infinity = entries.itemsize, _INFINITY[entries.dtype]
    bits = entries.view(_BITS[size]).numpy()
    return bool(bits.max() < infinity and bits.view(f"u{size}").max() < infinity + (1 << (8 * size - 1)))


def _not_finite(job: Job, rounded: Tensor) -> MismatchError:
    """Which entry it is, and whether the output's dtype is to blame."""
    entry = int(torch.nonzero(~torch.isfinite(rounded))[0])
    what = f"{job.name}: entry {entry} of a block comes out as {rounded[entry].item()} in {job.dtype}"
    hint = "a parent holds infinities or NaN, or a weight is huge"
    if job.dtype == "F16":
        hint = "float16 ends at 65,504: write dtype: bfloat16 or float32, or a parent holds infinities or NaN"
    return MismatchError(Problem(what, where=f"tensor {job.name}", hint=hint))
