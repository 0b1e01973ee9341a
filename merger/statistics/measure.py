"""A measurement carried out: each layer's file as soon as it is measured, then card and lock.

What is finished outlives the run: another one of the same identity measures what is missing. Not here: what is summed
up (inputs, gradients), and what it takes (plan).
"""

from __future__ import annotations

import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np

from merger import runtime
from merger.engine.execute import ShardDone, single_threaded
from merger.engine.inputs.layers import ModelTensors
from merger.errors import BudgetError, MergerError, ModelError, Problem
from merger.methods.registry import methods
from merger.methods.steps.step import Array
from merger.models.formats.safetensors import ShardWriter, WrittenShard, header
from merger.models.side_files import CARD_NAME, LOCK_NAME
from merger.planning.plan import Plan
from merger.run.options import Options, to_hub
from merger.run.pipeline import Ready, Result, Resumed, ignore, place_of
from merger.safety.numbers import DOWN, UP, size
from merger.statistics.card import statistics_card
from merger.statistics.gradients import sum_squares
from merger.statistics.inputs import sum_inputs, sum_through
from merger.statistics.plan import Measurement, StatisticsShard, merged_part
from merger.statistics.walk import States, Walk
from merger.stores.ports import FileInfo, Published, Session
from merger.stores.resolve import Library
from merger.stores.scratch import Scratch, sweep

if TYPE_CHECKING:
    from merger.run.pipeline import Observer

_MADE_WITH = (runtime.PACKAGE, "numpy", "torch", "transformers")


Sum = Callable[[Walk, Sequence[StatisticsShard]], None]
"""Measures the files of a model that are missing."""


def measure_statistics(
    planned: Measurement, store: Library, options: Options, on_event: Observer = ignore, sum_up: Sum | None = None
) -> Result:
    """Measure what was planned and put it where it belongs.

    Args:
        planned: what is measured.
        store: where the model is.
        options: what it may use, and where it goes.
        on_event: is told of each file.
        sum_up: how, if other models are measured with it.

    Raises:
        MergerError: any kind; finished files wait for another run.
    """
    began = time.monotonic()
    place = place_of(options.to or "", options, planned.locked)
    session = place.open(planned.identity)
    if isinstance(session, Published):
        return Result(session.where, session.commit, (), len(planned.shards), plan=planned.identity)
    try:
        on_event(Ready())
        session.reserve(disk_at_once(planned, options))
        held = _measure(planned, store, session, on_event, sum_up)
        files = _files(planned, store, place.name, held)
        published = session.finish(files, f"Statistics of {planned.locked.config_model.name}: {planned.kind}")
    except BaseException:
        with suppress(MergerError):  # what went wrong first is what is told
            session.leave()
        raise
    session.leave()
    shards, seconds = tuple(held.values()), time.monotonic() - began
    return Result(
        published.where, published.commit, shards, len(shards), plan=planned.identity, seconds=seconds,
        card=files[CARD_NAME].decode(), lock=files[LOCK_NAME].decode(),
    )  # fmt: skip


def measure_through(
    parts: Sequence[tuple[Measurement, Library, Options]],
    merge: Plan,
    store: Library,
    on_event: Observer = ignore,
    others: Sequence[tuple[Walk, Sequence[StatisticsShard]]] = (),
) -> None:
    """Measure several models whose layers are fed by those of their merge, each of which is made meanwhile.

    Args:
        parts: of each model what is measured, where it is, and what that may use.
        merge: which reads of what is measured as soon as it is.
        store: where its models are, and what was measured.
        on_event: is told of each file.
        others: what is under way.

    Raises:
        MergerError: any kind; finished files wait for another run.
    """
    (planned, held, options), *rest = parts

    def sum_up(walk: Walk, missing: Sequence[StatisticsShard]) -> None:
        under_way = [*others, (walk, missing)]
        if rest:
            measure_through(rest, merge, store, on_event, under_way)
        else:
            tensors = ModelTensors(merge.locked, methods(), store)
            sum_through(under_way, Walk(merged_part(planned, merge), tensors, walk.states, walk.pool, walk.write))

    measure_statistics(planned, held, options, on_event, sum_up)


def disk_at_once(planned: Measurement, options: Options) -> int:
    """The bytes of disk that the files take at the destination, or on their way there.

    Raises:
        BudgetError: they and the hidden states are more than the options allow, or these are more than is free.
    """
    sizes = [shard.size for shard in planned.shards]
    needed = min(2 * max(sizes), sum(sizes)) if to_hub(planned.locked.recipe, options) else sum(sizes)
    if options.max_disk is not None and needed + planned.spool > options.max_disk:
        there = size(options.max_disk, DOWN)
        what = f"this takes {size(needed + planned.spool, UP)} of disk at once, and {there} are allowed"
        raise BudgetError(Problem(what, hint="raise --max-disk, or measure on fewer --tokens"))
    if (free := shutil.disk_usage(folder := tempfile.gettempdir()).free) < planned.spool:
        what = f"hidden states take {size(planned.spool, UP)} of disk in {folder}, where {size(free, DOWN)} are free"
        raise BudgetError(Problem(what, hint="let TMPDIR name another disk, or measure on fewer --tokens"))
    return needed


def _measure(
    planned: Measurement, store: Library, session: Session, on_event: Observer, sum_up: Sum | None
) -> Mapping[str, WrittenShard]:
    """All files, of which those that are missing are measured now."""
    held = dict(session.held())
    missing = [shard for shard in planned.shards if shard.name not in held]
    if held:
        on_event(Resumed(len(held), len(planned.shards)))

    def write(shard: StatisticsShard, numbers: Mapping[str, Array]) -> None:
        held[shard.name] = _write(shard, numbers, session)
        on_event(ShardDone(held[shard.name]))

    if missing or sum_up is not None:
        import torch  # noqa: F401  its threads are counted from here on

        sweep()
        shape = (planned.tokens.shape[1], planned.width)
        with (
            single_threaded(),
            closing(Scratch()) as scratch,
            closing(States(scratch.folder() / "states", len(planned.tokens), shape)) as states,
            ThreadPoolExecutor(planned.threads) as pool,
        ):
            walk = Walk(planned, ModelTensors(planned.locked, methods(), store), states, pool, write)
            (sum_up or (sum_squares if planned.kind == "fisher" else sum_inputs))(walk, missing)
    return {shard.name: held[shard.name] for shard in planned.shards}


def _write(shard: StatisticsShard, numbers: Mapping[str, Array], session: Session) -> WrittenShard:
    if odd := [name for name, entries in numbers.items() if not np.isfinite(entries).all()]:
        what = f"what is measured for {odd[0]} is not finite: the model's numbers are damaged, or overflow"
        raise ModelError(Problem(what, hint="does the model work? Try it on the same texts"))
    try:
        with ShardWriter(shard.name, session.open(shard.name), header(shard.tensors), shard.size) as writer:
            for tensor in shard.tensors:
                writer.write(np.ascontiguousarray(numbers[tensor.name]).reshape(-1).view(np.uint8).data)
            written = writer.close()
    except OSError as error:
        raise runtime.refusal(f"{shard.name} cannot be written", error, BudgetError, "look at its disk") from None
    session.take(written)
    return written


def _files(planned: Measurement, store: Library, name: str, held: Mapping[str, WrittenShard]) -> dict[str, bytes]:
    """The small files: index, lock and card."""
    said = replace(
        planned.said(store.checksum),
        made_with={"python": platform.python_version()} | {each: version(each) for each in _MADE_WITH},
        output={each.name: FileInfo(each.size, each.sha256) for each in held.values()},
    )
    card = statistics_card(said, name, planned.locked.config_model).encode()
    return planned.index | {CARD_NAME: card, LOCK_NAME: said.text().encode()}
