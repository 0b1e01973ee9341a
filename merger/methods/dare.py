"""DARE: drop entries of each task vector at random and rescale the rest; then a sum, or TIES's election.

Not here: the draws themselves (`_ops.Rng`), which the engine hands over placed at the block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from merger.methods._ops import (
    Blocks,
    Rng,
    divisor,
    elect_and_merge,
    l1_factors,
    likely,
    masked,
    per_model,
    weighted_sum,
)
from merger.methods.registry import Deltas, Paper, PerModel, Range, full, merge_method

if TYPE_CHECKING:
    from torch import Tensor

_PAPER = Paper(
    "Yu et al.",
    2024,
    "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
    "https://arxiv.org/abs/2311.03099",
)


def measure(
    blocks: Blocks, density: Sequence[float], rng: Rng, rescale: bool = True, unbiased: bool = False
) -> tuple[float, ...]:
    """The factor for what is left of each delta; only the L1 norms need the blocks."""
    if not rescale:
        return (1.0,) * len(density)
    if unbiased:
        return tuple(1 / likely(share) if 0 < share < 1 else 1.0 for share in density)
    return l1_factors(
        blocks,
        density,
        lambda model, delta, offset: drop(delta, model, density[model], rng.at(rng.start + offset)),
    )


def _check(rescale: bool, unbiased: bool) -> None:
    if unbiased and not rescale:
        raise ValueError("unbiased says how to rescale, but rescale is false; leave one of them out")


def drop(delta: Tensor, model: int, density: float, rng: Rng, slot: str = "trimmed") -> Tensor:
    """The delta with a random share of its entries left; the result may be a buffer or `delta`."""
    if density >= 1:
        return delta
    (kept,) = rng.below(model, delta.numel(), density)
    return masked(delta, kept, slot)


@merge_method(
    "dare_linear",
    title="DARE",
    formula=(
        r"\theta = \theta_0 + \lambda \sum_i w_i f_i m_i (\theta_i - \theta_0),"
        r"\quad m_i \sim \operatorname{Bernoulli}(\text{density})"
    ),
    paper=_PAPER,
    models=(1, None),
    measure=measure,
    check=_check,
    laws=("zero", "scale", full("task_arithmetic", density=1)),
)
def dare_linear(
    deltas: Deltas,
    weight: PerModel = 1.0,
    density: Annotated[PerModel, Range(0, 1)] = 1.0,
    normalize: bool = False,
    lambda_: float = 1.0,
    rescale: bool = True,
    unbiased: bool = False,
    *,
    rng: Rng,
    measured: tuple[float, ...] | None = None,
) -> Tensor:
    """A random share of each task vector, rescaled, summed.

    Of each τᵢ = θᵢ − θ₀ every entry stays with probability density, by a mask mᵢ; what stays is multiplied by
    fᵢ = ‖τᵢ‖₁ / ‖mᵢ τᵢ‖₁ of that tensor if rescale, as mergekit does it, or by the paper's 1 / density if unbiased. The
    result is θ₀ + λ Σ wᵢ fᵢ mᵢ τᵢ, the sum divided by Σ wᵢ if normalize (undivided where that is zero).
    Density 1 leaves a task vector as it is.

    Departs from mergekit: a seed, the tensor, the model and the entry decide the mask, not the order of work; norms
    are summed in float64; the rescaling is left out only where less than 1e-7 of the delta's norm is left, not for
    every small delta. All in float32, whatever the dtype.

    Args:
        weight: how much of each task vector goes in.
        density: share of entries kept in each task vector, at random.
        normalize: divide by the sum of the weights, so that only their ratios count.
        lambda_: what the merged task vector is multiplied by before the base is added.
        rescale: multiply what is kept, so that its L1 norm is that of the whole task vector.
        unbiased: rescale by 1 / density, as in the paper, in place of the L1 norms.

    >>> import torch
    >>> delta = torch.tensor([1.0, 2.0, 3.0, 4.0])
    >>> dare_linear([delta], density=0.5, rescale=False, rng=Rng(seed=1))
    tensor([1., 0., 0., 4.])
    >>> dare_linear([delta], density=0.5, unbiased=True, rng=Rng(seed=1))
    tensor([2., 0., 0., 8.])
    """
    weights, densities = per_model(weight, len(deltas)), per_model(density, len(deltas))
    _check(rescale, unbiased)
    factors = measured or measure([deltas], densities, rng, rescale, unbiased)
    share = lambda_ / divisor(weights, normalize)
    total = [number * share * factor for number, factor in zip(weights, factors, strict=True)]
    dropped = (drop(delta, model, densities[model], rng) for model, delta in enumerate(deltas))
    return weighted_sum(dropped, total)


@merge_method(
    "dare_ties",
    title="DARE-TIES",
    formula=(
        r"\theta = \theta_0 + \lambda \sum_{i \in A} w_i \hat\tau_i,"
        r"\quad \hat\tau_i = f_i m_i (\theta_i - \theta_0), \quad m_i \sim"
        r" \operatorname{Bernoulli}(\text{density})"
    ),
    paper=_PAPER,
    models=(1, None),
    measure=measure,
    check=_check,
    laws=("zero", "scale", full("ties", density=1)),
)
def dare_ties(
    deltas: Deltas,
    weight: PerModel = 1.0,
    density: Annotated[PerModel, Range(0, 1)] = 1.0,
    normalize: bool = False,
    lambda_: float = 1.0,
    rescale: bool = True,
    unbiased: bool = False,
    *,
    rng: Rng,
    measured: tuple[float, ...] | None = None,
) -> Tensor:
    """A random share of each task vector, rescaled, merged where they agree on a sign.

    Drops and rescales as dare_linear: τ̂ᵢ = fᵢ mᵢ τᵢ. Then elects and merges as ties: s = + where Σ wᵢ τ̂ᵢ ≥ 0, else −;
    Δ = Σ wᵢ τ̂ᵢ over the i whose term has sign s, divided if normalize by Σ wᵢ over the same i (1 where that is zero).
    The result is θ₀ + λ Δ.

    Departs from mergekit: as dare_linear, and in the divisor as ties.

    Args:
        weight: how much each task vector counts, in the vote and in the sum.
        density: share of entries kept in each task vector, at random.
        normalize: divide by the sum of the weights of the models that agree.
        lambda_: what the merged task vector is multiplied by before the base is added.
        rescale: multiply what is kept, so that its L1 norm is that of the whole task vector.
        unbiased: rescale by 1 / density, as in the paper, in place of the L1 norms.

    >>> import torch
    >>> one, other = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, -3.0, -1.0, 1.0])
    >>> dare_ties([one, other], rng=Rng(seed=1))
    tensor([ 2., -3.,  3.,  5.])
    >>> dare_ties([one, other], density=[0.5, 1.0], rescale=False, rng=Rng(seed=1))
    tensor([ 2., -3., -1.,  5.])
    """
    weights, densities = per_model(weight, len(deltas)), per_model(density, len(deltas))
    _check(rescale, unbiased)
    factors = measured or measure([deltas], densities, rng, rescale, unbiased)
    kept = [drop(delta, model, densities[model], rng, f"term {model}") for model, delta in enumerate(deltas)]
    return elect_and_merge(kept, weights, factors, normalize, lambda_)
