"""What a run may use and where it goes, and whether a plan fits into that. Not here: making the plan (planning)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from merger import system
from merger.errors import BudgetError, Problem, RecipeError
from merger.evaluation.evaluate import disk as evaluation_disk
from merger.planning.budget import GGUF_BYTES, SHARD_BYTES, Budget
from merger.planning.plan import Plan
from merger.planning.shards import Part, Shard
from merger.recipe.model import ModelRef, Recipe
from merger.safety import secrets
from merger.safety.limits import ALL_TENSORS, Limit
from merger.safety.names import HUB, hub_path, is_repo, need_repo, parse_repo
from merger.safety.numbers import DOWN, UP, size, typed_size
from merger.safety.paths import ANYWHERE
from merger.stores.ports import Kept

_HEADER_BYTES = 1_000_000


@dataclass(frozen=True)
class Options:
    """What a run may use and where it goes; sizes in bytes, None where the default holds.

    Args:
        to: a folder, or ``hf://owner/name``; None: the recipe's publish.repo.
        max_memory: the most memory the run may take.
        max_disk: the most disk that it may take at once, at the destination or for the work.
        shard_size: the largest size of a shard's tensors.
        gguf: the types of GGUF files that are written beside the others, in place of the recipe's.
        threads: how many threads compute; None: one for each core.
        device: ``cpu`` or ``cuda``.
        seed: in place of the recipe's.
        force: replace a model at the destination.
        create_pr: open a pull request on it, whatever the recipe says.
        part: make this share of the shards, and leave the end to `publish_only`.
        publish_only: make no shard; all must be there.
        stream: send shards to the Hub as they are made, without a file on disk.
        allow_pickle: look for tensors in files that torch.save wrote, of models without safetensors; nothing is run.
        tensors: how many tensors the headers of all models together may tell of.
        cache: read files of models where Hugging Face's cache on this disk has them.
        root: inside of which lies what the recipe may name on this machine, by whose words it is: `ANYWHERE` for a
            person's own command line, a checkout for a recipe out of it; None: nothing, all is on the Hub.
        measured: what of a recipe's statistics is measured on the way; of no others it is done.
        read_token: for the models; None: the environment's, False: none.
        write_token: for the destination; None: the environment's.
    """

    to: str | None = None
    max_memory: int | None = None
    max_disk: int | None = None
    shard_size: int | None = None
    gguf: tuple[str, ...] = ()
    threads: int | None = None
    device: str = "cpu"
    seed: int | None = None
    force: bool = False
    create_pr: bool = False
    part: Part | None = None
    publish_only: bool = False
    stream: bool = False
    allow_pickle: bool = False
    tensors: Limit = ALL_TENSORS
    cache: bool = True
    root: Path | None = ANYWHERE
    measured: Mapping[ModelRef, Kept] = field(default_factory=dict, repr=False)
    read_token: str | bool | None = field(default=None, repr=False)
    write_token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        secrets.hold(self, self.read_token, self.write_token)


def budget_of(recipe: Recipe, options: Options) -> Budget:
    return Budget(
        memory=options.max_memory,
        threads=options.threads or system.cores(),
        shard_bytes=options.shard_size or (SHARD_BYTES if recipe.publish.safetensors else GGUF_BYTES),
        sending=_sending(stated_destination(recipe, options)),
    )


def _sending(to: str) -> int:
    """Bytes of memory that it may take to send shards there."""
    if hub_path(to) is None:
        return 0
    from merger.stores.hub.uploads import upload_memory

    return upload_memory()


def with_free_memory(options: Options) -> Options:
    """The options with this machine's memory where none is given: for what is to run here."""
    return options if options.max_memory is not None else replace(options, max_memory=system.free_memory())


def needed_disk(planned: Plan, options: Options, shards: Sequence[Shard]) -> int:
    """The bytes of disk it takes to make these shards and bring them to the destination.

    Raises:
        BudgetError: more than the options allow.
    """
    staged = to_hub(planned.locked.recipe, options)
    needed = planned.spool if options.stream else planned.disk(staged, shards)
    needed = needed if options.part else max(needed, evaluation_disk(planned, staged))
    if options.max_disk is not None and needed > options.max_disk:
        what = f"this merge needs {size(needed, UP)} of disk at once, and {size(options.max_disk, DOWN)} are allowed"
        raise BudgetError(Problem(what, hint=_smaller(planned, needed, options, staged)))
    return needed


def _smaller(planned: Plan, needed: int, options: Options, staged: bool) -> str:
    """The option that makes it fit, if there is one."""
    allowed = options.max_disk or 0
    if options.stream:
        return f"raise --max-disk to {typed_size(needed, UP)}"
    if not staged:
        return "raise --max-disk, or publish to hf://owner/name: there a file is gone once it is uploaded"
    largest = max(job.nbytes for job in planned.jobs)
    fitting = (allowed - planned.spool) // 2 - _HEADER_BYTES
    if fitting < largest:
        least = 2 * (largest + _HEADER_BYTES) + planned.spool
        return f"raise --max-disk to {typed_size(least, UP)}: the largest tensor has {size(largest)}; or use --stream"
    return f"--shard-size {typed_size(fitting, DOWN)} makes it fit"


def destination(recipe: Recipe, options: Options) -> str:
    """Where the result goes: as the options say, else as the recipe does.

    Raises:
        RecipeError: neither says it, it is no name on the Hub, or a folder shall take a stream.
    """
    to = stated_destination(recipe, options)
    if not to:
        hint = "give --to FOLDER or --to hf://owner/name, or write publish: {repo: owner/name} into the recipe"
        raise RecipeError(Problem(f"{recipe.path}: where shall the result go?", hint=hint))
    if options.stream and hub_path(to) is None:
        raise RecipeError(Problem(f"--stream is for the Hub, and {to!r} is a folder", hint="leave out --stream"))
    return to


def to_hub(recipe: Recipe, options: Options) -> bool:
    """Whether the result goes onto the Hub.

    Raises:
        RecipeError: see `destination`.
    """
    return hub_path(destination(recipe, options)) is not None


def stated_destination(recipe: Recipe, options: Options) -> str:
    """Where the result goes, if anything says it.

    Raises:
        RecipeError: as `parse_destination` does.
    """
    if options.to is not None:
        return parse_destination(options.to)
    return "" if recipe.publish.repo is None else HUB + recipe.publish.repo


def parse_destination(to: str) -> str:
    """Where somebody's word for a destination leads: a folder, or ``hf://owner/name``.

    Raises:
        RecipeError: a place on the Hub that cannot be called so, or a word that may be a folder or a repo.
    """
    name = parse_repo(to)
    if name != to:
        need_repo(name)
        return HUB + name
    if is_repo(to) and not os.path.isdir(os.path.dirname(to)):
        what = f"{to!r} may be a folder here or a repo on the Hub"
        raise RecipeError(Problem(what, hint=f"write ./{to} for the folder, hf://{to} for the repo"))
    return to
