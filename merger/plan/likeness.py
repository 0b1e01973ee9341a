"""What is said of a model that lacks layers which another has: the same ones under another name, or none like them.

Not here: whether tensors of one name fit each other (jobs).
"""

from __future__ import annotations

from merger.plan.locked import LockedModel


def unlike(donor: LockedModel, other: LockedModel, stack: str) -> tuple[str, str]:
    """What a model lacks, and what to do about it.

    Args:
        donor: the model that has the stack.
        other: the model that has no stack of this name.
        stack: the stack's name.
    """
    ours, theirs = donor.architecture.stacks, other.architecture.stacks
    pairs = [(mine, name) for mine in ours for name in theirs if name not in ours]
    alike = [(mine, name) for mine, name in pairs if _built(donor, mine) == _built(other, name)]
    if alike:
        mine, name = next((pair for pair in alike if pair[0] == stack), alike[0])
        what = f"the layers {mine}.N of {donor.name} are called {name}.N in {other.name}"
        found = ((len(ours), len(mine), donor), (len(theirs), len(name), other))
        (*_, less), (*_, more) = sorted(found, key=lambda each: each[:2])
        return what, _one_name(less, more)
    shared = " and ".join(name for name in theirs if name in ours)
    what = f"{other.name} has no layers {stack}.N (its stacks of layers: {', '.join(theirs) or 'none'})"
    hint = f"modules: with {shared} and default alone merges what both have, and copies the rest"
    return what, hint if shared else "only models of one architecture can be merged"


def _built(model: LockedModel, stack: str) -> frozenset[tuple[str, tuple[int, ...]]]:
    """The roles and shapes of a stack's first layer."""
    return frozenset((model.architecture.place(tensor.name).role, tensor.shape) for tensor in model.layer(stack, 0))


def _one_name(less: LockedModel, more: LockedModel) -> str:
    """How two models come by the same names."""
    kinds = [_class(model) for model in (less, more)]
    if kinds[0] == kinds[1]:
        return "save both with one version of transformers, and merge those"
    told = f"{more.name} is a {kinds[1]}, {less.name} a {kinds[0]}"
    return f"{told}: save what {more.name} has of a {kinds[0]} with transformers, and merge that"


def _class(model: LockedModel) -> str:
    """The class that its config names."""
    named = model.checkpoint.config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else "model of no named class"
