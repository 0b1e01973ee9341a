"""StagedRecipe -> the jobs of a LoRA adapter: of the adapters that a recipe merges, or of what a fine-tune changed.

The result is what PEFT loads: adapter_model.safetensors with A and B of each module, and adapter_config.json.
Not here: jobs of models (jobs), and taking matrices apart (engine).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

from merger.errors import Problem, RecipeError
from merger.lock.locked import LockedModel
from merger.methods.registry import Method
from merger.models.architecture import Architecture, is_before_layers, is_buffer, is_embedding, is_head
from merger.models.checkpoint import FLOATS, TensorInfo
from merger.models.lora.changes import TRANSPOSED_MODELS
from merger.models.lora.counterparts import counterparts
from merger.models.lora.modules import AdaptedModule
from merger.planning.inputs.base import PASSTHROUGH, Input, Job, Operand
from merger.planning.inputs.derived import Constant
from merger.planning.inputs.low_rank import Difference, Factor, LowRank, MergedDeltas, factors
from merger.planning.jobs.common import DTYPES, PREDICTION, JobSet, ask_method, number_in_force
from merger.planning.slices import Findings, Segment
from merger.planning.stage_model import StagedRecipe
from merger.recipe.model import Lora
from merger.safety.apart import BeyondError
from merger.safety.expressions import first
from merger.safety.names import is_repo
from merger.safety.numbers import quoted_short

_PREFIX = "base_model.model."
_HEAD = "lm_head"
"""What transformers calls a head that is the embedding: PEFT wants it beside the embedding, and ties them again."""

_ADD_FIRST = "add each adapter to its model (org/model+org/adapter) and merge the models"
_FROZEN = ".base_layer.weight"
_WHY_FROZEN = "the model's own matrix, which PEFT saves beside an embedding's adapter"
_TURNS_WITH_ITS_INPUTS = ("linear", "task_arithmetic", "passthrough")
"""Methods that give the same whatever directions are taken for axes, so that nothing is lost where the deltas lie."""


def make_lora(locked: StagedRecipe, table: Mapping[str, Method], seed: int) -> JobSet:
    """Decide how each tensor of the adapter is made; `seed` is for methods that draw random numbers.

    Raises:
        RecipeError: the recipe leaves a number open.
        MismatchError: the adapters, or the fine-tune and its base, do not fit each other.
    """
    assert locked.recipe.lora is not None
    findings = Findings()
    maker = _Extraction(locked, findings) if locked.recipe.lora.extracted else _Blend(locked, table, findings, seed)
    jobs = tuple(maker.jobs())
    findings.settle()
    return JobSet(
        jobs, {}, False, config=maker.draft.config(), reasons=maker.reasons, tokenizer_model=maker.tokenizer_model
    )


@dataclass
class _Draft:
    """What adapter_config.json has to say of the modules so far.

    Args:
        given: what it says besides.
        lora: what the recipe says.
        ranks: the rank of each module.
        whole: the modules that are held whole.
        all_modules: the names of all modules of the model that have matrices, as far as known.
        biases: whether biases of the modules are among the tensors.
        tied: whether the model's head is an embedding that is held whole, and has to stay so.
    """

    given: Mapping[str, Any]
    lora: Lora
    ranks: dict[str, int] = field(default_factory=dict)
    whole: dict[str, None] = field(default_factory=dict)
    all_modules: tuple[str, ...] = ()
    biases: bool = False
    tied: bool = False

    @property
    def rank(self) -> int:
        """The rank that most modules have."""
        return Counter(self.ranks.values()).most_common(1)[0][0] if self.ranks else 1

    @property
    def scale(self) -> float:
        """What B A is multiplied by: alpha over rank, the same for all modules."""
        return 1.0 if self.lora.alpha is None or self.lora.rank is None else self.lora.alpha / self.lora.rank

    def config(self) -> dict[str, Any]:
        odd = {re.escape(name): rank for name, rank in self.ranks.items() if rank != self.rank}
        return {
            "peft_type": "LORA",
            "inference_mode": True,
            **self.given,
            "r": self.rank,
            "lora_alpha": _plain(self.scale * self.rank),
            "lora_dropout": 0.0,
            "use_rslora": False,
            "use_dora": False,
            "bias": "all" if self.biases else "none",
            "target_modules": self._targets(),
            "modules_to_save": list(self.whole) or None,
            **({"ensure_weight_tying": True} if self.tied else {}),
            "rank_pattern": odd,
            "alpha_pattern": {name: _plain(self.scale * rank) for name, rank in odd.items()},
        }

    def _targets(self) -> list[str]:
        """The modules' last names, as people write them, where these mean just them; else their whole names."""
        ends = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in self.ranks))
        meant = [name for name in self.all_modules if name.rsplit(".", 1)[-1] in ends]
        return ends if set(meant) == set(self.ranks) else list(self.ranks)

    def add(self, name: str, product: Difference | MergedDeltas, rank: int, dtype: str, transposed: bool,
            embedding: bool) -> Iterator[Job]:  # fmt: skip
        """The jobs that make A and B of a module; A comes first, for both are made then."""
        self.ranks[name] = rank
        parts: tuple[Literal["A", "B"], ...] = ("A", "B")
        for part in parts:
            source = Factor(product, rank, part, self.scale, transposed, self.lora.distribute_scale)
            tensor = f"lora_embedding_{part}" if embedding else f"lora_{part}.weight"
            entry = Operand(source, {"scale": 1.0}, product.stored_tensors[0].model)
            yield Job(f"{_PREFIX}{name}.{tensor}", dtype, source.shape, PASSTHROUGH, (entry,))


def _plain(number: float) -> float | int:
    return int(number) if number == int(number) else number


# ---- of adapters ----------------------------------------------------------------------------------------------------


class _Blend:
    """Adapters of one model become one, module by module."""

    def __init__(self, locked: StagedRecipe, table: Mapping[str, Method], findings: Findings, seed: int) -> None:
        assert locked.recipe.lora is not None
        self._locked, self._lora, self._findings, self._seed = locked, locked.recipe.lora, findings, seed
        self._piece = locked.recipe.slices[0]
        self._method = table[self._piece.method]
        self._parts = [
            Segment(source, locked.index(source.model), locked.model(source.model), False)
            for source in self._piece.sources
        ]
        self.reasons: dict[str, str] = {}
        self.tokenizer_model = None
        first = self._parts[0].model
        self.draft = _Draft(_of_first(first), self._lora)

    def jobs(self) -> Iterator[Job]:
        held = [part.model.lora.modules if part.model.lora is not None else {} for part in self._parts]
        for part in self._parts:
            self._refuse_rest(part)
        for part, modules in zip(self._parts[1:], held[1:], strict=True):
            self._refuse_other_names(part, modules, held[0])
        names = dict.fromkeys(name for modules in held for name in modules)
        layers = Architecture([f"{name}.weight" for name in names])
        configs = [part.model.checkpoint.config for part in self._parts]
        # for all modules whose names end as the configs list
        if all(isinstance(of.get("target_modules"), list) and not of.get("layers_to_transform") for of in configs):
            self.draft.all_modules = tuple(names)
        for name in names:
            found = [modules.get(name) for modules in held]
            if self._fit(name, found):
                yield from self._module(name, found, layers)

    def _refuse_rest(self, part: Segment) -> None:
        """What an adapter holds beside A and B has no counterpart in the others, nor a base to be a change of."""
        lora = part.model.lora
        assert lora is not None
        whole = [tensor for tensor in lora.whole.values() if not tensor.name.endswith(_FROZEN)]
        self.reasons |= dict.fromkeys((one.name for one in lora.whole.values() if one not in whole), _WHY_FROZEN)
        vectors = [vector for module in lora.modules.values() for vector in (module.bias, module.magnitude)]
        rows = [tokens.rows for tokens in lora.tokens.values()]
        rest = [*whole, *rows, *(vector for vector in vectors if vector is not None)]
        if rest:
            what = f"it holds more than A and B: {rest[0].name}" + (f" and {len(rest) - 1} more" * (len(rest) > 1))
            self._findings.about_part(what, part, _ADD_FIRST)
        if lora.pipeline or any(module.kernel for module in lora.modules.values()):
            what = "it is of a diffusion pipeline, or of convolutions"
            self._findings.about_part(what, part, _ADD_FIRST)
        if lora.parameters:
            what = f"it changes parameters that are no module's weight, of {lora.parameters[0].module}"
            self._findings.about_part(what, part, _ADD_FIRST)

    def _refuse_other_names(
        self, part: Segment, held: Mapping[str, AdaptedModule], first: Mapping[str, AdaptedModule]
    ) -> None:
        """No class of models would load the result if adapters call one matrix by two names."""
        ours, theirs = ({f"{name}.weight": _kind(one)[1:] for name, one in of.items()} for of in (first, held))
        found = counterparts(theirs, ours)
        odd = next(((name, of) for name, of in found.items() if of and name not in of), None)
        if odd is not None:
            what = f"{odd[0]} is called {odd[1][0]} in {self._parts[0].model.name}: they were trained on two classes"
            self._findings.about_part(what, part, _ADD_FIRST)

    def _fit(self, name: str, found: Sequence[AdaptedModule | None]) -> bool:
        """Whether all adapters that change a module take it for the same one."""
        kinds = [(part, m) for part, m in zip(self._parts, found, strict=True) if m is not None]
        leader = kinds[0][1]
        for part, module in kinds[1:]:
            if _kind(module) != _kind(leader):
                what = f"{name} is {_describe(module)} in {part.model.name}, but {_describe(leader)} in "
                hint = "only adapters of one model can be merged"
                self._findings.about_part(what + kinds[0][0].model.name, part, hint)
                return False
        return True

    def _module(self, name: str, found: Sequence[AdaptedModule | None], layers: Architecture) -> Iterator[Job]:
        leader = next(module for module in found if module is not None)
        deltas = tuple(_delta(part.number, m, leader) for part, m in zip(self._parts, found, strict=True))
        called = self._arguments(name, layers, deltas)
        drawn = (self._seed, name) if self._method.random else None
        product = MergedDeltas(deltas, self._method.name, called, drawn, self._space(leader, deltas),
                               self._method.workspace)  # fmt: skip
        most = min(leader.inputs, leader.outputs)
        lies_in = product.rank if product.space != "full" else most
        rank = min(self._lora.rank or product.rank, lies_in, most)
        recipe = self._locked.recipe
        dtype = DTYPES[recipe.dtype] if recipe.dtype else leader.a.dtype
        yield from self.draft.add(name, product, rank, dtype, False, leader.embedding)

    def _space(self, module: AdaptedModule, deltas: Sequence[Input]) -> Literal["full", "rows", "columns", "core"]:
        if self._lora.core or self._method.name in _TURNS_WITH_ITS_INPUTS:
            return "core"
        together = sum(delta.rank for delta in deltas if isinstance(delta, LowRank))
        if self._method.name == "knots" and together <= min(module.inputs, module.outputs):
            return "columns" if module.outputs > module.inputs else "rows"
        return "full"

    def _arguments(self, name: str, layers: Architecture, deltas: Sequence[Input]) -> tuple[tuple[str, Any], ...]:
        """What the method is called with for a module: its parameters' values there."""
        tensor = f"{name}.weight"
        levels = (self._piece.parameters, self._locked.recipe.parameters)
        place = layers.place(tensor)
        count = layers.stacks[place.stack] if place.stack is not None else 1
        position = 0.0 if place.layer is None else 1.0 if count == 1 else place.layer / (count - 1)
        inputs = [
            Operand(
                delta, self._numbers((part.source.parameters, *levels), tensor, position, per_model=True), part.number
            )
            for part, delta in zip(self._parts, deltas, strict=True)
        ]
        settings = self._numbers(levels, tensor, position, per_model=False)
        job = Job(tensor, "F32", deltas[0].shape, self._method.name, tuple(inputs), settings=settings)
        given = ask_method(self._findings, self._piece, self._method, job, name)
        return tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in given.items())

    def _numbers(self, levels: Sequence[Any], tensor: str, position: float, per_model: bool) -> dict[str, float]:
        params = [param for param in self._method.params if param.per_model == per_model]
        number = partial(number_in_force, self._findings, self._piece)
        return {param.name: number(param, levels, tensor, position) for param in params}


def _kind(module: AdaptedModule) -> tuple[bool, int, int]:
    return module.embedding, module.outputs, module.inputs


def _describe(module: AdaptedModule) -> str:
    return f"{'an embedding' if module.embedding else 'a matrix'} of {module.outputs}x{module.inputs}"


def _delta(number: int, module: AdaptedModule | None, like: AdaptedModule) -> LowRank | Constant:
    zeros = Constant((like.outputs, like.inputs), like.a.dtype)
    if module is None:
        return zeros
    return LowRank(zeros, *factors(number, module), module.scale)


def _of_first(model: LockedModel) -> dict[str, Any]:
    """What the result's config takes from the first adapter's; of a model in a folder its name without the place."""
    config = model.checkpoint.config
    named = model.lora.model if model.lora is not None else None
    return {
        "task_type": config.get("task_type"),
        "base_model_name_or_path": named if named is None or is_repo(named) else named.rstrip("/").split("/")[-1],
        "fan_in_fan_out": config.get("fan_in_fan_out") is True,
    }


# ---- of a fine-tune -------------------------------------------------------------------------------------------------


class _Extraction:
    """What a fine-tune changed, tensor by tensor: low-rank where it is a matrix, whole where not."""

    def __init__(self, locked: StagedRecipe, findings: Findings) -> None:
        assert locked.recipe.lora is not None
        self._locked, self._lora, self._findings = locked, locked.recipe.lora, findings
        self._tuned, self._base = (locked.model(source.model) for source in locked.recipe.slices[0].sources)
        self._part = Segment(locked.recipe.slices[0].sources[0], locked.index(self._tuned.ref), self._tuned, False)
        self._transposed = self._base.checkpoint.config.get("model_type") in TRANSPOSED_MODELS
        self.reasons: dict[str, str] = {}
        self.tokenizer_model: int | None = None
        self.draft = _Draft(
            {
                "task_type": "CAUSAL_LM" if _is_causal(self._base.checkpoint.config) else None,
                "base_model_name_or_path": self._base.ref.path if self._base.located.commit else self._base.name,
                "fan_in_fan_out": self._transposed,
            },
            self._lora,
        )

    def jobs(self) -> Iterator[Job]:
        theirs, ours = self._tuned.checkpoint.tensors, self._base.checkpoint.tensors
        self.draft.all_modules = tuple(
            _module_of(name) for name, tensor in ours.items() if len(tensor.shape) == 2 and not self._predicts(name)
        )
        for name, tensor in ours.items():
            if self._is_taken(name) and self._fit(name, tensor, theirs.get(name)):
                yield from self._tensor(tensor, theirs[name])
        for name in theirs:
            if name not in ours and self._is_taken(name):
                self._refuse(f"{self._base.name} has no tensor {name}")
        if not self.draft.ranks:
            self._refuse("no matrix is left to take apart")

    def _is_taken(self, name: str) -> bool:
        """Whether the recipe asks for it; else the reason is noted."""
        if name not in self._wanted:
            self.reasons[name] = "left out by include or exclude"
        elif is_buffer(name):
            self.reasons[name] = "a constant, not a trained tensor"
        elif self._predicts(name):
            self.reasons[name] = f"{PREDICTION}, which an adapter has no place for"
        elif is_head(name) and self._base.is_tied and self._tuned.is_tied:
            self.reasons[name] = "the head is the embedding, as the model's config says"
        return name not in self.reasons

    def _predicts(self, name: str) -> bool:
        """Whether it belongs to layers that transformers leaves out when it loads the model."""
        return self._base.architecture.predicts(name) or self._tuned.architecture.predicts(name)

    @cached_property
    def _wanted(self) -> frozenset[str]:
        """The names that the recipe asks for, tried all at once."""
        names = list({**self._base.checkpoint.tensors, **self._tuned.checkpoint.tensors})
        for expression, kept in ((self._lora.include, True), (self._lora.exclude, False)):
            if expression is not None:
                names = [name for name, place in zip(names, self._try_pattern(expression, names), strict=True)
                         if (place is not None) == kept]  # fmt: skip
        return frozenset(names)

    def _try_pattern(self, expression: str, names: Sequence[str]) -> list[int | None]:
        try:
            return first([expression], names)
        except BeyondError as error:
            what = f"to try the regular expression {quoted_short(expression)} {error}"
            at = self._locked.recipe.slices[0].at
            raise RecipeError(Problem(what, at, "extract_lora", "write one without repetition in repetition")) from None

    def _fit(self, name: str, ours: TensorInfo, theirs: TensorInfo | None) -> bool:
        if theirs is None:
            self._refuse(f"{self._tuned.name} has no tensor {name}")
        elif theirs.shape != ours.shape and not self._is_of_other_tokens(ours, theirs):
            mine, other = ("x".join(map(str, tensor.shape)) for tensor in (theirs, ours))
            self._refuse(f"{name} is {mine} in {self._tuned.name}, but {other} in {self._base.name}")
        elif theirs.dtype not in FLOATS or ours.dtype not in FLOATS:
            self._refuse(f"{name} is stored as {theirs.dtype if theirs.dtype not in FLOATS else ours.dtype}")
        else:
            return True
        return False

    def _is_of_other_tokens(self, ours: TensorInfo, theirs: TensorInfo) -> bool:
        """Whether both have a row for each token, of which one model has more."""
        by_token = self._base.by_token(ours) and self._tuned.by_token(theirs)
        return by_token and theirs.shape != ours.shape and theirs.shape[1:] == ours.shape[1:]

    def _refuse(self, what: str) -> None:
        if len(self._findings.mismatches) < 3:
            hint = "leave it out by exclude (--exclude), a regular expression, or take the model's own base"
            self._findings.about_part(what, self._part, hint)

    def _tensor(self, ours: TensorInfo, theirs: TensorInfo) -> Iterator[Job]:
        dtype = DTYPES[self._locked.recipe.dtype] if self._locked.recipe.dtype else theirs.dtype
        embedding = self._is_embedding(ours)
        if self._is_of_other_tokens(ours, theirs):
            self.tokenizer_model = self._part.number
            yield from self._whole(theirs, dtype, embedding=True)
            return
        if len(ours.shape) != 2 or not ours.name.endswith(".weight") or (embedding and not self._lora.embeddings):
            yield from self._whole(theirs, dtype, embedding)
            return
        base = self._locked.index(self._base.ref)
        product = Difference(self._locked.source(self._part.number, theirs), self._locked.source(base, ours))
        rank = min(self._lora.rank or 1, *ours.shape)
        transposed = embedding or self._transposed
        yield from self.draft.add(_module_of(ours.name), product, rank, dtype, transposed, embedding)

    def _is_embedding(self, tensor: TensorInfo) -> bool:
        outside = self._base.architecture.place(tensor.name).stack is None
        return outside and len(tensor.shape) == 2 and is_before_layers(tensor.name)

    def _whole(self, theirs: TensorInfo, dtype: str, embedding: bool) -> Iterator[Job]:
        module, _, kind = theirs.name.rpartition(".")
        if self._lora.skip_rest and not embedding:
            self.reasons[theirs.name] = "no matrix, and left out by skip_rest"
            return
        name = theirs.name
        if kind == "bias" and self._is_biased(module):
            self.draft.biases = True
            name = f"{module}.base_layer.bias"
        elif kind in ("weight", "bias"):
            self.draft.whole[module] = None
        else:
            self._refuse(f"{theirs.name} has no module of its own that an adapter could hold")
            return
        yield self._copy(name, theirs, dtype)
        if self._base.is_tied and is_embedding(theirs.name):
            self.draft.tied = True
            self.draft.whole[_HEAD] = None
            yield self._copy(f"{_HEAD}.weight", theirs, dtype)

    def _copy(self, name: str, theirs: TensorInfo, dtype: str) -> Job:
        entry = Operand(self._locked.source(self._part.number, theirs), {"scale": 1.0})
        return Job(f"{_PREFIX}{name}", dtype, theirs.shape, PASSTHROUGH, (entry,), why="held whole, not taken apart")

    def _is_biased(self, module: str) -> bool:
        """Whether the module's matrix is taken apart, so that its bias belongs to a layer with an adapter."""
        weight, theirs = (one.checkpoint.tensors.get(f"{module}.weight") for one in (self._base, self._tuned))
        if weight is None or theirs is None or theirs.shape != weight.shape or weight.name not in self._wanted:
            return False
        return len(weight.shape) == 2 and not self._is_embedding(weight)


def _module_of(name: str) -> str:
    return name.rpartition(".")[0]


def _is_causal(config: Mapping[str, Any]) -> bool:
    return any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in config.get("architectures") or ())
