"""How far a search goes, and where it is kept; told without what a search takes. Not here: the search."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from merger.errors import Problem, RecipeError
from merger.recipe.blocks.search import PASSWORD, WITHOUT_PASSWORD
from merger.recipe.model import Recipe
from merger.recipe.searched import Searched


@dataclass(frozen=True)
class Effort:
    """How far a search goes; None where the recipe says it.

    Args:
        trials: how many candidates are tried in all.
        minutes: how long this run takes, at most.
        storage: where the study is kept.
        top: how many of the best are kept.
        join: only try candidates, and leave the report to another process of the same storage.
    """

    trials: int | None = None
    minutes: float | None = None
    storage: str | None = None
    top: int = 1
    join: bool = False

    def of(self, recipe: Recipe) -> Searched:
        """The recipe's own block with these in place of what it says.

        Raises:
            RecipeError: nothing is searched in the recipe, or a password stands in the storage, which is told to other
                processes and in errors.
        """
        if PASSWORD.search(self.storage or ""):
            raise RecipeError(Problem("a password stands in the storage's address", hint=WITHOUT_PASSWORD))
        if recipe.search is None:
            hint = "leave a number open, such as weight: {search: [0, 1]}, and write search: {objectives: [...]}"
            raise RecipeError(Problem(f"{recipe.path}: nothing is searched in it", hint=hint))
        given = {key: value for key in ("trials", "minutes", "storage") if (value := getattr(self, key)) is not None}
        searched, path = replace(recipe.search, **given), Path(recipe.path)
        if searched.storage is None and path.is_file():
            return replace(searched, storage=str(results_of(path) / "study.log"))
        return searched


def results_of(recipe: Path) -> Path:
    """The folder beside a recipe in which its search keeps what is no recipe."""
    return recipe.with_name(f"{recipe.stem}.search")
