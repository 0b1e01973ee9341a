"""The card's charts: parameters in force by layer and kind of tensor, and how far the merge is from each parent.

Not here: the numbers (layers), colours and files (canvas).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from merger.card.pictures.canvas import DASHES, HUES, MARKERS, WIDTH, Picture, legible, shorten_middle
from merger.card.relations import OUTSIDE, Apart, Layer, Line, Parameter, Track

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

SETTINGS, MOVEMENT = "settings", "movement"
_LABEL_LETTERS = 72
_LINES, _PANELS = 8, 12
"""How many lines a panel holds before each parent gets one of its own, and how many panels a picture."""

_PANEL, _LEGEND_ROW = 1.55, 0.2
_MARKED, _TICKS = 48, 16
_NARROWEST, _ASIDE = 0.02, 0.06


def settings_plot(found: Sequence[Parameter]) -> Picture | None:
    """The parameters that are not the same everywhere; None where all are."""
    varying = [parameter for parameter in found if parameter.words is None]
    panels = [panel for parameter in varying for panel in _panels(parameter)]
    if not panels:
        return None
    shown, left = panels[:_PANELS], panels[_PANELS:]
    names = ", ".join(parameter.name for parameter in varying)
    more = f"; {len(left)} more panels are not drawn" if left else ""
    alt = f"By layer and kind of tensor: {names}{more}"
    return Picture(SETTINGS, alt, partial(_paint_settings, panels=shown))


def _panels(parameter: Parameter) -> list[tuple[str, Sequence[Line]]]:
    """One for the parameter, or one for each parent if that would be too full."""
    if len(parameter.lines) <= _LINES:
        return [(parameter.name, parameter.lines)]
    owners: dict[str, list[Line]] = {}
    for line in parameter.lines:
        owners.setdefault(line.owner, []).append(line)
    return [(parameter.name, lines) for lines in owners.values()]


def _paint_settings(figure: Figure, panels: Sequence[tuple[str, Sequence[Line]]]) -> None:
    rows = [_rows([line.label for line in lines]) for _, lines in panels]
    figure.set_size_inches(WIDTH, 0.5 + sum(_PANEL + 0.15 + _LEGEND_ROW * count for count in rows))
    figure.set_layout_engine("constrained")
    places = _places(line.values for _, lines in panels for line in lines)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for panel, (title, lines) in zip(axes, panels, strict=True):
        drawn = [_draw(panel, places, line.values, number) for number, line in enumerate(lines)]
        labels = [line.label for line in lines]
        panel.set_ylabel(title)
        place: Any = {"loc": "lower left", "bbox_to_anchor": (0, 1.0), "ncols": _columns(labels), "borderaxespad": 0.2}
        panel.legend(drawn, _alt_words(labels), **place)
    _axis(axes[-1], places)


def movement_plot(found: Sequence[Track]) -> Picture | None:
    """Distance, cosine and sign conflicts; None where nothing was measured."""
    if not found:
        return None
    names = ", ".join(track.parent for track in found)
    alt = f"By layer, how far the merge is from {names}: relative distance, cosine, sign conflicts"
    return Picture(MOVEMENT, alt, partial(_paint_movement, found=found))


_Measure = Callable[[Apart], float | None]
_MEASURES: Sequence[tuple[str, _Measure]] = (
    ("distance from each parent, as a share of the parent's norm", lambda apart: apart.distance),
    ("cosine with each parent (with its change from the base, where there is one)", lambda apart: apart.cosine),
    ("entries whose sign the merge opposes", lambda apart: apart.conflict),
)


def _paint_movement(figure: Figure, found: Sequence[Track]) -> None:
    labels = [track.parent for track in found]
    figure.set_size_inches(WIDTH, 0.6 + len(_MEASURES) * (_PANEL + 0.2) + _LEGEND_ROW * _rows(labels))
    figure.set_layout_engine("constrained")
    places = _places(track.layers for track in found)
    axes = figure.subplots(len(_MEASURES), 1, sharex=True)
    lines: list[Line2D] = []
    for panel, (title, measure) in zip(axes, _MEASURES, strict=True):
        lines = [_draw(panel, places, _by_layer(track, measure), number) for number, track in enumerate(found)]
        panel.set_title(title, loc="left", size=9)
        _widen(panel)
    _percent(axes[0])
    _percent(axes[2])
    _axis(axes[-1], places)
    figure.legend(lines, _alt_words(labels), loc="outside lower left", ncols=_columns(labels))


def _by_layer(track: Track, measure: _Measure) -> Mapping[Layer, float]:
    return {layer: value for layer, apart in track.layers.items() if (value := measure(apart)) is not None}


def _places(found: Iterable[Mapping[Layer, float] | Mapping[Layer, Apart]]) -> dict[Layer, float]:
    """Where each layer stands on the axis: stack after stack, and at the left what is in none."""
    layers = sorted({layer for values in found for layer in values} - {OUTSIDE})
    places: dict[Layer, float] = {OUTSIDE: -max(1.5, len(layers) * _ASIDE)}
    at, stack = -1.0, layers[0][0] if layers else ""
    for layer in layers:
        at += 1.0 if layer[0] == stack else 2.5
        stack = layer[0]
        places[layer] = at
    return places


def _draw(axes: Axes, places: Mapping[Layer, float], values: Mapping[Layer, float], number: int) -> Line2D:
    """A line through the layers that follow each other, and a mark for what is outside of them."""
    hue, mark = HUES[number % len(HUES)], MARKERS[number % len(MARKERS)]
    dash = DASHES[(number + number // len(HUES)) % len(DASHES)]
    inside = [layer for layer in places if layer != OUTSIDE]
    x = [places[layer] for layer in inside]
    y = [values.get(layer, math.nan) for layer in inside]
    marked = mark if len(inside) <= _MARKED else ""
    for first, last in _stacks(inside):
        axes.plot(x[first:last], y[first:last], color=hue, linestyle=dash, marker=marked)
    if OUTSIDE in values:
        axes.plot([places[OUTSIDE]], [values[OUTSIDE]], color=hue, linestyle="none", marker=mark)
    return axes.plot([], [], color=hue, linestyle=dash, marker=mark)[0]


def _stacks(layers: Sequence[Layer]) -> list[tuple[int, int]]:
    """Where each stack begins and ends."""
    starts = [number for number, layer in enumerate(layers) if number == 0 or layer[0] != layers[number - 1][0]]
    return list(pairwise([*starts, len(layers)]))


def _axis(axes: Axes, places: Mapping[Layer, float]) -> None:
    inside = [layer for layer in places if layer != OUTSIDE]
    step = max(1, math.ceil(len(inside) / _TICKS))
    ticks = [layer for layer in inside if layer[1] % step == 0]
    axes.set_xticks(
        [places[OUTSIDE], *(places[layer] for layer in ticks)], ["outside", *(str(layer[1]) for layer in ticks)]
    )
    stacks = list(dict.fromkeys(layer[0] for layer in inside))
    axes.set_xlabel("layer" if len(stacks) < 2 else f"layer of {', then of '.join(stacks)}")


def _alt_words(labels: Sequence[str]) -> list[str]:
    return [legible(shorten_middle(label, _LABEL_LETTERS)) for label in labels]


def _columns(labels: Sequence[str]) -> int:
    longest = max(min(len(label), _LABEL_LETTERS) for label in labels)
    return max(1, min(len(labels), int(WIDTH / (0.085 * longest + 0.6))))


def _rows(labels: Sequence[str]) -> int:
    return math.ceil(len(labels) / _columns(labels))


def _widen(axes: Axes) -> None:
    """Numbers that are all but the same shall look so."""
    low, high = axes.get_ylim()
    if high - low < _NARROWEST:
        middle = (low + high) / 2
        axes.set_ylim(middle - _NARROWEST / 2, middle + _NARROWEST / 2)
    axes.ticklabel_format(axis="y", useOffset=False)


def _percent(axes: Axes) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.set_ylim(bottom=0.0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
