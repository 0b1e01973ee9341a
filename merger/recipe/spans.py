"""YAML text as a tree whose every key and value knows its line and column.

Values are those of PyYAML's SafeLoader (YAML 1.1), but for 1:30, which is text here and not 90. The tree is built
straight from the parser's events, so that aliases are counted as if written out but are never written out.
Not here: what any key means (parse).
"""

from __future__ import annotations

import datetime
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import yaml

from merger.errors import Problem, RecipeError, Span
from merger.safety.limits import DOCUMENTS, RECIPE
from merger.safety.numbers import quoted_short

MAX_CHARACTERS = RECIPE.most
MAX_NODES = RECIPE.values or 0
MAX_DEPTH = 40
MAX_DIGITS = 400  # Python's int refuses 4,301 digits in words of its own

Value: TypeAlias = str | int | float | bool | datetime.date | None


@dataclass(frozen=True)
class Scalar:
    """One value, as YAML 1.1 understands it."""

    value: Value
    at: Span


@dataclass(frozen=True)
class Sequence:
    """A list."""

    items: tuple[Node, ...]
    at: Span


@dataclass(frozen=True)
class Entry:
    """A key of a map with its value; `at` is the key's place."""

    key: str
    at: Span
    value: Node


@dataclass(frozen=True)
class Mapping:
    """A map, every key once, in the text's order."""

    entries: tuple[Entry, ...]
    at: Span


Node: TypeAlias = Scalar | Sequence | Mapping


@dataclass(frozen=True)
class Documents:
    """The documents of a text that hold anything.

    Args:
        roots: their trees.
        problems: what is wrong with them that does not hinder reading on.
        shared: where the values stand that aliases stand for.
    """

    roots: tuple[Node, ...]
    problems: tuple[Problem, ...]
    shared: frozenset[Span] = frozenset()


def read_nodes(text: str, path: str) -> Documents:
    """The tree of every document in `text`.

    Args:
        path: the file's name as the user gave it.

    Raises:
        RecipeError: where there is no tree to speak of: no YAML, too long, aliases that explode or hold themselves.
    """
    text = text.removeprefix("\ufeff")
    lines = _Lines(path, text)
    if len(text) > MAX_CHARACTERS:
        raise RecipeError(
            Problem(
                f"the recipe is {len(text):,} characters long; at most {MAX_CHARACTERS:,} are read",
                lines.span(0),
                hint="a recipe names models and holds none; check that this is the right file",
            )
        )
    unprintable = _UNPRINTABLE.search(text)
    if unprintable:
        what = f"YAML does not allow the character U+{ord(unprintable.group()):04X}"
        raise RecipeError(Problem(what, lines.span(unprintable.start()), hint="delete it, or save the file as UTF-8"))
    return _Reader(text, lines).documents()


_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# libyaml where there is one: the parser in Python is some forty times slower
_Parser: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG = "tag:yaml.org,2002:"
_SCALARS = {
    _TAG + "str": "text",
    _TAG + "int": "a number",
    _TAG + "float": "a number",
    _TAG + "bool": "true or false",
    _TAG + "null": "null",
    _TAG + "timestamp": "a date",
}
_NUMBERS = (_TAG + "int", _TAG + "float")
_MERGE = _TAG + "merge"
_RESOLVER: Any = yaml.SafeLoader("")  # knows what words stand for, and keeps nothing of what it is asked


class _Lines:
    """Character offsets as lines and columns, counted as editors count them."""

    def __init__(self, path: str, text: str) -> None:
        self.path = path
        # YAML also ends a line at U+0085, U+2028 and U+2029, where editors do not: so its own line numbers are not used
        self.starts = [0, *(end.end() for end in re.finditer(r"\r\n|\r|\n", text))]

    def span(self, offset: int) -> Span:
        line = bisect_right(self.starts, offset)
        return Span(self.path, line, offset - self.starts[line - 1] + 1)


@dataclass(frozen=True)
class _Anchor:
    """What an alias stands for; no node while its own text is still being read."""

    node: Node | None
    size: int


class _Reader:
    """One reading of one text."""

    def __init__(self, text: str, lines: _Lines) -> None:
        self.text = text
        self.lines = lines
        self.events: Iterator[Any] = iter(())
        self.anchors: dict[str, _Anchor] = {}
        self.size = 0
        self.problems: list[Problem] = []
        self.shared: set[Span] = set()

    def documents(self) -> Documents:
        roots = []
        try:
            self.events = yaml.parse(self.text, Loader=_Parser)
            while not isinstance(event := next(self.events), yaml.StreamEndEvent):
                if isinstance(event, yaml.DocumentStartEvent):
                    self.anchors.clear()
                    roots.append(self._node(next(self.events), 1))
                    if len(roots) > DOCUMENTS.most:
                        what = f"the file holds more than {DOCUMENTS.most} documents"
                        self._stop(what, roots[-1].at, "make some of them first, and name the folders they made")
        except yaml.MarkedYAMLError as error:
            self._not_yaml(error)
        except yaml.YAMLError as error:
            self._stop(f"not valid YAML: {error}", self.lines.span(0), "save the file as UTF-8 text")
        held = tuple(root for root in roots if not (isinstance(root, Scalar) and root.value is None))
        return Documents(held, tuple(self.problems), frozenset(self.shared))

    def _node(self, event: Any, depth: int) -> Node:
        at = self.lines.span(event.start_mark.index)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(str(event.anchor), at)
        if depth > MAX_DEPTH:
            self._stop(f"nested more than {MAX_DEPTH} deep", at, "no part of a recipe goes that deep; close a bracket")
        before = self.size
        self._grow(1, at)
        if event.anchor:
            self.anchors[event.anchor] = _Anchor(None, 0)
        node = self._fresh(event, at, depth)
        if event.anchor:
            self.anchors[event.anchor] = _Anchor(node, self.size - before)
        return node

    def _fresh(self, event: Any, at: Span, depth: int) -> Node:
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event, at)
        if isinstance(event, yaml.SequenceStartEvent):
            self._collection_tag(event, "seq", at)
            return self._sequence(at, depth)
        self._collection_tag(event, "map", at)
        return self._mapping(at, depth)

    def _alias(self, name: str, at: Span) -> Node:
        anchor = self.anchors.get(name)
        if anchor is None:
            self._stop(f"*{name} stands for nothing", at, f"write &{name} before the value it shall stand for")
        if anchor.node is None:
            self._stop(f"*{name} stands inside the value it stands for", at, "write that value out")
        self._grow(anchor.size, at)
        self.shared.add(anchor.node.at)
        return anchor.node

    def _grow(self, by: int, at: Span) -> None:
        self.size += by
        if self.size > MAX_NODES:
            what = f"the recipe holds more than {MAX_NODES:,} values, each alias counted as what it stands for"
            self._stop(what, at, "use fewer or smaller aliases")

    def _scalar(self, event: Any, at: Span) -> Scalar:
        tag = _tag(event)
        if tag not in _SCALARS:
            self._unknown_tag(tag, at)
            return Scalar(event.value, at)
        try:
            return Scalar(_value(tag, event.value), at)
        except (ValueError, LookupError, AttributeError, ArithmeticError):
            # what PyYAML's constructors raise at 2024-13-45 or !!bool maybe
            self._note(f"{quoted_short(event.value)} is not {_SCALARS[tag]}", at, "put it in quotes if it is text")
            return Scalar(event.value, at)

    def _collection_tag(self, event: Any, kind: str, at: Span) -> None:
        if event.tag not in (None, "!", _TAG + kind):
            self._unknown_tag(event.tag, at)

    def _unknown_tag(self, tag: str, at: Span) -> None:
        if tag in (_MERGE, _TAG + "value"):
            self._note("'<<' and '=' are no values", at, "put it in quotes if it is text")
        else:
            self._note(f"recipes know no tag {tag.replace(_TAG, '!!')}", at, "delete the tag and keep the value")

    def _sequence(self, at: Span, depth: int) -> Sequence:
        items = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self._node(event, depth + 1))
        return Sequence(tuple(items), at)

    def _mapping(self, at: Span, depth: int) -> Mapping:
        merged: dict[str, Entry] = {}
        own: dict[str, Entry] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            merge = isinstance(event, yaml.ScalarEvent) and _tag(event) == _MERGE
            key_at = self.lines.span(event.start_mark.index)
            key = None if merge else self._key(self._node(event, depth + 1), key_at, own)
            value = self._node(next(self.events), depth + 1)
            if merge:
                merged |= self._merged(value)
            elif key is not None:
                own[key] = Entry(key, key_at, value)
        return Mapping(tuple({**merged, **own}.values()), at)

    def _key(self, node: Node, at: Span, seen: dict[str, Entry]) -> str | None:
        if not isinstance(node, Scalar) or not isinstance(node.value, str):
            self._note(f"a key must be text; this is {node_kind(node)}", at, "put the key in quotes")
        elif node.value in seen:
            first = seen[node.value].at.line
            self._note(
                f"the key {quoted_short(node.value)} was given before, on line {first}", at, "keep one of the two"
            )
        else:
            return node.value
        return None

    def _merged(self, value: Node) -> dict[str, Entry]:
        """The entries that ``<<: value`` brings; of several maps the first one counts."""
        maps = value.items if isinstance(value, Sequence) else (value,)
        found: dict[str, Entry] = {}
        for item in reversed(maps):
            if isinstance(item, Mapping):
                found |= {entry.key: entry for entry in item.entries}
            else:
                what = f"'<<' takes a map or a list of maps; this is {node_kind(item)}"
                self._note(what, item.at, "name a map: <<: *name")
        return found

    def _note(self, what: str, at: Span, hint: str) -> None:
        self.problems.append(Problem(what, at, hint=hint))

    def _stop(self, what: str, at: Span, hint: str) -> NoReturn:
        raise RecipeError([*self.problems, Problem(what, at, hint=hint)])

    def _not_yaml(self, error: yaml.MarkedYAMLError) -> NoReturn:
        offset = int(getattr(error.problem_mark or error.context_mark, "index", 0))
        if self.text[offset : offset + 1] == "\t":
            self._stop("YAML does not indent by tabs", self.lines.span(offset), "replace the tab by spaces")
        context = f" {error.context}" if error.context else ""
        self._stop(f"not valid YAML: {error.problem}{context}", self.lines.span(offset), _yaml_hint(error))


def _tag(event: Any) -> str:
    if event.tag not in (None, "!"):
        return str(event.tag)
    return str(_RESOLVER.resolve(yaml.ScalarNode, event.value, event.implicit))


def _value(tag: str, text: str) -> Value:
    if tag not in (_TAG + "str", _TAG + "null") and len(text) > MAX_DIGITS:
        raise ValueError("too long")
    if tag in _NUMBERS and ":" in text:
        return text
    value: Value = _RESOLVER.yaml_constructors[tag](_RESOLVER, yaml.ScalarNode(tag, text))
    return value


def _yaml_hint(error: yaml.MarkedYAMLError) -> str:
    problem = str(error.problem)
    if "mapping values" in problem:
        return "a value that holds ': ' needs quotes, and the keys of one map stand in one column"
    if "cannot start" in problem:
        return "put the value in quotes"
    return "look at the indentation, the brackets and the quotes here and on the line above"


def holds_shared(entry: Entry, shared: frozenset[Span]) -> bool:
    """Whether an entry writes out a value that aliases stand for elsewhere; an alias to what stands above it does not.

    Args:
        entry: of a map.
        shared: as in `Documents`.
    """
    nodes: list[Node] = [entry.value]
    while nodes:
        node = nodes.pop()
        if node.at < entry.at:
            continue
        if node.at in shared:
            return True
        if isinstance(node, Mapping):
            nodes += [inner.value for inner in node.entries]
        elif isinstance(node, Sequence):
            nodes += node.items
    return False


TRUTHS = {
    **dict.fromkeys(("true", "yes", "on"), True),
    **dict.fromkeys(("false", "no", "off"), False),
}


def truth(text: str) -> bool | None:
    """The truth value that a text in quotes is; None: it is none."""
    return TRUTHS.get(text.strip().lower())


def numeric(text: str) -> int | float | None:
    """The number that a text in quotes is; None: it is none.

    >>> numeric("8"), numeric(" 1e-10 "), numeric("eight")
    (8, 1e-10, None)
    """
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return None


def node_kind(node: Node) -> str:
    """What a node is, in YAML's words."""
    if isinstance(node, Sequence | Mapping):
        return "a list" if isinstance(node, Sequence) else "a map"
    if node.value is None:
        return "nothing"
    if isinstance(node.value, bool):
        return "true" if node.value else "false"
    if isinstance(node.value, str):
        return f"the text {quoted_short(node.value)}"
    if isinstance(node.value, datetime.date):
        return f"the date {node.value}"
    return f"the number {number(node.value)}"


def number(value: float) -> str:
    """A number as a reader would write it."""
    if isinstance(value, int) and value.bit_length() > 200:
        return "of more than 60 digits"
    return str(value) if isinstance(value, int) else f"{value:.12g}"
