"""The result's files in eight bits: what of each is brought to them, before a tensor's byte is read.

Not here: the format (models.formats.fp8), rounding (engine).
"""

from __future__ import annotations

from collections.abc import Sequence

from merger.errors import Problem, RecipeError
from merger.models.config import is_diffusion
from merger.models.formats.fp8 import Fp8Tensor, fp8_tensor
from merger.models.lora.changes import TRANSPOSED_MODELS
from merger.planning.inputs.base import Job
from merger.planning.stage_model import StagedRecipe


def fp8_tensors(locked: StagedRecipe, jobs: Sequence[Job]) -> dict[str, Fp8Tensor]:
    """What becomes of each tensor of the result, by its name; nothing where the recipe asks for no such files.

    Raises:
        RecipeError: no such files are made of such a model.
    """
    publish, config = locked.recipe.publish, locked.config_model.checkpoint.config
    if publish.fp8 is None:
        return {}
    found = {job.name: fp8_tensor(job, publish.fp8) for job in jobs}
    why = {
        "an adapter": locked.recipe.lora is not None,
        "a model without config.json": not config,
        "a diffusion model": is_diffusion(config),
        "a model whose matrices have their inputs first": config.get("model_type") in TRANSPOSED_MODELS,
        "a model none of whose layers has a matrix that fits": not any(tensor.kind for tensor in found.values()),
    }
    if told := next((what for what, holds in why.items() if holds), None):
        what = f"fp8 is not made of {told}"
        raise RecipeError(Problem(what, publish.fp8_at, "publish.fp8", "leave fp8 out"))
    return found


def describe_fp8(tensors: Sequence[Fp8Tensor]) -> str:
    """A sentence on what is brought to eight bits and what is not."""
    kinds = {tensor.kind for tensor in tensors if tensor.kind}
    matrices = [tensor for tensor in tensors if len(tensor.shape) > 1]
    kept = len(matrices) - (count := sum(tensor.kind is not None for tensor in matrices))
    return f"fp8: {count} matrices with a scale a {', '.join(kinds)}; {kept} others and all vectors stay as they are"
