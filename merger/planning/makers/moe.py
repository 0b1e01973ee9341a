"""The jobs of a mixture of experts: which layout, which tensor of which model, what is drawn and what is computed.

Everything but the MLPs is the base model's; each expert gives its MLPs. Not here: the layouts' names and configs
(models.mixtures), and what computing a router from prompts takes (routing).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merger.errors import MismatchError, Problem
from merger.lock.locked import LockedModel
from merger.models.architecture import is_buffer
from merger.models.checkpoint import FLOATS, TensorInfo
from merger.models.config import with_dtype, with_prediction
from merger.models.mixtures import (
    BIASES,
    DOWN,
    EMBEDDING,
    GATE,
    HEAD,
    LAYOUTS,
    MATRICES,
    NORM,
    OF_EXPERTS,
    STACK,
    Layout,
    Matrices,
    MixtureSizes,
)
from merger.planning.budget import EMBEDDED
from merger.planning.inputs.base import PASSTHROUGH, Input, Job, Operand
from merger.planning.inputs.derived import Constant, Drawn, Noised, Routed, Stacked
from merger.planning.jobs.common import DTYPES, JobSet, shape_text
from merger.planning.stage_model import StagedRecipe
from merger.recipe.blocks.mixture import BY_CHANCE, matching
from merger.recipe.model import Expert, Mixture

_DEFAULT_PER_TOKEN = 2
_IDLE = 64
"""A width that kernels like."""

_UNQUANTISED = "use the model's bfloat16, float16 or float32 version"


def make_mixture(locked: StagedRecipe, mixture: Mixture, seed: int) -> tuple[JobSet, Mapping[str, Any]]:
    """The jobs of the recipe's mixture, and its config.json.

    Args:
        seed: for what is drawn.

    Raises:
        MismatchError: no layout fits, or the models do not fit each other.
    """
    mixing = _Mixing(locked, mixture, _layout(locked, mixture))
    if problems := list(_misfits(mixing)):
        raise MismatchError(problems)
    try:
        config = mixing.config()
    except ValueError as error:
        hint = "take another base model, or another layout by architecture:"
        what = f"does not fit {mixing.layout.name}: {error}"
        raise MismatchError(_about_base(mixing, what, hint)) from None
    jobs = tuple(_Mixer(mixing, seed).jobs())
    layers = tuple((locked.config_model, layer) for layer in range(locked.config_model.architecture.stacks[STACK]))
    return JobSet(jobs, {STACK: layers}, mixing.has_head, None), config


# ---- the layout -----------------------------------------------------------------------------------------------------


def _layout(locked: StagedRecipe, mixture: Mixture) -> Layout:
    """The first that fits, of those that the recipe allows."""
    wanted = matching(mixture.architecture) if mixture.architecture else tuple(layout.name for layout in LAYOUTS)
    layouts = [layout for layout in LAYOUTS if layout.name in wanted]
    configs = [locked.numbered(number).checkpoint.config for number in locked.own]
    types = list(dict.fromkeys(config.get("model_type", "of no known kind") for config in configs))
    tried = {layout: _why_not(layout, mixture) for layout in layouts if types in [[kind] for kind in layout.made_of]}
    found = next((layout for layout, why in tried.items() if why is None), None)
    if found is not None:
        return found
    reasons = "; ".join(f"{layout.name} {why}" for layout, why in tried.items())
    made_of = ", ".join(f"{layout.name} of {' or '.join(layout.made_of)}" for layout in layouts)
    told = reasons or f"a layout is made of models that are all of one kind, {made_of}"
    what = f"no layout fits these models ({', '.join(map(str, types))}): {told}"
    hint = "take models of one architecture, with or without a shared expert as the layout asks"
    if mixture.architecture:
        hint = "leave architecture: out, or change what it asks for"
    raise MismatchError(Problem(what, mixture.architecture_at or mixture.at, "experts", hint))


def _why_not(layout: Layout, mixture: Mixture) -> str | None:
    """Why a layout of models of this kind cannot be what a recipe asks for; None: it can."""
    shared = mixture.shared_experts
    if not layout.runs and mixture.gate_mode not in (*BY_CHANCE, EMBEDDED):
        return f"has no router from hidden states: write gate_mode: {EMBEDDED} or random"
    if shared and not layout.shared:
        return "has no shared expert"
    if not shared or mixture.gate_mode in BY_CHANCE:
        return None
    if layout.shared_router is None and (shared[0].positive_prompts or shared[0].negative_prompts):
        return "has a shared expert without prompts"
    if layout.shared_router is not None and not shared[0].positive_prompts:
        return "has a shared expert with positive_prompts"
    return None


@dataclass(frozen=True)
class _Mixing:
    """A mixture of a recipe's models, in a layout."""

    locked: StagedRecipe
    mixture: Mixture
    layout: Layout

    @property
    def base(self) -> LockedModel:
        """What gives everything but the experts."""
        return self.locked.config_model

    @property
    def has_head(self) -> bool:
        """Whether the base model's head is a tensor of its own."""
        return self.base.head is not None and not self.base.is_tied

    @property
    def shared(self) -> tuple[Expert, ...]:
        """What every token goes through beside the experts."""
        own = (Expert(self.base.ref),) if self.layout.keeps_mlp else ()
        return self.mixture.shared_experts or own

    @property
    def mlps(self) -> str:
        """The dtype of the base model's MLPs, which all experts and routers have."""
        return self.base.dtypes[STACK, GATE]

    @property
    def width(self) -> int:
        """How many entries a hidden state has."""
        return self.base.checkpoint.tensors[EMBEDDING].shape[-1]

    @property
    def middle(self) -> int:
        """How wide the experts are: as wide as the first."""
        return _middle(self.locked.model(self.mixture.experts[0].source_model))

    def config(self) -> Mapping[str, Any]:
        """The mixture's.

        Raises:
            ValueError: the layout cannot say something that the base model's config says.
        """
        shared = [_middle(self.locked.model(expert.source_model)) for expert in self.shared]
        sizes = MixtureSizes(len(self.mixture.experts), self.per_token, self.middle, sum(shared) or self.idle)
        edited = with_prediction(self.layout.config(self.base.checkpoint.config, sizes), 0, {})
        dtype = self.locked.recipe.dtype
        return with_dtype(edited, dtype) if dtype else edited

    @property
    def idle(self) -> int:
        """How wide the shared expert of zeros is, for a class that has one in any case."""
        return 0 if self.shared or self.layout.shared_router is None else _IDLE

    @property
    def per_token(self) -> int:
        """As the recipe says; else two, or one beside a shared expert that every token goes through in full."""
        whole = bool(self.shared) and self.layout.shared_router is None
        default = min(1 if whole else _DEFAULT_PER_TOKEN, len(self.mixture.experts))
        return self.mixture.experts_per_token or default


# ---- what must fit --------------------------------------------------------------------------------------------------


def _misfits(of: _Mixing) -> Iterator[Problem]:
    """In what models do not fit the layout, or each other."""
    yield from _of_base(of)
    for expert in {expert.source_model: expert for expert in reversed(of.mixture.experts)}.values():
        yield from _of_expert(of, expert, of.middle)
    for expert in of.shared:
        yield from _of_expert(of, expert, _middle(of.locked.model(expert.source_model)))
    apart = any("{number}" in role for role in of.layout.experts)
    if len({expert.residual_scale for expert in of.mixture.experts}) > 1 and not apart:
        what = f"{of.layout.name} has all experts in one tensor, and these have several residual_scale"
        hint = "give all experts one residual_scale, or scale a model by passthrough in a document before this"
        yield Problem(what, of.mixture.at, "experts", hint)


def _of_base(of: _Mixing) -> Iterator[Problem]:
    base, layout = of.base, of.layout
    held = [tensor for tensor in base.checkpoint.tensors.values() if not is_buffer(tensor.name)]
    whatever = layout.roles is None
    head = () if base.is_tied or whatever else (HEAD,)
    layers = range(base.architecture.stacks.get(STACK, 0))
    roles = (*(layout.roles or ()), *MATRICES)
    needed = [role for role in roles if not (layout.zeros and role in BIASES)]
    places = {EMBEDDING, NORM, HEAD, *(_at(layer, role) for layer in layers for role in roles)}
    odd = [each.name for each in held if each.name not in places and not base.architecture.predicts(each.name)]
    wanted = [EMBEDDING, NORM, *head, *(_at(layer, role) for layer in layers for role in needed)]
    missing = [name for name in wanted if name not in base.checkpoint.tensors]
    if odd and not whatever:
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        yield _about_base(of, f"has the tensor {odd[0]}{more}, for which {layout.name} has no place")
    if missing or not layers:
        yield _about_base(of, f"has no tensor {missing[0] if missing else STACK}, which {layout.name} needs")
    if (stored := next((each for each in held if each.dtype not in FLOATS), None)) is not None:
        yield _about_base(of, f"stores {stored.name} as {stored.dtype}", _UNQUANTISED)
    if of.mixture.gate_mode not in BY_CHANCE and "tokenizer.json" not in base.located.files:
        yield _about_base(of, "has no tokenizer.json, by which prompts become tokens", "write gate_mode: random")


def _about_base(of: _Mixing, what: str, hint: str = "take a plain model of its kind as base_model") -> Problem:
    at = (of.locked.recipe.base_model or of.base.ref).at
    return Problem(f"{of.base.name} {what}", at, "base_model", hint)


def _of_expert(of: _Mixing, expert: Expert, middle: int) -> Iterator[Problem]:
    """Whether its MLPs are there, layer for layer, from the base model's hidden size to `middle` and back."""
    model = of.locked.model(expert.source_model)
    layers, theirs = (one.architecture.stacks.get(STACK, 0) for one in (of.base, model))
    faults = (_fault(of, model, layer, role, middle) for layer in range(layers) for role in MATRICES)
    if theirs != layers:
        what = f"has {theirs} layers {STACK}, and the base model {layers}"
        fault: tuple[str, str] | None = (what, "experts have as many layers as the base model")
    elif _act(model) != _act(of.base):
        what = f"has the hidden_act {_act(model)}, and the base model {_act(of.base)}"
        fault = what, "experts have the base model's hidden_act"
    else:
        fault = next(filter(None, faults), None)
    if fault is not None:
        at, where = expert.source_model.at or expert.at, f"experts[{expert.source_model}]"
        yield Problem(f"{model.name} {fault[0]}", at, where, fault[1])


def _fault(of: _Mixing, model: LockedModel, layer: int, role: str, middle: int) -> tuple[str, str] | None:
    """What is wrong with an expert's matrix, if anything is, and what to do."""
    name = _at(layer, role)
    tensor = model.checkpoint.tensors.get(name)
    if tensor is None:
        return f"has no tensor {name}", "is it saved in full?"
    if tensor.dtype not in FLOATS:
        return f"stores {name} as {tensor.dtype}", _UNQUANTISED
    shape = (of.width, middle) if role == DOWN else (middle, of.width)
    if tensor.shape == shape:
        return None
    what = f"has {name} of {shape_text(tensor)}, not {'x'.join(map(str, shape))}"
    return what, "experts have MLPs of one shape and the base model's hidden size"


# ---- the jobs -------------------------------------------------------------------------------------------------------


class _Mixer:
    """Walks the base model once; jobs come out."""

    def __init__(self, of: _Mixing, seed: int) -> None:
        self._of, self._seed = of, seed
        self._dtype = DTYPES[of.locked.recipe.dtype] if of.locked.recipe.dtype else None

    def jobs(self) -> Iterator[Job]:
        loose = [each for each in self._of.base.layer(None, None) if each.name not in (EMBEDDING, NORM, HEAD)]
        yield self._copy(EMBEDDING, self._of.base.checkpoint.tensors[EMBEDDING])
        yield from (self._copy(tensor.name, tensor) for tensor in loose if not is_buffer(tensor.name))
        for layer in range(self._of.base.architecture.stacks[STACK]):
            yield from self._layer(layer)
        for name in (NORM, *((HEAD,) if self._of.has_head else ())):
            yield self._copy(name, self._of.base.checkpoint.tensors[name])

    def _layer(self, layer: int) -> Iterator[Job]:
        layout, mixture = self._of.layout, self._of.mixture
        held = {self._role(tensor): tensor for tensor in self._of.base.layer(STACK, layer)}
        for role in (role for role in held if role not in MATRICES) if layout.roles is None else layout.roles:
            name = _at(layer, role)
            if role in held:
                yield self._copy(name, held[role])
            elif layout.zeros and role in BIASES:
                beside = held[BIASES[role]]
                yield self._constant(name, beside.shape[:1], beside.dtype)
        for role, what in layout.vectors.items():
            if what in held:
                yield self._copy(_at(layer, role), held[what])
            else:
                size = len(mixture.experts) if what == OF_EXPERTS else self._of.width
                yield self._constant(_at(layer, role), (size,), held[GATE].dtype, 1.0)
        yield self._router(layer, layout.router, mixture.experts)
        yield from self._mlps(layer, layout.experts, mixture.experts, stacked=True)
        yield from self._mlps(layer, layout.shared, self._of.shared, stacked=False)
        if self._of.idle:
            yield from self._idle(layer)
        elif layout.shared_router is not None:
            yield self._router(layer, layout.shared_router, self._of.shared)

    def _mlps(self, layer: int, roles: Matrices, experts: Sequence[Expert], stacked: bool) -> Iterator[Job]:
        """The tensors of experts: for each one its own, or of all of them one."""
        apart = any("{number}" in role for role in roles) or not stacked
        for number, those in enumerate([(expert,) for expert in experts] if apart else [experts]):
            for role, matrices in roles.items():
                yield self._matrices(those, layer, role.format(number=number), matrices, not apart)

    def _idle(self, layer: int) -> Iterator[Job]:
        """A shared expert that adds nothing."""
        for role, (matrix,) in self._of.layout.shared.items():
            shape = (self._of.idle, self._of.width)
            yield self._constant(_at(layer, role), shape[::-1] if matrix == DOWN else shape, self._of.mlps)
        yield self._constant(_at(layer, self._of.layout.shared_router or ""), (1, self._of.width), self._of.mlps)

    def _copy(self, name: str, tensor: TensorInfo) -> Job:
        return self._job(name, self._of.locked.source(self._of.locked.index(self._of.base.ref), tensor), tensor.dtype)

    def _constant(self, name: str, shape: tuple[int, ...], dtype: str, value: float = 0.0) -> Job:
        return self._job(name, Constant(shape, dtype, value), dtype)

    def _job(self, name: str, source: Input, dtype: str, scale: float = 1.0) -> Job:
        """The job of a tensor, in the recipe's dtype or the one that the base model has in its place."""
        return Job(name, self._dtype or dtype, source.shape, PASSTHROUGH, (Operand(source, {"scale": scale}),))

    def _matrices(
        self, experts: Sequence[Expert], layer: int, role: str, matrices: Sequence[str], stacked: bool
    ) -> Job:
        """Matrices of experts one behind the other, in a stack of one block an expert or as rows of one matrix."""
        name = _at(layer, role)
        alone = len(experts) == len(matrices) == 1 and not stacked
        each = [(number, expert, matrix) for number, expert in enumerate(experts) for matrix in matrices]
        found = [
            self._source(expert, layer, matrix, name if alone else f"{name}.{number}.{matrix}")
            for number, expert, matrix in each
        ]
        if not alone:
            rows, columns = found[0].shape
            size = (len(experts), len(matrices) * rows, columns) if stacked else (len(found) * rows, columns)
            source: Input = Stacked(tuple(found), tuple((number, 0) for number in range(len(found))), 0, rows, size)
        else:
            (source,) = found
        return self._job(name, source, self._of.mlps, experts[0].residual_scale if DOWN in matrices else 1.0)

    def _source(self, expert: Expert, layer: int, matrix: str, stream: str) -> Input:
        number = self._of.locked.index(expert.source_model)
        tensor = self._of.locked.numbered(number).checkpoint.tensors[_at(layer, matrix)]
        source: Input = self._of.locked.source(number, tensor)
        if expert.noise_scale:
            source = Noised(source, Drawn(tensor.shape, "normal", expert.noise_scale, self._seed, stream))
        return source

    def _router(self, layer: int, role: str, experts: Sequence[Expert]) -> Job:
        name, size, mode = _at(layer, role), (len(experts), self._of.width), self._of.mixture.gate_mode
        source: Input
        if mode == "random":
            source = Drawn(size, "normal", 1.0, self._seed, name)
        elif mode == "uniform_random":
            source = Drawn(size, "uniform", 1 / math.sqrt(self._of.width), self._seed, name)
        else:
            prompts = tuple((expert.positive_prompts, expert.negative_prompts) for expert in experts)
            source = Routed("hidden" if mode == "hidden_last" else mode, layer, self._of.width, prompts)
        return self._job(name, source, self._of.mlps)

    def _role(self, tensor: TensorInfo) -> str:
        return self._of.base.architecture.place(tensor.name).role


def _act(model: LockedModel) -> Any:
    return model.checkpoint.config.get("hidden_act", "silu")


def _middle(model: LockedModel) -> int:
    gate = model.checkpoint.tensors.get(_at(0, GATE))
    return gate.shape[0] if gate is not None and gate.shape else 0


def _at(layer: int, role: str) -> str:
    return f"{STACK}.{layer}.{role}"
