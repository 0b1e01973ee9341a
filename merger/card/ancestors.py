"""The family of a merge: its parents, their own parents and so on, as far as cards and locks tell; and as a text tree.

All of it is somebody else's word: nothing here fails for what a card says or a Hub refuses. No place on a disk is ever
named, and of what only some may read no more than everybody may read elsewhere. Not here: the lock file of this merge
(lineage), and the picture (portrait).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from merger.card.facts import TITLE
from merger.errors import GatedError, MissingError
from merger.models.plain_yaml import load_yaml
from merger.models.side_files import LOCK_NAME
from merger.planning.plan import Plan
from merger.recipe.model import Recipe
from merger.safety.limits import RECORD
from merger.stores.ports import Located, Store

GENERATIONS = 6
"""How far back is looked, the merge's own parents being the first."""

LOOKUPS = 120
"""How many models are looked up at most."""

SECONDS = 20.0
"""How long all of that may take; what has not answered by then is told so."""

LOCAL = "local folder"
_AT_ONCE = 8
_NAME_LENGTH = 120
_MERGEKIT = "mergekit_config.yml"
_ON_HUB = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
_UNNAMED = "a model"
_RELATIONS = {"finetune": "fine-tune", "adapter": "adapter", "quantized": "quantised", "merge": "merge"}


@dataclass(frozen=True)
class Member:
    """A model of the family.

    Args:
        name: its name on the Hub, or a folder's last part.
        commit: 40 hex digits, where it is known.
        licence: as its card states it.
        made: how it was made of its parents, such as ``merge by ties`` or ``fine-tune``.
        note: why no more is known of it, or what a reader has to know before following it.
        parents: their numbers in the family.
    """

    name: str
    commit: str | None = None
    licence: str | None = None
    made: str | None = None
    note: str | None = None
    parents: tuple[int, ...] = ()

    @property
    def details(self) -> tuple[str, ...]:
        """All but its name and commit."""
        return tuple(text for text in (self.made, self.licence, self.note) if text)


@dataclass(frozen=True)
class Family:
    """The members, each once, the merge itself first; a circle among them is possible, for cards may say anything."""

    members: tuple[Member, ...]

    def tree(self) -> str:
        """As lines of text; what has been told above is not told again."""
        lines = [_label(self.members[0])]
        self._below(0, "", (0,), set(), lines)
        return "\n".join(lines)

    def _below(self, place: int, indent: str, path: tuple[int, ...], told: set[int], lines: list[str]) -> None:
        parents = self.members[place].parents
        for number, parent in enumerate(parents, 1):
            branch, trunk = ("└── ", "    ") if number == len(parents) else ("├── ", "│   ")
            circle, again = parent in path, parent in told and bool(self.members[parent].parents)
            end = " - names itself among its ancestors" if circle else " - its parents stand above" if again else ""
            lines.append(indent + branch + _label(self.members[parent]) + end)
            if not circle and not again:
                told.add(parent)
                self._below(parent, indent + trunk, (*path, parent), told, lines)


def _label(member: Member) -> str:
    commit = f" @ {member.commit[:12]}" if member.commit else ""
    details = f" ({', '.join(member.details)})" if member.details else ""
    return f"{member.name}{commit}{details}"


@dataclass(frozen=True)
class _Ref:
    """A model as another one's card or lock names it.

    Args:
        name: a name on the Hub; of a folder, its last part.
        commit: at which the lock has it; None: as it is now.
        licence: what the lock says of that.
        is_local: whether it lies on somebody's disk.
        is_hearsay: whether no public card names it: it is named only if everybody may read it.
    """

    name: str
    commit: str | None = None
    licence: str | None = None
    is_local: bool = False
    is_hearsay: bool = False

    @property
    def member(self) -> Member:
        """Of whom nothing but this is known."""
        if self.is_hearsay and not self.is_local:
            return Member(_UNNAMED)
        return Member(self.name, self.commit, self.licence, note=LOCAL if self.is_local else None)


@dataclass(frozen=True)
class _Answer:
    """What was found out of a model."""

    member: Member
    parents: tuple[_Ref, ...] = ()


_Ask = Callable[[], _Answer]


def family(
    planned: Plan, title: str, methods: Collection[str], store: Store, hub: Store | None, seconds: float = SECONDS
) -> Family:
    """Look up the ancestors of a merge, all of one generation at the same time.

    Args:
        title: what its card calls it.
        methods: the names of all merge methods, by which the cards of merges are understood.
        store: where the plan's models are.
        hub: where everybody finds their ancestors; None: nobody is asked, and they are only named.
        seconds: how long it may take.
    """
    recipe, models = planned.locked.recipe, planned.locked.parents
    held = [model for number, model in enumerate(models) if planned.locked.owner(number) == number]
    search = _Search(hub, methods, time.monotonic() + seconds)
    search.members.append(Member(title, made=_how(recipe), parents=tuple(range(1, len(held) + 1))))
    first: list[tuple[int, _Ask]] = []
    for model in held:
        located = _for_readers(replace(model.located, card=model.card), recipe.publish.private)
        place = search.add(_Ref(located.name, located.commit, is_local=located.commit is None))
        first.append((place, partial(_describe, located, store, methods)))
    search.grow(first)
    return Family(tuple(search.members))


def _for_readers(parent: Located, is_private: bool) -> Located:
    """A parent with as much of it as the readers of a public result may read; of a private one, with all."""
    if is_private or not (parent.private or parent.gated):
        return parent
    files = {name: info for name, info in parent.files.items() if name not in (LOCK_NAME, _MERGEKIT)}
    card = parent.card or {}
    stated = {key: card[key] for key in ("license", "license_name") if key in card} if parent.private else card
    return replace(parent, files=files, card=stated)


def _how(recipe: Recipe) -> str:
    """How the merge is made, in words."""
    if recipe.lora is not None and recipe.lora.extracted:
        return "LoRA extraction"
    if recipe.is_conversion:
        return "GGUF"
    used = dict.fromkeys(piece.method for document in recipe.documents for piece in document.slices)
    return f"merge by {', '.join(used)}" if recipe.mixture is None else TITLE.lower()


@dataclass
class _Search:
    """The family so far."""

    hub: Store | None
    methods: Collection[str]
    until: float
    members: list[Member] = field(default_factory=list)
    places: dict[str, dict[str | None, int]] = field(default_factory=dict)
    lookups: int = 0

    def add(self, ref: _Ref) -> int:
        """A member of whom nothing but what the reference says is known."""
        self.members.append(ref.member if self.hub is not None else replace(ref, is_hearsay=False).member)
        if not ref.is_local:
            self.places.setdefault(ref.name.casefold(), {})[ref.commit] = len(self.members) - 1
        return len(self.members) - 1

    def grow(self, wanted: list[tuple[int, _Ask]]) -> None:
        """Ask for these members, then for the parents they turn out to have, and so on."""
        for _ in range(GENERATIONS):
            answers = _all([ask for _, ask in wanted], self.until)
            asked, wanted = wanted, []
            for (place, _), answer in zip(asked, answers, strict=True):
                if answer is None:
                    self._remark(place, "no answer in time")
                    continue
                parents = tuple(dict.fromkeys(self._parent(ref, wanted) for ref in answer.parents))
                self.members[place] = self._merged(place, answer.member, parents)
        for place, _ in wanted:
            self._remark(place, "not looked up: too far back")

    def _merged(self, place: int, found: Member, parents: tuple[int, ...]) -> Member:
        named, commit = self.members[place], found.commit or self.members[place].commit
        if commit:
            self.places.setdefault(found.name.casefold(), {}).setdefault(commit, place)
        return replace(found, commit=commit, licence=found.licence or named.licence, parents=parents)

    def _remark(self, place: int, note: str) -> None:
        self.members[place] = replace(self.members[place], note=note)

    def _parent(self, ref: _Ref, wanted: list[tuple[int, _Ask]]) -> int:
        """Its number; one that is met for the first time will be asked for."""
        known = {} if ref.is_local else self.places.get(ref.name.casefold(), {})
        place = known.get(ref.commit, next(iter(known.values()), None) if ref.commit is None else None)
        if place is not None:
            return place
        place = self.add(ref)
        if ref.is_local:
            return place
        if self.hub is None:
            self._remark(place, "not looked up")
        elif self.lookups >= LOOKUPS:
            self._remark(place, "not looked up: the family is too large")
        else:
            self.lookups += 1
            wanted.append((place, partial(_looked_up, ref, self.hub, self.methods)))
        return place


def _all(asks: Sequence[_Ask], until: float) -> list[_Answer | None]:
    """All answers that come in time. Threads of our own: those of a pool would keep the program from ending."""
    answers: list[_Answer | None] = [None] * len(asks)
    waiting: SimpleQueue[int] = SimpleQueue()
    for number in range(len(asks)):
        waiting.put(number)

    def work() -> None:
        while time.monotonic() < until:
            try:
                number = waiting.get_nowait()
            except Empty:
                return
            answers[number] = asks[number]()

    threads = [Thread(target=work, daemon=True, name="lineage") for _ in range(min(_AT_ONCE, len(asks)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return list(answers)


def _looked_up(ref: _Ref, hub: Store, methods: Collection[str]) -> _Answer:
    """What the Hub knows of a model that a card or a lock names."""
    known = ref.member
    try:
        located = hub.locate(ref.name, ref.commit)
        known = Member(ref.name, ref.commit)  # it is there for everybody
        return _describe(located, hub, methods)
    except GatedError:
        note = "gated"
    except MissingError:
        note = "deleted, renamed or private"
    except Exception:  # whatever a stranger's repo brings about, the card of this merge comes out
        note = "could not be read"
    return _Answer(replace(known, note=note))


def _describe(located: Located, store: Store, methods: Collection[str]) -> _Answer:
    """What a model's card and its record of a merge tell; one request at most beyond finding it."""
    card = located.card or {}
    kinds = ((LOCAL, located.commit is None), ("private", located.private), ("gated", located.gated))
    note = next((kind for kind, holds in kinds if holds), None)
    record = _record(located, store)
    method = _method(card, methods) or (_text(record.get("merge_method")) if isinstance(record, Mapping) else None)
    parents = _parents_of(record) or _base_refs(card.get("base_model"))
    if located.commit is None:
        parents = tuple(replace(ref, is_hearsay=True) for ref in parents)
    member = Member(located.name, located.commit, _licence(card), _tell_method(card, method, len(parents)), note)
    return _Answer(member, parents)


def _record(located: Located, store: Store) -> Any:
    """What lies beside a merge to say what it was made of: our lock file, or mergekit's copy of the recipe."""
    name = next((name for name in (LOCK_NAME, _MERGEKIT) if name in located.files), None)
    if name is None or located.files[name].size > RECORD.most:
        return None
    try:
        return load_yaml(store.fetch(located, name).decode("utf-8", "replace"), RECORD)
    except Exception:  # gated, damaged, several documents, or built to hurt: what the card says has to do
        return None


def _parents_of(record: Any) -> tuple[_Ref, ...]:
    """The models that a record names, in its order."""
    models = record.get("models") if isinstance(record, Mapping) else None
    if isinstance(models, list) and all(isinstance(item, Mapping) and "commit" in item for item in models):
        return tuple(_locked_ref(item) for item in models)
    return tuple(dict.fromkeys(_ref(name) for name in _models_in(record)))


def _locked_ref(item: Mapping[str, Any]) -> _Ref:
    """A model of a lock file: without a commit it was a folder."""
    named, commit = _ref(str(item.get("model"))), item.get("commit")
    if not commit or named.is_local:
        return replace(named, name=_plain(named.name.rsplit("/", 1)[-1]), is_local=True)
    return replace(named, commit=str(commit), licence=_text(item.get("licence")))


def _models_in(recipe: Any) -> Iterable[str]:
    """Whatever stands behind `model` and `base_model` in a recipe of mergekit's, however deep."""
    if isinstance(recipe, list):
        for item in recipe:
            yield from _models_in(item)
    elif isinstance(recipe, Mapping):
        for key, value in recipe.items():
            if key in ("model", "base_model", "source_model") and isinstance(value, str):
                yield value
            else:
                yield from _models_in(value)


def _base_refs(base_model: Any) -> tuple[_Ref, ...]:
    """The models that a card calls its base."""
    names = base_model if isinstance(base_model, list) else [base_model]
    return tuple(dict.fromkeys(_ref(name) for name in names if isinstance(name, str) and name.strip()))


def _ref(text: str) -> _Ref:
    """A name on the Hub; anything else is a place on a disk, of which only the last part is told."""
    name = text.strip().split("+")[0].split("@")[0]
    if _ON_HUB.fullmatch(name):
        return _Ref(name)
    return _Ref(_plain(re.split(r"[/\\]", name.rstrip("/\\"))[-1]) or "a folder", is_local=True)


def _method(card: Mapping[str, Any], methods: Collection[str]) -> str | None:
    """A merge of ours names its methods among its tags."""
    tags = card.get("tags")
    if not isinstance(tags, list) or "merger" not in tags:
        return None
    return ", ".join(tag for tag in tags if isinstance(tag, str) and tag in methods) or None


def _tell_method(card: Mapping[str, Any], method: str | None, parents: int) -> str | None:
    if method is not None:
        return f"merge by {method}"
    relation = card.get("base_model_relation")
    stated = _RELATIONS.get(relation) if isinstance(relation, str) else None
    if stated is None and card.get("library_name") == "peft":
        stated = "adapter"
    return stated or ("merge" if parents > 1 else "fine-tune" if parents else None)


def _licence(card: Mapping[str, Any]) -> str | None:
    """As the card states it; `other` says nothing without its name."""
    stated = _text(card.get("license"))
    return (_text(card.get("license_name")) or stated) if stated == "other" else stated


def _text(value: Any) -> str | None:
    return (_plain(value) or None) if isinstance(value, str) else None


def _plain(text: str) -> str:
    """A stranger's words on one line, without what cannot be printed, and not too long."""
    flat = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return flat if len(flat) <= _NAME_LENGTH else flat[: _NAME_LENGTH - 1] + "…"
