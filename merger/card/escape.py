"""Words of others in Markdown: whatever they hold, they change nothing but their own text.

What is escaped here is safe in Markdown as well as in HTML that stands in Markdown. Not here: templates (templates).
"""

from __future__ import annotations

import json
import re
import shlex
from urllib.parse import quote

from markupsafe import Markup

from merger.safety.text import visible

_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;"}
# \\( and $$ open a formula on the Hub whether they are escaped or not; an entity does not
_ENTITIES = _HTML | {"\\": "&#92;", "$": "&#36;", "@": "&#64;"}
_INLINE = re.compile(r"""[&<>"'\\$@]|([`*_\[\]|~]|:(?=//)|(?<=www)\.)""", re.IGNORECASE)
_STARTS = re.compile(r"^(\d{1,9}(?=[.)](?:\s|$))|(?=[-+](?:\s|$)|-[-\s]*$|=+$|#{1,6}(?:\s|$)))")


def escape_text(text: object) -> Markup:
    """Text that stands for itself, whatever it holds, on one line."""
    if isinstance(text, Markup):
        return text
    return Markup(_STARTS.sub(r"\1\\", inline(" ".join(str(text).split()))))


def prose(text: object) -> Markup:
    """The same where it stands in no attribute of HTML: with quotes and apostrophes as they are."""
    made = escape_text(text)
    return made if isinstance(text, Markup) else Markup(str(made).replace("&#39;", "'").replace("&quot;", '"'))


def inline(text: str) -> Markup:
    """The same of text that stands between other text, with the spaces at its ends."""
    return Markup(_INLINE.sub(_stands, visible(text)))


def _stands(found: re.Match[str]) -> str:
    return f"\\{found[1]}" if found[1] else _ENTITIES[found[0]]


def fence(text: str, language: str = "") -> Markup:
    """Text as a code block that nothing inside can end."""
    text = visible(text)
    fence = "`" * max(3, _longest(text) + 1)
    return Markup(f"{fence}{language}\n{text.rstrip()}\n{fence}")


def code(text: object) -> Markup:
    """Text on one line as code, in a cell too.

    >>> print(code("a`b|c"))
    `` a`b\\|c ``
    """
    flat = visible(" ".join(str(text).split())).replace("|", "\\|")
    fence = "`" * (_longest(flat) + 1)
    return Markup(f"{fence} {flat} {fence}" if "`" in flat or not flat else f"`{flat}`")


def _longest(text: str) -> int:
    return max((len(run) for run in re.findall(r"`+", text)), default=0)


def literal(text: str) -> Markup:
    """Text in quotes, for Python inside a code block."""
    return Markup(visible(json.dumps(text, ensure_ascii=False)))


def shell(text: str) -> Markup:
    """Text as one word of a shell's line, inside a code block."""
    return Markup(shlex.quote(visible(" ".join(text.split()))))


def link_address(url: str) -> Markup:
    """An address, for between the parentheses of a link or the quotes of HTML."""
    return Markup(quote(url, safe="/:?=&#%~"))
