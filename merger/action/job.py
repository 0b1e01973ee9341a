"""A job of the Action: its inputs, its event and its places, and which recipes it is about, and what with them.

Not here: reading inputs (inputs), GitHub itself (github), and what comes of a recipe (line, search).
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

from merger.action.github import Event, GitHubApi, Log
from merger.action.inputs import Inputs, top
from merger.errors import Problem, RecipeError
from merger.run.prepare import lock_path, named_recipes
from merger.safety.paths import inside

RUNNING = ("run", "publish", "search")
STARTED_TO_RUN = ("push", "workflow_dispatch", "schedule", "repository_dispatch")
HEADS = "refs/heads/"


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

    @property
    def branch(self) -> str:
        """The branch that the job is about."""
        return self.environment.get("GITHUB_HEAD_REF") or self.environment.get("GITHUB_REF", "").removeprefix(HEADS)

    def named(self, path: Path) -> str:
        """A file of the working directory, from the top of the repository."""
        return Path(os.path.relpath(self.inputs.folder / path, self.top)).as_posix()


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
    found = find_recipes(inputs, top)
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


def find_recipes(inputs: Inputs, top: Path) -> list[Path]:
    """All that `recipe` names."""
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
