"""The stages of a recipe of several documents: each planned like a recipe, and then a model of the documents after it.

Not here: the order of the documents (recipe.stages), and computing a stage's tensors (engine).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from merger.lock.locked import LockedRecipe
from merger.methods.registry import Method
from merger.models.checkpoint import Checkpoint, TensorInfo
from merger.planning.inputs.base import PASSTHROUGH, Job, Operand
from merger.planning.inputs.derived import Mean
from merger.planning.jobs.make import make_jobs
from merger.planning.makers.side_files import texts
from merger.planning.stage_model import StagedRecipe, StageModel
from merger.planning.unused_tensors import config
from merger.recipe.model import ModelRef


def with_stages(found: LockedRecipe, table: Mapping[str, Method], seed: int | None) -> StagedRecipe:
    """The recipe with all its stages as models.

    Args:
        found: the recipe and the models of all its documents.
        seed: in place of each document's own.

    Raises:
        RecipeError, MismatchError: as for a recipe of one document.
    """
    locked = StagedRecipe(found.recipe, found.models, found.templates)
    for recipe in locked.recipe.stages:
        document = replace(locked, recipe=recipe)
        making = make_jobs(document, table)
        small = texts(document, making.tokens)
        jobs = {job.name: job if recipe.mean_of is None else _as_mean(job) for job in making.jobs}
        tensors = {name: TensorInfo(job.name, job.dtype, job.shape, "", 0, job.nbytes) for name, job in jobs.items()}
        models = {name: document.numbered(number) for name, number in small.taken.items()}
        known = {name: model.texts[name] for name, model in models.items() if name in model.texts}
        stage = StageModel(
            ModelRef(recipe.name or "", at=recipe.name_at),
            document.config_owner.located,
            Checkpoint(tensors, config(document, making)),
            document.config_owner.card,
            small.edit(known),
            locked=document,
            jobs=jobs,
            reasons=making.reasons,
            giver=making.prediction,
            small=small,
            seed=recipe.seed if seed is None else seed,
        )
        locked = replace(locked, stages=(*locked.stages, stage))
    return locked


def _as_mean(job: Job) -> Job:
    """The job with one input, which adds up all that there were, in their order; one that copies stays."""
    if job.method == PASSTHROUGH:
        return job
    weights = [operand.settings["weight"] for operand in job.inputs]
    made = Mean(job.sources, tuple(weight / math.fsum(weights) for weight in weights))
    return replace(job, method=PASSTHROUGH, inputs=(Operand(made, {"scale": 1.0}),), settings={})
