"""A plan carried out: shards made, the rest beside them, all of it put where it belongs. Not here: how it is shown."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from merger.card.facts import lock_file
from merger.card.relations import Loss, relations
from merger.card.render import render
from merger.errors import DamagedError, MergerError, MissingError, Problem, UploadError
from merger.evaluation.budget import Score
from merger.evaluation.evaluate import Measured, Measuring, carried_out, prepared
from merger.lock.locked import LockedRecipe
from merger.methods.registry import methods
from merger.models.formats.safetensors import WrittenShard
from merger.models.side_files import LOCK_NAME
from merger.planning.geometry import Geometry, recalled
from merger.planning.plan import Part, Plan, Shard, share
from merger.recipe.model import Recipe
from merger.run.artifacts import card, elders, small_files, used_files
from merger.run.options import Options, destination, exposed, needed_disk, placed, to_hub
from merger.stores.folder import FolderSink
from merger.stores.ports import HUB, Leftover, Published, Sink, Store, bytes_of
from merger.stores.resolve import Library

if TYPE_CHECKING:
    from merger.engine.execute import Event
    from merger.evaluation.process import Wanted


@dataclass(frozen=True)
class Ready:
    """The destination takes what is planned; the first event."""


@dataclass(frozen=True)
class Resumed:
    """Some of the shards are there already, from an earlier run or another part."""

    shards: int
    of: int


@dataclass(frozen=True)
class PartDone:
    """A part's shards are where all parts put them; `merger publish` makes a model of them once all are there.

    `doubts` are sentences that say why the model may mean little, as far as this part has seen it.
    """

    part: Part
    shards: int
    of: int
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Done:
    """The merge lies at its destination; without shards where it lay there before this run.

    `doubts` are sentences that say why it may mean little, or who reads of it now; `losses` what an adapter leaves out;
    `card` and `lock` are those files where this run wrote them.
    """

    published: Published
    shards: tuple[WrittenShard, ...]
    doubts: tuple[str, ...] = ()
    losses: tuple[Loss, ...] = ()
    card: str = field(default="", repr=False)
    lock: str = field(default="", repr=False)

    @property
    def is_new(self) -> bool:
        """Whether this run put it there."""
        return bool(self.shards)


def warm() -> None:
    """Import all that a run to the Hub needs: for a process that forks others, each of which then has it at once."""
    import merger.engine.execute
    import merger.stores.staging  # noqa: F401


def lock_text(planned: Plan, done: Done) -> str:
    """What a lock file beside the recipe has to hold to make this result again."""
    return done.lock or lock_file(planned, {}, lambda model, file: model.files[file].sha256)


def trusted_publishing(repo: str) -> str:
    """Let the Hub's client write to one repo as this CI job, without a secret; returns the token it got for that.

    Raises:
        UploadError: the Hub does not trust this job with that repo.
    """
    from merger.stores.hub import trusted_publisher

    return trusted_publisher(repo)


def _sink(recipe: Recipe, options: Options, locked: LockedRecipe) -> Sink:
    to = destination(recipe, options)
    if not to.startswith(HUB):
        parents = [Path(model.located.where) for model in locked.models if model.located.commit is None]
        return FolderSink(Path(to), options.force, parents)
    from merger.stores.staging import HubSink

    publish = recipe.publish
    return HubSink(
        to.removeprefix(HUB),
        publish.private,
        options.force,
        publish.create_pr or options.create_pr,
        options.stream,
        options.write_token,
    )


def unmade(planned: Plan, options: Options, count: int) -> Done | tuple[Part, ...]:
    """Those of `count` parts of which a shard is still to be made; `Done` where the model itself is there already.

    Raises:
        UploadError: the destination refuses what would be made.
    """
    sink = _sink(planned.locked.recipe, options, planned.locked)
    try:
        found = sink.prepare(planned.identity, shared=True)
        held = sink.held()
    finally:
        sink.leave()
    if found is not None:
        return Done(found, ())
    parts = (Part(number, count) for number in range(1, count + 1))
    return tuple(part for part in parts if any(shard.name not in held for shard in share(planned.shards, part)))


def run(
    planned: Plan, store: Library, options: Options
) -> Iterator[Event | Ready | Resumed | Measuring | Measured | Done | PartDone]:
    """Make what was planned and put it where it belongs; the last event is `Done`, of a part `PartDone`.

    Shards that an earlier run finished are not made again, and a model that is there already is not published again.

    Raises:
        MergerError: any kind; the destination is then as it was before, and finished shards wait for another run.
    """
    sink = _sink(planned.locked.recipe, options, planned.locked)
    try:
        with ThreadPoolExecutor(1) as meanwhile:
            if (
                to_hub(planned.locked.recipe, options) and not options.publish_only
            ):  # its answers and torch's import take a second or two each
                meanwhile.submit(warm)
            found = sink.prepare(planned.identity, shared=options.part is not None)
        yield Ready()
        if found is None:
            yield from _made(planned, store, sink, options)
        else:
            yield Done(found, ())
    except BaseException:
        with suppress(MergerError):  # what went wrong first is what is told
            sink.leave()
        raise
    sink.leave()


def _made(
    planned: Plan, store: Library, sink: Sink, options: Options
) -> Iterator[Event | Resumed | Measuring | Measured | Done | PartDone]:
    """The shards that are missing, and the end: of a part, or of the whole."""
    held, seen, doubts = dict(sink.held()), dict[str, Geometry](), tuple[str, ...]()
    mine = share(planned.shards, options.part)
    missing = [shard for shard in mine if shard.name not in held]
    if held:
        yield Resumed(len(planned.shards) - len(missing), len(planned.shards))
    if missing and options.publish_only:
        raise _unfinished(missing, planned)
    sink.reserve(needed_disk(planned, options, missing))
    wanted = None if options.part else prepared(planned, options.device, options.read_token, options.root)
    if missing:
        sink.check_card(render(planned, methods(), sink.name, relations(planned, seen)))
        doubts = yield from _shards_made(planned, missing, store, sink, options, held, seen)
    if options.part is not None:
        yield PartDone(options.part, len(mine), len(planned.shards), doubts)
        return
    shards = tuple(held[shard.name] for shard in planned.shards)
    for note in sink.notes() if len(missing) < len(planned.shards) else ():
        seen |= recalled(note)
    seen = {job.name: seen[job.name] for job in planned.jobs if job.name in seen}  # in whatever order they were made
    scores = (yield from _scored(wanted, planned, store, sink)) if wanted else ()
    related = relations(planned, seen)
    ancestors = elders(planned, to_hub(planned.locked.recipe, options))
    written = card(planned, sink.name, seen, store, ancestors, scores)
    small = small_files(planned, store, shards, seen)
    published = sink.finish({**written.files, **small}, _title(planned))
    doubts = (*related.doubts, *doubts, *exposed(planned, destination(planned.locked.recipe, options)))
    yield Done(published, shards, doubts, related.losses, written.text, bytes_of(small[LOCK_NAME]).decode())


def _title(planned: Plan) -> str:
    """The commit's first line."""
    lora, names = planned.locked.recipe.lora, ", ".join(model.name for model in planned.locked.merged)
    return f"LoRA adapter of {planned.locked.models[0].name}" if lora and lora.extracted else f"Merge of {names}"


def _scored(
    wanted: Wanted, planned: Plan, store: Library, sink: Sink
) -> Generator[Measuring | Measured, None, tuple[Score, ...]]:
    """What is measured of the result before it is published."""
    found: tuple[Score, ...] = ()
    for event in carried_out(wanted, planned, used_files(planned, store), store, sink):
        if isinstance(event, Measured):
            found += event.scores
        yield event
    return found


def _shards_made(
    planned: Plan,
    missing: Sequence[Shard],
    store: Store,
    sink: Sink,
    options: Options,
    held: dict[str, WrittenShard],
    seen: dict[str, Geometry],
) -> Generator[Event, None, tuple[str, ...]]:
    """Make them, fill `held` and `seen`, and return what speaks against the result beside what was seen."""
    # imports torch, which all else does without
    from merger.engine.execute import Doubted, Observed, ShardDone, execute

    made, doubts = list[str](), list[str]()
    try:
        for event in execute(planned, missing, methods(), store, sink, options.device):
            if isinstance(event, ShardDone):
                held[event.shard.name] = event.shard
                made.append(event.shard.name)
            elif isinstance(event, Observed):
                seen[event.job.name] = event.geometry
            elif isinstance(event, Doubted):
                doubts.append(event.what)
            yield event
    except DamagedError as error:
        _forget(sink, made, error)
        raise
    return tuple(doubts)


def _forget(sink: Sink, made: Sequence[str], why: DamagedError) -> None:
    """What was made of damaged bytes must not be what another run goes on from."""
    try:
        sink.forget(made)
    except MergerError as error:
        raise DamagedError([*why.problems, *error.problems]) from None


def _unfinished(missing: Sequence[Shard], planned: Plan) -> UploadError:
    names = ", ".join(shard.name for shard in missing[:3]) + (", ..." if len(missing) > 3 else "")
    what = f"{len(missing)} of {len(planned.shards)} shards are not there yet: {names}"
    return UploadError(Problem(what, hint="run the parts that make them, with the same recipe, seed and --shard-size"))


def leftovers(to: str) -> list[Leftover]:
    """What runs that did not finish left at a destination.

    Raises:
        MissingError: nothing is there, neither a result nor what a run left.
        UploadError: the destination cannot be asked.
    """
    found = destination_sink(to).leftovers()
    if not found and not placed(to).startswith(HUB) and not os.path.lexists(os.path.expanduser(to)):
        what = f"there is no folder {to!r}, nor a run that was to make it"
        raise MissingError(Problem(what, hint="paths are relative to the working directory; a repo starts with hf://"))
    return found


def clean(to: str, leftover: Leftover) -> None:
    """Remove one of them, and nothing else.

    Raises:
        UploadError: a run is at work there, or we may not write.
    """
    destination_sink(to).clean(leftover)


def destination_sink(to: str, token: str | None = None) -> Sink:
    """What is at a destination, for all but making a merge there.

    Raises:
        RecipeError: a place on the Hub that cannot be called so, or a word that may be a folder or a repo.
    """
    to = placed(to)
    if not to.startswith(HUB):
        return FolderSink(Path(to))
    from merger.stores.staging import HubSink

    return HubSink(to.removeprefix(HUB), token=token)
