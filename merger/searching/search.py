"""A search from its recipe to what it found: plan, candidates, trials, and the report on texts that no trial has seen.

Not here: what is tried (study), how a candidate is made and scored (candidates, objectives), and what is written of it
(outcome).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import yaml

from merger.card.facts import lock_file
from merger.errors import EvaluationError, MergerError, Problem, RecipeError
from merger.lock.checkpoints import with_means
from merger.lock.lock import Pin
from merger.lock.locked import display_name
from merger.methods.registry import methods
from merger.planning.plan import Plan, make_plan
from merger.recipe.model import Publish, Recipe
from merger.recipe.parse import parse
from merger.recipe.searched import Searched, Values
from merger.run.found import SearchFacts
from merger.run.options import Options, budget_of
from merger.run.prepare import lock_path, parse_text, plan
from merger.runtime import refusal
from merger.searching.candidates import Candidates, arithmetic_of
from merger.searching.effort import Effort, results_of
from merger.searching.objectives import Scored, Step, gain, scorers
from merger.searching.outcome import filled_text, pictures_of, table_text
from merger.searching.study import Worker
from merger.searching.trials import Aims, Trial
from merger.stores.resolve import Library

if TYPE_CHECKING:
    from merger.card.pictures.canvas import Picture

START = "the recipe before the search"
NOISE = ": within noise"
"""With this ends what is told of a gain that other texts of the same kind might as well not have shown."""


@dataclass(frozen=True)
class Searching:
    """A search is about to go on.

    Args:
        work: its study.
        seconds: how long it took to come so far.
        arithmetic: what candidates run in, such as ``float32``.
        planned: its recipe as it was before the search.
    """

    work: Worker
    seconds: float
    arithmetic: str
    planned: Plan


@dataclass(frozen=True)
class Tried:
    """A candidate was tried.

    Args:
        trial: what came of it.
        is_best: whether none so far was better.
    """

    trial: Trial
    is_best: bool


@dataclass(frozen=True)
class Reporting:
    """A model is scored on what no trial has seen."""

    model: str


Event: TypeAlias = Searching | Tried | Reporting


@dataclass(frozen=True)
class Standing:
    """What the found recipe, the one before the search and the parents score by one objective of the report.

    Args:
        objective: its name.
        higher: whether more is better.
        scores: by model; the found one is the first, the recipe before the search the second.
    """

    objective: str
    higher: bool
    scores: Mapping[str, Scored] = field(repr=False)

    def told(self) -> Iterator[str]:
        """Sentences: how much better it is than each other one, and whether that is more than chance."""
        found, *others = self.scores.items()
        for name, score in others:
            by = gain(found[1], score, self.higher)
            word = f"{abs(by.value):.3g} {'better' if by.value > 0 else 'worse'}" if by.value else "no better"
            between = "" if by.low == -float("inf") else f" (95 % between {by.low:+.3g} and {by.high:+.3g})"
            noise = NOISE if by.within_noise and between else ""
            yield f"{self.objective}: {word} than {name}{between}{noise}"


@dataclass(frozen=True)
class Study:
    """What a search has found.

    Args:
        recipe: the searched recipe.
        aims: what was searched for.
        trials: all that was tried, in order.
        best: the best of them, the first one being the best.
        report: how it does on what no trial has seen; nothing where the recipe names no such thing.
        why: why it ended.
        importance: how much each number matters.
        seconds: how long this run took.
        locks: of each of the best the lock file, by which it is merged of the very models that were searched.
    """

    recipe: Recipe
    aims: Aims
    trials: tuple[Trial, ...]
    best: tuple[Trial, ...]
    report: tuple[Standing, ...] = ()
    why: str = ""
    importance: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    locks: tuple[str, ...] = field(default=(), repr=False)

    @property
    def values(self) -> Values:
        """What was found, by name."""
        return self.aims.searched.settle(self.best[0].drawn)

    @cached_property
    def table(self) -> str:
        """All trials as CSV."""
        return table_text(self.trials, self.aims)

    @cached_property
    def pictures(self) -> list[Picture]:
        """Best so far or front, importance, slices."""
        return pictures_of(self.trials, self.aims, self.importance)

    @property
    def found(self) -> SearchFacts:
        """What card and result tell of it."""
        searched, states = self.aims.searched, [trial.state for trial in self.trials]
        counts = ", ".join(f"{states.count(each)} {each}" for each in dict.fromkeys(states))
        judged = ", ".join(objective.label for objective in searched.objectives)
        ranges = {name: hole.range_text for name, hole in searched.variables.items()}
        models = list(self.report[0].scores) if self.report else []
        facts = {
            "sentence": f"Its numbers were found by {len(states)} trials ({searched.sampler}; {counts}) by {judged}.",
            "numbers": [[name, ranges[name], str(value)] for name, value in self.values.items()],
            "columns": ["measured", "this model", *models[1:]],
            "rows": [[row.objective, *(f"{score.value:.4g}" for score in row.scores.values())] for row in self.report],
            "told": [told for row in self.report for told in row.told()],
        }
        return SearchFacts(facts, self.table, tuple(self.pictures))

    def recipe_text(self, place: int = 0) -> str:
        """The recipe with the numbers of the best trial, or of another one of the best."""
        trial, searched = self.best[place], self.aims.searched
        scores = ", ".join(f"{each.label} {score:.4g}" for each, score in zip(searched.objectives, trial.scores,
                                                                              strict=True))  # fmt: skip
        count = f"trial {trial.number} of {len(self.trials)}"
        says = f"Found by merger search in {Path(self.recipe.path).name}: {count} ({searched.sampler}), {scores}"
        return filled_text(self.recipe.text, searched, trial.drawn, says)


def search(
    recipe: Recipe, options: Options, effort: Effort | None = None, on_event: Callable[[Event], object] = id
) -> Study:
    """Find the numbers that a recipe leaves open.

    A study that is kept in a storage goes on where it stopped.

    Args:
        recipe: with a `search:` block.
        options: what it may use; where its result goes is nothing to it.
        effort: how far it goes.
        on_event: is told what happens on the way; what it raises ends the run, and the study can go on.

    Raises:
        RecipeError: nothing is searched in the recipe, or what it names is not there.
        EvaluationError: no candidate can be scored.
        MergerError: the plan's.
    """
    began, effort = time.monotonic(), effort or Effort()
    line = _Line(recipe, options, effort.of(recipe))
    with _settings(options.threads):
        work = line.study()
        arithmetic = work.agree("arithmetic", arithmetic_of(line.planned, options.device))
        with Candidates(line.planned, line.store, options.device, arithmetic) as candidates:
            work.aims = replace(work.aims, base=line.base(candidates))
            on_event(Searching(work, time.monotonic() - began, arithmetic, line.planned))
            told = partial(_tell, work, on_event)
            why = work.run(partial(line.judge, candidates), told, line.searched.minutes, wait=not effort.join)
            trials, best = work.trials(), work.best(effort.top)
            if not best and not effort.join:
                raise _nothing_found(trials, line.searched)
            report = () if effort.join else tuple(line.report(candidates, best[0], on_event))
    seconds, tried = time.monotonic() - began, (tuple(trials), tuple(best))
    study = Study(recipe, work.aims, *tried, report, why, work.importance(), seconds)
    return replace(study, locks=tuple(line.lock_of(study.recipe_text(place)) for place in range(len(best))))


@contextmanager
def _settings(threads: int | None) -> Iterator[None]:
    """The settings of libraries that a search has; afterwards they are as they were."""
    torch, log = import_module("torch"), import_module("optuna").logging
    before = torch.get_num_threads(), log.get_verbosity()
    torch.set_num_threads(threads or before[0])
    log.set_verbosity(log.ERROR)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        log.set_verbosity(before[1])


def _tell(work: Worker, on_event: Callable[[Event], object], trial: Trial) -> None:
    best = work.best() if trial.state == "complete" else []
    on_event(Tried(trial, bool(best) and best[0].number == trial.number))


def _nothing_found(trials: Sequence[Trial], searched: Searched) -> MergerError:
    why = next((trial.why for trial in trials if trial.why), "")
    refused = "" if why or not trials else "; each was worse than its guards allow"
    what = f"none of {len(trials)} candidates could be used{f': {why}' if why else refused}"
    return EvaluationError(Problem(what, searched.at, "search", "widen the ranges, or look at the objectives"))


class _Line:
    """What a search needs of its recipe.

    Args:
        recipe: that is searched.
        options: what it may use.
        searched: its block.
    """

    def __init__(self, recipe: Recipe, options: Options, searched: Searched) -> None:
        self.recipe, self.searched = recipe, searched
        self.options = replace(options, to=None, gguf=(), stream=False)
        self.planned, self.store = self._plan(replace(recipe, search=None, publish=Publish(), evaluate=None))
        self._pins = {str(each.ref): Pin(each.located.commit) for each in self.planned.locked.models
                      if each.located.commit}  # fmt: skip
        read = partial(scorers, folder=Path(recipe.path).parent, token=options.read_token, root=options.root)
        self.scorers, self._reporters = read(self.searched.objectives), read(self.searched.report)

    def _plan(self, recipe: Recipe, held: Mapping[str, Pin] | None = None) -> tuple[Plan, Library]:
        return plan(recipe, self.options, held)

    def study(self) -> Worker:
        """The study of this search, and of no other recipe's."""
        aims, storage = Aims(self.searched, [scorer.higher for scorer in self.scorers]), self.searched.storage
        if storage is not None and "://" not in storage:
            Path(storage).expanduser().parent.mkdir(parents=True, exist_ok=True)
        return Worker(aims, self._name(), storage)

    def base(self, candidates: Candidates) -> list[float]:
        """The base model's scores, where there are guards."""
        if len(self.searched.aims) == len(self.searched.objectives):
            return []
        candidates.make(self._alone(str(self.recipe.config_model)))
        return [each.value for each in candidates.score(self.scorers)]

    def _name(self) -> str:
        searched = self.searched
        holes = [[getattr(hole, key) for key in _HOLE] + [hole.labels] for hole in searched.holes]
        asked = [replace(objective, at=None) for objective in searched.objectives]
        known = f"{self.planned.hash} {holes} {asked} {searched.seed} {searched.sampler}"
        return f"{Path(self.recipe.path).stem} {hashlib.sha256(known.encode()).hexdigest()[:12]}"

    def judge(self, candidates: Candidates, drawn: Values, step: Step | None) -> list[float]:
        """The scores of a candidate."""
        candidates.make(self.plan_of(drawn))
        return [each.value for each in candidates.score(self.scorers, step)]

    def plan_of(self, drawn: Values) -> Plan:
        """The plan of the recipe with what was drawn; the models are those that were locked at the beginning."""
        recipe = parse(self.recipe.text, self.recipe.path, methods(), drawn)
        return self._plan_of_locked(replace(recipe, publish=Publish(), evaluate=None))

    def _plan_of_locked(self, recipe: Recipe) -> Plan:
        held = self.planned.locked
        known = with_means(recipe, self.store, [str(model.ref) for model in held.models])
        return make_plan(replace(held, recipe=known), methods(), budget_of(known, self.options), self.options.seed)

    def lock_of(self, text: str) -> str:
        """The lock file of a found recipe, by its text: a model that moves after the search changes nothing then."""
        planned = self._plan_of_locked(parse_text(text, self.recipe.path))
        return lock_file(planned, {}, lambda model, file: model.files[file].sha256)

    def report(self, candidates: Candidates, best: Trial, on_event: Callable[[Event], object]) -> Iterator[Standing]:
        """What the found recipe, the one before the search and the parents score on what no trial has seen."""
        if not self._reporters:
            return
        parents = {display_name(model): str(model.ref) for model in self.planned.locked.merged}
        plans: dict[str, Callable[[], Plan]] = {
            "the found recipe": partial(self.plan_of, best.drawn),
            START: lambda: self.planned,
            **{name: partial(self._alone, ref) for name, ref in parents.items()},
        }
        scores = dict[str, Sequence[Scored]]()
        for name, planned in plans.items():
            on_event(Reporting(name))
            candidates.make(planned())
            scores[name] = candidates.score(self._reporters)
        for place, scorer in enumerate(self._reporters):
            yield Standing(scorer.name, scorer.higher, {name: found[place] for name, found in scores.items()})

    def _alone(self, model: str) -> Plan:
        """The plan of one parent as it is."""
        content = {"merge_method": "passthrough", "models": [{"model": model}], "dtype": self.recipe.dtype}
        alone = parse_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), self.recipe.path)
        return self._plan(alone, self._pins)[0]


_HOLE = ("name", "low", "high", "log", "step", "whole", "anchors", "start", "tied", "group", "total")
"""What of a hole tells one search from another; where it stands does not."""


# ---- what is written ------------------------------------------------------------------------------------------------


def write_study(study: Study) -> list[Path]:
    """Write what was found beside its recipe: recipes of the best with their locks, and in a folder table and pictures.

    Returns:
        What was written, the best recipe first.

    Raises:
        RecipeError: it cannot be written.
    """
    recipe = Path(study.recipe.path)
    names = [".best", *(f".best-{place + 1}" for place in range(1, len(study.best)))]
    best = [recipe.with_name(f"{recipe.stem}{name}.yaml") for name in names]
    files = {path: study.recipe_text(place).encode() for place, path in enumerate(best)}
    files |= {lock_path(path): text.encode() for path, text in zip(best, study.locks, strict=True)}
    aside = {"trials.csv": study.table.encode()}
    for picture in study.pictures:
        aside |= picture.files
    files |= {results_of(recipe) / name: data for name, data in aside.items()}
    try:
        for path, data in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    except OSError as error:
        raise refusal(f"what was found cannot be written beside {recipe}", error, RecipeError) from None
    return list(files)
