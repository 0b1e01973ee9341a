"""Methods that drop entries of each task vector and rescale the rest, then sum or elect: DARE, DELLA, Breadcrumbs.

Not here: the draws themselves (steps.arithmetic.Rng), which the engine hands over placed at the block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from merger.methods.registry import Deltas, Paper, PerModel, Range, full, merge_method
from merger.methods.steps.arithmetic import (
    Blocks,
    Rng,
    array,
    band,
    divisor,
    elect_and_merge,
    l1_factors,
    likely,
    masked,
    per_model,
    weighted_sum,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

_PAPER = Paper(
    "Yu et al.",
    2024,
    "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
    "https://arxiv.org/abs/2311.03099",
)


def measure_dare(
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
    measure=measure_dare,
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
    factors = measured or measure_dare([deltas], densities, rng, rescale, unbiased)
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
    measure=measure_dare,
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
    factors = measured or measure_dare([deltas], densities, rng, rescale, unbiased)
    kept = [drop(delta, model, densities[model], rng, f"term {model}") for model, delta in enumerate(deltas)]
    return elect_and_merge(kept, weights, factors, normalize, lambda_)


# ---- della ----------------------------------------------------------------------------------------------------------


_DELLA_PAPER = Paper(
    "Deep et al.",
    2024,
    "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling",
    "https://arxiv.org/abs/2406.11617",
)


def measure_della(
    blocks: Blocks, density: Sequence[float], epsilon: Sequence[float], rng: Rng, rescale: bool = True
) -> tuple[float, ...]:
    """The factor for what is left of each delta: the L1 norm of the whole over that of the rest."""
    if not rescale:
        return (1.0,) * len(density)
    return l1_factors(
        blocks,
        density,
        lambda model, delta, offset: _prune(
            delta, model, density[model], epsilon[model], rng.at(rng.start + offset), "trimmed"
        ),
    )


def keep_by_rank(delta: Tensor, model: int, density: float, epsilon: float, rng: Rng) -> NDArray[np.bool_]:
    """Which entries stay, each with the probability density − ε + 2 ε (rank − 1) / (R − 1) by its rank in its row of R.

    With probability density − ε an entry stays, with probability 1 − density − ε it goes, and else it stays if it is
    larger than another entry of its row, drawn at random for it alone: rank − 1 of the R − 1 others are smaller, so
    that is the second term, exactly, and no row is sorted. Among equals a coin decides, which gives them their mean
    rank.
    """
    import numpy as np

    spread = min(epsilon, density, 1 - density)
    kept, open_ = rng.below(model, delta.numel(), density - spread, density + spread)
    places = np.flatnonzero(open_ ^ kept)
    kept[places] = _wins(array(delta), places, delta.shape[-1] if delta.ndim else 1, rng.bits(model, places, "duel"))
    return kept


def _wins(
    entries: NDArray[np.float32], places: NDArray[np.intp], row: int, bits: NDArray[np.uint64]
) -> NDArray[np.bool_]:
    """Whether the entry at each place is larger than one of the other entries of its row; an equal is by a coin."""
    import numpy as np

    starts = places // row * row
    steps = (bits >> np.uint64(32)) * np.uint64(row - 1) >> np.uint64(32)
    others = places + 1 + steps.view(np.intp)
    others -= row * (others >= starts + row)
    magnitudes = np.abs(entries[places]).view(np.uint32)
    coins = (bits & np.uint64(1)).astype(np.uint32)
    won: NDArray[np.bool_] = magnitudes >= np.abs(entries[others]).view(np.uint32) + coins
    return won


def _prune(delta: Tensor, model: int, density: float, epsilon: float, rng: Rng, slot: str) -> Tensor:
    """The delta with a share of its entries left; the result may be a buffer or `delta`."""
    return delta if density >= 1 else masked(delta, keep_by_rank(delta, model, density, epsilon, rng), slot)


@merge_method(
    "della",
    title="DELLA",
    formula=(
        r"\theta = \theta_0 + \lambda \frac{\sum_{i \in A} w_i \hat\tau_i}{\sum_{i \in A} w_i},"
        r"\quad \hat\tau_i = f_i m_i (\theta_i - \theta_0),"
        r"\quad P(m_i = 1) = \text{density} - \varepsilon + 2 \varepsilon \tfrac{r - 1}{R - 1}"
    ),
    paper=_DELLA_PAPER,
    models=(1, None),
    unit="rows",
    measure=measure_della,
    laws=("zero", "scale", full("ties", density=1)),
)
def della(
    deltas: Deltas,
    weight: PerModel = 1.0,
    density: Annotated[PerModel, Range(0, 1)] = 1.0,
    epsilon: Annotated[PerModel, Range(0, 1)] = 0.15,
    normalize: bool = True,
    lambda_: float = 1.0,
    rescale: bool = True,
    *,
    rng: Rng,
    measured: tuple[float, ...] | None = None,
) -> Tensor:
    """A random share of each task vector, the large entries likelier, merged where they agree on a sign.

    Of each row of τᵢ = θᵢ − θ₀ (the last dimension; a 1-D tensor is one row of R entries) the entry of rank r by
    magnitude, 1 the smallest, stays with probability density − ε + 2 ε (r − 1) / (R − 1), and what stays is multiplied
    by fᵢ = ‖τᵢ‖₁ / ‖mᵢ τᵢ‖₁ of the whole tensor if rescale: τ̂ᵢ. Then elects and merges as ties: s = + where
    Σ wᵢ τ̂ᵢ ≥ 0, else −; Δ = Σ wᵢ τ̂ᵢ over the i whose term has sign s, divided if normalize by Σ wᵢ over the same i. The
    result is θ₀ + λ Δ. Density 1 leaves a task vector as it is, 0 drops it. Follows mergekit in rescaling by norms; the
    paper divides each entry by its own probability.

    Departs from mergekit: where density − ε < 0 or density + ε > 1 (density 0.9 with the default epsilon, say), ε is
    lowered to what fits, so that the share kept is still the density, where there it is an error; a row of one entry
    has the probability density, where there it fails; entries of equal magnitude share their mean rank, where a sort
    gives them ranks by chance; a tensor of three dimensions is ranked along the last, not the second; a seed, the
    tensor, the model and the entry decide the mask. The rescaling is left out only where less than 1e-7 of the delta's
    norm is left; the divisor is as in ties. All in float32, whatever the dtype.

    Args:
        weight: how much each task vector counts, in the vote and in the mean.
        density: share of entries kept in each task vector, at random.
        epsilon: how far the probability of a row's smallest entry lies below the density, and the largest's above.
        normalize: divide by the sum of the weights of the models that agree.
        lambda_: what the merged task vector is multiplied by before the base is added.
        rescale: multiply what is kept, so that its L1 norm is that of the whole task vector.

    >>> import torch
    >>> one, other = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, -3.0, -1.0, 1.0])
    >>> della([one, other], density=0.5, epsilon=0.5, rescale=False, rng=Rng(seed=1))
    tensor([ 0., -3.,  3.,  4.])
    """
    weights = per_model(weight, len(deltas))
    pruned, factors = _pruned(deltas, density, epsilon, rescale, rng, measured)
    return elect_and_merge(pruned, weights, factors, normalize, lambda_)


@merge_method(
    "della_linear",
    title="DELLA linear",
    formula=(
        r"\theta = \theta_0 + \lambda \sum_i w_i f_i m_i (\theta_i - \theta_0),"
        r"\quad P(m_i = 1) = \text{density} - \varepsilon + 2 \varepsilon \tfrac{r - 1}{R - 1}"
    ),
    paper=_DELLA_PAPER,
    models=(1, None),
    unit="rows",
    measure=measure_della,
    laws=("zero", "scale", full("task_arithmetic", density=1)),
)
def della_linear(
    deltas: Deltas,
    weight: PerModel = 1.0,
    density: Annotated[PerModel, Range(0, 1)] = 1.0,
    epsilon: Annotated[PerModel, Range(0, 1)] = 0.15,
    normalize: bool = False,
    lambda_: float = 1.0,
    rescale: bool = True,
    *,
    rng: Rng,
    measured: tuple[float, ...] | None = None,
) -> Tensor:
    """A random share of each task vector, the large entries likelier, summed.

    Drops and rescales as della: τ̂ᵢ. The result is θ₀ + λ Σ wᵢ τ̂ᵢ, the sum divided by Σ wᵢ if normalize (undivided
    where that is zero).

    Departs from mergekit: as della.

    Args:
        weight: how much of each task vector goes in.
        density: share of entries kept in each task vector, at random.
        epsilon: how far the probability of a row's smallest entry lies below the density, and the largest's above.
        normalize: divide by the sum of the weights, so that only their ratios count.
        lambda_: what the merged task vector is multiplied by before the base is added.
        rescale: multiply what is kept, so that its L1 norm is that of the whole task vector.

    >>> import torch
    >>> delta = torch.tensor([1.0, 2.0, 3.0, 4.0])
    >>> della_linear([delta], density=0.5, epsilon=0.5, rescale=False, rng=Rng(seed=1))
    tensor([0., 0., 3., 4.])
    """
    weights = per_model(weight, len(deltas))
    pruned, factors = _pruned(deltas, density, epsilon, rescale, rng, measured)
    share = lambda_ / divisor(weights, normalize)
    return weighted_sum(pruned, [number * share * factor for number, factor in zip(weights, factors, strict=True)])


def _pruned(
    deltas: Deltas,
    density: PerModel,
    epsilon: PerModel,
    rescale: bool,
    rng: Rng,
    measured: tuple[float, ...] | None,
) -> tuple[list[Tensor], Sequence[float]]:
    """What stays of each task vector, and the factor it is to be multiplied by."""
    models = len(deltas)
    densities, epsilons = per_model(density, models), per_model(epsilon, models)
    factors = measured or measure_della([deltas], densities, epsilons, rng, rescale)
    pruned = [
        _prune(delta, model, densities[model], epsilons[model], rng, f"term {model}")
        for model, delta in enumerate(deltas)
    ]
    return pruned, factors


# ---- breadcrumbs ----------------------------------------------------------------------------------------------------


_BREADCRUMBS_PAPER = Paper(
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


def measure_breadcrumbs(
    blocks: Blocks, density: Sequence[float], gamma: Sequence[float], rescale: bool = False
) -> Bands:
    """The band of each whole tensor, exactly: both its ends are found in the same passes."""
    from merger.methods.steps.select import magnitudes_at

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
    paper=_BREADCRUMBS_PAPER,
    models=(1, None),
    measure=measure_breadcrumbs,
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
    paper=_BREADCRUMBS_PAPER,
    models=(1, None),
    measure=measure_breadcrumbs,
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
    found = measured or measure_breadcrumbs([deltas], per_model(density, models), per_model(gamma, models), rescale)
    kept = [band(delta, *found.limits[model], f"term {model}") for model, delta in enumerate(deltas)]
    return kept, found.factors
