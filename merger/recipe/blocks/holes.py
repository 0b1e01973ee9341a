"""The language's part about holes: places where a number, a method or layers may be left open.

    hole := {search: [LOW, HIGH], log: true, step: 0.05, anchors: 4, start: 0.5, sum: 1, name: NAME}
          | {search: [CHOICE, CHOICE, ...], start: CHOICE, name: NAME}
          | {search: NAME}

They are found in the tree before the rest of the language is read; filled, it is an ordinary recipe's.
Not here: how they are filled (searched), and by what a filling is judged (search).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from merger.errors import Span, did_you_mean
from merger.recipe import spans
from merger.recipe.references import identity
from merger.recipe.searched import KEY, Hole, choice_text, is_hole
from merger.recipe.spans import Mapping, Node, Scalar, number
from merger.recipe.values import Fields, Notes, Value
from merger.safety.numbers import Range

HOLE = ("search", "log", "step", "anchors", "start", "sum", "name")
ANCHORS = Range(2, 64)
ABOVE_ZERO = Range(1e-12)

A_HOLE = "write {search: [0, 1]}, {search: [one, another]}, or {search: NAME} for the value of another"
_FOLDER = re.compile(r"\[(?=[./~])[^\]]*?([^\]/]+)/?\]")
"""A folder's path, of which the last part is the name."""


@dataclass(frozen=True)
class _Place:
    """What may be searched in a place.

    Args:
        ranges: whether numbers between two ends may.
        gradients: whether several numbers may stand there.
        names: what it is called where it cannot be so.
    """

    ranges: bool
    gradients: bool
    names: str


_NUMBER = _Place(True, True, "a parameter")
_METHOD = _Place(False, False, "a merge method")
_LAYERS = _Place(False, False, "a layer_range")
_LAYER = _Place(True, False, "a layer")
_PLACES = {"parameters": _NUMBER, "merge_method": _METHOD, "layer_range": _LAYERS}
_ASIDE = ("tokenizer",)
"""Its tokens may be called search, as modules may."""


@dataclass(frozen=True)
class OpenPlace:
    """A hole that is not read yet.

    Args:
        value: the map.
        name: what it is called unless it says so itself.
        place: what may be searched there; None: nothing.
        group: the same for the holes in the same place of each model of a list.
    """

    value: Value
    name: str
    place: _Place | None
    group: str


def find_holes(root: Node, notes: Notes, document: str) -> list[OpenPlace]:
    """Every hole of a document once, in its order; what aliases stand for is one, where it can be searched."""
    seen: dict[Span, OpenPlace] = {}
    for found in _walk(root, document, document, None, notes, top=True):
        if found.value.at not in seen or seen[found.value.at].place is None:
            seen[found.value.at] = found
    return list(seen.values())


def _walk(
    node: Node, where: str, group: str, place: _Place | None, notes: Notes, key: str = "", top: bool = False
) -> Iterator[OpenPlace]:
    if isinstance(node, spans.Sequence):
        inner = _LAYER if place is _LAYERS else place
        for index, item in enumerate(node.items):
            of_model = key in ("models", "sources")
            told = (of_model and identity(item)) or index
            yield from _walk(item, f"{where}[{told}]", f"{group}[{'' if of_model else index}]", inner, notes)
    elif isinstance(node, Mapping):
        if is_hole(node) and not top and key != "modules":
            name = _FOLDER.sub(r"[\1]", where).replace(".parameters", "").removeprefix("parameters.")
            yield OpenPlace(Value(node, where, notes), name, place, group)
            return
        for entry in (entry for entry in node.entries if entry.key not in _ASIDE):
            stem = "" if top or where.endswith(".") else "."
            inner = _PLACES.get(entry.key, place) if entry.key != "filter" else None
            of, of_group = f"{where}{stem}{entry.key}", f"{group}{stem}{entry.key}"
            yield from _walk(entry.value, of, of_group, inner, notes, entry.key)


def read_holes(found: Sequence[OpenPlace]) -> tuple[Hole, ...]:
    """What is searched in these places; problems go to their notes."""
    holes = [(hole, each) for each in found if (hole := _hole(each)) is not None]
    names = Counter(hole.name for hole, _ in holes)
    for hole, each in holes:
        if names[hole.name] > 1 and hole.name != each.name:
            each.value.error(f"the name {hole.name!r} is given to two searched values", "name one of them otherwise")
    twice = Counter[str]()
    numbered = []
    for hole, each in holes:
        twice[hole.name] += 1
        numbered.append((replace(hole, name=f"{hole.name}#{n}") if (n := twice[hole.name]) > 1 else hole, each))
    _check_ties(numbered)
    _check_sums(numbered)
    return tuple(hole for hole, _ in numbered)


def _check_ties(holes: Sequence[tuple[Hole, OpenPlace]]) -> None:
    free = [hole.name for hole, _ in holes if hole.tied is None]
    for hole, each in holes:
        if hole.tied is not None and hole.tied not in free:
            hint = did_you_mean(hole.tied, free) or "write name: beside the search whose value it shall have"
            each.value.error(f"no searched value has the name {hole.tied!r}", hint)


def _check_sums(holes: Sequence[tuple[Hole, OpenPlace]]) -> None:
    groups: dict[str, list[tuple[Hole, OpenPlace]]] = {}
    for hole, each in holes:
        if hole.group is not None:
            groups.setdefault(hole.group, []).append((hole, each))
    for members in groups.values():
        first, place = members[0]
        if len(members) == 1:
            place.value.error("a sum of one number leaves nothing to search", "write sum: for the other models, too")
        for hole, each in members[1:]:
            if (hole.total, hole.anchors) != (first.total, first.anchors):
                hint = "write the same sum: and the same anchors: for each model of the list"
                each.value.error(f"{hole.name} and {first.name} cannot have one sum", hint)


def _hole(found: OpenPlace) -> Hole | None:
    place = found.value
    fields = place.fields("a map with the key search", HOLE)
    wanted = fields.need(KEY, A_HOLE) if fields else None
    if fields is None or wanted is None:
        return None
    if found.place is None:
        hint = "values of parameters, merge_method and layer_range can be searched"
        place.error("nothing can be searched here", hint)
        return None
    hole = Hole(fields.text("name", "a name") or found.name, place.at)
    if isinstance(wanted.node, Scalar):
        return _tie(wanted, fields, hole)
    return _range(wanted, fields, hole, found) if _is_range(wanted.node) else _choice(wanted, fields, hole)


def _is_range(node: Node) -> bool:
    """Two numbers are the ends of a range; anything else is a list of choices."""
    items = node.items if isinstance(node, spans.Sequence) else ()
    kinds = [isinstance(item, Scalar) and _is_number(item.value) for item in items]
    return len(items) == 2 and all(kinds)


def _is_number(value: object) -> bool:
    if isinstance(value, str):
        return spans.numeric(value) is not None
    return isinstance(value, int | float) and not isinstance(value, bool)


def _tie(wanted: Value, fields: Fields, hole: Hole) -> Hole | None:
    for key in [key for key in HOLE[1:] if fields.get(key)]:
        fields.places[key].error(f"{key} has no meaning beside the name of another", "take it out")
    name = wanted.text("two ends, a list of choices, or the name of another searched value")
    return replace(hole, tied=name) if name else None


def _range(wanted: Value, fields: Fields, hole: Hole, found: OpenPlace) -> Hole | None:
    if found.place is None or not found.place.ranges:
        names = found.place.names if found.place else ""
        wanted.error(f"{names} is no number between two ends", "list what it may be, such as [[0, 8], [0, 12]]")
        return None
    ends = [end.number() for end in wanted.items("two numbers")]
    low, high = ends[0], ends[1]
    if low is None or high is None:
        return None
    if low >= high:
        wanted.error(f"[{number(low)}, {number(high)}] is an empty range", "write [LOW, HIGH], the lower end first")
        return None
    hole = _scale(fields, replace(hole, low=low, high=high), found)
    return _total(fields, _range_start(fields, hole), found.group)


def _scale(fields: Fields, hole: Hole, found: OpenPlace) -> Hole:
    """With what is said of steps, scale and anchors."""
    log, step, anchors = fields.get("log"), fields.get("step"), fields.get("anchors")
    if log and log.flag():
        if hole.low <= 0:
            log.error(f"a logarithmic scale begins above 0, and this at {number(hole.low)}", "raise the lower end")
        elif step:
            step.error("log and step exclude each other", "keep one of them", step.key)
        else:
            hole = replace(hole, log=True)
    wide = Range(1e-12, hole.high - hole.low)
    by = step.number(f"the numbers tried lie so far apart: from {wide}", wide) if step else None
    if by is not None:
        last = hole.low + int((hole.high - hole.low) / by + 1e-9) * by
        whole = all(float(one).is_integer() for one in (hole.low, by))
        hole = replace(hole, step=by, high=float(f"{last:.12g}"), whole=whole)
    if found.place is _LAYER and not hole.whole:
        found.value.error("layers are counted in whole numbers", "write whole ends and step: 1")
    if anchors and found.place is not None and not found.place.gradients:
        anchors.error(f"{found.place.names} has no gradient", "take it out", anchors.key)
    elif anchors:
        hole = replace(hole, anchors=anchors.whole(ANCHORS, "the numbers of a gradient, such as anchors: 4") or 0)
    return hole


def _range_start(fields: Fields, hole: Hole) -> Hole:
    within = Range(hole.low, hole.high)
    given = fields.number("start", f"what it is without a search: from {within}", within)
    return replace(hole, start=hole.number_at(0.5) if given is None else given)


def _total(fields: Fields, hole: Hole, group: str) -> Hole:
    place = fields.get("sum")
    total = place.number("the sum of these numbers, such as sum: 1", ABOVE_ZERO) if place else None
    if place is None or total is None:
        return hole
    if hole.low < 0:
        place.error("numbers below 0 are not divided by their sum", "let the range begin at 0", place.key)
    return replace(hole, group=group, total=total)


def _choice(wanted: Value, fields: Fields, hole: Hole) -> Hole | None:
    items = wanted.items("two or more choices")
    for key in [key for key in ("log", "step", "anchors", "sum") if fields.get(key)]:
        fields.places[key].error(f"{key} has no meaning among choices", "take it out", fields.places[key].key)
    if len(items) == 1:
        wanted.error("one choice leaves nothing to search", "write that value in place of the search")
        return None
    hole = replace(hole, choices=tuple(item.node for item in items))
    for index, text in enumerate(hole.labels):
        if text in hole.labels[:index]:
            items[index].error(f"{text} is listed twice", "take one of them out")
    if not items:
        return None
    start = fields.get("start")
    given = choice_text(start.node) if start else hole.labels[0]
    if start and given not in hole.labels:
        start.error(f"{given} is none of the choices", did_you_mean(given, hole.labels))
    return replace(hole, start=given)
