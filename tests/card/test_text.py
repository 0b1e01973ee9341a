"""Words of others stay words: read as Markdown and as HTML they give back themselves, and nothing else."""

from __future__ import annotations

import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from merger.card.escape import code, escape_text, fence, link_address, literal, shell
from merger.safety.text import visible

MARKDOWN = MarkdownIt("gfm-like", {"html": True, "linkify": False}).enable(["table", "strikethrough"])
NASTY = [
    "*a* _b_ **c** ~~d~~ `e`",
    "[x](http://evil) ![y](z) [^1] <http://evil>",
    "<script>alert(1)</script> <!-- --> &lt; &#60;",
    "a | b",
    "- item", "+ item", "1. item", "12) item", "# head", "=", "---", "--- ---", "> quote", "    indented",
    "$$x$$ \\\\(y\\\\) \\(z\\)",
    "back\\slash \\* \\`",
    "{{ 7 * 7 }} {% raw %}",
    "line\n\n# another\n```\ncode",
    "\"quoted\" 'twice'",
    "\x1b[2J \x9b31m \u202e \u2066 \x00",
]  # fmt: skip
any_text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=40)


def shown(text: str) -> str:
    """What a reader of the page sees of a paragraph that holds nothing but this Markdown, without any markup."""
    page = MARKDOWN.render(text)
    inside = re.fullmatch(r"(?s)<p>(.*)</p>\n", page)
    assert inside, page
    assert "<" not in inside[1], page
    return html.unescape(inside[1])


@pytest.mark.parametrize("text", NASTY)
def test_text_stands_for_itself(text: str) -> None:
    """Markdown, HTML, formulas and tables in it are read as the signs they are, on one line."""
    assert shown(escape_text(text)) == visible(" ".join(text.split()))


@given(any_text)
def test_any_text_stands_for_itself(text: str) -> None:
    """The same of whatever signs."""
    if flat := " ".join(text.split()):
        assert shown(escape_text(text)) == visible(flat)


@given(any_text)
def test_text_opens_no_formula_and_no_markup(text: str) -> None:
    """Nothing that opens a tag, an attribute's end or, on the Hub, a formula is left in it."""
    assert not re.search(r"""[<>"'$]|\\\\[()]""", escape_text(text))


def test_what_is_markdown_is_not_escaped_twice() -> None:
    """A filter may stand behind another."""
    assert escape_text(escape_text("a*b")) == "a\\*b"


def test_readable_where_nothing_is_meant() -> None:
    """Names, versions and numbers as people write them stay as they are."""
    for text in ("org/Model-7B-v1.5", "apache-2.0", "-0.25", "0.5", "layer 3", "#1", "2023 (v2)"):
        assert escape_text(text) == text


@given(any_text.map(lambda text: text + "`" * 3), st.sampled_from(["", "yaml"]))
def test_nothing_ends_a_code_block(text: str, language: str) -> None:
    """Its fence is longer than any inside, so that the page has one block with all of the text."""
    page = MARKDOWN.render(fence(text, language))
    inside = re.fullmatch(r"(?s)<pre><code[^>]*>(.*)</code></pre>\n", page)
    assert inside
    assert html.unescape(inside[1]).rstrip("\n") == visible(text).rstrip()


@given(any_text)
def test_code_in_a_cell(text: str) -> None:
    """Code in a table is one cell, whatever it holds."""
    page = MARKDOWN.render(f"| a |\n|---|\n| {code(text)} |")
    (cell,) = re.findall(r"<td>(.*)</td>", page)
    inside = re.fullmatch(r"<code>(.*)</code>", cell)
    assert inside
    assert html.unescape(inside[1]).strip() == visible(" ".join(text.split()))


def test_for_python_shells_and_links() -> None:
    """In code blocks text is quoted by the rules of what stands there; in links it cannot end the link."""
    assert literal('a"b\n') == '"a\\"b\\n"'
    assert shell("a b;'c\n") == "'a b;'\"'\"'c'"
    assert link_address('https://x.y/a b)(<"') == "https://x.y/a%20b%29%28%3C%22"
