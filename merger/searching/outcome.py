"""What comes out of a study: the recipe of a trial, the table of all trials, and pictures of them.

Not here: the study itself (study), and how a card shows it (card).
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from merger.card.pictures.canvas import HUES, INK, WIDTH, Picture, shorten_middle
from merger.recipe import spans
from merger.recipe.searched import KEY, Searched, Values, choice_text
from merger.recipe.spans import Node, Scalar
from merger.searching.trials import Aims, Trial, front_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_PROPERTIES = re.compile(r"((&|!)\S*\s+)*")
_PANELS, _COLUMNS, _NAME_LETTERS = 12, 3, 40
_PANEL = 2.0

# ---- the recipe -----------------------------------------------------------------------------------------------------


def filled_text(text: str, searched: Searched, drawn: Values, says: str) -> str:
    """The recipe's text with what was drawn in place of its holes, and without its block; all else stays as it is.

    Args:
        text: the searched recipe.
        searched: its holes.
        drawn: what they are filled with.
        says: where the numbers are from, in a comment at the top.
    """
    text = text.removeprefix("\ufeff")
    nodes = {(at.line, at.column): node for at, node in searched.nodes(drawn).items()}
    edits, roots = dict[int, tuple[int, str]](), list[Any](yaml.compose_all(text, Loader=_Loader))
    for root in roots:
        for start, end, new in _edits(root, nodes, text):
            edits[start] = (end, new)
        for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
            if key.value == KEY:
                start, end = _entry(key, value, text, bool(root.flow_style))
                edits[start] = (end, "")
    for start, (end, new) in sorted(edits.items(), reverse=True):
        text = text[:start] + new + text[end:]
    return f"# {says}\n{text}"


def _edits(root: Any, nodes: Mapping[tuple[int, int], Node], text: str) -> Iterator[tuple[int, int, str]]:
    """Each hole's beginning and end, and what stands there."""
    ahead, seen = [root], set[int]()
    while ahead:
        node = ahead.pop()
        if id(node) in seen or isinstance(node, yaml.ScalarNode):
            continue
        seen.add(id(node))
        mark, inner = node.start_mark, list(node.value)
        hole = nodes.get((mark.line + 1, mark.column + 1))
        if isinstance(node, yaml.MappingNode):
            if hole is not None and any(key.value == KEY for key, _ in inner):
                start = _PROPERTIES.match(text, mark.index).end()  # type: ignore[union-attr]  # it matches nothing, too
                yield start, _end(node), _written(hole)
                continue
            inner = [value for _, value in inner]
        ahead += inner


def _end(node: Any) -> int:
    """Where a node's text ends; of a block, whose own mark lies behind what follows it, where its last value does."""
    if isinstance(node, yaml.ScalarNode) or node.flow_style or not node.value:
        return int(node.end_mark.index)
    last = node.value[-1]
    return _end(last[1] if isinstance(last, tuple) else last)


def _entry(key: Any, value: Any, text: str, flow: bool) -> tuple[int, int]:
    """Where an entry of a document begins and ends: its lines, or what stands between commas."""
    start, end = int(key.start_mark.index), _end(value)
    if not flow:
        line = text.find("\n", end)
        return start, len(text) if line < 0 else line + 1
    comma = re.compile(r"\s*,\s*").match(text, end)
    before = len(text[:start].rstrip())
    return (start, comma.end()) if comma else (before - text[:before].endswith(","), end)


def _written(node: Node) -> str:
    if isinstance(node, spans.Sequence):
        return f"[{', '.join(map(_written, node.items))}]"
    value = node.value if isinstance(node, Scalar) else None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return np.format_float_positional(value, trim="-")  # YAML 1.1 takes 1e-05 for text
    return choice_text(node)


# ---- the table ------------------------------------------------------------------------------------------------------


def table_text(trials: Sequence[Trial], aims: Aims) -> str:
    """A line of CSV for each trial: its state, what the recipe had, and its scores."""
    searched, held = aims.searched, io.StringIO()
    rows = csv.writer(held, lineterminator="\n")
    labels = [objective.label for objective in searched.objectives]
    rows.writerow(["trial", "state", *searched.variables, *labels, "kept", "seconds", "why"])
    for trial in trials:
        values = searched.settle(trial.drawn) if trial.drawn.keys() >= searched.variables.keys() else {}
        scores = trial.scores or [""] * len(labels)
        had = [values.get(name, "") for name in searched.variables]
        rows.writerow([trial.number, trial.state, *had, *scores, trial.keeps, f"{trial.seconds:.3f}", trial.why])
    return held.getvalue()


# ---- pictures -------------------------------------------------------------------------------------------------------


def pictures_of(trials: Sequence[Trial], aims: Aims, importance: Mapping[str, float]) -> list[Picture]:
    """Best so far, importance of each number, slices through what was tried; of several aims their front.

    Args:
        trials: of the study.
        aims: what was searched for.
        importance: how much each variable matters, by its name; none: that picture is left out.
    """
    done = [trial for trial in trials if trial.state == "complete"]
    if not done:
        return []
    found, label = [], _label(aims)
    if aims.searched.is_front:
        names = " and ".join(aim.label for aim in aims.searched.aims)
        alt = f"{len(done)} trials by {names}, and the front of those that no other is above"
        found.append(Picture("search-front", alt, partial(_paint_front, trials=done, aims=aims)))
    else:
        alt = f"{label} of {len(done)} trials, and the best so far"
        found.append(Picture("search-progress", alt, partial(_paint_progress, trials=done, aims=aims)))
    if importance:
        ranked = ", ".join(f"{name} {share:.0%}" for name, share in importance.items())
        alt = f"How much each number matters, by PED-ANOVA: {ranked}"
        found.append(Picture("search-importance", alt, partial(_paint_importance, importance=importance)))
    shown = list(importance or aims.searched.variables)[:_PANELS]
    alt = f"{label} of each trial, by {', '.join(shown)}"
    return [*found, Picture("search-slices", alt, partial(_paint_slices, trials=done, aims=aims, shown=shown))]


def _label(aims: Aims) -> str:
    return aims.searched.aims[0].label if len(aims.directions) == len(aims.searched.aims) else "weighted sum"


def _paint_progress(figure: Figure, trials: Sequence[Trial], aims: Aims) -> None:
    figure.set_size_inches(WIDTH, 2.8)
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    best, line = None, []
    for trial in trials:
        value = aims.values(trial.scores)[0]
        if trial.keeps and (best is None or aims.gains(trial.scores)[0] > best[0]):
            best = (aims.gains(trial.scores)[0], value)
        line.append(math.nan if best is None else best[1])
    numbers = [trial.number for trial in trials]
    axes.plot(numbers, [aims.values(trial.scores)[0] for trial in trials], "o", color=INK, alpha=0.5, ms=3)
    axes.step(numbers, line, where="post", color=HUES[0])
    axes.set_xlabel("trial")
    axes.locator_params(axis="x", integer=True)
    axes.set_title(f"{_label(aims)}: each trial, and the best so far", loc="left", size=9)


def _paint_front(figure: Figure, trials: Sequence[Trial], aims: Aims) -> None:
    figure.set_size_inches(WIDTH, 3.6)
    figure.set_layout_engine("constrained")
    axes, front = figure.subplots(), front_of(trials, aims)
    for some, style in ((trials, {"color": INK, "alpha": 0.5, "ms": 3}), (front, {"color": HUES[1], "ms": 5})):
        values = [aims.values(trial.scores) for trial in some]
        axes.plot([each[0] for each in values], [each[1] for each in values], "o", **style)  # type: ignore[arg-type]
    axes.set_xlabel(aims.searched.aims[0].label)
    axes.set_ylabel(aims.searched.aims[1].label)
    axes.set_title("each trial, and those above which there is no other", loc="left", size=9)


def _paint_importance(figure: Figure, importance: Mapping[str, float]) -> None:
    figure.set_size_inches(WIDTH, 0.8 + 0.25 * len(importance))
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    names = [shorten_middle(name, _NAME_LETTERS) for name in list(importance)[::-1]]
    axes.barh(range(len(names)), list(importance.values())[::-1], color=HUES[0])
    axes.set_yticks(range(len(names)), names)
    axes.set_title("share of what each number explains of the best trials (PED-ANOVA)", loc="left", size=9)


def _paint_slices(figure: Figure, trials: Sequence[Trial], aims: Aims, shown: Sequence[str]) -> None:
    rows = -(-len(shown) // _COLUMNS)
    figure.set_size_inches(WIDTH, 0.4 + _PANEL * rows)
    figure.set_layout_engine("constrained")
    panels = figure.subplots(rows, min(_COLUMNS, len(shown)), squeeze=False, sharey=True).flatten()
    for panel, name in zip(panels, shown, strict=False):
        _slice(panel, trials, aims, name)
    for panel in panels[len(shown) :]:
        panel.set_axis_off()


def _slice(axes: Axes, trials: Sequence[Trial], aims: Aims, name: str) -> None:
    values = [aims.searched.settle(trial.drawn)[name] for trial in trials]
    scores = [aims.values(trial.scores)[0] for trial in trials]
    axes.plot(values, scores, "o", color=HUES[0], alpha=0.6, ms=3)
    if aims.searched.variables[name].log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(lambda value, place: "")
    axes.tick_params(axis="x", labelsize=7)
    axes.margins(x=0.12)
    axes.set_title(shorten_middle(name, _NAME_LETTERS), loc="left", size=8)
