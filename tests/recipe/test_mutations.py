"""Any spoilt recipe either parses or is refused with problems that point into it: never another exception."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from merger.errors import Problem, RecipeError
from merger.methods.registry import Method
from merger.recipe.parse import parse

from .conftest import WILD

TEXTS = [file.read_text() for file in WILD if file.stat().st_size < 2500]
TREES = [tree for text in TEXTS for tree in yaml.safe_load_all(text)]
NASTY: list[Any] = [
    None, True, 0, -1, 2.5, 10**400, float("nan"), float("inf"), "", " ", "+", "@", "a+b+c", "ties", "model_stock",
    "org/a", "1e-10", "1e999", [], {}, [[]], [0, 4], [4, 0], [0.5, "x"], {"value": 1}, {"filter": 1}, [{"value": 1}, 2],
    {"model": "org/a"}, {"model": {"path": "org/a", "revision": 1}}, {"sources": []}, [{"model": "org/a"}],
]  # fmt: skip
KEYS = [
    "merge_method", "models", "slices", "modules", "model", "parameters", "t", "weight", "densty", "experts", "<<", "",
]  # fmt: skip


def _spots(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (list or map, index or key) in a tree."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(pairs):
        yield tree, key
        yield from _spots(value)


def _spoil(tree: Any, draw: st.DrawFn) -> None:
    spots = list(_spots(tree))
    if not spots:
        return
    holder, key = draw(st.sampled_from(spots))
    deed = draw(st.sampled_from(["delete", "replace", "duplicate", "rename"]))
    if deed == "delete":
        del holder[key]
    elif deed == "replace":
        holder[key] = copy.deepcopy(draw(st.sampled_from(NASTY)))
    elif isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    else:
        value = holder[key] if deed == "duplicate" else holder.pop(key)
        holder[draw(st.sampled_from(KEYS))] = copy.deepcopy(value)


@st.composite
def spoilt_trees(draw: st.DrawFn) -> str:
    """A published recipe with some of its nodes deleted, replaced, duplicated or renamed."""
    tree = copy.deepcopy(draw(st.sampled_from(TREES)))
    for _ in range(draw(st.integers(1, 4))):
        _spoil(tree, draw)
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=draw(st.sampled_from([None, False, True])))


@st.composite
def spoilt_texts(draw: st.DrawFn) -> str:
    """A published recipe with some of its text replaced by other text, often by a line of its own."""
    text = draw(st.sampled_from(TEXTS))
    pieces = st.sampled_from(
        ["", "\t", " ", ":", "- ", "\n", "*a", "&a ", "[", "}", "'", "---\n", "!!x ", "%", "<<: ", "é\u2028"]
    )
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 30)))
        text = text[:start] + draw(pieces | st.sampled_from(text.split("\n") or [""])) + text[end:]
    return text


def _answer(text: str, table: Mapping[str, Method]) -> None:
    lines = text.split("\n")
    try:
        problems = parse(text, "r.yaml", table).warnings
    except RecipeError as error:
        problems = error.problems
        assert problems
    for problem in problems:
        assert problem.at is not None
        assert problem.hint
        assert 1 <= problem.at.line <= len(lines)
        assert 1 <= problem.at.column <= len(lines[problem.at.line - 1]) + 1


@settings(max_examples=400, deadline=None)
@given(text=spoilt_trees())
def test_spoilt_trees_are_answered(table: Mapping[str, Method], text: str) -> None:
    """Whatever is done to a recipe's nodes, every problem stands inside the file and names the next step."""
    _answer(text, table)


@settings(max_examples=400, deadline=None)
@given(text=spoilt_texts())
def test_spoilt_texts_are_answered(table: Mapping[str, Method], text: str) -> None:
    """Whatever is done to a recipe's text, every problem stands inside the file and names the next step."""
    _answer(text, table)


@given(text=st.text(max_size=60))
def test_any_text_is_answered(table: Mapping[str, Method], text: str) -> None:
    """Text that is no recipe at all is answered like any other."""
    problems: tuple[Problem, ...] = ()
    try:
        parse(text, "r.yaml", table)
    except RecipeError as error:
        problems = error.problems
    assert all(problem.at and problem.hint for problem in problems)
