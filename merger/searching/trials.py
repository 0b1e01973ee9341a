"""Trials of a study and which of them is best. Not here: which numbers are tried (study, draws)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from merger.recipe.searched import Searched, Values
from merger.searching.objectives import Floats, Scored, Step, gain

FIRST_ITEMS = 16
"""By fewer items the bootstrap believes in chance."""


class Pruned(Exception):
    """A candidate falls behind the others, and is left."""


Judge = Callable[[Values, Step | None], Sequence[float]]
"""Scores a candidate by each objective, in their order; a MergerError of it makes the trial a failed one."""


class Race:
    """Compares a candidate with the best so far, item by item, whenever twice as many items are scored.

    Args:
        best: the items' scores of the best; none: nothing is behind it.
        higher: whether more is better.
    """

    def __init__(self, best: Sequence[float], higher: bool) -> None:
        self._best, self._higher, self._next = np.array(best), higher, FIRST_ITEMS
        self.items: Floats = np.empty(0)

    def is_lost(self, so_far: Scored) -> bool:
        """Whether the candidate is worse by more than the chance of these items."""
        self.items = so_far.items
        if not self._next <= self.items.size < self._best.size:
            return False
        self._next = 2 * self.items.size
        before = Scored(0.0, self._best[: self.items.size])
        return gain(so_far, before, self._higher).high < 0


@dataclass(frozen=True)
class Trial:
    """What came of one candidate.

    Args:
        number: of the trial, from 0; those that were lost with their worker do not count.
        state: ``complete``, ``pruned``, ``failed`` or ``running``.
        drawn: what was drawn; `Searched.settle` says what the recipe had for that.
        scores: by each objective; none unless it is complete.
        keeps: whether it is no worse than the guards allow.
        seconds: how long it took.
        why: what went wrong, where something did.
    """

    number: int
    state: str
    drawn: Values
    scores: tuple[float, ...] = ()
    keeps: bool = True
    seconds: float = 0.0
    why: str = ""


@dataclass(frozen=True)
class Aims:
    """How scores become what Optuna is told.

    Args:
        searched: the recipe's block.
        higher: whether more is better, for each objective.
        base: the base model's scores, where there are guards.
    """

    searched: Searched
    higher: Sequence[bool]
    base: Sequence[float] = ()

    @property
    def directions(self) -> list[Literal["maximize", "minimize"]]:
        """One for each number of `values`."""
        if not self.searched.is_front and len(self.searched.aims) > 1:
            return ["maximize"]
        pairs = zip(self.searched.objectives, self.higher, strict=True)
        return ["maximize" if higher else "minimize" for aim, higher in pairs if aim.guard is None]

    def values(self, scores: Sequence[float]) -> list[float]:
        """The score of the one aim, the sum of several with weights, or several without."""
        rows = zip(self.searched.objectives, self.higher, scores, strict=True)
        aims = [(aim, higher, score) for aim, higher, score in rows if aim.guard is None]
        if self.searched.is_front or len(aims) == 1:
            return [score for _, _, score in aims]
        return [math.fsum((aim.weight or 0.0) * (score if higher else -score) for aim, higher, score in aims)]

    def guards(self, scores: Sequence[float]) -> list[float]:
        """How much worse than allowed it is, by each guard; 0 or less where it is not."""
        rows = zip(self.searched.objectives, self.higher, scores, self.base or scores, strict=True)
        return [
            (base - score if higher else score - base) - objective.guard
            for objective, higher, score, base in rows
            if objective.guard is not None
        ]

    def gains(self, scores: Sequence[float]) -> list[float]:
        """The same, more being better."""
        pairs = zip(self.values(scores), self.directions, strict=True)
        return [value if direction == "maximize" else -value for value, direction in pairs]


def front_of(trials: Sequence[Trial], aims: Aims) -> list[Trial]:
    """Those of the trials above which there is no other; of one aim it is the best one, and of equal ones the first."""
    found = [trial for trial in trials if trial.state == "complete" and trial.keeps]
    gains = np.array([aims.gains(trial.scores) for trial in found]).reshape(len(found), len(aims.directions))
    earlier = np.tri(len(found), k=-1, dtype=bool)
    above = (gains[None] >= gains[:, None]).all(axis=2) & ((gains[None] > gains[:, None]).any(axis=2) | earlier)
    return [found[place] for place in np.flatnonzero(~above.any(axis=1))]


def best_of(trials: Sequence[Trial], aims: Aims, count: int = 1) -> list[Trial]:
    """The best of these trials, the best one first.

    Of several aims without weights those of the front come first; and of them the ones that lose the least from the
    best of each aim, as shares of what lies between the front's ends.
    """
    front = front_of(trials, aims)
    if not front:
        return []
    reached = np.array([aims.gains(trial.scores) for trial in front])
    most, least = reached.max(0), reached.min(0)
    width = np.where(most > least, most - least, 1.0)

    def loss(trial: Trial) -> float:
        lost = (most - np.array(aims.gains(trial.scores))) / width
        return float(np.linalg.norm(lost)) if len(lost) > 1 else float(lost[0])

    found = [trial for trial in trials if trial.state == "complete" and trial.keeps]
    return sorted(found, key=lambda trial: (trial not in front, loss(trial), trial.number))[:count]
