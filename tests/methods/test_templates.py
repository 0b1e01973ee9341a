"""The recipes that people start from: each parses without a word, and is called after the method it shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from merger.methods.registry import methods
from merger.recipe.parse import parse

RECIPES = sorted((Path(__file__).parents[2] / "templates" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_template_parses_and_says_what_it_is(path: Path) -> None:
    """No problem, no warning, a comment at the top; the file is called after its method (LiNeS is a gradient)."""
    text = path.read_text(encoding="utf-8")
    recipe = parse(text, path.name, methods())
    assert not recipe.warnings
    assert text.startswith("# ")
    assert path.stem == "lines" or f"\nmerge_method: {path.stem}\n" in text
