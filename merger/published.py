"""A merge that lies in a folder or on the Hub: its lock, its files and their headers, against what its lock promises.

Not here: the comparison of tensors (verify), and models that are no merges of ours (locate).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from merger.beside import model_files
from merger.checkpoints.checkpoint import TensorInfo
from merger.checkpoints.shard import header
from merger.checkpoints.sidefiles import LOCK_NAME
from merger.errors import ModelError, Problem, RecipeError, VerificationError, few
from merger.locate import find
from merger.plan.lock import tensors_in
from merger.plan.lockfile import Lock, read_lock
from merger.plan.plan import Plan, Shard
from merger.planning import recipe_of
from merger.recipe.model import Recipe
from merger.safety.limits import MODEL_TENSORS, Tally
from merger.stores.content import sha256_of, size_of
from merger.stores.library import Library
from merger.stores.ports import Content, FileInfo, Located

_REQUESTS_AT_ONCE = 8
_CHANGED = "it was changed after the merge was made"


@dataclass(frozen=True)
class Merge:
    """A merge as it was found.

    Args:
        store: reads it.
        located: where it is, at which commit, with which files.
        held: its lock.
        recipe: the recipe in its lock.
    """

    store: Library
    located: Located
    held: Lock
    recipe: Recipe


def open_merge(target: str, token: str | bool | None) -> Merge:
    """Find a merge and read its lock.

    Args:
        target: a folder, or ``owner/name[@revision]`` on the Hub, with or without ``hf://``.
        token: the reader's token; None takes the environment's, False none.

    Raises:
        ModelError: it cannot be read.
        VerificationError: it has no lock, or one that says nothing.
    """
    store, located = find(target, token)
    info = located.files.get(LOCK_NAME)
    if info is None:
        hint = "only a merge of ours is known to be one: by the lock file that was left beside it"
        raise VerificationError(Problem(f"{located.name} holds no {LOCK_NAME}", hint=hint))
    try:
        held = read_lock(store.fetch(located, LOCK_NAME).decode("utf-8", "replace"), f"{located.name}/{LOCK_NAME}")
        return Merge(store, located, held, recipe_of(held, LOCK_NAME))
    except RecipeError as error:
        raise VerificationError(error.problems) from None


# ---- files ----------------------------------------------------------------------------------------------------------


def other_files(merge: Merge, everything: bool) -> dict[str, Problem]:
    """The files that are not those of the lock, by size and, where the Hub tells it, SHA-256; each with a sentence.

    Args:
        merge: the merge.
        everything: read files whose SHA-256 is not told.
    """
    found = {name: _wrong(merge, name, info, everything) for name, info in merge.held.output.items()}
    return {name: Problem(f"{name} {what}", hint=_CHANGED) for name, what in found.items() if what}


def _wrong(merge: Merge, name: str, info: FileInfo, everything: bool) -> str | None:
    found = merge.located.files.get(name)
    if found is None:
        return "is missing"
    if found.size != info.size:
        return f"has {found.size:,} bytes, the lock says {info.size:,}"
    sha256 = merge.store.checksum(merge.located, name) if everything else found.sha256
    if None in (sha256, info.sha256) or sha256 == info.sha256:
        return None
    return f"is another file: its SHA-256 is {sha256}, the lock says {info.sha256}"


def other_contents(
    merge: Merge, planned: Plan, side: Mapping[str, Content], others: Collection[str]
) -> Iterator[Problem]:
    """Files that the plan makes and the lock does not list, files of tensors beside those, and small files changed.

    Args:
        merge: the merge.
        planned: its plan.
        side: what the files taken from its models have to be, as far as they are compared.
        others: files that are known not to be the lock's.
    """
    located, shards = merge.located, [shard.name for shard in planned.shards]
    made: dict[str, Content] = {**model_files(planned), "recipe.yaml": merge.held.recipe.encode(), **side}
    if unlocked := [name for name in (*shards, *made) if name not in merge.held.output]:
        yield Problem(f"the lock says nothing of {few(unlocked)}", hint="was it changed after the merge was made?")
    if stray := [name for name in located.files if name.endswith(".safetensors") and name not in shards]:
        yield Problem(f"{few(stray)} is no file of this merge", hint="loaders may take its tensors for the merge's")
    for name, content in made.items():
        info = None if name in others else located.files.get(name)
        if info is not None and not holds(merge, name, content):
            yield Problem(f"{name} is not what the lock's recipe makes", hint=_CHANGED)


def holds(merge: Merge, name: str, content: Content) -> bool:
    """Whether this is what the merge's file of that name holds."""
    info = merge.located.files.get(name)
    same_size = info is not None and info.size == size_of(content)
    return same_size and merge.store.checksum(merge.located, name) == sha256_of(content)


def other_taken(merge: Merge, planned: Plan) -> Iterator[Problem]:
    """Small files that are not those of the model that they were taken from, where git's names of both tell it."""
    if planned.texts.is_edited:
        return
    for name, number in planned.texts.taken.items():
        model = planned.locked.models[number]
        here, there = merge.located.files.get(name), model.located.files[name]
        told = here is not None and None not in (here.oid, there.oid) and here.sha256 is there.sha256 is None
        if here is not None and told and here.oid != there.oid:
            yield Problem(f"{name} is not the file that was taken from {model.name}", hint=_CHANGED)


# ---- headers --------------------------------------------------------------------------------------------------------


def comparable(merge: Merge, planned: Plan) -> tuple[dict[str, TensorInfo], list[Problem]]:
    """The published tensors that have the plan's names, dtypes and shapes; and what is wrong with the others."""
    problems: list[Problem] = []
    files = [shard.name for shard in planned.shards if shard.name in merge.located.files]
    tally = Tally(MODEL_TENSORS)
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        headers = list(pool.map(partial(_header, merge, problems, tally), files))
    found = {tensor.name: tensor for tensor in (tensor for part in headers for tensor in part)}
    wanted = {tensor.name: tensor for shard in planned.shards for tensor in _promised(shard)}
    same = {name: tensor for name, tensor in found.items() if name in wanted and _is_like(tensor, wanted[name])}
    return same, [*problems, *_other_tensors(found, wanted, same)]


def _header(merge: Merge, problems: list[Problem], tally: Tally, file: str) -> tuple[TensorInfo, ...]:
    try:
        return tensors_in(merge.located, merge.store, file, tally)
    except ModelError as error:
        problems.extend(error.problems)
        return ()


def _promised(shard: Shard) -> Iterator[TensorInfo]:
    """The shard's tensors as its header has them."""
    place = len(header(shard.jobs))
    for job in shard.jobs:
        yield TensorInfo(job.name, job.dtype, job.shape, shard.name, place, place + job.nbytes)
        place += job.nbytes


def _is_like(one: TensorInfo, other: TensorInfo) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape)


def _other_tensors(
    found: Mapping[str, TensorInfo], wanted: Mapping[str, TensorInfo], same: Mapping[str, TensorInfo]
) -> Iterator[Problem]:
    groups = {
        "missing": [name for name in wanted if name not in found],
        "there that the recipe does not make": [name for name in found if name not in wanted],
        "of another dtype or shape than the recipe makes": [
            name for name in found if name in wanted and name not in same
        ],
        "in another place than the plan's": [name for name, tensor in same.items() if tensor != wanted[name]],
    }
    for what, names in groups.items():
        if names:
            yield Problem(f"{len(names)} of the tensors are {what}: {few(names)}", hint=_CHANGED)
