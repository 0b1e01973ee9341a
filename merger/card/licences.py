"""The licence of a merge: what the recipe says, else what all parents agree on. No legal advice, and no guessing.

Not here: reading the parents' cards (plan.lock).
"""

from __future__ import annotations

from merger.plan.plan import Plan


def licence(planned: Plan) -> str | None:
    """The identifier for the card's metadata; None where the parents' licences differ or one is unknown."""
    stated = planned.locked.recipe.publish.license
    if stated is not None:
        return " ".join(stated.split())  # a line break could end the card's front matter
    theirs = {model.licence for model in planned.locked.models}
    return theirs.pop() if len(theirs) == 1 else None


def licence_note(planned: Plan) -> str | None:
    """What the publisher should still decide, or None."""
    if licence(planned) is not None:
        return None
    known = dict.fromkeys(model.licence or "unknown" for model in planned.locked.models)
    return f"the parents' licences are {', '.join(known)}: state the result's with publish: {{license: ...}}"
