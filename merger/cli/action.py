"""The Action's side of the line: a job on GitHub checks, plans or makes the recipes that its event is about.

Everything comes in by environment variables (action.yml sets them), and all that others wrote goes out as text.
Not here: reading them (inputs), GitHub itself (github), words (markdown, text), and the work (run).
"""

from __future__ import annotations

from merger.safety import secrets
from merger.safety.environment import OURS, hand_over

if __name__ == "__main__":
    hand_over()  # before anything that takes time: until then /proc shows the tokens

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from merger.card.escape import code
from merger.card.facts import PlanSummary
from merger.card.render import render
from merger.cli import markdown, reports, text
from merger.cli.github import (
    COMMENT_CHARACTERS,
    SUMMARY_CHARACTERS,
    Event,
    GitHubApi,
    GitHubError,
    Log,
    write_outputs,
    write_summary,
)
from merger.cli.inputs import Inputs, top
from merger.errors import MergerError, Problem, RecipeError, UploadError
from merger.lock.lock import pins
from merger.methods.registry import methods
from merger.run.artifacts import chats
from merger.run.extras import needs_of, refuse_missing
from merger.run.look import sampled_doubts
from merger.run.options import Options, destination, stated_destination, with_free_memory
from merger.run.pipeline import Ready, Result, Resumed, lock_text, merge, trusted_publishing
from merger.run.prepare import lock_path, named_recipes, parse_text, plan, read_recipe, with_gguf
from merger.runtime import Halt, halting, take_over, tell_limits
from merger.safety.names import HUB, hub_path
from merger.safety.paths import inside
from merger.safety.text import guard_streams, line
from merger.searching.effort import Effort, results_of
from merger.statistics.kept import Awaited, find_kept, measure_awaited

if TYPE_CHECKING:
    from merger.planning.plan import Plan
    from merger.recipe.model import Recipe
    from merger.run.found import SearchFacts
    from merger.run.pipeline import Event as RunEvent
    from merger.stores.resolve import Library

RUNNING = ("run", "publish", "search")
STARTED_TO_RUN = ("push", "workflow_dispatch", "schedule", "repository_dispatch")
_HEADS = "refs/heads/"
STOPPED = 75
"""The exit code of a run that stopped before the time limit: sysexits.h says of it "try again later"."""

MOST_PARTS = 256
"""GitHub's limit on the jobs of a matrix."""


# ---- which recipes, and what with them ------------------------------------------------------------------------------


def mode_of(inputs: Inputs, event: Event) -> str:
    """What is to be done with the recipes.

    Raises:
        RecipeError: what strangers have a hand in shall be run.
    """
    if inputs.mode in RUNNING and (event.is_foreign or not (event.is_ours or event.name == "pull_request")):
        why = "its recipes may be a stranger's" if event.is_foreign else "strangers can start it"
        what = f"input mode: {inputs.mode} is not for this event, {event.name}: {why}"
        hint = "leave mode out, and recipes are planned; they are merged by push, workflow_dispatch or schedule"
        raise RecipeError(Problem(what, hint=hint))
    if inputs.mode != "auto":
        return inputs.mode
    return "run" if event.name in STARTED_TO_RUN else "plan"


def recipes(inputs: Inputs, event: Event, top: Path, api: GitHubApi) -> list[Path]:
    """The recipes this job is about, relative to the working directory.

    In mode auto a push or a pull request is about those that it added or changed, itself or their lock file; else a
    job is about all that `recipe` names.

    Raises:
        RecipeError: a name leads out of the repository, or names nothing.
        GitHubError: nobody can tell what changed.
    """
    found = _find_recipes(inputs, top)
    changes = event.pull is not None or event.name == "push"
    changed = event.changed(top, api) if inputs.mode == "auto" and changes else None
    if changed is None:
        if not found:
            raise RecipeError(
                Problem(f"input recipe: there is no file {inputs.recipe!r}", hint="commit a recipe there")
            )
        return found
    there = {(top / name).resolve() for name in changed}
    return [path for path in found if {(inputs.folder / each).resolve() for each in (path, lock_path(path))} & there]


def _find_recipes(inputs: Inputs, top: Path) -> list[Path]:
    found: dict[Path, None] = {}
    for pattern in inputs.recipe.splitlines():
        for name in _files(pattern.strip(), inputs.folder):
            if inside(inputs.folder / name, top) is None:
                raise RecipeError(
                    Problem(f"input recipe: {name!r} is outside of this repository", hint="name one inside")
                )
            found[Path(os.path.normpath(name))] = None
    return list(found)


def _files(pattern: str, folder: Path) -> list[str]:
    """The file of that name, else the recipes in a folder of that name, or what fits the pattern; if they are there."""
    return [name for name in named_recipes(pattern, str(folder)) if os.path.lexists(folder / name)]


# ---- one recipe -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What has become of one recipe.

    Args:
        recipe: its path from the top of the repository.
        state: checked, planned, searched, published, unchanged, part, stopped or failed.
        summary: what was or would be made, and where it goes.
        result: what became of a run.
        problems: what went wrong.
        warnings: what is likely not meant.
        exit_code: 0, or that of the error.
        changed: what the pull request changes of what the recipe makes.
        card: the card of what would be made, as far as it is known then.
        found: what a search has found, in Markdown.
    """

    recipe: str
    state: str = "checked"
    summary: PlanSummary | None = None
    result: Result | None = None
    problems: tuple[Problem, ...] = ()
    warnings: tuple[Problem, ...] = ()
    exit_code: int = 0
    changed: str = ""
    card: str = ""
    found: str = ""

    @property
    def to(self) -> str | None:
        """Where it goes, if that is said."""
        return self.summary.to if self.summary else None

    @property
    def published(self) -> Result | None:
        """The merge where it lies, if it does."""
        return None if self.result is None or self.result.part is not None else self.result


class ActionRun:
    """The job: its inputs, its event and the places where its words go."""

    def __init__(self, inputs: Inputs, environment: Mapping[str, str], log: Log) -> None:
        self.inputs, self.environment, self.log = inputs, environment, log
        self.event = Event.read(environment)
        self.top = top(environment)
        self.api = GitHubApi(
            environment.get("GITHUB_API_URL", "https://api.github.com"),
            environment.get("GITHUB_REPOSITORY", ""),
            inputs.github_token,
        )
        self.mode = mode_of(inputs, self.event)
        self.deadline = time.monotonic() + 60 * inputs.time_limit if inputs.time_limit else None

    def results(self) -> Iterator[Outcome]:
        """Deal with each recipe; what is wrong with one keeps none of the others waiting."""
        found = recipes(self.inputs, self.event, self.top, self.api)
        if not found:
            self.log.command("notice", "no recipe was added or changed: nothing to do", title="Merger")
        if len(found) > 1 and self.inputs.options.to is not None and self.mode in RUNNING:
            names = ", ".join(map(str, found))
            hint = "leave it out, and let each recipe say publish: {repo: owner/name}"
            raise RecipeError(Problem(f"input to: it is one place, and there are several recipes: {names}", hint=hint))
        for path in found:
            with self.log.group(f"{self.mode} {path}"), self.log.text():
                outcome = self._outcome(path)
            self._annotate(outcome)
            yield outcome

    def _outcome(self, path: Path) -> Outcome:
        """What comes of a recipe, told on the way."""
        known = [Outcome(os.path.relpath(self.inputs.folder / path, self.top))]
        try:
            with tell_limits():
                known.extend(self._steps(path, known[0]))
        except MergerError as error:
            print(text.format_problems(error))
            return replace(known[-1], state="failed", problems=error.problems, exit_code=error.exit_code)
        return known[-1]

    def _steps(self, path: Path, outcome: Outcome) -> Iterator[Outcome]:
        """The outcome as far as it is known, after each step of the line."""
        recipe = read_recipe(path)
        outcome = replace(outcome, warnings=recipe.warnings)
        yield outcome
        if self.mode == "check":
            print(line(f"{outcome.recipe}: well formed"))
            return
        facts = None
        if self.mode == "search":
            outcome, best, facts = self._search(recipe, outcome)
            yield outcome
            if best is None:
                return
            recipe = read_recipe(best)
        makes = self.mode in RUNNING and recipe.search is None
        options = self._options(recipe, makes)
        awaited: tuple[Awaited, ...] = ()
        if not self.event.is_foreign:  # for a stranger nothing is measured
            options, awaited = find_kept(recipe, options)
        planned, store = plan(recipe, options)
        looked = sampled_doubts(planned, store) if options.part is None and not options.publish_only else ()
        found = PlanSummary(planned, stated_destination(recipe, options) or None, looked)
        outcome = replace(outcome, state="planned", summary=found)
        yield outcome
        if self.event.pull is not None:
            name = hub_path(found.to or "") or "merged"
            card = render(planned, methods(), name, {"chats": chats(planned, store)})
            outcome = replace(outcome, changed=self._changed(outcome.recipe, found, options), card=card)
            yield outcome
        print(text.plan_text(found), flush=True)
        if makes or self.inputs.mode in RUNNING:
            measure_awaited(awaited, before=_tell_measuring)
            yield self._merge(outcome, planned, store, options, facts)

    # ---- a search ----

    def _search(self, recipe: Recipe, outcome: Outcome) -> tuple[Outcome, Path | None, SearchFacts | None]:
        """Go on with a search and keep what it has come to; and what is to be merged of it, where that is asked."""
        part, left = self.inputs.options.part, self.deadline and (self.deadline - time.monotonic()) / 60
        effort = Effort(minutes=left, join=part is not None and part.number > 1)
        storage = effort.of(recipe).storage or ""
        if part is not None and "://" not in storage:
            hint = "write storage: postgresql://host/name, which all of them reach"
            raise RecipeError(Problem(f"input part: no other job sees {storage}", hint=hint))
        refuse_missing(recipe)
        from merger.searching.search import search, write_study  # takes what may be missing
        from merger.searching.study import OUT_OF_TIME

        options = _reading(with_free_memory(replace(self.inputs.options, part=None)))
        options, awaited = find_kept(recipe, options)
        measure_awaited(awaited, before=_tell_measuring)
        go_on = partial(search, recipe, options, effort, reports.Trials(effort.of(recipe)).show)
        if effort.join:
            return replace(outcome, state="part", found=f"{len(go_on().trials)} candidates so far."), None, None
        with self._kept_study(outcome.recipe, storage) as keep:
            study = go_on()
            written = write_study(study)
            keep(written)
        print(reports.study_text(study, written), flush=True)
        place = f"{self._raw(outcome)}/{self._named(results_of(Path(recipe.path)))}"
        shown = {f"{place}/{picture.place}": picture.alt for picture in study.pictures}
        found = markdown.search_section(study.found.facts, study.why, study.table, shown)
        if study.why == OUT_OF_TIME:
            return replace(outcome, state="stopped", found=found), None, None
        outcome = replace(outcome, state="searched", found=found)
        self._offer(outcome)
        return outcome, written[0] if options.to else None, study.found

    @contextmanager
    def _kept_study(self, name: str, storage: str) -> Iterator[Callable[[Iterable[Path]], None]]:
        """A branch holds the study from one run to the next, however this one ends, and what is found beside it.

        A cache is dropped when nobody has asked for it for a week, and an artifact belongs to one run.
        """
        branch, there = _search_branch(name, self._branch), "://" in storage or Path(storage)
        self.api.make_branch(branch, self.environment.get("GITHUB_SHA", ""))

        def keep(paths: Iterable[Path]) -> None:
            for path in paths:
                self.api.commit_file(self._named(path), path.read_bytes(), f"Search the numbers of {name}", branch)

        if isinstance(there, Path):
            if inside(self.inputs.folder / there, self.top) is None:
                raise RecipeError(Problem(f"storage: {storage} is outside of this repository", hint="name one inside"))
            before = self.api.file_at(self._named(there), branch)
            there.parent.mkdir(parents=True, exist_ok=True)
            if before is not None:
                there.write_bytes(before)
        try:
            yield keep
        finally:
            keep([there] if isinstance(there, Path) and there.is_file() else [])

    def _offer(self, outcome: Outcome) -> None:
        """Open the pull request with what was found; where we may not, the branch has to do."""
        title = f"Numbers for {outcome.recipe}"
        try:
            page = self.api.open_pull(_search_branch(outcome.recipe, self._branch), self._branch, title, outcome.found)
            self.log.command("notice", f"the found recipe is in {page}", file=outcome.recipe, title="Merger")
        except GitHubError as error:
            branch = _search_branch(outcome.recipe, self._branch)
            self.log.command("notice", f"{error}; the found recipe is in the branch {branch}", title="Merger")

    @property
    def _branch(self) -> str:
        """The branch that the job is about."""
        return self.environment.get("GITHUB_HEAD_REF") or self.environment.get("GITHUB_REF", "").removeprefix(_HEADS)

    def _raw(self, outcome: Outcome) -> str:
        """Where the files of a search's branch are shown."""
        told = self.environment
        repository = f"{told.get('GITHUB_SERVER_URL', 'https://github.com')}/{told.get('GITHUB_REPOSITORY', '')}"
        return f"{repository}/raw/{_search_branch(outcome.recipe, self._branch)}"

    def _named(self, path: Path) -> str:
        """A file of the working directory, from the top of the repository."""
        return Path(os.path.relpath(self.inputs.folder / path, self.top)).as_posix()

    # ---- a merge ----

    def _changed(self, name: str, found: PlanSummary, options: Options) -> str:
        """What the recipe makes otherwise than where the pull request wants to go, or why that is not known."""
        try:
            texts = [self.event.before(each, self.top, self.api) for each in (name, lock_path(Path(name)).as_posix())]
            if texts[0] is None:
                return "**New:** there is no such recipe yet."
            recipe = parse_text(texts[0], name)
            before, _ = plan(recipe, options, pins(texts[1], name) if texts[1] else {})
            return markdown.changes_section(found, PlanSummary(before, stated_destination(recipe, options) or None))
        except MergerError as error:
            return f"**Changed:** what was there before cannot be planned. {markdown.sentence(error.problems[0].what)}."

    def _options(self, recipe: Recipe, makes: bool = False) -> Options:
        """The inputs' options, with what this machine and this job add to them."""
        if self.event.is_foreign:  # neither a token nor what a token has brought into the cache reads for a stranger
            return replace(self.inputs.options, read_token=False)
        options = _reading(replace(self.inputs.options, publish_only=self.mode == "publish"))
        if not makes:
            return options
        to = destination(recipe, options)
        repo = hub_path(to)
        if repo is None or options.write_token:
            return with_free_memory(options)
        if "ACTIONS_ID_TOKEN_REQUEST_URL" not in self.environment:
            hint = "give hf-token, or let the job have the permission id-token: write and the repo trust this workflow"
            raise UploadError(Problem(f"there is no token to publish {to} with", hint=hint))
        token = trusted_publishing(repo)
        self.log.mask(token)
        return replace(with_free_memory(options), read_token=options.read_token or False)

    def _merge(
        self, outcome: Outcome, planned: Plan, store: Library, options: Options, found: SearchFacts | None
    ) -> Outcome:
        """Make it; it is left after a file where the next might not be done in time."""
        progress = text.Progress(planned.nbytes, sys.stdout)
        watch = Watch(self.deadline)

        def tell(event: RunEvent) -> None:
            text.show(event, progress)
            watch.look(event)

        try:
            result = merge(planned, store, options, tell, found)
        except TimeIsUpError:
            return replace(outcome, state="stopped", exit_code=STOPPED)
        print(text.result_text(result))
        state = "part" if result.part else "published" if result.is_new else "unchanged"
        return replace(outcome, state=state, result=result)

    def _annotate(self, outcome: Outcome) -> None:
        """Put errors and warnings at their lines of the recipe, where a pull request shows them."""
        for kind, problems in (("error", outcome.problems), ("warning", outcome.warnings)):
            for problem in problems:
                at = problem.at
                place = {"line": at.line, "col": at.column} if at else {}
                words = str(replace(problem, at=None))
                self.log.command(kind, words, file=outcome.recipe, **place, title="Merger")
        if outcome.published is not None:
            told = f"{outcome.state}: {outcome.published.where}"
            self.log.command("notice", told, file=outcome.recipe, title="Merger")
        if outcome.state == "stopped" and outcome.found:
            what = f"{outcome.recipe}: the minutes are over; the study is kept, the next run goes on with it"
            self.log.command("notice", what, file=outcome.recipe, title="Merger")
        elif outcome.state == "stopped":
            what = f"{outcome.recipe}: stopped before the time limit; the finished files are kept, run the job again"
            self.log.command("warning", what, file=outcome.recipe, title="Merger")

    def comment(self, outcomes: Sequence[Outcome]) -> None:
        """Keep the pull request's comment up to date; where we may not, the summary has to do."""
        if self.event.pull is None or not self.inputs.comment:
            return
        if not self.inputs.github_token:
            self.log.command("notice", "this job may not comment: the plan is in the job's summary", title="Merger")
            return
        told = sections(outcomes, COMMENT_CHARACTERS) or "This pull request adds or changes no recipe any more."
        try:
            self.api.keep_comment(
                self.event.pull, _marker(self.inputs, self.environment), told, only_update=not outcomes
            )
        except GitHubError as error:
            self.log.command("notice", f"{error}; the plan is in the job's summary", title="Merger")

    def keep_lock(self, outcome: Outcome) -> None:
        """Commit the lock file beside the recipe of an outcome, where the workflow wants that."""
        head = self.environment.get("GITHUB_REF", "")
        path = lock_path(self.top / outcome.recipe)
        if not (self.inputs.commit_lock and outcome.published and outcome.summary):
            return
        if not head.startswith(_HEADS) or not (outcome.published.is_new or not path.is_file()):
            return
        content, place = lock_text(outcome.summary.plan, outcome.published), path.relative_to(self.top).as_posix()
        message, branch = f"Lock the models of {outcome.recipe}", head.removeprefix(_HEADS)
        self.api.commit_file(place, content.encode(), message, branch)


def _tell_measuring(each: Awaited) -> None:
    print(reports.measurement_text(each.planned, each.disk))


def _search_branch(recipe: str, base: str) -> str:
    """The branch of a recipe's search: a name that git takes, whatever theirs are."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(recipe).stem).strip("-")
    return f"search/{plain}-{hashlib.sha256(json.dumps([recipe, base]).encode()).hexdigest()[:8]}"


def _marker(inputs: Inputs, environment: Mapping[str, str]) -> str:
    """Names the comment of this job: several jobs may plan the same pull request."""
    job = [environment.get(name, "") for name in ("GITHUB_WORKFLOW", "GITHUB_JOB")]
    return f"<!-- merger {hashlib.sha256(json.dumps([*job, inputs.recipe]).encode()).hexdigest()[:16]} -->"


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

    def look(self, event: RunEvent) -> None:
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


def _reading(options: Options) -> Options:
    """One token reads and writes where the workflow gives one only."""
    return options if options.read_token else replace(options, read_token=options.write_token)


# ---- what is told at the end ----------------------------------------------------------------------------------------


def sections(outcomes: Sequence[Outcome], most: int) -> str:
    """What is told of all recipes, with their cards if there is room for so many characters."""
    told = ["\n\n".join(_section(outcome, with_card) for outcome in outcomes) for with_card in (True, False)]
    return told[0] if len(told[0]) < most else told[1]


def _section(outcome: Outcome, with_card: bool) -> str:
    parts = [f"### {code(outcome.recipe)}: {outcome.state}"]
    if outcome.problems:
        parts.append(markdown.problems_section("What is wrong", outcome.problems))
    if outcome.found:
        parts.append(outcome.found)
    if outcome.warnings:
        parts.append(markdown.problems_section("Warnings", outcome.warnings))
    if outcome.summary is not None:
        parts.append(markdown.folded_plan(outcome.summary, outcome.changed))
    if outcome.card and with_card:
        parts.append(markdown.fold("The card", markdown.card_preview(outcome.card)))
    if outcome.result is not None:
        parts.append(markdown.result_section(outcome.result, hub_path(outcome.to or "")))
    return "\n\n".join(parts)


def matrix(planned: Plan, part_size: int) -> list[str]:
    """The parts a merge is best made in: of so many bytes read and written each, and no more of them than files."""
    count = max(1, min(-(-planned.traffic // part_size), len(planned.shards), MOST_PARTS))
    return [f"{number}/{count}" for number in range(1, count + 1)]


def outputs(outcomes: Sequence[Outcome], part_size: int, report: Path) -> dict[str, str]:
    """The step's outputs: of the last recipe, where there are several; `report` names a file about all."""
    found = {"state": "none", "repo-url": "", "repo-id": "", "commit": "", "plan-hash": "", "matrix": "[]"}
    for outcome in outcomes:
        found = found | {"state": outcome.state}
        if outcome.summary is not None:
            planned = outcome.summary.plan
            found |= {"plan-hash": planned.hash, "matrix": json.dumps(matrix(planned, part_size))}
        if outcome.published is not None:
            found |= {"repo-url": outcome.published.where, "commit": outcome.published.commit or ""}
            found |= {"repo-id": (outcome.to or "").removeprefix(HUB)}
    return found | {"report": str(report)}


def report(outcomes: Sequence[Outcome], part_size: int) -> str:
    """All that is known of all recipes, as JSON."""
    return json.dumps([_report_one(outcome, part_size) for outcome in outcomes], indent=2)


def _report_one(outcome: Outcome, part_size: int) -> dict[str, object]:
    return {
        "recipe": outcome.recipe,
        "state": outcome.state,
        "exit_code": outcome.exit_code,
        "problems": [asdict(problem) for problem in outcome.problems],
        "warnings": [asdict(problem) for problem in outcome.warnings],
        "to": outcome.to,
        "plan": text.plan_json(outcome.summary) if outcome.summary else None,
        "matrix": matrix(outcome.summary.plan, part_size) if outcome.summary else [],
        "done": text.as_json(outcome.result) if outcome.result else None,
    }


def main() -> int:
    """The step: exit code 0, that of the first error, or 75 for a run that is to be gone on with."""
    take_over()
    log = Log(sys.stdout)  # commands are its own alone: whatever else is printed from here on is none
    for name in OURS:
        log.mask(os.environ.get(name, "").strip())
    with guard_streams():
        return secrets.watch(lambda: _step(log))


def _step(log: Log) -> int:
    outcomes: list[Outcome] = []
    try:
        inputs = Inputs.take(os.environ)
        os.chdir(inputs.folder)
        job = ActionRun(inputs, os.environ, log)
        with halting():
            outcomes.extend(job.results())
        _tell(job, outcomes)
    except MergerError as error:
        for problem in error.problems:
            log.command("error", str(problem), title="Merger")
        if not outcomes or isinstance(error, secrets.LeakError):
            write_outputs(os.environ.get("GITHUB_OUTPUT"), {"state": "failed"})
        return error.exit_code
    except Halt as halt:
        log.command("error", str(halt), title="Merger")
        return halt.exit_code
    return next((outcome.exit_code for outcome in outcomes if outcome.exit_code), 0)


def _tell(job: ActionRun, outcomes: Sequence[Outcome]) -> None:
    """Outputs first: they are there even if GitHub then refuses something."""
    place = Path(job.environment.get("RUNNER_TEMP") or ".") / "merger-report.json"
    told = report(outcomes, job.inputs.part_size)
    secrets.refuse_tokens({place.name: told})
    place.write_text(told, "utf-8")
    write_outputs(job.environment.get("GITHUB_OUTPUT"), outputs(outcomes, job.inputs.part_size, place))
    write_summary(job.environment.get("GITHUB_STEP_SUMMARY"), sections(outcomes, SUMMARY_CHARACTERS))
    job.comment(outcomes)
    for outcome in outcomes:
        job.keep_lock(outcome)


def print_extras() -> None:
    """For the step that installs: which extras the recipes take that `recipe` names, in one line."""
    found = set[str]()
    with suppress(MergerError):  # the step that merges tells it
        inputs = Inputs.take(dict(os.environ))
        os.chdir(inputs.folder)
        for path in _find_recipes(inputs, top(os.environ)):
            with suppress(MergerError):
                found |= {need.extra for need in needs_of(with_gguf(read_recipe(path), inputs.options))}
    print(*sorted(found))


if __name__ == "__main__":
    sys.exit(main())
