"""A search as a job: the worker's part, which tries candidates, and tells the best recipe and a picture on the way.

Within the Space's minutes, on texts that were pasted or that lie on the Hub at a commit. Not here: what of a searched
recipe is taken from strangers (admission), and the search itself (merger.searching).
"""

from __future__ import annotations

import base64
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from merger.errors import EvaluationError, Problem
from merger.run.options import Options
from merger.searching.effort import Effort

if TYPE_CHECKING:
    from merger.recipe.model import Recipe
    from merger.searching.search import Event, Study

PASTED = ("search.txt", "report.txt")
"""The files beside a searched recipe: texts that its owner has pasted."""

_SECONDS = 2.0
"""Between two pictures, at least: one takes about half of one to draw."""


def run_search(recipe: Recipe, options: Options, minutes: float, tell: Callable[..., None]) -> None:
    """Search, and tell what is found.

    Args:
        minutes: how long candidates may be tried; the report at the end may take as long again.
        tell: tells the queue.

    Raises:
        MergerError: the search's; EvaluationError: the report takes too long.
    """
    from merger.searching.search import search

    asked = recipe.search.minutes if recipe.search else None
    minutes, course = min(asked or minutes, minutes), _Course(recipe, tell)
    with _ending(minutes):
        study = search(recipe, options, Effort(minutes=minutes), course.note)
    told = [f"{study.why}; best is trial {study.best[0].number}", *(of for row in study.report for of in row.told())]
    for line in told:
        tell(say=line)
    tell(made=len(study.trials), found=study.recipe_text(), picture=_picture(study))


class _Course:
    """What is told of a search on its way."""

    def __init__(self, recipe: Recipe, tell: Callable[..., None]) -> None:
        self._recipe, self._tell, self._drawn = recipe, tell, 0.0

    def note(self, event: Event) -> None:
        """Tell of it."""
        from merger.searching.search import Searching, Study, Tried

        if isinstance(event, Searching):
            self._work = event.work
            searched = event.work.searched
            self._tell(say=f"{', '.join(searched.variables)}: searched by {searched.sampler}")
        elif isinstance(event, Tried):
            work, news = self._work, dict[str, Any]()
            study = Study(self._recipe, work.aims, tuple(work.trials()), tuple(work.best()))
            if event.is_best:
                scores = ", ".join(f"{score:.4g}" for score in event.trial.scores)
                news = {"found": study.recipe_text(), "say": f"trial {event.trial.number} is the best so far: {scores}"}
            if study.best and time.monotonic() - self._drawn > _SECONDS:
                self._drawn, news["picture"] = time.monotonic(), _picture(study)
            self._tell(made=len(study.trials), **news)
        else:
            self._tell(say=f"{event.model} is scored on what no trial has seen")


def _picture(study: Study) -> str:
    """The best so far over the trials, or the front, as base64."""
    return base64.b64encode(next(iter(study.pictures[0].files.values()))).decode()


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
