"""DELLA: drop entries of each task vector at random, the smaller of a row rather than the larger; then as DARE.

Not here: a sort. The probability that depends on an entry's rank is met by a draw and a duel (`keep_by_rank`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from merger.methods._ops import (
    Blocks,
    Rng,
    array,
    divisor,
    elect_and_merge,
    l1_factors,
    masked,
    per_model,
    weighted_sum,
)
from merger.methods.registry import Deltas, Paper, PerModel, Range, full, merge_method

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

_PAPER = Paper(
    "Deep et al.",
    2024,
    "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling",
    "https://arxiv.org/abs/2406.11617",
)


def measure(
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
    paper=_PAPER,
    models=(1, None),
    unit="rows",
    measure=measure,
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
    paper=_PAPER,
    models=(1, None),
    unit="rows",
    measure=measure,
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
    factors = measured or measure([deltas], densities, epsilons, rng, rescale)
    pruned = [
        _prune(delta, model, densities[model], epsilons[model], rng, f"term {model}")
        for model, delta in enumerate(deltas)
    ]
    return pruned, factors
