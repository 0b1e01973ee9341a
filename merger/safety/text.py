"""What strangers wrote, made fit to be shown: it moves no cursor, turns no reading order, begins no line of its own and
commands no CI log. What is taken out stays visible, as an escape.

It imports nothing, so that whoever shows something can. Not here: Markdown and HTML (card.escape builds on this),
and tokens (secrets).
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TextIO, cast

# C0, DEL and C1; what turns the reading order or shows nothing; surrogates, which no stream can write
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb"
                     "\ud800-\udfff\U000e0000-\U000e007f]")  # fmt: skip
_ENDS = re.compile(r"[\t\n]")
_NAMED = {"\t": "\\t", "\n": "\\n", "\r": "\\r"}
# GitHub's runner takes a line for a command that begins with :: after blanks, or has ##[ anywhere
_COMMAND = re.compile(r"^([^\S\n]*)(?=:(?::|\Z))|##(?=\[)", re.MULTILINE)

_UP = re.compile(r"(\x1b\[A)+")

LONGEST = 4_000
"""Characters of one line that are shown; of a longer one the beginning, and how many more there are."""

_WORDS = 40


def visible(text: str) -> str:
    r"""Text of several lines in which nothing is hidden; tabs and ends of line stay.

    >>> visible("a\x1b[2J\u202eb\n")
    'a\\x1b[2J\\u202eb\n'
    """
    return _UNSEEN.sub(_escape, text)


def line(text: object, longest: int = LONGEST) -> str:
    r"""Text on one line, the same if it went through here before.

    >>> line("layer\n::error::x")
    'layer\\n::error::x'
    >>> line("::error::x")
    '\\::error::x'
    """
    flat = _disarm(_ENDS.sub(_escape, visible(str(text))))
    if len(flat) <= longest + _WORDS:
        return flat
    return f"{flat[:longest]}… ({len(flat) - longest:,} characters more)"


def join_lines(lines: Iterable[object]) -> str:
    """Text of ours: one line for each of these, whatever others' names are in it."""
    return "\n".join(map(line, lines))


def _escape(found: re.Match[str]) -> str:
    sign = found[0]
    if sign in _NAMED:
        return _NAMED[sign]
    code = ord(sign)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65_536 else f"\\U{code:08x}"


def _disarm(text: str) -> str:
    return _COMMAND.sub(lambda found: "#\\#" if found[0] == "##" else f"{found[1]}\\", text)


# ---- streams --------------------------------------------------------------------------------------------------------


class Guarded:
    """A stream that shows whatever it is told in the same way: also what libraries warn of, and tracebacks.

    Ends of line are taken for the writer's own, so that a text of ours goes through `lined` before.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._begun = False
        self._encoding = stream.encoding or "utf-8"  # Windows has pipes of a few letters

    def write(self, text: str) -> int:
        """Write it, made visible; on a terminal bars may move."""
        before, words, after = _moves(text) if self._stream.isatty() else ("", text, "")
        shown = visible(words)
        shown = _disarm("x" + shown)[1:] if self._begun else _disarm(shown)
        written = shown.encode(self._encoding, "backslashreplace").decode(self._encoding)
        self._stream.write(before + written + after)
        if shown:
            self._begun = bool(shown.rpartition("\n")[2].strip())
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each."""
        for each in lines:
            self.write(each)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _moves(text: str) -> tuple[str, str, str]:
    """What tqdm writes: lines up and nothing else, or a line with the way back to its beginning at one end or both."""
    if _UP.fullmatch(text):
        return text, "", ""
    before, after = "\r" * text.startswith("\r"), "\r" * (len(text) > 1 and text.endswith("\r"))
    return before, text[len(before) : len(text) - len(after)], after


@contextmanager
def guard_streams() -> Iterator[None]:
    """Inside, the standard streams are guarded; and from then on an exception that nobody catches is told so, too."""
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = cast(TextIO, Guarded(out)), cast(TextIO, Guarded(err))
    sys.excepthook = _uncaught
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err


def _uncaught(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
    Guarded(sys.stderr).writelines(traceback.format_exception(kind, error, at))
