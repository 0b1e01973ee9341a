"""Every number that a user gives has a range, whatever way it comes. Not here: those of recipes (tests/recipe)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from places import ROOT

from merger.action.inputs import Inputs
from merger.cli import commands as cli
from merger.errors import RecipeError
from merger.planning.shards import Part
from merger.safety import numbers
from merger.safety.numbers import DOWN, UP, Range, size, typed_size

DIGITS = "9" * 400
MANY = "9" * 5000
"""More than Python's int reads."""

REFUSED = (
    "", " ", "-1", "0", "1e3", "nan", "inf", "-inf", "0x10", "1_000", "²", "true", "[1]", DIGITS, MANY, "1" + "0" * 19,
)  # fmt: skip
SEEDS = ("0", "-1")
RUN = ("run", "r.yaml")
WHOLE = {
    "--threads": RUN, "--parts": RUN, "--rank": ("extract-lora", "a", "b"), "--tensors": ("verify", "m"),
}  # fmt: skip
OPTIONS = [
    *((command, option, text) for option, command in WHOLE.items() for text in REFUSED),
    *(
        (RUN, option, text)
        for option in ("--max-memory", "--max-disk", "--shard-size")
        for text in (*REFUSED, "0.1", "-4GB", "9e9GB", "9999999TB")
        if text not in ("1e3",)
    ),
    *((RUN, "--seed", text) for text in REFUSED if text not in SEEDS),
    *((("verify", "m"), "--seed", text) for text in REFUSED if text not in SEEDS),
    *((("extract-lora", "a", "b", "--rank", "1"), "--alpha", text) for text in REFUSED if text != "1e3"),
    *(
        (RUN, "--part", text)
        for text in ("0/1", "2/1", "1/0", "-1/2", f"1/{DIGITS}", f"{MANY}/{MANY}", "1/²", "1", "1/2/3", "a/b", "1.0/2")
    ),
    *((RUN, "--timeout", text) for text in ("0s", "1", "s", f"{DIGITS}h", "-1h", "1.5h", "٣h")),
]


@pytest.mark.parametrize(("command", "option", "text"), OPTIONS, ids=lambda value: str(value)[:20])
def test_an_option_out_of_range_is_refused_by_name(
    command: tuple[str, ...], option: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 2 and a short sentence that begins with the option; Python's own words for huge numbers are never shown."""
    assert cli.main([*command, f"{option}={text}"]) == 2
    told = capsys.readouterr().err.splitlines()[0]
    assert f"argument {option}" in told
    assert len(told) < 300
    assert "int" not in told.replace("prints", "").split()


@pytest.mark.parametrize("name", ["max-memory", "max-disk", "shard-size", "part-size", "time-limit", "part"])
@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "²", "true", DIGITS, MANY, "1/0"], ids=lambda text: text[:5])
def test_an_input_of_the_action_out_of_range_is_refused_by_name(name: str, text: str) -> None:
    """A sentence that begins with the input."""
    with pytest.raises(RecipeError) as caught:
        Inputs.take({f"INPUT_{name.upper().replace('-', '_')}": text})
    assert [problem.what.split(":")[0] for problem in caught.value.problems] == [f"input {name}"]


@example("0\x1f")
@example("1\u2003")
@given(st.text() | st.from_regex(r"[-+]?[0-9]{0,40}\.?[0-9]{0,5}([eE][-+]?[0-9]{1,4})?", fullmatch=True))
def test_any_text_is_a_number_in_range_or_a_sentence(text: str) -> None:
    """No other error, and no number outside."""
    whole = read(partial(numbers.parse_whole, within=numbers.SEED), text, "is no whole number from")
    number = read(partial(numbers.parse_decimal, within=numbers.ANY), text, "is no number from")
    size = read(numbers.parse_size, text, r"is no size|bytes\? write")
    part = read(Part.parse, text, "write for example 3/8")
    assert whole is None or numbers.SEED.holds(whole)
    assert number is None or numbers.ANY.holds(number)
    assert size is None or numbers.BYTES.holds(size)
    assert part is None or 1 <= part.number <= part.count <= numbers.PARTS.most


def read(parse: Callable[[str], Any], text: str, refusal: str) -> Any:
    """What the text means; None where it is refused, in this sentence."""
    try:
        return parse(text)
    except ValueError as error:
        if not re.search(refusal, str(error)):
            raise
        return None


@pytest.mark.parametrize(
    ("nbytes", "told"),
    [
        (0, ("0 B", "0 B", "0 B")),
        (999, ("999 B", "999 B", "999 B")),
        (1_001, ("1.0 kB", "1.1 kB", "1.0 kB")),
        (999_999, ("1.0 MB", "1.0 MB", "999.9 kB")),
        (4_000_000_000, ("4.0 GB", "4.0 GB", "4.0 GB")),
        (334_831_744, ("334.8 MB", "334.9 MB", "334.8 MB")),
        (2_500_000_000_000_000, ("2500.0 TB", "2500.0 TB", "2500.0 TB")),
    ],
)
def test_bytes_are_told_in_a_unit_that_a_person_would_choose(nbytes: int, told: tuple[str, str, str]) -> None:
    """To the nearest tenth, up and down."""
    assert (size(nbytes), size(nbytes, UP), size(nbytes, DOWN)) == told


@given(st.integers(2, 1 << 59), st.data())
def test_what_is_needed_is_told_larger_than_what_there_is(needed: int, data: st.DataObject) -> None:
    """By a tenth of a unit at least; and an option with the number that is told is enough."""
    there = data.draw(st.integers(1, needed - 1))
    assert numbers.parse_size(typed_size(needed, UP)) >= needed > there >= numbers.parse_size(typed_size(there, DOWN))
    assert size(needed, UP) != size(there, DOWN)


def test_nobody_is_told_bytes_by_their_digits() -> None:
    """But where they are compared to the last one: a file beside its lock or its header."""
    exact = {"published.py", "parents.py", "checkpoint.py", "header.py"}
    rooms = [room for wing in ("merger", "space") for room in (ROOT / wing).rglob("*.py") if room.name not in exact]
    assert [room.name for room in rooms if re.search(r":,\} bytes", room.read_text("utf-8"))] == []


def test_a_range_holds_its_ends_and_no_nan() -> None:
    """An end that is not given lies at the limit."""
    assert Range(0).holds(numbers.LIMIT)
    assert not Range(0).holds(numbers.LIMIT + 1)
    assert not Range(0).holds(-1e-9)
    assert not any(Range().holds(value) for value in (math.nan, math.inf, -math.inf, 10**400))
    assert [str(one) for one in (Range(), Range(0), Range(high=0.5))] == [
        "-1,000,000 to 1,000,000", "0 to 1,000,000", "-1,000,000 to 0.5",
    ]  # fmt: skip
