"""A place in a recipe: a value, the words for where it stands, and readers that note what is wrong with it.

A reader returns None for what it cannot read and has then said why, so that reading goes on and every problem is found
at once. Not here: the keys of the language (parse) and what they mean (checks).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from merger.errors import Problem, Span, did_you_mean
from merger.recipe import spans
from merger.recipe.spans import Node, Scalar
from merger.safety.numbers import ANY, Range

Hints = dict[str, str]
"""Next steps for keys that are unknown in one place and known in another."""


@dataclass
class Notes:
    """Everything found in one reading; a thing said twice about one place (by way of an alias) is noted once."""

    errors: dict[tuple[Span, str], Problem] = field(default_factory=dict)
    warnings: dict[tuple[Span, str], Problem] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """A value in the recipe.

    Args:
        node: the value.
        where: its identity, such as ``models[org/a].parameters.density``; empty for the whole document.
        notes: where problems go.
        key_at: where its key stands, if it has one.
    """

    node: Node
    where: str
    notes: Notes
    key_at: Span | None = None

    @property
    def at(self) -> Span:
        return self.node.at

    @property
    def key(self) -> Span:
        """Where its key stands; where it has none, the value."""
        return self.key_at or self.node.at

    @property
    def empty(self) -> bool:
        """Whether there is nothing behind the key."""
        return isinstance(self.node, Scalar) and self.node.value is None

    @property
    def hollow(self) -> bool:
        """Whether there is nothing behind the key, or a list or map of nothing."""
        if isinstance(self.node, spans.Sequence):
            return not self.node.items
        return not self.node.entries if isinstance(self.node, spans.Mapping) else self.empty

    def error(self, what: str, hint: str | None = None, at: Span | None = None) -> None:
        at = at or self.at
        self.notes.errors.setdefault((at, what), Problem(what, at, self.where or None, hint))

    def warn(self, what: str, hint: str | None = None, at: Span | None = None) -> None:
        at = at or self.at
        self.notes.warnings.setdefault((at, what), Problem(what, at, self.where or None, hint))

    def expected(self, what: str, hint: str) -> None:
        self.error(f"expected {what}, found {spans.kind(self.node)}", hint)

    def text(self, what: str = "text") -> str | None:
        """The value, if it is text that holds anything."""
        if isinstance(self.node, Scalar) and isinstance(self.node.value, str) and self.node.value.strip():
            return self.node.value
        single = isinstance(self.node, Scalar) and not isinstance(self.node.value, str) and not self.empty
        self.expected(what, "put it in quotes if it is text" if single else f"write {what}")
        return None

    def holds(self, text: str) -> bool:
        """Whether this is the value, case aside."""
        value = self.node.value if isinstance(self.node, Scalar) else None
        return isinstance(value, str) and value.strip().lower() == text

    def flag(self) -> bool | None:
        """The value, if it is true or false, in quotes or without."""
        value = self.node.value if isinstance(self.node, Scalar) else None
        found = spans.truth(value) if isinstance(value, str) else value
        if isinstance(found, bool):
            return found
        self.expected("true or false", "write true or false")
        return None

    def outside(self, value: float, within: Range, hint: str) -> None:
        """Say that a number is not one that can be meant here."""
        self.error(f"{spans.number(value)} is outside {within}", hint)

    def whole(self, within: Range, hint: str) -> int | None:
        """The value, if it is an integer of that range; 2.0 and "2" are one, true is not."""
        value = self.node.value if isinstance(self.node, Scalar) else None
        if isinstance(value, str):
            value = spans.numeric(value)
        if isinstance(value, bool) or not (isinstance(value, int) or (isinstance(value, float) and value.is_integer())):
            self.expected("a whole number", hint)
            return None
        if within.holds(value):
            return int(value)
        self.outside(value, within, hint)
        return None

    def number(self, hint: str = "write a number such as 0.5", within: Range = ANY) -> float | None:
        """The value as a number, in quotes or without (YAML 1.1 takes 1e-10 for text); booleans count as 1 and 0."""
        value = self.node.value if isinstance(self.node, Scalar) else None
        if isinstance(value, str):
            told = spans.truth(value)
            value = spans.numeric(value) if told is None else told
        if not isinstance(value, int | float):
            self.expected("a number", hint)
            return None
        try:
            found = float(value)
        except OverflowError:
            found = math.inf
        if not math.isfinite(found) and not isinstance(value, int):
            self.expected("a finite number", hint)
        elif not within.holds(found):
            self.outside(value if isinstance(value, int) else found, within, hint)
        else:
            return found
        return None

    def items(self, what: str, name: Callable[[Node], str | None] | None = None) -> list[Place]:
        """The places of a list's items; `name` gives an item's identity, in want of which its number serves."""
        if not isinstance(self.node, spans.Sequence):
            self.expected(what, "write its items below it, each behind a dash")
            return []
        if not self.node.items:
            self.error("an empty list", f"write {what}", self.key)
        names = [(name(node) if name else None) or str(index) for index, node in enumerate(self.node.items)]
        return [Place(node, f"{self.where}[{of}]", self.notes) for node, of in zip(self.node.items, names, strict=True)]

    def entries(self, what: str) -> dict[str, Place] | None:
        """The places of a map's values, whatever its keys."""
        if not isinstance(self.node, spans.Mapping):
            self.expected(what, "write one line a key, such as key: value")
            return None
        return {e.key: Place(e.value, f"{self._stem}{e.key}", self.notes, e.at) for e in self.node.entries}

    @property
    def _stem(self) -> str:
        return f"{self.where}." if self.where else ""

    def fields(self, what: str, known: tuple[str, ...], hints: Hints | None = None) -> Fields | None:
        """A map of which all keys are known. A misspelt key is an error, and then read as what it resembles."""
        found = self.entries(what)
        if found is None:
            return None
        for key in [key for key in found if key not in known]:
            place = found.pop(key)
            meant = nearest(key, known)
            elsewhere = (hints or {}).get(nearest(key, hints or {}) or "") if meant is None else None
            self.error(f"unknown key {key!r}", elsewhere or did_you_mean(key, known), place.key)
            if meant and meant not in found:
                found[meant] = replace(place, where=f"{self._stem}{meant}")
        return Fields(self, found)


@dataclass(frozen=True)
class Fields:
    """The known keys of a map."""

    place: Place
    places: dict[str, Place]

    def get(self, key: str) -> Place | None:
        """What stands behind `key`, unless there is no such key or nothing behind it."""
        place = self.places.get(key)
        return None if place is None or place.empty else place

    def need(self, key: str, hint: str) -> Place | None:
        """The same for a key that must be there."""
        if self.get(key) is None:
            empty = self.places.get(key)
            self.place.error(f"missing {key}", hint, empty.key if empty else None)
        return self.get(key)


def nearest(word: str, known: Iterable[str], cutoff: float = 0.8) -> str | None:
    """The known word that `word` is most likely a misspelling of."""
    near = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=cutoff)
    return near[0] if near else None
