"""Whatever others write, a card has the parts, links and metadata that it has with plain words in their place."""

from __future__ import annotations

from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from loopback.cards import problems
from markdown_it import MarkdownIt

import merger
from merger.card.relations import Relation, Relations
from merger.card.render import render
from merger.methods.registry import methods
from merger.safety.text import visible

PLAIN = "plain"
PLACES = ("folder", "licence", "comment", "field", "why", "title", "measured")
NASTY = {
    "markdown": "a](http://evil) **b** _c_ `d` | e ![f](g) # h ~~i~~",
    "html": "<script>alert(1)</script><img src=x onerror=alert(1)></td></details><!--",
    "attribute": '" onmouseover="alert(1)" x=\'',
    "yaml": "mit\n---\nlicense: evil\ntags: [evil]\n---\n",
    "jinja": "{{ 7 * 7 }}{% for x in y %}{{ ''.__class__ }}{# #}",
    "formula": "$$x$$ \\\\(y\\\\) \\",
    "fence": "```\n\n# Evil\n\n~~~",
    "heading": "# Evil\n===",
    "autolink": "https://evil.example www.evil.example <https://evil.example>",
    "reading order": "\u202elive\u2066 \u200fx",
    "entity": "&lt;script&gt; &#60;b&#62;",
}
HUB = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])


class Skeleton(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[Any] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, [(name, value) for name, value in attrs if name != "alt"]))

    def handle_endtag(self, tag: str) -> None:
        self.tags.append(f"/{tag}")

    def handle_comment(self, data: str) -> None:
        self.tags.append(("comment", data))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def card(template: str | None = None, **others: str) -> tuple[dict[str, Any], Skeleton]:
    """The metadata and the page of a card with these words of others at the places of their names."""
    said = (
        dict.fromkeys(("folder", "licence", "comment", "field", "why", "title", "measured"), PLAIN)
        | {"field": "no word"}
        | others
    )
    parent = " ".join(said["folder"].replace("/", "∕").split())
    tiny.models(Path(), parent, "two")
    about = {"license": "other", "license_name": said["licence"], "license_link": said["field"],
             "pipeline_tag": said["field"], "language": [said["field"]], "datasets": [said["field"], "good/data"],
             "library_name": said["field"]}  # fmt: skip
    (Path(parent) / "README.md").write_text(f"---\n{yaml.safe_dump(about)}---\n{said['field']}")
    (Path("two") / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    publish = {"license": "mit", "license_override": said["why"]} | ({"template": template} if template else {})
    recipe = {
        "merge_method": "linear",
        "models": [{"model": {"model": {"path": f"./{parent}"}}}, {"model": "./two"}],
        "parameters": {"weight": 1},
        "publish": publish,
    }
    comment = "".join(f"# {line}\n" for line in said["comment"].splitlines())
    Path("mine.yaml").write_text(comment + yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
    row = Relation(said["measured"], 0.5, 0.25, (1.0, 0.5), 0.75)
    parts = {"related": Relations((row,), (row,), (said["measured"],)), "lineage": said["measured"],
             "pictures": {"lineage": {"alt": said["measured"], "place": "a.png"}},
             "evaluation": {"columns": [said["measured"]], "rows": [[said["measured"]]], "note": said["measured"],
                            "verdict": [said["measured"]]},
             }  # fmt: skip
    planned = merger.plan("mine.yaml")
    made = render(planned, methods(), said["title"], parts)
    assert problems(made) == ([], [])
    _, front, body = made.split("---\n", 2)
    return yaml.safe_load(front), Skeleton(HUB.render(body))


plain_card = cache(card)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", NASTY)
def test_words_of_others_change_their_own_text_alone(place: str, kind: str) -> None:
    """At each place where they stand: no tag, no link, no part and no metadata comes of them, or is lost."""
    words = NASTY[kind]
    title = " ".join(words.split()).replace("/", "∕") if place == "title" else words
    plain_data, plain = plain_card()
    data, page = card(**{place: title})
    assert data == plain_data
    assert page.tags == plain.tags
    if place != "field":  # of which nothing is taken over that is not in the form of its key
        first = visible(words.splitlines()[0].replace("/", "∕"))
        assert "".join(first.split()) in "".join(page.text.replace("/", "∕").split())


TEMPLATE = """\
# {{ title }}

<table><tr><td title="{{ title }}" class='{{ parents[0].licence }}'>{{ parents[0].name }}</td></tr></table>

[{{ title }}](https://good.example) and *{{ licence.override }}*
- {{ title }}

| a | b |
|---|---|
| {{ parents[0].name }} | {{ title }} |
"""


@pytest.mark.usefixtures("rendered_here")
@pytest.mark.parametrize("kind", NASTY)
def test_in_a_template_of_ones_own_too(kind: str) -> None:
    """In raw HTML, in its attributes, in links and in cells alike."""
    Path("own.md").write_text(TEMPLATE)
    words = " ".join(NASTY[kind].split()).replace("/", "∕")
    plain = plain_card("own.md")[1]
    page = card("own.md", folder=words, title=words, licence=words, why=words)[1]
    assert [tag if isinstance(tag, str) else (tag[0], [name for name, _ in tag[1]]) for tag in page.tags] == [
        tag if isinstance(tag, str) else (tag[0], [name for name, _ in tag[1]]) for tag in plain.tags
    ]
