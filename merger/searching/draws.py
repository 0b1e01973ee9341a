"""What a study draws: Optuna's samplers, made anew for each trial, and the points of a grid.

Not here: the study itself, and where it is kept (study).
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from merger.recipe.searched import Hole, Searched

_POINTS = 2
"""The fewest numbers of a range that a grid has."""


class Reseeded:
    """A sampler that is made anew for each trial, from its place among those that count: a process keeps nothing.

    Args:
        make: makes the sampler for such a place.
        place: a trial's.
    """

    def __init__(self, make: Callable[[int], BaseSampler], place: Callable[[FrozenTrial], int]) -> None:
        self._make, self._place = make, place
        self._made: tuple[int, int, BaseSampler] | None = None

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def ask(study: optuna.Study, trial: FrozenTrial, *more: Any) -> Any:
            if self._made is None or self._made[0] != trial.number:
                place = self._place(trial)
                self._made = trial.number, place, self._make(place)
            _, number, sampler = self._made
            if isinstance(sampler, optuna.samplers.CmaEsSampler | _Points):  # which draw by it; to others it is a name
                trial = copy.copy(trial)
                trial.number = number
            return getattr(sampler, name)(study, trial, *more)

        return ask


def make_sampler(searched: Searched, number: int) -> BaseSampler:
    """The sampler for the trial of this number, as any worker makes it."""
    if number == 0:
        return _Points([dict(searched.start)], spaces_of(searched))
    seed = int.from_bytes(hashlib.sha256(f"{searched.seed} {number}".encode()).digest()[:4])
    samplers: Mapping[str, Callable[[], BaseSampler]] = {
        "tpe": lambda: optuna.samplers.TPESampler(seed=seed),
        "cmaes": lambda: optuna.samplers.CmaEsSampler(seed=seed),
        "nsga2": lambda: optuna.samplers.NSGAIISampler(seed=seed),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
        "grid": lambda: _Points(grid_of(searched), spaces_of(searched)),
    }
    return samplers[searched.sampler]()


@cache
def grid_of(searched: Searched) -> list[dict[str, Any]]:
    """All that a grid has, in an order of chance: so a part of it is spread over the whole."""
    axes = {name: _points(hole) for name, hole in searched.variables.items()}
    open_ones = [name for name, points in axes.items() if not points]
    rest = math.prod(len(points) for points in axes.values() if points)
    count = max(_POINTS, int((searched.trials / rest) ** (1 / max(1, len(open_ones)))))
    for name in open_ones:
        hole = searched.variables[name]
        axes[name] = [hole.number_at(place / (count - 1)) for place in range(count)]
    grid = [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]
    random.Random(searched.seed).shuffle(grid)
    return grid


class _Points(BaseSampler):
    """The points of a grid, one after the other; the first trial is none of them."""

    def __init__(self, points: Sequence[dict[str, Any]], space: dict[str, BaseDistribution]) -> None:
        self._points, self._space = points, space

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._space

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._points[(trial.number - 1) % len(self._points)]

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, name: str, of: BaseDistribution) -> Any:
        return self._points[(trial.number - 1) % len(self._points)][name]


def spaces_of(searched: Searched) -> dict[str, BaseDistribution]:
    """What each variable is drawn from."""
    return {name: _space(hole) for name, hole in searched.variables.items()}


def _space(hole: Hole) -> BaseDistribution:
    if hole.choices:
        return CategoricalDistribution(hole.labels)
    if hole.whole:
        return IntDistribution(int(hole.low), int(hole.high), step=int(hole.step or 1))
    return FloatDistribution(hole.low, hole.high, log=hole.log, step=hole.step)


def _points(hole: Hole) -> list[float | str]:
    """All that a hole may be; none where that has no end."""
    if hole.choices or hole.step is None:
        return list(hole.labels)
    return [hole.near(hole.low + place * hole.step) for place in range(round((hole.high - hole.low) / hole.step) + 1)]


def make_pruner(searched: Searched) -> optuna.pruners.BasePruner:
    """What leaves a candidate that falls behind the median, or the half of the others; or none."""
    if searched.prune == "halving":
        return optuna.pruners.SuccessiveHalvingPruner()
    return optuna.pruners.MedianPruner() if searched.prune else optuna.pruners.NopPruner()
