"""RAM: what one model alone changed goes in whole, what several changed is averaged. Not here: a vote on signs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from merger.methods._ops import Blocks, array, scratch
from merger.methods.registry import Deltas, Paper, Range, full, merge_method

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

_PAPER = Paper(
    "Yuan et al.",
    2026,
    "Behavior Knowledge Merge in Reinforced Agentic Models",
    "https://arxiv.org/abs/2601.13572",
)


@merge_method(
    "ram",
    title="RAM",
    formula=(
        r"\theta = \theta_0 + \frac{\sum_i \hat\tau_i}{\max(c, 1)}, \quad c = \lvert \lbrace i : \lvert"
        r" \tau_i \rvert \gt \varepsilon \rbrace \rvert"
    ),
    paper=_PAPER,
    models=(1, None),
    laws=("zero", "permutation"),
)
def ram(deltas: Deltas, epsilon: Annotated[float, Range(0)] = 1e-5) -> Tensor:
    """What one model alone changed, in full, and the mean of what several changed.

    Of each τᵢ = θᵢ − θ₀ the entries with |τᵢ| > ε count as changed: τ̂ᵢ, zero elsewhere. With c the number of models
    that changed an entry, the result is θ₀ + Σ τ̂ᵢ / max(c, 1): so a change that no other model made is not diluted.

    Departs from mergekit: in float32, whatever the dtype; the rest is the same.

    Args:
        epsilon: the magnitude up to which an entry counts as unchanged.

    >>> import torch
    >>> ram([torch.tensor([1.0, 2.0, 0.0, -3.0]), torch.tensor([0.0, 4.0, 0.0, 1.0])])
    tensor([ 1.,  3.,  0., -1.])
    """
    return _merged(deltas, epsilon, [1.0] * len(deltas))


def measure(blocks: Blocks, r: float, alpha: float, epsilon: float) -> tuple[float, ...]:
    """What each model's own changes are multiplied by, from the counts over the whole tensor."""
    counts = [_counts(block, epsilon) for block in blocks]
    totals = [
        (sum(own), sum(shared)) for own, shared in (zip(*model, strict=True) for model in zip(*counts, strict=True))
    ]
    return tuple(1 + r * min(alpha, shared / own if own else alpha) for own, shared in totals)


def _counts(deltas: Sequence[Tensor], epsilon: float) -> list[tuple[int, int]]:
    """For each model how many entries it alone changed, and how many another changed too."""
    import numpy as np

    changed = [np.abs(array(delta)) > np.float32(epsilon) for delta in deltas]
    models = np.zeros(changed[0].size, np.uint16)
    for mask in changed:
        models += mask.view(np.uint8)
    own = [_count(mask & (models == 1)) for mask in changed]
    return [(alone, _count(mask) - alone) for mask, alone in zip(changed, own, strict=True)]


def _count(mask: NDArray[np.bool_]) -> int:
    import numpy as np

    return int(np.count_nonzero(mask))


@merge_method(
    "ramplus_tl",
    title="RAM+ (tensor-local)",
    formula=(
        r"\theta = \theta_0 + \frac{\sum_i \lambda_i \hat\tau_i}{\max(c, 1)},"
        r"\quad \lambda_i = 1 + r \min(\alpha, \rho_i) \text{ where } c = 1, \text{ else } 1"
    ),
    paper=_PAPER,
    models=(1, None),
    measure=measure,
    laws=("zero", "permutation", full("ram", r=0)),
)
def ramplus_tl(
    deltas: Deltas,
    r: float = 0.1,
    alpha: Annotated[float, Range(0)] = 0.2,
    epsilon: Annotated[float, Range(0)] = 1e-5,
    *,
    measured: tuple[float, ...] | None = None,
) -> Tensor:
    """What one model alone changed, enlarged the more it shares, and the mean of what several changed.

    Changes, c and the mean are those of ram. A change that model i alone made is multiplied by λᵢ = 1 + r · min(α, ρᵢ),
    where ρᵢ is the number of its changes that others made too over the number of those it made alone, in this tensor:
    what averaging takes from a model is given back where it stands alone. The paper counts over the whole model; this
    is mergekit's tensor-local form.

    Departs from mergekit: in float32, whatever the dtype; the rest is the same.

    Args:
        r: how much a model's own changes are enlarged for each unit of ρ.
        alpha: the largest ρ that counts.
        epsilon: the magnitude up to which an entry counts as unchanged.

    >>> import torch
    >>> one, other = torch.tensor([1.0, 2.0, 0.0, -3.0]), torch.tensor([0.0, 4.0, 0.0, 1.0])
    >>> ramplus_tl([one, other], r=1, alpha=0.5)
    tensor([ 1.5000,  3.0000,  0.0000, -1.0000])
    """
    return _merged(deltas, epsilon, measured or measure([deltas], r, alpha, epsilon))


def _merged(deltas: Sequence[Tensor], epsilon: float, factors: Sequence[float]) -> Tensor:
    """The mean of the changes at each entry; where only one model made any, that times the model's factor."""
    import torch

    total, models, own = (scratch(slot, deltas[0]).zero_() for slot in ("total", "models", "own"))
    for delta, factor in zip(deltas, factors, strict=True):
        change = torch.hardshrink(delta, lambd=epsilon, out=scratch("trimmed", delta))
        total.add_(change)
        models.add_(torch.ne(change, 0, out=scratch("part", delta)))
        if factor != 1:
            own.add_(change.mul_(factor - 1))
    own.mul_(torch.eq(models, 1, out=scratch("part", own)))
    return total.div_(models.clamp_min_(1)).add(own)
