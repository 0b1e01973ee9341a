"""Recipe and plan, as the Space does them: from the Hub alone, of what it takes from strangers, within its limits.

Whatever is refused is refused with a sentence, and with its place where it has one. Not here: the language and the
planning themselves (merger.run.prepare).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merger import system
from merger.cli.text import search_memory
from merger.errors import BudgetError, MergerError, Problem, RecipeError
from merger.run.extras import needs_of
from merger.run.options import Options, needed_disk
from merger.run.prepare import parse_text, plan
from merger.safety import numbers
from merger.safety.limits import SPACE_TENSORS
from merger.safety.names import is_repo
from merger.safety.numbers import DOWN, UP, size
from space.work.search import PASTED

if TYPE_CHECKING:
    from merger.planning.plan import Plan
    from merger.recipe.model import ModelRef, Recipe
    from merger.stores.ports import Store

# ---- limits ---------------------------------------------------------------------------------------------------------


_PAGE_BYTES = 1_000_000_000
"""What the page with plans of many users at once, and the fork server, may come to."""

_LEAST_A_WORKER = 6_000_000_000
_MOST_WORKERS = 2


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes.

    Args:
        memory: for one job; None: nobody knows how much there is.
        disk: for one job.
        traffic: that one job may read and write.
        workers: how many jobs run at the same time.
        jobs_each: of one owner that are not over.
        jobs: of all owners together.
        shard_size: the largest size of a file; None: the default.
        trials: of one search.
        minutes: of one search, and as long again for its report.
    """

    memory: int | None = None
    disk: int | None = None
    traffic: int = 200_000_000_000
    workers: int = 1
    jobs_each: int = 3
    jobs: int = 100
    shard_size: int | None = None
    trials: int = 200
    minutes: int = 20

    @classmethod
    def here(cls, folder: Path, environment: Mapping[str, str] = os.environ) -> Limits:
        """Those of this machine, or what the variables ``MERGER_SPACE_…`` say.

        Raises:
            ValueError: a variable is no size or no number.
        """

        def size_of(name: str) -> int | None:
            text = environment.get(f"MERGER_SPACE_{name}")
            return numbers.parse_size(text) if text else None

        def count_of(name: str) -> int | None:
            text = environment.get(f"MERGER_SPACE_{name}")
            return numbers.parse_whole(text, numbers.COUNT) if text else None

        room = size_of("MEMORY") or system.free_memory()
        free = size_of("DISK") or shutil.disk_usage(folder).free * 9 // 10
        most = 1 if room is None else max(1, min(_MOST_WORKERS, (room - _PAGE_BYTES) // _LEAST_A_WORKER))
        workers = count_of("WORKERS") or most
        return cls(
            memory=None if room is None else max(0, room - _PAGE_BYTES) // workers,
            disk=free // workers,
            traffic=size_of("TRAFFIC") or cls.traffic,
            workers=workers,
            jobs_each=count_of("JOBS_EACH") or cls.jobs_each,
            jobs=count_of("JOBS") or cls.jobs,
            shard_size=size_of("SHARD_SIZE"),
            trials=count_of("TRIALS") or cls.trials,
            minutes=count_of("MINUTES") or cls.minutes,
        )

    def for_a_job(self) -> dict[str, Any]:
        """What a worker is told."""
        threads = max(1, system.cores() // self.workers)
        kept = ("memory", "disk", "shard_size", "minutes")
        return {"threads": threads, **{name: getattr(self, name) for name in kept}}


# ---- recipes --------------------------------------------------------------------------------------------------------


NAME = "recipe.yaml"
MOST_BYTES = 64_000
MOST_MODELS = 16

_PINNED = re.compile(r"hf://datasets/[\w.-]+/[\w.-]+@[0-9a-f]{40}/[^\x00-\x1f]+", re.ASCII)
_A_DATA_SET = "hf://datasets/owner/name@commit/file with the 40 letters of a commit"
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,99}", re.ASCII)
_MODEL = re.compile(r"\bmodel[\"']?\s*:")
_TOO_BIG = "it is too big for this Space; the GitHub Action or your own machine can make it"
_HERE = "only models on the Hub can be merged here: write owner/name or owner/name@revision"


class TooBigError(BudgetError):
    """It takes more than this Space gives to one merge; another machine may well make it."""


@dataclass(frozen=True)
class CheckedRecipe:
    """What is wrong with a recipe's text, and what in it is likely not meant."""

    problems: tuple[Problem, ...] = ()
    warnings: tuple[Problem, ...] = ()


def check(text: str) -> CheckedRecipe:
    """All that can be said of a recipe without its models."""
    try:
        recipe = parse_recipe(text)
    except MergerError as error:
        return CheckedRecipe(error.problems)
    return CheckedRecipe((), recipe.warnings)


def parse_recipe(text: str) -> Recipe:
    """The recipe in a text.

    Raises:
        RecipeError: with all that is wrong with it, or that the Space does not do.
    """
    _refuse_large(text)
    recipe = parse_text(text, NAME)
    if problems := _find_refusals(recipe):
        raise RecipeError(problems)
    return recipe


def _refuse_large(text: str) -> None:
    """Before anything is parsed."""
    nbytes, models = len(text.encode("utf-8", "replace")), len(_MODEL.findall(text))
    if nbytes > MOST_BYTES:
        what = f"the recipe has {size(nbytes, UP)}, and this Space reads {size(MOST_BYTES, DOWN)} at most"
        raise RecipeError(Problem(what, hint="a recipe names models and holds none"))
    if models > 8 * MOST_MODELS:
        what = f"the recipe names models {models:,} times, and this Space reads {8 * MOST_MODELS} at most"
        raise RecipeError(Problem(what, hint="merge a few first, and go on with the result"))


def _find_refusals(recipe: Recipe) -> list[Problem]:
    """What a recipe may say to the command, and not here."""
    found = [problem for ref in recipe.models if (problem := _of_model(ref)) is not None]
    if len(recipe.models) > MOST_MODELS:
        what = f"the recipe names {len(recipe.models)} models, and this Space merges {MOST_MODELS} at most"
        found.append(Problem(what, hint="merge a few first, and go on with the result"))
    if recipe.evaluate is not None:
        hint = "leave it out here: merger run and the Action measure"
        found.append(Problem("the Space measures nothing", recipe.evaluate.at, "evaluate", hint))
    for measured in recipe.measures:
        hint = "make it with merger measure, and write where it lies on the Hub: statistics: owner/name"
        found.append(Problem("the Space measures nothing", measured.at, "statistics", hint))
    searched = recipe.search and replace(recipe.search, storage=None)
    for need in needs_of(replace(recipe, evaluate=None, search=searched)):
        if need.missing:
            what, hint = (
                f"{need.what} takes {need.missing}, which the Space has not",
                "merger run and the Action take it",
            )
            found.append(Problem(what, need.at, need.where, hint))
    if recipe.search is not None:
        found += _of_search(recipe)
    if recipe.publish.template is not None:
        hint = "leave it out: the card is made by Merger's own template"
        found.append(Problem("the Space takes no templates", recipe.publish.template_at, "publish.template", hint))
    return found


def _of_search(recipe: Recipe) -> Iterator[Problem]:
    """A task or a function runs code, a file is the machine's, and a branch on the Hub may be another tomorrow."""
    searched = recipe.search
    for each in (*searched.objectives, *searched.report) if searched else ():
        if each.kind in ("task", "function"):
            yield Problem(f"the Space scores by no {each.kind}", each.at, "search", "merger search does; here: a loss")
        elif each.source.removeprefix("./") not in PASTED and _PINNED.fullmatch(each.source) is None:
            what = f"{each.source!r} is neither a text that is pasted here nor a data set at a commit"
            yield Problem(what, each.at, "search", f"write {' or '.join(PASTED)}, or {_A_DATA_SET}")
    if searched and searched.storage is not None:
        yield Problem("the Space keeps a study by itself", searched.at, "search.storage", "leave storage out")


def _of_model(ref: ModelRef) -> Problem | None:
    where = f"models[{ref.path}]"
    if not is_repo(ref.path):
        return Problem(f"{ref.path!r} is no model on the Hub", ref.at, where, _HERE)
    if ref.revision is not None and (_REVISION.fullmatch(ref.revision) is None or ".." in ref.revision):
        return Problem(f"{ref.revision!r} is no branch, tag or commit", ref.at, where, _HERE)
    return _of_model(ref.adapter) if ref.adapter is not None else None


def options(token: str | None, limits: Limits) -> Options:
    """How the Space plans; the destination is any on the Hub, for its memory counts."""
    return Options(
        to="hf://planned/here",
        max_memory=limits.memory,
        max_disk=limits.disk,
        shard_size=limits.shard_size,
        threads=limits.for_a_job()["threads"],
        cache=False,
        root=None,
        tensors=SPACE_TENSORS,
        read_token=token or False,
    )


def plan_recipe(recipe: Recipe, how: Options, limits: Limits) -> tuple[Plan, Store]:
    """What the recipe makes, and where its models are.

    Raises:
        ModelError, RecipeError, MismatchError: as the steps do.
        TooBigError: it takes more than this Space gives to one merge.
    """
    try:
        found, store = plan(recipe, how)
        needed_disk(found, how, found.shards)
    except BudgetError as error:
        what = tuple(replace(problem, hint=_TOO_BIG) for problem in error.problems)
        raise TooBigError(what) from None
    if recipe.search is not None:
        _refuse_large_search(found, limits)
    if found.traffic > limits.traffic:
        told = (
            f"this merge reads and writes {size(found.traffic, UP)}, and this Space moves {size(limits.traffic, DOWN)}"
        )
        raise TooBigError(Problem(f"{told} a merge at most", hint=_TOO_BIG))
    return found, store


def _refuse_large_search(found: Plan, limits: Limits) -> None:
    searched, memory = found.locked.recipe.search, search_memory(found)
    at = searched.at if searched else None
    if limits.memory is not None and memory > limits.memory:
        told = (
            f"this search takes about {size(memory, UP)} of memory, and there are {size(limits.memory, DOWN)} for one"
        )
        raise TooBigError(Problem(told, at, "search", "merger search makes it elsewhere"))
    for name, most in (("trials", limits.trials), ("minutes", limits.minutes)):
        asked = getattr(searched, name) or 0
        if asked > most:
            what = f"{asked:g} {name} are asked for, and this Space gives {most} to a search"
            raise RecipeError(Problem(what, at, f"search.{name}", f"write {name}: {most}"))


def pinned_commits(found: Plan) -> Mapping[str, str]:
    """The commits that a plan saw, by model as the recipe writes it."""
    return {str(model.ref): model.located.commit for model in found.locked.models if model.located.commit is not None}
