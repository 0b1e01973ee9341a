"""The family of a merge as a picture: a box for each model, the oldest at the left, lines to what was made of them.

Not here: who belongs to it (ancestors), and files (canvas).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from merger.card.ancestors import LOCAL, Family, Member
from merger.card.pictures.canvas import INK, Picture, shorten_middle

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME = "lineage"
_BOX, _GAP, _LANE = 0.52, 0.16, 0.22
"""Heights in inches: of a box, between two, and of a line that passes a column by."""

_BETWEEN = 0.55
_MARGIN = 0.1
_NAME_LETTERS, _DETAIL_LETTERS = 30, 38
_NAME_LETTER, _DETAIL_LETTER = 0.08, 0.059
_MOST = 40
"""Models in the picture: more of them would be neither legible nor a small file. The text has them all."""

_FILLS = {"self": "#2b5c93", "merge": "#7a4570", "model": "#4d5866"}

Slot = tuple[int, int]
"""A member's number and a column: where it stands, or where a line of its passes."""


def portrait(family: Family) -> Picture:
    """The picture, as PNG and as SVG."""
    drawn = family if len(family.members) <= _MOST else _nearest(family)
    merge, *others = family.members
    left = len(family.members) - len(drawn.members)
    more = f"; {left} more are in the text only" if left else ""
    alt = f"Lineage of {merge.name}: {len(others)} models, {len(merge.parents)} of them its parents{more}"
    return Picture(NAME, alt, lambda figure: _paint(figure, drawn), ("png", "svg"))


def _nearest(family: Family) -> Family:
    """Those nearest to the merge, which come first."""
    kept = family.members[:_MOST]
    return Family(tuple(replace(m, parents=tuple(parent for parent in m.parents if parent < _MOST)) for m in kept))


def columns(family: Family) -> list[int]:
    """How far each member stands from the merge: as many steps as the longest way, so that all lines lead one way."""
    found = [0] * len(family.members)
    _deepen(family, 0, 0, (), found)
    return found


def _deepen(family: Family, place: int, depth: int, path: tuple[int, ...], found: list[int]) -> None:
    if place in path or (place and depth <= found[place]):
        return
    found[place] = depth
    for parent in family.members[place].parents:
        _deepen(family, parent, depth + 1, (*path, place), found)


@dataclass
class _Layout:
    """Where everything stands, in inches; the middle of each slot."""

    family: Family
    column: list[int]
    lines: list[tuple[Slot, Slot]] = field(default_factory=list)
    heights: dict[Slot, float] = field(default_factory=dict)
    left: list[float] = field(default_factory=list)
    wide: list[float] = field(default_factory=list)


def _laid_out(family: Family) -> _Layout:
    layout = _Layout(family, columns(family))
    stacks: list[list[Slot]] = [[] for _ in range(max(layout.column) + 1)]
    for place, member in enumerate(family.members):
        _stand(stacks, (place, layout.column[place]))
        for parent in member.parents:
            _connect(layout, stacks, place, parent)
    _stack(layout, stacks)
    _spread(layout)
    return layout


def _stand(stacks: list[list[Slot]], slot: Slot) -> None:
    if slot not in stacks[slot[1]]:
        stacks[slot[1]].append(slot)


def _connect(layout: _Layout, stacks: list[list[Slot]], child: int, parent: int) -> None:
    """A line from a parent to a child, by way of a lane through each column between; a circle's line is left out."""
    near, far = layout.column[child], layout.column[parent]
    passed: Slot = (child, near)
    for column in range(near + 1, far + 1):
        slot = (parent, column)
        _stand(stacks, slot)
        if (slot, passed) not in layout.lines:
            layout.lines.append((slot, passed))
        passed = slot


def _stack(layout: _Layout, stacks: Sequence[Sequence[Slot]]) -> None:
    """Each column from top to bottom: as near as may be to the middle of what it leads to."""
    for column, slots in enumerate(stacks):
        wanted = {slot: _wish(layout, slot, place) for place, slot in enumerate(slots)}
        ordered = sorted(slots, key=lambda slot: wanted[slot])  # sorted is stable: ties keep the family's order
        _settle(layout, ordered, wanted, column)
    lowest = min(layout.heights.values())
    layout.heights = {slot: height - lowest for slot, height in layout.heights.items()}


def _wish(layout: _Layout, slot: Slot, place: int) -> float:
    ends = [layout.heights[end] for start, end in layout.lines if start == slot and end in layout.heights]
    return sum(ends) / len(ends) if ends else float(place)


def _settle(layout: _Layout, ordered: Sequence[Slot], wanted: Mapping[Slot, float], column: int) -> None:
    """Push apart what would overlap, and move the column so that its mean is where it was wanted."""
    heights: list[float] = []
    for number, slot in enumerate(ordered):
        room = (_size(layout, ordered[number - 1], column) + _size(layout, slot, column)) / 2 + _GAP if number else 0.0
        heights.append(max(wanted[slot], heights[-1] + room) if number else wanted[slot])
    off = sum(wanted[slot] - height for slot, height in zip(ordered, heights, strict=True)) / len(ordered)
    layout.heights |= {slot: height + off for slot, height in zip(ordered, heights, strict=True)}


def _size(layout: _Layout, slot: Slot, column: int) -> float:
    return _BOX if layout.column[slot[0]] == column else _LANE


def _spread(layout: _Layout) -> None:
    """Columns as wide as their widest box, the oldest at the left."""
    x = 0.0
    layout.left, layout.wide = [0.0] * (max(layout.column) + 1), [0.0] * (max(layout.column) + 1)
    for column in range(max(layout.column), -1, -1):
        inside = [member for place, member in enumerate(layout.family.members) if layout.column[place] == column]
        layout.left[column], layout.wide[column] = x, max(_width(member) for member in inside)
        x += layout.wide[column] + _BETWEEN


def _width(member: Member) -> float:
    name, details = _lines(member)
    return 0.25 + max(1.0, len(name) * _NAME_LETTER, len(details) * _DETAIL_LETTER)


def _lines(member: Member) -> tuple[str, str]:
    """What stands in a box: the name, and below it all else."""
    told = " · ".join([*([member.commit[:7]] if member.commit else []), *member.details])
    return shorten_middle(member.name, _NAME_LETTERS), shorten_middle(told, _DETAIL_LETTERS)


def _paint(figure: Figure, family: Family) -> None:
    layout = _laid_out(family)
    width = layout.left[0] + layout.wide[0] + 2 * _MARGIN
    height = max(layout.heights.values()) + _BOX + 2 * _MARGIN
    figure.set_size_inches(width, height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(-_MARGIN, width - _MARGIN)
    axes.set_ylim(height - _MARGIN - _BOX / 2, -_MARGIN - _BOX / 2)
    for start, end in layout.lines:
        _line(axes, layout, start, end)
    for place, member in enumerate(family.members):
        _box(axes, layout, place, member)


def _line(axes: Axes, layout: _Layout, start: Slot, end: Slot) -> None:
    """From the right edge of one slot to the left edge of the next, which is nearer to the merge."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    x, y = layout.left[start[1]] + layout.wide[start[1]], layout.heights[start]
    to_x, to_y = layout.left[end[1]], layout.heights[end]
    bend = (to_x - x) / 2
    points = [(x, y), (x + bend, y), (to_x - bend, to_y), (to_x, to_y)]
    codes = [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4]
    if layout.column[start[0]] != start[1]:  # a lane: straight through the column first
        points, codes = [(layout.left[start[1]], y), *points], [Path.MOVETO, Path.LINETO, *codes[1:]]
    axes.add_patch(PathPatch(Path(points, codes), fill=False, edgecolor=INK, linewidth=1.3))


def _box(axes: Axes, layout: _Layout, place: int, member: Member) -> None:
    from matplotlib.patches import FancyBboxPatch

    column = layout.column[place]
    x, y = layout.left[column], layout.heights[place, column]
    is_known = member.note in (None, LOCAL) or member.commit is not None
    kind = "self" if place == 0 else "merge" if (member.made or "").startswith("merge") else "model"
    frame = FancyBboxPatch(
        (x + 0.05, y - _BOX / 2 + 0.05),
        layout.wide[column] - 0.1,
        _BOX - 0.1,
        boxstyle="round,pad=0.05",
        facecolor=_FILLS[kind] if is_known else "none",
        edgecolor="none" if is_known else INK,
        linestyle="--",
        linewidth=1.2,
    )
    axes.add_patch(frame)
    name, details = _lines(member)
    ink = "white" if is_known else INK
    middle = x + layout.wide[column] / 2
    axes.text(middle, y - 0.09 if details else y, name, color=ink, size=9, weight="bold", ha="center", va="center")
    axes.text(middle, y + 0.12, details, color=ink, size=7.5, ha="center", va="center")
