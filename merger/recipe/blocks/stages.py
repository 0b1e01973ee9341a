"""Several documents of one file: which is the result, which are its stages, and in which order they are made.

A stage is a document with a name; where the file speaks of a model of that name, the stage is meant, and never a folder
or a repo. Not here: what stands in a document (parse), and how a stage is made (plan).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from merger.recipe.model import ModelRef, Publish, Recipe
from merger.recipe.values import Notes, nearest

_NO_NAME = re.compile(r"[/\\@+]|^[.~]")


def join_stages(recipes: Sequence[Recipe], notes: Notes) -> Recipe:
    """The result's document, with the others as its stages; problems go to the notes."""
    result = _result(recipes, notes)
    named = _by_name(recipes, notes)
    for recipe in recipes:
        _check_references(recipe, named, notes)
        if recipe is not result:
            _refuse_ends(recipe, notes)
    order = _in_order(result, named, notes)
    for name, recipe in named.items():
        if recipe is not result and recipe not in order:
            hint = "name it as a model, or take it out"
            notes.warn(f"nothing is made of the stage {name}", recipe.name_at, None, hint)
    return replace(result, stages=tuple(recipe for recipe in order if recipe is not result))


def _refuse_ends(recipe: Recipe, notes: Notes) -> None:
    """A mixture is no stage, and what is done with a result is not done with one."""
    if recipe.mixture is not None:
        hint = "make the mixture by a recipe of its own, and name the folder that it made"
        notes.error("a mixture of experts cannot be a stage", recipe.mixture.at or recipe.at, None, hint)
    hint = "move it into the last document"
    if recipe.publish != Publish():
        notes.warn("publish has no effect in a stage", recipe.publish.at, None, hint)
    if recipe.allow_non_finite:
        notes.warn("allow_non_finite has no effect in a stage", recipe.allow_at, None, hint)
    if recipe.evaluate is not None:
        notes.warn("evaluate has no effect in a stage", recipe.evaluate.at, None, hint)


def _result(recipes: Sequence[Recipe], notes: Notes) -> Recipe:
    """The document without a name, else the last one."""
    nameless = [recipe for recipe in recipes if recipe.name is None]
    for other in nameless[1:]:
        hint = "write name: into all but one: that one is the result, the others are models of it"
        notes.error("a second document without a name", other.at, None, hint)
    return nameless[0] if nameless else recipes[-1]


def _by_name(recipes: Sequence[Recipe], notes: Notes) -> dict[str, Recipe]:
    found: dict[str, Recipe] = {}
    for recipe in recipes:
        if recipe.name is None:
            continue
        if recipe.name in found:
            first = found[recipe.name].name_at
            what = f"the name {recipe.name!r} was given before{'' if first is None else f', on line {first.line}'}"
            notes.error(what, recipe.name_at, "name", "give each document a name of its own")
        elif _NO_NAME.search(recipe.name):
            hint = "take a plain word such as first-merge: with / @ + or a leading . or ~ it reads like a model"
            notes.error(f"{recipe.name!r} is no name of a stage", recipe.name_at, "name", hint)
        found.setdefault(recipe.name, recipe)
    return found


def _check_references(recipe: Recipe, named: Mapping[str, Recipe], notes: Notes) -> None:
    for ref in recipe.parents:
        where = f"models[{ref}]"
        if ref.path in named and ref != ModelRef(ref.path):
            what = f"{ref.path} is a stage of this file, which has neither a revision nor an adapter"
            notes.error(what, ref.at, where, f"write {ref.path}; a folder of that name is ./{ref.path}")
        elif ref.path not in named and "/" not in ref.path and (near := nearest(ref.path, named)):
            hint = f"did you mean the stage {near!r}? a folder of the other name is ./{ref.path}"
            notes.error(f"no document of this file has the name {ref.path!r}", ref.at, where, hint)


def _in_order(result: Recipe, named: Mapping[str, Recipe], notes: Notes) -> list[Recipe]:
    """What the result is made of, and itself last; a stage that is made of itself is a problem."""
    order: list[Recipe] = []
    above: list[str] = []

    def visit(recipe: Recipe) -> None:
        above.append(recipe.name or "")
        for ref in (ref for ref in recipe.parents if ref.path in named):
            if ref.path in above:
                circle = ", which is made of ".join([*above[above.index(ref.path) + 1 :], ref.path])
                hint = "a document can only be made of others that are made without it"
                notes.error(f"{ref.path} is made of {circle}", ref.at, f"models[{ref}]", hint)
            elif named[ref.path] not in order:
                visit(named[ref.path])
        above.pop()
        order.append(recipe)

    visit(result)
    return order
