"""What plan, run and card say of the result's tokens. Not here: which they are (plan.tokens)."""

from __future__ import annotations

from merger.card.lineage import shown
from merger.plan.plan import Plan


def told(planned: Plan) -> str | None:
    """How many rows there are, whose tokenizer it is, and how many of its model's rows are gone; None: as they were."""
    tokens = planned.tokens
    if tokens is None:
        return None
    of = shown(planned.locked.numbered(tokens.source))
    more = f" and {tokens.new:,} tokens more" if tokens.new else ""
    cut = f"; {tokens.cut:,} rows of {of} behind its last token are left out (rows: base keeps them)"
    return f"{tokens.rows:,} rows: the tokenizer of {of}{more}{cut if tokens.cut else ''}"
