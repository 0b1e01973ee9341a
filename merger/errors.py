"""Every way to fail: a position, a sentence and a next step, and an exit code for each kind.

Not here: how a problem is shown (cli.text) and the finding of problems (each room finds its own).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from merger.safety.text import line

_FEW = 3


@dataclass(frozen=True, order=True)
class Span:
    """Where a piece of text stands: file name as the user gave it, line and column from 1."""

    path: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{line(self.path)}:{self.line}:{self.column}"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and what to do about it; others' words in it are fit to be shown, wherever it is shown.

    Args:
        what: the sentence, without a position.
        at: the key or value in the recipe that causes it, if one does.
        where: the identity of that place, such as ``models[org/a].parameters.density``.
        hint: the next step.
    """

    what: str
    at: Span | None = None
    where: str | None = None
    hint: str | None = None

    def __post_init__(self) -> None:
        for name in ("what", "where", "hint"):
            if (words := getattr(self, name)) is not None:
                object.__setattr__(self, name, line(words))

    def __str__(self) -> str:
        head = ": ".join(str(part) for part in (self.at, self.where, self.what) if part)
        return head if self.hint is None else f"{head}\n    {self.hint}"


class MergerError(Exception):
    """A refusal that the user can act on; a subclass says which kind, `exit_code` tells a shell.

    Problems without a position come last; the others in the file's order.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        found = (problems,) if isinstance(problems, Problem) else tuple(problems)
        last = Span("\U0010ffff", 0, 0)
        self.problems = tuple(sorted(found, key=lambda problem: problem.at or last))
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[MergerError], tuple[tuple[Problem, ...]]]:
        """From one process to another with its problems: an exception's own way would send the text alone."""
        return type(self), (self.problems,)


class RecipeError(MergerError):
    """The recipe says something that cannot be meant."""

    exit_code = 2


class ModelError(MergerError):
    """A model cannot be read: missing, gated, not safetensors, damaged."""

    exit_code = 3


class GatedError(ModelError):
    """It is there, but its terms have to be accepted first."""


class MissingError(ModelError):
    """There is no such model, or nobody tells us that there is: deleted, renamed or private."""


class DamagedError(ModelError):
    """A file is not the one that was locked: nothing that was made of it can be trusted."""


class MismatchError(MergerError):
    """The models do not fit each other."""

    exit_code = 4


class BudgetError(MergerError):
    """Not enough memory or disk."""

    exit_code = 5


class UploadError(MergerError):
    """The destination refuses: it holds something else, or we may not write there. Or a token stands in what leaves."""

    exit_code = 6


class OccupiedError(UploadError):
    """The destination holds another model, which is replaced only if somebody says so."""


class VerificationError(MergerError):
    """What was written is not what was promised; or two models that were compared differ."""

    exit_code = 7


class PartError(MergerError):
    """A part that another machine was to make is not made."""

    exit_code = 8


class EvaluationError(MergerError):
    """The result is made but cannot be measured: it waits, and the same command goes on from there."""

    exit_code = 9


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """The hint for a word that nothing is called: the nearest known one, else the list of them."""
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known here: {', '.join(names)}" if names else None


def few(names: Sequence[str]) -> str:
    """The first few names, for a sentence, and how many more there are."""
    more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
    return ", ".join(names[:_FEW]) + more
