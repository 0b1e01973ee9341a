"""Workers of a search beside the process that reports: more processes of this machine, or tasks of a Ray cluster.

Not here: what a worker tries (searching), and how Ray has tasks done (distributed.parts).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import merger
from merger.cli import text
from merger.distributed.parts import beside
from merger.distributed.start import models_here, room_of_task
from merger.errors import MergerError, PartError, Problem, RecipeError
from merger.planning.plan import Plan
from merger.planning.shards import Part
from merger.recipe.model import Recipe
from merger.recipe.searched import Searched
from merger.run.options import Options
from merger.run.prepare import parse_text
from merger.runtime import take_over
from merger.safety.text import line
from merger.searching.effort import Effort
from merger.searching.search import Event, Searching
from merger.system import cores


@contextmanager
def at_work_beside(
    arguments: argparse.Namespace, recipe: Recipe, options: Options, effort: Effort
) -> Iterator[Callable[[Event], object]]:
    """Let --workers but this one try candidates; those that are still at it at the end are ended.

    Args:
        arguments: the command's.
        recipe: as it is searched.
        options: the command's, without what this machine adds to them.
        effort: the command's.

    Yields:
        What is to be told of the events of the search here.
    """
    if arguments.launcher is not None and arguments.workers < 2:
        raise RecipeError(Problem("--engine and --workers go together", hint="write --engine ray --workers 4"))
    assert recipe.search is not None
    with ExitStack() as others:
        if arguments.launcher is None:
            others.enter_context(_processes(arguments, recipe.search.storage))

        def look(event: Event) -> None:
            if arguments.launcher is not None and isinstance(event, Searching):
                others.enter_context(_on_ray(arguments, recipe, options, effort, event.planned))

        yield look


# ---- processes ------------------------------------------------------------------------------------------------------


@contextmanager
def _processes(arguments: argparse.Namespace, storage: str | None) -> Iterator[None]:
    command = [sys.executable, "-P", "-m", "merger", "search", *_as_worker(arguments, storage), "--join", "--quiet"]
    started = [subprocess.Popen(command, stdin=subprocess.DEVNULL) for _ in range(arguments.workers - 1)]
    # one that is killed is gone for the others as soon as somebody has asked for its end
    watchers = [threading.Thread(target=process.wait, daemon=True) for process in started]
    for watcher in watchers:
        watcher.start()
    try:
        yield
    finally:
        for process in started:
            process.terminate()
        for watcher in watchers:
            watcher.join()


def _as_worker(arguments: argparse.Namespace, storage: str | None) -> list[str]:
    """What another process is told that tries candidates of the same study, with its share of the cores."""
    threads = max(1, (arguments.threads or cores()) // arguments.workers)
    given = {"trials": arguments.trials, "minutes": arguments.minutes, "storage": storage, "device": arguments.device,
             "seed": arguments.seed, "max-memory": arguments.max_memory, "threads": threads}  # fmt: skip
    told = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
    flags = [*(["--allow-pickle"] if arguments.allow_pickle else []), *([] if arguments.cache else ["--no-cache"])]
    return [str(arguments.recipe), *told, *flags]


# ---- Ray ------------------------------------------------------------------------------------------------------------


def _on_ray(
    arguments: argparse.Namespace, recipe: Recipe, options: Options, effort: Effort, planned: Plan
) -> AbstractContextManager[None]:
    """Workers that Ray has placed: of one that dies the trial alone is lost, and Ray starts it anew."""
    assert recipe.search is not None
    if problems := [*models_here(planned), *_files_here(recipe.search)]:
        raise RecipeError(problems)
    means, joined = replace(options, threads=options.threads or 1), replace(effort, join=True)
    work = partial(try_elsewhere, recipe.text, recipe.path, means, joined, planned.identity)
    numbers = [Part(number, arguments.workers) for number in range(2, arguments.workers + 1)]

    def tell(worker: Part, end: str | MergerError) -> None:
        if isinstance(end, MergerError):
            print(text.format_problems(end), file=sys.stderr)
        elif not arguments.quiet:
            print(line(f"worker {worker} is at its end, on {end}"), file=sys.stderr)

    return beside(work, numbers, room_of_task(means.threads or 1, text.search_memory(planned), means), tell)


def _files_here(searched: Searched) -> Iterator[Problem]:
    """What other machines would not see."""
    storage = searched.storage or ""
    if "://" not in storage or storage.startswith("sqlite"):
        yield Problem(f"the study {storage} is on this machine alone", hint="give --storage postgresql://host/name")
    for each in (*searched.objectives, *searched.report):
        if each.kind not in ("task", "function") and not each.source.startswith("hf://"):
            hint = "put it on the Hub: hf://datasets/owner/name@revision/file"
            yield Problem(f"the file {each.source} is on this machine alone", each.at, "search", hint)


def try_elsewhere(content: str, path: str, options: Options, effort: Effort, identity: str, worker: Part) -> None:
    """Try candidates on this machine of a study that another one has begun, by its recipe's text and its options.

    Raises:
        MergerError: any kind.
        PartError: it would not be of the study whose plan `identity` names.
    """
    take_over()  # a task of Ray's has its process to itself

    def look(event: Event) -> None:
        if isinstance(event, Searching) and event.planned.identity != identity:
            hint = "a parent has a new commit, or this machine another version of merger; org/name@commit pins a parent"
            raise PartError(Problem("this is no worker of the search that was started", hint=hint))

    merger.search(parse_text(content, path), effort, options=options, on_event=look)
