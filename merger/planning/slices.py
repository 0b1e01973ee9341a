"""A recipe's slices as they meet its models: which parts of which stack of layers each slice is cut from.

Not here: tensors (jobs).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from merger.errors import MismatchError, Problem, RecipeError, Span, did_you_mean
from merger.lock.locked import LockedModel
from merger.lock.matched import candidates
from merger.methods.registry import Method
from merger.models.architecture import DEFAULT
from merger.planning.stage_model import StagedRecipe
from merger.recipe.model import Module, Slice, Source


def unlike(config_model: LockedModel, other: LockedModel, stack: str) -> tuple[str, str]:
    """What a model lacks, and what to do about it.

    Args:
        config_model: the model that has the stack.
        other: the model that has no stack of this name.
    """
    ours, theirs = config_model.architecture.stacks, other.architecture.stacks
    could = {own: homes for own, homes in candidates(config_model, other).items() if stack in homes}
    if could:
        (own, homes), *_ = could.items()
        one, several = (other.name, own), (config_model.name, homes)
        if len(homes) == 1:
            one, several = (config_model.name, stack), (other.name, tuple(could))
        what = f"the layers {one[1]}.N of {one[0]} may be {' or '.join(f'{n}.N' for n in several[1])} of {several[0]}"
        return what, "by roles and shapes both fit: save the one that is meant by itself, and merge that"
    shared = " and ".join(name for name in theirs if name in ours)
    what = f"{other.name} has no layers {stack}.N (its stacks of layers: {', '.join(theirs) or 'none'})"
    hint = f"modules: with {shared} and default alone merges what both have, and copies the rest"
    return what, hint if shared else "only models of one architecture can be merged"


@dataclass(frozen=True)
class Segment:
    """A source of a slice with its model; `number` is the model's in the locked recipe."""

    source: Source
    number: int
    model: LockedModel
    is_base: bool


@dataclass(frozen=True)
class Cut:
    """A slice with its models.

    Args:
        piece: the slice.
        module: the module it belongs to.
        parts: its sources, in the order in which the method is handed their tensors.
        starts: for each part the first layer.
        layers: how many layers; 0 for what has none.
    """

    piece: Slice
    module: Module
    parts: tuple[Segment, ...]
    starts: tuple[int, ...]
    layers: int

    @cached_property
    def leader(self) -> int:
        """The number of the part whose tensors name the output's: the base model, else the first."""
        return next((number for number, part in enumerate(self.parts) if part.is_base), 0)


@dataclass(frozen=True)
class CutModule:
    """A module of the output: its stack of layers, if it has one, and whether the tensors outside all are its own."""

    cuts: tuple[Cut, ...]
    stack: str | None
    loose: bool


@dataclass
class Findings:
    """The problems found on the way, so that all of them can be told at once."""

    recipe: list[Problem] = field(default_factory=list)
    mismatches: list[Problem] = field(default_factory=list)

    def about_recipe(self, what: str, at: Span | None, where: str, hint: str | None) -> None:
        """The recipe asks for what its models do not have; each place is reported once."""
        if not any((problem.at, problem.where) == (at, where) for problem in self.recipe):
            self.recipe.append(Problem(what, at, where, hint))

    def about_part(self, what: str, part: Segment, hint: str) -> None:
        """A model does not fit the others; the same is said once."""
        problem = Problem(what, part.source.at, f"models[{part.source.model}]", hint)
        if problem not in self.mismatches:
            self.mismatches.append(problem)

    def settle(self) -> None:
        """Raise what was found, if anything was."""
        if self.recipe:
            raise RecipeError([*self.recipe, *self.mismatches])
        if self.mismatches:
            raise MismatchError(self.mismatches)


def parts(locked: StagedRecipe, piece: Slice, method: Method) -> tuple[Segment, ...]:
    """The slice's sources that its method takes: the base model first where the method wants it so."""
    found = [
        Segment(source, locked.index(source.model), locked.model(source.model), source.model == piece.base_model)
        for source in piece.sources
        if method.takes_base or not source.added
    ]
    return tuple(sorted(found, key=lambda part: not part.is_base) if method.base == "first" else found)


def cut(locked: StagedRecipe, table: Mapping[str, Method], findings: Findings) -> list[CutModule | str]:
    """The output's modules in order; of a module that is copied, only its name.

    Those are modules that the recipe does not name, and stacks that only the config model has: what a model that sees
    has besides the language model that is merged into it.
    """
    architecture = locked.config_model.architecture
    named = {module.name: module for module in locked.recipe.modules}
    if None in named and not _is_clear(locked, named[None], findings):
        return []
    for name in named:
        if name is not None and name not in architecture.modules:
            hint = did_you_mean(name, architecture.modules)
            findings.about_recipe(
                f"{locked.config_model.name} has no module {name!r}", named[name].at, f"modules.{name}", hint
            )
    everything = named.get(None)
    alone = set[str]() if everything is None else _only_in_config_model(locked, everything)
    chosen = [(name, None if name in alone else named.get(name, everything)) for name in architecture.modules]
    return [name if module is None else _module(locked, table, findings, module, name) for name, module in chosen]


def _only_in_config_model(locked: StagedRecipe, module: Module) -> set[str]:
    """The stacks that no other model of a module has; none, where one has layers of its own."""
    ours = locked.config_model.architecture.stacks
    refs = {source.model for piece in module.slices for source in piece.sources} - {locked.recipe.config_model}
    theirs = [locked.model(ref).architecture.stacks for ref in refs]
    if not theirs or any(not stacks or stacks.keys() - ours.keys() for stacks in theirs):
        return set()
    return set(ours).difference(*theirs)


def _is_clear(locked: StagedRecipe, module: Module, findings: Findings) -> bool:
    """Layer ranges without a module's name need a model with one stack of layers."""
    stacks = locked.config_model.architecture.stacks
    ranged = next((s for piece in module.slices for s in piece.sources if s.layer_range is not None), None)
    if ranged is None or len(stacks) == 1:
        return True
    what = f"{locked.config_model.name} has {len(stacks)} stacks of layers ({', '.join(stacks) or 'none'})"
    hint = "use models:, or modules: with an entry for each stack" if stacks else "use models:"
    findings.about_recipe(f"{what}, so it is not clear which a layer_range means", ranged.range_at, "slices", hint)
    return False


def _module(
    locked: StagedRecipe, table: Mapping[str, Method], findings: Findings, module: Module, name: str
) -> CutModule:
    stacks = locked.config_model.architecture.stacks
    only = next(iter(stacks)) if len(stacks) == 1 else None
    stack = only if name == DEFAULT else name
    return CutModule(tuple(_cuts(locked, table, findings, module, stack)), stack, loose=name == DEFAULT)


def _cuts(
    locked: StagedRecipe, table: Mapping[str, Method], findings: Findings, module: Module, stack: str | None
) -> Iterator[Cut]:
    inside = "" if module.name is None else f"modules.{module.name}."
    for number, piece in enumerate(module.slices):
        taken = parts(locked, piece, table[piece.method])
        where = f"{inside}slices[{number}]"
        ranges = [_range(part, stack, where, locked.config_model, findings) for part in taken]
        sound = [found for found in ranges if found is not None]
        if len(sound) == len(taken) and _equally_long(piece, taken, sound, stack, findings):
            yield Cut(piece, module, taken, tuple(start for start, _ in sound), sound[0][1] - sound[0][0])


def _range(
    part: Segment, stack: str | None, where: str, config_model: LockedModel, findings: Findings
) -> tuple[int, int] | None:
    """The part's layers; None, and a problem, where its model does not have them."""
    count = part.model.architecture.stacks.get(stack or "", 0)
    if stack is not None and count == 0:
        what, hint = unlike(config_model, part.model, stack)
        findings.about_part(what, part, hint)
        return None
    start, stop = part.source.layer_range or (0, count)
    if stop <= count:
        return start, stop
    what = f"[{start}, {stop}] ends beyond {part.model.name}, which has {count} layers"
    hint = f"its last layer is {count - 1}: end at {count} or before"
    if stack is None:
        what, hint = f"the module {DEFAULT} has no layers of its own", "write models: in place of slices: there"
    findings.about_recipe(what, part.source.range_at, f"{where}.sources[{part.source.model}].layer_range", hint)
    return None


def _equally_long(
    piece: Slice, taken: tuple[Segment, ...], ranges: list[tuple[int, int]], stack: str | None, findings: Findings
) -> bool:
    lengths = [stop - start for start, stop in ranges]
    if len(set(lengths)) <= 1:
        return True
    counts = ", ".join(f"{part.model.name} has {length}" for part, length in zip(taken, lengths, strict=True))
    other = next(number for number, length in enumerate(lengths) if length != lengths[0])
    what = f"different numbers of layers in {stack}: {counts}"
    findings.about_part(what, taken[other], "choose layers of equal number with slices: and layer_range")
    return False
