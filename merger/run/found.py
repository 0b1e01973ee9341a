"""What a search has found, as the card tells it and as it lies beside the result. Not here: the search (searching)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merger.card.pictures.canvas import Picture
from merger.models.side_files import SEARCHED_NAME, TRIALS_NAME
from merger.safety.limits import MEASURED, parse_json

_SHAPE: Mapping[str, type] = {"sentence": str, "numbers": list, "columns": list, "rows": list, "told": list}


@dataclass(frozen=True)
class SearchFacts:
    """What is told of a search.

    Args:
        facts: for the card: a `sentence`; `numbers`, each with its name, where it was searched and what was found;
            `columns` and `rows` of what was measured on what no trial has seen; what that means, in sentences (`told`).
        table: all trials as CSV; empty where it lies beside the result already.
        pictures: of the trials.
    """

    facts: Mapping[str, Any]
    table: str = ""
    pictures: tuple[Picture, ...] = ()

    @property
    def part(self) -> dict[str, Any]:
        """The card's part `search`."""
        shown = [{"alt": picture.alt, "place": picture.place} for picture in self.pictures]
        return {"pictures": shown, "table": TRIALS_NAME, **self.facts}

    @property
    def texts(self) -> dict[str, str | None]:
        """The files that are text."""
        return {SEARCHED_NAME: json.dumps(self.part, indent=2) + "\n", TRIALS_NAME: self.table or None}


def read_found(text: str) -> SearchFacts:
    """What such a file says.

    Raises:
        ValueError: it is none.
    """
    facts = parse_json(text, MEASURED)
    if not isinstance(facts, dict) or any(not isinstance(facts.get(key), kind) for key, kind in _SHAPE.items()):
        raise ValueError("no facts of a search")
    return SearchFacts(facts)
