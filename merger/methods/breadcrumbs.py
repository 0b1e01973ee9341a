"""Model Breadcrumbs: of each task vector drop the largest entries and the small ones; then a sum, or TIES's election.

Not here: the search for the two magnitudes between which entries stay (`_select`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from merger.methods._ops import (
    Blocks,
    band,
    divisor,
    elect_and_merge,
    l1_factors,
    magnitudes_at,
    per_model,
    weighted_sum,
)
from merger.methods.registry import Deltas, Paper, PerModel, Range, full, merge_method

if TYPE_CHECKING:
    from torch import Tensor

_PAPER = Paper(
    "Davari & Belilovsky",
    2023,
    "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
    "https://arxiv.org/abs/2312.06795",
)


@dataclass(frozen=True)
class Bands:
    """For each model the least and the largest magnitude of what stays, and the factor for it."""

    limits: tuple[tuple[float, float], ...]
    factors: tuple[float, ...]


def measure(blocks: Blocks, density: Sequence[float], gamma: Sequence[float], rescale: bool = False) -> Bands:
    """The band of each whole tensor, exactly: both its ends are found in the same passes."""
    wanted = {model: _ends(*pair) for model, pair in enumerate(zip(density, gamma, strict=True)) if 0 < pair[0] < 1}
    found = magnitudes_at(blocks, wanted)
    limits = tuple(_limits(share, found.get(model)) for model, share in enumerate(density))
    if not rescale:
        return Bands(limits, (1.0,) * len(limits))
    return Bands(limits, l1_factors(blocks, density, lambda model, delta, _: band(delta, *limits[model])))


def _ends(density: float, gamma: float) -> Callable[[int], tuple[int, int]]:
    """From the number of entries to the ranks of the largest and of the least that stay."""

    def ranks(entries: int) -> tuple[int, int]:
        kept = max(1, int(density * entries))
        outliers = min(int(gamma * entries), max(0, entries - kept))
        return outliers + 1, outliers + kept

    return ranks


def _limits(density: float, found: Sequence[float] | None) -> tuple[float, float]:
    """The band's floor and ceiling; all entries for density 1, none for density 0."""
    if found is None:
        return (0.0 if density >= 1 else math.inf), math.inf
    return found[1], found[0]


@merge_method(
    "breadcrumbs",
    title="Model Breadcrumbs",
    formula=(
        r"\theta = \theta_0 + \lambda \sum_i w_i \hat\tau_i,"
        r"\quad \hat\tau_i = \theta_i - \theta_0 \text{ without its largest and its small entries}"
    ),
    paper=_PAPER,
    models=(1, None),
    measure=measure,
    laws=("zero", "permutation", "scale", full("task_arithmetic", density=1)),
)
def breadcrumbs(
    deltas: Deltas,
    weight: PerModel = 1.0,
    density: Annotated[PerModel, Range(0, 1)] = 1.0,
    gamma: Annotated[PerModel, Range(0, 1)] = 0.01,
    normalize: bool = False,
    lambda_: float = 1.0,
    rescale: bool = False,
    *,
    measured: Bands | None = None,
) -> Tensor:
    """The entries of middle magnitude of each task vector, summed.

    Of each τᵢ = θᵢ − θ₀ the g = int(γ · N) entries of largest magnitude go, and of the others the k = int(density · N)
    largest stay, at least one; where the tensor has not so many, fewer of the largest go. The result is θ₀ + λ Σ wᵢ τ̂ᵢ,
    the sum divided by Σ wᵢ if normalize (undivided where that is zero). Density 1 leaves a task vector as it is.

    Departs from mergekit: entries of one magnitude stay or go together, and those equal to the largest or to the least
    that stays stay; a tensor of fewer than 1 / density entries keeps one, where there it loses its whole task vector.
    The rescaling is left out only where less than 1e-7 of the delta's norm is left. All in float32, whatever the dtype.
    Until mergekit 0.1.4 a gamma so small that no entry is an outlier (gamma 0, or a tensor of fewer than 1 / γ entries)
    erases the whole task vector there.

    Args:
        weight: how much of each task vector goes in.
        density: share of entries kept in each task vector, by magnitude, the outliers left aside.
        gamma: share of entries dropped as outliers, the largest.
        normalize: divide by the sum of the weights, so that only their ratios count.
        lambda_: what the merged task vector is multiplied by before the base is added.
        rescale: multiply what is kept, so that its L1 norm is that of the whole task vector.

    >>> import torch
    >>> breadcrumbs([torch.tensor([9.0, -3.0, 2.0, 0.5])], density=0.5, gamma=0.25)
    tensor([ 0., -3.,  2.,  0.])
    >>> breadcrumbs([torch.tensor([9.0, -3.0, 2.0, 0.5])], density=0.5, gamma=0)
    tensor([ 9., -3.,  0.,  0.])
    """
    weights = per_model(weight, len(deltas))
    kept, factors = _in_bands(deltas, density, gamma, rescale, measured)
    share = lambda_ / divisor(weights, normalize)
    return weighted_sum(kept, [number * share * factor for number, factor in zip(weights, factors, strict=True)])


@merge_method(
    "breadcrumbs_ties",
    title="Breadcrumbs-TIES",
    formula=(
        r"\theta = \theta_0 + \lambda \sum_{i \in A} w_i \hat\tau_i,"
        r"\quad A = \lbrace i : \operatorname{sgn} w_i \hat\tau_i = \operatorname{sgn} \textstyle\sum_j"
        r" w_j \hat\tau_j \rbrace"
    ),
    paper=_PAPER,
    models=(1, None),
    measure=measure,
    laws=("zero", "permutation", "scale", full("ties", density=1)),
)
def breadcrumbs_ties(
    deltas: Deltas,
    weight: PerModel = 1.0,
    density: Annotated[PerModel, Range(0, 1)] = 1.0,
    gamma: Annotated[PerModel, Range(0, 1)] = 0.01,
    normalize: bool = False,
    lambda_: float = 1.0,
    rescale: bool = False,
    *,
    measured: Bands | None = None,
) -> Tensor:
    """The entries of middle magnitude of each task vector, merged where they agree on a sign.

    Drops the largest and the small entries as breadcrumbs: τ̂ᵢ. Then elects and merges as ties: s = + where
    Σ wᵢ τ̂ᵢ ≥ 0, else −; Δ = Σ wᵢ τ̂ᵢ over the i whose term has sign s, divided if normalize by Σ wᵢ over the same i (1
    where that is zero). The result is θ₀ + λ Δ.

    Departs from mergekit: as breadcrumbs, and in the divisor as ties.

    Args:
        weight: how much each task vector counts, in the vote and in the sum.
        density: share of entries kept in each task vector, by magnitude, the outliers left aside.
        gamma: share of entries dropped as outliers, the largest.
        normalize: divide by the sum of the weights of the models that agree.
        lambda_: what the merged task vector is multiplied by before the base is added.
        rescale: multiply what is kept, so that its L1 norm is that of the whole task vector.

    >>> import torch
    >>> one, other = torch.tensor([9.0, -3.0, 2.0, 0.5]), torch.tensor([1.0, 4.0, 7.0, 8.0])
    >>> breadcrumbs_ties([one, other], density=0.5, gamma=0.25)
    tensor([0., 4., 9., 0.])
    """
    weights = per_model(weight, len(deltas))
    kept, factors = _in_bands(deltas, density, gamma, rescale, measured)
    return elect_and_merge(kept, weights, factors, normalize, lambda_)


def _in_bands(
    deltas: Deltas, density: PerModel, gamma: PerModel, rescale: bool, measured: Bands | None
) -> tuple[list[Tensor], Sequence[float]]:
    """What stays of each task vector, and the factor it is to be multiplied by."""
    models = len(deltas)
    found = measured or measure([deltas], per_model(density, models), per_model(gamma, models), rescale)
    kept = [band(delta, *found.limits[model], f"term {model}") for model, delta in enumerate(deltas)]
    return kept, found.factors
