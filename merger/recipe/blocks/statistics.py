"""The language's part about what was measured of a model, or is measured on the way.

    statistics := reference
                | {measure: FILE | hf://[datasets/]owner/name[@revision]/FILE | random-tokens,
                   tokens: 65536, length: 512, seed: 0, blocks: 512, merged: false}

Not here: whether the method asks for it (checks), and measuring (statistics).
"""

from __future__ import annotations

from merger.recipe import spans
from merger.recipe.model import Measure, ModelRef
from merger.recipe.references import UNREADABLE, reference, refuse_mean
from merger.recipe.values import Value
from merger.safety.numbers import COUNT, SEED

GRAM = ("blocks", "merged")
"""Keys for Gram matrices alone."""
MEASURE = ("measure", "tokens", "length", "seed", *GRAM)
WHOLES = {"tokens": COUNT, "length": COUNT, "seed": SEED, "blocks": COUNT}
_DATA = "a file of texts, hf://datasets/owner/name/file, or random-tokens"


def statistics(place: Value, model: ModelRef, kind: str | None) -> ModelRef | None:
    """The statistics that stand at `place`, else UNREADABLE; None: nothing asks for what would be measured.

    Args:
        model: beside which they stand.
        kind: what the method asks for; None: nothing.
    """
    node = place.node
    if not isinstance(node, spans.Mapping) or "measure" not in [entry.key for entry in node.entries]:
        found = reference(place)
        refuse_mean(place, found, "statistics", "name one of them")
        return found
    fields = place.fields("a map with the key measure", MEASURE)
    named = fields.need("measure", f"name {_DATA}") if fields else None
    data = named.text(_DATA) if named else None
    if fields is None or data is None:
        return UNREADABLE
    if kind is None:
        place.warn("nothing asks for what is measured here; it has no effect", "take statistics: out")
        return None
    for key in GRAM if kind != "gram" else ():
        if (odd := fields.get(key)) is not None:
            odd.error(f"{key} is for Gram matrices, and {kind} is measured here", "take it out", odd.key)
    known = fields.wholes(WHOLES) | {"merged": fields.flag("merged")}
    return Measure(f"{kind} of {model} on {data}", at=place.at, kind=kind, model=model, measure=data, **known)
