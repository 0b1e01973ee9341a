"""Parts made, and workers at work, in tasks of a Ray cluster: Ray places them, and starts those anew that die.

Not here: what a part is (planning.shards), what a task does (which is handed in), and Hub jobs (hub_jobs).
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any

from merger.errors import BudgetError, MergerError, PartError, Problem
from merger.planning.shards import Part
from merger.runtime import install_command
from merger.safety.numbers import size

RESTARTS = 3
_OF_A_NODE = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}


def on_ray(
    make: Callable[[Part], object], parts: Sequence[Part], resources: Mapping[str, float]
) -> Iterator[tuple[Part, str]]:
    """Make the parts, each in a task of its own; yields each one that is made, and the node it was made on.

    A part that fails does not stop the others: what they make is not lost.

    Args:
        make: makes one part; a function that can be pickled, of a package that every node has.
        resources: what a task takes of its node: num_cpus, num_gpus, memory.

    Raises:
        BudgetError: no node has that much.
        MergerError: what the parts refused, all at once.
        PartError: a part's process died again and again; or there is no Ray.
    """
    failed: list[MergerError] = []
    with _begun(make, parts, resources, "part") as (ray, waiting):
        for part, end in _ends(ray, waiting, "part"):
            if isinstance(end, MergerError):
                failed.append(end)
            else:
                yield part, end
    if failed:
        kinds = {type(error) for error in failed}
        kind = kinds.pop() if len(kinds) == 1 else PartError
        raise kind(problem for error in failed for problem in error.problems)


@contextmanager
def beside(
    work: Callable[[Part], object],
    workers: Sequence[Part],
    resources: Mapping[str, float],
    tell: Callable[[Part, str | MergerError], object],
) -> Iterator[None]:
    """Have workers at work elsewhere while something is done here; those that are at it when that is done are ended.

    Args:
        work, resources: as `on_ray` has them.
        workers: their numbers.
        tell: is told of each that has come to its end by itself: on which node, or what was wrong.

    Raises:
        BudgetError, PartError: as `on_ray` does.
    """
    with _begun(work, workers, resources, "worker") as (ray, waiting):
        over = threading.Event()

        def watch() -> None:
            for worker, end in _ends(ray, waiting, "worker"):
                if not over.is_set():
                    tell(worker, end)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            for task in [*waiting]:
                ray.cancel(task, force=True)
            watcher.join()


@contextmanager
def _begun(
    make: Callable[[Part], object], parts: Sequence[Part], resources: Mapping[str, float], called: str
) -> Iterator[tuple[Any, dict[Any, Part]]]:
    """Ray, and the tasks that are begun."""
    with _cluster() as ray:
        _refuse_too_much([node["Resources"] for node in ray.nodes() if node["Alive"]], resources, called)
        task = ray.remote(_made_here).options(max_retries=RESTARTS, **resources)
        yield ray, {task.remote(make, part): part for part in parts}


def _ends(ray: Any, waiting: dict[Any, Part], called: str) -> Iterator[tuple[Part, str | MergerError]]:
    """Each task as it ends: on which node, or what was wrong."""
    while waiting:
        (ended,), _ = ray.wait(list(waiting), num_returns=1)
        part = waiting.pop(ended)
        try:
            yield part, ray.get(ended)
        except ray.exceptions.RayError as error:
            yield part, _refusal(error, f"{called} {part}")


@contextmanager
def _cluster() -> Iterator[Any]:
    """Ray, connected to the cluster that RAY_ADDRESS names or this machine is a node of; we start none."""
    try:
        ray = import_module("ray")
    except ImportError:
        raise PartError(Problem("Ray is not installed here", hint=install_command("ray"))) from None
    ours = not ray.is_initialized()
    try:
        if ours:
            ray.init(address="auto", logging_level="warning")
    except ConnectionError:
        raise PartError(
            Problem("there is no Ray cluster here", hint="set RAY_ADDRESS, or start one: ray start --head")
        ) from None
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()


def _refuse_too_much(nodes: Sequence[Mapping[str, float]], resources: Mapping[str, float], called: str) -> None:
    """Ray would wait for such a node for ever, without a word."""
    if not any(all(node.get(_OF_A_NODE[name], 0) >= much for name, much in resources.items()) for node in nodes):
        wanted = ", ".join(
            f"{size(much) if name == 'memory' else f'{much:g}'} {_OF_A_NODE[name]}" for name, much in resources.items()
        )
        hint = "fewer --threads, a smaller --max-memory, or add a larger node"
        raise BudgetError(Problem(f"no node of the Ray cluster has room for a {called} ({wanted})", hint=hint))


def _made_here(make: Callable[[Part], object], part: Part) -> str:
    make(part)
    return platform.node()


def _refusal(error: Exception, task: str) -> MergerError:
    """What the task itself refused, or that its process died; anything else it raised is a bug, and raised here."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, MergerError):
        return type(cause)(replace(problem, what=f"{task}: {problem.what}") for problem in cause.problems)
    if isinstance(cause, Exception):
        raise error
    what = f"{task}: its process died {RESTARTS + 1} times ({type(error).__name__})"
    return PartError(Problem(what, hint="most likely for lack of memory: smaller --max-memory, or fewer --threads"))
