"""What was measured of models, for the methods that ask for it: whether it is of these models, and where it lies.

Not here: what a lock of statistics says (lock.statistics), and measuring (statistics).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from merger.errors import Problem
from merger.lock.parents import Checksum, changed_files
from merger.lock.statistics import statistic_name, statistic_shape
from merger.methods.registry import Method
from merger.models.checkpoint import TensorInfo
from merger.planning.inputs.base import Stored
from merger.planning.slices import Segment
from merger.planning.stage_model import StagedRecipe, StageModel
from merger.recipe.model import ModelRef


def other_statistics(locked: StagedRecipe, table: Mapping[str, Method], checksum: Checksum) -> list[Problem]:
    """Statistics that are not of the models that they stand beside, or not what the method asks for.

    Args:
        locked: the recipe and its models.
        table: the merge methods by name.
        checksum: finds out the SHA-256 of a file in a folder by reading it; None: only sizes are compared there.
    """
    asked = (
        (piece.method, source.model, source.statistics)
        for document in locked.recipe.documents
        for piece in document.slices
        for source in piece.sources
        if table[piece.method].statistics is not None and source.statistics is not None
    )
    return [
        Problem(what, statistics.at, f"models[{model}].statistics", hint)
        for method, model, statistics in dict.fromkeys(asked)
        for what, hint in _doubts(locked, table[method], model, statistics, checksum)
    ]


def _doubts(
    locked: StagedRecipe, method: Method, ref: ModelRef, statistics: ModelRef, checksum: Checksum
) -> Iterator[tuple[str, str]]:
    model, measured = locked.model(ref), locked.model(statistics)
    said, again = measured.statistics, f"measure this model: merger measure {ref} --kind {method.statistics}"
    assert said is not None
    parents = [each for each in (model, model.adapter) if each is not None]
    if isinstance(model, StageModel):
        yield f"{ref} is made on the way, and nothing was measured of it", "make it first, and measure it"
    elif said.kind != method.statistics:
        yield f"{method.name} asks for {method.statistics}, and {measured.name} holds {said.kind}", again
    elif len(said.models) != len(parents):
        yield f"{measured.name} is of {' + '.join(each.model for each in said.models)}, not of {model.name}", again
    else:
        for parent, of in zip(parents, said.models, strict=True):
            others = changed_files(parent.located, of.files, checksum)
            for name, what in list(others.items())[:1]:
                yield f"{measured.name} was measured of another model, {of.model}: {parent.name}'s {name} {what}", again


def statistics_of(
    locked: StagedRecipe, method: Method, parts: Sequence[tuple[Segment, TensorInfo, tuple[int, ...]]]
) -> tuple[list[Stored | None], Iterator[tuple[Segment, str]]]:
    """What was measured of these tensors, and what is wrong with that.

    Args:
        locked: the recipe and its models.
        method: what asks for it; of one that asks for nothing nothing is found.
        parts: the models, each with its tensor and that one's shape as the method is handed it.
    """
    kind = method.statistics
    if kind is None:
        return [None] * len(parts), iter(())
    found = [_measured(locked, kind, part, tensor) for part, tensor, _ in parts]
    return found, _misfits(kind, parts, found)


def _measured(locked: StagedRecipe, kind: str, part: Segment, tensor: TensorInfo) -> Stored | None:
    if part.source.statistics is None:
        return None
    number, name = locked.index(part.source.statistics), part.model.matched.get(tensor.name, tensor.name)
    held = locked.numbered(number).checkpoint.tensors.get(statistic_name(kind, name))
    return None if held is None else Stored(number, held)


def _misfits(
    kind: str, parts: Sequence[tuple[Segment, TensorInfo, tuple[int, ...]]], held: Sequence[Stored | None]
) -> Iterator[tuple[Segment, str]]:
    """Fisher information is of every tensor; of inputs something is measured for all models or for none.

    Gram matrices in blocks are in blocks of one size for all models.
    """
    wanted = kind == "fisher" or any(tensor is not None for tensor in held)
    like = next((tensor.shape[-1] for tensor in held if tensor is not None and len(tensor.shape) == 3), None)
    for (part, tensor, shape), found in zip(parts, held, strict=True):
        if found is None and wanted:
            yield part, f"{part.source.statistics} holds nothing of {tensor.name}"
        elif found is not None and found.shape != (asked := statistic_shape(kind, shape, like)):
            where = f"{found.tensor.name} in {part.source.statistics}"
            yield part, f"{where} has the shape {found.shape}, and {asked} is asked for"
