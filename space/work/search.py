"""A search as a job: the worker's part, which tries candidates, and tells the best recipe and how it goes on the way.

Within the Space's minutes, on texts that were pasted or that lie on the Hub at a commit. Its study outlives the worker,
and goes on where the next one is. Not here: what of a searched
recipe is taken from strangers (admission), and the search itself (merger.searching).
"""

from __future__ import annotations

import base64
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from merger.cli.markdown import search_section
from merger.errors import EvaluationError, Problem
from merger.run.options import Options
from merger.searching.effort import Effort

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from merger.recipe.model import Recipe
    from merger.searching.search import Event, Study

PASTED = ("search.txt", "report.txt")
"""The files beside a searched recipe: texts that its owner has pasted."""

_SECONDS = 2.0
"""Between two pictures, at least: one takes about half of one to draw."""

_INCHES, _LETTERS = 4.0, 48
"""How wide a picture is, and its title: the letters are legible where a phone shows it."""


def run_search(recipe: Recipe, options: Options, minutes: float, place: Path, tell: Callable[..., None]) -> None:
    """Search, and tell what is found.

    Args:
        minutes: how long candidates may be tried; the report at the end may take as long again.
        place: the study's file; what is in it goes on.
        tell: tells the queue.

    Raises:
        MergerError: the search's; EvaluationError: the report takes too long.
    """
    from merger.searching.search import search

    asked = recipe.search.minutes if recipe.search else None
    minutes, course = min(asked or minutes, minutes), _Course(recipe, tell)
    with _ending(minutes):
        study = search(recipe, options, Effort(minutes=minutes, storage=str(place)), course.note)
    tell(say=f"{study.why}; best is trial {study.best[0].number}")
    told = search_section(study.found.facts, study.why, "", {})
    tell(found=study.recipe_text(), **course.news(study, told))


class _Course:
    """What is told of a search on its way."""

    def __init__(self, recipe: Recipe, tell: Callable[..., None]) -> None:
        self._recipe, self._tell, self._drawn, self._kept = recipe, tell, 0.0, 0

    def note(self, event: Event) -> None:
        """Tell of it."""
        from merger.searching.search import Searching, Tried

        if isinstance(event, Searching):
            self._work, searched = event.work, event.work.searched
            study = self._study()
            self._kept = len(study.trials)
            words = f"goes on behind {self._kept} trials" if self._kept else f"searched by {searched.sampler}"
            found = {"found": study.recipe_text()} if study.best else {}
            self._tell(kept=self._kept, say=f"{', '.join(searched.variables)}: {words}", **found)
        elif isinstance(event, Tried):
            study, more = self._study(), dict[str, Any]()
            if event.is_best:
                scores = ", ".join(f"{score:.4g}" for score in event.trial.scores)
                more = {"found": study.recipe_text(), "say": f"trial {event.trial.number} is the best so far: {scores}"}
            self._tell(**self.news(study), **more)
        else:
            self._tell(say=f"{event.model} is scored on what no trial has seen")

    def news(self, study: Study, told: str = "") -> dict[str, Any]:
        """How many candidates this run has tried; and at times, or at the end, where something is told, how it went."""
        news: dict[str, Any] = {"made": len(study.trials) - self._kept}
        if study.best and (told or time.monotonic() - self._drawn > _SECONDS):
            self._drawn = time.monotonic()
            outcome = {"table": study.table, "importance": self._work.importance(), "told": told}
            news |= {"picture": _picture(study), "outcome": outcome}
        return news

    def _study(self) -> Study:
        from merger.searching.search import Study

        work = self._work
        return Study(self._recipe, work.aims, tuple(work.trials()), tuple(work.best()))


def _picture(study: Study) -> str:
    """The best so far over the trials, or the front, as base64."""
    shown = study.pictures[0]

    def paint(figure: Figure) -> None:
        shown.paint(figure)
        figure.set_figwidth(_INCHES)
        figure.axes[0].set_title(fill(figure.axes[0].get_title("left"), _LETTERS), loc="left", size=9)

    return base64.b64encode(next(iter(replace(shown, paint=paint).files.values()))).decode()


@contextmanager
def _ending(minutes: float) -> Iterator[None]:
    """End the trial that goes on when the minutes are over, and as long after that whatever goes on then."""

    def end(*_: object) -> None:
        hint = "shorten its texts, or search on your own machine: merger search"
        raise EvaluationError(Problem(f"this took longer than the {minutes:g} minutes that there are", hint=hint))

    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes, 60 * minutes)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
