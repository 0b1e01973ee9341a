"""Regular expressions that others wrote, tried so that none of them can take forever.

One without repetition is tried here, any other in a process of its own (apart). Not here: what they stand for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from merger.safety.apart import Bounds, call
from merger.safety.limits import EXPRESSION

_PLAIN = re.compile(r"(?:[\w ./:^$|-]|\\[.dDwWsS-])*")
_FEW = 1_000_000
_BOUNDS = Bounds()


def compiles(expression: str) -> str | None:
    """What is wrong with it; None: nothing."""
    if len(expression) > EXPRESSION.most:
        return f"it has {len(expression):,} characters, and at most {EXPRESSION.most:,} are read"
    try:
        re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        return str(error)
    return None


def match_ending(expression: str) -> str:
    """What PEFT makes of an expression: it has to match a name's end, after a dot, or all of it."""
    return rf"^(.*\.)?({expression})$"


def first(expressions: Sequence[str], names: Sequence[str], at_end: bool = False) -> list[int | None]:
    """For each name the place of the first expression that is found in it; None: none is.

    Args:
        expressions: all of them compile.
        names: of tensors or modules.
        at_end: see `ending`.

    Raises:
        BeyondError: that takes too long, or too much memory.
    """
    harmless = len(expressions) * len(names) <= _FEW and all(map(_PLAIN.fullmatch, expressions))
    asked = (list(map(match_ending, expressions) if at_end else expressions), list(names))
    found: list[int | None] = (
        match_unbounded(asked) if harmless else call(f"{__name__}:{match_unbounded.__name__}", asked, _BOUNDS)
    )
    return found


def match_unbounded(asked: tuple[Sequence[str], Sequence[str]]) -> list[int | None]:
    """The same, without any limit."""
    expressions, names = [re.compile(expression) for expression in asked[0]], asked[1]
    return [
        next((place for place, expression in enumerate(expressions) if expression.search(name)), None) for name in names
    ]
