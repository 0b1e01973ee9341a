"""A text that a stranger may write wherever there is room for one, and whether an output obeys it. No tests here."""

from __future__ import annotations

import re

HOSTILE = "\x1b]0;x\x07\x1b[2J\u202e\x9b31m\u2028\r::error::r\n::error::x\n##[error]y\nINJECTED\t\x7f\ue000"
"""Titles, clears, turns and colours a terminal; begins lines; commands GitHub's runner."""

AT_ONCE = HOSTILE.replace("\n", "").replace("\r", "").replace("\u2028", "").replace("\ue000", "")
"""The same for places of one line."""

_OBEYED = {
    "a control character": re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]"),
    "a turn of the reading order": re.compile("[\u2028-\u202e\u2066-\u2069]"),
    "a command": re.compile(r"^\s*::|##\[", re.MULTILINE),
    "a line of its own": re.compile(r"^\W*INJECTED", re.MULTILINE),
}


def obeyed(text: str) -> list[str]:
    """What in an output is the stranger's doing."""
    return [f"{what}: {found[0]!r}" for what, pattern in _OBEYED.items() if (found := pattern.search(text))]
