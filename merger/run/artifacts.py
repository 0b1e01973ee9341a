"""The small files beside tensors: card, pictures, lock, config, tokenizer. Not here: what a card says (card)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from merger.card.ancestors import family
from merger.card.facts import eval_results, lock_file, score_facts
from merger.card.licences import licence_notices
from merger.card.pictures.canvas import Picture
from merger.card.pictures.lineage import portrait
from merger.card.pictures.movement import movement_plot, settings_plot
from merger.card.relations import Relations, parameters, relations, tracks
from merger.card.render import render
from merger.evaluation.budget import Score, scores_text
from merger.methods.registry import methods
from merger.models import chat
from merger.models.checkpoint import SUFFIX, index_name
from merger.models.formats.safetensors import WrittenShard, index
from merger.models.side_files import CARD_NAME, EVALUATED_NAME, HUB_SCORES_NAME, LOCK_NAME, MEASURED_NAME
from merger.planning.geometry import Geometry, dump_geometry
from merger.planning.plan import Plan
from merger.run.found import SearchFacts
from merger.stores.ports import Content, FileInfo, Store, sha256_of, size_of
from merger.stores.resolve import Library

NOTHING: Mapping[str, str] = {}


@dataclass(frozen=True)
class Card:
    """What can be rendered anew, so that the lock says nothing of it.

    Args:
        text: of the card itself.
        related: how the parents relate, of which it has a table.
        pictures: that it shows.
        scores: what was measured of the merge and its parents.
        of_hub: those of the Hub's own data sets, as it reads them.
        beside: what a search has found, by the names of files.
    """

    text: str
    related: Relations
    pictures: tuple[Picture, ...] = ()
    scores: tuple[Score, ...] = ()
    of_hub: str | None = None
    beside: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def texts(self) -> dict[str, bytes]:
        """The files that are text."""
        measured = scores_text(self.scores) if self.scores else None
        found = {CARD_NAME: self.text, EVALUATED_NAME: measured, HUB_SCORES_NAME: self.of_hub, **self.beside}
        return {name: text.encode() for name, text in found.items() if text}

    @property
    def files(self) -> dict[str, bytes]:
        """All of them; pictures are drawn."""
        return {**self.texts, **{file: drawn for picture in self.pictures for file, drawn in picture.files.items()}}


def card(
    planned: Plan,
    name: str,
    seen: Mapping[str, Geometry],
    store: Store,
    elders: Store | None,
    scores: Sequence[Score] = (),
    more: Mapping[str, str] = NOTHING,
    found: SearchFacts | None = None,
) -> Card:
    """The card of a merge.

    Args:
        name: ``owner/name``, or the folder's last part.
        seen: how parents and result lie to each other, by tensor.
        store: where the parents' cards are.
        elders: where those of their own parents are; None: nowhere.
        more: what else its front matter says.
        found: what a search has found, if one has.

    Raises:
        RecipeError: the recipe's own template cannot be rendered.
    """
    tree = family(planned, name, methods(), store, elders)
    model = planned.locked.recipe.lora is None
    inforce = parameters(planned, methods()) if model else ()
    moved = tracks(planned, seen) if model else ()
    drawn = [portrait(tree), settings_plot(inforce), movement_plot(moved)]
    pictures = tuple(picture for picture in drawn if picture is not None)
    shown = {picture.name: {"alt": picture.alt, "place": picture.place} for picture in pictures}
    related = relations(planned, seen)
    searched = {} if found is None else {"search": found.part}
    told = {**searched, "related": related, "lineage": tree.tree(), "pictures": shown, "chats": chats(planned, store)}
    measured = score_facts(scores, name)
    metadata = {**measured.pop("metadata", {}), **more}
    text = render(planned, methods(), name, {**told, **measured, "metadata": metadata})
    of_hub = eval_results(scores, name if "/" in name else None)
    beside = {} if found is None else found.texts
    return Card(text, related, (*pictures, *(found.pictures if found else ())), tuple(scores), of_hub, beside)


def chats(planned: Plan, store: Store) -> bool:
    """Whether the result has a chat template.

    Raises:
        ModelError: the file of a model that may hold one cannot be read.
    """
    if planned.texts.template is not None:
        return True
    files = {name: planned.locked.models[number].located for name, number in planned.texts.taken.items()}
    return chat.template({name: store.fetch(files[name], name) for name in chat.FILES if name in files}) is not None


def elders(planned: Plan, to_hub: bool) -> Store | None:
    """Where the parents' own parents are looked up; nowhere, for a merge that has nothing to do with the Hub.

    Without a token: which they are is a stranger's word, and what is found is told to whoever reads the card.
    """
    if not to_hub and all(model.located.commit is None for model in planned.locked.models):
        return None
    from merger.stores.hub.store import HubStore

    return HubStore(False)


def small_files(
    planned: Plan, store: Library, shards: tuple[WrittenShard, ...], seen: Mapping[str, Geometry]
) -> dict[str, Content]:
    """All that stands beside shards and card; index and config come last, for they make it look like a model."""
    proven: dict[str, Content] = {"recipe.yaml": planned.locked.recipe.text.encode()}
    proven |= (
        {MEASURED_NAME: dump_geometry(seen).encode()}
        | licence_notices(planned, store.taken)
        | used_files(planned, store)
    )
    written = {shard.name: FileInfo(shard.size, shard.sha256) for shard in shards}
    written |= {name: FileInfo(size_of(data), sha256_of(data)) for name, data in proven.items()}
    lock = lock_file(planned, written, store.checksum)
    return {LOCK_NAME: lock.encode(), **proven}


def used_files(planned: Plan, store: Library) -> dict[str, Content]:
    """The small files that it takes to use the result."""
    return taken_files(planned, store) | model_files(planned)


def taken_files(planned: Plan, store: Library) -> dict[str, Content]:
    """The models' small files that the result has, with all that is written into them anew.

    Raises:
        ModelError: one of them cannot be read.
    """
    places = {name: planned.locked.models[number].located for name, number in planned.texts.taken.items()}
    edited = {name: store.fetch(places[name], name) for name in planned.texts.changing if name in places}
    copied = [name for name in places if name not in edited]
    found = store.taken([(places[name], name) for name in copied])
    made = {**edited, **dict(zip(copied, found, strict=True))}
    return {name: made[name] for name in places} | planned.texts.edit(edited)


def model_files(planned: Plan) -> dict[str, bytes]:
    """The index, where there are several shards, and config.json: all that the plan says of them; of GGUF none."""
    if not planned.locked.recipe.publish.safetensors:
        return {}
    files, shards = {}, [shard for shard in planned.shards if "/" not in shard.name]
    if len(shards) > 1:
        weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.stored}
        name = index_name(planned.locked.config_owner.checkpoint.stem + SUFFIX)
        total = sum(tensor.nbytes for shard in shards for tensor in shard.stored)
        files[name] = index(dict(sorted(weight_map.items())), total)
    if planned.config:
        files[planned.config_name] = (json.dumps(planned.config, indent=2) + "\n").encode()
    return files
