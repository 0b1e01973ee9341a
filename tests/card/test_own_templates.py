"""A recipe's own templates: what they may do, what they may not, and where it is said that they break."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
from loopback import Client, LoopbackHub

import merger
from merger.card.render import render
from merger.errors import RecipeError
from merger.methods.registry import methods
from merger.safety.apart import Bounds

RECIPE = """\
merge_method: linear
models:
  - model: ./one
    parameters: {weight: 0.5}
  - model: ./two
    parameters: {weight: 0.5}
publish:
  template: %s
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with two small models, and a folder for templates."""
    tiny.models(tmp_path, "one", "two")
    (tmp_path / "one" / "README.md").write_text("---\nlicense: 'a*b <c>'\n---\n")
    (tmp_path / "own" / "parts").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def body(template: str, name: str = "org/a_b") -> str:
    """The card of a recipe with this value for publish.template, below its metadata."""
    Path("mine.yaml").write_text(RECIPE % template)
    planned = merger.plan("mine.yaml")
    return render(planned, methods(), name).split("---\n", 2)[2]


def of(text: str) -> str:
    """The card of this template."""
    Path("own.md").write_text(text)
    return body("own.md")


def refusal(template: str) -> str:
    """What is said at plan time about publish.template with this value."""
    with pytest.raises(RecipeError) as refused:
        body(template)
    (problem,) = refused.value.problems
    assert str(problem.at) == "mine.yaml:8:13"
    return str(problem)


def test_a_file_stands_in_for_the_whole_card() -> None:
    """Its values are escaped without being asked to; the metadata stands above it all the same."""
    assert of("# {{ title }} of {{ parents | length }}\n") == "# a\\_b of 2\n"


def test_a_file_may_change_a_block_of_ours() -> None:
    """Under the name merger/card.md.j2 it extends our card, and keeps what it does not name."""
    made = of('{% extends "merger/card.md.j2" %}{% block head %}# Mine\n{{ super() }}{% endblock %}')
    assert made.startswith("# Mine\n# a\\_b\n")
    assert "<summary>The recipe" in made


def test_a_folder_holds_parts(folder: Path) -> None:
    """A file in it stands in for ours of the same name; others are ours, and it may use the one it stands for."""
    (folder / "own/parts/recipe.md.j2").write_text('## My recipe\n\n{% include "merger/parts/recipe.md.j2" %}')
    made = body("own")
    assert "## My recipe\n\n<details>\n<summary>The recipe" in made
    assert "## How it was made" in made


@pytest.mark.parametrize("path", ["template", "template/card.md.j2", "template/card.md.j2@main"])
def test_a_template_from_the_hub(path: str, hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    """A folder or a file of a repo, at a revision, is read from the Hub."""
    if not hub.exists("org/cards"):
        hub.add_model("org/cards", {"template/card.md.j2": b"# Of the Hub: {{ title }}\n", "README.md": b"# x\n"})
    made = client(_body, str(tmp_path), RECIPE % f"hf://org/cards/{path}")
    assert made == "# Of the Hub: a\\_b\n"


def _body(folder: str, recipe: str) -> str:
    import os

    os.chdir(folder)
    Path("mine.yaml").write_text(recipe)
    planned = merger.plan("mine.yaml")
    return render(planned, methods(), "org/a_b").split("---\n", 2)[2]


LICENCE = "parents[0].licence"


@pytest.mark.usefixtures("rendered_here")
@pytest.mark.parametrize(
    ("template", "shown"),
    [
        ("{{ %s }}", "a\\*b &lt;c&gt;"),
        ("{{ %s ~ '*' }}", "a\\*b &lt;c&gt;\\*"),
        ("{{ (%s | code) ~ %s }}", "\\`a\\*b &lt;c&gt;\\`a\\*b &lt;c&gt;"),
        ("{{ [%s, %s | code] | join('|') }}", "a\\*b &lt;c&gt;\\|`a*b <c>`"),
        ("{% macro m() %}*{{ %s }}*{% endmacro %}{{ m() }}", "*a\\*b &lt;c&gt;*"),
        ("{% macro m() %}{{ %s }}{% endmacro %}{{ m() ~ %s }}", "a&#92;\\*b &amp;lt;c&amp;gt;a\\*b &lt;c&gt;"),
        ("{% macro m() %}<{% endmacro %}{{ m() + %s }}", "&lt;a\\*b &lt;c&gt;"),
        ("{% macro m() %}%#{% endmacro %}{{ m() | format(%s) }}", "a\\*b &lt;c&gt;"),
        ("{% macro m() %}x{% endmacro %}{{ m() | replace('x', %s) }}", "a\\*b &lt;c&gt;"),
        ("{% set x %}{{ %s }}{% endset %}{{ x }}", "a\\*b &lt;c&gt;"),
        ("{{ %s | e }}", "a\\*b &lt;c&gt;"),
        ("{{ '%#!' | format(%s) }}", "a\\*b &lt;c&gt;!"),
    ],
)
def test_no_way_around_escaping(template: str, shown: str) -> None:
    """However a template puts text together, what is not Markdown by a filter for it is escaped."""
    assert of(template.replace("%s", LICENCE).replace("%#", "%s")).rstrip() == shown


@pytest.mark.usefixtures("rendered_here")
@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("\n{{ ''.__class__.__mro__ }}", "own.md:2: the card's template cannot be rendered: it leaves the sandbox: "
         "access to attribute '__class__' of 'str' object is unsafe\n    docs/cards.md says what a template may use"),
        ("{{ title | attr('__class__') }}", "it leaves the sandbox"),
        ("{{ '{0.__class__}'.format(title) }}", "it leaves the sandbox"),
        ("{{ title.upper.__self__ }}", "it leaves the sandbox"),
        ("{{ (title | code).join([title]) }}", "it leaves the sandbox"),
        ("{{ self.__init__.__globals__ }}", "it leaves the sandbox"),
        ("\n\n{{ titel }}", "own.md:3: the card's template cannot be rendered: 'titel' is undefined\n"
         "    did you mean 'title'?"),
        ("{{ parents[0].where }}", "has no attribute 'where'"),
        ("a\n{% for %}", "own.md:2: the card's template cannot be rendered: Expected an expression"),
        ("{% include 'parts/none.md.j2' %}", "there is no template parts/none.md.j2"),
        ("{% include '/etc/hostname' %}", "there is no template /etc/hostname"),
        ("{% include '../card.md.j2' %}", "there is no template ../card.md.j2"),
        ("{{ title | safe }}", "No filter named 'safe'"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ parents }}", "a list has no text: name a part of it"),
        ("{{ range }}", "function has no text: name a part of it"),
        ("{% include 'card.md.j2' %}", "RecursionError"),
        ("{{ 'a' * 2000000 }}", "it makes a card of 2,000,000 characters; 1,000,000 are allowed"),
        ("---\nlicense: mit\n---\n# x", "it begins with front matter, which is made without it: leave that out"),
        ("{% if lineage %}{{ nobody }}{% endif %}", "'nobody' is undefined"),
    ],
)  # fmt: skip
def test_a_template_that_breaks(template: str, said: str) -> None:
    """At plan time it is told where and why: in what is rendered at the end alone, too."""
    Path("own.md").write_text(template)
    assert said in refusal("own.md")


def test_a_part_that_breaks_names_its_own_file(folder: Path) -> None:
    """Not the file that includes it."""
    (folder / "own/parts/use.md.j2").write_text("\n{{ nobody }}")
    assert "own/parts/use.md.j2:2: the card's template cannot be rendered" in refusal("own")


def test_a_slip_of_a_parts_name(folder: Path) -> None:
    """A file that stands in for nothing is refused, with the name that was meant."""
    (folder / "own/parts/modles.md.j2").write_text("x")
    assert refusal("own").endswith("did you mean 'parts/models.md.j2'?")


@pytest.mark.parametrize("template", ["none.md", "none/none.md", "hf://nowhere", "own"])
def test_a_missing_template(template: str) -> None:
    """What is not there, and a folder without a template, is said with what may stand there."""
    said = refusal(template)
    assert f"there is no template {template!r}\n    name a file, or a folder that holds card.md.j2" in said


def test_a_template_that_is_no_text(folder: Path) -> None:
    """Nor is anything read that is larger than a template could be."""
    (folder / "own.md").write_bytes(b"\xff\xfe")
    assert "the template own.md is no UTF-8 text" in refusal("own.md")
    (folder / "own.md").write_bytes(b"a" * 1_100_000)
    assert "the template own.md has 1.1 MB, and at most 1.0 MB are read" in refusal("own.md")


ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ '' }}{% endfor %}{% endfor %}",
    "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ 10 ** (10 ** 10) }}",
]
LARGE = [
    "{{ 'a' * 10 ** 10 }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ 'a' | center(10 ** 9) }}",
    "{{ 'a' | indent(10 ** 9, first=true) }}",
    "{{ [1] * 10 ** 9 }}",
    "{{ [1] | batch(10 ** 9, 'x') | list }}",
    "{{ 'a' | format }}{{ 'x'.ljust(10 ** 10) }}",
    "{% set x = namespace(a='a') %}{% for i in range(99) %}{% set x.a = x.a ~ x.a %}{% endfor %}",
    "{{ [1] | slice(10 ** 9) | list }}",
    "{{ (1,) * 10 ** 10 }}",
]


@pytest.mark.parametrize("template", [*ENDLESS, *LARGE])
def test_a_template_without_end_or_measure_is_refused(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its name, and neither this process nor the machine suffers from it."""
    monkeypatch.setattr("merger.card.templates._BOUNDS", Bounds(seconds=1))
    Path("own.md").write_text(template)
    before, largest = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    assert "own.md" in refusal("own.md")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
    # a child counts as its parent's size, from which it was forked
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss <= max(largest, before, 400_000) + 200_000


def test_a_template_is_filled_in_without_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a way out of the sandbox would find, it is no secret of ours."""
    monkeypatch.setenv("HF_TOKEN", "hf_a_secret_of_ours")
    asked: list[Mapping[str, str]] = []
    real = subprocess.Popen

    def heard(*line: Any, **how: Any) -> Any:
        asked.append(how["env"])
        return real(*line, **how)

    monkeypatch.setattr("merger.safety.apart.subprocess.Popen", heard)
    assert of("# {{ title }}\n") == "# a\\_b\n"
    assert asked
    assert "hf_a_secret_of_ours" not in str(asked)
