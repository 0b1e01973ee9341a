"""Statistics that a recipe has measured on the way: planned with it, measured where they are not kept yet, reused.

Whose recipe that may be, its reader decides by asking here: where nobody does, such a recipe is refused. Not here: the
measuring (measure), and where they are kept (stores.kept).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merger.errors import MergerError, Problem, RecipeError
from merger.models.side_files import LOCK_NAME
from merger.recipe.model import Measure, ModelRef, Recipe
from merger.run.options import Options
from merger.run.pipeline import ignore
from merger.run.prepare import is_lock, pins_beside
from merger.stores.kept import kept_folder
from merger.stores.ports import Kept
from merger.stores.resolve import Library

if TYPE_CHECKING:
    from merger.lock.lock import Pin
    from merger.statistics.plan import Measurement


@dataclass(frozen=True)
class Awaited:
    """Statistics that are not kept yet.

    Args:
        planned: what is measured.
        store: where its model is.
        options: what it may use, and where it goes.
        disk: the bytes of disk that it takes there.
    """

    planned: Measurement
    store: Library
    options: Options
    disk: int


def find_kept(recipe: Recipe, options: Options) -> tuple[Options, tuple[Awaited, ...]]:
    """Plan what a recipe has measured on the way, unless these options are of the same already.

    Returns:
        The options with which the recipe is planned, and what is to be measured before it is merged.

    Raises:
        MergerError: as `plan_measurement` and `disk_at_once` do, at its place in the recipe.
    """
    if options.measured.keys() >= set(recipe.measures) or is_lock(Path(recipe.path)):  # a lock names what was measured
        return options, ()
    pinned, found = pins_beside(recipe, options), dict[ModelRef, tuple[Kept, Awaited]]()
    for ref in recipe.measures:
        found[ref] = _plan(recipe, ref, options, pinned)
    awaited = [each for kept, each in found.values() if not (kept_folder(kept.name) / LOCK_NAME).is_file()]
    return replace(options, measured={ref: kept for ref, (kept, _) in found.items()}), tuple(awaited)


def _plan(recipe: Recipe, ref: Measure, options: Options, pinned: dict[str, Pin]) -> tuple[Kept, Awaited]:
    from merger.statistics.measure import disk_at_once
    from merger.statistics.plan import plan_measurement

    means = Options(
        threads=options.threads, max_memory=options.max_memory, max_disk=options.max_disk, cache=options.cache,
        root=options.root, tensors=options.tensors, read_token=options.read_token, seed=ref.seed,
    )  # fmt: skip
    try:
        if ref.model in {ModelRef(stage.name or "") for stage in recipe.stages}:
            what = f"{ref.model} is made on the way, and nothing can be measured of it yet"
            raise RecipeError(Problem(what, hint="make it first, and measure it"))
        asked = str(ref.model), ref.kind, ref.measure, ref.tokens, ref.length
        planned, store = plan_measurement(*asked, means, ref.blocks, pinned)  # type: ignore[arg-type]  # a method's kind
        kept = Kept(f"{ref.kind}-{planned.identity[:16]}", planned.heads)
        means = replace(means, to=str(kept_folder(kept.name)))
        return kept, Awaited(planned, store, means, disk_at_once(planned, means))
    except MergerError as error:
        placed = [replace(problem, at=ref.at, where=f"models[{ref.model}].statistics") for problem in error.problems]
        raise type(error)(placed) from None


def measure_awaited(
    awaited: Sequence[Awaited],
    on_event: Callable[[Any], object] = ignore,
    before: Callable[[Awaited], object] = ignore,
) -> None:
    """Measure them, one after the other; `before` is told of each when it begins, `on_event` of its files.

    Raises:
        MergerError: any kind; finished files wait for another run.
    """
    from merger.statistics.measure import measure_statistics

    for each in awaited:
        before(each)
        Path(each.options.to or "").parent.mkdir(parents=True, exist_ok=True)
        measure_statistics(each.planned, each.store, each.options, on_event)
