"""The line, wired: check, plan and run, for every shell that wants a merge made. Not here: how anything is shown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from merger import machine
from merger.card.lineage import lock_file
from merger.card.relations import Loss, Relations, relations
from merger.card.render import render
from merger.checkpoints.shard import Written, index
from merger.checkpoints.sidefiles import LOCK_NAME
from merger.errors import BudgetError, DamagedError, MergerError, Problem, RecipeError, UploadError
from merger.methods.registry import methods
from merger.plan.geometry import Geometry, recalled
from merger.plan.lock import LockedRecipe, lock, pins
from merger.plan.parts import Part as Part  # shells name it without knowing where it lives
from merger.plan.parts import share
from merger.plan.plan import SHARD_BYTES, Budget, Plan, Shard
from merger.plan.plan import plan as make_plan
from merger.recipe.model import Recipe
from merger.recipe.parse import parse
from merger.stores.folder import FolderSink, FolderStore
from merger.stores.library import Library
from merger.stores.ports import Leftover, Published, Sink, Store

if TYPE_CHECKING:
    from merger.engine.execute import Event

HUB = "hf://"
LOCK_SUFFIX = ".lock.yaml"
_HEADER_BYTES = 1_000_000


@dataclass(frozen=True)
class Options:
    """What a run may use and where it goes; sizes in bytes, None where the default holds.

    Args:
        to: a folder, or ``hf://owner/name``; None: the recipe's publish.repo.
        max_memory: the most memory the run may take.
        max_disk: the most disk that it may take at once, at the destination or for the work.
        shard_size: the largest size of a shard's tensors.
        threads: how many threads compute; None: one for each core.
        device: ``cpu`` or ``cuda``.
        seed: in place of the recipe's.
        force: replace a model at the destination.
        part: make this share of the shards, and leave the end to `publish_only`.
        publish_only: make no shard; all must be there.
        stream: send shards to the Hub as they are made, without a file on disk.
        cache: read files of models where Hugging Face's cache on this disk has them.
        read_token: for the models; None: the environment's, False: none.
        write_token: for the destination; None: the environment's.
    """

    to: str | None = None
    max_memory: int | None = None
    max_disk: int | None = None
    shard_size: int | None = None
    threads: int | None = None
    device: str = "cpu"
    seed: int | None = None
    force: bool = False
    part: Part | None = None
    publish_only: bool = False
    stream: bool = False
    cache: bool = True
    read_token: str | bool | None = field(default=None, repr=False)
    write_token: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Resumed:
    """Some of the shards are there already, from an earlier run or another part."""

    shards: int
    of: int


@dataclass(frozen=True)
class PartDone:
    """A part's shards are where all parts put them; `merger publish` makes a model of them once all are there."""

    part: Part
    shards: int
    of: int


@dataclass(frozen=True)
class Done:
    """The merge lies at its destination; without shards where it lay there before this run.

    `doubts` are sentences that say why it may mean little; `losses` what an adapter leaves out; `card` is its card
    where this run wrote one.
    """

    published: Published
    shards: tuple[Written, ...]
    doubts: tuple[str, ...] = ()
    losses: tuple[Loss, ...] = ()
    card: str = field(default="", repr=False)

    @property
    def is_new(self) -> bool:
        """Whether this run put it there."""
        return bool(self.shards)


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


def extraction(settings: Mapping[str, Any], dtype: str | None = None, license: str | None = None) -> Recipe:
    """The recipe that takes what a fine-tune changed, as an adapter of its base.

    Args:
        settings: what stands under ``extract_lora:``; None for what is not given.
        dtype: the adapter's, in place of the fine-tune's.
        license: what the card states.

    Raises:
        RecipeError: with every problem of these settings.
    """
    content: dict[str, Any] = {
        "extract_lora": {key: value for key, value in settings.items() if value not in (None, False)}
    }
    content |= {"dtype": dtype} if dtype else {}
    content |= {"publish": {"license": license}} if license else {}
    return parse(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), "extract-lora", methods())


def plan(recipe: Recipe, options: Options) -> tuple[Plan, Store]:
    """Pin the recipe's models and decide what will be made; no tensor's byte is read.

    A lock file beside the recipe, of mine.yaml mine.lock.yaml, says at which commits.

    Raises:
        ModelError, RecipeError, MismatchError, BudgetError: as the steps do.
    """
    store = Library(_stores(recipe, options))
    locked = lock(recipe, store, _pins(lock_path(Path(recipe.path))))
    budget = Budget(
        memory=options.max_memory,
        threads=options.threads or machine.cores(),
        shard_bytes=options.shard_size or SHARD_BYTES,
        sending=_sending(_to(recipe, options)),
    )
    return make_plan(locked, methods(), budget, options.seed), store


def lock_path(recipe: Path) -> Path:
    """Where the lock file of a recipe lies, if it has one."""
    return recipe.with_suffix(LOCK_SUFFIX)


def _pins(path: Path) -> dict[str, str]:
    return pins(path.read_text(encoding="utf-8", errors="replace"), str(path)) if path.is_file() else {}


def lock_text(planned: Plan, done: Done) -> str:
    """What a lock file beside the recipe has to hold to make this result again."""
    return lock_file(planned, done.shards)


def trusted_publishing(repo: str) -> str:
    """Let the Hub's client write to one repo as this CI job, without a secret; returns the token it got for that.

    Raises:
        UploadError: the Hub does not trust this job with that repo.
    """
    from merger.stores.hub import trusted_publisher

    return trusted_publisher(repo)


def _sending(to: str) -> int:
    """Bytes of memory that it may take to send shards there."""
    if not to.startswith(HUB):
        return 0
    from merger.stores.sending import memory

    return memory()


def fitted(options: Options) -> Options:
    """The options with this machine's memory where none is given: for what is to run here."""
    return options if options.max_memory is not None else replace(options, max_memory=machine.memory())


def needed_disk(planned: Plan, options: Options, shards: Sequence[Shard]) -> int:
    """The bytes of disk it takes to make these shards and bring them to the destination.

    Raises:
        BudgetError: more than the options allow.
    """
    staged = destination(planned.locked.recipe, options).startswith(HUB)
    needed = planned.spool if options.stream else planned.disk(staged, shards)
    if options.max_disk is not None and needed > options.max_disk:
        what = f"this merge needs {needed:,} bytes of disk at once, and {options.max_disk:,} are allowed"
        hint = f"raise --max-disk to {needed:,}" if options.stream else _smaller(planned, options.max_disk, staged)
        raise BudgetError(Problem(what, hint=hint))
    return needed


def _smaller(planned: Plan, allowed: int, staged: bool) -> str:
    """The option that makes it fit, if there is one."""
    if not staged:
        return "raise --max-disk, or publish to hf://owner/name: there a file is gone once it is uploaded"
    largest = max(job.nbytes for job in planned.jobs)
    fitting = (allowed - planned.spool) // 2 - _HEADER_BYTES
    if fitting < largest:
        least = 2 * (largest + _HEADER_BYTES) + planned.spool
        return f"raise --max-disk to {least:,} at least: the largest tensor has {largest:,} bytes; or use --stream"
    return f"--shard-size {fitting} makes it fit"


def _stores(recipe: Recipe, options: Options) -> list[Store]:
    """Folders first. The Hub's client takes a while to import: not for recipes that need no Hub."""
    folders = FolderStore()
    if all(folders.has(ref.path) for ref in (*recipe.models, *recipe.adapters)):
        return [folders]
    from merger.stores.cache import CachedStore
    from merger.stores.hub import HubStore

    hub = HubStore(options.read_token)
    return [folders, CachedStore(hub) if options.cache else hub]


def looked(planned: Plan, store: Store) -> Relations:
    """How the parents relate, by a sample of their tensors that is read now.

    Raises:
        ModelError: bytes of a model cannot be read.
    """
    from merger.engine.look import look  # imports torch

    return relations(planned, dict(look(planned, store)))


def destination(recipe: Recipe, options: Options) -> str:
    """Where the result goes: as the options say, else as the recipe does.

    Raises:
        RecipeError: neither says it, or a folder shall take a stream.
    """
    to = _to(recipe, options)
    if not to:
        hint = "give --to FOLDER or --to hf://owner/name, or write publish: {repo: owner/name} into the recipe"
        raise RecipeError(Problem(f"{recipe.path}: where shall the result go?", hint=hint))
    if options.stream and not to.startswith(HUB):
        raise RecipeError(Problem(f"--stream is for the Hub, and {to!r} is a folder", hint="leave out --stream"))
    return to


def _to(recipe: Recipe, options: Options) -> str:
    """Where the result goes, if anything says it."""
    if options.to is not None:
        return options.to
    return "" if recipe.publish.repo is None else HUB + recipe.publish.repo


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
        publish.create_pr,
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


def run(planned: Plan, store: Store, options: Options) -> Iterator[Event | Resumed | Done | PartDone]:
    """Make what was planned and put it where it belongs; the last event is `Done`, of a part `PartDone`.

    Shards that an earlier run finished are not made again, and a model that is there already is not published again.

    Raises:
        MergerError: any kind; the destination is then as it was before, and finished shards wait for another run.
    """
    sink = _sink(planned.locked.recipe, options, planned.locked)
    try:
        found = sink.prepare(planned.identity, shared=options.part is not None)
        if found is None:
            yield from _made(planned, store, sink, options)
        else:
            yield Done(found, ())
    except BaseException:
        with suppress(MergerError):  # what went wrong first is what is told
            sink.leave()
        raise
    sink.leave()


def _made(planned: Plan, store: Store, sink: Sink, options: Options) -> Iterator[Event | Resumed | Done | PartDone]:
    """The shards that are missing, and the end: of a part, or of the whole."""
    held, seen = dict(sink.held()), dict[str, Geometry]()
    mine = share(planned.shards, options.part)
    missing = [shard for shard in mine if shard.name not in held]
    if held:
        yield Resumed(len(planned.shards) - len(missing), len(planned.shards))
    if missing and options.publish_only:
        raise _unfinished(missing, planned)
    sink.reserve(needed_disk(planned, options, missing))
    if missing:
        sink.check_card(_card(planned, sink, relations(planned, seen)))
        yield from _shards_made(planned, missing, store, sink, options, held, seen)
    if options.part is not None:
        yield PartDone(options.part, len(mine), len(planned.shards))
        return
    shards = tuple(held[shard.name] for shard in planned.shards)
    for note in sink.notes() if len(missing) < len(planned.shards) else ():
        seen |= recalled(note)
    related = relations(planned, seen)
    files = _small_files(planned, store, _card(planned, sink, related), shards)
    published = sink.finish(files, _title(planned))
    yield Done(published, shards, related.doubts, related.losses, files["README.md"].decode())


def _title(planned: Plan) -> str:
    """The commit's first line."""
    lora, names = planned.locked.recipe.lora, ", ".join(model.name for model in planned.locked.merged)
    return f"LoRA adapter of {planned.locked.models[0].name}" if lora and lora.extracted else f"Merge of {names}"


def _shards_made(
    planned: Plan,
    missing: Sequence[Shard],
    store: Store,
    sink: Sink,
    options: Options,
    held: dict[str, Written],
    seen: dict[str, Geometry],
) -> Iterator[Event]:
    from merger.engine.execute import Observed, ShardDone, execute  # imports torch, which all else does without

    made: list[str] = []
    try:
        for event in execute(planned, missing, methods(), store, sink, options.device):
            if isinstance(event, ShardDone):
                held[event.shard.name] = event.shard
                made.append(event.shard.name)
            elif isinstance(event, Observed):
                seen[event.job.name] = event.geometry
            yield event
    except DamagedError as error:
        _forget(sink, made, error)
        raise


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
        UploadError: the destination cannot be asked.
    """
    return _destination_sink(to).leftovers()


def clean(to: str, leftover: Leftover) -> None:
    """Remove one of them, and nothing else.

    Raises:
        UploadError: a run is at work there, or we may not write.
    """
    _destination_sink(to).clean(leftover)


def _destination_sink(to: str) -> Sink:
    if not to.startswith(HUB):
        return FolderSink(Path(to))
    from merger.stores.staging import HubSink

    return HubSink(to.removeprefix(HUB))


def _card(planned: Plan, sink: Sink, related: Relations) -> str:
    return render(planned, methods(), sink.name, related)


def _small_files(planned: Plan, store: Store, card: str, shards: tuple[Written, ...]) -> dict[str, bytes]:
    """All that stands beside the shards; index and config come last, for they make it look like a model."""
    donor = planned.locked.donor
    files = {side: store.fetch(donor.located, side) for side in planned.side_files}
    files["README.md"] = card.encode()
    files["recipe.yaml"] = planned.locked.recipe.text.encode()
    files[LOCK_NAME] = lock_file(planned, shards).encode()
    if len(planned.shards) > 1:
        weight_map = {job.name: shard.name for shard in planned.shards for job in shard.jobs}
        total = sum(job.nbytes for job in planned.jobs)
        files["model.safetensors.index.json"] = index(dict(sorted(weight_map.items())), total)
    files[planned.config_name] = (json.dumps(planned.config, indent=2) + "\n").encode()
    return files
