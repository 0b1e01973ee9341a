"""What a recipe asks for beyond the package's own needs: which of its extras, and whether they are installed here.

Not here: what is done with them (evaluation, engine.router_init).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

from merger.errors import Problem, RecipeError, Span
from merger.methods.registry import methods
from merger.models.gguf.layout import ENDING
from merger.planning.budget import EMBEDDED
from merger.recipe.blocks.mixture import BY_CHANCE
from merger.recipe.model import Recipe
from merger.runtime import install_command

MEASURING = ("eval",)
MAKING = ("torch", "moe", *MEASURING)
"""What only the measuring of a result takes, and what only its making does."""

POSTGRES = ("postgresql://", "postgresql+psycopg://")
"""Addresses of databases whose driver is the extra's; who writes another driver brings it."""


@dataclass(frozen=True)
class Need:
    """A part of a recipe that takes an extra of the package.

    Args:
        extra: its name.
        packages: what is imported of it.
        what: the part, in words.
        at: where it stands in the recipe; `where`, the same by keys.
    """

    extra: str
    packages: tuple[str, ...]
    what: str
    at: Span | None = None
    where: str | None = None

    @property
    def missing(self) -> str:
        """The packages that are not installed here, as a sentence has them."""
        return " and ".join(package for package in self.packages if find_spec(package) is None)


def needs_of(recipe: Recipe, device: str = "cpu") -> Iterator[Need]:
    """What it takes wherever it is made, its evaluation last."""
    if device != "cpu":
        yield Need("torch", ("torch",), f"--device {device}")
    for document in recipe.documents:
        mixture = document.mixture
        if mixture is not None and mixture.gate_mode not in (EMBEDDED, *BY_CHANCE):
            what, at = f"gate_mode: {mixture.gate_mode}", mixture.gate_mode_at or mixture.at
            yield Need("moe", ("torch", "transformers"), what, at, "gate_mode")
        for method in dict.fromkeys(piece.method for piece in document.slices):
            if methods()[method].needs == "torch":
                yield Need("torch", ("torch",), f"merge_method: {method}", document.at, "merge_method")
    for measured in recipe.measures:
        yield Need("moe", ("torch", "transformers"), "statistics: measure", measured.at, "statistics")
    for ref in recipe.models:
        if ref.path.endswith(ENDING):
            yield Need("gguf", ("gguf",), "a model in GGUF", ref.at, f"models[{ref}]")
    if recipe.publish.gguf:
        yield Need("gguf", ("gguf",), "gguf", recipe.publish.gguf_at, "publish.gguf")
    if (searched := recipe.search) is not None:
        tasks = any(objective.kind == "task" for objective in (*searched.objectives, *searched.report))
        packages = ("optuna", "torch", "transformers", *(("lm_eval",) if tasks else ()))
        yield Need("search", (*packages, *(("cmaes",) if searched.sampler == "cmaes" else ())), "search", searched.at)
        if (searched.storage or "").startswith(POSTGRES):
            yield Need("postgres", ("psycopg",), "storage: postgresql://", searched.at, "search.storage")
    if (wanted := recipe.evaluate) is not None:
        packages = ("torch", "transformers", *(("lm_eval",) if wanted.tasks else ()))
        yield Need("eval", packages, "evaluate", wanted.at, "evaluate")


def refuse_missing(recipe: Recipe, device: str = "cpu", but: Collection[str] = ()) -> None:
    """Refuse a recipe that takes what is not installed here, with the command that installs it.

    Args:
        but: extras of what is not done here.

    Raises:
        RecipeError: with a problem for each part that takes it.
    """
    asked = [need for need in needs_of(recipe, device) if need.extra not in but]
    if missing := [need for need in asked if need.missing]:
        raise RecipeError([_refusal(need) for need in missing])


def _refusal(need: Need) -> Problem:
    what = f"{need.what} takes {need.missing}, which is not installed here"
    return Problem(what, need.at, need.where, install_command(need.extra))
