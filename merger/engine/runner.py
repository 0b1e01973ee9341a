"""One job's blocks: read as they are stored, then tile by tile brought to float32, merged and rounded once.

A tile stays in a core's cache from its first number to its last. Not here: the order of jobs and what happens to
finished blocks (execute).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from merger.engine.finite import NotFinite, is_finite, not_finite
from merger.engine.geometry import BlockSample
from merger.engine.inputs.readers import load_input
from merger.engine.inputs.stored import read_whole
from merger.engine.tensors import Block, Bytes, JobTensors, RunSetup, block_room
from merger.methods.registry import Method, declared
from merger.methods.steps.dtypes import HELD, Held, Tile, load, store_sum
from merger.methods.steps.random import Rng
from merger.methods.steps.step import TILE, Array, room, tile
from merger.models.architecture import matrix_shape
from merger.planning.geometry import NOTHING, Geometry, total_geometry
from merger.planning.inputs.base import Input, Job, JoinedJob, StageTensor, Stored
from merger.planning.jobs.blocks import COPY_BYTES, block_entries, needs
from merger.planning.jobs.common import arguments
from merger.planning.plan import identify

T = TypeVar("T")


def blocks(job: Job, method: Method) -> list[Block]:
    """The blocks of a job, in order. Their size never depends on a budget: so neither does the result."""
    size, step = (job.nbytes, COPY_BYTES) if job.is_copy else (job.entries, block_entries(job, method))
    return [Block(start, min(start + step, size)) for start in range(0, size, step)]


@dataclass(eq=False)
class JobRunner:
    """The arithmetic of one job, whether its result is the output's or only a stage's.

    Args:
        job: what is made.
        run: what it has in common with others.
        seed: for a method that draws random numbers.
        origin: where the inputs' entries come from.
        whole: the output's tensor that it is made for.
        measured: what the method measured of the whole tensor, once it is known.
    """

    job: Job
    run: RunSetup
    seed: int
    origin: Any
    whole: Job
    measured: Any = None
    seen: dict[int, Geometry] = field(default_factory=dict, repr=False)

    @cached_property
    def method(self) -> Method:
        """By which it is made."""
        return self.run.table[self.job.method]

    @cached_property
    def _arguments(self) -> dict[str, Any]:
        return arguments(self.method, self.job)

    def measure(self) -> None:
        """Let the method see the whole tensor, block by block."""
        if (measure := self.method.measure) is None:
            return
        own, drawn = declared(measure, self._arguments), declared(measure, {"rng": Rng(self.seed, self.job.name)})
        measured = partial(measure, _Blocks(self), **own, **drawn)
        with _explained(self):
            self.measured = self.once(repr(own), measured)

    def once(self, what: str, measure: Callable[[], T]) -> T:
        """What `measure` finds: made anew, unless the same was measured before of these tensors, by this method."""
        if self.run.memo is None:
            return measure()
        bare = tuple(replace(operand, settings={}) for operand in self.job.inputs)
        tensors = identify(replace(self.job, inputs=bare, settings={}))
        return self.run.memo.get((self.method.name, tensors, self.seed, self.run.device, what), measure)

    def round(self, block: Block, out: Bytes) -> Bytes:
        """Make one block in the front of `out`, in the job's dtype.

        Raises:
            NotFinite: an entry is not finite, and no parent holds NaN or an infinity, or none is allowed.
        """
        held = np.dtype(HELD[self.job.dtype])
        made = out[: (block.stop - block.start) * held.itemsize].view(held)
        unseen = self.run.memo is None and block.start not in self.seen
        sample = BlockSample(block.start, block.stop, self.job.entries) if unseen else None
        with _explained(self), tile():
            loaded, alike = self.load(block), self.job.shape  # of what has another shape, where it is
            known = [self._load(of, block, self.origin) if of.shape == alike else of for of in self.job.statistics]
            for start, stop in self.tiles(block):
                with tile():
                    self._round(block, loaded, known, start, made[start:stop], sample)
        if sample is not None:
            of = len(self.job.inputs), self.job.base is not None
            parts = self.job.parts if isinstance(self.job, JoinedJob) else [(self.job, slice(0, None))]
            for _, part in parts:
                self.seen.setdefault(block.start + part.start, sample.geometry(*of, part))
        return made.view(np.uint8)

    def _round(
        self,
        block: Block,
        loaded: list[Held],
        known: Sequence[Held | Stored],
        start: int,
        out: NDArray[Any],
        sample: BlockSample | None,
    ) -> None:
        inputs = self.hand_over(loaded, start, start + out.size)
        statistics = _Statistics(self, known, start, start + out.size)
        merged = self._merge(inputs, block.start + start, statistics)
        if sample is not None and not sample.passes_by:
            sample.take(block.start + start, [*inputs, merged, *(() if inputs.base is None else (inputs.base,))])
        store_sum(merged, inputs.based, self.job.dtype, out)
        if not self.origin.odd and not is_finite(out, self.job.dtype):
            raise _not_finite(self, out, block.start + start)

    def _merge(self, inputs: Sequence[Array], start: int, statistics: Sequence[Array]) -> Array:
        """What the method makes of a tile, in one row."""
        given = dict(self._arguments)
        if self.method.random:
            given["rng"] = Rng(self.seed, self.job.name, start)
        if self.method.placed:
            given["start"] = start
        if self.method.measure is not None:
            given["measured"] = self.measured
        if self.method.statistics is not None:
            given["statistics"] = statistics
        made = self.method.function(self.method.place(inputs, self.run.device), **given)
        found: Array = np.ascontiguousarray(made if isinstance(made, np.ndarray) else made.cpu().numpy(), np.float32)
        return found.reshape(-1)

    def tiles(self, block: Block) -> Iterator[tuple[int, int]]:
        """The parts of a block that are made at once, from its start: of whole rows where rows count."""
        size = block.stop - block.start
        step, row = TILE, max(1, self.job.shape[-1] if self.job.shape else 1)
        if self.method.unit == "rows":
            step = max(1, TILE // row) * row if len(self.job.shape) > 1 else size
        if self.method.unit == "matrix" or self.run.device != "cpu":
            step = size
        return ((start, min(start + step, size)) for start in range(0, size, max(1, step)))

    def hand_over(self, loaded: list[Held], start: int, stop: int) -> Tile:
        """The inputs of a tile as the method wants them, the base subtracted if there is one."""
        return Tile(loaded, self.job.base is not None, start, stop, self.shape)

    def load(self, block: Block) -> list[Held]:
        """All sources' entries as they are stored; good within a tile."""
        alike = [stored for stored in self.job.shared if stored.tensor.entries == self.job.entries]  # others: elsewhere
        tensors = self.origin.with_read(alike, block.start, block.stop) if alike else self.origin
        return [self._load(source, block, tensors) for source in self.job.sources]

    def place(self, entries: Array) -> Any:
        """Where and as the method computes."""
        return self.method.place([entries], self.run.device)[0]

    def read_whole(self, stored: Stored) -> Array:
        """All of what was measured, in its own shape."""
        return read_whole(stored, partial(load_input, tensors=self.origin))

    def _load(self, source: Input, block: Block, tensors: Any) -> Held:
        if isinstance(source, (Stored, StageTensor)):
            held: Held = tensors.bits(source, block.start, block.stop)
            return held
        out = _floats(block.stop - block.start)
        return Held(load_input(source, block.start, block.stop, out, tensors), "F32")

    def shape(self, entries: Array) -> Array:
        """As the method wants its blocks: a run of entries, whole rows, or a matrix."""
        if self.method.unit == "matrix":
            return entries.reshape(matrix_shape(self.job.name, self.job.shape))
        if self.method.unit == "entries":
            return entries
        return entries.reshape(-1, self.job.shape[-1] if self.job.shape else 1)


@contextmanager
def _explained(making: JobRunner) -> Iterator[None]:
    """NaN breaks what sorts or decomposes: whether that is why, is found out where the whole is seen."""
    try:
        with np.errstate(all="ignore"):
            yield
    except (ArithmeticError, ValueError, RuntimeError) as error:
        raise NotFinite(making.whole, f"{making.job.name} cannot be made by {making.method.name} ({error})") from error


class _Statistics(Sequence[Array]):
    """What was measured of each input, made as it is asked for: what is large is held one at a time."""

    def __init__(self, making: JobRunner, known: Sequence[Held | Stored], start: int, stop: int) -> None:
        self._making, self._known, self._entries = making, known, (start, stop)

    def __len__(self) -> int:
        return len(self._known)

    def __getitem__(self, place: Any) -> Any:
        held: Any = self._known[place]
        start, stop = self._entries
        whole = isinstance(held, Stored)
        found = self._making.read_whole(held) if whole else held.floats(start, stop, _floats(stop - start))
        return self._making.place(found if whole else self._making.shape(found))


def _floats(entries: int) -> Array:
    return room(4 * entries).view(np.float32)


class Work:
    """A job of the output under way, with the stages that it is made of.

    Args:
        job: what is made.
        run: what it has in common with others.
        first: the number of the reader's ticket for the first stored tensor of the job; the others follow.
    """

    def __init__(self, job: Job, run: RunSetup, first: int = 0) -> None:
        self.job, self.method, self._needs = job, run.table[job.method], needs(job, run.table)
        self.prepared: Future[None] | None = None
        tickets = {stored: first + place for place, stored in enumerate(job.reads)}
        self.tensors = tensors = JobTensors(run, tickets, self._needs)
        self._making = JobRunner(job, run, run.seed, tensors, job, seen=tensors.seen)
        for made in self._needs.stages:
            tensors.stages[made] = JobRunner(made.job, run, made.seed, tensors, job)

    @property
    def wants_preparing(self) -> bool:
        """Whether `prepare` has to be called, and to be over, before the first block is made."""
        measures = self.method.measure is not None and not self.job.is_copy
        return measures or bool(self._needs.stages or self._needs.kept)

    def prepare(self) -> None:
        """Keep what is read more than once, compute the stages, and let methods see whole tensors, block by block."""
        self.tensors.keep()
        for made, making in self.tensors.stages.items():
            making.measure()
            if made in self._needs.spooled:
                self.tensors.spool.keep(made, self._parts(making))
        self._making.measure()

    def _parts(self, making: JobRunner) -> Iterator[memoryview]:
        """The bytes of every block of a stage; each is good until the next one is asked for."""
        for block in blocks(making.job, making.method):
            with tile():
                yield making.round(block, block_room(making.job.dtype, block)).data

    def make(self, block: Block, out: Bytes) -> memoryview:
        """Make one block in the front of `out`, and return the part of it that holds the result."""
        if not self.job.is_copy:
            return self._making.round(block, out).data
        copied = out[: block.stop - block.start].data
        if not self.tensors.read_copy(self.job.reads[0], block.start, copied):
            bytes_each = self.job.nbytes // self.job.entries
            raise NotFinite(
                next(
                    job
                    for job, part in self.job.parts
                    if not_finite(copied[part.start * bytes_each : part.stop * bytes_each], job.dtype)
                ),
                "an entry that is copied is NaN or infinite",
            )
        return copied

    def seen(self) -> Iterator[tuple[Job, Geometry]]:
        """How inputs and result lie to each other, by the blocks made so far; nothing where nothing is to be said."""
        made = self._making.seen
        if isinstance(self.job, JoinedJob):
            yield from ((member, made[part.start]) for member, part in self.job.parts if part.start in made)
            return
        odd = Counter[int]()
        for (stored, _), count in self.tensors.odd.items():
            odd[stored.model if isinstance(stored, Stored) else stored.stage] += count
        told = tuple(sorted(odd.items()))
        if made or told:
            found = total_of(made) if made else NOTHING
            yield self.job, replace(found, odd=told) if told else found

    def close(self) -> None:
        """No more blocks will be asked for."""
        self.tensors.spool.close()


def total_of(seen: Mapping[int, Geometry]) -> Geometry:
    """That of all blocks, in their order."""
    return total_geometry(seen[start] for start in sorted(seen)) if len(seen) > 1 else next(iter(seen.values()))


class _Blocks:
    """The blocks of a whole tensor as a method's `measure` walks them, tile by tile and as often as it likes."""

    def __init__(self, making: JobRunner) -> None:
        self._making = making

    def __iter__(self) -> Iterator[Sequence[Any]]:
        making = self._making
        for block in blocks(making.job, making.method):
            with tile():
                loaded = making.load(block)
                for start, stop in making.tiles(block):
                    with tile():
                        yield making.method.place(making.hand_over(loaded, start, stop)[:], making.run.device)

    @property
    def entries(self) -> int:
        return self._making.job.entries

    def once(self, what: str, measure: Callable[[], T]) -> T:
        """What `measure` finds in these tensors, whatever a method is set to."""
        return self._making.once(what, measure)

    def spans(self, spans: Sequence[tuple[int, int]]) -> Iterator[list[Any]]:
        """Each span of entries, each input's in one row: only these are read."""
        making = replace(self._making, origin=self._making.origin.unnoted())
        for start, stop in spans:
            with tile():
                loaded = making.load(Block(start, stop))
                yield [entries.reshape(-1) for entries in making.hand_over(loaded, 0, stop - start)]


def _not_finite(making: JobRunner, rounded: NDArray[Any], start: int) -> NotFinite:
    """What comes out, and what may be to blame where no parent is."""
    dtype = making.job.dtype
    floats = load(rounded, dtype, np.empty(rounded.size, np.float32))
    first = int(np.argmin(np.isfinite(floats)))
    value = float(floats[first])
    stage = "" if making.job is making.whole else f" in the stage's {making.job.name}"
    whole = making.whole if stage else next(job for job, part in making.job.parts if start + first < part.stop)
    if dtype == "F16" and value == value:
        hint = "write dtype: bfloat16 or float32"
        return NotFinite(whole, f"a value{stage} is beyond float16, which ends at 65,504", hint)
    return NotFinite(whole, f"an entry{stage} comes out as {value} in {dtype}", "is a weight huge, or a sum 0?")
