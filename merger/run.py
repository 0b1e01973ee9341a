"""The line, wired: check, plan and run, for every shell that wants a merge made. Not here: how anything is shown."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from merger import machine
from merger.card.ancestors import family
from merger.card.layers import parameters, tracks
from merger.card.licences import refuse
from merger.card.lineage import lock_file
from merger.card.notices import passed_on
from merger.card.plots import movement_plot, settings_plot
from merger.card.portrait import portrait
from merger.card.relations import Loss, Relations, relations
from merger.card.render import rehearse, render
from merger.card.scores import told
from merger.checkpoints.checkpoint import SUFFIX, index_name
from merger.checkpoints.shard import Written, index
from merger.checkpoints.sidefiles import CARD_NAME, EVALUATED_NAME, LOCK_NAME, MEASURED_NAME
from merger.errors import (
    BudgetError,
    DamagedError,
    MergerError,
    ModelError,
    Problem,
    RecipeError,
    UploadError,
    VerificationError,
)
from merger.evaluation import Measured, Measuring, carried_out, check, check_memory, prepared
from merger.evaluation import disk as evaluation_disk
from merger.locate import HUB, stores
from merger.methods.registry import methods
from merger.plan.geometry import Geometry, noted, recalled
from merger.plan.lock import lock, pins
from merger.plan.locked import LockedRecipe
from merger.plan.lockfile import Lock, changed_models, other_plan, read_lock
from merger.plan.parts import Part as Part  # shells name it without knowing where it lives
from merger.plan.parts import share
from merger.plan.plan import SHARD_BYTES, Budget, Plan, Shard
from merger.plan.plan import plan as make_plan
from merger.plan.scores import Score, kept
from merger.plan.templates import own_templates
from merger.recipe.model import Recipe
from merger.recipe.parse import parse
from merger.stores.folder import FolderSink
from merger.stores.library import Library
from merger.stores.ports import FileInfo, Leftover, Published, Sink, Store

if TYPE_CHECKING:
    from merger.engine.evaluate import Wanted
    from merger.engine.execute import Event

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
        create_pr: open a pull request on it, whatever the recipe says.
        part: make this share of the shards, and leave the end to `publish_only`.
        publish_only: make no shard; all must be there.
        stream: send shards to the Hub as they are made, without a file on disk.
        allow_pickle: look for tensors in files that torch.save wrote, of models without safetensors; nothing is run.
        cache: read files of models where Hugging Face's cache on this disk has them.
        hub_only: a model is a repo on the Hub, even where this machine has a folder of its name.
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
    create_pr: bool = False
    part: Part | None = None
    publish_only: bool = False
    stream: bool = False
    allow_pickle: bool = False
    cache: bool = True
    hub_only: bool = False
    read_token: str | bool | None = field(default=None, repr=False)
    write_token: str | None = field(default=None, repr=False)


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

    `doubts` are sentences that say why it may mean little; `losses` what an adapter leaves out; `card` and `lock` are
    those files where this run wrote them.
    """

    published: Published
    shards: tuple[Written, ...]
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


def read(path: Path) -> Recipe:
    """Read a recipe's file, or the recipe in a lock file, and check all that can be known without its models.

    Raises:
        RecipeError: with every problem of the file.
    """
    text = _text(path)
    if is_lock(path):
        return recipe_of(read_lock(text, str(path)), str(path))
    return read_text(text, str(path))


def read_text(text: str, name: str) -> Recipe:
    """The same for a recipe that stands in no file; positions in errors begin with `name`.

    Raises:
        RecipeError: with every problem of the text.
    """
    return parse(text, name, methods())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecipeError(Problem(f"{path}: cannot be read ({why})")) from None


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


def is_lock(path: Path) -> bool:
    """Whether a file is a lock file, by its name."""
    return path.name.endswith(LOCK_SUFFIX)


def recipe_of(held: Lock, path: str) -> Recipe:
    """The recipe that stands in a lock file; its positions count from the recipe's own first line.

    Raises:
        RecipeError: with every problem of the recipe.
    """
    return replace(parse(held.recipe, f"{path} (recipe)", methods()), path=path)


def plan(recipe: Recipe, options: Options) -> tuple[Plan, Library]:
    """Pin the recipe's models and decide what will be made; no tensor's byte is read.

    A lock file beside the recipe, of mine.yaml mine.lock.yaml, says at which commits. A recipe that was read from a
    lock file is planned as it was then, or refused.

    Raises:
        ModelError, RecipeError, MismatchError, BudgetError, VerificationError: as the steps do.
    """
    check(recipe)
    template = recipe.publish.template or ""
    paths = [*(ref.path for ref in recipe.references), *([template] if template.startswith(HUB) else [])]
    store = stores(paths, options.cache, options.read_token, options.hub_only)
    path = Path(recipe.path)
    if is_lock(path) and path.is_file():
        # the card's templates of who made the lock lie on another machine, unless they are on the Hub
        recipe = recipe if template.startswith(HUB) else replace(recipe, publish=replace(recipe.publish, template=None))
        planned = _planned_as_locked(read_lock(_text(path), recipe.path), recipe, store, options)
    else:
        locked = lock(recipe, store, _pins(lock_path(path)), options.allow_pickle)
        planned = make_plan(locked, methods(), _budget(recipe, options), options.seed)
    refuse(planned, published=_to(recipe, options).startswith(HUB))
    if options.part is None:
        check_memory(planned, options.max_memory)
    return with_templates(planned, store), store


def with_templates(planned: Plan, store: Store) -> Plan:
    """The plan with the recipe's own templates for the card, which are tried."""
    templates = own_templates(planned.locked.recipe.publish, store)
    tried = replace(planned, locked=replace(planned.locked, templates=templates))
    rehearse(tried, methods())
    return tried


def _planned_as_locked(held: Lock, recipe: Recipe, store: Library, options: Options) -> Plan:
    for word, said, was in (("seed", options.seed, held.seed), ("shard-size", options.shard_size, held.shard_bytes)):
        if said not in (None, was):
            what = f"--{word} {said} makes another merge than the lock's, which has {was}"
            raise RecipeError(Problem(what, hint=f"leave out --{word}, or run the recipe in place of its lock"))
    locked = lock(recipe, store, held.pins, options.allow_pickle)
    if changed := changed_models(locked, held, store.checksum):
        raise ModelError(changed)
    planned = planned_again(held, locked, options)
    if other := other_plan(planned, held):
        raise VerificationError(other)
    return planned


def planned_again(held: Lock, locked: LockedRecipe, options: Options) -> Plan:
    """The plan of a lock's recipe, with the lock's seed and shard size.

    Raises:
        RecipeError, MismatchError, BudgetError: as the plan does.
    """
    budget = replace(_budget(locked.recipe, options), shard_bytes=held.shard_bytes)
    return make_plan(locked, methods(), budget, held.seed)


def _budget(recipe: Recipe, options: Options) -> Budget:
    return Budget(
        memory=options.max_memory,
        threads=options.threads or machine.cores(),
        shard_bytes=options.shard_size or SHARD_BYTES,
        sending=_sending(_to(recipe, options)),
    )


def lock_path(recipe: Path) -> Path:
    """Where the lock file of a recipe lies, if it has one."""
    return recipe.with_suffix(LOCK_SUFFIX)


def _pins(path: Path) -> dict[str, str]:
    return pins(path.read_text(encoding="utf-8", errors="replace"), str(path)) if path.is_file() else {}


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
    needed = needed if options.part else max(needed, evaluation_disk(planned, staged))
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
) -> Iterator[Event | Resumed | Measuring | Measured | Done | PartDone]:
    """Make what was planned and put it where it belongs; the last event is `Done`, of a part `PartDone`.

    Shards that an earlier run finished are not made again, and a model that is there already is not published again.

    Raises:
        MergerError: any kind; the destination is then as it was before, and finished shards wait for another run.
    """
    sink = _sink(planned.locked.recipe, options, planned.locked)
    try:
        with ThreadPoolExecutor(1) as meanwhile:  # the Hub's answers and torch's import take a second or two each
            meanwhile.submit(warm)
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
    wanted = None if options.part else prepared(planned, options.device, options.read_token)
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
    to_hub = destination(planned.locked.recipe, options).startswith(HUB)
    written = card_files(planned, sink.name, seen, store, elders(planned, to_hub, options.read_token), scores)
    files = written | _small_files(planned, store, shards, seen)
    published = sink.finish(files, _title(planned))
    doubts = (*related.doubts, *doubts)
    texts = files[CARD_NAME].decode(), files[LOCK_NAME].decode()
    yield Done(published, shards, doubts, related.losses, *texts)


def _title(planned: Plan) -> str:
    """The commit's first line."""
    lora, names = planned.locked.recipe.lora, ", ".join(model.name for model in planned.locked.merged)
    return f"LoRA adapter of {planned.locked.models[0].name}" if lora and lora.extracted else f"Merge of {names}"


def _scored(
    wanted: Wanted, planned: Plan, store: Library, sink: Sink
) -> Generator[Measuring | Measured, None, tuple[Score, ...]]:
    """What is measured of the result before it is published."""
    found: tuple[Score, ...] = ()
    for event in carried_out(wanted, planned, _used_files(planned, store), store, sink):
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
    held: dict[str, Written],
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
        UploadError: the destination cannot be asked.
    """
    return destination_sink(to).leftovers()


def clean(to: str, leftover: Leftover) -> None:
    """Remove one of them, and nothing else.

    Raises:
        UploadError: a run is at work there, or we may not write.
    """
    destination_sink(to).clean(leftover)


def destination_sink(to: str, token: str | None = None) -> Sink:
    """What is at a destination, for all but making a merge there."""
    if not to.startswith(HUB):
        return FolderSink(Path(to))
    from merger.stores.staging import HubSink

    return HubSink(to.removeprefix(HUB), token=token)


def card_files(
    planned: Plan,
    name: str,
    seen: Mapping[str, Geometry],
    store: Store,
    elders: Store | None,
    scores: Sequence[Score] = (),
) -> dict[str, bytes]:
    """The card, its pictures and scores: what can be rendered anew, so that the lock says nothing of it.

    Args:
        planned: what was made.
        name: ``owner/name``, or the folder's last part.
        seen: how parents and result lie to each other, by tensor.
        store: where the parents' cards are.
        elders: where those of their own parents are; None: nowhere.
        scores: what was measured of the merge and its parents.

    Raises:
        RecipeError: the recipe's own template cannot be rendered.
    """
    tree = family(planned, name, methods(), store, elders)
    model = planned.locked.recipe.lora is None
    inforce = parameters(planned, methods()) if model else ()
    moved = tracks(planned, seen) if model else ()
    drawn = [portrait(tree), settings_plot(inforce), movement_plot(moved)]
    pictures = {picture.name: picture for picture in drawn if picture is not None}
    parts = {"lineage": tree.tree(), "pictures": pictures, **told(scores, name)}
    text = render(planned, methods(), name, relations(planned, seen), parts)
    files = {file: content for picture in pictures.values() for file, content in picture.files.items()}
    return {CARD_NAME: text.encode(), **files} | ({EVALUATED_NAME: kept(scores).encode()} if scores else {})


def elders(planned: Plan, to_hub: bool, token: str | bool | None) -> Store | None:
    """Where the parents' own parents are looked up; nowhere, for a merge that has nothing to do with the Hub."""
    if not to_hub and all(model.located.commit is None for model in planned.locked.models):
        return None
    from merger.stores.hub import HubStore

    return HubStore(token)


def _small_files(
    planned: Plan, store: Library, shards: tuple[Written, ...], seen: Mapping[str, Geometry]
) -> dict[str, bytes]:
    """All that stands beside shards and card; index and config come last, for they make it look like a model."""
    proven = {"recipe.yaml": planned.locked.recipe.text.encode(), MEASURED_NAME: noted(seen).encode()}
    proven |= passed_on(planned, store.fetch) | _used_files(planned, store)
    written = {shard.name: FileInfo(shard.size, shard.sha256) for shard in shards}
    written |= {name: FileInfo(len(data), hashlib.sha256(data).hexdigest()) for name, data in proven.items()}
    lock = lock_file(planned, written, store.checksum)
    return {LOCK_NAME: lock.encode(), **proven}


def _used_files(planned: Plan, store: Store) -> dict[str, bytes]:
    """The small files that it takes to use the result."""
    return taken_files(planned, store) | model_files(planned)


def taken_files(planned: Plan, store: Store) -> dict[str, bytes]:
    """The models' small files that the result has, with all that is written into them anew.

    Raises:
        ModelError: one of them cannot be read.
    """
    models = planned.locked.models
    taken = {name: store.fetch(models[number].located, name) for name, number in planned.texts.taken.items()}
    return planned.texts.edited(taken)


def model_files(planned: Plan) -> dict[str, bytes]:
    """The index, where there are several shards, and config.json: all that the plan says of them."""
    files = {}
    if len(planned.shards) > 1:
        weight_map = {job.name: shard.name for shard in planned.shards for job in shard.jobs}
        total = sum(job.nbytes for job in planned.jobs)
        files[index_name(planned.locked.holder.checkpoint.stem + SUFFIX)] = index(
            dict(sorted(weight_map.items())), total
        )
    if planned.config:
        files[planned.config_name] = (json.dumps(planned.config, indent=2) + "\n").encode()
    return files
