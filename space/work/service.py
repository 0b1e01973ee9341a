"""What page, API and bot ask for alike: recipe in, plan or job out.

Not here: who is asking (page, api), what is taken from strangers (admission), and the queue (queue).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from merger.card.facts import PlanSummary
from merger.errors import Problem, RecipeError
from merger.run.artifacts import card, elders
from merger.run.pipeline import place_of
from merger.safety import secrets
from merger.safety.names import HUB, need_repo
from space.work import admission
from space.work.job_table import DEFAULT, How, QueuedMerge
from space.work.queue import MergeQueue, Token

if TYPE_CHECKING:
    from merger.planning.plan import Plan
    from merger.recipe.model import Recipe
    from merger.stores.ports import Store


@dataclass(frozen=True)
class Planned:
    """A recipe that fits here, and what it makes."""

    recipe: Recipe
    plan: Plan
    store: Store = field(repr=False)

    def summary(self, to: str | None = None) -> PlanSummary:
        """What page, API and bot tell of it, where it goes to this repo, or as the recipe says."""
        repo = to or self.recipe.publish.repo
        return PlanSummary(self.plan, None if repo is None else HUB + repo)

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
        if to is None:
            raise RecipeError(Problem("where shall the result go?", hint=f"write for example {owner}/my-merge"))
        self.refuse_loss(found, token.value, to, how)
        total = found.plan.nbytes
        return self.queue.submit(owner, token, text, HUB + to, admission.pinned_commits(found.plan), total, how)

    def refuse_loss(self, found: Planned, token: str, to: str, how: How = DEFAULT) -> None:
        """See, before it is queued, whether the merge would be refused for what lies in its repo already.

        Raises:
            UploadError: it would; OccupiedError: another model lies there.
        """
        need_repo(to)
        options = admission.options(None, self.queue.limits)
        options = replace(options, force=how.force, create_pr=how.create_pr, write_token=token)
        place_of(HUB + to, options, found.plan.locked).refuse_loss(found.plan.identity)
