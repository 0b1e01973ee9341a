"""Methods by what the models agree on, entry by entry: SCE, RAM and the masks of TALL (consensus).

Not here: the search for the variance that selects (steps.select), and the erasing (steps.votes).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Annotated, Any

from merger.methods.registry import Deltas, Paper, PerModel, Range, full, merge_method
from merger.methods.steps.arithmetic import Blocks, Mapped, array, per_model, squared_norms, weighted_sum
from merger.methods.steps.step import ONE, ZERO, Array, new, step, wide, wide_zeros, zeros
from merger.methods.steps.votes import consensus
from merger.methods.task_vectors import Trim, measure_ties, ties

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PAPER = Paper(
    "Fanqi Wan, Longguang Zhong, Ziyi Yang, Ruijun Chen, Xiaojun Quan",
    2024,
    "FuseChat: Knowledge Fusion of Chat Models",
    "https://arxiv.org/abs/2408.07990",
)


@dataclass(frozen=True)
class Selection:
    """The variance from which on an entry is selected (0: all are; infinity: none), and the weight of each model."""

    threshold: float
    weights: tuple[float, ...]


def measure_sce(blocks: Blocks, select_topk: float) -> Selection:
    """The threshold and the weights of a whole tensor."""
    threshold = _threshold(blocks, select_topk)
    totals = squared_norms(_select(block, threshold) for block in blocks)
    whole = math.fsum(totals)
    return Selection(threshold, tuple(total / whole if whole else 1 / len(totals) for total in totals))


def _threshold(blocks: Blocks, select_topk: float) -> float:
    from merger.methods.steps.select import magnitudes_at

    if select_topk >= 1:
        return 0.0
    if select_topk <= 0:
        return math.inf
    varying, seen = 0, 0  # entries whose variance is not zero, and all, in this pass

    def variances(place: int, block: Sequence[Array]) -> list[Array]:
        nonlocal varying, seen
        variance = array(_variance(block))
        varying = (varying if place else 0) + _count(variance > 0)
        seen = (seen if place else 0) + variance.size
        return [variance]

    def ranks(entries: int) -> list[int]:
        return [max(1, int(select_topk * (varying * entries // max(1, seen))))]

    return magnitudes_at(Mapped(blocks, variances, entrywise=True), {0: ranks})[0][0] or math.inf


def _count(mask: NDArray[Any]) -> int:
    import numpy as np

    return int(np.count_nonzero(mask))


@step("void(float32[::1], float32[::1], float64[::1])")
def add_squared_difference(x: Array, y: Array, total: NDArray[np.float64]) -> None:
    """To each entry of a sum in float64 the square of a difference."""
    for i in range(total.size):
        difference = wide(x[i]) - wide(y[i])
        total[i] += difference * difference


@step("void(float32[::1], float32[::1], float32, float32, float32[::1])")
def keep_where(x: Array, by: Array, least: float, factor: float, out: Array) -> None:
    """The entry times a number where another one is `least` or more, else a zero of its sign."""
    for i in range(out.size):
        out[i] = x[i] * (ONE if by[i] >= least else ZERO) * factor


def _variance(deltas: Sequence[Array]) -> Array:
    """The variance over the models, times their number squared: Σ over pairs of (τᵢ − τⱼ)²; 0 where all are equal.

    In float64, then rounded: in float32, sums of the same squares in another order would come out as different numbers,
    and the threshold would fall between entries of equal variance.
    """
    total, variance = wide_zeros(deltas[0]), new(deltas[0])
    for one, other in combinations(deltas, 2):
        add_squared_difference(one, other, total)
    variance[...] = total
    return variance


def _select(deltas: Sequence[Array], threshold: float) -> Sequence[Array]:
    """The deltas with zero where the variance is below the threshold."""
    if threshold <= 0:
        return deltas
    variance, kept = _variance(deltas), [new(delta) for delta in deltas]
    for delta, out in zip(deltas, kept, strict=True):
        keep_where(delta, variance, threshold, 1.0, out)
    return kept


@merge_method(
    "sce",
    title="SCE",
    formula=(
        r"\theta = \theta_0 + \frac{\sum_{i \in A} c_i \hat\tau_i}{\sum_{i \in A} c_i}, \quad c_i ="
        r" \frac{\lVert \hat\tau_i \rVert^2}{\sum_j \lVert \hat\tau_j \rVert^2},"
        r"\quad A = \lbrace i : \operatorname{sgn} \hat\tau_i = \operatorname{sgn} \textstyle\sum_j"
        r" \hat\tau_j \rbrace"
    ),
    paper=_PAPER,
    models=(1, None),
    measure=measure_sce,
    laws=("zero", "idempotent", "permutation", "scale"),
)
def sce(
    deltas: Deltas, select_topk: Annotated[float, Range(0, 1)] = 1.0, *, measured: Selection | None = None
) -> Array:
    """The entries in which the task vectors differ most, weighted by their energy, where they agree on a sign.

    Select: of the entries whose variance over the models is not zero the k = int(select_topk · their number) of largest
    variance, at least one; the others are zero in every τ̂ᵢ. With select_topk 1 all stay.
    Calculate: cᵢ = ‖τ̂ᵢ‖² / Σ ‖τ̂ⱼ‖², of the whole tensor; all equal where nothing is left.
    Erase: s = + where Σ τ̂ᵢ ≥ 0, else −; the result is θ₀ + Σ cᵢ τ̂ᵢ / Σ cᵢ over the i whose τ̂ᵢ has sign s, and θ₀ where
    none has.

    Departs from mergekit: the weights are those of the formula for small deltas too, where there a sum of mean squares
    below 1e-6, so most fine-tunes', makes them all equal, and a divisor below 1e-6 is raised to that; entries of equal
    variance are selected or left together, equal being what is one number in float32; a select_topk that selects less
    than one entry selects one. Squares are summed in float64.

    Args:
        select_topk: share of entries selected, of those in which the models differ, by their variance.

    >>> import numpy as np
    >>> one, other = np.float32([3, 1, 0, -2]), np.float32([1, 1, 0, 4])
    >>> sce([one, other])
    array([1.875, 1.   , 0.   , 4.   ], dtype=float32)
    >>> sce([one, other], select_topk=0.5)
    array([0., 0., 0., 4.], dtype=float32)
    """
    found = measured or measure_sce([deltas], select_topk)
    votes = _select(deltas, found.threshold)
    return consensus(votes, found.weights, normalize=True, gains=found.weights)


# ---- ram ------------------------------------------------------------------------------------------------------------


_RAM_PAPER = Paper(
    "Xiangchi Yuan, Dachuan Shi, Chunhui Zhang, Zheyuan Liu, Shenglong Yao, Soroush Vosoughi, Wenke Lee",
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
    paper=_RAM_PAPER,
    models=(1, None),
    laws=("zero", "permutation"),
)
def ram(deltas: Deltas, epsilon: Annotated[float, Range(0)] = 1e-5) -> Array:
    """What one model alone changed, in full, and the mean of what several changed.

    Of each τᵢ = θᵢ − θ₀ the entries with |τᵢ| > ε count as changed: τ̂ᵢ, zero elsewhere. With c the number of models
    that changed an entry, the result is θ₀ + Σ τ̂ᵢ / max(c, 1): so a change that no other model made is not diluted.

    Departs from mergekit: in float32, whatever the dtype; the rest is the same.

    Args:
        epsilon: the magnitude up to which an entry counts as unchanged.

    >>> import numpy as np
    >>> ram([np.float32([1, 2, 0, -3]), np.float32([0, 4, 0, 1])])
    array([ 1.,  3.,  0., -1.], dtype=float32)
    """
    return _mean_changes(deltas, epsilon, [1.0] * len(deltas))


def measure_ram(blocks: Blocks, r: float, alpha: float, epsilon: float) -> tuple[float, ...]:
    """What each model's own changes are multiplied by, from the counts over the whole tensor."""
    counts = [_counts(block, epsilon) for block in blocks]
    totals = [(sum(own), sum(shared)) for own, shared in (zip(*of, strict=True) for of in zip(*counts, strict=True))]
    return tuple(1 + r * min(alpha, shared / own if own else alpha) for own, shared in totals)


def _counts(deltas: Sequence[Array], epsilon: float) -> list[tuple[int, int]]:
    """For each model how many entries it alone changed, and how many another changed too."""
    import numpy as np

    changed = [np.abs(array(delta)) > np.float32(epsilon) for delta in deltas]
    alone = np.add.reduce(changed, dtype=np.uint16) == 1
    own = [_count(mask & alone) for mask in changed]
    return [(found, _count(mask) - found) for mask, found in zip(changed, own, strict=True)]


@merge_method(
    "ramplus_tl",
    title="RAM+ (tensor-local)",
    formula=(
        r"\theta = \theta_0 + \frac{\sum_i \lambda_i \hat\tau_i}{\max(c, 1)},"
        r"\quad \lambda_i = 1 + r \min(\alpha, \rho_i) \text{ where } c = 1, \text{ else } 1"
    ),
    paper=_RAM_PAPER,
    models=(1, None),
    measure=measure_ram,
    laws=("zero", "permutation", full("ram", r=0)),
)
def ramplus_tl(
    deltas: Deltas,
    r: float = 0.1,
    alpha: Annotated[float, Range(0)] = 0.2,
    epsilon: Annotated[float, Range(0)] = 1e-5,
    *,
    measured: tuple[float, ...] | None = None,
) -> Array:
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

    >>> import numpy as np
    >>> one, other = np.float32([1, 2, 0, -3]), np.float32([0, 4, 0, 1])
    >>> ramplus_tl([one, other], r=1, alpha=0.5)
    array([ 1.5,  3. ,  0. , -1. ], dtype=float32)
    """
    return _mean_changes(deltas, epsilon, measured or measure_ram([deltas], r, alpha, epsilon))


@step("void(float32[::1], float32, float32, float32[::1], float32[::1], float32[::1])")
def add_change(x: Array, most: float, gain: float, total: Array, models: Array, own: Array) -> None:
    """What is larger than `most` to the total, 1 to the number of models, and it times `gain` to their own."""
    for i in range(total.size):
        change = ZERO if abs(x[i]) <= most else x[i]
        total[i] += change
        models[i] += ONE if change != ZERO else ZERO
        own[i] += change * gain


@step("void(float32[::1], float32[::1], float32[::1], float32[::1])")
def share_changes(total: Array, models: Array, own: Array, out: Array) -> None:
    """The mean of the changes, and where one model alone made any, what is its own."""
    for i in range(out.size):
        count = models[i]
        out[i] = total[i] / (ONE if count < ONE else count) + own[i] * (ONE if count == ONE else ZERO)


def _mean_changes(deltas: Sequence[Array], epsilon: float, factors: Sequence[float]) -> Array:
    """The mean of the changes at each entry; where only one model made any, that times the model's factor."""
    total, models, own = zeros(deltas[0]), zeros(deltas[0]), zeros(deltas[0])
    for delta, factor in zip(deltas, factors, strict=True):
        add_change(delta, epsilon, factor - 1, total, models, own)
    share_changes(total, models, own, out := new(total))
    return out


# ---- tall masks -----------------------------------------------------------------------------------------------------


_TALL_MASKS_PAPER = Paper(
    "Ke Wang, Nikolaos Dimitriadis, Guillermo Ortiz-Jiménez, François Fleuret, Pascal Frossard",
    2024,
    "Localizing Task Information for Improved Model Merging and Compression",
    "https://arxiv.org/abs/2405.07813",
)


@step("void(float32[::1], float32, float32[::1], float32, float32[::1])")
def count_near(delta: Array, factor: float, merged: Array, strictness: float, count: Array) -> None:
    """One more where a term is no smaller than its distance from `merged`, times its strictness."""
    for i in range(count.size):
        term = delta[i] * factor
        count[i] += ONE if abs(term) >= abs(merged[i] - term) * strictness else ZERO


def _mask_agreement(
    merged: Array, deltas: Sequence[Array], factors: Sequence[float], mask_lambda: PerModel, k: int, lambda_: float
) -> Array:
    """λ times `merged`, where at least `k` of the terms are no smaller than their distance from it."""
    count = zeros(merged)
    for delta, factor, strictness in zip(deltas, factors, per_model(mask_lambda, len(deltas)), strict=True):
        count_near(delta, factor, merged, strictness, count)
    keep_where(merged, count, k, lambda_, out := new(merged))
    return out


@merge_method(
    "consensus_ta",
    title="Consensus Task Arithmetic",
    formula=(
        r"\theta = \theta_0 + \lambda \tau \text{ where } \lvert \lbrace i : \lvert \tau_i \rvert \ge"
        r" \lambda_i \lvert \tau - \tau_i \rvert \rbrace \rvert \ge k,"
        r"\quad \tau = \sum_i \tau_i, \quad \tau_i = w_i (\theta_i - \theta_0)"
    ),
    paper=_TALL_MASKS_PAPER,
    models=(1, None),
    laws=("zero", "permutation", "scale", full("task_arithmetic", k=0)),
)
def consensus_ta(
    deltas: Deltas,
    weight: PerModel = 1.0,
    k: Annotated[int, Range(0)] = 2,
    mask_lambda: Annotated[PerModel, Range(0)] = 0.4,
    lambda_: float = 1.0,
) -> Array:
    """The sum of the task vectors, where it matters to at least k of them.

    With τᵢ = wᵢ (θᵢ − θ₀) and τ = Σ τᵢ, task i has entry e in its mask where |τᵢ| ≥ λᵢ |τ − τᵢ|: there the sum is near
    the task's own change. The result is θ₀ + λ τ at the entries that at least k masks hold, θ₀ elsewhere. k = 2 drops
    what no task needs and what only one needs; k = 1 only the former; k = 0 nothing (task_arithmetic); k above the
    number of models everything.

    Follows the paper (its released code has > for ≥, which differs only where the result is 0 or
    two numbers are equal). The paper picks each λᵢ among 0.2, 0.3, ..., 0.6 on the task's validation data; without data
    the default is the middle. λ, too, is picked there, among 0.1, 0.2, ..., 1. Weights are not in the paper.

    Args:
        k: how many tasks an entry must matter to.
        mask_lambda: how strict each task's mask is; larger keeps fewer entries.

    >>> import numpy as np
    >>> one, other = np.float32([1, 2, 0.1, 3]), np.float32([1, 1, 4, -2])
    >>> consensus_ta([one, other])
    array([2., 3., 0., 1.], dtype=float32)
    >>> consensus_ta([one, other], k=1)
    array([2. , 3. , 4.1, 1. ], dtype=float32)
    """
    # λ goes into the terms: a factor common to all changes no mask, and so k = 0 is task arithmetic to the bit.
    factors = [number * lambda_ for number in per_model(weight, len(deltas))]
    merged = weighted_sum(deltas, factors)
    return _mask_agreement(merged, deltas, factors, mask_lambda, k, 1.0)


def measure_consensus_ties(blocks: Blocks, density: Sequence[float]) -> Trim:
    """What ties measures."""
    return measure_ties(blocks, density)


@merge_method(
    "consensus_ties",
    title="Consensus TIES",
    formula=(
        r"\theta = \theta_0 + \lambda \tau \text{ where } \lvert \lbrace i : \lvert \tau_i \rvert \ge"
        r" \lambda_i \lvert \tau - \tau_i \rvert \rbrace \rvert \ge k,"
        r"\quad \tau = \sum_{i \in A} w_i \hat\tau_i"
    ),
    paper=_TALL_MASKS_PAPER,
    models=(1, None),
    measure=measure_consensus_ties,
    laws=("zero", "permutation", "scale", full("ties", k=0, lambda_=1)),
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
    measured: Trim | None = None,
) -> Array:
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
        k: how many tasks an entry must matter to.
        mask_lambda: how strict each task's mask is; larger keeps fewer entries.
        normalize: divide by the sum of the weights of the models that agree.

    >>> import numpy as np
    >>> one, other = np.float32([4, 2, 0.1, 3]), np.float32([4, 1, 5, -2])
    >>> consensus_ties([one, other], density=0.5)
    array([8., 0., 0., 3.], dtype=float32)
    >>> consensus_ties([one, other], density=0.5, k=1)
    array([8., 0., 5., 3.], dtype=float32)
    """
    merged = ties(deltas, weight, density, normalize, measured=measured)
    return _mask_agreement(merged, deltas, per_model(weight, len(deltas)), mask_lambda, k, lambda_)
