"""What has become of recipes, and how it is told: outputs, report, annotations, the pull request's comment, lock files.

Not here: how it came about (line, search), and the words for plans and results (cli.markdown, cli.text).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from merger.action.github import COMMENT_CHARACTERS, GitHubError
from merger.action.job import HEADS, ActionRun
from merger.card.escape import code
from merger.card.facts import PlanSummary
from merger.cli import markdown, text
from merger.errors import Problem
from merger.run.pipeline import Result, lock_text
from merger.run.prepare import lock_path
from merger.safety.names import HUB, hub_path

if TYPE_CHECKING:
    from merger.planning.plan import Plan

MOST_PARTS = 256
"""GitHub's limit on the jobs of a matrix."""


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


# ---- in words and numbers -----------------------------------------------------------------------------------------


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


# ---- to GitHub -----------------------------------------------------------------------------------------------------


def annotate(job: ActionRun, outcome: Outcome) -> None:
    """Put errors and warnings at their lines of the recipe, where a pull request shows them."""
    for kind, problems in (("error", outcome.problems), ("warning", outcome.warnings)):
        for problem in problems:
            at = problem.at
            place = {"line": at.line, "col": at.column} if at else {}
            words = str(replace(problem, at=None))
            job.log.command(kind, words, file=outcome.recipe, **place, title="Merger")
    kind, what = "notice", ""
    if outcome.published is not None:
        what = f"{outcome.state}: {outcome.published.where}"
    elif outcome.state == "stopped" and outcome.found:
        what = f"{outcome.recipe}: the minutes are over; the study is kept, the next run goes on with it"
    elif outcome.state == "stopped":
        kind = "warning"
        what = f"{outcome.recipe}: stopped before the time limit; the finished files are kept, run the job again"
    if what:
        job.log.command(kind, what, file=outcome.recipe, title="Merger")


def comment(job: ActionRun, outcomes: Sequence[Outcome]) -> None:
    """Keep the pull request's comment up to date; where we may not, the summary has to do."""
    if job.event.pull is None or not job.inputs.comment:
        return
    if not job.inputs.github_token:
        job.log.command("notice", "this job may not comment: the plan is in the job's summary", title="Merger")
        return
    told = sections(outcomes, COMMENT_CHARACTERS) or "This pull request adds or changes no recipe any more."
    try:
        job.api.keep_comment(job.event.pull, _marker(job), told, only_update=not outcomes)
    except GitHubError as error:
        job.log.command("notice", f"{error}; the plan is in the job's summary", title="Merger")


def _marker(job: ActionRun) -> str:
    """Names the comment of this job: several jobs may plan the same pull request."""
    named = [job.environment.get(name, "") for name in ("GITHUB_WORKFLOW", "GITHUB_JOB")]
    return f"<!-- merger {hashlib.sha256(json.dumps([*named, job.inputs.recipe]).encode()).hexdigest()[:16]} -->"


def keep_lock(job: ActionRun, outcome: Outcome) -> None:
    """Commit the lock file beside the recipe of an outcome, where the workflow wants that."""
    head = job.environment.get("GITHUB_REF", "")
    path = lock_path(job.top / outcome.recipe)
    if not (job.inputs.commit_lock and outcome.published and outcome.summary):
        return
    if not head.startswith(HEADS) or not (outcome.published.is_new or not path.is_file()):
        return
    content, place = lock_text(outcome.summary.plan, outcome.published), path.relative_to(job.top).as_posix()
    job.api.commit_file(place, content.encode(), f"Lock the models of {outcome.recipe}", head.removeprefix(HEADS))
