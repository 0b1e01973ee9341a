"""Models of a recipe that stand for several checkpoints of a run: which there are, as a stage that is their mean.

Not here: how a recipe asks for them (recipe.references), and the making of the mean (planning).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection
from dataclasses import fields, is_dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from merger.errors import ModelError, Problem, RecipeError, Span, few
from merger.recipe.model import Checkpoints, ModelRef, Module, Recipe, Rule, Setting, Slice, Source
from merger.recipe.references import weigh
from merger.safety.limits import CHECKPOINTS, excess
from merger.stores.ports import Store

_DIGITS = re.compile(r"(\d+)")
_METHOD = "linear"
_NAMING = ("modules", "base_model", "tensors", "mixture", "tokenizer")
"""What of a document names models."""


def with_means(recipe: Recipe, store: Store, named: Collection[str]) -> Recipe:
    """The recipe with each mean of checkpoints as one model, which a stage makes.

    Args:
        named: the models of a lock, as it calls them: where some of these are meant, no others are taken.

    Raises:
        RecipeError: with each of which no mean can be made.
        ModelError: a model's revisions cannot be asked for.
    """
    if not any(ref.checkpoints for document in recipe.documents for ref in document.parents):
        return recipe
    means = _Means(store, named, {document.name for document in recipe.documents})
    *stages, result = [each for document in recipe.documents for each in means.split(document)]
    if means.problems:
        raise RecipeError(means.problems)
    return replace(result, stages=tuple(stages))


class _Means:
    """Makes stages of means; `problems` are those of all."""

    def __init__(self, store: Store, named: Collection[str], taken: set[str | None]) -> None:
        self._store, self._named, self._taken = store, named, taken
        self.problems: list[Problem] = []

    def split(self, document: Recipe) -> list[Recipe]:
        """The stages that are the means that the document asks for, and it, which names them."""
        stages = list[Recipe]()

        @cache
        def named(ref: ModelRef) -> ModelRef:
            if ref.checkpoints is None:
                return ref
            stages.append(self._stage(document, ref, ref.checkpoints))
            return ModelRef(stages[-1].name or "")

        held = {name: _renamed(getattr(document, name), named) for name in _NAMING}
        return [*stages, replace(document, **held, stages=())]

    def _stage(self, document: Recipe, row: ModelRef, of: Checkpoints) -> Recipe:
        """In float32, where the dtype of what is made of it does not follow from it; config and tokenizer are the last
        checkpoint's."""
        refs = self._chosen(row, of) or [row]
        rules = [Setting((Rule((share,)),)) for share in weigh(of, len(refs))]
        sources = [Source(ref, parameters={"weight": rule}, at=row.at) for ref, rule in zip(refs, rules, strict=False)]
        piece = Slice(tuple(sources), _METHOD, refs[-1], at=row.at)
        base = document.base_model
        known = document.dtype is not None or (base is not None and base.checkpoints is None)
        return Recipe(
            document.path,
            document.text,
            (Module(None, (piece,), at=row.at),),
            name=self._name(row, len(refs)),
            mean_of=of,
            base_model=refs[-1],
            dtype="float32" if known else None,
            at=row.at,
            name_at=row.at,
        )

    def _name(self, row: ModelRef, count: int) -> str:
        """What plan and card call it; no document has this name."""
        folder, model = f"{os.path.dirname(row.path)}/", replace(row, checkpoints=None, adapter=None)
        name = stem = f"mean of {count} of {str(model).replace(folder, '', 1)}"
        number = 1
        while name in self._taken:
            name, number = f"{stem} ({number + 1})", number + 1
        self._taken.add(name)
        return name

    def _chosen(self, row: ModelRef, of: Checkpoints) -> list[ModelRef]:
        """The checkpoints, the oldest first; none, and a problem, where they are not what the row asks for."""
        there, matching = self._matching(row, of)
        found = [name for name in matching if of.every is None or _number(name, of.match) % of.every == 0]
        found = found[-of.last :] if of.last else found
        if problem := _wrong(row, of, found, matching, there):
            self.problems.append(replace(problem, at=row.at, where=f"models[{row}]"))
            return []
        if of.of_folders:
            return [replace(row, checkpoints=None, path=path) for path in found]
        return [replace(row, checkpoints=None, revision=name) for name in found]

    def _matching(self, row: ModelRef, of: Checkpoints) -> tuple[list[str], list[str]]:
        """The names that there are, and those that the pattern fits, in the order of the numbers in them."""
        stem = f"{row.path}@"
        revisions = [] if of.of_folders else [name[len(stem) :] for name in self._named if name.startswith(stem)]
        locked = [name.partition("+")[0] for name in revisions if fnmatchcase(name.partition("+")[0], of.match)]
        try:
            found = locked or self._store.names(row.path, of.of_folders)
        except ModelError as error:
            raise ModelError([replace(problem, at=row.at) for problem in error.problems]) from None
        if of.of_folders:
            return found, sorted([path for path in found if os.path.basename(path) in self._named] or found, key=_order)
        return found, sorted([name for name in found if fnmatchcase(name, of.match)], key=_order)


def _renamed(value: Any, named: Callable[[ModelRef], ModelRef]) -> Any:
    """The value with other names for the models in it, each at its place."""
    if isinstance(value, ModelRef):
        return replace(named(value), at=value.at)
    if isinstance(value, tuple):
        return tuple(_renamed(item, named) for item in value)
    if not is_dataclass(value) or isinstance(value, Span | type):
        return value
    return replace(value, **{of.name: _renamed(getattr(value, of.name), named) for of in fields(value)})


def _wrong(row: ModelRef, of: Checkpoints, found: list[str], matching: list[str], there: list[str]) -> Problem | None:
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
    return excess(str(row), len(found), CHECKPOINTS)


def _order(name: str) -> tuple[list[int | str], str]:
    """The numbers in a name count as numbers."""
    return [int(part) if part.isdecimal() else part for part in _DIGITS.split(name)], name


def _number(name: str, pattern: str) -> int:
    """The first number in what the pattern leaves open."""
    known = len(re.split(r"[*?\[]", os.path.expanduser(pattern))[0])
    found = _DIGITS.search(name, known)
    return int(found[1]) if found else -1
