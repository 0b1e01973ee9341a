"""What the documents say of the code. Not here: generated tables, which `docs/tables.py --check` compares."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from places import PROJECT, ROOT

NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "security.md").read_text("utf-8"))))


@pytest.mark.parametrize(("file", "name"), NAMED, ids=[name for _, name in NAMED])
def test_each_line_of_the_threat_model_has_its_test(file: str, name: str) -> None:
    """A test that docs/security.md names is there."""
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text("utf-8"), re.MULTILINE)


def texts() -> Iterator[tuple[str, str]]:
    """Every file that people read or copy, and every sentence of the program."""
    for pattern in ("*", ".github/**/*", "docs/**/*", "examples/*", "examples/recipes/*", "integrations/**/*",
                    "merger/**/*", "space/**/*", "templates/**/*"):  # fmt: skip
        for path in ROOT.glob(pattern):
            if path.suffix in (".md", ".py", ".yml", ".yaml", ".j2", ".toml", ".ipynb") or path.name == "Makefile":
                yield str(path.relative_to(ROOT)), path.read_text("utf-8")


def test_nothing_says_that_pip_finds_the_package_by_its_name_before_it_does() -> None:
    """What pip is asked for by name alone is on PyPI, which [project.urls] tells by its Download."""
    if "Download" in PROJECT["urls"]:
        pytest.skip("it is published")
    by_name = re.compile(r"pip install [^\n`]*?\bhub-merger\b(?:\[[\w,]+\])?+(?! @)")
    found = [name for name, text in texts() if name != "docs/release.md" and by_name.search(text)]
    assert found == ["pyproject.toml"]  # its comment says from when on it is
    assert by_name.search("pip install 'hub-merger[moe]'")
