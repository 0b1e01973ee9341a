"""Where a recipe that runs in mergekit means something else here, as far as the recipe alone shows it: `check` warns.

docs/mergekit.md has the table of these points. Not here: what shows only in models (that page's other parts), and where
methods depart (their own words).
"""

from __future__ import annotations

from dataclasses import dataclass

from merger.errors import Span
from merger.recipe.values import Value


@dataclass(frozen=True)
class Point:
    """One such point.

    Args:
        recipe: what stands in the recipe, for the table.
        here: what is done.
        there: what mergekit does.
        why: the reason, for the table.
        hint: the next step for whoever wants the other thing.
    """

    recipe: str
    here: str
    there: str
    why: str
    hint: str

    def warn(self, place: Value, what: str, at: Span | None = None) -> None:
        """Say it of `what`, which stands at `place`."""
        place.warn(f"{what} {self.here} (mergekit: {self.there})", self.hint, at)


BASE_ASIDE = Point(
    recipe="`linear`, a `base_model` that is not among its models, and a `weight` above them",
    here="gives config and tokenizer and is not merged",
    there="one model more, with the weight that stands above the models",
    why="Where config and tokenizer come from is not what is merged; and there the merge fails where each model has a "
    "weight of its own.",
    hint="to merge it too, list it among the models",
)
TWICE = Point(
    recipe="a model listed twice in one place",
    here="is listed twice, and counts twice",
    there="once, with the numbers of the first",
    why="What is written is done: there the second entry is dropped with its numbers and layers.",
    hint="take one of them out, unless that is meant",
)
LAST_SLICE = Point(
    recipe="a last slice with more sources than the first",
    here="are all merged into what follows the layers: final norm and head",
    there="only as many of them as the first slice has sources",
    why="What follows the layers belongs to the last slice; there the number of its sources is taken from the first.",
    hint="to have the same in both, give the first slice and the last equally many sources",
)
FLOAT64 = Point(
    recipe="`dtype: float64`",
    here="is not what methods compute in: that is float32, with sums, norms and angles in float64",
    there="all in float64",
    why="The result is rounded to `out_dtype` once, from numbers that are far closer than that.",
    hint="leave dtype out, or write float32: out_dtype is the result's",
)
OVERRIDE = Point(
    recipe="`override_architecture`",
    here="has no effect: the architecture is learned from the tensors' names",
    there="the table of tensors that it takes for the model",
    why="There is no such table here.",
    hint="take it out",
)

POINTS = (BASE_ASIDE, TWICE, LAST_SLICE, FLOAT64, OVERRIDE)
"""All of them, in the order of the table."""
