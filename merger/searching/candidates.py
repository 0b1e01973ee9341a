"""Candidates of a search: plans made straight into the parameters of one transformers model that stays in memory.

Not here: which numbers are tried (study), and how a candidate is scored (objectives).
"""

from __future__ import annotations

import mmap
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import accumulate
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from merger.engine.execute import make_blocks
from merger.engine.tensors import Bytes, Memo
from merger.errors import EvaluationError, MergerError, Problem
from merger.evaluation.budget import LOADING_BYTES, running_bytes
from merger.evaluation.evaluate import temporary_folder, write_files
from merger.methods.registry import methods
from merger.planning.inputs.base import Job
from merger.planning.plan import Plan, identify
from merger.planning.shards import Shard
from merger.run.artifacts import used_files
from merger.stores.ports import PIECE_BYTES, FileInfo, Located, Reader, Ticket
from merger.stores.resolve import Library
from merger.system import computes_in, free_memory

if TYPE_CHECKING:
    from merger.searching.objectives import Scored, Scorer, Step

_ALIGNED = 64
"""Where a tensor begins in the buffer: at a line of the cache, as torch's own do."""
_TORCH = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


@dataclass
class Spent:
    """Seconds that the last trial took.

    Args:
        merging: making what changed.
        evaluating: scoring it.
        rest: what passed between the end of the trial before and the end of this one besides.
    """

    merging: float = 0.0
    evaluating: float = 0.0
    rest: float = 0.0


class Candidates:
    """Makes one plan after the other in the same memory, and of each only what differs from the one before.

    Use it as a context manager. A candidate's bytes are those that a written merge has, rounded to the recipe's dtype.

    Args:
        first: a plan of the recipe, which says what the parents are.
        store: where they are.
        device: where methods compute and the model runs, ``cpu`` or ``cuda``.
        arithmetic: the dtype that the model runs in, as torch calls it; None: that of most of the result.
    """

    def __init__(self, first: Plan, store: Library, device: str = "cpu", arithmetic: str | None = None) -> None:
        self._first, self._store, self._device = first, store, device
        self._arithmetic = arithmetic or _main_dtype(first)
        self._kept, self._memo, self.spent = KeptParents(store), Memo(), Spent()
        self._models: object = None
        self._ended = 0.0
        self._forget()

    def _forget(self) -> None:
        self._resident: _Resident | None = None
        self._layout: object = None
        self._made: dict[str, tuple[str, int]] = {}
        self._buffer, self._starts = np.empty(0, np.uint8), dict[str, int]()
        self._views: dict[str, Any] = {}
        self._copies: dict[str, tuple[Any, Any]] = {}

    def __enter__(self) -> Self:
        self._ended = time.perf_counter()
        self.make(self._first)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._forget()
        self._kept.close()

    @property
    def model(self) -> Any:
        """Transformers' model of the last plan."""
        return self._resident and self._resident.model

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self._resident and self._resident.tokenizer

    def make(self, planned: Plan) -> None:
        """Let `model` be what this plan makes.

        Raises:
            MergerError: a parent cannot be read, a result is not finite, or transformers does not know the model.
        """
        if other := _layout(planned) != self._layout:
            self._lay_out(planned)
        if (models := _models(planned)) != self._models:  # jobs have numbers in their place
            self._made, self._memo, self._models = {}, Memo(), models
        began = time.perf_counter()
        wanted = {job.name: (identify(job), planned.seed) for job in planned.jobs}
        changed = [job for job in planned.jobs if self._made.get(job.name) != wanted[job.name]]
        for job in changed:
            self._made.pop(job.name, None)
        if changed:
            self._write(planned, changed)
        if self._resident is not None and changed:
            self._resident.convert({job.name for job in changed})
        self._made = wanted
        self.spent = Spent(merging=time.perf_counter() - began)
        if other:
            self._resident = _Resident(planned, self._store, self._views, self._device, self._arithmetic)
            self._layout = _layout(planned)

    def score(self, scorers: Sequence[Scorer], step: Step | None = None) -> tuple[Scored, ...]:
        """What each scorer says of the model; `step` is called after each batch of the first one.

        Raises:
            EvaluationError: the model cannot be scored.
        """
        began = time.perf_counter()
        try:
            return tuple(
                scorer.score(self.model, self.tokenizer, None if place else step)
                for place, scorer in enumerate(scorers)
            )
        finally:
            now = time.perf_counter()
            self.spent.evaluating = now - began
            self.spent.rest = now - self._ended - self.spent.evaluating - self.spent.merging
            self._ended = now

    def _lay_out(self, planned: Plan) -> None:
        """Room for all tensors."""
        if planned.locked.recipe.lora is not None:
            what = "an adapter is made, and candidates are whole models"
            raise EvaluationError(Problem(what, hint="search a merge, and extract an adapter of the best"))
        self._forget()
        torch = import_module("torch")
        ends = list(accumulate(-(-job.nbytes // _ALIGNED) * _ALIGNED for job in planned.jobs))
        starts = [0, *ends[:-1]]
        self._buffer = np.zeros(ends[-1], np.uint8)
        here = torch.from_numpy(self._buffer)
        there = here if self._device == "cpu" else here.to(self._device)
        for job, start in zip(planned.jobs, starts, strict=True):
            of, to = (whole[start : start + job.nbytes] for whole in (here, there))
            self._starts[job.name] = start
            self._views[job.name] = to.view(getattr(torch, _TORCH[job.dtype])).view(job.shape)
            if there is not here:
                self._copies[job.name] = (to, of)

    def _write(self, planned: Plan, changed: Sequence[Job]) -> None:
        """Make these tensors, each in its place."""
        alone = [Shard("", tuple(changed))]
        with make_blocks(planned, alone, methods(), self._kept, self._device, self._memo, self._place) as making:
            for data, work in making.blocks:
                if self._place(work.job) is None:
                    for job, part in work.job.parts:
                        size = job.nbytes // job.entries
                        self._room(job, job)[:] = np.frombuffer(data, np.uint8)[part.start * size : part.stop * size]
        for to, of in (self._copies[job.name] for job in changed if job.name in self._copies):
            to.copy_(of)

    def _place(self, job: Job) -> Bytes | None:
        """Where a job's bytes belong; None of small tensors made together whose places have gaps between them."""
        members = [member for member, _ in job.parts]
        found = self._room(members[0], members[-1])
        return found if found.size == job.nbytes else None

    def _room(self, first: Job, last: Job) -> Bytes:
        return self._buffer[self._starts[first.name] : self._starts[last.name] + last.nbytes]


class _Resident:
    """A transformers model whose parameters are views of the candidates' buffer, as far as they can be.

    Args:
        planned: whose config and tokenizer it has; the views hold what it makes.
        store: where the models' small files are.
        views: the tensors by name.
        device: where it runs.
        dtype: what it runs in.

    Raises:
        EvaluationError: transformers does not know it, or lacks a tensor.
    """

    def __init__(self, planned: Plan, store: Library, views: Mapping[str, Any], device: str, dtype: str) -> None:
        self._views, self._device, self._copied = views, device, dict[str, Any]()
        transformers, torch = import_module("transformers"), import_module("torch")
        transformers.utils.logging.disable_progress_bar()
        try:
            with temporary_folder() as folder:
                write_files(folder, used_files(planned, store))
                self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
                config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
                with torch.device("meta"):
                    empty = transformers.AutoModelForCausalLM.from_config(config)
                self._make_model = partial(self._of_views, type(empty), empty.config, getattr(torch, dtype))
                self.model = self._make_model()
                if (folder / "generation_config.json").is_file():
                    self.model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
        except MergerError:
            raise
        except Exception as error:  # whatever goes wrong in a stranger's model is told, not thrown
            from merger.evaluation.scoring import shorten_error

            what = f"transformers cannot run the merge: {shorten_error(error)}"
            raise EvaluationError(Problem(what)) from None
        self.converted = {name: to for name, to in _tensors(self.model).items() if not self._shares(name, to)}

    def _of_views(self, kind: Any, config: Any, dtype: Any) -> Any:
        model, info = kind.from_pretrained(
            None, config=config, state_dict=dict(self._views), dtype=dtype, output_loading_info=True
        )
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"the merge lacks {', '.join(missing[:3])}")
        return model.eval().to(self._device)

    def _shares(self, name: str, tensor: Any) -> bool:
        """Whether a tensor's bytes are in the buffer, or can be, or are copied: where name, shape and content agree."""
        view = self._views.get(name)
        if any(tensor.data_ptr() == each.data_ptr() and tensor.shape == each.shape for each in self._views.values()):
            return True
        if view is None or view.shape != tensor.shape or not view.to(tensor.dtype).equal(tensor):
            return False
        if view.dtype == tensor.dtype:
            tensor.data = view
        else:
            self._copied[name] = tensor
        return True

    def convert(self, changed: Collection[str]) -> None:
        """Copy what is in another dtype; what transformers makes of several tensors is made by it again, and copied."""
        made = _tensors(self._make_model()) if self.converted else {}
        with import_module("torch").no_grad():
            for name, tensor in self._copied.items():
                if name in changed:
                    tensor.copy_(self._views[name])
            for name, tensor in self.converted.items():
                tensor.copy_(made[name])


def _layout(planned: Plan) -> object:
    """What a model in memory is built by, its tokenizer too: one of another cannot hold the candidate."""
    return _models(planned), planned.config, [(job.name, job.dtype, job.shape) for job in planned.jobs]


def _models(planned: Plan) -> object:
    """Which models the numbers of a plan's inputs stand for."""
    found = [model.located for model in planned.locked.models]
    return [(each, sorted((name, info.size, info.changed) for name, info in each.files.items())) for each in found]


def _tensors(model: Any) -> dict[str, Any]:
    """The parameters and buffers that are of its checkpoint, each once."""
    found = dict[int, tuple[str, Any]]()
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def _main_dtype(planned: Plan) -> str:
    """What most entries are."""
    counts = Counter[str]()
    for job in planned.jobs:
        counts[job.dtype] += job.entries
    return _TORCH[counts.most_common(1)[0][0]]


def arithmetic_of(planned: Plan, device: str) -> str:
    """What candidates run in: a processor without instructions for their dtype is several times faster in float32."""
    dtype = _main_dtype(planned)
    return dtype if device != "cpu" or computes_in(dtype) else "float32"


def trial_memory(planned: Plan, tokens: int) -> int:
    """About how many bytes a search holds at once: the parents, the candidate, and what it takes to score it.

    Args:
        planned: any plan of the recipe.
        tokens: how many are run through the model at once.
    """
    models = planned.locked.models
    files = {(model.located, tensor.file) for model in models for tensor in model.checkpoint.tensors.values()}
    parents = sum(located.files[file].size for located, file in files)
    copied = 0 if computes_in(_main_dtype(planned)) else 4 * planned.entries
    searched = planned.locked.recipe.search
    tasks = searched is not None and any(each.kind == "task" for each in (*searched.objectives, *searched.report))
    candidate = planned.nbytes + copied + running_bytes(planned.config, tokens, tasks)
    return planned.peak_memory + LOADING_BYTES + parents + candidate


# ---- parents --------------------------------------------------------------------------------------------------------


class KeptParents:
    """A store that reads each file once, into memory.

    So where half of what is free is enough for a file of the Hub, which else goes into a temporary file without
    a name; and an eighth for one in a folder, which else is read each time: the system keeps its pages.
    """

    def __init__(self, store: Library) -> None:
        self._store, self._held = store, dict[tuple[Located, str, FileInfo], memoryview | None]()
        self.has, self.locate, self.names, self.fetch = store.has, store.locate, store.names, store.fetch

    def reader(self, tickets: Sequence[Ticket], budget: int) -> Reader:
        """A reader of these tickets."""
        held = [self._hold(ticket, budget) for ticket in tickets]
        others = [ticket for ticket, there in zip(tickets, held, strict=True) if there is None]
        return _KeptReader(held, self._store.reader(others, budget))

    def _hold(self, ticket: Ticket, budget: int) -> memoryview | None:
        key = ticket.model, ticket.file, ticket.model.files[ticket.file]
        if key not in self._held:
            self._held[key] = self._read(Ticket(ticket.model, ticket.file, 0, key[2].size), budget)
        whole = self._held[key]
        return None if whole is None else whole[ticket.start : ticket.stop]

    def _read(self, whole: Ticket, budget: int) -> memoryview | None:
        near = whole.model.commit is None
        if whole.stop <= (free_memory() or 0) // (8 if near else 2):
            room = np.empty(whole.stop, np.uint8).data
        elif near:
            return None
        else:
            with tempfile.TemporaryFile(prefix="merger-parent-") as file:
                file.truncate(whole.stop)
                room = memoryview(mmap.mmap(file.fileno(), whole.stop))
        with closing(self._store.reader([whole], budget)) as reader:
            for start in range(0, whole.stop, PIECE_BYTES):
                reader.read(0, start, room[start : start + PIECE_BYTES])
        return room

    def close(self) -> None:
        """Let go of them."""
        self._held.clear()


class _KeptReader(Reader):
    """Hands out tickets of kept files from memory, and reads the others from their store."""

    def __init__(self, held: Sequence[memoryview | None], others: Reader) -> None:
        self._held, self._others = held, others
        self._numbers = [number - 1 for number in accumulate(there is None for there in held)]

    def view(self, ticket: int, offset: int, nbytes: int) -> memoryview | None:
        """Of a kept file its own memory."""
        there = self._held[ticket]
        return None if there is None else there[offset : offset + nbytes]

    def read(self, ticket: int, offset: int, out: memoryview) -> None:
        """Fill `out` from the ticket's file."""
        if (there := self._held[ticket]) is None:
            self._others.read(self._numbers[ticket], offset, out)
        else:
            out[:] = there[offset : offset + len(out)]

    def repeatable(self, ticket: int) -> bool:
        """All of them can be read again."""
        return True

    def close(self) -> None:
        """Close the folders' files."""
        self._others.close()
