"""A plan carried out: shards made, the rest beside them, all of it put where it belongs. Not here: how it is shown."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from merger.card.facts import exposed_models, lock_file
from merger.card.pictures.canvas import import_drawing
from merger.card.relations import Loss
from merger.card.render import render
from merger.errors import DamagedError, MergerError, MismatchError, MissingError, Problem, RecipeError, UploadError
from merger.evaluation.budget import Score
from merger.evaluation.evaluate import Measured, Measuring, measure, prepare_measuring
from merger.lock.locked import LockedRecipe
from merger.methods.registry import methods
from merger.models.formats.safetensors import WrittenShard
from merger.models.side_files import LOCK_NAME
from merger.planning.geometry import Geometry, load_geometry
from merger.planning.jobs.statistics import other_statistics
from merger.planning.plan import Plan
from merger.planning.shards import Part, Shard, share
from merger.recipe.model import Publish
from merger.run.artifacts import card, elders, small_files, used_files
from merger.run.found import SearchFacts
from merger.run.options import Options, destination, needed_disk, parse_destination, to_hub
from merger.safety.names import hub_path
from merger.stores.ports import Destination, Leftover, Published, Session, bytes_of
from merger.stores.resolve import Library
from merger.stores.results import ResultFolder

if TYPE_CHECKING:
    from merger.engine.execute import Event as MakingEvent


@dataclass(frozen=True)
class Ready:
    """The destination takes what is planned: what is to be made is made from here on."""


@dataclass(frozen=True)
class Resumed:
    """Some of the shards are there already, from an earlier run or another part."""

    shards: int
    of: int


@dataclass(frozen=True)
class Result:
    """What became of a merge.

    Args:
        where: the folder or page where it lies; of a part, where it waits.
        commit: on the Hub, the one that brought it.
        shards: the files of tensors; none where the merge lay there before this run.
        of: how many files of tensors the merge has.
        part: the part that was made, where not all of it was: `merger publish` makes a model of all parts.
        doubts: sentences that say why it may mean little, or who reads of it now.
        losses: what an adapter leaves out of its model.
        card, lock: those files, where this run wrote them.
        plan: the hash of the plan.
        seconds: how long it took.
    """

    where: str
    commit: str | None
    shards: tuple[WrittenShard, ...]
    of: int
    part: Part | None = None
    doubts: tuple[str, ...] = ()
    losses: tuple[Loss, ...] = ()
    card: str = field(default="", repr=False)
    lock: str = field(default="", repr=False)
    plan: str = ""
    seconds: float = 0.0

    @property
    def is_new(self) -> bool:
        """Whether this run put it there."""
        return bool(self.shards)


if TYPE_CHECKING:
    Event = Ready | Resumed | Measuring | Measured | MakingEvent
    """What happens on the way."""

    Observer = Callable[[Event], object]
    """Is told of it as it happens. What it raises ends the run, and what is finished waits for another."""


def ignore(event: object) -> None:
    """What an observer does whom nothing matters to."""


def warm() -> None:
    """Import and compile all that a run to the Hub needs: for a process that forks others, so that each has it."""
    import merger.engine.inputs.readers
    import merger.stores.hub.staging  # noqa: F401
    from merger.methods.steps.step import compile_steps

    methods()
    compile_steps()


def lock_text(planned: Plan, result: Result) -> str:
    """What a lock file beside the recipe has to hold to make this result again."""
    return result.lock or lock_file(planned, {}, lambda model, file: model.files[file].sha256)


def trusted_publishing(repo: str) -> str:
    """Let the Hub's client write to one repo as this CI job, without a secret; returns the token it got for that.

    Raises:
        UploadError: the Hub does not trust this job with that repo.
    """
    from merger.stores.hub.store import trusted_publisher

    return trusted_publisher(repo)


def missing_parts(planned: Plan, options: Options, count: int) -> Result | tuple[Part, ...]:
    """Those of `count` parts of which a shard is still to be made; the result where the model itself is there already.

    Raises:
        UploadError: the destination refuses what would be made.
    """
    session = place_of(destination(planned.locked.recipe, options), options, planned.locked).open(
        planned.identity, shared=True
    )
    if isinstance(session, Published):
        return _found_result(planned, session)
    try:
        held = session.held()
    finally:
        session.leave()
    parts = (Part(number, count) for number in range(1, count + 1))
    return tuple(
        part for part in parts if any(name not in held for shard in share(planned.shards, part) for name in shard.files)
    )


def _found_result(planned: Plan, published: Published) -> Result:
    return Result(published.where, published.commit, (), len(planned.files), plan=planned.hash)


def merge(
    planned: Plan, store: Library, options: Options, on_event: Observer = ignore, found: SearchFacts | None = None
) -> Result:
    """Make what was planned and put it where it belongs.

    Shards that an earlier run finished are not made again, and a model that is there already is not published again.

    Args:
        options: what it may use, and where it goes.
        on_event: is told what happens on the way.
        found: what a search has found of which the card is to tell.

    Raises:
        MergerError: any kind; the destination is then as it was before, and finished shards wait for another run.
    """
    began = time.monotonic()
    if (searched := planned.locked.recipe.search) is not None:
        hint = "merger search finds its numbers, and merges the best with --to DEST"
        raise RecipeError(Problem("this recipe leaves numbers open", searched.at, "search", hint))
    place = place_of(destination(planned.locked.recipe, options), options, planned.locked)
    session = place.open(planned.identity, shared=options.part is not None)
    if isinstance(session, Published):
        on_event(Ready())
        return _found_result(planned, session)
    try:
        on_event(Ready())
        result = _Run(planned, store, options, place, session, on_event, found).result()
    except BaseException:
        with suppress(MergerError):  # what went wrong first is what is told
            session.leave()
        raise
    session.leave()
    return replace(result, plan=planned.hash, seconds=time.monotonic() - began)


@dataclass
class _Run:
    """The making of a plan's shards, or a part of them, and its end.

    Args:
        planned, store, options, on_event, found: as `merge` takes them.
        place: where it goes.
        session: the work there.
    """

    planned: Plan
    store: Library
    options: Options
    place: Destination
    session: Session
    on_event: Observer
    found: SearchFacts | None
    seen: dict[str, Geometry] = field(default_factory=dict)
    doubts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.recipe, self.held = self.planned.locked.recipe, dict(self.session.held())

    def result(self) -> Result:
        planned, options = self.planned, self.options
        mine = share(planned.shards, options.part)
        missing = [shard for shard in mine if not shard.files.keys() <= self.held.keys()]
        if self.held:
            self.on_event(Resumed(len(planned.shards) - len(missing), len(planned.shards)))
        if missing and options.publish_only:
            raise _unfinished_error(missing, planned)
        if problems := other_statistics(planned.locked, methods(), self.store.checksum):
            raise MismatchError(problems)
        self.session.reserve(needed_disk(planned, options, missing))
        wanted = None if options.part else prepare_measuring(planned, options.device, options.read_token, options.root)
        if missing:
            self.place.check_card(render(planned, methods(), self.place.name))
            self._make(missing)
        shards = tuple(self.held[name] for shard in mine for name in shard.files)
        if options.part is not None:
            to, doubts = destination(self.recipe, options), tuple(self.doubts)
            return Result(to, None, shards, len(planned.files), options.part, doubts)
        if len(missing) < len(planned.shards):  # what earlier runs saw of the shards that they made
            for note in self.session.notes():
                self.seen |= load_geometry(note)
        files = used_files(planned, self.store) if wanted else {}
        scores = measure(wanted, planned, files, self.store, self.session, self.on_event) if wanted else ()
        return self._publish(shards, scores)

    def _make(self, missing: Sequence[Shard]) -> None:
        # imports numba, which all else does without
        from merger.engine.execute import Doubted, Observed, ShardDone, execute

        made = list[str]()
        if self.options.part is None:  # the end draws: what is imported while compiled loops compute costs nothing
            threading.Thread(target=import_drawing, daemon=True).start()
        try:
            for event in execute(self.planned, missing, methods(), self.store, self.session, self.options.device):
                if isinstance(event, ShardDone):
                    self.held[event.shard.name] = event.shard
                    made.append(event.shard.name)
                elif isinstance(event, Observed):
                    self.seen[event.job.name] = event.geometry
                elif isinstance(event, Doubted):
                    self.doubts.append(event.what)
                self.on_event(event)
        except DamagedError as error:
            _forget(self.session, made, error)
            raise

    def _publish(self, shards: tuple[WrittenShard, ...], scores: tuple[Score, ...]) -> Result:
        planned = self.planned
        seen = {job.name: self.seen[job.name] for job in planned.jobs if job.name in self.seen}  # in the plan's order
        ancestors = elders(planned, to_hub(self.recipe, self.options))
        written = card(planned, self.place.name, seen, self.store, ancestors, scores, found=self.found)
        related = written.related
        small = small_files(planned, self.store, shards, seen)
        published = self.session.finish({**written.files, **small}, _title(planned))
        doubts = (*related.doubts, *self.doubts, *exposed_models(planned, destination(self.recipe, self.options)))
        return Result(
            published.where,
            published.commit,
            shards,
            len(shards),
            doubts=doubts,
            losses=related.losses,
            card=written.text,
            lock=bytes_of(small[LOCK_NAME]).decode(),
        )


def _title(planned: Plan) -> str:
    lora, names = planned.locked.recipe.lora, ", ".join(dict.fromkeys(each.name for each in planned.locked.merged))
    if lora and lora.extracted:
        return f"LoRA adapter of {planned.locked.models[0].name}"
    return f"{'GGUF' if planned.locked.recipe.is_conversion else 'Merge'} of {names}"


def _forget(session: Session, made: Sequence[str], why: DamagedError) -> None:
    """What was made of damaged bytes must not be what another run goes on from."""
    try:
        session.forget(made)
    except MergerError as error:
        raise DamagedError([*why.problems, *error.problems]) from None


def _unfinished_error(missing: Sequence[Shard], planned: Plan) -> UploadError:
    names = ", ".join(shard.name for shard in missing[:3]) + (", ..." if len(missing) > 3 else "")
    what = f"{len(missing)} of {len(planned.shards)} shards are not there yet: {names}"
    return UploadError(Problem(what, hint="run the parts that make them, with the same recipe, seed and --shard-size"))


def leftovers(to: str) -> list[Leftover]:
    """What runs that did not finish left at a destination.

    Raises:
        MissingError: nothing is there, neither a result nor what a run left.
        UploadError: the destination cannot be asked.
    """
    found = place_of(to, Options()).leftovers()
    if not found and hub_path(parse_destination(to)) is None and not os.path.lexists(os.path.expanduser(to)):
        what = f"there is no folder {to!r}, nor a run that was to make it"
        raise MissingError(Problem(what, hint="paths are relative to the working directory; a repo starts with hf://"))
    return found


def clean(to: str, leftover: Leftover) -> None:
    """Remove one of them, and nothing else.

    Raises:
        UploadError: a run is at work there, or we may not write.
    """
    place_of(to, Options()).clean(leftover)


def place_of(to: str, options: Options, locked: LockedRecipe | None = None) -> Destination:
    """What is at a destination: a folder, or a repo on the Hub.

    Args:
        options: how it is written, and with which token.
        locked: the recipe of what shall be there; None: nothing is made.

    Raises:
        RecipeError: a place on the Hub that cannot be called so, or a word that may be a folder or a repo.
    """
    to = parse_destination(to)
    repo = hub_path(to)
    if repo is None:
        models = () if locked is None else locked.models
        parents = [Path(model.located.where) for model in models if model.located.commit is None]
        return ResultFolder(Path(to), options.force, parents)
    from merger.stores.hub.staging import HubRepo

    publish = Publish() if locked is None else locked.recipe.publish
    as_pull = publish.create_pr or options.create_pr
    return HubRepo(repo, publish.private, options.force, as_pull, options.stream, options.write_token)
