"""Consensus merging by TALL masks: keep the entries of a merge that matter to several of its tasks.

Not here: TALL masks as a way to store models (one mask a task), which is no merge; and trimming or election (ties).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated

from merger.methods._ops import Blocks, elect_and_merge, per_model, scaled, scratch, trim, weighted_sum
from merger.methods._ops import kth_magnitudes as measure_thresholds
from merger.methods.registry import Deltas, Paper, PerModel, Range, full, merge_method

if TYPE_CHECKING:
    from torch import Tensor

_PAPER = Paper(
    "Wang et al.",
    2024,
    "Localizing Task Information for Improved Model Merging and Compression",
    "https://arxiv.org/abs/2405.07813",
)


def measure(blocks: Blocks, density: Sequence[float]) -> tuple[float, ...]:
    """The magnitude below which an entry of each delta is trimmed, as in ties."""
    return measure_thresholds(blocks, density)


def _agreed(terms: Iterable[Tensor], merged: Tensor, strictness: Sequence[float], k: int) -> Tensor:
    """1 where at least `k` of the terms are no smaller than their distance from `merged` times their strictness."""
    import torch

    count = torch.zeros_like(merged)
    for term, factor in zip(terms, strictness, strict=True):
        distance = torch.sub(merged, term, out=scratch("part", merged)).abs_().mul_(factor)
        count.add_(torch.ge(term.abs_(), distance, out=scratch("trimmed", merged)))
    return count.ge_(k)


@merge_method(
    "consensus_ta",
    title="Consensus Task Arithmetic",
    formula=(
        r"\theta = \theta_0 + \lambda \tau \text{ where } \lvert \lbrace i : \lvert \tau_i \rvert \ge"
        r" \lambda_i \lvert \tau - \tau_i \rvert \rbrace \rvert \ge k,"
        r"\quad \tau = \sum_i \tau_i, \quad \tau_i = w_i (\theta_i - \theta_0)"
    ),
    paper=_PAPER,
    models=(1, None),
    laws=("zero", "permutation", "scale", full("task_arithmetic", k=0)),
)
def consensus_ta(
    deltas: Deltas,
    weight: PerModel = 1.0,
    k: Annotated[int, Range(0)] = 2,
    mask_lambda: Annotated[PerModel, Range(0)] = 0.4,
    lambda_: float = 1.0,
) -> Tensor:
    """The sum of the task vectors, where it matters to at least k of them.

    With τᵢ = wᵢ (θᵢ − θ₀) and τ = Σ τᵢ, task i has entry e in its mask where |τᵢ| ≥ λᵢ |τ − τᵢ|: there the sum is near
    the task's own change. The result is θ₀ + λ τ at the entries that at least k masks hold, θ₀ elsewhere. k = 2 drops
    what no task needs and what only one needs; k = 1 only the former; k = 0 nothing (task_arithmetic); k above the
    number of models everything.

    Follows the paper (its released code has > for ≥, which differs only where the result is 0 or
    two numbers are equal). The paper picks each λᵢ among 0.2, 0.3, ..., 0.6 on the task's validation data; without data
    the default is the middle. λ, too, is picked there, among 0.1, 0.2, ..., 1. Weights are not in the paper.

    Args:
        weight: how much of each task vector goes in.
        k: how many tasks an entry must matter to.
        mask_lambda: how strict each task's mask is; larger keeps fewer entries.
        lambda_: what the merged task vector is multiplied by before the base is added.

    >>> import torch
    >>> one, other = torch.tensor([1.0, 2.0, 0.1, 3.0]), torch.tensor([1.0, 1.0, 4.0, -2.0])
    >>> consensus_ta([one, other])
    tensor([2., 3., 0., 1.])
    >>> consensus_ta([one, other], k=1)
    tensor([2.0000, 3.0000, 4.1000, 1.0000])
    """
    # λ goes into the terms: a factor common to all changes no mask, and so k = 0 is task arithmetic to the bit.
    factors = [number * lambda_ for number in per_model(weight, len(deltas))]
    merged = weighted_sum(deltas, factors)
    terms = (scaled(delta, factor) for delta, factor in zip(deltas, factors, strict=True))
    return merged.mul_(_agreed(terms, merged, per_model(mask_lambda, len(deltas)), k))


@merge_method(
    "consensus_ties",
    title="Consensus TIES",
    formula=(
        r"\theta = \theta_0 + \lambda \tau \text{ where } \lvert \lbrace i : \lvert \tau_i \rvert \ge"
        r" \lambda_i \lvert \tau - \tau_i \rvert \rbrace \rvert \ge k,"
        r"\quad \tau = \sum_{i \in A} w_i \hat\tau_i"
    ),
    paper=_PAPER,
    models=(1, None),
    measure=measure,
    laws=("zero", "permutation", "scale", full("ties", k=0)),
)
def consensus_ties(
    deltas: Deltas,
    weight: PerModel = 1.0,
    density: Annotated[PerModel, Range(0, 1)] = 0.2,
    k: Annotated[int, Range(0)] = 2,
    mask_lambda: Annotated[PerModel, Range(0)] = 0.4,
    normalize: bool = False,
    lambda_: float = 1.0,
    *,
    measured: tuple[float, ...] | None = None,
) -> Tensor:
    """TIES's merge of the task vectors, where it matters to at least k of them.

    τ is what ties makes of the task vectors (trimmed to density, a sign elected, those that agree summed), and the
    masks are those of consensus_ta with this τ: |τᵢ| ≥ λᵢ |τ − τᵢ|, the τᵢ = wᵢ (θᵢ − θ₀) untrimmed. The result is
    θ₀ + λ τ at the entries that at least k masks hold.

    Follows the paper and its released code: the agreeing entries are summed, not averaged (normalize is false), and a
    fifth of each task vector is kept; λ is picked there on validation data, among 0.1, 0.2, ..., 1. Departs: trimmed
    for each tensor, as ties here, not over the model as a whole; of d entries int(K d) stay at a density of K, as in
    the paper, where the code keeps int(K d) + 1.

    Args:
        weight: how much each task vector counts, in the vote and in the sum.
        density: share of entries kept in each task vector, by magnitude.
        k: how many tasks an entry must matter to.
        mask_lambda: how strict each task's mask is; larger keeps fewer entries.
        normalize: divide by the sum of the weights of the models that agree.
        lambda_: what the merged task vector is multiplied by before the base is added.

    >>> import torch
    >>> one, other = torch.tensor([4.0, 2.0, 0.1, 3.0]), torch.tensor([4.0, 1.0, 5.0, -2.0])
    >>> consensus_ties([one, other], density=0.5)
    tensor([8., 0., 0., 3.])
    >>> consensus_ties([one, other], density=0.5, k=1)
    tensor([8., 0., 5., 3.])
    """
    weights = per_model(weight, len(deltas))
    thresholds = measured or measure([deltas], per_model(density, len(deltas)))
    trimmed = [trim(*pair, f"term {model}") for model, pair in enumerate(zip(deltas, thresholds, strict=True))]
    merged = elect_and_merge(trimmed, weights, [1.0] * len(weights), normalize, 1.0)
    terms = (scaled(delta, number) for delta, number in zip(deltas, weights, strict=True))
    return merged.mul_(_agreed(terms, merged, per_model(mask_lambda, len(deltas)), k)).mul_(lambda_)
