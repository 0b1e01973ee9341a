"""What stands behind the keys, with its place; and how recipes give a parameter its value.

    setting   := number | gradient | [rule, ...] | rule
    gradient  := [number, ...]
    rule      := {value: number | gradient, filter: text}

Not here: how recipes name models (references), and whether a method knows the parameter (checks).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from merger.errors import Problem, Span, did_you_mean
from merger.recipe import spans
from merger.recipe.model import Parameters, Rule, Setting
from merger.recipe.spans import Node, Scalar
from merger.safety.numbers import ANY, Range

Hints = dict[str, str]
"""Next steps for keys that are unknown in one place and known in another."""


@dataclass
class Notes:
    """Everything found in one reading; a thing said twice about one place (by way of an alias) is noted once."""

    errors: dict[tuple[Span, str], Problem] = field(default_factory=dict)
    warnings: dict[tuple[Span, str], Problem] = field(default_factory=dict)

    def error(self, what: str, at: Span | None, where: str | None, hint: str | None) -> None:
        assert at is not None
        self.errors.setdefault((at, what), Problem(what, at, where, hint))

    def warn(self, what: str, at: Span | None, where: str | None, hint: str | None) -> None:
        assert at is not None
        self.warnings.setdefault((at, what), Problem(what, at, where, hint))


@dataclass(frozen=True)
class Value:
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
        self.notes.error(what, at or self.at, self.where or None, hint)

    def warn(self, what: str, hint: str | None = None, at: Span | None = None) -> None:
        self.notes.warn(what, at or self.at, self.where or None, hint)

    def expected(self, what: str, hint: str) -> None:
        self.error(f"expected {what}, found {spans.node_kind(self.node)}", hint)

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

    def items(self, what: str, name: Callable[[Node], str | None] | None = None) -> list[Value]:
        """The places of a list's items; `name` gives an item's identity, in want of which its number serves."""
        if not isinstance(self.node, spans.Sequence):
            self.expected(what, "write its items below it, each behind a dash")
            return []
        if not self.node.items:
            self.error("an empty list", f"write {what}", self.key)
        names = [(name(node) if name else None) or str(index) for index, node in enumerate(self.node.items)]
        return [Value(node, f"{self.where}[{of}]", self.notes) for node, of in zip(self.node.items, names, strict=True)]

    def entries(self, what: str, in_place: str = "") -> dict[str, Value] | None:
        """The places of a map's values, whatever its keys; `in_place` is the hint where a text stands in its place."""
        if not isinstance(self.node, spans.Mapping):
            text = self.node.value if isinstance(self.node, Scalar) and in_place else None
            hint = in_place.format(text) if isinstance(text, str) else "write one line a key, such as key: value"
            self.expected(what, hint)
            return None
        return {e.key: Value(e.value, f"{self._stem}{e.key}", self.notes, e.at) for e in self.node.entries}

    @property
    def _stem(self) -> str:
        return f"{self.where}." if self.where else ""

    def fields(
        self, what: str, known: tuple[str, ...], hints: Hints | None = None, in_place: str = ""
    ) -> Fields | None:
        """A map of which all keys are known. A misspelt key is an error, and then read as what it resembles."""
        found = self.entries(what, in_place)
        if found is None:
            return None
        for key in [key for key in found if key not in known]:
            place = found.pop(key)
            meant = None if key in (hints or {}) else nearest(key, known)
            elsewhere = (hints or {}).get(nearest(key, hints or {}) or "") if meant is None else None
            self.error(f"unknown key {key!r}", elsewhere or did_you_mean(key, known), place.key)
            if meant and meant not in found:
                found[meant] = replace(place, where=f"{self._stem}{meant}")
        return Fields(self, found)


@dataclass(frozen=True)
class Fields:
    """The known keys of a map."""

    place: Value
    places: dict[str, Value]

    def get(self, key: str) -> Value | None:
        """What stands behind `key`, unless there is no such key or nothing behind it."""
        place = self.places.get(key)
        return None if place is None or place.empty else place

    def need(self, key: str, hint: str) -> Value | None:
        """The same for a key that must be there."""
        if self.get(key) is None:
            empty = self.places.get(key)
            self.place.error(f"missing {key}", hint, empty.key if empty else None)
        return self.get(key)

    def flag(self, key: str) -> bool:
        """Whether `key` is there and says true."""
        place = self.get(key)
        return bool(place and place.flag())

    def text(self, key: str, what: str) -> str | None:
        """The text behind `key`, if it is there."""
        place = self.get(key)
        return place.text(what) if place else None

    def whole(self, key: str, within: Range, hint: str) -> int | None:
        """The integer behind `key`, if it is there."""
        place = self.get(key)
        return place.whole(within, hint) if place else None

    def wholes(self, ranges: Mapping[str, Range]) -> dict[str, Any]:
        """The integers behind those of the keys that are there."""
        found = {key: self.whole(key, within, f"a whole number from {within}") for key, within in ranges.items()}
        return {key: value for key, value in found.items() if value is not None}

    def number(self, key: str, hint: str, within: Range = ANY) -> float | None:
        """The number behind `key`, if it is there."""
        place = self.get(key)
        return place.number(hint, within) if place else None


def nearest(word: str, known: Iterable[str], cutoff: float = 0.8) -> str | None:
    """The known word that `word` is most likely a misspelling of."""
    near = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=cutoff)
    return near[0] if near else None


RULE = ("value", "filter")


@dataclass(frozen=True)
class Number:
    """One number of a setting, and where it stands."""

    value: float
    place: Value


@dataclass(frozen=True)
class WrittenParameter:
    """One parameter in a block.

    Args:
        place: its value.
        numbers: every number in that value, gradients and rules alike.
        even: whether it has no gradient whose numbers differ.
    """

    place: Value
    numbers: tuple[Number, ...]
    even: bool


@dataclass(frozen=True)
class SettingsBlock:
    """A `parameters:` block: its settings, and where everything in them stands; no place where there is no block."""

    settings: Parameters
    written: Mapping[str, WrittenParameter]
    place: Value | None


def read_parameters(fields: Fields) -> SettingsBlock:
    """The block under the key ``parameters``; an empty one where there is none."""
    place = fields.get("parameters")
    entries = place.entries("a map from parameters to their values") if place else None
    for value in (entries or {}).values():
        if _says_nothing(value):
            value.warn("an empty list gives no value, so that of the level above holds", "take it out", value.key)
    read = {name: _setting(value) for name, value in (entries or {}).items() if not _says_nothing(value)}
    settings = {name: setting for name, (setting, _) in read.items()}
    return SettingsBlock(settings, {name: written for name, (_, written) in read.items()}, place)


def _says_nothing(place: Value) -> bool:
    return isinstance(place.node, spans.Sequence) and not place.node.items


_GRADIENT = "a number, or a list of numbers: the values from the slice's first layer to its last"
_RULES = "write - value: 0.5 with or without filter: some_text for each item"


def _setting(place: Value) -> tuple[Setting, WrittenParameter]:
    ruled = [(_rule(rule), rule) for rule in _rules(place)]
    pairs = ruled or [((_gradient(place), None), place)]
    rules = [Rule(tuple(n.value for n in numbers), of, at.at) for (numbers, of), at in pairs]
    ends = next((index for index, rule in enumerate(rules) if rule.matches("")), len(rules))
    for _, at in pairs[ends + 1 :]:
        hint = "put the rule without a filter last"
        at.warn("never reached: a rule above it already speaks about every tensor", hint)
    even = all(len(set(rule.values)) <= 1 for rule in rules)
    return Setting(tuple(rules)), WrittenParameter(place, tuple(n for (numbers, _), _ in pairs for n in numbers), even)


def _rules(place: Value) -> list[Value]:
    """The places of the {value, filter} maps, if that is what the setting is made of."""
    if isinstance(place.node, spans.Mapping):
        return [place]
    if not isinstance(place.node, spans.Sequence):
        return []
    if not any(isinstance(item, spans.Mapping) for item in place.node.items):
        return []
    return place.items("a list of numbers or of {value, filter} maps", filter_of)


def filter_of(node: Node) -> str | None:
    """The text behind the key ``filter``, read without judging it."""
    entries = node.entries if isinstance(node, spans.Mapping) else ()
    found = next((entry.value for entry in entries if entry.key == "filter"), None)
    return found.value if isinstance(found, Scalar) and isinstance(found.value, str) else None


def _rule(place: Value) -> tuple[tuple[Number, ...], str | None]:
    if not isinstance(place.node, spans.Mapping):
        place.expected("a {value, filter} map like the other items of the list", _RULES)
        return (), None
    fields = place.fields("a {value, filter} map", RULE)
    value, wanted = (fields.need("value", _RULES), fields.get("filter")) if fields else (None, None)
    if wanted is None or wanted.holds(""):
        return (_gradient(value) if value else ()), None
    return (_gradient(value) if value else ()), wanted.text("a part of a tensor's name")


def _gradient(place: Value) -> tuple[Number, ...]:
    if isinstance(place.node, Scalar):
        return _numbers([place], f"write {_GRADIENT}")
    return _numbers(place.items(_GRADIENT), "write a number such as 0.5")


def _numbers(places: list[Value], hint: str) -> tuple[Number, ...]:
    read = [(place.number(hint), place) for place in places]
    return tuple(Number(value, place) for value, place in read if value is not None)
