"""Rows of a recipe that stand for several checkpoints of a run: which there are, as a stage that is their mean.

Not here: how a recipe asks for them (recipe.blocks.average), and the making of the mean (planning).
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import replace
from fnmatch import fnmatchcase

from merger.errors import ModelError, Problem, RecipeError, few
from merger.recipe.blocks.average import weigh
from merger.recipe.model import Checkpoints, ModelRef, Module, Recipe, Rule, Setting, Slice, Source
from merger.safety.limits import CHECKPOINTS, excess
from merger.stores.ports import Store

_DIGITS = re.compile(r"(\d+)")
_METHOD = "linear"


def with_means(recipe: Recipe, store: Store, named: Collection[str]) -> Recipe:
    """The recipe with each row of checkpoints as one model, which a stage makes.

    Args:
        named: the models of a lock, as it calls them: where some of these are meant, no others are taken.

    Raises:
        RecipeError: with each row of which no mean can be made.
        ModelError: a model's revisions cannot be asked for.
    """
    if not any(
        source.checkpoints for document in recipe.documents for piece in document.slices for source in piece.sources
    ):
        return recipe
    means = _Means(store, named, {document.name for document in recipe.documents})
    *stages, result = [each for document in recipe.documents for each in means.split(document)]
    if means.problems:
        raise RecipeError(means.problems)
    return replace(result, stages=tuple(stages))


class _Means:
    """Makes stages of rows; `problems` are those of all rows."""

    def __init__(self, store: Store, named: Collection[str], taken: set[str | None]) -> None:
        self._store, self._named, self._taken = store, named, taken
        self.problems: list[Problem] = []

    def split(self, document: Recipe) -> list[Recipe]:
        """The stages that are means of what the document asks for, and it, which names them."""
        stages = list[Recipe]()

        def named(source: Source) -> Source:
            if source.checkpoints is None:
                return source
            stages.append(self._stage(document, source, source.checkpoints))
            return replace(source, model=ModelRef(stages[-1].name or "", at=source.model.at), checkpoints=None)

        def rewrite(piece: Slice) -> Slice:
            return replace(piece, sources=tuple(map(named, piece.sources)))

        modules = [replace(module, slices=tuple(map(rewrite, module.slices))) for module in document.modules]
        return [*stages, replace(document, modules=tuple(modules), stages=())]

    def _stage(self, document: Recipe, row: Source, of: Checkpoints) -> Recipe:
        """In float32, where the dtype of what is made of it does not follow from it; config and tokenizer are the last
        checkpoint's."""
        refs = self._chosen(row, of) or [row.model]
        rules = [Setting((Rule((share,)),)) for share in weigh(of, len(refs))]
        sources = [Source(ref, parameters={"weight": rule}, at=row.at) for ref, rule in zip(refs, rules, strict=False)]
        piece = Slice(tuple(sources), _METHOD, refs[-1], at=row.at)
        known = document.dtype is not None or document.base_model is not None
        return Recipe(
            document.path,
            document.text,
            (Module(None, (piece,), at=row.at),),
            name=self._name(row, len(refs)),
            mean_of=of,
            base_model=refs[-1],
            dtype="float32" if known else None,
            at=row.at,
            name_at=row.model.at,
        )

    def _name(self, row: Source, count: int) -> str:
        """What plan and card call it; no document has this name."""
        folder, model = f"{os.path.dirname(row.model.path)}/", replace(row.model, adapter=None)
        name = stem = f"mean of {count} of {str(model).replace(folder, '', 1)}"
        number = 1
        while name in self._taken:
            name, number = f"{stem} ({number + 1})", number + 1
        self._taken.add(name)
        return name

    def _chosen(self, row: Source, of: Checkpoints) -> list[ModelRef]:
        """The checkpoints, the oldest first; none, and a problem, where they are not what the row asks for."""
        there, matching = self._matching(row, of)
        found = [name for name in matching if of.every is None or _number(name, of.match) % of.every == 0]
        found = found[-of.last :] if of.last else found
        if problem := _wrong(row, of, found, matching, there):
            self.problems.append(replace(problem, at=row.at, where=f"models[{row.model}]"))
            return []
        if of.of_folders:
            return [replace(row.model, path=path) for path in found]
        return [replace(row.model, revision=name) for name in found]

    def _matching(self, row: Source, of: Checkpoints) -> tuple[list[str], list[str]]:
        """The names that there are, and those that the pattern fits, in the order of the numbers in them."""
        stem = f"{row.model.path}@"
        revisions = [] if of.of_folders else [name[len(stem) :] for name in self._named if name.startswith(stem)]
        locked = [name.partition("+")[0] for name in revisions if fnmatchcase(name.partition("+")[0], of.match)]
        try:
            found = locked or self._store.names(row.model.path, of.of_folders)
        except ModelError as error:
            raise ModelError([replace(problem, at=row.at) for problem in error.problems]) from None
        if of.of_folders:
            return found, sorted([path for path in found if os.path.basename(path) in self._named] or found, key=_order)
        return found, sorted([name for name in found if fnmatchcase(name, of.match)], key=_order)


def _wrong(row: Source, of: Checkpoints, found: list[str], matching: list[str], there: list[str]) -> Problem | None:
    """Why no mean can be made of these."""
    names = few([os.path.basename(name) for name in found or matching or there])
    if not matching:
        hint = f"there are {names}" if there else "paths are relative to the working directory"
        return Problem(f"nothing is called {of.match!r}", hint=hint)
    if not found:
        what = f"of the {len(matching)} that are called {of.match!r} none has a multiple of {of.every} for its number"
        return Problem(what, hint=f"there are {names}")
    if len(found) == 1:
        return Problem(f"{names} is the only one", hint="a mean is of two or more: name it as a model by itself")
    if of.weights and len(of.weights) != len(found):
        hint = "write a weight for each, the oldest first, or last: with as many as there are weights"
        return Problem(f"{len(of.weights)} weights for {len(found)} checkpoints: {names}", hint=hint)
    return excess(str(row.model), len(found), CHECKPOINTS)


def _order(name: str) -> tuple[list[int | str], str]:
    """The numbers in a name count as numbers."""
    return [int(part) if part.isdecimal() else part for part in _DIGITS.split(name)], name


def _number(name: str, pattern: str) -> int:
    """The first number in what the pattern leaves open."""
    known = len(re.split(r"[*?\[]", os.path.expanduser(pattern))[0])
    found = _DIGITS.search(name, known)
    return int(found[1]) if found else -1
