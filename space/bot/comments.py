"""What a comment says to the bot: a command and a recipe, as a reader of its Markdown sees them.

Only a line of plain text asks for something: no code, quotation, list, heading, table, link or HTML, nor what any of
them holds. Not here: who wrote it, and what is done about it (bot).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

from markdown_it import MarkdownIt
from markdown_it.token import Token

from merger.errors import Problem, RecipeError

MOST_CHARACTERS = 65_536
"""As much as a recipe may have; the worst text of that length takes some seconds."""

_MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"]).disable("text_join")
_BREAKS = ("softbreak", "hardbreak")
_COMMENT = re.compile(r"<!--.*?-->|<!--.*", re.DOTALL)
_TAG = re.compile(r"<(/?)([A-Za-z][A-Za-z0-9-]*)[^>]*?(/?)>")
_ALONE = ("br", "hr", "img", "input", "source", "wbr")


def command(text: str, name: str) -> str | None:
    """``plan`` or ``merge``, if a line of plain text says ``@name plan`` or ``@name merge``.

    >>> command("Please\\n@mergebot plan\\n", "mergebot")
    'plan'

    Raises:
        RecipeError: it is too long to be read, and names us.
    """
    if f"@{name}" not in text:
        return None
    if len(text) > MOST_CHARACTERS:
        what = f"the comment has {len(text):,} characters, and {MOST_CHARACTERS:,} are read"
        raise RecipeError(Problem(what, hint="write a shorter one"))
    said = re.compile(rf"@{re.escape(name)}[ \t]+(plan|merge)[ \t]*", re.ASCII)
    return next((found[1] for line in _plain(_MARKDOWN.parse(text)) if (found := said.fullmatch(line))), None)


def recipe_block(text: str) -> str:
    """The recipe in the text's one YAML block.

    Raises:
        RecipeError: there is none, or several.
    """
    fences = [token for token in _MARKDOWN.parse(text) if token.type == "fence" and token.level == 0]
    found = [token.content for token in fences if token.info.split()[:1] in (["yaml"], ["yml"])]
    if len(found) != 1:
        what = "there is no YAML block" if not found else f"there are {len(found)} YAML blocks"
        raise RecipeError(Problem(f"{what} in the comment", hint="put one recipe between ```yaml and ```"))
    return found[0]


def _plain(tokens: Sequence[Token]) -> Iterator[str]:
    """The lines of paragraphs that are nothing but text, and stand in nothing else."""
    depth = 0
    for before, token in pairwise(tokens):
        depth = max(0, depth + (_count_open(before.content) if before.type == "html_block" else 0))
        if token.type == "inline" and before.type == "paragraph_open" and before.level == 0 and depth == 0:
            children = token.children or []
            if not any(child.type == "html_inline" for child in children):
                yield from _lines(children)


def _lines(children: Sequence[Token]) -> Iterator[str]:
    """The lines of a paragraph that are text from end to end."""
    line: list[Token] = []
    for child in [*children, None]:
        if child is not None and child.type not in _BREAKS:
            line.append(child)
            continue
        if all(part.type == "text" and part.level == 0 for part in line):
            yield "".join(part.content for part in line)
        line = []


def _count_open(html: str) -> int:
    """How many elements a block of HTML leaves open, less those that it closes."""
    tags = [tag for tag in _TAG.findall(_COMMENT.sub("", html)) if tag[1].lower() not in _ALONE and not tag[2]]
    return sum(-1 if closing else 1 for closing, _, _ in tags)
