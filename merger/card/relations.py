"""How the parents relate, layer by layer, which parameters are in force where, and when a merge of them means little.

Not here: measuring it (engine).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from merger.errors import few
from merger.lock.locked import display_name
from merger.methods.registry import Method
from merger.models.architecture import Architecture
from merger.planning.geometry import Geometry, add_up, cosine_of, total_geometry
from merger.planning.inputs.base import Job
from merger.planning.inputs.low_rank import Factor
from merger.planning.plan import Plan

_ALIKE, _OPPOSED, _STRANGERS = 0.9999, -0.3, 0.2
"""Cosines: of deltas that are the same; of deltas that undo each other; of matrices without a common ancestor.

Matrices of fine-tunes and their base have a cosine above 0.9 (the zoo's: 0.989 and 0.992, and 0.982 with each other),
those that were initialised apart one of 0.00. Deltas of two tasks lie between 0 and 0.6 (the zoo's: 0.09).
"""

_UNEQUAL, _SCALED = 20.0, 1.5
"""How many times as large the deltas of one parent may be as another's, and its tensors. Fine-tuning by instructions
moves entries by 0.002 at most (arXiv 2311.03099); tensors of relatives differ by 5 %."""

_SAME = 1e-12
"""Of the squared norm: what lies between two that differ in the last bit of a single number in bfloat16 is more."""


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

    overall: tuple[Relation, ...] = ()
    layers: tuple[Relation, ...] = ()
    doubts: tuple[str, ...] = ()
    losses: tuple[Loss, ...] = ()


def relations(planned: Plan, seen: Mapping[str, Geometry]) -> Relations:
    """The rows and doubts of what was measured, from each output tensor's geometry by name.

    Tensors with other parents than the rest (by a filter or a slice) are counted apart.
    """
    jobs = [job for job in planned.jobs if job.name in seen and len(job.sources) > 1]
    architecture = Architecture([job.name for job in planned.jobs], planned.config)
    overall, layers, doubts = [], [], []
    for parents in sorted({_parents(job) for job in jobs}):
        names, base = ([planned.locked.numbered(number).name for number in numbers] for numbers in parents)
        mine = [job for job in jobs if _parents(job) == parents]
        if matrices := [seen[job.name] for job in mine if job.is_compared]:
            doubts += _doubts(names, total_geometry(matrices), *base)
        if len(names) == 1:
            continue
        overall.append(_relation(" and ".join(names), total_geometry(seen[job.name] for job in mine)))
        layers += [_relation(where, total_geometry(parts)) for where, parts in _by_layer(architecture, mine, seen)]
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


def _by_layer(
    architecture: Architecture, jobs: Iterable[Job], seen: Mapping[str, Geometry]
) -> Iterator[tuple[str, list[Geometry]]]:
    """What was seen of the tensors of each layer, from the first to the last; of what is outside of them before."""
    found: dict[int, list[Geometry]] = {}
    for job in jobs:
        layer = architecture.place(job.name).layer
        found.setdefault(-1 if layer is None else layer, []).append(seen[job.name])
    for layer, parts in sorted(found.items()):
        yield f"layer {layer}" if layer >= 0 else "outside of the layers", parts


def _losses(planned: Plan, seen: Mapping[str, Geometry], architecture: Architecture) -> tuple[Loss, ...]:
    """What was seen while matrices were taken apart: each matrix once, with the first of the two it becomes."""
    sources = [(job, job.inputs[0].source) for job in planned.jobs if job.name in seen]
    jobs = [job for job, source in sources if isinstance(source, Factor) and source.part == "A"]
    rows = [Loss(where, _left_out(parts)) for where, parts in _by_layer(architecture, jobs, seen)]
    return (Loss("all", _left_out([seen[job.name] for job in jobs])), *rows) if jobs else ()


def _left_out(parts: Sequence[Geometry]) -> float:
    (square, kept), _ = total_geometry(parts).products
    return math.sqrt(max(0.0, 1.0 - kept / square)) if square > 0 else 0.0


def _parents(job: Job) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The models that a method was given, and the base that was subtracted from each, if one was."""
    return tuple(entry.model for entry in job.inputs), () if job.base is None else (job.base.model,)


def _relation(where: str, seen: Geometry) -> Relation:
    cosines, norms = seen.cosines(), [seen.norm(place) for place in range(seen.inputs)]
    largest = max(norms) or 1.0
    mean = sum(cosines) / len(cosines) if cosines else None
    return Relation(where, mean, seen.opposition(), tuple(norm / largest for norm in norms), seen.norm(-1) / largest)


def _doubts(names: Sequence[str], seen: Geometry, base: str | None = None) -> list[str]:
    """Sentences; none for ordinary fine-tunes of one base.

    Args:
        names: the parents'.
        seen: of their matrices.
        base: the name of what was subtracted from each, if anything was.
    """
    still = [place for place in range(seen.inputs) if seen.norm(place) == 0]
    found = [f"{names[place]} is the base model in all that was compared: it adds nothing" for place in still if base]
    strange = {place: cosine for place in range(seen.inputs) if (cosine := seen.base_cosine(place)) < _STRANGERS}
    if strange:
        who, verb = " and ".join(names[place] for place in strange), "has" if len(strange) == 1 else "have"
        found.append(f"{who} {verb} no ancestor in common with the base model {base} (cosine "
                     f"{max(strange.values()):z.2f}): what they differ by means nothing")  # fmt: skip
    rest = [place for place in range(seen.inputs) if place not in (*still, *strange)]
    told: dict[str, list[str]] = {}
    for one, other in ((one, other) for one in rest for other in rest if other < one):
        for number, words in _doubts_of_two(seen, one, other, base is not None):
            told.setdefault(words, []).append(f"{names[other]} and {names[one]} ({number})")
    return found + [f"{few(pairs)} {words}" for words, pairs in told.items()]


def _doubts_of_two(seen: Geometry, one: int, other: int, subtracted: bool) -> Iterator[tuple[str, str]]:
    """A number, and what it says of the two."""
    cosine, sizes = seen.cosine(one, other) or 0.0, sorted((seen.norm(one), seen.norm(other)))
    apart, ratio = sizes[0] ** 2 + sizes[1] ** 2 - 2 * cosine * sizes[0] * sizes[1], sizes[1] / sizes[0]
    if cosine > _ALIKE if subtracted else apart < _SAME * sizes[1] ** 2:
        yield f"cosine {cosine:.4f}", "are as good as the same: their merge is either of them"
    elif subtracted and cosine < _OPPOSED:
        yield f"cosine {cosine:.2f}", "moved away from the base in opposite directions: their merge undoes both"
    elif not subtracted and cosine < _STRANGERS:
        yield f"cosine {cosine:z.2f}", "have no ancestor in common: their mean is neither of them"
    elif subtracted and ratio > _UNEQUAL:
        yield f"{ratio:.0f} times", "changed the base by very unequal amounts: the merge is close to one of them"
    elif not subtracted and ratio > _SCALED:
        yield f"{ratio:.1f} times", "are of unequal size, as no fine-tunes of one model are: the larger one prevails"


Layer = tuple[str, int]
"""A stack's name and a layer of it; `OUTSIDE` for what is in no stack."""

OUTSIDE: Layer = ("", -1)
_KINDS_SHOWN = 3


@dataclass(frozen=True)
class Apart:
    """Sums over tensors that say how far the result lies from a parent; of the base there is only a distance.

    Args:
        between: the squared norm of what lies between the parent's tensors and the result's.
        whole: the squared norm of the parent's tensors.
        along: the inner product of what the method was given of the parent with what it made.
        given, made: the squared norms of these two.
        against: in how many entries they have opposite signs, of `moved` that are not zero.
    """

    between: float = 0.0
    whole: float = 0.0
    along: float = 0.0
    given: float = 0.0
    made: float = 0.0
    against: int = 0
    moved: int = 0

    @property
    def distance(self) -> float | None:
        """The norm of what lies between them as a share of the parent's."""
        return math.sqrt(self.between / self.whole) if self.whole > 0 else None

    @property
    def cosine(self) -> float | None:
        """Of the angle between what was given and what was made."""
        return cosine_of(self.along, self.given, self.made)

    @property
    def conflict(self) -> float | None:
        """The share of the parent's entries against whose sign the result went."""
        return self.against / self.moved if self.moved else None


def _apart(seen: Geometry, place: int) -> Apart:
    """A tensor of which the parent is the input of this number."""
    row, made = seen.products[place], seen.products[-1][-1]
    between = max(0.0, row[place] - 2 * row[-1] + made)
    return Apart(between, seen.whole(place), row[-1], row[place], made, seen.against[place], seen.moved[place])


@dataclass(frozen=True)
class Track:
    """How far the merge is from one parent, in each layer that was made of it."""

    parent: str
    layers: Mapping[Layer, Apart]


def tracks(planned: Plan, seen: Mapping[str, Geometry]) -> list[Track]:
    """Each parent's and stage's, in the recipe's order, from each output tensor's geometry; a mixture has none."""
    if planned.locked.recipe.mixture is not None:
        return []
    architecture = Architecture([job.name for job in planned.jobs], planned.config)
    found: list[dict[Layer, list[Apart]]] = [{} for _ in planned.locked.all]
    for job in planned.jobs:
        if geometry := seen.get(job.name):
            layer = layer_of(architecture, job.name)
            for place, entry in enumerate(job.inputs):
                found[entry.model].setdefault(layer, []).append(_apart(geometry, place))
            if job.base is not None and geometry.base:
                of_base = Apart(geometry.products[-1][-1], geometry.base[-1])
                found[job.base.model].setdefault(layer, []).append(of_base)
    pairs = zip(planned.locked.all, found, strict=True)
    return [
        Track(display_name(model), {layer: add_up(parts) for layer, parts in layers.items()})
        for model, layers in pairs
        if layers
    ]


def layer_of(architecture: Architecture, name: str) -> Layer:
    """Where an output tensor belongs."""
    place = architecture.place(name)
    return OUTSIDE if place.stack is None or place.layer is None else (place.stack, place.layer)


@dataclass(frozen=True)
class Line:
    """The values of a parameter, for kinds of tensors that have the same ones throughout.

    Args:
        owner: the parent that it is for; empty where it is for all.
        kinds: which kinds of tensors; empty where it is for all.
        values: by layer.
    """

    owner: str
    kinds: str
    values: Mapping[Layer, float]

    @property
    def label(self) -> str:
        """Both in words."""
        return ": ".join(part for part in (self.owner, self.kinds) if part) or "all tensors"


@dataclass(frozen=True)
class Parameter:
    """A parameter as it is in force for each tensor.

    Args:
        name: as recipes write it.
        lines: its values.
        words: where it is one number, or one for each parent: that, as text.
        is_flag: whether it is true or false.
    """

    name: str
    lines: tuple[Line, ...]
    words: str | None
    is_flag: bool = False

    @property
    def owners(self) -> list[str]:
        """Those that it has values for; empty is for all."""
        return list(dict.fromkeys(line.owner for line in self.lines))

    def course(self, owner: str) -> str:
        """The value in force for a parent, or where it turns from the first layer to the last; empty: it has none."""
        lines = [line for line in self.lines if line.owner == owner]
        if len(lines) > _KINDS_SHOWN:
            values = [value for line in lines for value in line.values.values()]
            return f"{_number(min(values), self.is_flag)} … {_number(max(values), self.is_flag)}, by kind of tensor"
        courses = [" to ".join(_number(value, self.is_flag) for value in _turns(line)) for line in lines]
        return "; ".join(
            f"{course} ({line.kinds})" if line.kinds else course for course, line in zip(courses, lines, strict=True)
        )


def _turns(line: Line) -> list[float]:
    """The values at which a line begins, turns and ends."""
    found: list[float] = []
    for _, value in sorted(line.values.items()):
        if found and value == found[-1]:
            continue
        if len(found) > 1 and (found[-1] - found[-2]) * (value - found[-1]) > 0:
            found.pop()
        found.append(value)
    return found


_Kinds = dict[str, dict[Layer, float]]
"""The values by kind of tensor and layer."""


def parameters(planned: Plan, table: Mapping[str, Method]) -> list[Parameter]:
    """Each parameter of the methods that are in force, in the order of the methods' own; a mixture has none."""
    if planned.locked.recipe.mixture is not None:
        return []
    used = [table[name] for name in dict.fromkeys(job.method for job in planned.jobs if not job.is_copy)]
    flags = {param.name: param.kind == "bool" for method in used for param in method.params}
    values = _values(planned)
    return [_parameter(name, values[name], is_flag) for name, is_flag in flags.items() if name in values]


def _values(planned: Plan) -> dict[str, dict[str, _Kinds]]:
    """By parameter and parent; what holds for all parents stands under no name."""
    architecture = Architecture([job.name for job in planned.jobs], planned.config)
    names = [display_name(model) for model in planned.locked.all]
    found: dict[str, dict[str, _Kinds]] = {}
    for job in planned.jobs:
        if job.is_copy:
            continue
        layer, kind = layer_of(architecture, job.name), architecture.place(job.name).role.removesuffix(".weight")
        for owner, settings in (("", job.settings), *((names[entry.model], entry.settings) for entry in job.inputs)):
            for name, value in settings.items():
                found.setdefault(name, {}).setdefault(owner, {}).setdefault(kind, {})[layer] = value
    return found


def _parameter(name: str, owners: Mapping[str, _Kinds], is_flag: bool) -> Parameter:
    single = {owner: _single(kinds) for owner, kinds in owners.items()}
    lines = tuple(line for owner, kinds in owners.items() for line in _lines(owner, kinds))
    constant = {owner: _number(value, is_flag) for owner, value in single.items() if value is not None}
    return Parameter(name, lines, _words(constant) if len(constant) == len(owners) else None, is_flag)


def _single(kinds: _Kinds) -> float | None:
    """The one value, if there is but one."""
    values = {value for series in kinds.values() for value in series.values()}
    return values.pop() if len(values) == 1 else None


def _number(value: float, is_flag: bool) -> str:
    return str(bool(value)).lower() if is_flag else f"{value:.6g}"


def _words(values: Mapping[str, str]) -> str:
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    return ", ".join(f"{value} for {owner}" for owner, value in values.items())


def _lines(owner: str, kinds: _Kinds) -> list[Line]:
    """One for all kinds of tensors with the same values; what lies outside of the layers joins a line that it fits."""
    groups: dict[tuple[tuple[Layer, float], ...], list[str]] = {}
    for kind, series in kinds.items():
        groups.setdefault(tuple(sorted(series.items())), []).append(kind)
    inside = [kind for kind, series in kinds.items() if OUTSIDE not in series]
    lines, outside = list[Line](), list[Line]()
    for values, group in groups.items():
        if values[0][0] == OUTSIDE:
            outside.append(Line(owner, _shorten_names(group, [] if inside else group), dict(values)))
        else:
            lines.append(Line(owner, _shorten_names(group, inside), dict(values)))
    for line in outside:
        _join(lines, line)
    return lines


def _join(lines: list[Line], outside: Line) -> None:
    """Gradients hold their first value outside of the layers."""
    for number, line in enumerate(lines):
        if OUTSIDE not in line.values and line.values[min(line.values)] == outside.values[OUTSIDE]:
            lines[number] = replace(line, values={**outside.values, **line.values})
            return
    lines.append(outside)


def _shorten_names(group: Sequence[str], everyone: Sequence[str]) -> str:
    """Their names, or the first part of them for kinds of which none is missing; nothing for all."""
    if len(group) == len(everyone):
        return ""
    words: list[str] = []
    for stem in dict.fromkeys(kind.split(".")[0] for kind in group):
        mine = [kind for kind in group if kind.split(".")[0] == stem]
        complete = len(mine) == sum(kind.split(".")[0] == stem for kind in everyone)
        words += [stem] if complete else mine
    more = f" and {len(words) - _KINDS_SHOWN + 1} more"
    return ", ".join(words) if len(words) <= _KINDS_SHOWN else ", ".join(words[: _KINDS_SHOWN - 1]) + more
