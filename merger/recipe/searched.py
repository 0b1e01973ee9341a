"""What a recipe leaves open for a search: its holes, how they are filled, and by what a filling is judged.

Not here: reading them (blocks.search), and the search itself (searching).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from merger.errors import Span
from merger.recipe import spans
from merger.recipe.spans import Node, Scalar

Values: TypeAlias = Mapping[str, float | str]
"""What was drawn, by the names of `Hole.variables`; of choices their text."""

_DIGITS = 4
"""Of each number that is searched: a recipe is read by people, and no score tells numbers apart that are nearer."""
_INSIDE = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Hole:
    """A place of a recipe whose value is searched.

    Args:
        name: what the study calls it.
        at: where it stands.
        low, high: the ends of its range.
        log: whether numbers are drawn evenly on a logarithmic scale.
        step: from one number to the next; None: any number between the ends.
        whole: whether its numbers are whole.
        anchors: how many numbers make its gradient; 0: it is one number.
        choices: in place of a range, what it may be.
        start: what it is in the first trial, with which the found one is compared; a number, or a choice's text.
        tied: the name of the hole whose value it has.
        group: holes of one group have the sum `total`.
        total: that sum.
    """

    name: str
    at: Span
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    step: float | None = None
    whole: bool = False
    anchors: int = 0
    choices: tuple[Node, ...] = ()
    start: float | str = 0.0
    tied: str | None = None
    group: str | None = None
    total: float = 1.0

    @property
    def variables(self) -> tuple[str, ...]:
        """The names of what is drawn for it."""
        if self.tied:
            return ()
        return tuple(f"{self.name}[{index}]" for index in range(self.anchors)) if self.anchors else (self.name,)

    @property
    def labels(self) -> tuple[str, ...]:
        """The choices' texts."""
        return tuple(map(choice_text, self.choices))

    @property
    def range_text(self) -> str:
        """Where it is searched, for readers."""
        if self.choices:
            return " or ".join(self.labels)
        steps = "" if self.step is None else f" by {self.step:g}"
        return f"{self.low:g} to {self.high:g}{steps}{' (logarithmic)' if self.log else ''}"

    def number_at(self, share: float) -> float:
        """The number so far along its range, 0 for its low end and 1 for its high one."""
        if self.log:
            return self.near(math.exp((1 - share) * math.log(self.low) + share * math.log(self.high)))
        found = self.low + share * (self.high - self.low)
        if self.step is not None:
            found = self.low + round((found - self.low) / self.step) * self.step
        return self.near(found)

    def near(self, value: float) -> float:
        """The number that a recipe has for a drawn one: rounded, and inside of the range."""
        if self.whole:
            return round(value)
        return min(max(float(f"{value:.{_DIGITS}g}" if self.step is None else f"{value:.12g}"), self.low), self.high)

    def node(self, values: Values, names: Sequence[str]) -> Node:
        """What stands in its place, once these variables have their values."""
        if self.choices:
            return self.choices[self.labels.index(str(values[names[0]]))]
        numbers = tuple(Scalar(values[name], self.at) for name in names)
        return spans.Sequence(numbers, self.at) if self.anchors else numbers[0]


@dataclass(frozen=True)
class Objective:
    """What a candidate is judged by.

    Args:
        kind: ``loss``, ``accuracy``, ``exact_match``, ``length``, ``task`` or ``function``.
        source: a file, ``hf://datasets/owner/name@revision/file``, a task's name, or ``module:function``.
        limit: how many characters of a text, or items, or examples of a task are used; None: all.
        column: the key of a line of JSON that holds the text.
        weight: how much it counts in a sum of several; None: they are not summed.
        guard: it is no aim: a candidate is refused that is worse than the base model by more than this.
        at: where its source is named.
    """

    kind: str
    source: str
    limit: int | None = None
    column: str = "text"
    weight: float | None = None
    guard: float | None = None
    at: Span | None = None

    @property
    def label(self) -> str:
        """What tables call it."""
        if self.kind == "task":
            return self.source
        return f"{self.kind} of {self.source if self.source.startswith('hf:') else os.path.basename(self.source)}"


@dataclass(frozen=True)
class Searched:
    """How the numbers of a recipe are searched: its `search:` block, and the holes that it is for.

    Args:
        holes: the places, in the text's order.
        objectives: what a candidate is judged by.
        report: what the found one is judged by at the end: on texts that no trial has seen.
        trials: how many candidates are tried.
        minutes: how long one run of the search may take, at most.
        seed: the numbers that are drawn follow from it.
        sampler: ``tpe``, ``cmaes``, ``nsga2``, ``random`` or ``grid``, as Optuna has them.
        prune: ``median`` or ``halving``: leave a candidate that falls behind; None: each is judged to its end.
        subset: ``adaptive``, in place of `prune`: leave a candidate that is worse than the best so far on the first
            items, by more than chance.
        patience: end after so many trials without a better one.
        storage: where the study is kept: a file, or the address of a database.
        at: where the block stands.
    """

    holes: tuple[Hole, ...]
    objectives: tuple[Objective, ...]
    report: tuple[Objective, ...] = ()
    trials: int = 100
    minutes: float | None = None
    seed: int = 0
    sampler: str = "tpe"
    prune: str | None = "median"
    subset: str | None = None
    patience: int | None = None
    storage: str | None = None
    at: Span | None = None

    @property
    def free(self) -> tuple[Hole, ...]:
        """The holes that have a value of their own."""
        return tuple(hole for hole in self.holes if hole.tied is None)

    @property
    def variables(self) -> dict[str, Hole]:
        """All that is drawn, each with its hole."""
        return {name: hole for hole in self.free for name in hole.variables}

    @property
    def start(self) -> Values:
        """What is drawn in the first trial."""
        return {name: hole.start for name, hole in self.variables.items()}

    @property
    def aims(self) -> tuple[Objective, ...]:
        """The objectives that are no guards."""
        return tuple(objective for objective in self.objectives if objective.guard is None)

    @property
    def is_front(self) -> bool:
        """Whether several aims stand beside each other, and none is above another."""
        return len(self.aims) > 1 and all(aim.weight is None for aim in self.aims)

    def settle(self, drawn: Values) -> Values:
        """The values that a recipe has for what was drawn: rounded, and each group divided by its sum."""
        found: dict[str, float | str] = {}
        for name, hole in self.variables.items():
            value = drawn[name]
            found[name] = value if isinstance(value, str) else hole.near(value)
        for names in self._groups():
            found |= _share(names, found, self.variables[names[0]].total)
        return found

    def _groups(self) -> Iterable[list[str]]:
        """The variables that have a sum together: of gradients those of one anchor."""
        found: dict[tuple[str, int], list[str]] = {}
        for hole in (hole for hole in self.free if hole.group is not None):
            for index, name in enumerate(hole.variables):
                found.setdefault((hole.group or "", index), []).append(name)
        return found.values()

    def probes(self) -> Iterator[Values]:
        """What together shows all that is wrong: numbers at the start, at the ends and between, by each choice."""
        chosen = {name: hole.labels for name, hole in self.variables.items() if hole.choices}
        for share in (None, 0.0, 1.0, _INSIDE):
            drawn = {
                name: hole.start if share is None or hole.choices else hole.number_at(share)
                for name, hole in self.variables.items()
            }
            yield drawn
            yield from ({**drawn, name: each} for name, labels in chosen.items() for each in labels)

    def nodes(self, drawn: Values) -> dict[Span, Node]:
        """What stands in the place of each hole."""
        values, by_name = self.settle(drawn), {hole.name: hole for hole in self.free}
        of = {hole.at: by_name[hole.tied] if hole.tied else hole for hole in self.holes}
        return {at: hole.node(values, hole.variables) for at, hole in of.items()}


def _share(names: Sequence[str], values: Values, total: float) -> Values:
    """Numbers in the same ratio that have this sum; all alike where they are all 0."""
    numbers = [float(values[name]) for name in names]
    whole = math.fsum(numbers)
    found = [float(f"{total * (number / whole if whole else 1 / len(names)):.{_DIGITS}g}") for number in numbers[:-1]]
    return dict(zip(names, [*found, max(0.0, round(total - math.fsum(found), 10))], strict=True))


def choice_text(node: Node) -> str:
    """A choice as text, as the study's table has it."""
    if isinstance(node, Scalar):
        return str(node.value).lower() if isinstance(node.value, bool) else str(node.value)
    items = node.items if isinstance(node, spans.Sequence) else [entry.value for entry in node.entries]
    return f"[{', '.join(map(choice_text, items))}]"


def fill_holes(node: Node, nodes: Mapping[Span, Node]) -> Node:
    """The tree with what stands in the place of its holes, by where they stand."""
    if isinstance(node, Scalar):
        return node
    if node.at in nodes and is_hole(node):
        return nodes[node.at]
    if isinstance(node, spans.Sequence):
        return replace(node, items=tuple(fill_holes(item, nodes) for item in node.items))
    return replace(node, entries=tuple(replace(entry, value=fill_holes(entry.value, nodes)) for entry in node.entries))


def is_hole(node: Node) -> bool:
    """Whether a node is written as one: a map with the key search."""
    return isinstance(node, spans.Mapping) and any(entry.key == KEY for entry in node.entries)


KEY = "search"
