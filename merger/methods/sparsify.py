"""Methods that drop entries of each task vector and rescale the rest, then sum or elect: DARE, DELLA, Breadcrumbs.

Each has two methods, which differ in the second half alone: what stays is said once. Not here: the draws themselves
(steps.random), which the engine hands over placed at the block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from merger.methods.registry import Deltas, Paper, PerModel, Range, full, merge_method, parameters_of
from merger.methods.steps.arithmetic import Blocks, divisor, entry_count, l1_factors, multiple, per_model
from merger.methods.steps.random import Rng, keep_by_rank, likely, mask_out
from merger.methods.steps.step import Array
from merger.methods.steps.votes import Keep, band, elect_and_merge, sum_kept


@dataclass(frozen=True)
class Sparse:
    """What stays of each task vector, how much it weighs, and the factor that makes up for what is gone."""

    keep: Keep
    weights: Sequence[float]
    factors: Sequence[float]
    normalize: bool
    lambda_: float

    def summed(self) -> Array:
        """λ Σ wᵢ fᵢ kᵢ, divided by Σ wᵢ if normalize (undivided where that is zero)."""
        share = self.lambda_ / divisor(self.weights, self.normalize)
        return sum_kept(
            self.keep, [number * share * factor for number, factor in zip(self.weights, self.factors, strict=True)]
        )

    def elected(self) -> Array:
        """What ties makes of the kᵢ."""
        return elect_and_merge(self.keep, self.weights, self.factors, self.normalize, self.lambda_)


# ---- dare -----------------------------------------------------------------------------------------------------------


_PAPER = Paper(
    "Le Yu, Bowen Yu, Haiyang Yu, Fei Huang, Yongbin Li",
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


def drop(delta: Array, model: int, density: float, rng: Rng, factor: float = 1.0) -> Array:
    """The delta times a number, with a random share of its entries left."""
    if density >= 1:
        return multiple(delta, factor)
    return mask_out(delta, rng.mask(model, entry_count(delta), density, delta), factor)


def dare(
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
) -> Sparse:
    """A random share of each task vector.

    Args:
        density: share of entries kept in each task vector, at random.
        unbiased: rescale by 1 / density, as in the paper, in place of the L1 norms.
    """
    weights, densities = per_model(weight, len(deltas)), per_model(density, len(deltas))
    _check(rescale, unbiased)
    factors = measured or measure_dare([deltas], densities, rng, rescale, unbiased)

    def keep(model: int, factor: float) -> Array:
        return drop(deltas[model], model, densities[model], rng, factor)

    return Sparse(keep, weights, factors, normalize, lambda_)


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
    searches=False,
    check=_check,
    laws=("zero", "scale", full("task_arithmetic", density=1)),
)
@parameters_of(dare)
def dare_linear(deltas: Deltas, **given: Any) -> Array:
    """A random share of each task vector, rescaled, summed.

    Of each τᵢ = θᵢ − θ₀ every entry stays with probability density, by a mask mᵢ; what stays is multiplied by
    fᵢ = ‖τᵢ‖₁ / ‖mᵢ τᵢ‖₁ of that tensor if rescale, as mergekit does it, or by the paper's 1 / density if unbiased. The
    result is θ₀ + λ Σ wᵢ fᵢ mᵢ τᵢ, the sum divided by Σ wᵢ if normalize (undivided where that is zero).
    Density 1 leaves a task vector as it is.

    Departs from mergekit: a seed, the tensor, the model and the entry decide the mask, not the order of work; norms
    are summed in float64; the rescaling is left out only where less than 1e-7 of the delta's norm is left, not for
    every small delta. All in float32, whatever the dtype.

    >>> import numpy as np
    >>> delta = np.float32([1, 2, 3, 4])
    >>> dare_linear([delta], density=0.5, rescale=False, rng=Rng(seed=3))
    array([0., 2., 0., 4.], dtype=float32)
    >>> dare_linear([delta], density=0.5, unbiased=True, rng=Rng(seed=3))
    array([0., 4., 0., 8.], dtype=float32)
    """
    return dare(deltas, **given).summed()


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
    searches=False,
    check=_check,
    laws=("zero", "scale", full("ties", density=1)),
)
@parameters_of(dare)
def dare_ties(deltas: Deltas, **given: Any) -> Array:
    """A random share of each task vector, rescaled, merged where they agree on a sign.

    Drops and rescales as dare_linear: τ̂ᵢ = fᵢ mᵢ τᵢ. Then elects and merges as ties: s = + where Σ wᵢ τ̂ᵢ ≥ 0, else −;
    Δ = Σ wᵢ τ̂ᵢ over the i whose term has sign s, divided if normalize by Σ wᵢ over the same i (1 where that is zero).
    The result is θ₀ + λ Δ.

    Departs from mergekit: as dare_linear, and in the divisor as ties.

    Args:
        weight: how much each task vector counts, in the vote and in the sum.
        normalize: divide by the sum of the weights of the models that agree.

    >>> import numpy as np
    >>> one, other = np.float32([1, 2, 3, 4]), np.float32([1, -3, -1, 1])
    >>> dare_ties([one, other], rng=Rng(seed=1))
    array([ 2., -3.,  3.,  5.], dtype=float32)
    >>> dare_ties([one, other], density=[0.5, 1], rescale=False, rng=Rng(seed=3))
    array([ 1., -3., -1.,  5.], dtype=float32)
    """
    return dare(deltas, **given).elected()


# ---- della ----------------------------------------------------------------------------------------------------------


_DELLA_PAPER = Paper(
    "Pala Tej Deep, Rishabh Bhardwaj, Soujanya Poria",
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
        lambda model, delta, offset: _prune(delta, model, density[model], epsilon[model], rng.at(rng.start + offset)),
    )


def _prune(delta: Array, model: int, density: float, epsilon: float, rng: Rng, factor: float = 1.0) -> Array:
    """The delta times a number, with a share of its entries left."""
    if density >= 1:
        return multiple(delta, factor)
    return mask_out(delta, keep_by_rank(delta, model, density, epsilon, rng), factor)


def della_rows(
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
) -> Sparse:
    """A random share of each row of each task vector, the large entries likelier.

    Args:
        density: share of entries kept in each task vector, at random.
        epsilon: how far the probability of a row's smallest entry lies below the density, and the largest's above.
    """
    weights, densities = per_model(weight, len(deltas)), per_model(density, len(deltas))
    epsilons = per_model(epsilon, len(deltas))
    factors = measured or measure_della([deltas], densities, epsilons, rng, rescale)

    def keep(model: int, factor: float) -> Array:
        return _prune(deltas[model], model, densities[model], epsilons[model], rng, factor)

    return Sparse(keep, weights, factors, normalize, lambda_)


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
@parameters_of(della_rows, normalize=True)
def della(deltas: Deltas, **given: Any) -> Array:
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
        normalize: divide by the sum of the weights of the models that agree.

    >>> import numpy as np
    >>> one, other = np.float32([1, 2, 3, 4]), np.float32([1, -3, -1, 1])
    >>> della([one, other], density=0.5, epsilon=0.5, rescale=False, rng=Rng(seed=2))
    array([ 0., -3.,  0.,  4.], dtype=float32)
    """
    return della_rows(deltas, **given).elected()


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
@parameters_of(della_rows)
def della_linear(deltas: Deltas, **given: Any) -> Array:
    """A random share of each task vector, the large entries likelier, summed.

    Drops and rescales as della: τ̂ᵢ. The result is θ₀ + λ Σ wᵢ τ̂ᵢ, the sum divided by Σ wᵢ if normalize (undivided
    where that is zero).

    Departs from mergekit: as della.

    >>> import numpy as np
    >>> delta = np.float32([1, 2, 3, 4])
    >>> della_linear([delta], density=0.5, epsilon=0.5, rescale=False, rng=Rng(seed=1))
    array([0., 0., 3., 4.], dtype=float32)
    """
    return della_rows(deltas, **given).summed()


# ---- breadcrumbs ----------------------------------------------------------------------------------------------------


_BREADCRUMBS_PAPER = Paper(
    "MohammadReza Davari, Eugene Belilovsky",
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


def crumbs(
    deltas: Deltas,
    weight: PerModel = 1.0,
    density: Annotated[PerModel, Range(0, 1)] = 1.0,
    gamma: Annotated[PerModel, Range(0, 1)] = 0.01,
    normalize: bool = False,
    lambda_: float = 1.0,
    rescale: bool = False,
    *,
    measured: Bands | None = None,
) -> Sparse:
    """The entries of middle magnitude of each task vector.

    Args:
        density: share of entries kept in each task vector, by magnitude, the outliers left aside.
        gamma: share of entries dropped as outliers, the largest.
    """
    models = len(deltas)
    found = measured or measure_breadcrumbs([deltas], per_model(density, models), per_model(gamma, models), rescale)

    def keep(model: int, factor: float) -> Array:
        return band(deltas[model], *found.limits[model], factor)

    return Sparse(keep, per_model(weight, models), found.factors, normalize, lambda_)


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
@parameters_of(crumbs)
def breadcrumbs(deltas: Deltas, **given: Any) -> Array:
    """The entries of middle magnitude of each task vector, summed.

    Of each τᵢ = θᵢ − θ₀ the g = int(γ · N) entries of largest magnitude go, and of the others the k = int(density · N)
    largest stay, at least one; where the tensor has not so many, fewer of the largest go. The result is θ₀ + λ Σ wᵢ τ̂ᵢ,
    the sum divided by Σ wᵢ if normalize (undivided where that is zero). Density 1 leaves a task vector as it is.

    Departs from mergekit: entries of one magnitude stay or go together, and those equal to the largest or to the least
    that stays stay; a tensor of fewer than 1 / density entries keeps one, where there it loses its whole task vector.
    The rescaling is left out only where less than 1e-7 of the delta's norm is left. All in float32, whatever the dtype.
    Until mergekit 0.1.4 a gamma so small that no entry is an outlier (gamma 0, or a tensor of fewer than 1 / γ entries)
    erases the whole task vector there.

    >>> import numpy as np
    >>> breadcrumbs([np.float32([9, -3, 2, 0.5])], density=0.5, gamma=0.25)
    array([ 0., -3.,  2.,  0.], dtype=float32)
    >>> breadcrumbs([np.float32([9, -3, 2, 0.5])], density=0.5, gamma=0)
    array([ 9., -3.,  0.,  0.], dtype=float32)
    """
    return crumbs(deltas, **given).summed()


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
@parameters_of(crumbs)
def breadcrumbs_ties(deltas: Deltas, **given: Any) -> Array:
    """The entries of middle magnitude of each task vector, merged where they agree on a sign.

    Drops the largest and the small entries as breadcrumbs: τ̂ᵢ. Then elects and merges as ties: s = + where
    Σ wᵢ τ̂ᵢ ≥ 0, else −; Δ = Σ wᵢ τ̂ᵢ over the i whose term has sign s, divided if normalize by Σ wᵢ over the same i (1
    where that is zero). The result is θ₀ + λ Δ.

    Departs from mergekit: as breadcrumbs, and in the divisor as ties.

    Args:
        weight: how much each task vector counts, in the vote and in the sum.
        normalize: divide by the sum of the weights of the models that agree.

    >>> import numpy as np
    >>> one, other = np.float32([9, -3, 2, 0.5]), np.float32([1, 4, 7, 8])
    >>> breadcrumbs_ties([one, other], density=0.5, gamma=0.25)
    array([0., 4., 9., 0.], dtype=float32)
    """
    return crumbs(deltas, **given).elected()
