"""The language's part about searching: holes, where a number, a method or layers may stand, and the `search:` block.

    hole      := {search: [LOW, HIGH], log: true, step: 0.05, anchors: 4, start: 0.5, sum: 1, name: NAME}
               | {search: [CHOICE, CHOICE, ...], start: CHOICE, name: NAME}
               | {search: NAME}
    search    := {objectives: [objective], report: [objective], trials: 100, minutes: 60, seed: 0, sampler: tpe,
                  prune: true, patience: 50, storage: study.log}
    objective := {KIND: SOURCE, limit: 100, column: text, weight: 2, guard: 0.01}

Holes are found in the tree before the rest of the language is read; filled, it is an ordinary recipe's.
Not here: how they are filled (searched), and whether the sources are there (searching).
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from merger.errors import Span, did_you_mean
from merger.recipe import spans
from merger.recipe.blocks.evaluate import HUB_FILE
from merger.recipe.searched import KEY, Hole, Objective, Searched, choice_text, is_hole
from merger.recipe.spans import Mapping, Node, Scalar, number
from merger.recipe.values import Fields, Notes, Value, identity
from merger.safety.numbers import COUNT, MINUTES, SEED, Range

SEARCH = (
    "objectives", "report", "trials", "minutes", "seed", "sampler", "prune", "patience", "storage",
)  # fmt: skip
HOLE = ("search", "log", "step", "anchors", "start", "sum", "name")
SAMPLERS = ("tpe", "cmaes", "nsga2", "random", "grid")
PRUNING = ("median", "halving")
KINDS = ("loss", "accuracy", "exact_match", "length", "task", "function")
OBJECTIVE = (*KINDS, "limit", "column", "weight", "guard")
TRIALS = Range(1, 1_000_000)
ANCHORS = Range(2, 64)
ABOVE_ZERO = Range(1e-12)

_A_HOLE = "write {search: [0, 1]}, {search: [one, another]}, or {search: NAME} for the value of another"
_OBJECTIVES = "a list of what candidates are judged by, each such as - loss: ./texts.txt"
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_FOLDER = re.compile(r"\[(?=[./~])[^\]]*?([^\]/]+)/?\]")
"""A folder's path, of which the last part is the name."""
_PASSWORD = re.compile(r"://[^/@]*:[^/@]*@")
_SOURCES = {
    "loss": "a file, or hf://datasets/owner/name@revision/file",
    "task": "the name of a task of lm-evaluation-harness",
    "function": "module:function",
}


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


def find_search(roots: Sequence[Node], notes: Notes) -> Searched | None:
    """The holes of a file's documents and the block that says how they are searched; None where nothing is.

    Args:
        roots: the documents.
        notes: where problems go; with errors there, nothing can be filled.
    """
    blocks = [value for root in roots if (value := _block(root, notes)) is not None]
    found = [place for root in roots for place in _holes(root, notes, _document(root) if len(roots) > 1 else "")]
    if not blocks:
        for place in [each for each in found if each.place][:1]:
            hint = "write search: {objectives: [{loss: ./texts.txt}], trials: 100} at the top"
            place.value.error("a search needs to know what candidates are judged by", hint)
        return None
    for second in blocks[1:]:
        second.error("a second block search", "one block is for all documents of the file", second.key)
    holes = _read_holes(found, notes)
    if not found:
        blocks[0].error("nothing is searched", f"where a number stands, {_A_HOLE}", blocks[0].key)
    return _search(blocks[0], holes)


def without_block(root: Node) -> Node:
    """The document as it is without its block, with its holes."""
    if not isinstance(root, Mapping):
        return root
    return replace(root, entries=tuple(entry for entry in root.entries if entry.key != KEY))


def _block(root: Node, notes: Notes) -> Value | None:
    entries = root.entries if isinstance(root, Mapping) else ()
    return next((Value(entry.value, KEY, notes, entry.at) for entry in entries if entry.key == KEY), None)


def _document(root: Node) -> str:
    entries = root.entries if isinstance(root, Mapping) else ()
    name = next((entry.value for entry in entries if entry.key == "name"), None)
    return f"{name.value}." if isinstance(name, Scalar) and isinstance(name.value, str) else ""


# ---- holes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
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


def _holes(root: Node, notes: Notes, document: str) -> list[_Found]:
    """Every hole of a document once, in its order; what aliases stand for is one, where it can be searched."""
    seen: dict[Span, _Found] = {}
    for found in _walk(without_block(root), document, document, None, notes, top=True):
        if found.value.at not in seen or seen[found.value.at].place is None:
            seen[found.value.at] = found
    return list(seen.values())


def _walk(
    node: Node, where: str, group: str, place: _Place | None, notes: Notes, key: str = "", top: bool = False
) -> Iterator[_Found]:
    if isinstance(node, spans.Sequence):
        inner = _LAYER if place is _LAYERS else place
        for index, item in enumerate(node.items):
            of_model = key in ("models", "sources")
            told = (of_model and identity(item)) or index
            yield from _walk(item, f"{where}[{told}]", f"{group}[{'' if of_model else index}]", inner, notes)
    elif isinstance(node, Mapping):
        if is_hole(node) and not top and key != "modules":
            name = _FOLDER.sub(r"[\1]", where).replace(".parameters", "").removeprefix("parameters.")
            yield _Found(Value(node, where, notes), name, place, group)
            return
        for entry in (entry for entry in node.entries if entry.key not in _ASIDE):
            stem = "" if top or where.endswith(".") else "."
            inner = _PLACES.get(entry.key, place) if entry.key != "filter" else None
            of, of_group = f"{where}{stem}{entry.key}", f"{group}{stem}{entry.key}"
            yield from _walk(entry.value, of, of_group, inner, notes, entry.key)


def _read_holes(found: Sequence[_Found], notes: Notes) -> tuple[Hole, ...]:
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


def _check_ties(holes: Sequence[tuple[Hole, _Found]]) -> None:
    free = [hole.name for hole, _ in holes if hole.tied is None]
    for hole, each in holes:
        if hole.tied is not None and hole.tied not in free:
            hint = did_you_mean(hole.tied, free) or "write name: beside the search whose value it shall have"
            each.value.error(f"no searched value has the name {hole.tied!r}", hint)


def _check_sums(holes: Sequence[tuple[Hole, _Found]]) -> None:
    groups: dict[str, list[tuple[Hole, _Found]]] = {}
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


def _hole(found: _Found) -> Hole | None:
    place = found.value
    fields = place.fields("a map with the key search", HOLE)
    wanted = fields.need(KEY, _A_HOLE) if fields else None
    if fields is None or wanted is None:
        return None
    if found.place is None:
        hint = "values of parameters, merge_method and layer_range can be searched"
        place.error("nothing can be searched here", hint)
        return None
    name = fields.get("name")
    named = (name.text("a name") if name else None) or found.name
    hole = Hole(named, place.at)
    if isinstance(wanted.node, Scalar):
        return _tie(wanted, fields, hole)
    return _range(wanted, fields, hole, found) if _is_range(wanted.node) else _choice(wanted, fields, hole, found)


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


def _range(wanted: Value, fields: Fields, hole: Hole, found: _Found) -> Hole | None:
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


def _scale(fields: Fields, hole: Hole, found: _Found) -> Hole:
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
    place = fields.get("start")
    within = Range(hole.low, hole.high)
    given = place.number(f"what it is without a search: from {within}", within) if place else None
    return replace(hole, start=hole.number_at(0.5) if given is None else given)


def _total(fields: Fields, hole: Hole, group: str) -> Hole:
    place = fields.get("sum")
    total = place.number("the sum of these numbers, such as sum: 1", ABOVE_ZERO) if place else None
    if place is None or total is None:
        return hole
    if hole.low < 0:
        place.error("numbers below 0 are not divided by their sum", "let the range begin at 0", place.key)
    return replace(hole, group=group, total=total)


def _choice(wanted: Value, fields: Fields, hole: Hole, found: _Found) -> Hole | None:
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


# ---- the block ------------------------------------------------------------------------------------------------------


def _search(place: Value, holes: tuple[Hole, ...]) -> Searched | None:
    fields = place.fields("a map with the key objectives", SEARCH)
    if fields is None:
        return None
    needed = fields.need("objectives", f"write {_OBJECTIVES}")
    report, storage, minutes = fields.get("report"), fields.get("storage"), fields.get("minutes")
    found = Searched(
        holes,
        _objectives(needed) if needed else (),
        _objectives(report) if report else (),
        minutes=minutes.number("minutes, such as 60", MINUTES) if minutes else None,
        sampler=_sampler(fields.get("sampler")),
        prune=_prune(fields.get("prune")),
        storage=_storage(storage) if storage else None,
        at=place.key,
        **_wholes(fields),
    )
    _check_objectives(found, fields)
    return found


def _wholes(fields: Fields) -> dict[str, int]:
    """The whole numbers that are given."""
    ranges = {"trials": TRIALS, "patience": COUNT, "seed": SEED}
    read = {key: place.whole(within, f"a whole number from {within}") for key, within in ranges.items()
            if (place := fields.get(key))}  # fmt: skip
    return {key: value for key, value in read.items() if value is not None}


def _sampler(place: Value | None) -> str:
    text = place.text(f"one of {', '.join(SAMPLERS)}") if place else None
    if place is None or text is None or text in SAMPLERS:
        return text or SAMPLERS[0]
    place.error(f"there is no sampler {text!r}", did_you_mean(text, SAMPLERS))
    return SAMPLERS[0]


def _prune(place: Value | None) -> str | None:
    if place is None or (isinstance(place.node, Scalar) and place.node.value is True):
        return PRUNING[0]
    if isinstance(place.node, Scalar) and place.node.value is False:
        return None
    text = place.text(f"true, false, {' or '.join(PRUNING)}")
    if text is not None and text not in PRUNING:
        place.error(f"there is no way {text!r} to prune", f"write true, false, {' or '.join(PRUNING)}")
    return text


def _storage(place: Value) -> str | None:
    text = place.text("a file such as study.log, or the address of a database")
    if text and _PASSWORD.search(text):
        place.error("a password stands in a recipe", "leave it out: PostgreSQL reads PGPASSWORD, or ~/.pgpass")
    return text


def _objectives(place: Value) -> tuple[Objective, ...]:
    found = (_objective(item) for item in place.items(_OBJECTIVES))
    aims_first = sorted((objective for objective in found if objective), key=lambda each: each.guard is not None)
    return tuple(aims_first)


def _objective(place: Value) -> Objective | None:
    fields = place.fields(f"a map with one of {', '.join(KINDS)}", OBJECTIVE)
    given = [key for key in KINDS if fields and fields.get(key)]
    if fields is None or not given:
        if fields is not None:
            place.error("an objective without a source", f"name one: {', '.join(f'{key}:' for key in KINDS)}")
        return None
    for other in given[1:]:
        what = f"{given[0]} and {other} are two objectives"
        fields.places[other].error(what, "make an item of the list of each", fields.places[other].key)
    kind, source = given[0], fields.places[given[0]]
    text = source.text(_SOURCES.get(kind, _SOURCES["loss"]))
    if text is None:
        return None
    _check_source(source, kind, text)
    limit, column = fields.get("limit"), fields.get("column")
    weight, guard = fields.get("weight"), fields.get("guard")
    if weight and guard:
        guard.error("a guard has no weight: a candidate keeps it or is refused", "take one of them out", guard.key)
    return Objective(
        kind,
        text,
        limit=limit.whole(COUNT, "how many are used, such as limit: 100") if limit else None,
        column=(column.text("a key of each line") if column else None) or Objective.column,
        weight=weight.number("how much it counts, such as weight: 2", ABOVE_ZERO) if weight else None,
        guard=guard.number("how much worse than the base model it may be", Range(0)) if guard else None,
        at=source.at,
    )


def _check_source(place: Value, kind: str, text: str) -> None:
    hub = HUB_FILE.fullmatch(text)
    if kind == "function" and not _FUNCTION.fullmatch(text):
        place.error(f"{text!r} names no function", "write module:function, as an import has them")
    elif kind not in ("function", "task") and text.startswith("hf:") and (hub is None or not hub["revision"]):
        hint = "write hf://datasets/owner/name@REVISION/file, so that each trial is judged by the same"
        place.error(f"{text!r} names no file at a revision", hint)


def _check_objectives(found: Searched, fields: Fields) -> None:
    """Whether the objectives go together, and with the sampler, and whether the report is another split."""
    place = fields.places.get("objectives", fields.place)
    if found.objectives and not found.aims:
        place.error("guards alone are no aim", "write one objective without guard:", place.key)
    weighed = [aim.weight is not None for aim in found.aims]
    if len(weighed) > 1 and any(weighed) and not all(weighed):
        hint = "write weight: for each, which makes one sum of them, or for none, which keeps the best of all kinds"
        place.error("some objectives have a weight, and others none", hint, place.key)
    if found.is_front and found.sampler == "cmaes":
        hint = "take tpe or nsga2, or write weight: for each objective"
        fields.places["sampler"].error("cmaes has one aim", hint)
    _check_report(found, fields)


def _check_report(found: Searched, fields: Fields) -> None:
    report = fields.get("report")
    if report is None:
        what = "without report: nothing tells how much better the found numbers are on texts that no trial saw"
        fields.place.warn(what, "write report: with another split than objectives: has", fields.place.key)
        return
    searched = {_split(objective) for objective in found.objectives}
    for objective in found.report:
        if objective.weight is not None or objective.guard is not None:
            report.error("weight and guard have no meaning in report", "take them out", objective.at)
        if _split(objective) in searched:
            hint = "name another file or task: on what was searched on, the found numbers look better than they are"
            report.error(f"{objective.source} is searched on, and cannot be reported on", hint, objective.at)


def _split(objective: Objective) -> str:
    """What two objectives share that are measured on the same."""
    aside = objective.kind in ("task", "function") or objective.source.startswith("hf:")
    return objective.source if aside else os.path.normpath(objective.source)
