"""A merge spread over machines: its parts are made by an engine elsewhere, then published from here.

The engines are a Ray cluster (parts) and Hugging Face Jobs (hub_jobs); a workflow's matrix needs neither.
Not here: how a part is made, which is the same `run` everywhere.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from merger.errors import PartError, Problem, RecipeError
from merger.methods.registry import methods
from merger.planning.plan import Plan
from merger.planning.shards import Part, share
from merger.recipe.parse import parse
from merger.run.extras import needs_of
from merger.run.options import Options, destination, with_free_memory
from merger.run.pipeline import Ready, Result, merge, missing_parts
from merger.run.prepare import is_lock, plan
from merger.runtime import PACKAGE, requirement, take_over
from merger.safety.names import hub_path
from merger.safety.numbers import DOWN, UP, size
from merger.stores.resolve import Library

if TYPE_CHECKING:
    from merger.distributed.hub_jobs import HubJob
    from merger.run.pipeline import Event

IMAGE = "python:3.12-slim"
SCRIPT = """\
set -eu
cd "$(mktemp -d)"
pip install --quiet --root-user-action=ignore "$MERGER_PACKAGE"
printf %s "$MERGER_RECIPE" | base64 -d > recipe.yaml
exec merger run recipe.yaml "$@"
"""
"""What a Hub job does. The recipe is base64 in its environment, the options are arguments: nothing needs quotes."""

_LONGEST_RECIPE = 90_000  # an environment variable of Linux holds 131,072 bytes, and base64 takes a third more


@dataclass(frozen=True)
class Engine:
    """What makes the parts.

    Args:
        kind: ``ray`` or ``jobs``.
        parts: how many they are.
        flavor: the hardware of each Hub job.
        timeout: how long each Hub job may run.
    """

    kind: Literal["ray", "jobs"]
    parts: int
    flavor: str = "cpu-basic"
    timeout: str = "6h"


@dataclass(frozen=True)
class PartStarted:
    """A part is begun elsewhere; `where` is a page to look at."""

    part: Part
    where: str


@dataclass(frozen=True)
class PartMade:
    """A part is made elsewhere: so many bytes."""

    part: Part
    where: str
    nbytes: int


def options_of_parts(options: Options, engine: Engine) -> Options:
    """The options that the plan is made with: on a Ray cluster a part takes one CPU unless --threads says more."""
    return replace(options, threads=options.threads or 1) if engine.kind == "ray" else options


def distribute(
    planned: Plan,
    store: Library,
    options: Options,
    engine: Engine,
    on_event: Callable[[Event | PartStarted | PartMade], object],
) -> Result:
    """Have the missing parts made elsewhere, then publish.

    Args:
        planned, store, options, on_event: as `merge` takes them.
        engine: what makes the parts.

    Raises:
        MergerError: any kind; what was made waits at the destination, and only the rest is made by another run.
    """
    _refuse_what_stays(planned, options)
    found = missing_parts(planned, options, engine.parts)
    on_event(Ready())
    if isinstance(found, Result):
        return found
    for event in (_by_ray if engine.kind == "ray" else _by_jobs)(planned, options, engine, found):
        on_event(event)

    def go_on(event: Event) -> None:
        if not isinstance(event, Ready):  # that was told
            on_event(event)

    return merge(planned, store, replace(options, publish_only=True), go_on)


def _refuse_what_stays(planned: Plan, options: Options) -> None:
    """All machines must see the parents, the destination, and all that says what is made."""
    recipe, problems = planned.locked.recipe, models_here(planned)
    if is_lock(Path(recipe.path)):
        hint = "start the parts yourself with --part, or give the recipe"
        problems.append(Problem(f"{recipe.path}: a lock file stays here, the other machines get the recipe", hint=hint))
    to = destination(recipe, options)
    if hub_path(to) is None:
        problems.append(Problem(f"the folder {to} is on this machine alone", hint="give --to hf://owner/name"))
    if problems:
        raise RecipeError(problems)


def models_here(planned: Plan) -> list[Problem]:
    """What keeps a plan from being made elsewhere: its models in folders."""
    hint = "push it to the Hub, or do it on this machine alone"
    return [
        Problem(f"the folder {model.ref.path} is on this machine alone", at=model.ref.at, hint=hint)
        for model in planned.locked.models
        if model.located.commit is None
    ]


def _part_made(planned: Plan, part: Part, where: str) -> PartMade:
    sizes = (nbytes for shard in share(planned.shards, part) for nbytes in shard.files.values())
    return PartMade(part, where, sum(sizes))


# ---- Ray ------------------------------------------------------------------------------------------------------------


def _by_ray(planned: Plan, options: Options, engine: Engine, parts: Sequence[Part]) -> Iterator[PartMade]:
    from merger.distributed.parts import on_ray

    recipe = planned.locked.recipe
    # No token goes along, each node has its own: Ray writes a task's environment into its logs, as they are.
    make = partial(make_part, recipe.text, recipe.path, options, planned.identity)
    for part, where in on_ray(make, parts, room_of_task(planned.threads, planned.peak_memory, options)):
        yield _part_made(planned, part, where)


def room_of_task(threads: int, memory: int, options: Options) -> Mapping[str, float]:
    """What a task takes of its node, in Ray's words."""
    return {"num_cpus": threads, "memory": memory} | ({"num_gpus": 1} if options.device == "cuda" else {})


def make_part(text: str, path: str, options: Options, identity: str, part: Part) -> None:
    """Make one part on this machine, from nothing but a recipe's text and options.

    Raises:
        MergerError: any kind.
        PartError: it would not be a part of the merge that `identity` names.
    """
    take_over()  # a task of Ray's has its process to itself
    here = with_free_memory(replace(options, part=part))
    planned, store = plan(parse(text, path, methods()), here)
    if planned.identity != identity:
        hint = "a parent has a new commit, or this machine another version of merger; org/name@commit pins a parent"
        raise PartError(Problem("this is no part of the merge that was started", hint=hint))
    merge(planned, store, here)


# ---- Hugging Face Jobs ----------------------------------------------------------------------------------------------


def _by_jobs(
    planned: Plan, options: Options, engine: Engine, parts: Sequence[Part]
) -> Iterator[PartStarted | PartMade]:
    from merger.distributed.hub_jobs import HubJobs

    extras = {need.extra for need in needs_of(planned.locked.recipe) if need.extra != "eval"}
    package = requirement(",".join(sorted(extras)), version(PACKAGE))
    environment = {"MERGER_RECIPE": _pack_recipe(planned), "MERGER_PACKAGE": package}
    started: dict[HubJob, Part] = {}
    problems: list[Problem] = []
    with HubJobs(engine.flavor, engine.timeout) as hub:
        for part in parts:
            name = f"merge-{planned.hash[:8]}-part-{part.number}-of-{part.count}"
            command = ["sh", "-c", SCRIPT, "merger", *_arguments(planned, options, part)]
            job = hub.start(name, IMAGE, command, environment)
            started[job] = part
            yield PartStarted(part, job.page)
        for job, trouble in hub.ended():
            if trouble is None:
                yield _part_made(planned, started[job], job.page)
            else:
                hint = f"{job.page} has its log; the same command makes only what is missing"
                problems.append(Problem(f"part {started[job]}: {trouble}", hint=hint))
    if problems:
        raise PartError(problems)


def _pack_recipe(planned: Plan) -> str:
    text = planned.locked.recipe.text.encode()
    if len(text) > _LONGEST_RECIPE:
        what = f"a Hub job takes a recipe of {size(_LONGEST_RECIPE, DOWN)} at most, and this has {size(len(text), UP)}"
        raise RecipeError(Problem(what, hint="shorten it, or start the parts yourself with --part"))
    return base64.b64encode(text).decode()


def _arguments(planned: Plan, options: Options, part: Part) -> list[str]:
    given = {
        "to": destination(planned.locked.recipe, options),
        "part": part,
        "seed": options.seed,
        "shard-size": options.shard_size,
        "gguf": ",".join(options.gguf) or None,
        "max-memory": options.max_memory,
        "max-disk": options.max_disk,
        "threads": options.threads,
        "device": options.device,
    }
    flags = {
        "force": options.force,
        "stream": options.stream,
        "no-cache": not options.cache,
        "allow-pickle": options.allow_pickle,
    }
    valued = [f"--{name}={value}" for name, value in given.items() if value is not None]
    return valued + [f"--{name}" for name, is_set in flags.items() if is_set]
