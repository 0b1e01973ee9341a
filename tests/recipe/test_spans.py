"""YAML text to a tree that knows its lines and columns."""

from __future__ import annotations

import datetime
import time
from itertools import pairwise
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from merger.errors import RecipeError, Span
from merger.recipe import spans
from merger.recipe.spans import Mapping, Node, Scalar, Sequence


def tree(text: str) -> Node:
    """The only document of a text that has no problems."""
    documents = spans.read_nodes(text, "r.yaml")
    assert documents.problems == ()
    assert len(documents.roots) == 1
    return documents.roots[0]


def plain(node: Node) -> Any:
    """The tree as SafeLoader would return it."""
    if isinstance(node, Scalar):
        return node.value
    if isinstance(node, Sequence):
        return [plain(item) for item in node.items]
    return {entry.key: plain(entry.value) for entry in node.entries}


def entries(node: Node) -> dict[str, spans.Entry]:
    assert isinstance(node, Mapping)
    return {entry.key: entry for entry in node.entries}


def refusal(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        spans.read_nodes(text, "r.yaml")
    return str(caught.value)


def test_keys_and_values_know_their_places() -> None:
    """A key and a value each stand where an editor shows them, counted from 1."""
    found = entries(tree("a: 1\nlong key:   'x'\nl:\n  - 2\n  - k: v\n"))
    assert (found["a"].at, found["a"].value.at) == (Span("r.yaml", 1, 1), Span("r.yaml", 1, 4))
    assert found["long key"].value.at == Span("r.yaml", 2, 13)
    items = found["l"].value
    assert isinstance(items, Sequence)
    assert [item.at for item in items.items] == [Span("r.yaml", 4, 5), Span("r.yaml", 5, 5)]


@pytest.mark.parametrize("text", ["# note \u2028\né: x\n", "\ufeff# note\r\né: x\r\n", "# \x85\né: x", "#\ré: x\r"])
def test_lines_are_the_editors_lines(text: str) -> None:
    """Only the line ends that editors know count, characters count once, and a byte order mark does not count."""
    assert entries(tree(text))["é"].value.at == Span("r.yaml", 2, 4)


@pytest.mark.parametrize(
    "text",
    [
        "[1, 0x1F, 010, 1_000, +1, .5, 1e-10, 1.0e-10, .inf]",
        "[yes, No, on, TRUE, null, ~, '', 'yes', \"1\", 2024-01-31, 2024-01-31 10:00:00]",
        "{a: {b: [c, {d: e}]}, 'f': |\n  text\n  more\n}".replace("|\n  text\n  more\n", "g"),
        "a: |\n  two\n  lines\nb: >-\n  one\n  line\nc:\n",
        "!!str 1: !!float 2\n",
        "x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3, c: 4}\nz: {b: 3, <<: [{a: 5}, *x]}\nw: {<<: {a: 1}, <<: {a: 2}}\n",
        "x: &x [1, 2]\ny: *x\n*z : 1\n".replace("*z : 1\n", ""),
    ],
)
def test_values_are_those_of_the_safe_loader(text: str) -> None:
    """Numbers, dates, booleans, blocks, tags, aliases and merge keys read as PyYAML's SafeLoader reads them."""
    assert plain(tree(text)) == yaml.safe_load(text)


tame = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8) | st.dates(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


@given(value=tame.filter(lambda value: value is not None), flow=st.booleans())
def test_whatever_is_dumped_is_read_back(value: Any, flow: bool) -> None:
    """Any tree of plain values that PyYAML writes reads back as the same values."""
    text = yaml.safe_dump(value, default_flow_style=flow, allow_unicode=True)
    assert plain(tree(text)) == yaml.safe_load(text)


def test_an_alias_stands_where_its_anchor_stands() -> None:
    """A value that came by an alias has the place of the text it stands for."""
    found = entries(tree("a: &a [1]\nb: *a\n"))
    assert found["b"].at == Span("r.yaml", 2, 1)
    assert found["b"].value.at == Span("r.yaml", 1, 4)


def test_an_explicit_key_beside_a_merge_key_is_no_repetition() -> None:
    """Keys of the map itself win over merged ones, in whatever order they stand."""
    documents = spans.read_nodes("a: &a {k: 1}\nb: {<<: *a, k: 2}\nc: {k: 3, <<: *a}\n", "r.yaml")
    assert documents.problems == ()
    assert plain(documents.roots[0]) == {"a": {"k": 1}, "b": {"k": 2}, "c": {"k": 3}}


def test_documents_that_hold_nothing_are_left_out() -> None:
    """A separator at the start or the end of a file makes no second document."""
    assert len(spans.read_nodes("---\na: 1\n---\n# end\n", "r.yaml").roots) == 1
    assert spans.read_nodes("# nothing\n", "r.yaml").roots == ()
    assert len(spans.read_nodes("a: 1\n---\nb: 2\n", "r.yaml").roots) == 2


def test_a_billion_laughs_is_answered_at_once() -> None:
    """Aliases of aliases are counted, never written out."""
    names = [f"a{index}" for index in range(40)]
    rows = [f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in pairwise(names)]
    start = time.process_time()
    assert "more than 20,000 values" in refusal("\n".join(["a0: &a0 [x]", *rows]))
    assert time.process_time() - start < 1


def test_merge_keys_count_like_other_aliases() -> None:
    """A map that is merged again and again is counted each time."""
    rows = [f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 10)}]}}" for i in range(1, 12)]
    assert "more than 20,000 values" in refusal("\n".join(["m0: &m0 {a: 1, b: 2}", *rows]))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("a: " + "[" * 500_000, "nested more than 40 deep"),
        ("a: " + "{" * 500_000, "nested more than 40 deep"),
        ("a: " + "[1]," * 300_000, "characters long"),
        ("a: [" + "1," * 300_000 + "1]", "more than 20,000 values"),
        ("a: " + "1:1" * 200_000, ""),
        ("a: " + "9" * 500_000, ""),
        ("a: 0x" + "9" * 500_000, ""),
        ("- " * 400_000, "nested more than 40 deep"),
        ("? " * 400_000, "nested more than 40 deep"),
        ("&a " * 300_000, ""),
    ],
)
def test_a_hostile_text_is_answered_at_once(text: str, answer: str) -> None:
    """Neither depth, nor length, nor endless numbers take more than a moment or anything but a RecipeError."""
    start = time.process_time()
    try:
        found = "\n".join(str(problem) for problem in spans.read_nodes(text, "r.yaml").problems)
    except RecipeError as error:
        found = str(error)
    assert found
    assert answer in found
    assert time.process_time() - start < 1


def test_problems_that_do_not_hinder_reading_are_collected() -> None:
    """A repeated key, a number as a key and an unknown tag are all reported, and the rest is still read."""
    documents = spans.read_nodes("a: 1\na: 2\n3: 4\nb: !x y\nc: 2024-02-31\nd: <<\n", "r.yaml")
    assert [problem.at and problem.at.line for problem in documents.problems] == [2, 3, 4, 5, 6]
    assert plain(documents.roots[0]) == {"a": 1, "b": "y", "c": "2024-02-31", "d": "<<"}


def test_a_problem_found_before_a_syntax_error_is_not_lost() -> None:
    """A text that ends in broken YAML still answers with the repeated key above it."""
    assert refusal("a: 1\na: 2\nb: [").count("r.yaml:") == 2


@pytest.mark.parametrize("text", ["a: \ud800", "a: \x00", "\x1b[0m"])
def test_characters_that_yaml_forbids(text: str) -> None:
    """A control character or half a surrogate pair is named by its code."""
    assert "YAML does not allow the character U+" in refusal(text)


@given(text=st.text(alphabet=st.sampled_from("ab:-[]{}&*!|>'\"%@`#,?<=~01.\n\t \ufeff\u2028é"), max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    """Whatever the text, the answer is a tree or a RecipeError."""
    try:
        documents = spans.read_nodes(text, "r.yaml")
    except RecipeError as error:
        problems = error.problems
    else:
        problems = documents.problems
    assert all(problem.at and problem.at.line <= text.count("\n") + 1 for problem in problems)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "nothing"),
        (True, "true"),
        (2.5, "the number 2.5"),
        (2**300, "the number of more than 60 digits"),
        ("x" * 100, f"the text '{'x' * 57}...'"),
        (datetime.date(2024, 1, 31), "the date 2024-01-31"),
    ],
)
def test_values_are_called_by_yamls_words(value: Any, words: str) -> None:
    """A sentence about a value never names a type of Python."""
    assert spans.node_kind(Scalar(value, Span("r.yaml", 1, 1))) == words
