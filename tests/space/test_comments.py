"""What a comment says: which of its lines is a command, and which of its blocks the recipe."""

from __future__ import annotations

import pytest

from merger.errors import RecipeError
from space.bot.comments import MOST_CHARACTERS, command, recipe_block

ASKS = [
    "@mergebot merge",
    "hello\n@mergebot merge  \nbye",
    "hello\r\n@mergebot merge\r\n",
    "   @mergebot merge",
    "@mergebot\tmerge",
    "@mergebot merge\\\nbye",
    "> quoted\n\n@mergebot merge",
    "<!-- a note -->\n\n@mergebot merge",
    "<details>\n\nfolded\n\n</details>\n\n@mergebot merge",
    "```\ncode\n```\n@mergebot merge\n```yaml\na: 1\n```",
    "<br>\n\n@mergebot merge",
    "[link]: https://example.org\n@mergebot merge",
]
ASKS_NOTHING = [
    "@mergebot merged",
    "@mergebots merge",
    "say @mergebot merge",
    "@mergebot\nmerge",
    "@mergebot merge now",
    "```\n@mergebot merge\n```",
    "```text\n\n@mergebot merge\n\n```",
    "``````\n```\n@mergebot merge\n```\n``````",
    "```\nnever closed\n\n@mergebot merge",
    "~~~\n@mergebot merge\n~~~",
    "  ~~~ yaml\n@mergebot merge\n  ~~~",
    "    @mergebot merge",
    "\t@mergebot merge",
    "`@mergebot merge`",
    "`code\n@mergebot merge\ncode`",
    "> @mergebot merge",
    "> quoted\n@mergebot merge",
    "> ```\n> @mergebot merge\n> ```",
    "- @mergebot merge",
    "- item\n\n  @mergebot merge",
    "1. item\n@mergebot merge",
    "# @mergebot merge",
    "@mergebot merge\n---",
    "a | b\n--|--\n@mergebot merge",
    "<!-- @mergebot merge -->",
    "<!--\n@mergebot merge\n-->",
    "<!--\n\n@mergebot merge\n\n-->",
    "<!-- never closed\n\n@mergebot merge",
    "text <!--\n@mergebot merge\n-->",
    "text <del>\n@mergebot merge\n</del>",
    "<details>\n\n@mergebot merge\n\n</details>",
    "<details>\n<summary>x</summary>\n\n@mergebot merge\n",
    "<pre>\n\n@mergebot merge\n\n</pre>",
    "<div>\n@mergebot merge\n</div>",
    "**loud\n@mergebot merge\nloud**",
    "~~gone\n@mergebot merge\ngone~~",
    "[link\n@mergebot merge\n](https://example.org)",
    "\\@mergebot merge",
    "&#64;mergebot merge",
]


@pytest.mark.parametrize("text", ASKS)
def test_a_line_of_plain_text_is_a_command(text: str) -> None:
    """Whatever else is said before and after it."""
    assert command(text, "mergebot") == "merge"
    assert command(text.replace(" merge", " plan").replace("\tmerge", "\tplan"), "mergebot") == "plan"


@pytest.mark.parametrize("text", ASKS_NOTHING)
def test_an_example_a_quotation_and_what_nobody_sees_ask_for_nothing(text: str) -> None:
    """As CommonMark reads it, with the tables and the strikethrough of the Hub."""
    assert command(text, "mergebot") is None


@pytest.mark.parametrize("name", ["merge_bot_2", "merge-bot", "a.b"])
def test_a_name_is_its_letters(name: str) -> None:
    """None of them means anything else, be it to Markdown or to a pattern."""
    assert command(f"@{name} plan", name) == "plan"
    assert command(f"@{name.replace('.', 'x').replace('_', 'x')[::-1]} plan", name) is None


YAML = "merge_method: linear\n"


@pytest.mark.parametrize(
    "text",
    [
        f"```yaml\n{YAML}```",
        f"```yml\n{YAML}```\n",
        f"~~~yaml\n{YAML}~~~",
        f"``` yaml title\n{YAML}```",
        f"```text\nother\n```\n\n```yaml\n{YAML}```",
        f"````\n```yaml\nan: example\n```\n````\n```yaml\n{YAML}```",
        f"<!--\n```yaml\nhidden: 1\n```\n-->\n```yaml\n{YAML}```",
        f"> ```yaml\n> quoted: 1\n> ```\n\n```yaml\n{YAML}```",
    ],
)
def test_the_recipe_is_the_one_block_of_yaml(text: str) -> None:
    """Those that stand in something else are examples."""
    assert recipe_block(text) == YAML


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nothing", "there is no YAML block in the comment"),
        ("```\na: 1\n```", "there is no YAML block in the comment"),
        ("<!--\n```yaml\na: 1\n```\n-->", "there is no YAML block in the comment"),
        ("```yaml\na: 1\n```\n\n~~~yml\nb: 1\n~~~", "there are 2 YAML blocks in the comment"),
    ],
)
def test_no_recipe_and_several_are_told(text: str, words: str) -> None:
    """With what to write."""
    with pytest.raises(RecipeError, match=words):
        recipe_block(text)


def test_a_comment_that_is_too_long_is_refused_unread() -> None:
    """If it names us; else it is nobody's business here."""
    long = "[" * MOST_CHARACTERS
    assert command(long, "mergebot") is None
    with pytest.raises(RecipeError, match="characters, and 65,536 are read"):
        command(f"{long} @mergebot", "mergebot")
