"""A merge that lies in a folder or on the Hub: its lock, all files and their headers, against what its lock promises.

Not here: the comparison of tensors (verify), and models that are no merges of ours (stores.resolve).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TypeVar

from merger.errors import MergerError, ModelError, Problem, RecipeError, VerificationError, few
from merger.evaluation.budget import read_scores
from merger.lock.parents import other_content
from merger.lock.read import REQUESTS_AT_ONCE, tensors_in
from merger.models.checkpoint import TensorInfo
from merger.models.side_files import (
    CARD_NAME,
    EVALUATED_NAME,
    HUB_SCORES_NAME,
    LOCK_NAME,
    MEASURED_NAME,
    PICTURES,
    SEARCHED_NAME,
    TRIALS_NAME,
    loaded_as,
    since_later,
)
from merger.planning.geometry import load_geometry
from merger.planning.lockfile import Lock, read_lock
from merger.planning.plan import Plan
from merger.planning.shards import Shard
from merger.recipe.model import Recipe
from merger.run.artifacts import Card, card, elders
from merger.run.found import read_found
from merger.run.prepare import kept_of, recipe_of
from merger.safety.limits import MODEL_TENSORS, Tally
from merger.safety.names import is_repo
from merger.safety.paths import ANYWHERE
from merger.stores.folder import tree
from merger.stores.ports import Content, FileInfo, Located, sha256_of, size_of
from merger.stores.resolve import Library, find

_Measured = TypeVar("_Measured")
_SMALL = 64 << 20
"""Files of up to so many bytes that are no shards are always compared by their checksum; larger ones with --all."""

_CHANGED = "it was changed after the merge was made"
_OURS = (CARD_NAME, LOCK_NAME, EVALUATED_NAME, HUB_SCORES_NAME, SEARCHED_NAME, TRIALS_NAME, ".gitattributes")
_GITS_OR_THE_CLIENTS = (".git/", ".cache/huggingface/")
"""In a folder that was cloned or downloaded; no part of what was published."""


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

    @property
    def root(self) -> Path | None:
        """How far its lock's words reach (safety.paths): of a folder that somebody has here, to folders of models."""
        return None if self.located.commit else ANYWHERE


def open_merge(target: str, token: str | bool | None) -> Merge:
    """Find a merge and read its lock.

    Args:
        target: a folder, or ``owner/name[@revision]`` on the Hub, with or without ``hf://``.
        token: the reader's token; None takes the environment's, False none.

    Raises:
        ModelError: it cannot be read, or is no merge of ours: it has no lock.
        VerificationError: it has a lock that says nothing.
    """
    store, located = find(target, token)
    info = located.files.get(LOCK_NAME)
    if info is None:
        hint = "only a merge of ours is known to be one: by the lock file that was left beside it"
        raise ModelError(Problem(f"{located.name} holds no {LOCK_NAME}", hint=hint))
    try:
        held = read_lock(store.fetch(located, LOCK_NAME).decode("utf-8", "replace"), f"{located.name}/{LOCK_NAME}")
        merge = Merge(store, located, held, recipe_of(held, LOCK_NAME))
    except RecipeError as error:
        raise VerificationError(error.problems) from None
    measured = {kept.name for kept in kept_of(merge.recipe, held).values()}
    parents = [parent.model for parent in held.models if parent.commit is None and parent.model not in measured]
    if folders := parents if merge.root is None else ():
        what = f"{located.name} was made of folders of another machine ({few(folders)}), which are nowhere to be found"
        raise ModelError(Problem(what, hint="download it to where they are, and name the folder that it is in then"))
    return merge


# ---- files ----------------------------------------------------------------------------------------------------------


def other_files(merge: Merge, planned: Plan, made: Collection[str], everything: bool) -> dict[str, Problem]:
    """The files that are not those of the lock, by size and SHA-256; each with a sentence.

    Args:
        made: files whose content is compared anyhow.
        everything: read also shards, and whatever else is large, where the Hub does not tell their SHA-256.
    """
    known = {*made, *planned.files, *_told_by_git(merge, planned)}
    found = {
        name: _wrong(merge, name, info, everything or (name not in known and info.size <= _SMALL))
        for name, info in merge.held.output.items()
    }
    return {name: Problem(f"{name} {what}", hint=_CHANGED) for name, what in found.items() if what}


def _wrong(merge: Merge, name: str, info: FileInfo, read: bool) -> str | None:
    found = merge.located.files.get(name)
    if found is None or found.barred:
        return "is missing" if found is None else found.barred
    return other_content(info, found, partial(merge.store.checksum, merge.located, name) if read else None)


def other_contents(
    merge: Merge, planned: Plan, made: Mapping[str, Content], others: Collection[str]
) -> Iterator[Problem]:
    """What the lock does not say of files that the plan makes, and small files that are not what it makes.

    Args:
        made: what the files have to be that are compared by content.
        others: files that are known not to be the lock's.
    """
    located, output = merge.located, merge.held.output
    promised = [name for name in _promised_files(planned, made) if not since_later(name, merge.held.format)]
    if unlocked := [name for name in promised if name not in output]:
        yield Problem(f"the lock says nothing of {few(unlocked)}", hint="was it changed after the merge was made?")
    if unsure := [name for name, info in output.items() if info.sha256 is None]:
        hint = "merger writes one of every file that it makes: was the lock changed after the merge was made?"
        yield Problem(f"the lock holds no SHA-256 of {few(unsure)}", hint=hint)
    for name, content in made.items():
        info = None if name in others else located.files.get(name)
        if info is not None and not holds(merge, name, content):
            yield Problem(f"{name} is not what the lock's recipe makes", hint=_CHANGED)


def _promised_files(planned: Plan, made: Collection[str]) -> list[str]:
    """The files that a loader needs, as far as the plan knows them."""
    return list(dict.fromkeys([*planned.files, *made, *planned.texts.taken]))


def strangers(merge: Merge, planned: Plan, made: Collection[str]) -> tuple[list[str], list[Problem]]:
    """The files that are no part of the merge, and what those among them can do that a loader may read.

    That the lock lists a file is not enough for those: its plan has to make it.
    """
    listed = merge.held.output
    promised = {*_promised_files(planned, made), *({MEASURED_NAME} & listed.keys())}
    there = set(merge.located.files) if merge.located.commit else set(tree(merge.located.where))
    brought = [
        name
        for name in sorted(there - promised)
        if not _is_ours(name, merge) and (loaded_as(name) or name not in listed)
    ]
    read = [(name, loaded_as(name)) for name in brought if loaded_as(name)]
    hint = "it was added beside the merge, and a loader may read it: it is"
    return brought, [Problem(f"{name} is no file of this merge", hint=f"{hint} {what}") for name, what in read]


def _is_ours(name: str, merge: Merge) -> bool:
    is_picture = name.startswith(PICTURES) and not loaded_as(name)
    return name in _OURS or is_picture or (merge.located.commit is None and name.startswith(_GITS_OR_THE_CLIENTS))


def _told_by_git(merge: Merge, planned: Plan) -> list[str]:
    """Files that were taken over unchanged, of which git's names of both contents tell whether they are the same."""
    taken = {} if planned.texts.is_edited else planned.texts.taken
    pairs = {name: (merge.located.files.get(name), _parents(planned, name)) for name in taken}
    return [
        name
        for name, (here, there) in pairs.items()
        if here is not None and None not in (here.oid, there.oid) and here.sha256 is there.sha256 is None
    ]


def _parents(planned: Plan, name: str) -> FileInfo:
    return planned.locked.models[planned.texts.taken[name]].located.files[name]


def holds(merge: Merge, name: str, content: Content) -> bool:
    """Whether this is what the merge's file of that name holds."""
    info = merge.located.files.get(name)
    same_size = info is not None and info.size == size_of(content)
    return same_size and merge.store.checksum(merge.located, name) == sha256_of(content)


def other_side_files(merge: Merge, planned: Plan) -> Iterator[Problem]:
    """Small files that are not those of the model that they were taken from, where git's names of both tell it."""
    for name in _told_by_git(merge, planned):
        if merge.located.files[name].oid != _parents(planned, name).oid:
            model = planned.locked.models[planned.texts.taken[name]]
            yield Problem(f"{name} is not the file that was taken from {model.name}", hint=_CHANGED)


# ---- the card -------------------------------------------------------------------------------------------------------


def card_again(merge: Merge, planned: Plan, parents: Library, new_version: str | None = None) -> Card:
    """The card, rendered anew from what was measured on the way.

    Args:
        new_version: a model that takes its place, which the Hub then points to; None: the one that the card names.

    Raises:
        RecipeError: the recipe's own template cannot be rendered.
        VerificationError: what was measured is damaged.
    """
    elsewhere = elders(planned, merge.located.commit is not None)
    seen = _measured(merge, MEASURED_NAME, load_geometry, "the tables of how the models relate")
    scores = _measured(merge, EVALUATED_NAME, read_scores, "the table of scores")
    found = _measured(merge, SEARCHED_NAME, read_found, "what a search has found")
    newer = new_version or (merge.located.card or {}).get("new_version")
    kept = {"new_version": newer} if isinstance(newer, str) and is_repo(newer) else {}
    return card(planned, merge.located.name, seen or {}, parents, elsewhere, scores or (), kept, found)


def _measured(merge: Merge, name: str, load: Callable[[str], _Measured], lost: str) -> _Measured | None:
    """What a file says that was measured of the merge; None where there is none."""
    if name not in merge.located.files:
        return None
    try:
        return load(merge.store.fetch(merge.located, name).decode())
    except (ValueError, TypeError, AttributeError):
        hint = f"remove the file: the card will do without {lost}"
        raise VerificationError(Problem(f"{name} is damaged", hint=hint)) from None


def find_edits(merge: Merge, planned: Plan, parents: Library) -> Iterator[str]:
    """In what card and scores are not what merger writes: sentences, for whoever publishes a merge may edit them."""
    if merge.recipe.publish.template or merge.recipe.publish.left_out:
        yield f"{CARD_NAME} was rendered with a template of its own: it is not compared"
        return
    try:
        files = card_again(merge, planned, parents).texts
    except MergerError as error:
        yield f"{CARD_NAME} cannot be rendered again to be compared: {error.problems[0].what}"
        return
    for name in (CARD_NAME, EVALUATED_NAME, HUB_SCORES_NAME):
        told = merge.located.files.get(name)
        if told is None and name in files:
            yield f"{name} is missing"
        elif told is not None and (found := _first_other(merge.store.fetch(merge.located, name), files.get(name, b""))):
            yield f"{name} is not what merger writes of this merge here and now: it differs from line {found} on"


def _first_other(one: bytes, other: bytes) -> int:
    """The first line in which two texts differ; 0 if they do not."""
    if one == other:
        return 0
    pairs = zip_longest(one.splitlines(keepends=True), other.splitlines(keepends=True))
    return next(number for number, (left, right) in enumerate(pairs, 1) if left != right)


# ---- headers --------------------------------------------------------------------------------------------------------


def comparable(merge: Merge, planned: Plan) -> tuple[dict[str, TensorInfo], list[Problem]]:
    """The published tensors that have the plan's names, dtypes and shapes; and what is wrong with the others."""
    problems: list[Problem] = []
    shards = [shard for shard in planned.shards if shard.written]
    files = [shard.name for shard in shards if shard.name in merge.located.files]
    tally = Tally(MODEL_TENSORS)
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        headers = list(pool.map(partial(_header, merge, problems, tally), files))
    found = {tensor.name: tensor for tensor in (tensor for part in headers for tensor in part)}
    wanted = {tensor.name: tensor for shard in shards for tensor in _header_of(shard)}
    same = {name: tensor for name, tensor in found.items() if name in wanted and _is_like(tensor, wanted[name])}
    return same, [*problems, *_other_tensors(found, wanted, same)]


def _header(merge: Merge, problems: list[Problem], tally: Tally, file: str) -> tuple[TensorInfo, ...]:
    try:
        return tensors_in(merge.located, merge.store, file, tally)
    except ModelError as error:
        problems.extend(error.problems)
        return ()


def _header_of(shard: Shard) -> Iterator[TensorInfo]:
    place = shard.header_size
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
