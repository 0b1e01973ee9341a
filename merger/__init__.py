"""The Python API: what the command does, as functions with results. Importing it costs nothing and changes nothing.

A recipe is the path of its file, a mapping as its YAML would be, or a `Recipe`; text goes through `parse`. Each call
imports what it needs. See docs/python.md. Not here: the work itself (run, verification).
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from merger.methods.registry import Method
    from merger.planning.plan import Plan
    from merger.recipe.model import Recipe
    from merger.run.options import Options
    from merger.run.pipeline import Event, Result
    from merger.searching.effort import Effort
    from merger.searching.search import Event as SearchEvent
    from merger.searching.search import Study
    from merger.verification.diff import Contrast
    from merger.verification.verify import Report

    AnyRecipe = str | Path | Mapping[str, Any] | Recipe

__all__ = [
    "Effort", "Options", "Plan", "Recipe", "Result", "Study", "check", "diff", "merge", "method", "parse", "plan",
    "search", "verify",
]  # fmt: skip

_TYPES = {
    "Effort": "merger.searching.effort",
    "Options": "merger.run.options",
    "Plan": "merger.planning.plan",
    "Recipe": "merger.recipe.model",
    "Result": "merger.run.pipeline",
    "Study": "merger.searching.search",
}


def __getattr__(name: str) -> Any:
    """The types of arguments and results, imported when they are asked for."""
    if name not in _TYPES:
        raise AttributeError(f"module 'merger' has no attribute {name!r}")
    return getattr(import_module(_TYPES[name]), name)


def _tell_notebook() -> None:
    """In a notebook, recipes, plans and results are shown as tables and pictures."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None:
        import_module("merger.cli.notebook").show_in(shell)


def parse(text: str, name: str = "recipe") -> Recipe:
    """The recipe that a text holds; positions in errors begin with `name`.

    Raises:
        RecipeError: with every problem of the text.

    >>> parse("merge_method: linear\\nmodels: [{model: org/a}, {model: org/b}]").models[0].path
    'org/a'
    """
    from merger.run.prepare import parse_text

    _tell_notebook()
    return parse_text(text, name)


def check(recipe: AnyRecipe) -> Recipe:
    """Find all that is wrong with a recipe and can be known without its models.

    Raises:
        RecipeError: with every problem of it.

    >>> check({"merge_method": "linear", "models": [{"model": "org/a"}], "dtyp": "float32"})
    Traceback (most recent call last):
        ...
    merger.errors.RecipeError: recipe:4:1: unknown key 'dtyp'
        did you mean 'dtype'?
    """
    from merger.run.extras import refuse_missing
    from merger.run.prepare import any_recipe

    _tell_notebook()
    refuse_missing(found := any_recipe(recipe))
    return found


def plan(recipe: AnyRecipe, to: str | None = None, *, options: Options | None = None) -> Plan:
    """Pin the recipe's models and decide what will be made. No byte of a tensor is read.

    Args:
        recipe: what is made.
        to: where it would go: a folder, or ``hf://owner/name``; None: the recipe's publish.repo, or nowhere yet.
        options: what it may use besides.

    Raises:
        MergerError: the recipe is wrong, a model cannot be read, models do not fit, or the memory is too small.

    >>> plan("examples/recipes/linear.yaml").size
    2745456
    """
    from merger.run.prepare import options_for, plan
    from merger.statistics.kept import find_kept

    found = check(recipe)
    return plan(found, find_kept(found, options_for(options, to))[0])[0]


def merge(
    recipe: AnyRecipe,
    to: str | None = None,
    *,
    options: Options | None = None,
    on_event: Callable[[Event], object] | None = None,
) -> Result:
    """Make a merge and put it where it belongs.

    Args:
        recipe: what is made.
        to: where it goes: a folder, or ``hf://owner/name``; None: the recipe's publish.repo.
        options: what it may use besides.
        on_event: is told what happens on the way; what it raises ends the run.

    Raises:
        MergerError: any kind; the destination is then as it was before, and finished files wait for another run.

    >>> merge("examples/recipes/linear.yaml", to="./merged").shards[0].name
    'model.safetensors'
    """
    from merger.run.options import with_free_memory
    from merger.run.pipeline import ignore, merge
    from merger.run.prepare import options_for, plan
    from merger.statistics.kept import find_kept, measure_awaited

    found = check(recipe)
    chosen, awaited = find_kept(found, with_free_memory(options_for(options, to)))
    planned, library = plan(found, chosen)
    measure_awaited(awaited)
    return merge(planned, library, chosen, on_event or ignore)


def search(
    recipe: AnyRecipe,
    effort: Effort | None = None,
    *,
    options: Options | None = None,
    on_event: Callable[[SearchEvent], object] | None = None,
) -> Study:
    """Find the numbers that a recipe leaves open; see docs/search.md.

    Args:
        recipe: with a `search:` block. Of a file the study is kept beside it, and goes on where it stopped.
        effort: how many trials and minutes, where the study is kept, how many of the best are wanted.
        options: what it may use besides.
        on_event: is told what happens on the way; what it raises ends the run.

    Raises:
        MergerError: the recipe is wrong, a model cannot be read, or no candidate can be scored.

    >>> search("mine.yaml").values  # doctest: +SKIP
    {'models[./kjv].weight': 0.4137, 'models[./python].weight': 0.8209}
    """
    from merger.run.options import with_free_memory
    from merger.run.pipeline import ignore
    from merger.run.prepare import options_for
    from merger.statistics.kept import find_kept, measure_awaited

    found = check(recipe)
    chosen, awaited = find_kept(found, with_free_memory(options_for(options, None)))
    measure_awaited(awaited)
    from merger.searching.search import search  # takes what may be missing

    return search(found, chosen, effort, on_event or ignore)


def verify(model: str, *, everything: bool = False, tensors: int | None = None, seed: int | None = None) -> Report:
    """Compare a merge with what its lock promises, by a sample of its tensors that is made again.

    Args:
        model: a folder, or ``owner/name[@revision]`` on the Hub.
        everything: make all of it again.
        tensors: how many tensors the sample is drawn from; None: as many as the usual share of bytes allows.
        seed: draws the same sample again; None: another one.

    Raises:
        ModelError: the merge or a parent cannot be read.
        VerificationError: it has no lock, or one that nothing can be made from.

    >>> verify("./merged").passed
    True
    """
    from merger.run.options import Options, with_free_memory
    from merger.verification.verify import Extent, verify

    return verify(model, with_free_memory(Options()), Extent(everything, tensors, seed))


def diff(a: str, b: str) -> Contrast:
    """Compare two checkpoints tensor by tensor.

    Args:
        a: a folder, or ``owner/name[@revision]`` on the Hub.
        b: another one, or the same at another revision.

    Raises:
        ModelError: one of them cannot be read.

    >>> diff("./merged", "./merged").same
    True
    """
    from merger.system import cores
    from merger.verification.diff import contrast, pair

    return contrast(pair(a, b), cores())


def method(name: str) -> Method:
    """A merge method: what it computes, its parameters and its paper.

    Raises:
        RecipeError: there is none of that name.

    >>> [param.name for param in method("slerp").params]
    ['t']
    """
    from merger.methods.registry import named_method

    return named_method(name)
