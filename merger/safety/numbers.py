"""The range of every number that a stranger gives, and how text becomes one: nothing computes with a number unasked.

A method's parameters carry their ranges themselves (methods.registry). Not here: how much of a file is read (limits).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal

LIMIT = 1_000_000
"""How far any number of a recipe may lie from 0: float32 bears the square of it times any weight of a model."""

MAX_DIGITS = 30
"""More make no number that could be in any range; Python's own int refuses 4,301 of them in words of its own."""


@dataclass(frozen=True)
class Range:
    """The closed interval that a number must lie in; an end that is None lies at the LIMIT."""

    low: float | None = None
    high: float | None = None

    @property
    def least(self) -> float:
        """Where it begins."""
        return -LIMIT if self.low is None else self.low

    @property
    def most(self) -> float:
        """Where it ends."""
        return LIMIT if self.high is None else self.high

    def holds(self, value: float) -> bool:
        """Whether `value` lies inside; NaN lies nowhere."""
        return self.least <= value <= self.most

    def __str__(self) -> str:
        return f"{_spelt(self.least)} to {_spelt(self.most)}"


def _spelt(end: float) -> str:
    return f"{int(end):,}" if float(end).is_integer() else f"{end:g}"


ANY = Range()
SEED = Range(0, 2**63 - 1)
GIVEN_SEED = Range(-(2**63), 2**63 - 1)
"""Of the command line and of locks: there negative ones were always taken."""
LAYERS = Range(0, 100_000)
COUNT = Range(1)
"""Of experts, atoms, examples of a task and other things that one counts."""
RANK = Range(1, 1 << 20)
ALPHA = Range(1e-6)
"""lora_alpha of what is made; it is above 0."""
TOKENS = Range(0, (1 << 31) - 1)
THREADS = Range(1, 4096)
PARTS = Range(1, 100_000)
MINUTES = Range(1, 100_000)
BYTES = Range(1, 1 << 60)
SIZE = Range(0, 1 << 60)
"""Of a file."""

# In ASCII: of Unicode's blanks Python's own int() refuses a few.
_WHOLE = re.compile(r"\s*[-+]?[0-9]+\s*", re.ASCII)
_DECIMAL = re.compile(r"\s*[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?\s*", re.ASCII)
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]I?)?(B?)\s*", re.IGNORECASE | re.ASCII)
_NO_SIZE, _GIGABYTES = 2000, 256
"""So few bytes are no size of anything; a number below the second one was meant as gigabytes, else as megabytes."""

_UNITS = {
    "": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40,
}  # fmt: skip


def parse_whole(text: str, within: Range) -> int:
    """The whole number that a text is.

    Raises:
        ValueError: it is none, or not within the range; in a sentence.
    """
    if _WHOLE.fullmatch(text) and len(text) <= MAX_DIGITS and within.holds(int(text)):
        return int(text)
    raise ValueError(f"{quoted_short(text)} is no whole number from {within}")


def parse_decimal(text: str, within: Range) -> float:
    """The number that a text is.

    Raises:
        ValueError: it is none, or not within the range; in a sentence.
    """
    if _DECIMAL.fullmatch(text) and within.holds(float(text)):
        return float(text)
    raise ValueError(f"{quoted_short(text)} is no number from {within}")


def parse_size(text: str) -> int:
    """The bytes that a user means.

    >>> nbytes("4GB"), nbytes("1.5 KiB")
    (4000000000, 1536)

    Raises:
        ValueError: it is no size, or none that a machine can have; in a sentence.
    """
    match = _SIZE.fullmatch(re.sub(r"(?<=[0-9]),(?=[0-9]{3})", "", text))
    found = Decimal(match[1]) * _UNITS[(match[2] or "").upper()] if match and len(text) <= MAX_DIGITS else Decimal(0)
    if not BYTES.holds(int(found)):
        raise ValueError(f"{quoted_short(text)} is no size; write for example 500MB, 4GB or 4GiB")
    if match and not (match[2] or match[3]) and found < _NO_SIZE:
        raise ValueError(f"{text.strip()} bytes? write {match[1]}{'GB' if found < _GIGABYTES else 'MB'}")
    return int(found)


UP, DOWN = math.ceil, math.floor
"""What is needed is told rounded up, what there is rounded down: so the first is the larger one in words, too."""


def size(nbytes: float, to: Callable[[float], int] = round) -> str:
    """Bytes in the unit a person would choose, powers of 1000.

    >>> size(5_484_880), size(5_484_880, DOWN), size(999_999, UP)
    ('5.5 MB', '5.4 MB', '1.0 MB')

    Args:
        to: how it is rounded: `UP` what is needed, `DOWN` what there is.
    """
    if nbytes < 1000:
        return f"{to(nbytes)} B"
    for unit, more in (("kB", 10**3), ("MB", 10**6), ("GB", 10**9)):
        if (tenths := to(nbytes * 10 / more)) < 10_000:
            return f"{tenths / 10:.1f} {unit}"
    return f"{to(nbytes / 10**11) / 10:.1f} TB"


def typed_size(nbytes: float, to: Callable[[float], int]) -> str:
    """The same as it stands behind an option."""
    return size(nbytes, to).replace(" ", "")


def quoted_short(text: str) -> str:
    """A text in quotes, cut where it is long."""
    return repr(text if len(text) <= 60 else text[:57] + "...")
