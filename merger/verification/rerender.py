"""The card of a finished merge, rendered again without merging: from its lock, and what was measured on the way.

Not here: what a card says (card.render), and the merge's other files, which stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from merger.errors import Problem, RecipeError, VerificationError
from merger.lock.lock import lock
from merger.models.side_files import CARD_NAME
from merger.planning.lockfile import changed_models, other_plan
from merger.run.extras import MAKING, refuse_missing
from merger.run.options import Options
from merger.run.pipeline import place_of
from merger.run.prepare import kept_of, planned_again, stores_of, with_templates
from merger.safety.names import HUB, need_repo
from merger.stores.ports import Published
from merger.verification.published import Merge, card_again, holds, open_merge


@dataclass(frozen=True)
class Recarded:
    """A card that was rendered again.

    Args:
        merge: whose it is.
        files: those of its files that are others than before.
        text: the card's text.
    """

    merge: Merge
    files: Mapping[str, bytes] = field(repr=False)
    text: str = field(repr=False)

    @property
    def destination(self) -> str:
        """Where it belongs."""
        located = self.merge.located
        return located.where if located.commit is None else HUB + located.where


def recard(target: str, options: Options, template: str | None = None, new_version: str | None = None) -> Recarded:
    """Render a merge's card from its lock; no tensor is read, and nothing is written.

    Args:
        target: a folder, or ``owner/name`` on the Hub, with or without ``hf://``.
        options: the token to read with, and whether the cache is used.
        template: a file or folder of templates, in place of the lock's, which are on the Hub or left out.
        new_version: ``owner/name`` of a model that takes its place; None: the one that the card names, if it does.

    Raises:
        RecipeError: a revision is named, but a card can only go to main; the template cannot be rendered; or its plan
            takes what is not installed here.
        ModelError: the merge or one of its models cannot be read.
        VerificationError: it has no lock, or its lock is not that of a merge of these models.
    """
    if new_version is not None:
        need_repo(new_version)
    merge = open_merge(target, options.read_token)
    held = merge.held
    if merge.located.commit is not None and "@" in target:
        raise RecipeError(Problem(f"{target}: a card is written to main", hint="leave out the revision"))
    recipe = merge.recipe
    if template is not None:
        recipe = replace(recipe, publish=replace(recipe.publish, template=template, template_at=None))
    refuse_missing(recipe, but=MAKING)
    options = replace(options, measured=kept_of(recipe, held))
    parents = stores_of(recipe, options, merge.root)
    locked = lock(recipe, parents, held.pins, options.allow_pickle, named=held.names, measured=options.measured)
    planned = planned_again(held, locked, options)
    planned = with_templates(planned, parents, options.root)  # the lock names none of this machine
    if problems := [*changed_models(locked, held, None), *other_plan(planned, held)]:
        raise VerificationError(problems)
    files = card_again(merge, planned, parents, new_version).files
    others = {name: content for name, content in files.items() if not holds(merge, name, content)}
    return Recarded(merge, others, files[CARD_NAME].decode())


def write_card(made: Recarded, options: Options) -> Published | None:
    """Write the card where it belongs; None where it is there already.

    Raises:
        UploadError: the destination refuses the card, or has moved on since it was read.
    """
    if not made.files:
        return None
    place = place_of(made.destination, options)
    place.check_card(made.text)
    return place.amend(made.files, "Render the card again", made.merge.located)
