"""The line for the recipes of a job: each is checked, planned, searched or merged, whatever is wrong with another.

Not here: which recipes (job), a search of several runs (search), and how it is told in the end (outcomes).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from merger.action import search
from merger.action.job import RUNNING, ActionRun, recipes
from merger.action.outcomes import Outcome, annotate
from merger.card.facts import PlanSummary
from merger.card.render import render
from merger.cli import markdown, reports, text
from merger.errors import MergerError, Problem, RecipeError, UploadError
from merger.lock.lock import pins
from merger.methods.registry import methods
from merger.run.artifacts import chats
from merger.run.look import sampled_doubts
from merger.run.options import Options, destination, stated_destination, with_free_memory
from merger.run.pipeline import Ready, Resumed, merge, trusted_publishing
from merger.run.prepare import lock_path, parse_text, plan, read_recipe
from merger.runtime import tell_limits
from merger.safety.names import hub_path
from merger.safety.text import line
from merger.statistics.kept import Awaited, find_kept, measure_awaited

if TYPE_CHECKING:
    from merger.planning.plan import Plan
    from merger.recipe.model import Recipe
    from merger.run.found import SearchFacts
    from merger.run.pipeline import Event
    from merger.stores.resolve import Library

STOPPED = 75
"""The exit code of a run that stopped before the time limit: sysexits.h says of it "try again later"."""


def deal_with(job: ActionRun) -> Iterator[Outcome]:
    """Deal with each recipe; what is wrong with one keeps none of the others waiting."""
    found = recipes(job.inputs, job.event, job.top, job.api)
    if not found:
        job.log.command("notice", "no recipe was added or changed: nothing to do", title="Merger")
    if len(found) > 1 and job.inputs.options.to is not None and job.mode in RUNNING:
        names = ", ".join(map(str, found))
        hint = "leave it out, and let each recipe say publish: {repo: owner/name}"
        raise RecipeError(Problem(f"input to: it is one place, and there are several recipes: {names}", hint=hint))
    for path in found:
        with job.log.group(f"{job.mode} {path}"), job.log.text():
            outcome = _outcome(job, path)
        annotate(job, outcome)
        yield outcome


def _outcome(job: ActionRun, path: Path) -> Outcome:
    """What comes of a recipe, told on the way."""
    known = [Outcome(job.named(path))]
    try:
        with tell_limits():
            known.extend(_steps(job, path, known[0]))
    except MergerError as error:
        print(text.format_problems(error))
        return replace(known[-1], state="failed", problems=error.problems, exit_code=error.exit_code)
    return known[-1]


def _steps(job: ActionRun, path: Path, outcome: Outcome) -> Iterator[Outcome]:
    """The outcome as far as it is known, after each step of the line."""
    recipe = read_recipe(path)
    outcome = replace(outcome, warnings=recipe.warnings)
    yield outcome
    if job.mode == "check":
        print(line(f"{outcome.recipe}: well formed"))
        return
    facts, known = None, job.inputs.options
    if job.mode == "search":
        effort = search.effort_of(job, recipe)
        known, awaited = find_kept(recipe, _reading(with_free_memory(replace(known, part=None))))
        _measure(awaited)
        outcome, best, facts = search.go_on(job, recipe, known, effort, outcome)
        yield outcome
        if best is None:
            return
        recipe = read_recipe(best)
    makes = job.mode in RUNNING and recipe.search is None
    options, awaited = replace(options_of(job, recipe, makes), measured=known.measured), ()
    if not job.event.is_foreign:  # for a stranger nothing is measured
        options, awaited = find_kept(recipe, options)
    planned, store = plan(recipe, options)
    looked = sampled_doubts(planned, store) if options.part is None and not options.publish_only else ()
    found = PlanSummary(planned, stated_destination(recipe, options) or None, looked)
    outcome = replace(outcome, state="planned", summary=found)
    yield outcome
    if job.event.pull is not None:
        name = hub_path(found.to or "") or "merged"
        card = render(planned, methods(), name, {"chats": chats(planned, store)})
        outcome = replace(outcome, changed=_changed(job, outcome.recipe, found, options), card=card)
        yield outcome
    print(text.plan_text(found), flush=True)
    if makes or job.inputs.mode in RUNNING:
        _measure(awaited)
        yield _merge(job, outcome, planned, store, options, facts)


def _measure(awaited: tuple[Awaited, ...]) -> None:
    measure_awaited(awaited, before=lambda each: print(reports.measurement_text(each.planned, each.disk), flush=True))


def _changed(job: ActionRun, name: str, found: PlanSummary, options: Options) -> str:
    """What the recipe makes otherwise than where the pull request wants to go, or why that is not known."""
    try:
        texts = [job.event.before(each, job.top, job.api) for each in (name, lock_path(Path(name)).as_posix())]
        if texts[0] is None:
            return "**New:** there is no such recipe yet."
        recipe = parse_text(texts[0], name)
        before, _ = plan(recipe, options, pins(texts[1], name) if texts[1] else {})
        return markdown.changes_section(found, PlanSummary(before, stated_destination(recipe, options) or None))
    except MergerError as error:
        return f"**Changed:** what was there before cannot be planned. {markdown.sentence(error.problems[0].what)}."


# ---- what it may use ------------------------------------------------------------------------------------------------


def options_of(job: ActionRun, recipe: Recipe, makes: bool = False) -> Options:
    """The inputs' options, with what this machine and this job add to them.

    Raises:
        UploadError: there is no token to publish with.
    """
    if job.event.is_foreign:  # neither a token nor what a token has brought into the cache reads for a stranger
        return replace(job.inputs.options, read_token=False)
    options = _reading(replace(job.inputs.options, publish_only=job.mode == "publish"))
    if not makes:
        return options
    to = destination(recipe, options)
    repo = hub_path(to)
    if repo is None or options.write_token:
        return with_free_memory(options)
    if "ACTIONS_ID_TOKEN_REQUEST_URL" not in job.environment:
        hint = "give hf-token, or let the job have the permission id-token: write and the repo trust this workflow"
        raise UploadError(Problem(f"there is no token to publish {to} with", hint=hint))
    token = trusted_publishing(repo)
    job.log.mask(token)
    return replace(with_free_memory(options), read_token=options.read_token or False)


def _reading(options: Options) -> Options:
    """One token reads and writes where the workflow gives one only."""
    return options if options.read_token else replace(options, read_token=options.write_token)


# ---- making it ------------------------------------------------------------------------------------------------------


def _merge(
    job: ActionRun, outcome: Outcome, planned: Plan, store: Library, options: Options, found: SearchFacts | None
) -> Outcome:
    """Make it; it is left after a file where the next might not be done in time."""
    progress = text.Progress(planned.nbytes, sys.stdout)
    watch = Watch(job.deadline)

    def tell(event: Event) -> None:
        text.show(event, progress)
        watch.look(event)

    try:
        result = merge(planned, store, options, tell, found)
    except TimeIsUpError:
        return replace(outcome, state="stopped", exit_code=STOPPED)
    print(text.result_text(result))
    state = "part" if result.part else "published" if result.is_new else "unchanged"
    return replace(outcome, state=state, result=result)


class TimeIsUpError(Exception):
    """A run should be left: it is raised in its midst."""


class Watch:
    """Whether a run should be left: after a file, when two more of the slowest kind would not fit into the time.

    Two, since the last file may still be on its way to the Hub. It is left when another file is begun after that, so
    that a run whose files are all made is let to its end.
    """

    def __init__(self, deadline: float | None) -> None:
        self._deadline, self._slowest, self._last = deadline, 0.0, time.monotonic()
        self._is_late = deadline is not None and self._last > deadline

    def look(self, event: Event) -> None:
        """To be told of each event.

        Raises:
            TimeIsUpError: it should.
        """
        if self._deadline is not None and text.file_done(event):
            now = time.monotonic()
            self._slowest, self._last = max(self._slowest, now - self._last), now
            self._is_late = now + 2 * self._slowest > self._deadline
        elif self._is_late and not isinstance(event, (Ready, Resumed)):
            raise TimeIsUpError
