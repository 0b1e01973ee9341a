"""What the plots show, in numbers: each parameter and each parent's distance, layer by layer.

Not here: measuring (engine), the table of how the parents relate (relations), and drawing (plots).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from merger.card.lineage import shown
from merger.checkpoints.architecture import Architecture
from merger.methods.registry import Method
from merger.plan.geometry import Geometry
from merger.plan.plan import Plan

Layer = tuple[str, int]
"""A stack's name and a layer of it; `OUTSIDE` for what is in no stack."""

OUTSIDE: Layer = ("", -1)
_KINDS_SHOWN = 3


@dataclass
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

    def add(self, seen: Geometry, place: int) -> None:
        """One more tensor, of which the parent is the input of this number."""
        row, made = seen.products[place], seen.products[-1][-1]
        self.between += max(0.0, row[place] - 2 * row[-1] + made)
        self.whole += row[place] + (seen.base[-1] + 2 * seen.base[place] if seen.base else 0.0)
        self.along, self.given, self.made = self.along + row[-1], self.given + row[place], self.made + made
        self.against, self.moved = self.against + seen.against[place], self.moved + seen.moved[place]

    def add_base(self, seen: Geometry) -> None:
        """One more tensor, of which the parent is the base."""
        self.between += seen.products[-1][-1]
        self.whole += seen.base[-1]

    @property
    def distance(self) -> float | None:
        """The norm of what lies between them as a share of the parent's."""
        return math.sqrt(self.between / self.whole) if self.whole > 0 else None

    @property
    def cosine(self) -> float | None:
        """Of the angle between what was given and what was made."""
        norms = math.sqrt(self.given * self.made)
        return max(-1.0, min(1.0, self.along / norms)) if norms > 0 else None

    @property
    def conflict(self) -> float | None:
        """The share of the parent's entries against whose sign the result went."""
        return self.against / self.moved if self.moved else None


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
    found: list[dict[Layer, Apart]] = [{} for _ in planned.locked.all]
    for job in planned.jobs:
        if geometry := seen.get(job.name):
            layer = layer_of(architecture, job.name)
            for place, entry in enumerate(job.inputs):
                found[entry.model].setdefault(layer, Apart()).add(geometry, place)
            if job.base is not None and geometry.base:
                found[job.base.model].setdefault(layer, Apart()).add_base(geometry)
    return [Track(shown(model), layers) for model, layers in zip(planned.locked.all, found, strict=True) if layers]


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

    def range(self, owner: str) -> str:
        """The value that is in force for a parent, or the least and the largest; empty where it has none."""
        values = [value for line in self.lines if line.owner == owner for value in line.values.values()]
        ends = dict.fromkeys(_number(value, self.is_flag) for value in (min(values), max(values))) if values else ()
        return " to ".join(ends)


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
    names = [shown(model) for model in planned.locked.all]
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
            outside.append(Line(owner, _told(group, [] if inside else group), dict(values)))
        else:
            lines.append(Line(owner, _told(group, inside), dict(values)))
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


def _told(group: Sequence[str], everyone: Sequence[str]) -> str:
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
