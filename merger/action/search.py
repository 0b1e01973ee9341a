"""A search in jobs of the Action: gone on with from one run to the next, its best offered as a pull request.

Not here: the search (searching), and merging what was found (line).
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from merger.action.github import GitHubError
from merger.action.job import ActionRun
from merger.action.outcomes import Outcome
from merger.cli import markdown, reports
from merger.errors import Problem, RecipeError
from merger.run.extras import refuse_missing
from merger.safety.paths import inside
from merger.searching.effort import Effort, results_of

if TYPE_CHECKING:
    from merger.recipe.model import Recipe
    from merger.run.found import SearchFacts
    from merger.run.options import Options


def effort_of(job: ActionRun, recipe: Recipe) -> Effort:
    """How far this run goes; a job of a matrix but the first one only tries candidates.

    Raises:
        RecipeError: nothing is searched, or the jobs of a matrix would not see each other's.
    """
    part, left = job.inputs.options.part, job.deadline and (job.deadline - time.monotonic()) / 60
    effort = Effort(minutes=left, join=part is not None and part.number > 1)
    storage = effort.of(recipe).storage or ""
    if part is not None and "://" not in storage:
        hint = "write storage: postgresql://host/name, which all of them reach"
        raise RecipeError(Problem(f"input part: no other job sees {storage}", hint=hint))
    refuse_missing(recipe)
    return effort


def go_on(
    job: ActionRun, recipe: Recipe, options: Options, effort: Effort, outcome: Outcome
) -> tuple[Outcome, Path | None, SearchFacts | None]:
    """Go on with a search and keep what it has come to; and what is to be merged of it, where that is asked."""
    from merger.searching.search import search, write_study  # takes what may be missing
    from merger.searching.study import OUT_OF_TIME

    searched = effort.of(recipe)
    try_more = partial(search, recipe, options, effort, reports.Trials(searched).show)
    if effort.join:
        return replace(outcome, state="part", found=f"{len(try_more().trials)} candidates so far."), None, None
    branch = _branch_of(job, outcome)
    with _kept_study(job, outcome.recipe, branch, searched.storage or "") as keep:
        study = try_more()
        written = write_study(study)
        keep(written)
    print(reports.study_text(study, written), flush=True)
    told = job.environment
    repository = f"{told.get('GITHUB_SERVER_URL', 'https://github.com')}/{told.get('GITHUB_REPOSITORY', '')}"
    place = f"{repository}/raw/{branch}/{job.named(results_of(Path(recipe.path)))}"
    shown = {f"{place}/{picture.place}": picture.alt for picture in study.pictures}
    found = markdown.search_section(study.found.facts, study.why, study.table, shown)
    if study.why == OUT_OF_TIME:
        return replace(outcome, state="stopped", found=found), None, None
    outcome = replace(outcome, state="searched", found=found)
    _offer(job, outcome, branch)
    return outcome, written[0] if options.to else None, study.found


def _branch_of(job: ActionRun, outcome: Outcome) -> str:
    """The branch of a recipe's search: a name that git takes, whatever theirs are."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(outcome.recipe).stem).strip("-")
    return f"search/{plain}-{hashlib.sha256(json.dumps([outcome.recipe, job.branch]).encode()).hexdigest()[:8]}"


@contextmanager
def _kept_study(job: ActionRun, name: str, branch: str, storage: str) -> Iterator[Callable[[Iterable[Path]], None]]:
    """A branch holds the study from one run to the next, however this one ends, and what is found beside it.

    A cache is dropped when nobody has asked for it for a week, and an artifact belongs to one run.
    """
    there = None if "://" in storage else Path(storage)
    job.api.make_branch(branch, job.environment.get("GITHUB_SHA", ""))

    def keep(paths: Iterable[Path]) -> None:
        for path in paths:
            job.api.commit_file(job.named(path), path.read_bytes(), f"Search the numbers of {name}", branch)

    if there is not None:
        if inside(job.inputs.folder / there, job.top) is None:
            raise RecipeError(Problem(f"storage: {storage} is outside of this repository", hint="name one inside"))
        before = job.api.file_at(job.named(there), branch)
        there.parent.mkdir(parents=True, exist_ok=True)
        if before is not None:
            there.write_bytes(before)
    try:
        yield keep
    finally:
        keep([there] if there is not None and there.is_file() else [])


def _offer(job: ActionRun, outcome: Outcome, branch: str) -> None:
    """Open the pull request with what was found; where we may not, the branch has to do."""
    try:
        page = job.api.open_pull(branch, job.branch, f"Numbers for {outcome.recipe}", outcome.found)
        job.log.command("notice", f"the found recipe is in {page}", file=outcome.recipe, title="Merger")
    except GitHubError as error:
        job.log.command("notice", f"{error}; the found recipe is in the branch {branch}", title="Merger")
