"""A card shows the recipe word for word, but for the places of folders on somebody's disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import yaml

import merger
from merger.card.render import shown_recipe


@pytest.mark.parametrize(("written", "shown"), [
    ("{place}/one", "./one"), ("'{place}/one'", "'./one'"), ('"{place}/one"', '"./one"'),
    ("&a {place}/one", "&a ./one"), ("!!str {place}/one", "!!str ./one"), ('"{escaped}/one"', '"./one"'),
    ("{place}/one/", "./one"), ("./one", "./one"), ("one", "one"),
])  # fmt: skip
def test_places_of_folders_are_not_shown(
    written: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it is written; comments and all else stay."""
    tiny.models(tmp_path, "one", "two")
    monkeypatch.chdir(tmp_path)
    escaped = str(tmp_path).replace("/", "\\x2f")
    text = (
        f"# {tmp_path}/one is mine, 'one' is a word\nmerge_method: linear\nparameters: {{weight: 1}}\nmodels:\n"
        f"  - model: {written.format(place=tmp_path, escaped=escaped)} # one\n  - model: ./two\n"
    )
    Path("mine.yaml").write_text(text)
    found = shown_recipe(merger.plan("mine.yaml"))
    assert f"  - model: {shown} # one\n  - model: ./two\n" in found
    assert str(tmp_path) not in yaml.safe_dump(yaml.safe_load(found))
    if "{place}" in written:
        assert found.startswith("# ./one is mine, 'one' is a word\n")


def test_a_recipe_without_folders_elsewhere_is_shown_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the letter."""
    tiny.models(tmp_path, "one", "two")
    monkeypatch.chdir(tmp_path)
    text = "merge_method:   linear # ok\nparameters: {weight: 1}\nmodels: [{model: ./one}, {model: ./two}]"
    Path("mine.yaml").write_text(text)
    assert shown_recipe(merger.plan("mine.yaml")) == text
