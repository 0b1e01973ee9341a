"""A recipe made into a folder, for tests of what a merge holds: without its card, which takes longer than the merge.

Not here: tests of cards, of destinations and of the command.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

from merger.card.relations import Relations
from merger.planning.plan import Plan
from merger.run import artifacts as beside
from merger.run import pipeline as run
from merger.run.options import Options
from merger.run.prepare import plan, read_recipe

_NO_CARD = beside.Card("---\n---\n", Relations())


def merged(recipe: str, out: Path, card: bool = False, **options: Any) -> Plan:
    """Make the recipe, written beside `out`, in `out`; what was planned for it."""
    path = out.with_suffix(".yaml")
    path.write_text(recipe)
    chosen = Options(**{"to": str(out), "threads": 1, **options})
    planned, store = plan(read_recipe(path), chosen)
    with patch("merger.run.pipeline.card", beside.card if card else lambda *_, **__: _NO_CARD):
        run.merge(planned, store, chosen)
    return planned
