"""Statistics that a recipe has measured on the way: planned with it, measured where they are not kept yet, reused.

Whose recipe that may be, its reader decides by asking here: where nobody does, such a recipe is refused. Not here: the
measuring (measure), and where they are kept (stores.kept).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merger.errors import BudgetError, MergerError, Problem, RecipeError
from merger.models.side_files import LOCK_NAME
from merger.recipe.model import Measure, ModelRef, Recipe
from merger.run.options import Options
from merger.run.pipeline import ignore
from merger.run.prepare import is_lock, pins_beside, plan
from merger.safety.numbers import DOWN, UP, size, typed_size
from merger.stores.kept import kept_folder
from merger.stores.ports import Kept
from merger.stores.resolve import Library
from merger.stores.results import work_folder

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
        merge: the recipe, and what it is planned with, where each layer is fed by the merge's; else None.
    """

    planned: Measurement
    store: Library
    options: Options
    disk: int
    merge: tuple[Recipe, Options] | None = None


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
    if any(ref.merged for ref in recipe.measures):
        found = _feed(recipe, options, found)
    awaited = [each for kept, each in found.values() if not (kept_folder(kept.name) / LOCK_NAME).is_file()]
    return replace(options, measured={ref: kept for ref, (kept, _) in found.items()}), tuple(awaited)


def _feed(
    recipe: Recipe, options: Options, found: Mapping[ModelRef, tuple[Kept, Awaited]]
) -> dict[ModelRef, tuple[Kept, Awaited]]:
    """The same, measured by the layers of the merge: what all it is made of is part of what decides the numbers."""
    from merger.statistics.plan import fed_by

    ref = next(ref for ref in recipe.measures if ref.merged)
    with _placed(ref):
        if not all(isinstance(other, Measure) and other.merged for other in recipe.statistics):
            what, hint = "merged: true stands beside some models alone", "write it beside each, or beside none"
            raise RecipeError(Problem(what, hint=hint))
        if recipe.search is not None:
            what = "what the merge's own layers feed is other for other numbers, and is measured once"
            raise RecipeError(Problem(what, hint="search without merged: true, and add it to what was found"))
        merge, _ = plan(recipe, replace(options, measured={ref: kept for ref, (kept, _) in found.items()}))
        fed = {ref: replace(each, planned=fed_by(each.planned, merge)) for ref, (_, each) in found.items()}
        memory = max(each.planned.peak_memory for each in fed.values())
        disk = sum(each.disk + each.planned.spool for each in fed.values())
        for word, needed, allowed in (("memory", memory, options.max_memory), ("disk", disk, options.max_disk)):
            if allowed is not None and needed > allowed:
                there, least = size(allowed, DOWN), typed_size(needed, UP)
                what = f"measured at once this takes {size(needed, UP)} of {word}, and {there} are allowed"
                raise BudgetError(Problem(what, hint=f"raise --max-{word} to {least}, or leave out merged: true"))
    kept = {ref: _kept(each.planned) for ref, each in fed.items()}
    planned_with = recipe, replace(options, measured=kept)
    return {
        ref: (kept[ref], replace(each, options=_going_to(each.options, kept[ref]), merge=planned_with))
        for ref, each in fed.items()
    }


@contextmanager
def _placed(ref: Measure) -> Iterator[None]:
    """What is refused is so at its place in the recipe."""
    try:
        yield
    except MergerError as error:
        where = f"models[{ref.model}].statistics"
        raise type(error)([replace(problem, at=ref.at, where=where) for problem in error.problems]) from None


def _kept(planned: Measurement) -> Kept:
    return Kept(f"{planned.kind}-{planned.identity[:16]}", planned.heads)


def _going_to(options: Options, kept: Kept) -> Options:
    return replace(options, to=str(kept_folder(kept.name)))


def _plan(recipe: Recipe, ref: Measure, options: Options, pinned: dict[str, Pin]) -> tuple[Kept, Awaited]:
    from merger.statistics.measure import disk_at_once
    from merger.statistics.plan import plan_measurement

    means = Options(
        threads=options.threads, max_memory=options.max_memory, max_disk=options.max_disk, cache=options.cache,
        root=options.root, tensors=options.tensors, read_token=options.read_token, seed=ref.seed,
    )  # fmt: skip
    with _placed(ref):
        if ref.model in {ModelRef(stage.name or "") for stage in recipe.stages}:
            what = f"{ref.model} is made on the way, and nothing can be measured of it yet"
            raise RecipeError(Problem(what, hint="make it first, and measure it"))
        asked = str(ref.model), ref.kind, ref.measure, ref.tokens, ref.length
        planned, store = plan_measurement(*asked, means, ref.blocks, pinned)  # type: ignore[arg-type]  # a method's kind
        kept = _kept(planned)
        means = _going_to(means, kept)
        return kept, Awaited(planned, store, means, disk_at_once(planned, means))


def measure_awaited(
    awaited: Sequence[Awaited],
    on_event: Callable[[Any], object] = ignore,
    before: Callable[[Awaited], object] = ignore,
) -> None:
    """Measure them, one after the other; `before` is told of each when it begins, `on_event` of its files.

    Those that are fed by the merge's layers are measured together.

    Raises:
        MergerError: any kind; finished files wait for another run.
    """
    from merger.statistics.measure import measure_statistics, measure_through

    for each in awaited:
        before(each)
        Path(each.options.to or "").parent.mkdir(parents=True, exist_ok=True)
        if each.merge is None:
            measure_statistics(each.planned, each.store, each.options, on_event)
    together = [each for each in awaited if each.merge is not None]
    if together and (merge := together[0].merge) is not None:
        recipe, options = merge
        work = {_kept(each.planned).name: str(work_folder(Path(each.options.to or ""))) for each in together}
        known = {ref: replace(kept, folder=work.get(kept.name)) for ref, kept in options.measured.items()}
        made, store = plan(recipe, replace(options, measured=known))
        measure_through([(each.planned, each.store, each.options) for each in together], made, store, on_event)
