"""What the jobs of one output have in common, and what comes out as a whole.

Not here: how each tensor is made (make).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from merger.lock.locked import LockedModel
from merger.methods.registry import Method, Param, declared
from merger.models.architecture import is_buffer, is_head
from merger.models.checkpoint import FLOATS, TensorInfo
from merger.planning.inputs.base import PASSTHROUGH, Input, Job, Operand
from merger.planning.slices import Findings
from merger.planning.stage_model import StagedRecipe
from merger.planning.tokens import Tokens
from merger.recipe.model import Parameters, Slice, first_value

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""How safetensors writes the dtypes that a recipe may ask for."""

PREDICTION = "multi-token prediction"
NOT_ALL_PREDICT = f"{PREDICTION}, which not every model has"


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


@dataclass(frozen=True)
class Making:
    """What all jobs of one output have in common.

    Args:
        locked: the models.
        table: the methods.
        findings: where problems go.
        tokens: what the recipe's tokenizer block brings about, if it has one.
    """

    locked: StagedRecipe
    table: Mapping[str, Method]
    findings: Findings
    tokens: Tokens | None

    @property
    def dtype(self) -> str | None:
        """What the recipe asks for."""
        return DTYPES[self.locked.recipe.dtype] if self.locked.recipe.dtype else None

    def copy(self, out: str, number: int, tensor: TensorInfo, why: str) -> Job:
        """A job that takes a tensor as it is; a trained one in the recipe's dtype, if it names one."""
        cast = self.dtype is not None and tensor.dtype in FLOATS and not is_buffer(tensor.name)
        dtype = self.dtype if cast and self.dtype else tensor.dtype
        source = self.source(number, tensor, out)
        return Job(out, dtype, source.shape, PASSTHROUGH, (Operand(source, {"scale": 1.0}),), why=why)

    def source(self, number: int, tensor: TensorInfo, out: str) -> Input:
        """Where the entries of a model's tensor come from that goes into the tensor `out`."""
        if self.tokens is None:
            return self.locked.source(number, tensor)
        return self.tokens.rows_of(self.locked, number, tensor, is_head(out))

    def repeats(self, number: int) -> int | None:
        """The number of a model that is there a second time under another name."""
        return number if self.locked.owner(number) != number else None

    def config_models_dtype(self, leader: LockedModel, leading: TensorInfo) -> str:
        """The dtype that the config model has in this place, in any of its layers: one model, one dtype."""
        place = leader.architecture.place(leading.name)
        followed = self.locked.config_model.dtypes.get((place.stack, place.role), leading.dtype)
        return followed if followed in FLOATS else leading.dtype


def arguments(method: Method, job: Job) -> dict[str, Any]:
    """What the method is called with besides tensors: its parameters under their Python names."""
    values: dict[str, Any] = {}
    for param in method.params:
        if param.per_model:
            values[param.argument] = [_convert(param, entry.settings[param.name]) for entry in job.inputs]
        else:
            values[param.argument] = _convert(param, job.settings[param.name])
    return values


def number_in_force(
    findings: Findings, piece: Slice, param: Param, levels: Sequence[Parameters], tensor: str, position: float
) -> float:
    """A parameter's number for a tensor at a position of the slice; a problem where it takes one and has none."""
    value = first_value(levels, param.name, tensor, position)
    if value is None and param.required:
        what = f"{piece.method} needs {param.name}, and no rule gives one for {tensor}"
        hint = "end the list with a value that has no filter"
        findings.about_recipe(what, piece.at, f"parameters.{param.name}", hint)
    return float(value if value is not None else param.default or 0.0)


def ask_method(findings: Findings, piece: Slice, method: Method, job: Job, name: str) -> dict[str, Any]:
    """What it is called with for a job that makes `name`; a problem where it has something to say about that."""
    given = arguments(method, job)
    if method.check is not None:
        try:
            method.check(**declared(method.check, given))
        except ValueError as error:
            findings.about_recipe(f"{name}: {error}", piece.at, "parameters", None)
    return given


def _convert(param: Param, value: float) -> float | int | bool:
    kinds: dict[str, type[float | int | bool]] = {"float": float, "int": int, "bool": bool}
    return kinds[param.kind](value)


def shape_text(tensor: TensorInfo) -> str:
    """A shape as readers write it.

    >>> shape_text(TensorInfo("a", "F32", (2, 3), "model.safetensors", 0, 24))
    '2x3'
    """
    return "x".join(map(str, tensor.shape)) or "a single number"
