"""The making of each output tensor from its inputs: which tensor of which model, by which method, with which numbers.

Every tensor of every model is accounted for: it is an input of a job, or left out with a reason.
Not here: shards, memory, disk (plan), and any arithmetic (methods).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from merger.checkpoints.architecture import (
    DEFAULT,
    is_before_layers,
    is_buffer,
    is_embedding,
    is_head,
    is_tied,
    untied,
    with_dtype,
    with_layers,
)
from merger.checkpoints.checkpoint import FLOATS, ITEM_BYTES, TensorInfo
from merger.errors import MismatchError, Problem, RecipeError, did_you_mean
from merger.methods.registry import Method, Param
from merger.plan.lock import LockedModel, LockedRecipe
from merger.recipe.model import Module, Slice, Source
from merger.recipe.settings import Parameters, first_value

PASSTHROUGH = "passthrough"
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_DTYPE_NAMES = {"F64": "float64", **{short: name for name, short in _DTYPES.items()}}
_MISMATCHES_SHOWN = 3


@dataclass(frozen=True)
class Input:
    """A tensor of a model that goes into a job.

    Args:
        model: the model's number in the locked recipe.
        tensor: the tensor and its place.
        settings: the per-model numbers by the parameter's name.
    """

    model: int
    tensor: TensorInfo
    settings: Mapping[str, float] = field(default_factory=dict)


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
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    method: str
    inputs: tuple[Input, ...]
    base: Input | None = None
    settings: Mapping[str, float] = field(default_factory=dict)
    why: str | None = None

    @property
    def entries(self) -> int:
        """How many numbers the output tensor holds."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes the output tensor takes."""
        return self.entries * ITEM_BYTES[self.dtype]

    @property
    def reads(self) -> tuple[Input, ...]:
        """All that is read for it, the base last."""
        return self.inputs if self.base is None else (*self.inputs, self.base)

    @property
    def is_copy(self) -> bool:
        """Whether the output's bytes are the input's bytes."""
        scale = self.inputs[0].settings.get("scale", 1.0)
        return self.method == PASSTHROUGH and scale == 1.0 and self.inputs[0].tensor.dtype == self.dtype


@dataclass(frozen=True)
class LeftOut:
    """A tensor of a model that no output tensor is made of, and why."""

    model: int
    tensor: str
    why: str


@dataclass(frozen=True)
class Making:
    """All jobs in the order of the output, what is left out, and the output's config.json."""

    jobs: tuple[Job, ...]
    left_out: tuple[LeftOut, ...]
    config: Mapping[str, Any]


def make(locked: LockedRecipe, table: Mapping[str, Method]) -> Making:
    """Decide how each output tensor is made.

    Raises:
        RecipeError: the recipe asks for layers or modules that its models do not have, or leaves a number open.
        MismatchError: the models do not fit each other.
    """
    maker = _Maker(locked, table)
    jobs = tuple(maker.jobs())
    if maker.recipe_problems:
        raise RecipeError([*maker.recipe_problems, *maker.mismatches])
    if maker.mismatches:
        raise MismatchError(maker.mismatches)
    return Making(jobs, tuple(_left_out(locked, jobs, maker)), maker.config())


@dataclass(frozen=True)
class _Part:
    """A source of a slice with its model: what a job's input is looked up in."""

    source: Source
    number: int
    model: LockedModel
    is_base: bool


@dataclass(frozen=True)
class _Cut:
    """A slice as it meets the models: its parts, the part whose tensors name the output's, where its layers start."""

    piece: Slice
    module: Module
    parts: tuple[_Part, ...]
    starts: tuple[int, ...]
    layers: int

    @property
    def named(self) -> _Part:
        """The part whose tensors name the output's: the base model, else the first."""
        return next((part for part in self.parts if part.is_base), self.parts[0])


class _Maker:
    """Walks modules, slices and layers once and gathers jobs and problems on the way."""

    def __init__(self, locked: LockedRecipe, table: Mapping[str, Method]) -> None:
        self.locked = locked
        self.table = table
        self.recipe_problems: list[Problem] = []
        self.mismatches: list[Problem] = []
        self.has_head = any(_is_untied(model) for model in self._used())
        self._layers: list[tuple[LockedModel, int]] = []
        self._shape_pairs: dict[tuple[int, int], int] = {}

    # -- modules and slices

    def jobs(self) -> Iterator[Job]:
        """The jobs in the order of the output: before the layers, the layers, after them; module by module."""
        donor = self.locked.donor
        named = {module.name: module for module in self.locked.recipe.modules}
        if None in named:
            yield from self._everything(named[None])
            return
        for name in donor.architecture.modules:
            if name in named:
                yield from self._module(named[name], name)  # type: ignore[index]
            else:
                yield from self._copied(name)
        for module in named.values():
            if module.name not in donor.architecture.modules:
                hint = did_you_mean(str(module.name), donor.architecture.modules)
                self._recipe_problem(f"{donor.name} has no module {module.name!r}", module.at, "modules", hint)

    def _everything(self, module: Module) -> Iterator[Job]:
        stacks = self.locked.donor.architecture.stacks
        ranged = next((s for piece in module.slices for s in piece.sources if s.layer_range is not None), None)
        if ranged is not None and len(stacks) != 1:
            what = f"{self.locked.donor.name} has {len(stacks)} stacks of layers ({', '.join(stacks) or 'none'})"
            self._recipe_problem(f"{what}, so layer_range is not clear", ranged.range_at, "slices",
                                 "use the models form, or modules: with one entry for each stack")  # fmt: skip
            return
        for name in self.locked.donor.architecture.modules:
            yield from self._module(module, name)

    def _module(self, module: Module, name: str) -> Iterator[Job]:
        stacks = self.locked.donor.architecture.stacks
        stack = name if name != DEFAULT else next(iter(stacks)) if len(stacks) == 1 else None
        cuts = [cut for piece in module.slices if (cut := self._cut(piece, module, stack)) is not None]
        if len(cuts) < len(module.slices):
            return
        loose = name == DEFAULT
        yield from self._loose(cuts[0], before=True) if loose else ()
        if stack is not None:
            yield from self._stack(stack, cuts)
        yield from self._loose(cuts[-1], before=False) if loose else ()

    def _copied(self, name: str) -> Iterator[Job]:
        donor = self.locked.donor
        number = self.locked.models.index(donor)
        for tensor in donor.checkpoint.tensors.values():
            if donor.architecture.module(tensor.name) == name:
                yield _copy(tensor.name, Input(number, tensor), f"the recipe names no module {name!r}")

    def _cut(self, piece: Slice, module: Module, stack: str | None) -> _Cut | None:
        """The slice with its models; None, and a problem, where its layer ranges do not fit them."""
        parts = tuple(self._parts(piece))
        ranges = [self._range(part, stack) for part in parts]
        if any(found is None for found in ranges):
            return None
        lengths = [stop - start for start, stop in ranges if stop >= start]  # type: ignore[misc]
        if len(set(lengths)) > 1:
            counts = ", ".join(f"{part.model.name} {n}" for part, n in zip(parts, lengths, strict=True))
            self.mismatches.append(Problem(f"the models have different numbers of layers in {stack}: {counts}", piece.at,
                                           "models", "give each a layer_range of the same length with slices:"))  # fmt: skip
            return None
        return _Cut(piece, module, parts, tuple(start for start, _ in ranges), lengths[0])  # type: ignore[misc]

    def _parts(self, piece: Slice) -> Iterator[_Part]:
        """The slice's sources that its method takes: the base first where the method wants it so."""
        method = self.table[piece.method]
        parts = [
            _Part(source, self.locked.index(source.model), self.locked.model(source.model), source.model == piece.base_model)
            for source in piece.sources
            if not (source.added and not method.needs_base)
        ]
        yield from sorted(parts, key=lambda part: not part.is_base) if method.base == "first" else parts

    def _range(self, part: _Part, stack: str | None) -> tuple[int, int] | None:
        count = part.model.architecture.stacks.get(stack or "", 0)
        if stack is not None and count == 0:
            theirs = ", ".join(part.model.architecture.stacks) or "none"
            self.mismatches.append(Problem(f"{part.model.name} has no layers {stack}.N (its stacks: {theirs})",
                                           part.source.at, None, "models of different architectures cannot be merged"))  # fmt: skip
            return None
        start, stop = part.source.layer_range or (0, count)
        if stop > count:
            what = f"layer_range [{start}, {stop}] ends beyond {part.model.name}, which has {count} layers"
            self._recipe_problem(what, part.source.range_at, f"sources[{part.source.model}].layer_range",
                                 f"the last layer is {count - 1}, so write [{min(start, count)}, {count}] or less")  # fmt: skip
            return None
        return start, stop

    # -- tensors

    def _stack(self, stack: str, cuts: Iterable[_Cut]) -> Iterator[Job]:
        out = 0
        for cut in cuts:
            for step in range(cut.layers):
                position = 1.0 if cut.layers == 1 else step / (cut.layers - 1)
                yield from self._layer(stack, cut, step, out, position)
                out += 1

    def _layer(self, stack: str, cut: _Cut, step: int, out: int, position: float) -> Iterator[Job]:
        named = cut.named
        own = cut.starts[cut.parts.index(named)] + step
        self._layers.append((named.model, own))
        for tensor in _tensors_of(named.model, stack, own):
            place = named.model.architecture.place(tensor.name)
            names = [place.at_layer(start + step) for start in cut.starts]
            yield from self._job(cut, place.at_layer(out), names, position)

    def _loose(self, cut: _Cut, before: bool) -> Iterator[Job]:
        """The tensors outside the stacks; like mergekit, they stand at a gradient's first value."""
        for tensor in _tensors_of(cut.named.model, None, None):
            if is_before_layers(tensor.name) == before and not is_head(tensor.name):
                yield from self._job(cut, tensor.name, [tensor.name] * len(cut.parts), 0.0)
        if not before and self.has_head:
            yield from self._head(cut)

    def _head(self, cut: _Cut) -> Iterator[Job]:
        """Where any model has a head of its own, the others' embedding is theirs."""
        names = [_head_or_embedding(part.model) for part in cut.parts]
        own = next((name for name in names if name is not None and is_head(name)), None)
        out = own or next(name for model in self._used() for name in model.checkpoint.tensors if is_head(name))
        yield from self._job(cut, out, [name or out for name in names], 0.0)

    def _used(self) -> list[LockedModel]:
        return [self.locked.models[n] for n in dict.fromkeys(p.number for s in self.locked.recipe.slices for p in self._parts(s))]

    def _job(self, cut: _Cut, out: str, names: list[str], position: float) -> Iterator[Job]:
        """The job that makes tensor `out` of the tensors `names`, one a part; none, and a problem, if they do not fit."""
        found = [part.model.checkpoint.tensors.get(name) for part, name in zip(cut.parts, names, strict=True)]
        named = found[cut.parts.index(cut.named)]
        if named is not None and (why := _why_copied(cut, named, found)):
            yield _copy(out, Input(cut.named.number, named), why)
            return
        tensors = [tensor for tensor in found if tensor is not None]
        if len(tensors) < len(found):
            self._missing(cut, names, found)
        elif self._fit(cut, tensors):
            yield self._merge(cut, out, tensors, position)

    def _merge(self, cut: _Cut, out: str, tensors: list[TensorInfo], position: float) -> Job:
        method = self.table[cut.piece.method]
        levels = (cut.piece.parameters, cut.module.parameters, self.locked.recipe.parameters)
        inputs: list[Input] = []
        base: Input | None = None
        for part, tensor in zip(cut.parts, tensors, strict=True):
            if part.is_base and method.base == "subtracted":
                base = Input(part.number, tensor)
                continue
            own = self._numbers(cut, method, (part.source.parameters, *levels), tensor.name, position, per_model=True)
            inputs.append(Input(part.number, tensor, own))
        settings = self._numbers(cut, method, levels, out, position, per_model=False)
        named = tensors[cut.parts.index(cut.named)]
        dtype = _DTYPES[self.locked.recipe.dtype] if self.locked.recipe.dtype else named.dtype
        job = Job(out, dtype, named.shape, method.name, tuple(inputs), base, settings)
        self._check(cut, method, job)
        return job

    def _numbers(
        self, cut: _Cut, method: Method, levels: tuple[Parameters, ...], tensor: str, position: float, per_model: bool
    ) -> dict[str, float]:
        wanted = [param for param in method.params if param.per_model == per_model]
        return {param.name: self._number(cut, param, levels, tensor, position) for param in wanted}

    def _number(self, cut: _Cut, param: Param, levels: tuple[Parameters, ...], tensor: str, position: float) -> float:
        value = first_value(levels, param.name, tensor, position)
        if value is None and param.required:
            what = f"{cut.piece.method} needs {param.name}, and no filter gives one for {tensor}"
            self._recipe_problem(what, cut.piece.at, "parameters", "end the list with a value that has no filter")
        return float(value if value is not None else param.default or 0.0)

    def _check(self, cut: _Cut, method: Method, job: Job) -> None:
        """What the method itself has to say about its numbers; once for each slice."""
        if method.check is None:
            return
        try:
            method.check(**arguments(method, job))
        except ValueError as error:
            self._recipe_problem(str(error), cut.piece.at, f"{job.name}", None)

    # -- problems

    def _recipe_problem(self, what: str, at: Any, where: str, hint: str | None) -> None:
        known = any(problem.at == at and problem.where == where for problem in self.recipe_problems)
        if not known:
            self.recipe_problems.append(Problem(what, at, where, hint))

    def _missing(self, cut: _Cut, names: list[str], found: list[TensorInfo | None]) -> None:
        part, name = next((p, n) for p, n, t in zip(cut.parts, names, found, strict=True) if t is None)
        what = f"{part.model.name} has no tensor {name}, which {cut.named.model.name} has"
        hint = "the models are of different architectures, or one was saved without a part"
        if self._first_of(part.number, cut.named.number):
            self.mismatches.append(Problem(what, part.source.at, f"models[{part.source.model}]", hint))

    def _fit(self, cut: _Cut, tensors: list[TensorInfo]) -> bool:
        named = tensors[cut.parts.index(cut.named)]
        for part, tensor in zip(cut.parts, tensors, strict=True):
            if tensor.shape != named.shape:
                self._misfit(cut, part, tensor, named)
                return False
            if tensor.dtype not in FLOATS:
                what = f"{part.model.name}: {tensor.name} is stored as {tensor.dtype}"
                hint = "merging such numbers is not built yet: use the model's bfloat16 or float16 version"
                self.mismatches.append(Problem(what, part.source.at, f"models[{part.source.model}]", hint))
                return False
        return True

    def _misfit(self, cut: _Cut, part: _Part, tensor: TensorInfo, named: TensorInfo) -> None:
        mine, theirs = _size(named), _size(tensor)
        what = f"{tensor.name} is {mine} in {cut.named.model.name} but {theirs} in {part.model.name}"
        hint = "only models of one shape can be merged"
        if is_embedding(tensor.name) or is_head(tensor.name):
            hint = "their vocabularies differ, and tokenizer: is not built yet: give both models the same one first"
        if self._first_of(part.number, cut.named.number):
            self.mismatches.append(Problem(what, part.source.at, f"models[{part.source.model}]", hint))

    def _first_of(self, one: int, other: int) -> bool:
        """Whether this is among the first few mismatches between two models: one fault often shows in every tensor."""
        self._shape_pairs[one, other] = self._shape_pairs.get((one, other), 0) + 1
        return self._shape_pairs[one, other] <= _MISMATCHES_SHOWN

    # -- config.json

    def config(self) -> Mapping[str, Any]:
        """The donor's config with the dtype, the layers and the head that the result has."""
        donor = self.locked.donor
        config: Mapping[str, Any] = donor.checkpoint.config
        stacks = donor.architecture.stacks
        if len(stacks) == 1:
            count = next(iter(stacks.values()))
            if self._layers != [(donor, layer) for layer in range(count)]:
                config = with_layers(config, count, [(m.checkpoint.config, layer) for m, layer in self._layers])
        if self.has_head and is_tied(config):
            config = untied(config)
        dtype = self.locked.recipe.dtype
        return with_dtype(config, dtype) if dtype else config


def arguments(method: Method, job: Job) -> dict[str, Any]:
    """What the method is called with besides tensors: its parameters under their Python names."""
    values: dict[str, Any] = {}
    for param in method.params:
        if param.per_model:
            values[param.argument] = [_typed(param, entry.settings[param.name]) for entry in job.inputs]
        else:
            values[param.argument] = _typed(param, job.settings[param.name])
    return values


def _typed(param: Param, value: float) -> float | int | bool:
    return {"float": float, "int": int, "bool": bool}[param.kind](value)


def _copy(out: str, source: Input, why: str) -> Job:
    tensor = source.tensor
    return Job(out, tensor.dtype, tensor.shape, PASSTHROUGH, (source,), why=why)


def _why_copied(cut: _Cut, named: TensorInfo, found: list[TensorInfo | None]) -> str | None:
    """Why a tensor is copied from the part that names it, whatever the method; None if it is not."""
    if is_buffer(named.name):
        return "a constant, not a trained tensor"
    if named.dtype not in FLOATS and not named.dtype.startswith("F8"):
        return f"{named.dtype} numbers are not merged"
    alone = len(found) > 1 and sum(tensor is not None for tensor in found) == 1
    in_layers = cut.named.model.architecture.place(named.name).stack is not None
    if alone and not in_layers and not is_embedding(named.name):
        return f"only {cut.named.model.name} has it"
    return None


def _is_untied(model: LockedModel) -> bool:
    return not is_tied(model.checkpoint.config) and any(is_head(name) for name in model.checkpoint.tensors)


def _head_or_embedding(model: LockedModel) -> str | None:
    wanted = is_head if _is_untied(model) else is_embedding
    return next((name for name in model.checkpoint.tensors if wanted(name)), None)


def _tensors_of(model: LockedModel, stack: str | None, layer: int | None) -> list[TensorInfo]:
    """A layer's tensors, or those outside all stacks, in the order of their places on the disk."""
    return model.by_layer.get((stack, layer), [])


def _size(tensor: TensorInfo) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


# ---- what is left out -----------------------------------------------------------------------------------------------


def _left_out(locked: LockedRecipe, jobs: tuple[Job, ...], maker: _Maker) -> Iterator[LeftOut]:
    """Every tensor that is no job's input, with the reason."""
    used = {(entry.model, entry.tensor.name) for job in jobs for entry in job.reads}
    sources = {number for number, _ in used}
    for number, model in enumerate(locked.models):
        layers = {(number, model.architecture.place(name).layer) for n, name in used if n == number}
        for name in model.checkpoint.tensors:
            if (number, name) not in used:
                yield LeftOut(number, name, _why_left_out(locked, number, name, sources, layers))


def _why_left_out(
    locked: LockedRecipe, number: int, name: str, sources: set[int], layers: set[tuple[int, int | None]]
) -> str:
    model = locked.models[number]
    place = model.architecture.place(name)
    if number not in sources:
        return "this model gives no tensors: the method takes no base model"
    if place.stack is not None and (number, place.layer) not in layers:
        return "its layer is in no layer_range"
    if is_buffer(name):
        return "a constant, not a trained tensor"
    if is_head(name) and is_tied(model.checkpoint.config):
        return "the head is the embedding, by the model's config"
    if name in locked.donor.checkpoint.tensors:
        return "the recipe takes this tensor from another slice's models"
    return f"{locked.donor.name}, whose tensors name the output's, has no such tensor"
