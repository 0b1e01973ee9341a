"""The Action's step, a process: tokens handed over, each recipe dealt with, outputs, summary, exit code.

Everything comes in by environment variables (action.yml sets them), and all that others wrote goes out as text. Not
here: reading them (inputs), and what comes of a recipe (line).
"""

from __future__ import annotations

from merger.safety import secrets
from merger.safety.environment import OURS, hand_over

if __name__ == "__main__":
    hand_over()  # before anything that takes time: until then /proc shows the tokens

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from merger.action.github import SUMMARY_CHARACTERS, Log, write_outputs, write_summary
from merger.action.inputs import Inputs, top
from merger.action.job import ActionRun, find_recipes
from merger.action.line import deal_with
from merger.action.outcomes import Outcome, comment, keep_lock, outputs, report, sections
from merger.errors import MergerError
from merger.run.extras import needs_of
from merger.run.prepare import read_recipe, with_gguf
from merger.runtime import Halt, halting, take_over
from merger.safety.text import guard_streams


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
            outcomes.extend(deal_with(job))
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
    comment(job, outcomes)
    for outcome in outcomes:
        keep_lock(job, outcome)


def print_extras() -> None:
    """For the step that installs: which extras the recipes take that `recipe` names, in one line."""
    found = set[str]()
    with suppress(MergerError):  # the step that merges tells it
        inputs = Inputs.take(dict(os.environ))
        os.chdir(inputs.folder)
        for path in find_recipes(inputs, top(os.environ)):
            with suppress(MergerError):
                found |= {need.extra for need in needs_of(with_gguf(read_recipe(path), inputs.options))}
    print(*sorted(found))


if __name__ == "__main__":
    sys.exit(main())
