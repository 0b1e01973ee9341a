"""The line, wired: check, plan and run, for every shell that wants a merge made. Not here: how anything is shown."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from merger.card.lineage import LOCK_NAME, lock_file
from merger.card.render import render
from merger.checkpoints.shard import Written, index
from merger.errors import Problem, RecipeError
from merger.methods.registry import Method, methods
from merger.plan.lock import LockedRecipe, lock
from merger.plan.plan import SHARD_BYTES, Budget, Plan
from merger.plan.plan import plan as make_plan
from merger.recipe.model import Recipe
from merger.recipe.parse import parse
from merger.stores.folder import FolderSink, FolderStore
from merger.stores.library import Library
from merger.stores.ports import Published, Sink, Store

if TYPE_CHECKING:
    from merger.engine.execute import Event

HUB = "hf://"


@dataclass(frozen=True)
class Options:
    """What a run may use and where it goes; sizes in bytes, None where the default holds.

    Args:
        to: a folder, or ``hf://owner/name``; None: the recipe's publish.repo.
        max_memory: the most memory the run may take.
        shard_size: the largest size of a shard's tensors.
        threads: how many threads compute; None: one for each core.
        device: ``cpu`` or ``cuda``.
        seed: in place of the recipe's.
        force: replace a model at the destination.
    """

    to: str | None = None
    max_memory: int | None = None
    shard_size: int | None = None
    threads: int | None = None
    device: str = "cpu"
    seed: int | None = None
    force: bool = False


@dataclass(frozen=True)
class Done:
    """The merge lies at its destination."""

    published: Published
    shards: tuple[Written, ...]


def read(path: Path) -> Recipe:
    """Read a recipe's file and check all that can be known without its models.

    Raises:
        RecipeError: with every problem of the file.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecipeError(Problem(f"{path}: cannot be read ({why})")) from None
    return parse(text, str(path), methods())


def plan(recipe: Recipe, options: Options) -> tuple[Plan, Store]:
    """Pin the recipe's models and decide what will be made; no tensor's byte is read.

    Raises:
        ModelError, RecipeError, MismatchError, BudgetError: as the steps do.
    """
    store = Library(_stores(recipe))
    locked = lock(recipe, store)
    budget = Budget(
        memory=options.max_memory,
        threads=options.threads or os.cpu_count() or 1,
        shard_bytes=options.shard_size or SHARD_BYTES,
    )
    return make_plan(locked, methods(), budget, options.seed), store


def _stores(recipe: Recipe) -> list[Store]:
    """Folders first. The Hub's client takes a while to import: not for recipes that need no Hub."""
    folders = FolderStore()
    if all(folders.has(ref.path) for ref in recipe.models):
        return [folders]
    from merger.stores.hub import HubStore

    return [folders, HubStore()]


def destination(recipe: Recipe, options: Options) -> str:
    """Where the result goes: as the options say, else as the recipe does.

    Raises:
        RecipeError: neither says it.
    """
    if options.to is not None:
        return options.to
    if recipe.publish.repo is not None:
        return HUB + recipe.publish.repo
    hint = "give --to FOLDER or --to hf://owner/name, or write publish: {repo: owner/name} into the recipe"
    raise RecipeError(Problem(f"{recipe.path}: where shall the result go?", hint=hint))


def _sink(recipe: Recipe, options: Options, locked: LockedRecipe) -> Sink:
    to = destination(recipe, options)
    if not to.startswith(HUB):
        parents = [Path(model.located.where) for model in locked.models if model.located.commit is None]
        return FolderSink(Path(to), options.force, parents)
    from merger.stores.staging import HubSink

    return HubSink(to.removeprefix(HUB), recipe.publish.private, options.force, recipe.publish.create_pr)


def run(planned: Plan, store: Store, options: Options) -> Iterator[Event | Done]:
    """Make what was planned and put it where it belongs; the last event is `Done`.

    Raises:
        MergerError: any kind; the destination is then as it was before.
    """
    from merger.engine.execute import ShardDone, execute  # imports torch, which checking and planning do without

    sink = _sink(planned.locked.recipe, options, planned.locked)
    done = False
    try:
        sink.prepare(planned.hash, planned.disk(staged=destination(planned.locked.recipe, options).startswith(HUB)))
        shards: list[Written] = []
        for event in execute(planned, methods(), store, sink, options.device):
            if isinstance(event, ShardDone):
                shards.append(event.shard)
            yield event
        files = _small_files(planned, store, sink.name, methods(), tuple(shards))
        published = sink.finish(files, f"Merge of {', '.join(model.name for model in planned.locked.models)}")
        done = True
    finally:
        if not done:
            sink.abandon()
    yield Done(published, tuple(shards))


def _small_files(
    planned: Plan, store: Store, name: str, table: Mapping[str, Method], shards: tuple[Written, ...]
) -> dict[str, bytes]:
    """All that stands beside the shards; index and config come last, for they make it look like a model."""
    donor = planned.locked.donor
    files = {side: store.fetch(donor.located, side) for side in planned.side_files}
    files["README.md"] = render(planned, table, name).encode()
    files["recipe.yaml"] = planned.locked.recipe.text.encode()
    files[LOCK_NAME] = lock_file(planned, shards).encode()
    if len(planned.shards) > 1:
        weight_map = {job.name: shard.name for shard in planned.shards for job in shard.jobs}
        total = sum(job.nbytes for job in planned.jobs)
        files["model.safetensors.index.json"] = index(dict(sorted(weight_map.items())), total)
    files["config.json"] = (json.dumps(planned.config, indent=2) + "\n").encode()
    return files
