"""TIES: trim each task vector, elect a sign at every entry, merge what agrees. Not here: random dropping (dare)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from merger.methods._ops import Blocks, elect_and_merge, kth_magnitudes, l1_factors, per_model, trim
from merger.methods.registry import Deltas, Paper, PerModel, Range, merge_method

if TYPE_CHECKING:
    from torch import Tensor

_PAPER = Paper(
    "Yadav et al.",
    2023,
    "TIES-Merging: Resolving Interference When Merging Models",
    "https://arxiv.org/abs/2306.01708",
)


@dataclass(frozen=True)
class Trim:
    """For each model the magnitude below which an entry goes, and the factor for what stays."""

    thresholds: tuple[float, ...]
    factors: tuple[float, ...]


def measure(blocks: Blocks, density: Sequence[float], rescale: bool = False) -> Trim:
    """The threshold of each whole tensor: the magnitude of the k-th largest entry, exactly."""
    thresholds = kth_magnitudes(blocks, density)
    if not rescale:
        return Trim(thresholds, (1.0,) * len(thresholds))
    return Trim(thresholds, l1_factors(blocks, density, lambda model, delta, _: trim(delta, thresholds[model])))


@merge_method(
    "ties",
    title="TIES",
    formula=(
        r"\theta = \theta_0 + \lambda \frac{\sum_{i \in A} w_i \hat\tau_i}{\sum_{i \in A} w_i},"
        r"\quad A = \lbrace i : \operatorname{sgn} w_i \hat\tau_i = \operatorname{sgn} \textstyle\sum_j"
        r" w_j \hat\tau_j \rbrace"
    ),
    paper=_PAPER,
    models=(1, None),
    measure=measure,
    laws=("zero", "idempotent", "permutation", "scale"),
)
def ties(
    deltas: Deltas,
    weight: PerModel = 1.0,
    density: Annotated[PerModel, Range(0, 1)] = 1.0,
    normalize: bool = True,
    lambda_: float = 1.0,
    rescale: bool = False,
    *,
    measured: Trim | None = None,
) -> Tensor:
    """The largest entries of each task vector, merged where they agree on a sign.

    Trim: of each τᵢ = θᵢ − θ₀ the k = int(density · N) entries of largest magnitude stay, at least one; τ̂ᵢ.
    Elect: s = + where Σ wᵢ τ̂ᵢ ≥ 0, else −.
    Merge: Δ = Σ wᵢ τ̂ᵢ over the i whose wᵢ τ̂ᵢ has sign s, divided if normalize by Σ wᵢ over the same i (1 where that is
    zero). The result is θ₀ + λ Δ. Follows mergekit in weighting the votes and the mean; the paper has no weights.

    Departs from mergekit: entries equal to the threshold stand together (a sort keeps some of them, by chance); the
    rescaling is left out only where less than 1e-7 of the delta's norm is left, not for every small delta; with weights
    of both signs, a divisor that is zero but for rounding counts as zero. All in float32, whatever the dtype. Until
    mergekit 0.1.4 density 0 ends in an error there, and so does a tensor of fewer than 1 / density entries.

    Args:
        weight: how much each task vector counts, in the vote and in the mean.
        density: share of entries kept in each task vector, by magnitude.
        normalize: divide by the sum of the weights of the models that agree.
        lambda_: what the merged task vector is multiplied by before the base is added.
        rescale: multiply each trimmed task vector so that its L1 norm is that of the whole one.

    >>> import torch
    >>> one, other = torch.tensor([4.0, -1.0, 2.0, 0.5]), torch.tensor([2.0, 3.0, -5.0, 0.1])
    >>> ties([one, other])
    tensor([ 3.0000,  3.0000, -5.0000,  0.3000])
    >>> ties([one, other], density=0.5)
    tensor([ 4.,  3., -5.,  0.])
    """
    weights, densities = per_model(weight, len(deltas)), per_model(density, len(deltas))
    found = measured or measure([deltas], densities, rescale)
    kept = [trim(*pair, f"term {model}") for model, pair in enumerate(zip(deltas, found.thresholds, strict=True))]
    return elect_and_merge(kept, weights, found.factors, normalize, lambda_)
