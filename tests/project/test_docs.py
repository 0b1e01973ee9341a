"""What the documents say of the code. Not here: generated tables, which `docs/tables.py --check` compares."""

from __future__ import annotations

import re

import pytest
from places import ROOT

NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "security.md").read_text("utf-8"))))


@pytest.mark.parametrize(("file", "name"), NAMED, ids=[name for _, name in NAMED])
def test_each_line_of_the_threat_model_has_its_test(file: str, name: str) -> None:
    """A test that docs/security.md names is there."""
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text("utf-8"), re.MULTILINE)
