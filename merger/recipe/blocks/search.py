"""The language's part about searching: the `search:` block, and which holes it is for.

    search    := {objectives: [objective], report: [objective], trials: 100, minutes: 60, seed: 0, sampler: tpe,
                  prune: true, subset: adaptive, patience: 50, storage: study.log}
    objective := {KIND: SOURCE, limit: 100, column: text, weight: 2, guard: 0.01}

Not here: the holes (holes), how they are filled (searched), and whether the sources are there (searching).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace

from merger.errors import did_you_mean
from merger.recipe.blocks.evaluate import HUB_FILE
from merger.recipe.blocks.holes import A_HOLE, ABOVE_ZERO, find_holes, read_holes
from merger.recipe.searched import KEY, Hole, Objective, Searched
from merger.recipe.spans import Mapping, Node, Scalar
from merger.recipe.values import Fields, Notes, Value
from merger.safety.numbers import COUNT, MINUTES, SEED, Range

SEARCH = (
    "objectives", "report", "trials", "minutes", "seed", "sampler", "prune", "subset", "patience", "storage",
)  # fmt: skip
SAMPLERS = ("tpe", "cmaes", "nsga2", "random", "grid")
PRUNING = ("median", "halving")
SUBSETS = ("adaptive",)
KINDS = ("loss", "accuracy", "exact_match", "length", "task", "function")
OBJECTIVE = (*KINDS, "limit", "column", "weight", "guard")
TRIALS = Range(1, 1_000_000)
_IN_PARTS = KINDS[:4]

_OBJECTIVES = "a list of what candidates are judged by, each such as - loss: texts.txt"
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
PASSWORD = re.compile(r"://[^/@]*:[^/@]*@|[?&]password=")
WITHOUT_PASSWORD = "leave it out: PostgreSQL reads PGPASSWORD, or ~/.pgpass"
_SOURCES = {
    "loss": "a file, or hf://datasets/owner/name@revision/file",
    "task": "the name of a task of lm-evaluation-harness",
    "function": "module:function",
}


def find_search(roots: Sequence[Node], notes: Notes) -> Searched | None:
    """The holes of a file's documents and the block that says how they are searched; None where nothing is.

    Args:
        roots: the documents.
        notes: where problems go; with errors there, nothing can be filled.
    """
    blocks = [value for root in roots if (value := _block(root, notes)) is not None]
    found = [
        place
        for root in roots
        for place in find_holes(without_block(root), notes, _document(root) if len(roots) > 1 else "")
    ]
    if not blocks:
        for place in [each for each in found if each.place][:1]:
            hint = "write search: {objectives: [{loss: texts.txt}], trials: 100} at the top"
            place.value.error("a search needs to know what candidates are judged by", hint)
        return None
    for second in blocks[1:]:
        second.error("a second block search", "one block is for all documents of the file", second.key)
    holes = read_holes(found)
    if not found:
        blocks[0].error("nothing is searched", f"where a number stands, {A_HOLE}", blocks[0].key)
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


def _search(place: Value, holes: tuple[Hole, ...]) -> Searched | None:
    fields = place.fields("a map with the key objectives", SEARCH)
    if fields is None:
        return None
    needed = fields.need("objectives", f"write {_OBJECTIVES}")
    report, storage, prune = fields.get("report"), fields.get("storage"), _prune(fields.get("prune"))
    subset = _one_of(fields.get("subset"), "subset", SUBSETS)
    found = Searched(
        holes,
        _objectives(needed) if needed else (),
        _objectives(report) if report else (),
        minutes=fields.number("minutes", "minutes, such as 60", MINUTES),
        sampler=_one_of(fields.get("sampler"), "sampler", SAMPLERS) or SAMPLERS[0],
        prune=None if subset else prune,
        subset=subset,
        storage=_storage(storage) if storage else None,
        at=place.key,
        **fields.wholes({"trials": TRIALS, "patience": COUNT, "seed": SEED}),
    )
    _check_objectives(found, fields)
    return found


def _one_of(place: Value | None, what: str, known: Sequence[str]) -> str | None:
    text = place.text(f"one of {', '.join(known)}") if place else None
    if place is None or text is None or text in known:
        return text
    place.error(f"there is no {what} {text!r}", did_you_mean(text, known))
    return None


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
    if text and PASSWORD.search(text):
        place.error("a password stands in a recipe", WITHOUT_PASSWORD)
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
    guard = fields.get("guard")
    if guard and fields.get("weight"):
        guard.error("a guard has no weight: a candidate keeps it or is refused", "take one of them out", guard.key)
    return Objective(
        kind,
        text,
        limit=fields.whole("limit", COUNT, "how many are used, such as limit: 100"),
        column=fields.text("column", "a key of each line") or Objective.column,
        weight=fields.number("weight", "how much it counts, such as weight: 2", ABOVE_ZERO),
        guard=fields.number("guard", "how much worse than the base model it may be", Range(0)),
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
    _check_subset(found, fields)
    _check_report(found, fields)


def _check_subset(found: Searched, fields: Fields) -> None:
    subset, prune = fields.get("subset"), fields.get("prune")
    if subset and prune:
        prune.error("prune and subset are two ways to leave a candidate", "take one of them out", prune.key)
    if subset and found.aims and (len(found.aims) > 1 or found.aims[0].kind not in _IN_PARTS):
        what = "subset is for one aim that is scored item by item"
        subset.error(what, f"judge by one of {', '.join(_IN_PARTS)}, and let others be guards", subset.key)


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
