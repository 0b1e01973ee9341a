"""A model's tensors with what a LoRA adapter makes of them, as sources of a plan.

Not here: what an adapter's files hold (checkpoints.adapter), and the arithmetic (engine.adapters).
"""

from __future__ import annotations

from merger.plan.lock import LockedModel, LockedRecipe
from merger.plan.sources import Added, LowRank, Source, Stored


def changed(locked: LockedRecipe, model: LockedModel, stored: Stored) -> Source:
    """A model's tensor as its adapter changes it; as it is stored where the model has none, or it leaves it alone."""
    change = model.changes.get(stored.tensor.name)
    if change is None or model.adapter is None:
        return stored
    number = locked.index(model.adapter.ref)
    source: Source = stored if change.whole is None else Stored(number, change.whole)
    if change.low_rank is not None:
        low = change.low_rank
        magnitude = None if low.magnitude is None else Stored(number, low.magnitude)
        source = LowRank(source, Stored(number, low.a), Stored(number, low.b), low.scale, change.turned, magnitude)
    return source if change.added is None else Added(source, Stored(number, change.added), change.scale)
