"""Where an input's entries come from: a tensor of a model as it is stored, or stored tensors and a step on the way in.

And the job that makes an output tensor of them, which a later stage may read in turn. What a plan's hash has of each is
its `encode`, whose words stay when names change. Not here: the other kinds (derived, rows, low_rank), which jobs there
are (jobs), and reading bytes (engine).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import accumulate
from typing import Any, ClassVar

from merger.models.checkpoint import ITEM_BYTES, TensorInfo

PASSTHROUGH = "passthrough"


class Input:
    """The entries of an input, in its own shape.

    Unless a kind says otherwise its children are the inputs among its fields; it has the shape and the dtype of the
    first of them, reads what they read, and takes the memory that they take.
    """

    kind: ClassVar[str]
    """A word for what is done, of which each kind has its own."""

    scattered: ClassVar[bool] = False
    """Whether a block reads all over what it is made of."""

    words: ClassVar[Mapping[str, str]] = {}
    """By a field's name the older one that plans' hashes are made of."""

    def encode(self) -> dict[str, Any]:
        """Plain data, and children, that name it in a plan's hash: no two kinds of source have the same keys."""
        each = fields(self)  # type: ignore[arg-type]  # every kind is a dataclass
        return {self.words.get(of.name, of.name): getattr(self, of.name) for of in each}

    @property
    def children(self) -> tuple[Input, ...]:
        """What it is put together from, in a fixed order; the one that names it is the first."""
        held = (getattr(self, name) for name in getattr(self, "__dataclass_fields__", ()))
        each = (child for value in held for child in (value if isinstance(value, tuple) else (value,)))
        return tuple(child for child in each if isinstance(child, Input))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what it gives."""
        return self.children[0].shape

    @property
    def dtype(self) -> str:
        """The dtype, as safetensors writes it, that a result has which follows this input."""
        return self.children[0].dtype

    @property
    def stored_tensors(self) -> tuple[Stored, ...]:
        """The stored tensors that it reads, each once; the one that names it is the first."""
        return tuple(dict.fromkeys(stored for child in self.children for stored in child.stored_tensors))

    @property
    def reread(self) -> tuple[Stored, ...]:
        """The stored tensors of which a block reads more than its own entries: a copy of remote ones is kept."""
        if self.scattered:
            return self.stored_tensors
        return tuple(stored for child in self.children for stored in child.reread)

    @property
    def workspace_bytes(self) -> int:
        """Bytes of memory that reading a block of it takes, beside the block's float32 entries."""
        return sum(child.workspace_bytes for child in self.children)


@dataclass(frozen=True)
class Stored(Input):
    """A tensor of a model as it is stored.

    Args:
        model: the model's number in the locked recipe.
        tensor: the tensor and its place.
    """

    kind = "stored"
    model: int
    tensor: TensorInfo

    @property
    def children(self) -> tuple[Input, ...]:
        return ()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    @property
    def stored_tensors(self) -> tuple[Stored, ...]:
        return (self,)


@dataclass(frozen=True)
class StageTensor(Input):
    """What a stage of the recipe makes, rounded to the stage's dtype; it is never stored as a model.

    Args:
        stage: the stage's number in the locked recipe.
        name: the tensor's name there.
        seed: the stage's, for methods that draw random numbers.
        job: how it is made; the plan's hash has it once, however often it is used.
    """

    kind = "stage"
    stage: int
    name: str
    seed: int
    job: Job = field(compare=False, repr=False)

    def encode(self) -> dict[str, Any]:
        return {"stage": self.stage, "name": self.name, "seed": self.seed}

    @property
    def shape(self) -> tuple[int, ...]:
        return self.job.shape

    @property
    def dtype(self) -> str:
        return self.job.dtype

    @cached_property
    def stored_tensors(self) -> tuple[Stored, ...]:
        """All that is read for it; what is read more than once, and its memory, planning.budget finds by its job."""
        return self.job.reads


@dataclass(frozen=True)
class Operand:
    """What goes into a job.

    Args:
        source: where its entries come from.
        settings: the per-model numbers by the parameter's name.
        named: the number of the model that it stands for, where that is not the one whose files are read first.
        statistic: what was measured of it, where the method asks for that.
    """

    source: Input
    settings: Mapping[str, float] = field(default_factory=dict)
    named: int | None = None
    statistic: Stored | None = None

    def encode(self) -> dict[str, Any]:
        """Plain data, and its source, that name it in a plan's hash."""
        said = {"source": self.source, "settings": self.settings, "named": self.named}
        return said if self.statistic is None else {**said, "statistic": self.statistic}

    @property
    def model(self) -> int:
        """The number of the model or stage that it stands for in the locked recipe."""
        if self.named is not None:
            return self.named
        return self.source.stage if isinstance(self.source, StageTensor) else self.source.stored_tensors[0].model


@dataclass(frozen=True)
class Job:
    """The making of one output tensor.

    Args:
        name: the output tensor's name.
        dtype: its dtype as safetensors writes it.
        shape: its shape, which is every input's.
        method: the merge method's name.
        inputs: what the method is handed, in this order.
        base: what is subtracted from each input first and added to the result, or None.
        settings: the global numbers by the parameter's name.
        why: for a tensor that is copied although the recipe names another method: the reason.
        sources: what is loaded for each block, the base last; follows from the inputs and the base.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    method: str
    inputs: tuple[Operand, ...]
    base: Operand | None = None
    settings: Mapping[str, float] = field(default_factory=dict)
    why: str | None = None
    sources: tuple[Input, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", tuple([operand.source for operand in self.operands]))

    @property
    def operands(self) -> tuple[Operand, ...]:
        """The inputs, and the base last."""
        return self.inputs if self.base is None else (*self.inputs, self.base)

    @property
    def parts(self) -> tuple[tuple[Job, slice], ...]:
        """The jobs that it is made of, and which of its entries are each one's."""
        return ((self, slice(0, self.entries)),)

    def encode(self) -> dict[str, Any]:
        """Plain data, and its inputs, that name it in a plan's hash."""
        return {
            "name": self.name, "dtype": self.dtype, "shape": self.shape, "method": self.method, "inputs": self.inputs,
            "base": self.base, "settings": self.settings, "why": self.why,
        }  # fmt: skip

    @cached_property
    def entries(self) -> int:
        """How many numbers the output tensor holds."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes the output tensor takes."""
        return self.entries * ITEM_BYTES[self.dtype]

    @property
    def statistics(self) -> tuple[Stored, ...]:
        """What was measured of its inputs, one for each of them or none, or of its base."""
        return tuple(entry.statistic for entry in self.operands if entry.statistic is not None)

    @property
    def is_compared(self) -> bool:
        """Whether it tells how models relate: a matrix of several. Vectors do not: norms are near one everywhere."""
        return len(self.sources) > 1 and len(self.shape) > 1

    @property
    def givers(self) -> tuple[int, ...]:
        """The numbers of the models and adapters that it takes anything of."""
        named = [entry.named for entry in self.operands if entry.named is not None]
        read = (stored.model for source in self.sources for stored in source.stored_tensors)
        return tuple(dict.fromkeys([*named, *read]))

    @cached_property
    def reads(self) -> tuple[Stored, ...]:
        """The stored tensors that are read for it, each once, those of the base last; then what was measured."""
        read = (stored for source in self.sources for stored in source.stored_tensors)
        return tuple(dict.fromkeys([*read, *self.statistics]))

    @property
    def shared(self) -> tuple[Stored, ...]:
        """Those that several of its sources read."""
        ends = [end for source in self.sources for end in unpack(source) if isinstance(end, Stored)]
        if len(set(ends)) == len(ends):
            return ()
        return tuple(stored for stored, count in Counter(ends).items() if count > 1)

    @property
    def is_copy(self) -> bool:
        """Whether the output's bytes are those of a stored tensor."""
        return isinstance(self.passed, Stored)

    @property
    def passed(self) -> Input | None:
        """The source that the job hands on as it is, if that is all it does."""
        if self.method != PASSTHROUGH or self.inputs[0].settings.get("scale", 1.0) != 1.0:
            return None
        source = self.inputs[0].source
        return source if source.dtype == self.dtype else None

    @property
    def kind(self) -> str:
        """What is done, in a word: copy, low-rank, or the method's name."""
        return "copy" if self.is_copy else "low-rank" if self.inputs[0].source.kind == "factor" else self.method


@dataclass(frozen=True)
class JoinedJob(Job):
    """Jobs that are made as one, whose inputs lie one behind the other as their results do (jobs.blocks)."""

    members: tuple[Job, ...] = field(kw_only=True)

    @cached_property
    def parts(self) -> tuple[tuple[Job, slice], ...]:
        ends = list(accumulate(member.entries for member in self.members))
        return tuple((member, slice(end - member.entries, end)) for member, end in zip(self.members, ends, strict=True))


def unpack(source: Input) -> Iterator[Stored | StageTensor]:
    """The stored tensors and the stages that a source reads itself; not those that a stage of it reads."""
    if isinstance(source, (Stored, StageTensor)):
        yield source
        return
    for child in source.children:
        yield from unpack(child)
