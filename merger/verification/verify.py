"""A published merge is made again, in part or in full, from its parents at the locked commits, and compared.

By the same engine that made it. All that differs is reported; what a sample proves is told in docs/verify.md. Not here:
the merge's lock and files (published), which pieces are drawn (sample), and the comparison (proof).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from merger.errors import MismatchError, Problem, RecipeError, VerificationError
from merger.lock.lock import lock
from merger.lock.locked import LockedRecipe
from merger.methods.registry import methods
from merger.models.checkpoint import TensorInfo
from merger.models.side_files import loaded_as
from merger.planning.lockfile import Lock, changed_models, other_numbers, other_plan
from merger.planning.plan import Plan
from merger.planning.shards import Shard
from merger.run.artifacts import model_files, taken_files
from merger.run.extras import MEASURING, refuse_missing
from merger.run.options import Options
from merger.run.pipeline import ignore
from merger.run.prepare import kept_of, planned_again, stores_of
from merger.runtime import PACKAGE
from merger.stores.resolve import Library
from merger.verification.published import (
    Merge,
    comparable,
    find_edits,
    open_merge,
    other_contents,
    other_files,
    other_side_files,
    strangers,
)
from merger.verification.sample import Mismatch, Sample, draw, whole_tensor

if TYPE_CHECKING:
    from merger.engine.execute import BytesWritten


@dataclass(frozen=True)
class Extent:
    """How much is compared: everything, or so many tensors in full, or as much as a small share of the bytes allows.

    Args:
        everything: each tensor, and the SHA-256 of each file.
        tensors: how many.
        seed: what they are drawn from; None: from chance, so that nobody can know beforehand.
    """

    everything: bool = False
    tensors: int | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Begun:
    """All is found and read that is no tensor; so many bytes of the result will be compared."""

    nbytes: int


@dataclass(frozen=True)
class Compared:
    """Entries ``[start, stop)`` of a tensor that were compared, and the shard that holds it."""

    tensor: str
    file: str
    start: int
    stop: int


@dataclass(frozen=True)
class Report:
    """What was compared, and what is not as it was promised.

    Args:
        model: the repo's id, or the folder's last part.
        commit: on the Hub; None of a folder.
        plan: the hash of what its lock's recipe and commits make.
        made_with: the versions of what made it.
        seed: what the sample was drawn from; None: everything was compared.
        tensors: how many tensors the merge has.
        entries: how many numbers they hold.
        compared: what was compared of them.
        left_out: the tensors of which a sample was too many bytes.
        read: how many bytes of models and result were read, headers included.
        of: how many it would be with --all.
        problems: what is wrong with the lock, its models and files.
        differences: the tensors that are others, with the first entry of each.
        doubts: why a difference may be nobody's fault.
        added: the files that are no part of the merge; those that a loader may read are among the problems too.
        notes: what was added or edited that no loader reads.
    """

    model: str
    commit: str | None
    plan: str
    made_with: Mapping[str, str]
    seed: int | None
    tensors: int
    entries: int
    compared: tuple[Compared, ...] = field(repr=False)
    left_out: tuple[str, ...]
    read: int
    of: int
    problems: tuple[Problem, ...]
    differences: tuple[Mismatch, ...]
    doubts: tuple[str, ...]
    added: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing that was compared is other than promised."""
        return not self.problems and not self.differences


def verify(
    target: str, options: Options, extent: Extent, on_event: Callable[[Begun | BytesWritten], object] = ignore
) -> Report:
    """Compare a merge with what its lock promises.

    Args:
        target: a folder, or ``owner/name[@revision]`` on the Hub, with or without ``hf://``.
        options: what may be used, and with which token is read.
        extent: how much is compared.
        on_event: is told how far it is.

    Raises:
        ModelError: the merge or a parent cannot be read.
        RecipeError: it takes what is not installed here.
        VerificationError: the merge has no lock, or one that nothing can be made from.
        BudgetError: it does not fit into the memory.
    """
    merge = open_merge(target, options.read_token)
    held = merge.held
    refuse_missing(merge.recipe, but=MEASURING)
    if merge.recipe.lora is not None or not merge.recipe.publish.plain:
        # an adapter's tensors are made in pairs, so that one alone cannot be; of GGUF and fp8 checksums are compared
        extent = replace(extent, everything=True)
    options = replace(options, measured=kept_of(merge.recipe, held))
    parents = stores_of(merge.recipe, options, merge.root)
    locked = lock(merge.recipe, parents, held.pins, options.allow_pickle, named=held.names, measured=options.measured)
    problems = changed_models(locked, held, parents.checksum if extent.everything else None)
    planned = _plan(held, locked, options, problems)
    is_made = extent.everything or planned.texts.is_edited
    side = taken_files(planned, parents) if is_made else {}
    made = {**model_files(planned), "recipe.yaml": held.recipe.encode(), **side}
    others = other_files(merge, planned, made, extent.everything)
    added, readable = strangers(merge, planned, made)
    tensors, misplaced = comparable(merge, planned)
    contents = [*other_contents(merge, planned, made, others), *other_side_files(merge, planned)]
    problems += [*other_plan(planned, held), *others.values(), *contents, *readable, *misplaced]
    whole_shards = [shard for shard in planned.shards if extent.everything or shard.name in others]
    check = _Check(merge, planned, parents, tensors, whole_shards)
    check.run(extent, on_event)
    notes = [f"{name} was added beside the merge" for name in added if not loaded_as(name)]
    notes += find_edits(merge, planned, parents)
    return replace(check.report(problems), added=tuple(added), notes=tuple(notes))


def _plan(held: Lock, locked: LockedRecipe, options: Options, problems: Sequence[Problem]) -> Plan:
    try:
        return planned_again(held, locked, options)
    except (RecipeError, MismatchError) as error:
        raise VerificationError([*problems, *error.problems]) from None


@dataclass
class _Check:
    """The comparison of tensors, and what it has found.

    Args:
        merge: the merge.
        planned: its plan, made anew.
        parents: reads its models.
        tensors: the published tensors that can be compared.
        shards: those that are compared in full: all, or those that are not the lock's, so that the tensor is found.
    """

    merge: Merge
    planned: Plan
    parents: Library
    tensors: Mapping[str, TensorInfo]
    shards: Sequence[Shard]
    seed: int | None = None
    sample: Sample = field(default_factory=partial(Sample, ()))
    problems: list[Problem] = field(default_factory=list)
    differences: list[Mismatch] = field(default_factory=list)

    def run(self, extent: Extent, on_event: Callable[[Begun | BytesWritten], object]) -> None:
        if not extent.everything:
            self.seed = random.SystemRandom().getrandbits(32) if extent.seed is None else extent.seed
            self.sample = self._drawn(extent.tensors, self.seed)
        on_event(Begun(sum(piece.nbytes for piece in self.sample.pieces) + sum(shard.size for shard in self.shards)))
        try:
            self._compare(on_event)
        except MismatchError as error:
            self.problems += error.problems

    def _drawn(self, tensors: int | None, seed: int) -> Sample:
        """Without what is compared in full anyhow, or cannot be compared."""
        sample = draw(self.planned, methods(), seed, tensors)
        in_full = {shard.name for shard in self.shards}
        pieces = [each for each in sample.pieces if each.file not in in_full and each.job.name in self.tensors]
        return Sample(tuple(pieces), sample.left_out)

    def _compare(self, on_event: Callable[[Begun | BytesWritten], object]) -> None:
        from merger.engine.execute import BytesWritten
        from merger.verification.proof import Against, PublishedTensors, compare_pieces, compare_shards

        published = PublishedTensors(self.merge.located, self.merge.store, self.tensors)
        for piece, found in compare_pieces(self.planned, self.sample.pieces, methods(), self.parents, published):
            self.differences += [found] if found else []
            on_event(BytesWritten(piece.nbytes, piece.job))
        against = Against(self.shards, published)
        for event in compare_shards(self.planned, self.shards, methods(), self.parents, against):
            on_event(event)
        self.differences += against.differences
        self.problems += self._other_checksums(against.made)

    def _other_checksums(self, made: Mapping[str, str]) -> Iterator[Problem]:
        if other_numbers(self.planned, self.merge.held):
            return
        for name, sha256 in made.items():
            told = self.merge.held.output.get(name)
            if told is not None and told.sha256 not in (None, sha256):
                what = f"the lock says that {name} has the SHA-256 {told.sha256}, but made again it has {sha256}"
                yield Problem(what, hint="the lock was changed after the merge was made, or here it is made otherwise")

    def report(self, problems: Sequence[Problem]) -> Report:
        """All that was found, and the problems that were known before."""
        planned, names = self.planned, {shard.name for shard in self.shards}
        every = [whole_tensor(shard.name, job) for shard in planned.shards for job in shard.jobs]
        in_full = [piece for piece in every if piece.file in names]
        headers = _header_bytes(self.tensors.values())
        headers += sum(_header_bytes(model.checkpoint.tensors.values()) for model in planned.locked.models)
        alone = not planned.locked.recipe.publish.plain
        compared = (*self.sample.pieces, *(piece for piece in in_full if alone or piece.job.name in self.tensors))
        earlier = other_numbers(planned, self.merge.held) if self.differences else []
        return Report(
            model=self.merge.located.name,
            commit=self.merge.located.commit,
            plan=planned.hash,
            made_with=self.merge.held.made_with,
            seed=self.seed,
            tensors=len(every),
            entries=planned.entries,
            compared=tuple(Compared(each.job.name, each.file, each.start, each.stop) for each in compared),
            left_out=self.sample.left_out,
            read=headers + sum(piece.cost for piece in (*self.sample.pieces, *in_full)),
            of=headers + sum(piece.cost for piece in every),
            problems=(*earlier, *problems, *self.problems),
            differences=tuple(self.differences),
            doubts=tuple(_doubts(self.merge.held)) if self.differences else (),
        )


def _header_bytes(tensors: Iterable[TensorInfo]) -> int:
    starts: dict[str, int] = {}
    for tensor in tensors:
        starts[tensor.file] = min(tensor.start, starts.get(tensor.file, tensor.start))
    return sum(starts.values())


def _doubts(held: Lock) -> Iterator[str]:
    """Another version may round otherwise."""
    for package in (PACKAGE, "numpy", "numba", "torch"):
        with suppress(PackageNotFoundError):  # what a merge takes is here: without torch it takes none
            then, now = held.made_with.get(package), version(package)
            if then not in (None, now):
                yield f"it was made with {package} {then}, and this is {now}: the last bits may be others"
