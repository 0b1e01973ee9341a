"""What page, API and bot ask for alike: recipe in, plan or job out.

Not here: who is asking (page, api), what is taken from strangers (admission), and the queue (queue).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from merger.card.facts import PlanSummary
from merger.errors import Problem, RecipeError
from merger.run.artifacts import card, elders
from merger.run.look import sampled_doubts
from merger.run.pipeline import place_of
from merger.safety import secrets
from merger.safety.names import HUB, need_repo
from space.work import admission
from space.work.job_table import DEFAULT, How, QueuedMerge
from space.work.queue import MergeQueue, Token
from space.work.search import PASTED

if TYPE_CHECKING:
    from merger.planning.plan import Plan
    from merger.recipe.model import Recipe
    from merger.stores.ports import Store

MOST_LETTERS = 100_000
"""Of a text that is pasted."""


@dataclass(frozen=True)
class Planned:
    """A recipe that fits here, and what it makes."""

    recipe: Recipe
    plan: Plan
    store: Store = field(repr=False)

    def summary(self, to: str | None = None) -> PlanSummary:
        """What page, API and bot tell of it, where it goes to this repo, or as the recipe says.

        Raises:
            ModelError: bytes of a model cannot be read.
        """
        repo = to or self.recipe.publish.repo
        return PlanSummary(self.plan, None if repo is None else HUB + repo, sampled_doubts(self.plan, self.store))

    def card(self) -> dict[str, bytes]:
        """The card's files, README.md and pictures, as far as they are known before anything is made."""
        older = elders(self.plan, True)
        return card(self.plan, self.recipe.publish.repo or "your-name/merge", {}, self.store, older).files


class Service:
    """Plans and submits.

    Args:
        queue: where merges wait their turn.
    """

    def __init__(self, queue: MergeQueue) -> None:
        self.queue = queue

    def plan(self, text: str, token: str | None) -> Planned:
        """What a recipe makes, with the models that this token may read; None reads public ones.

        Raises:
            MergerError: any kind; TooBigError where it could be made elsewhere.
        """
        recipe = admission.parse_recipe(text)
        options = admission.options(token, self.queue.limits)  # the token is watched for while these are there
        secrets.refuse_tokens({"the recipe": text})
        return Planned(recipe, *admission.plan_recipe(recipe, options, self.queue.limits))

    def submit(self, owner: str, token: Token, text: str, to: str | None = None, how: How = DEFAULT) -> QueuedMerge:
        """Queue a merge.

        Args:
            owner: whose job it is, and who may see and cancel it.
            token: what it reads the models and writes the result with; held in memory while the job is not over.
            to: ``owner/name``; None: the recipe's publish.repo.
            how: how it is made besides.

        Raises:
            MergerError: any kind; nothing is queued then.
        """
        found = self.plan(text, None if how.is_public else token.value)
        to = to or found.recipe.publish.repo
        if (searched := found.recipe.search) is not None:
            hint = "Search, beside Merge, finds its numbers"
            raise RecipeError(Problem("this recipe leaves numbers open", searched.at, "search", hint))
        if to is None:
            raise RecipeError(Problem("where shall the result go?", hint=f"write for example {owner}/my-merge"))
        self.refuse_loss(found, token.value, to, how)
        total = found.plan.nbytes
        return self.queue.submit(owner, token, text, HUB + to, admission.pinned_commits(found.plan), total, how)

    def search(self, owner: str, token: Token, text: str, texts: Mapping[str, str]) -> QueuedMerge:
        """Queue a search for the numbers that a recipe leaves open.

        Args:
            owner: whose job it is, and who may see and stop it.
            token: what it reads the models with; held in memory while the job is not over.
            texts: what was pasted, by the file that the recipe calls it.

        Raises:
            MergerError: any kind; nothing is queued then.
        """
        found = self.plan(text, token.value)
        searched = found.recipe.search
        if searched is None:
            hint = "leave one open, such as weight: {search: [0, 1]}, and write a block search:"
            raise RecipeError(Problem("nothing is searched in this recipe", hint=hint))
        secrets.refuse_tokens(texts)
        for each in (*searched.objectives, *searched.report):
            name = each.source.removeprefix("./")
            if name in PASTED and not texts.get(name, "").strip():
                raise RecipeError(Problem(f"{name} is empty", each.at, "search", "paste a text into its box"))
            if len(texts.get(name, "")) > MOST_LETTERS:
                what = f"{name} has {len(texts[name]):,} letters, and this Space reads {MOST_LETTERS:,}"
                raise RecipeError(Problem(what, each.at, "search", "shorten it: fewer make a trial quicker, too"))
        pins = admission.pinned_commits(found.plan)
        return self.queue.submit(owner, token, text, "", pins, searched.trials, texts=texts)

    def refuse_loss(self, found: Planned, token: str, to: str, how: How = DEFAULT) -> None:
        """See, before it is queued, whether the merge would be refused for what lies in its repo already.

        Raises:
            UploadError: it would; OccupiedError: another model lies there.
        """
        need_repo(to)
        options = admission.options(None, self.queue.limits)
        options = replace(options, force=how.force, create_pr=how.create_pr, write_token=token)
        place_of(HUB + to, options, found.plan.locked).refuse_loss(found.plan.identity)
