"""The Action's inputs: environment variables -> Inputs, or all that is wrong. Not here: what they bring about."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from merger.errors import Problem, RecipeError, did_you_mean
from merger.planning.shards import Part
from merger.recipe.blocks.publish import parse_kinds
from merger.run.options import Options
from merger.safety import numbers, secrets
from merger.safety.environment import CLIENTS
from merger.safety.paths import inside

MODES = ("auto", "check", "plan", "run", "publish", "search")

T = TypeVar("T")


@dataclass(frozen=True)
class Inputs:
    """What the workflow asks for; the names are those of action.yml."""

    recipe: str
    mode: str
    folder: Path
    github_token: str = field(repr=False)
    options: Options
    part_size: int
    time_limit: float | None
    commit_lock: bool
    comment: bool

    @classmethod
    def take(cls, environment: MutableMapping[str, str]) -> Inputs:
        """The inputs; tokens are taken out of the environment, so that no program started from here has them.

        Raises:
            RecipeError: with every input that cannot be meant.
        """
        given = _Given(environment)
        inputs = cls(
            recipe=given.text("recipe"),
            mode=given.choice("mode", MODES),
            folder=given.folder("working-directory"),
            github_token=given.secret("github-token"),
            options=Options(
                to=given.text("to") or None,
                max_memory=given.size("max-memory"),
                max_disk=given.size("max-disk"),
                shard_size=given.size("shard-size"),
                gguf=given.kinds("gguf"),
                force=given.flag("force"),
                part=given.part("part"),
                read_token=given.secret("hf-read-token") or None,
                write_token=given.secret("hf-token") or given.client_token() or None,
                root=top(environment),
            ),
            part_size=given.size("part-size") or 60 * 10**9,
            time_limit=given.minutes("time-limit"),
            commit_lock=given.flag("commit-lock"),
            comment=given.flag("comment", default=True),
        )
        if given.problems:
            raise RecipeError(given.problems)
        return inputs


class _Given:
    """The inputs as text, and what is wrong with them."""

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        self._environment = environment
        self.problems: list[Problem] = []

    def text(self, name: str) -> str:
        return self._environment.get(variable(name), "").strip()

    def secret(self, name: str) -> str:
        """As it is given, and gone."""
        return self._taken(variable(name))

    def client_token(self) -> str:
        """The token that the Hub's client would take from the environment, and all of these gone."""
        return next(filter(None, [self._taken(name) for name in CLIENTS]), "")

    def _taken(self, variable: str) -> str:
        value = self._environment.pop(variable, "").strip()
        secrets.watch_for(value)
        return value

    def choice(self, name: str, known: Sequence[str]) -> str:
        """One of a few words, the first where none is given."""
        text = self.text(name) or known[0]
        if text not in known:
            self._wrong(name, f"{text!r} is none of {', '.join(known)}", did_you_mean(text, known))
        return text

    def flag(self, name: str, default: bool = False) -> bool:
        text = self.text(name).lower() or str(default).lower()
        if text not in ("true", "false"):
            self._wrong(name, f"{text!r} is neither true nor false")
        return text == "true"

    def size(self, name: str) -> int | None:
        return self._parsed(name, numbers.parse_size)

    def kinds(self, name: str) -> tuple[str, ...]:
        return self._parsed(name, parse_kinds) or ()

    def part(self, name: str) -> Part | None:
        return self._parsed(name, Part.parse)

    def minutes(self, name: str) -> float | None:
        return self._parsed(name, lambda text: float(numbers.parse_whole(text, numbers.MINUTES)))

    def folder(self, name: str) -> Path:
        root = top(self._environment)
        folder = inside(root / self.text(name), root)
        if folder is None or not os.path.isdir(folder):
            self._wrong(name, f"{self.text(name)!r} is no folder of this repository", "is it checked out?")
        return folder or root

    def _parsed(self, name: str, parse: Callable[[str], T]) -> T | None:
        try:
            return parse(self.text(name)) if self.text(name) else None
        except ValueError as error:
            self._wrong(name, str(error))
            return None

    def _wrong(self, name: str, what: str, hint: str | None = None) -> None:
        self.problems.append(Problem(f"input {name}: {what}", hint=hint))


def variable(name: str) -> str:
    """The environment variable that carries an input."""
    return "INPUT_" + name.replace("-", "_").upper()


def top(environment: Mapping[str, str]) -> Path:
    """Where the repository is checked out."""
    return Path(environment.get("GITHUB_WORKSPACE") or ".").resolve()
