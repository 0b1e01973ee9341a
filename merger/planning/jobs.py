"""The making of each output tensor from its inputs: which tensor of which model, by which method, with which numbers.

Not here: slices and layer ranges (slices), what is left over (unused_tensors), shards, memory and disk (plan).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from merger.errors import Problem, did_you_mean
from merger.lock.locked import LockedModel
from merger.methods.registry import Method, Param, declared
from merger.models.architecture import is_before_layers, is_buffer, is_embedding, is_head
from merger.models.checkpoint import FLOATS, TensorInfo
from merger.planning.inputs.base import PASSTHROUGH, Input, Job, Operand
from merger.planning.inputs.derived import Stacked
from merger.planning.inputs.shares import Shares, shares
from merger.planning.slices import Cut, CutModule, Findings, cut, parts
from merger.planning.stage_model import StagedRecipe
from merger.planning.tokens import Tokens, disagreements, tokens
from merger.recipe.model import Parameters, Recipe, Taken, first_value

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""How safetensors writes the dtypes that a recipe may ask for."""

_MISMATCHES_SHOWN = 3
PREDICTION = "multi-token prediction"
NOT_ALL_PREDICT = f"{PREDICTION}, which not every model has"
_ONE_KIND = "only models of one architecture and of equal sizes can be merged"
_ONE_VOCABULARY = (
    "add tokenizer: {source: union} for the tokens of all models, or tokenizer: {source: base} for those of one"
)
_AND_ITS_ROWS = f"{_ONE_VOCABULARY}; tokenizer: {{source: base, rows: base}} has as many rows as the base"


@dataclass(frozen=True)
class JobSet:
    """The jobs in the order of the output.

    Args:
        jobs: how each output tensor is made.
        layers: for each stack that the recipe speaks about and each of its layers in the output, the model that names
            the layer's tensors, and its number there.
        has_head: whether the output's head is a tensor of its own, not the embedding.
        tokens: what the recipe's tokenizer block brings about, if it has one.
        config: the output's config, where it is not the config model's.
        reasons: why tensors of the models are left out, by their names, where that was decided on the way.
        tokenizer_model: whose tokenizer lies beside an adapter, by its number, where that has rows for other tokens.
        prediction: the model whose layers of multi-token prediction the output has, or that names them; None: no model.
    """

    jobs: tuple[Job, ...]
    layers: Mapping[str, tuple[tuple[LockedModel, int], ...]]
    has_head: bool
    tokens: Tokens | None = None
    config: Mapping[str, Any] | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)
    tokenizer_model: int | None = None
    prediction: LockedModel | None = None


def make_jobs(locked: StagedRecipe, table: Mapping[str, Method]) -> JobSet:
    """Decide how each output tensor is made.

    Raises:
        RecipeError: the recipe asks for layers or modules that its models do not have, or leaves a number open.
        MismatchError: the models do not fit each other.
        ModelError: a model's tokenizer cannot be read.
    """
    findings = Findings()
    modules = cut(locked, table, findings)
    findings.settle()
    maker = _Maker(locked, table, findings)
    jobs = tuple(job for module in modules for job in maker.module(module))
    maker.tell_unshared()
    maker.tell_unused()
    findings.settle()
    layers = {stack: tuple(taken) for stack, taken in maker.layers.items()}
    return JobSet(jobs, layers, maker.has_head, maker.tokens, prediction=maker.prediction)


def arguments(method: Method, job: Job) -> dict[str, Any]:
    """What the method is called with besides tensors: its parameters under their Python names."""
    values: dict[str, Any] = {}
    for param in method.params:
        if param.per_model:
            values[param.argument] = [_convert(param, entry.settings[param.name]) for entry in job.inputs]
        else:
            values[param.argument] = _convert(param, job.settings[param.name])
    return values


def _convert(param: Param, value: float) -> float | int | bool:
    kinds: dict[str, type[float | int | bool]] = {"float": float, "int": int, "bool": bool}
    return kinds[param.kind](value)


class _Maker:
    """Walks modules, slices and layers once; jobs come out, problems go to the findings."""

    def __init__(self, locked: StagedRecipe, table: Mapping[str, Method], findings: Findings) -> None:
        self._locked, self._table, self._findings = locked, table, findings
        taken = [part.model for piece in locked.recipe.slices for part in parts(locked, piece, table[piece.method])]
        taken += [model for rule in locked.recipe.tensors if _gives_head(rule, model := locked.model(rule.model))]
        self._head = next((model.head for model in taken if _is_untied(model)), None)
        self._dtype = DTYPES[locked.recipe.dtype] if locked.recipe.dtype else None
        self.tokens = tokens(locked)
        self._shown: Counter[tuple[int, int]] = Counter()
        self._strangers: set[int] = set()
        self._unused = dict.fromkeys(locked.recipe.tensors)
        self.layers: dict[str, list[tuple[LockedModel, int]]] = {}
        self.prediction: LockedModel | None = None
        self._cuts: dict[str, Sequence[Cut]] = {}
        self._filters = _filters(locked.recipe)
        self._known: dict[tuple[object, ...], _Numbers] = {}
        self._unshared: dict[tuple[str, bool], list[str]] = {}

    @property
    def has_head(self) -> bool:
        """Whether any model's head is more than its embedding: then the output's is."""
        return self._head is not None

    def module(self, module: CutModule | str) -> Iterator[Job]:
        """A module's jobs: what acts before the layers, the layers, what acts after them."""
        if isinstance(module, CutModule) and module.stack is not None and not _is_whole(module.cuts, module.stack):
            self._cuts[module.stack] = module.cuts
        if isinstance(module, str):
            yield from self._copy_module(module)
        elif module.cuts:
            if module.loose:
                self._tell_vocabularies(module.cuts[0], module.cuts[-1])
                yield from self._loose(module.cuts[0], before=True)
            if module.stack is not None:
                yield from self._stack(module.stack, module.cuts)
            if module.loose:
                yield from self._predicting(module.cuts[-1])
                yield from self._loose(module.cuts[-1], before=False)

    def _copy_module(self, name: str) -> Iterator[Job]:
        number, why = self._locked.index(self._locked.config_model.ref), f"the recipe does not name the module {name}"
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
        if (rule := self._rule(tensor.name)) is not None:
            yield from self._take(rule, out, number, tensor)
        else:
            yield self._copy(out, number, tensor, why)

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

    def _copy(self, out: str, number: int, tensor: TensorInfo, why: str) -> Job:
        """A job that takes a tensor as it is; a trained one in the recipe's dtype, if it names one."""
        cast = self._dtype is not None and tensor.dtype in FLOATS and not is_buffer(tensor.name)
        dtype = self._dtype if cast and self._dtype else tensor.dtype
        source = self._source(number, tensor, out)
        return Job(out, dtype, source.shape, PASSTHROUGH, (Operand(source, {"scale": 1.0}),), why=why)

    def _source(self, number: int, tensor: TensorInfo, out: str) -> Input:
        """Where the entries of a model's tensor come from that goes into the tensor `out`."""
        if self.tokens is None:
            return self._locked.source(number, tensor)
        return self.tokens.rows_of(self._locked, number, tensor, is_head(out))

    def _repeats(self, number: int) -> int | None:
        return number if self._locked.owner(number) != number else None

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
        head = None if self._head is None else self._head.name
        for tensor in leader.layer(None, None):
            if is_before_layers(tensor.name) != before or tensor is leader.head or tensor.name == head:
                continue
            if (found := self._shares(leader, tensor)) is not None:
                yield from self._join_shares(tensor.name, found)
            else:
                yield from self._job(piece, tensor.name, [tensor.name] * len(piece.parts), 0.0)
        if head is not None and not before:
            names = [_head(part.model, head) for part in piece.parts]
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
        if found.size is None or self._rule(name) is not None or not alike:
            self._unshared.setdefault((found.stack, found.size is not None), []).append(name)
            return
        sources = [self._layers_of(cuts, place, name, found) for place in range(len(cuts[0].parts))]
        complete = [source for source in sources if source is not None]
        if len(complete) < len(sources):
            return
        held = [[part.model.checkpoint.tensors[name] for part in piece.parts] for piece in cuts]
        pairs = zip(cuts, held, strict=True)
        jobs = [self._merge(piece, name, tensors, complete, 0.0) for piece, tensors in pairs]
        if any(_numbers_of(job) != _numbers_of(jobs[0]) for job in jobs):
            self._unshared.setdefault((found.stack, found.size is not None), []).append(name)
        elif self._fit(cuts[0], held[0], complete):
            yield jobs[0]

    def _layers_of(self, cuts: Sequence[Cut], place: int, name: str, found: Shares) -> Stacked | None:
        """The shares of the layers that the sources of this place give; None, and a problem, where they do not fit."""
        taken = [(piece.parts[place], piece.starts[place] + step) for piece in cuts for step in range(piece.layers)]
        givers = list({part.number: part for part, _ in taken}.values())
        held = [part.model.checkpoint.tensors.get(name) for part in givers]
        rest = {_beside(tensor, found.axis) for tensor in held if tensor is not None}
        for part, tensor in zip(givers, held, strict=True):
            if tensor is None or shares(part.model, tensor) != found or len(rest) > 1:
                shapes = " and ".join(shape_text(tensor) for tensor in held if tensor is not None)
                self._findings.about_part(f"{name} does not fit in all models: {shapes}", part, _ONE_KIND)
                return None
            by_token = self.tokens is None and part.model.by_token(tensor)
            if by_token and (told := disagreements([self._locked.config_model, part.model])):
                what = f"the vocabularies differ: {told[part.model.ref]}"
                self._findings.about_part(what, part, _ONE_VOCABULARY)
                return None
        numbers = [part.number for part in givers]
        sources = tuple(self._source(*each, name) for each in zip(numbers, held, strict=True))  # type: ignore[arg-type]
        order = tuple((numbers.index(part.number), layer) for part, layer in taken)
        return Stacked(sources, order, found.axis, found.size or 0)

    def _job(self, piece: Cut, out: str, names: Sequence[str], position: float) -> Iterator[Job]:
        """The job that makes tensor `out` of the tensors `names`, one a part; or a problem, if they do not fit."""
        found = [part.model.checkpoint.tensors.get(name) for part, name in zip(piece.parts, names, strict=True)]
        leading, number = found[piece.leader], piece.parts[piece.leader].number
        if leading is not None and (rule := self._rule(out if is_head(out) else leading.name)) is not None:
            yield from self._take(rule, out, number, leading)
            return
        if leading is not None and (why := _why_copied(piece, leading, found)):
            yield self._copy(out, number, leading, why)
            return
        tensors = [tensor for tensor in found if tensor is not None]
        if len(tensors) < len(found):
            self._tell_missing(piece, names, found)
        else:
            pairs = zip(piece.parts, tensors, strict=True)
            sources = [self._source(part.number, tensor, out) for part, tensor in pairs]
            if self._fit(piece, tensors, sources):
                yield self._merge(piece, out, tensors, sources, position)

    def _rule(self, name: str) -> Taken | None:
        """The rule of the recipe's `tensors:` that speaks about a tensor."""
        rule = next((rule for rule in self._locked.recipe.tensors if rule.matches(name)), None)
        if rule is not None:
            self._unused.pop(rule, None)
        return rule

    def _take(self, rule: Taken, out: str, number: int, leading: TensorInfo) -> Iterator[Job]:
        """The job that takes a tensor from a rule's model in place of `leading` of the model of that number."""
        giver, model, leader = (
            self._locked.index(rule.model),
            self._locked.model(rule.model),
            self._locked.numbered(number),
        )
        name = _head(model, out) if is_head(out) else leading.name
        if leader.architecture.predicts(leading.name):
            name = leader.architecture.moved_behind(leading.name, model.architecture.stacks)
        tensor = model.checkpoint.tensors.get(name)
        if tensor is None and leader.architecture.predicts(leading.name):
            yield self._copy(out, number, leading, NOT_ALL_PREDICT)
        elif tensor is None:
            self._refuse(rule, f"{model.name} has no tensor {name}", "are they of one architecture, and saved in full?")
        else:
            yield from self._of_another(rule, out, (giver, tensor), (number, leading))

    def _of_another(
        self, rule: Taken, out: str, given: tuple[int, TensorInfo], led: tuple[int, TensorInfo]
    ) -> Iterator[Job]:
        """The same once the tensor is known; both with the numbers of their models."""
        (giver, tensor), (number, leading) = given, led
        model, leader = self._locked.numbered(giver), self._locked.numbered(number)
        source, own = self._source(giver, tensor, out), self._source(number, leading, out)
        if self.tokens is None and model.by_token(tensor) and (told := disagreements([leader, model])):
            self._refuse(rule, f"the vocabularies differ: {told[model.ref]}", _ONE_VOCABULARY)
        elif source.shape != own.shape:
            what = f"{tensor.name} is {shape_text(leading)} in {leader.name}, but {shape_text(tensor)} in {model.name}"
            self._refuse(rule, what, "only a tensor of the same shape can take its place")
        else:
            followed = self._donors_dtype(leader, leading) if tensor.dtype in FLOATS else tensor.dtype
            dtype = self._dtype if self._dtype and tensor.dtype in FLOATS else followed
            why = f"the recipe takes {rule.filter} from {model.name}"
            yield Job(out, dtype, source.shape, PASSTHROUGH, (Operand(source, {"scale": 1.0}),), why=why)

    def _refuse(self, rule: Taken, what: str, hint: str) -> None:
        if not any(problem.at == rule.at for problem in self._findings.mismatches):
            problem = Problem(what, rule.at, f"tensors[{rule.filter}]", hint)
            self._findings.mismatches.append(problem)

    def tell_unshared(self) -> None:
        """A tensor that holds something of all layers must be that of the layers which are taken."""
        for (stack, known), names in self._unshared.items():
            if known:
                what = f"one tensor holds something for every layer of {stack}, and the recipe makes its parts unlike"
                hint = "give all slices one method, as many models and the same parameters"
            else:
                what = f"how the size depends on the layers of {stack} is not known here"
                hint = "take all layers of the models, in their order"
            at = self._locked.recipe.slices[0].at
            self._findings.about_recipe(f"{', '.join(names)}: {what}", at, "slices", hint)

    def tell_unused(self) -> None:
        """A rule that speaks about no tensor is misspelt."""
        words = dict.fromkeys(word for name in self._locked.config_model.checkpoint.tensors for word in name.split("."))
        for rule in self._unused:
            what = f"no tensor's name contains {rule.filter!r}, or rules above it speak about all that do"
            hint = did_you_mean(rule.filter, [word for word in words if not word.isdigit()])
            self._findings.about_recipe(what, rule.at, f"tensors[{rule.filter}]", hint)

    def _merge(
        self, piece: Cut, out: str, tensors: Sequence[TensorInfo], sources: Sequence[Input], position: float
    ) -> Job:
        method, names = self._table[piece.piece.method], [out, *(tensor.name for tensor in tensors)]
        spoken_of = [filter in name for filter in self._filters for name in names]
        known = self._known.get(key := (id(piece), position, *spoken_of))
        settings, each = known or self._numbers(piece, method, names, position)
        inputs: list[Operand] = []
        base: Operand | None = None
        for part, source, own in zip(piece.parts, sources, each, strict=True):
            operand = Operand(source, own, self._repeats(part.number))
            if part.is_base and method.subtracts_base:
                base = operand
            else:
                inputs.append(operand)
        leading = tensors[piece.leader]
        dtype = self._dtype or self._donors_dtype(piece.parts[piece.leader].model, leading)
        job = Job(out, dtype, sources[piece.leader].shape, method.name, tuple(inputs), base, settings)
        if known is None:
            self._known[key] = settings, each
            self._ask(piece, method, job)
        return job

    def _donors_dtype(self, leader: LockedModel, leading: TensorInfo) -> str:
        """The dtype that the config model has in this place, in any of its layers: one model, one dtype."""
        place = leader.architecture.place(leading.name)
        followed = self._locked.config_model.dtypes.get((place.stack, place.role), leading.dtype)
        return followed if followed in FLOATS else leading.dtype

    def _numbers(self, piece: Cut, method: Method, names: Sequence[str], position: float) -> _Numbers:
        """The parameters in force for the tensor that is named first, and for each of those of the parts after it."""
        levels = (piece.piece.parameters, piece.module.parameters, self._locked.recipe.parameters)
        own, shared = ([param for param in method.params if param.per_model == each] for each in (True, False))
        settings = {param.name: self._number(piece, param, levels, names[0], position) for param in shared}
        each = [
            {
                param.name: self._number(piece, param, (part.source.parameters, *levels), name, position)
                for param in ([] if part.is_base and method.subtracts_base else own)
            }
            for part, name in zip(piece.parts, names[1:], strict=True)
        ]
        return settings, each

    def _number(self, piece: Cut, param: Param, levels: Sequence[Parameters], tensor: str, position: float) -> float:
        value = first_value(levels, param.name, tensor, position)
        if value is None and param.required:
            what = f"{piece.piece.method} needs {param.name}, and no rule gives one for {tensor}"
            hint = "end the list with a value that has no filter"
            self._findings.about_recipe(what, piece.piece.at, f"parameters.{param.name}", hint)
        return float(value if value is not None else param.default or 0.0)

    def _ask(self, piece: Cut, method: Method, job: Job) -> None:
        """What the method itself has to say about its numbers."""
        if method.check is not None:
            try:
                method.check(**declared(method.check, arguments(method, job)))
            except ValueError as error:
                self._findings.about_recipe(f"{job.name}: {error}", piece.piece.at, "parameters", None)

    def _tell_missing(self, piece: Cut, names: Sequence[str], found: Sequence[TensorInfo | None]) -> None:
        missing = next(number for number, tensor in enumerate(found) if tensor is None)
        part, leader = piece.parts[missing], piece.parts[piece.leader]
        if self._is_news(part.number, leader.number):
            what = f"{part.model.name} has no tensor {names[missing]}, which {leader.model.name} has"
            self._findings.about_part(what, part, "are they of one architecture, and saved in full?")

    def _fit(self, piece: Cut, tensors: Sequence[TensorInfo], sources: Sequence[Input]) -> bool:
        """Whether shapes are equal and dtypes can be merged; a problem if not."""
        leading = tensors[piece.leader]
        for part, tensor, source in zip(piece.parts, tensors, sources, strict=True):
            if source.shape != sources[piece.leader].shape:
                if self._is_news(part.number, piece.parts[piece.leader].number):
                    self._tell_shapes(piece, part.number, tensor, leading)
                return False
            if tensor.dtype not in FLOATS:
                what = f"{part.model.name}: {tensor.name} is stored as {tensor.dtype}"
                hint = "such numbers are not merged: use the model's bfloat16, float16 or float32 version"
                self._findings.about_part(what, part, hint)
                return False
        return True

    def _tell_shapes(self, piece: Cut, number: int, tensor: TensorInfo, leading: TensorInfo) -> None:
        part = next(part for part in piece.parts if part.number == number)
        mine = f"{shape_text(leading)} in {piece.parts[piece.leader].model.name}"
        hint = "only tensors of one shape can be merged"
        if (is_embedding(tensor.name) or is_head(tensor.name)) and tensor.shape[1:] == leading.shape[1:]:
            if number in self._strangers:
                return
            hint = _AND_ITS_ROWS
        what = f"{tensor.name} is {mine}, but {shape_text(tensor)} in {part.model.name}"
        self._findings.about_part(what, part, hint)

    def _tell_vocabularies(self, first: Cut, last: Cut) -> None:
        """Without a tokenizer block each row of embedding and head must be the same token's in all models."""
        givers = {part.number: part for piece in (first, last) for part in piece.parts}
        if self.tokens is None:
            told = disagreements([self._locked.config_model, *(part.model for part in givers.values())])
            for part in givers.values():
                if part.model.ref in told:
                    self._strangers.add(part.number)
                    what = f"the vocabularies differ: {told[part.model.ref]}"
                    self._findings.about_part(what, part, _ONE_VOCABULARY)

    def _is_news(self, one: int, other: int) -> bool:
        """Whether this is among the first few mismatches of two models: one fault tends to show in every layer."""
        self._shown[one, other] += 1
        return self._shown[one, other] <= _MISMATCHES_SHOWN


def _why_copied(piece: Cut, leading: TensorInfo, found: Sequence[TensorInfo | None]) -> str | None:
    """Why a tensor is copied from the part that names it, whatever the method; None where it is merged."""
    if is_buffer(leading.name):
        return "a constant, not a trained tensor"
    if leading.dtype not in FLOATS and not leading.dtype.startswith("F8"):
        return f"{leading.dtype} numbers are not merged"
    alone = len(found) > 1 and [tensor is None for tensor in found].count(False) == 1
    leader = piece.parts[piece.leader].model
    if alone and leader.architecture.place(leading.name).stack is None and leading is not leader.embedding:
        return f"only {leader.name} has it"
    return None


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


def _beside(tensor: TensorInfo, axis: int) -> tuple[int, ...]:
    """A tensor's shape but for one axis."""
    return (*tensor.shape[:axis], *tensor.shape[axis + 1 :])


def _behind(giver: LockedModel, model: LockedModel) -> list[str]:
    """What a model calls the tensors of the layers of prediction that another one has."""
    architecture, stacks = giver.architecture, model.architecture.stacks
    return [architecture.moved_behind(tensor.name, stacks) for tensor in giver.prediction]


def _head(model: LockedModel, name: str) -> str:
    """The name of the tensor that is the model's head, where the output's is called `name`."""
    own = model.checkpoint.tensors.get(name)
    tensor = model.embedding if own is None or model.is_tied else own
    return name if tensor is None else tensor.name


def _gives_head(rule: Taken, model: LockedModel) -> bool:
    """Whether the head is among the tensors that a rule takes from its model."""
    return model.head is not None and rule.matches(model.head.name)


def _is_untied(model: LockedModel) -> bool:
    return model.head is not None and not model.is_tied


def shape_text(tensor: TensorInfo) -> str:
    """A shape as readers write it.

    >>> shape_text(TensorInfo("a", "F32", (2, 3), "model.safetensors", 0, 24))
    '2x3'
    """
    return "x".join(map(str, tensor.shape)) or "a single number"
