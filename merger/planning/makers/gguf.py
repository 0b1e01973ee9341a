"""The GGUF files beside each shard, made of the same blocks: what they hold, before a tensor's byte is read.

Several shards give the parts of one model, as llama.cpp splits it. Not here: the format (models), writing (engine).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from operator import attrgetter
from typing import Any

from merger.errors import Problem, RecipeError
from merger.lock.locked import stated_licence
from merger.models.checkpoint import FLOATS
from merger.models.gguf.families import GgufModel, stack_of
from merger.models.gguf.layout import ENDING, KINDS, GgufFile, GgufTensor, Value, encode, encode_part
from merger.models.gguf.tokens import FILES, describe_tokens
from merger.planning.inputs.base import Job
from merger.planning.stage_model import StagedRecipe, Texts


def gguf_files(
    locked: StagedRecipe, shards: Sequence[Sequence[Job]], config: Mapping[str, Any], small: Texts
) -> list[tuple[GgufFile, ...]]:
    """For each shard the files that are written beside it.

    Args:
        shards: the jobs of each shard, in its order.

    Raises:
        RecipeError: no GGUF is made of such a model.
    """
    publish = locked.recipe.publish
    if not publish.gguf:
        return [() for _ in shards]
    try:
        return _Files(locked, shards, config, small).each()
    except RecipeError as error:
        raise RecipeError(
            [replace(each, at=publish.gguf_at, where="publish.gguf") for each in error.problems]
        ) from None


def stacks(locked: StagedRecipe, jobs: Sequence[Job]) -> list[list[Job]]:
    """The jobs in groups that no file may part: for GGUF those of all experts of a layer, else each its own."""
    if not locked.recipe.publish.gguf:
        return [[job] for job in jobs]
    found: dict[str, list[Job]] = {}
    for job in jobs:
        found.setdefault(stack_of(job.name)[0], []).append(job)
    return [sorted(group, key=lambda job: stack_of(job.name)) for group in found.values()]


class _Files:
    def __init__(
        self, locked: StagedRecipe, shards: Sequence[Sequence[Job]], config: Mapping[str, Any], small: Texts
    ) -> None:
        if locked.recipe.lora is not None:
            raise RecipeError(
                Problem("no GGUF is made of an adapter", hint="merge it into its model, or leave gguf out")
            )
        self._locked, self._shards = locked, shards
        self._model = GgufModel(config)
        self._pairs = [encode(*pair) for pair in {**self._general(), **_tokens(locked, config, small)}.items()]

    def each(self) -> list[tuple[GgufFile, ...]]:
        kinds = self._locked.recipe.publish.gguf
        held = {kind: [self._tensors(kind, number) for number in range(len(self._shards))] for kind in kinds}
        return [tuple(self._file(kind, number, held[kind]) for kind in kinds) for number in range(len(self._shards))]

    def _general(self) -> dict[str, Value]:
        """What the model is called and made of, and what llama.cpp has to know of it."""
        recipe, models = self._locked.recipe, [model for model in self._locked.merged if model.located.commit]
        found: dict[str, Value] = {"general.type": "model", "general.name": recipe.name or _stem(self._locked)}
        if licence := recipe.publish.license or stated_licence(self._locked.config_owner.card):
            found["general.license"] = str(licence)
        found["general.base_model.count"] = len(models)
        for number, model in enumerate(models):
            owner, _, name = model.located.name.rpartition("/")
            for key, text in (("name", name), ("organization", owner), ("version", str(model.located.commit))):
                found[f"general.base_model.{number}.{key}"] = text
        return {**self._model.settings(), **found, "general.quantization_version": 2}

    def _tensors(self, kind: str, number: int) -> list[GgufTensor]:
        parts = (self._tensor(job, kind) for job in self._shards[number])
        made = groupby((part for part in parts if part is not None), attrgetter("name"))
        stacked = [self._model.stack(list(group)) for _, group in made]
        return [*stacked, *(self._model.rope.tensors() if number == 0 else ())]

    def _tensor(self, job: Job, kind: str) -> GgufTensor | None:
        found = self._model.tensor(job.name, job.shape, kind)
        if found is not None and job.dtype not in FLOATS:
            raise RecipeError(Problem(f"no GGUF is made of {job.name} in {job.dtype}", hint="give the recipe a dtype"))
        return found

    def _file(self, kind: str, number: int, tensors: Sequence[Sequence[GgufTensor]]) -> GgufFile:
        """A part has the whole metadata where it is the first one; each counts the tensors of all."""
        count, stem = len(self._shards), f"{_stem(self._locked)}-{kind}"
        said = encode("general.file_type", KINDS[kind].file_type)
        pairs = [*self._pairs, said] if number == 0 else []
        if count > 1:
            pairs += encode_part(number, count, sum(map(len, tensors)))
            stem += f"-{number + 1:05d}-of-{count:05d}"
        return GgufFile(f"{stem}{ENDING}", kind, tuple(pairs), tuple(tensors[number]))


def _stem(locked: StagedRecipe) -> str:
    """The repo's name, where the recipe names one; of a model that is only converted, the model's."""
    repo = locked.recipe.publish.repo or (locked.config_owner.located.name if locked.recipe.is_conversion else "model")
    return re.sub(r"[^\w.-]", "-", repo.rpartition("/")[2].removesuffix(ENDING))


def _tokens(locked: StagedRecipe, config: Mapping[str, Any], small: Texts) -> dict[str, Value]:
    """The tokenizer that the result has."""
    held = {name: locked.numbered(number).texts for name, number in small.taken.items() if name in FILES}
    files = {name: texts[name] for name, texts in held.items() if name in texts}
    edited = small.edit({name: files[name] for name in small.changing if name in files})
    return describe_tokens(files | {name: text for name, text in edited.items() if name in FILES}, config)
