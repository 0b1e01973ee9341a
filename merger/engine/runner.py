"""One job's blocks: read into kept buffers, brought to float32, merged, rounded once to the output's dtype.

Not here: the order of jobs and what happens to finished blocks (execute).
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merger.engine.decompose import RunPairs
from merger.engine.finite import NotFinite, is_finite, not_finite
from merger.engine.geometry import observe
from merger.engine.readers import load_input
from merger.engine.stored import STORED_DTYPES, TORCH_DTYPES, Leaves, T
from merger.methods.registry import Method, declared
from merger.methods.steps.random import Rng
from merger.models.architecture import matrix_shape
from merger.planning.budget import BLOCK_ENTRIES, block_entries, needs
from merger.planning.geometry import NOTHING, Geometry, total_geometry
from merger.planning.inputs.base import Job, StageTensor, Stored
from merger.planning.inputs.derived import Routed
from merger.planning.inputs.rows import Numbers
from merger.planning.jobs import arguments
from merger.stores.ports import Reader

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

    def bytes_of(self, nbytes: int) -> Tensor:
        """Room for an input as it is stored."""
        if self.raw.numel() < nbytes:
            self.raw = torch.empty(nbytes, dtype=torch.uint8)
        return self.raw[:nbytes]

    def floats_of(self, first: int, count: int, entries: int) -> list[Tensor]:
        """The buffers from number `first` on; those before it belong to jobs that wait for this one."""
        self.floats[first:] = [buffer for buffer in self.floats[first:] if buffer.numel() == entries]
        missing = first + count - len(self.floats)
        self.floats += [torch.empty(entries, dtype=torch.float32) for _ in range(missing)]
        return self.floats[first : first + count]


_kept = _Kept()


def _bytes(buffer: Tensor) -> memoryview:
    """A uint8 tensor's memory."""
    return memoryview(buffer.numpy())  # type: ignore[arg-type]  # a numpy array is a buffer; its stub does not say so


class Spool:
    """One temporary file without a name: what is read more than once from afar, and what stages make."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="merger-spool-")  # noqa: SIM115  closed by `close`, at the last block
        self._starts: dict[Stored | StageTensor, int] = {}
        self._end = 0

    def keep(self, what: Stored | StageTensor, parts: Iterable[memoryview]) -> None:
        """Write its bytes, front to back."""
        self._starts[what] = self._end
        for part in parts:
            self._file.write(part)
            self._end += len(part)
        self._file.flush()

    def __contains__(self, what: Stored | StageTensor) -> bool:
        return what in self._starts

    def read(self, what: Stored | StageTensor, offset: int, out: memoryview) -> None:
        """Fill `out` with its bytes from `offset` on."""
        os.preadv(self._file.fileno(), [out], self._starts[what] + offset)

    def close(self) -> None:
        """Give the disk back; what did not go onto a full one was told when it was written."""
        with suppress(OSError):
            self._file.close()


@dataclass(eq=False)
class JobRunner:
    """The arithmetic of one job, whether its result is the output's or only a stage's.

    Args:
        job: what is made.
        method: by which method.
        seed: for a method that draws random numbers.
        device: where the arithmetic is done.
        origin: where the inputs' entries come from.
        whole: the output's tensor that it is made for.
        first: the number of the first of this thread's buffers that it takes.
        measured: what the method measured of the whole tensor, once it is known.
    """

    job: Job
    method: Method
    seed: int
    device: torch.device
    origin: Work
    whole: Job
    first: int = 0
    measured: Any = None
    seen: dict[int, Geometry] = field(default_factory=dict, repr=False)

    @property
    def buffers(self) -> int:
        """How many of a thread's buffers it takes."""
        return len(self.job.sources) + len(self.job.shared)

    def measure(self) -> None:
        """Let the method see the whole tensor, block by block."""
        if self.method.measure is not None:
            given = {**arguments(self.method, self.job), "rng": Rng(self.seed, self.job.name)}
            with self._told():
                self.measured = self.method.measure(_Blocks(self), **declared(self.method.measure, given))

    @contextmanager
    def _told(self) -> Iterator[None]:
        """NaN breaks what sorts or decomposes: whether that is why, is found out where the whole is seen."""
        try:
            yield
        except (ArithmeticError, ValueError, RuntimeError) as error:
            raise NotFinite(self.whole, f"{self.job.name} cannot be made by {self.method.name} ({error})") from error

    def round(self, block: Block, out: Tensor) -> Tensor:
        """Make one block in `out`, which has the job's dtype.

        Raises:
            NotFinite: an entry is not finite, and no parent holds NaN or an infinity, or none is allowed.
        """
        with self._told():
            merged = self._merged(block)
        rounded = out.copy_(merged.reshape(-1))
        if not is_finite(_bytes(rounded.view(torch.uint8)), self.job.dtype) and not self.origin.odd:
            raise _not_finite(self, rounded)
        return rounded

    def parts(self) -> Iterator[memoryview]:
        """The bytes of every block; each is good until the next one is asked for."""
        for block in blocks(self.job, self.method):
            rounded = self.round(block, torch.empty(block.stop - block.start, dtype=TORCH_DTYPES[self.job.dtype]))
            yield _bytes(rounded.view(torch.uint8))

    def _merged(self, block: Block) -> Tensor:
        given = arguments(self.method, self.job)
        if self.method.random:
            given["rng"] = Rng(self.seed, self.job.name, block.start)
        if self.method.measure is not None:
            given["measured"] = self.measured
        inputs, base = self.load(block)
        merged: Tensor = self.method.function(inputs, **given)
        if block.start not in self.seen:
            self.seen[block.start] = observe(inputs, merged, block.start, self.job.entries, base)
        return merged if base is None else merged.add_(base)

    def load(self, block: Block, step: int = 1) -> tuple[list[Tensor], Tensor | None]:
        """The inputs' entries in float32, the base subtracted if the job has one; and the base.

        Of the tensor's entries every `step`-th; in one row, if these are not all.
        """
        sources, shared = self.job.sources, self.job.shared
        floats = _kept.floats_of(self.first, self.buffers, max(BLOCK_ENTRIES, block.stop - block.start))
        leaves = _Leaves(self.origin, block, step, dict(zip(shared, floats[len(sources) :], strict=True)))
        loaded = [
            load_input(source, block.start, block.stop, floats[number], leaves, step).to(self.device)
            for number, source in enumerate(sources)
        ]
        if step == 1:
            loaded = [self._shaped(entries) for entries in loaded]
        if self.job.base is None:
            return loaded, None
        return [tensor.sub_(loaded[-1]) for tensor in loaded[:-1]], loaded[-1]

    def _shaped(self, entries: Tensor) -> Tensor:
        """As the method wants its blocks: a run of entries, whole rows, or a matrix."""
        if self.method.unit == "matrix":
            return entries.view(matrix_shape(self.job.name, self.job.shape))
        return entries.view(-1, self.job.shape[-1] if self.job.shape else 1) if self.method.unit == "rows" else entries


class Work:
    """A job of the output under way, with the stages that it is made of.

    Args:
        job: what is made.
        table: the merge methods by name.
        first: the number of the reader's ticket for the first stored tensor of the job; the others follow.
        reader: where bytes come from.
        seed: for a method that draws random numbers.
        device: where the arithmetic is done.
        routers: those that were computed beforehand.
        pairs: what two jobs of the run make together; None: this one is alone.
        allow: whether a parent's entries may be NaN or infinite.
    """

    def __init__(
        self,
        job: Job,
        table: Mapping[str, Method],
        first: int,
        reader: Reader,
        seed: int,
        device: torch.device,
        routers: Mapping[Routed, Tensor],
        pairs: RunPairs | None = None,
        allow: bool = False,
    ) -> None:
        self.job, self.method, self.pairs = job, table[job.method], pairs or RunPairs()
        self._allow, self.odd = allow, dict[tuple[Stored | StageTensor, int], int]()
        self.prepared: Future[None] | None = None
        self._reader, self._needs, self._routers = reader, needs(job, table), routers
        self._tickets = {leaf: first + place for place, leaf in enumerate(job.reads)}
        self._making = JobRunner(job, self.method, seed, device, self, job)
        self._stages = {
            made: JobRunner(made.job, table[made.job.method], made.seed, device, self, job)
            for made in self._needs.stages
        }
        self._spool: Spool | None = None
        self._done: dict[Hashable, Future[Any]] = {}
        self._lock = threading.Lock()
        for making in (self._making, *(self._stages[made] for made in self._needs.spooled)):
            self._place(making)

    def _place(self, making: JobRunner) -> None:
        """Give buffers to the stages that are computed while this one's are in use."""
        for source in making.job.sources:
            if isinstance(source, StageTensor) and source not in self._needs.spooled:
                self._stages[source].first = making.first + making.buffers
                self._place(self._stages[source])

    @property
    def wants_preparing(self) -> bool:
        """Whether `prepare` has to be called, and to be over, before the first block is made."""
        measures = self.method.measure is not None and not self.job.is_copy
        return measures or bool(self._needs.stages or self._needs.kept)

    def prepare(self) -> None:
        """Keep what is read more than once, compute the stages, and let methods see whole tensors, block by block."""
        for leaf in self._needs.kept:
            if not self._reader.repeatable(self._tickets[leaf]):
                self._keep(leaf, self._read(leaf))
        for made, making in self._stages.items():
            making.measure()
            if made in self._needs.spooled:
                self._keep(made, making.parts())
        self._making.measure()

    def _keep(self, what: Stored | StageTensor, parts: Iterable[memoryview]) -> None:
        self._spool = self._spool or Spool()
        self._spool.keep(what, parts)

    def _read(self, leaf: Stored) -> Iterator[memoryview]:
        room = memoryview(bytearray(min(_SPOOL_BYTES, leaf.tensor.nbytes)))
        for offset in range(0, leaf.tensor.nbytes, _SPOOL_BYTES):
            part = room[: min(_SPOOL_BYTES, leaf.tensor.nbytes - offset)]
            self._reader.read(self._tickets[leaf], offset, part)
            yield part

    def make(self, block: Block, out: Tensor) -> memoryview:
        """Make one block in the buffer `out` (bytes), and return the part of it that holds the result."""
        if self.job.is_copy:
            copied = _bytes(out)[: block.stop - block.start]
            self._reader.read(self._tickets[self.job.reads[0]], block.start, copied)
            self._look(self.job.reads[0], block.start, copied)
            if self.odd and not self._allow:
                raise NotFinite(self.job, "an entry that is copied is NaN or infinite")
            return copied
        dtype = TORCH_DTYPES[self.job.dtype]
        result = out[: (block.stop - block.start) * dtype.itemsize]
        self._making.round(block, result.view(dtype))
        return _bytes(result)

    def seen(self) -> Geometry | None:
        """How inputs and result lie to each other, by the blocks made so far; None where nothing is to be said."""
        odd = Counter[int]()
        for (leaf, _), count in self.odd.items():
            odd[leaf.model if isinstance(leaf, Stored) else leaf.stage] += count
        told = tuple(sorted(odd.items()))
        if self._making.seen:
            return replace(total_geometry(self._making.seen[start] for start in sorted(self._making.seen)), odd=told)
        return replace(NOTHING, odd=told) if told else None

    def _look(self, leaf: Stored | StageTensor, place: int, raw: memoryview) -> None:
        """Note how many of the entries that stand there are not finite."""
        if count := not_finite(raw, leaf.dtype):
            self.odd[leaf, place] = count

    def entries(self, leaf: Stored | StageTensor, start: int, stop: int, out: Tensor, step: int = 1) -> Tensor:
        """The entries of a stored tensor, or of what a stage makes, in float32, in the front of `out`."""
        if isinstance(leaf, StageTensor) and leaf not in self._needs.spooled:
            block = Block(start, stop)
            rounded = self._stages[leaf].round(block, torch.empty(stop - start, dtype=TORCH_DTYPES[leaf.dtype]))
            return out[: stop - start].copy_(rounded)
        dtype = STORED_DTYPES[leaf.dtype]
        raw = _kept.bytes_of((stop - start) * dtype.itemsize)
        self._fill(leaf, start * dtype.itemsize, _bytes(raw))
        if self._allow:
            self._look(leaf, start, _bytes(raw))
        entries = raw.view(dtype)[-start % step :: step]
        return out[: len(entries)].copy_(entries)

    def _fill(self, what: Stored | StageTensor, offset: int, out: memoryview) -> None:
        if self._spool is not None and what in self._spool:
            self._spool.read(what, offset, out)
        else:
            assert isinstance(what, Stored)  # what a stage makes is kept, but where it is read in its own blocks
            self._reader.read(self._tickets[what], offset, out)

    def rows(self, leaf: Stored | StageTensor, numbers: Numbers, out: Tensor) -> None:
        """The rows of a tensor of these numbers in float32, by one read for each run of consecutive ones."""
        dtype = TORCH_DTYPES[leaf.dtype]
        nbytes = out.shape[-1] * dtype.itemsize
        raw = torch.empty(len(numbers) * nbytes, dtype=torch.uint8)
        view, starts = _bytes(raw), np.flatnonzero(np.diff(numbers, prepend=-2) != 1)
        for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(numbers)], strict=False):
            self._fill(leaf, int(numbers[start]) * nbytes, view[start * nbytes : stop * nbytes])
        for place, number in enumerate(numbers.tolist() if self._allow else ()):
            self._look(leaf, number, view[place * nbytes : (place + 1) * nbytes])
        out.copy_(raw.view(dtype).view(out.shape))

    def raw(self, leaf: Stored, start: int, stop: int) -> NDArray[np.uint8]:
        """The bytes of a stored tensor."""
        found = bytearray(stop - start)
        self._fill(leaf, start, memoryview(found))
        if self._allow:
            self._look(leaf, start, memoryview(found))
        return np.frombuffer(found, np.uint8)

    def router(self, source: Routed) -> Tensor:
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

    def tell(self, start: int, seen: Geometry) -> None:
        """What was seen of the block that starts there while its source was read."""
        self._making.seen[start] = seen

    def close(self) -> None:
        """No more blocks will be asked for."""
        if self._spool is not None:
            self._spool.close()


class _Leaves:
    """A job's inputs while one block of it is loaded; a stored tensor that several sources read is read once.

    Args:
        shared: a buffer for each of those that several sources read.
    """

    def __init__(self, origin: Leaves, block: Block, step: int, shared: Mapping[Stored, Tensor]) -> None:
        self._origin, self._shared = origin, shared
        self._block, self._loaded = (block.start, block.stop, step), dict[Stored, Tensor]()
        self.rows, self.raw, self.router, self.once = origin.rows, origin.raw, origin.router, origin.once
        self.pairs, self.tell = origin.pairs, origin.tell

    def entries(self, leaf: Stored | StageTensor, start: int, stop: int, out: Tensor, step: int = 1) -> Tensor:
        if isinstance(leaf, StageTensor) or leaf not in self._shared or (start, stop, step) != self._block:
            return self._origin.entries(leaf, start, stop, out, step)
        if leaf not in self._loaded:
            self._loaded[leaf] = self._origin.entries(leaf, start, stop, self._shared[leaf], step)
        return out[: len(self._loaded[leaf])].copy_(self._loaded[leaf])


class _Blocks:
    """The blocks of a whole tensor as a method's `measure` walks them, as often as it likes."""

    def __init__(self, making: JobRunner) -> None:
        self._making = making

    def __iter__(self) -> Iterator[list[Tensor]]:
        for block in blocks(self._making.job, self._making.method):
            yield self._making.load(block)[0]

    @property
    def entries(self) -> int:
        return self._making.job.entries

    def strided(self, step: int) -> Iterator[list[Tensor]]:
        """Every `step`-th entry of each input, in one row: only these are brought to float32."""
        for block in blocks(self._making.job, self._making.method):
            yield self._making.load(block, step)[0]


def _not_finite(making: JobRunner, rounded: Tensor) -> NotFinite:
    """What comes out, and what may be to blame where no parent is."""
    dtype = making.job.dtype
    value = rounded[int(torch.nonzero(~torch.isfinite(rounded))[0])].item()
    stage = "" if making.job is making.whole else f" in the stage's {making.job.name}"
    if dtype == "F16" and value == value:
        hint = "write dtype: bfloat16 or float32"
        return NotFinite(making.whole, f"a value{stage} is beyond float16, which ends at 65,504", hint)
    return NotFinite(making.whole, f"an entry{stage} comes out as {value} in {dtype}", "is a weight huge, or a sum 0?")
