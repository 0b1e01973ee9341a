"""The making of each output tensor from its inputs: which tensor of which model, by which method, with which numbers.

Not here: slices and layer ranges (slices), what is left over (unused_tensors), shards, memory and disk (plan).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from merger.lock.locked import LockedModel
from merger.methods.registry import Method
from merger.models.architecture import is_before_layers, is_buffer, is_head
from merger.models.checkpoint import FLOATS, TensorInfo
from merger.planning.inputs.base import Input, Job, Operand
from merger.planning.inputs.shares import Shares, shares
from merger.planning.jobs.common import NOT_ALL_PREDICT, JobSet, Making, ask_method, number_in_force
from merger.planning.jobs.fit import Fit, layers_of, tell_unshared
from merger.planning.jobs.rules import Rules, head_in
from merger.planning.jobs.statistics import other_statistics, statistics_of
from merger.planning.slices import Cut, CutModule, Findings, cut, parts
from merger.planning.stage_model import StagedRecipe
from merger.planning.tokens import tokens
from merger.recipe.model import Recipe, Taken


def make_jobs(locked: StagedRecipe, table: Mapping[str, Method]) -> JobSet:
    """Decide how each output tensor is made.

    Raises:
        RecipeError: the recipe asks for layers or modules that its models do not have, or leaves a number open.
        MismatchError: the models do not fit each other.
        ModelError: a model's tokenizer cannot be read.
    """
    findings = Findings()
    modules = cut(locked, table, findings)
    findings.mismatches += other_statistics(locked, table, None)
    findings.settle()
    making = Making(locked, table, findings, tokens(locked))
    maker = _Maker(making)
    jobs = tuple(job for module in modules for job in maker.module(module))
    tell_unshared(making, maker.unshared)
    maker.rules.tell_unused()
    findings.settle()
    layers = {stack: tuple(taken) for stack, taken in maker.layers.items()}
    return JobSet(jobs, layers, maker.head is not None, making.tokens, prediction=maker.prediction)


class _Maker:
    """Walks modules, slices and layers once; jobs come out, problems go to the findings."""

    def __init__(self, making: Making) -> None:
        self._making, self._locked = making, making.locked
        self.head = _output_head(making)
        self.rules, self._fit, self._merges = Rules(making), Fit(making), _Merges(making)
        self.layers: dict[str, list[tuple[LockedModel, int]]] = {}
        self.prediction: LockedModel | None = None
        self._cuts: dict[str, Sequence[Cut]] = {}
        self.unshared: dict[tuple[str, bool], list[str]] = {}

    def module(self, module: CutModule | str) -> Iterator[Job]:
        """A module's jobs: what acts before the layers, the layers, what acts after them."""
        if isinstance(module, CutModule) and module.stack is not None and not _is_whole(module.cuts, module.stack):
            self._cuts[module.stack] = module.cuts
        if isinstance(module, str):
            yield from self._copy_module(module)
        elif module.cuts:
            if module.loose:
                self._fit.tell_vocabularies(module.cuts[0], module.cuts[-1])
                yield from self._loose(module.cuts[0], before=True)
            if module.stack is not None:
                yield from self._stack(module.stack, module.cuts)
            if module.loose:
                yield from self._predicting(module.cuts[-1])
                yield from self._loose(module.cuts[-1], before=False)

    def _copy_module(self, name: str) -> Iterator[Job]:
        number = self._locked.index(self._locked.config_model.ref)
        named = any(module.name is not None for module in self._locked.recipe.modules)
        why = f"the recipe does not name the module {name}" if named else _only_has(self._locked.config_model)
        for tensor in self._locked.config_model.checkpoint.tensors.values():
            if self._locked.config_model.architecture.module(tensor.name) != name:
                continue
            if (found := self._shares(self._locked.config_model, tensor)) is not None:
                yield from self._join_shares(tensor.name, found)
            else:
                yield from self._keep(number, tensor, why)

    def _keep(self, number: int, tensor: TensorInfo, why: str) -> Iterator[Job]:
        """The job that takes a tensor from a model as it is, unless a rule names another's."""
        model = self._locked.numbered(number)
        out = model.architecture.moved_behind(tensor.name, self._counts)
        if model.architecture.predicts(tensor.name):
            self.prediction = model
        if (rule := self.rules.about(tensor.name)) is not None:
            yield from self.rules.take(rule, out, number, tensor)
        else:
            yield self._making.copy(out, number, tensor, why)

    @property
    def _counts(self) -> Mapping[str, int]:
        """How many layers the output's stacks have."""
        made = {stack: len(taken) for stack, taken in self.layers.items()}
        return {**self._locked.config_model.architecture.stacks, **made}

    def _predicting(self, piece: Cut) -> Iterator[Job]:
        """Layers of multi-token prediction: merged where all models have them, else kept from one that does.

        They are no layers of a stack: they lie behind the last one, and take a gradient's first value as all outside.
        """
        leader, config_model = piece.parts[piece.leader].model, self._locked.config_model
        giver = leader if leader.prediction else config_model
        self.prediction = giver if giver.prediction else None
        number = piece.parts[piece.leader].number if giver is leader else self._locked.index(config_model.ref)
        names = [_behind(giver, part.model) for part in piece.parts]
        merged = giver is leader and all(
            name in part.model.checkpoint.tensors
            for part, theirs in zip(piece.parts, names, strict=True)
            for name in theirs
        )
        for place, tensor in enumerate(giver.prediction):
            if merged:
                out = giver.architecture.moved_behind(tensor.name, self._counts)
                yield from self._job(piece, out, [theirs[place] for theirs in names], 0.0)
            else:
                yield from self._keep(number, tensor, NOT_ALL_PREDICT)

    def _stack(self, stack: str, cuts: Sequence[Cut]) -> Iterator[Job]:
        taken = self.layers.setdefault(stack, [])
        for piece in cuts:
            for step in range(piece.layers):
                leader, layer = piece.parts[piece.leader].model, piece.starts[piece.leader] + step
                out = len(taken)
                taken.append((leader, layer))
                position = 1.0 if piece.layers == 1 else step / (piece.layers - 1)
                for tensor in leader.layer(stack, layer):
                    place = leader.architecture.place(tensor.name)
                    names = [place.at_layer(start + step) for start in piece.starts]
                    yield from self._job(piece, place.at_layer(out), names, position)

    def _loose(self, piece: Cut, before: bool) -> Iterator[Job]:
        """The tensors outside all stacks; as in mergekit they take a gradient's first value, the head too."""
        leader = piece.parts[piece.leader].model
        head = None if self.head is None else self.head.name
        for tensor in leader.layer(None, None):
            if is_before_layers(tensor.name) != before or tensor is leader.head or tensor.name == head:
                continue
            if (found := self._shares(leader, tensor)) is not None:
                yield from self._join_shares(tensor.name, found)
            else:
                yield from self._job(piece, tensor.name, [tensor.name] * len(piece.parts), 0.0)
        if head is not None and not before:
            names = [head_in(part.model, head) for part in piece.parts]
            yield from self._job(piece, head, names, 0.0)

    def _shares(self, model: LockedModel, tensor: TensorInfo) -> Shares | None:
        """How a tensor outside of the stacks is divided among its layers, of which the recipe takes others."""
        outside = self._cuts and model.architecture.place(tensor.name).stack is None
        found = shares(model, tensor) if outside else None
        return found if found is not None and found.stack in self._cuts else None

    def _join_shares(self, name: str, found: Shares) -> Iterator[Job]:
        """The job that puts a tensor together from the shares of those layers that the recipe takes."""
        cuts = [piece for piece in self._cuts[found.stack] if piece.layers]
        alike = len({(piece.piece.method, tuple(part.is_base for part in piece.parts)) for piece in cuts}) == 1
        if found.size is None or self.rules.about(name) is not None or not alike:
            self.unshared.setdefault((found.stack, found.size is not None), []).append(name)
            return
        sources = [layers_of(self._making, cuts, place, name, found) for place in range(len(cuts[0].parts))]
        complete = [source for source in sources if source is not None]
        if len(complete) < len(sources):
            return
        held = [[part.model.checkpoint.tensors[name] for part in piece.parts] for piece in cuts]
        pairs = zip(cuts, held, strict=True)
        jobs = [self._merges.job(piece, name, tensors, complete, 0.0) for piece, tensors in pairs]
        if any(_numbers_of(job) != _numbers_of(jobs[0]) for job in jobs):
            self.unshared.setdefault((found.stack, found.size is not None), []).append(name)
        elif self._fit.holds(cuts[0], held[0], complete):
            yield jobs[0]

    def _job(self, piece: Cut, out: str, names: Sequence[str], position: float) -> Iterator[Job]:
        """The job that makes tensor `out` of the tensors `names`, one a part; or a problem, if they do not fit."""
        found = [part.model.checkpoint.tensors.get(name) for part, name in zip(piece.parts, names, strict=True)]
        leading, number = found[piece.leader], piece.parts[piece.leader].number
        if leading is not None and (rule := self.rules.about(out if is_head(out) else leading.name)) is not None:
            yield from self.rules.take(rule, out, number, leading)
            return
        if leading is not None and (why := _why_copied(piece, leading, found)):
            yield self._making.copy(out, number, leading, why)
            return
        tensors = [tensor for tensor in found if tensor is not None]
        if len(tensors) < len(found):
            self._fit.tell_missing(piece, names, found)
        else:
            pairs = zip(piece.parts, tensors, strict=True)
            sources = [self._making.source(part.number, tensor, out) for part, tensor in pairs]
            if self._fit.holds(piece, tensors, sources):
                yield self._merges.job(piece, out, tensors, sources, position)


class _Merges:
    """Jobs that merge; each set of numbers for them is worked out and looked at once."""

    def __init__(self, making: Making) -> None:
        self._making = making
        self._filters = _filters(making.locked.recipe)
        self._known: dict[tuple[object, ...], _Numbers] = {}

    def job(
        self, piece: Cut, out: str, tensors: Sequence[TensorInfo], sources: Sequence[Input], position: float
    ) -> Job:
        """The one that makes `out` of these."""
        method, names = self._making.table[piece.piece.method], [out, *(tensor.name for tensor in tensors)]
        spoken_of = [filter in name for filter in self._filters for name in names]
        known = self._known.get(key := (id(piece), position, *spoken_of))
        settings, each = known or self._numbers(piece, method, names, position)
        inputs: list[Operand] = []
        base: Operand | None = None
        parts = [
            (part, tensor, source.shape)
            for part, tensor, source in zip(piece.parts, tensors, sources, strict=True)
            if method.asks(base=part.is_base and method.subtracts_base)
        ]
        found, misfits = statistics_of(self._making.locked, method, parts)
        for part, what in misfits:
            self._making.findings.about_part(what, part, f"measure it: merger measure --kind {method.statistics}")
        measured = iter(found)
        for part, source, own in zip(piece.parts, sources, each, strict=True):
            subtracted = part.is_base and method.subtracts_base
            statistic = next(measured) if method.asks(subtracted) else None
            operand = Operand(source, own, self._making.repeats(part.number), statistic)
            if subtracted:
                base = operand
            else:
                inputs.append(operand)
        leading = tensors[piece.leader]
        dtype = self._making.dtype or self._making.config_models_dtype(piece.parts[piece.leader].model, leading)
        job = Job(out, dtype, sources[piece.leader].shape, method.name, tuple(inputs), base, settings)
        if known is None:
            self._known[key] = settings, each
            ask_method(self._making.findings, piece.piece, method, job, job.name)
        return job

    def _numbers(self, piece: Cut, method: Method, names: Sequence[str], position: float) -> _Numbers:
        """The parameters in force for the tensor that is named first, and for each of those of the parts after it."""
        levels = (piece.piece.parameters, piece.module.parameters, self._making.locked.recipe.parameters)
        own, shared = ([param for param in method.params if param.per_model == each] for each in (True, False))
        number = partial(number_in_force, self._making.findings, piece.piece)
        settings = {param.name: number(param, levels, names[0], position) for param in shared}
        each = [
            {
                param.name: number(param, (part.source.parameters, *levels), name, position)
                for param in ([] if part.is_base and method.subtracts_base else own)
            }
            for part, name in zip(piece.parts, names[1:], strict=True)
        ]
        return settings, each


def _why_copied(piece: Cut, leading: TensorInfo, found: Sequence[TensorInfo | None]) -> str | None:
    """Why a tensor is copied from the part that names it, whatever the method; None where it is merged."""
    if is_buffer(leading.name):
        return "a constant, not a trained tensor"
    if leading.dtype not in FLOATS and not leading.dtype.startswith("F8"):
        return f"{leading.dtype} numbers are not merged"
    alone = len(found) > 1 and [tensor is None for tensor in found].count(False) == 1
    leader = piece.parts[piece.leader].model
    if alone and leader.architecture.place(leading.name).stack is None and leading is not leader.embedding:
        return _only_has(leader)
    return None


def _only_has(model: LockedModel) -> str:
    return f"only {model.name} has it"


def _is_whole(cuts: Sequence[Cut], stack: str) -> bool:
    """Whether all layers of the stack are taken, in the models' own order."""
    parts = [
        (part, start, piece.layers) for piece in cuts for part, start in zip(piece.parts, piece.starts, strict=True)
    ]
    return len(cuts) <= 1 and all(
        (start, layers) == (0, part.model.architecture.stacks[stack]) for part, start, layers in parts
    )


_Numbers = tuple[dict[str, float], list[dict[str, float]]]
"""The parameters that are in force for a tensor, and for each of its parts; of a base that is subtracted none."""


def _filters(recipe: Recipe) -> tuple[str, ...]:
    """What the recipe's rules for numbers ask tensors' names for."""
    levels = [recipe.parameters, *(module.parameters for module in recipe.modules)]
    for piece in recipe.slices:
        levels += [piece.parameters, *(source.parameters for source in piece.sources)]
    settings = (setting for level in levels for setting in level.values())
    return tuple({rule.filter: None for setting in settings for rule in setting.rules if rule.filter})


def _numbers_of(job: Job) -> tuple[object, ...]:
    """The parameters that are in force for a tensor."""
    return job.settings, [entry.settings for entry in job.inputs]


def _behind(giver: LockedModel, model: LockedModel) -> list[str]:
    """What a model calls the tensors of the layers of prediction that another one has."""
    architecture, stacks = giver.architecture, model.architecture.stacks
    return [architecture.moved_behind(tensor.name, stacks) for tensor in giver.prediction]


def _output_head(making: Making) -> TensorInfo | None:
    """The first model's head that is more than its embedding."""
    locked, table = making.locked, making.table
    taken = [part.model for piece in locked.recipe.slices for part in parts(locked, piece, table[piece.method])]
    taken += [model for rule in locked.recipe.tensors if _gives_head(rule, model := locked.model(rule.model))]
    return next((model.head for model in taken if model.head is not None and not model.is_tied), None)


def _gives_head(rule: Taken, model: LockedModel) -> bool:
    """Whether the head is among the tensors that a rule takes from its model."""
    return model.head is not None and rule.matches(model.head.name)
