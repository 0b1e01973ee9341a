"""How the parents relate, layer by layer, and when a merge of them means little. Not here: measuring it (engine)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from merger.checkpoints.architecture import Architecture
from merger.errors import few
from merger.plan.geometry import Geometry, total
from merger.plan.jobs import Job
from merger.plan.locked import LockedModel
from merger.plan.plan import Plan
from merger.plan.products import Factor

_ALIKE, _OPPOSED, _STRANGERS = 0.9999, -0.3, 0.2
"""Cosines: of parents that are the same; of deltas that undo each other; of whole tensors without a common ancestor.

Fine-tunes of one base have tensors of a cosine above 0.9, and deltas of 0 to 0.6; tensors that were initialised apart
are orthogonal.
"""


@dataclass(frozen=True)
class Relation:
    """A row of the card's table: a layer, or all that lies outside of the layers.

    Args:
        where: ``layer 3``, or what the tensors outside have in common.
        cosine: the mean cosine over the pairs of inputs; None where there are no two that are not zero.
        opposition: the share of entries in which the inputs have both signs.
        norms: the inputs' norms, each as a share of the largest.
        kept: the result's norm as a share of the largest of the inputs.
    """

    where: str
    cosine: float | None
    opposition: float
    norms: tuple[float, ...]
    kept: float


@dataclass(frozen=True)
class Loss:
    """How much of the matrices of a layer, or of all, an adapter of few directions leaves out.

    Args:
        where: ``layer 3``, what the matrices outside have in common, or ``all``.
        error: the norm of what is left out, as a share of the whole's.
    """

    where: str
    error: float


@dataclass(frozen=True)
class Relations:
    """What was seen of the parents: in all, by layer, and what speaks against merging them.

    `losses`: of an adapter what it leaves out, in all and by layer.
    """

    overall: tuple[Relation, ...]
    layers: tuple[Relation, ...]
    doubts: tuple[str, ...]
    losses: tuple[Loss, ...] = ()


def relations(planned: Plan, seen: Mapping[str, Geometry]) -> Relations:
    """The rows and doubts of what was measured, from each output tensor's geometry by name.

    Tensors with other parents than the rest (by a filter or a slice) are counted apart.
    """
    jobs = [job for job in planned.jobs if job.name in seen and len(job.inputs) > 1]
    architecture = Architecture([job.name for job in planned.jobs], planned.config)
    overall, layers, doubts = [], [], []
    for parents in sorted({_parents(job) for job in jobs}):
        numbers, subtracted = parents
        names = [planned.locked.numbered(number).name for number in numbers]
        mine = [job for job in jobs if _parents(job) == parents]
        whole = total(seen[job.name] for job in mine)
        overall.append(_relation(" and ".join(names), whole))
        doubts += _doubts(names, whole, subtracted)
        by_layer: dict[int, list[Geometry]] = {}
        for job in mine:
            by_layer.setdefault(_layer(architecture, job.name), []).append(seen[job.name])
        for layer, parts in sorted(by_layer.items()):
            layers.append(_relation(_named(layer), total(parts)))
    doubts += _odd(planned, seen)
    return Relations(tuple(overall), tuple(layers), tuple(dict.fromkeys(doubts)), _losses(planned, seen, architecture))


def _odd(planned: Plan, seen: Mapping[str, Geometry]) -> Iterator[str]:
    """For each model whose entries are not all finite: how many are not, in which of the result's tensors."""
    for number, model in enumerate(planned.locked.models):
        counts = {name: count for name, found in seen.items() for one, count in found.odd if one == number}
        if counts:
            each = few([f"{name} ({count:,})" for name, count in counts.items()])
            entries = "entry is" if sum(counts.values()) == 1 else "entries are"
            yield f"{sum(counts.values()):,} of {model.name}'s {entries} NaN or infinite, in {each}"


def _named(layer: int) -> str:
    return f"layer {layer}" if layer >= 0 else "outside of the layers"


def _losses(planned: Plan, seen: Mapping[str, Geometry], architecture: Architecture) -> tuple[Loss, ...]:
    """What was seen while matrices were taken apart: each matrix once, with the first of the two it becomes."""
    by_layer: dict[int, list[Geometry]] = {}
    for job in planned.jobs:
        source = job.inputs[0].source
        if isinstance(source, Factor) and source.part == "A" and job.name in seen:
            by_layer.setdefault(_layer(architecture, job.name), []).append(seen[job.name])
    rows = [Loss(_named(layer), _left_out(parts)) for layer, parts in sorted(by_layer.items())]
    everything = [part for parts in by_layer.values() for part in parts]
    return (Loss("all", _left_out(everything)), *rows) if everything else ()


def _left_out(parts: Sequence[Geometry]) -> float:
    (square, kept), _ = total(parts).products
    return math.sqrt(max(0.0, 1.0 - kept / square)) if square > 0 else 0.0


def _parents(job: Job) -> tuple[tuple[int, ...], bool]:
    """The models that a method was given, and whether as what they differ from a base."""
    return tuple(entry.model for entry in job.inputs), job.base is not None


def _layer(architecture: Architecture, name: str) -> int:
    layer = architecture.place(name).layer
    return -1 if layer is None else layer


def _relation(where: str, seen: Geometry) -> Relation:
    cosines, norms = seen.cosines(), [seen.norm(place) for place in range(seen.inputs)]
    largest = max(norms) or 1.0
    mean = sum(cosines) / len(cosines) if cosines else None
    return Relation(where, mean, seen.opposition(), tuple(norm / largest for norm in norms), seen.norm(-1) / largest)


def _doubts(names: Sequence[str], seen: Geometry, subtracted: bool) -> list[str]:
    """Sentences; none for ordinary fine-tunes of one base."""
    still = [name for place, name in enumerate(names) if seen.norm(place) == 0]
    found = [f"{name} is the base model, bit for bit: it adds nothing" for name in still if subtracted]
    for one in range(len(names)):
        for other in range(one):
            cosine, pair = seen.cosine(one, other), f"{names[other]} and {names[one]}"
            if cosine is None:
                continue
            if cosine > _ALIKE:
                found.append(f"{pair} are as good as the same (cosine {cosine:.4f}): their merge is either of them")
            elif subtracted and cosine < _OPPOSED:
                found.append(f"{pair} moved away from the base in opposite directions (cosine {cosine:.2f}): "
                             "their merge undoes both")  # fmt: skip
            elif not subtracted and cosine < _STRANGERS:
                found.append(f"{pair} have no ancestor in common (cosine {cosine:.2f} of their tensors): "
                             "their mean is neither of them")  # fmt: skip
    return found


def warnings(planned: Plan) -> list[str]:
    """What is to be said of the models before a tensor is read."""
    located = [model.located for model in planned.locked.models]
    moved = [f"{each.moved} is now {each.where}" for each in located if each.moved]
    return [*dict.fromkeys(moved), *same_models(planned), *strange_adapters(planned)]


def same_models(planned: Plan) -> list[str]:
    """What can be doubted before a tensor is read: models of the recipe that are one and the same."""
    found: dict[object, str] = {}
    doubts = []
    for model in planned.locked.models:
        files = {tensor.file: model.located.files[tensor.file].sha256 for tensor in model.checkpoint.tensors.values()}
        known = None not in files.values()
        own: object = frozenset(files.values()) if known else (model.located.where, model.located.commit)
        identity = (own, None if model.adapter is None else model.adapter.located)
        if identity in found:
            doubts.append(f"{found[identity]} and {model.name} are the same model")
        found.setdefault(identity, model.name)
    return doubts


def strange_adapters(planned: Plan) -> list[str]:
    """Adapters that are added to another model than the one that they name as theirs, or merged with strangers."""
    if planned.locked.recipe.merges_adapters:
        trained = dict.fromkeys(model.lora.model for model in planned.locked.models if model.lora is not None)
        on = [name for name in trained if name is not None]
        return [f"the adapters were trained on different models: {', '.join(on)}"] if len(on) > 1 else []
    found: dict[str, None] = {}
    for model in planned.locked.models:
        named = model.adapter.lora.model if model.adapter is not None and model.adapter.lora is not None else None
        if model.adapter is not None and named and not _means(named, model):
            what = f"{model.adapter.name} was trained on {named}, and the recipe adds it to {model.located.name}"
            found[what] = None
    return list(found)


def _means(named: str, model: LockedModel) -> bool:
    """Whether an adapter's config speaks of this model: by its repo id, or where either is a folder, its last part."""
    on_hub = model.located.commit is not None and named.count("/") == 1 and not named.startswith((".", "/"))
    theirs, ours = named.lower().rstrip("/"), (model.ref.path if on_hub else model.located.name).lower()
    return theirs == ours if on_hub else theirs.split("/")[-1] == ours.split("/")[-1]
