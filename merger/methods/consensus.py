"""Methods by what the models agree on, entry by entry: SCE, RAM and the masks of TALL (consensus).

Not here: the search for the variance that selects (steps.select), and the erasing (steps.arithmetic).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Annotated

from merger.methods.registry import Deltas, Paper, PerModel, Range, full, merge_method
from merger.methods.steps.arithmetic import (
    Blocks,
    array,
    consensus,
    elect_and_merge,
    entries_of,
    per_model,
    scaled,
    scratch,
    square_sums,
    trim,
    weighted_sum,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

_PAPER = Paper("Wan et al.", 2024, "FuseChat: Knowledge Fusion of Chat Models", "https://arxiv.org/abs/2408.07990")


_RUN = 1 << 16  # entries


@dataclass(frozen=True)
class Selection:
    """The variance from which on an entry is selected (0: all are; infinity: none), and the weight of each model."""

    threshold: float
    weights: tuple[float, ...]


def measure_sce(blocks: Blocks, select_topk: float) -> Selection:
    """The threshold and the weights of a whole tensor."""
    threshold = _threshold(blocks, select_topk)
    squares = [[square_sums(delta) for delta in _selected(block, threshold)] for block in blocks]
    totals = [math.fsum(number for sums in model for number in sums) for model in zip(*squares, strict=True)]
    whole = math.fsum(totals)
    return Selection(threshold, tuple(total / whole if whole else 1 / len(totals) for total in totals))


def _threshold(blocks: Blocks, select_topk: float) -> float:
    from merger.methods.steps.select import magnitudes_at

    if select_topk >= 1:
        return 0.0
    if select_topk <= 0:
        return math.inf
    variances = _Variances(blocks, [])
    found = magnitudes_at(variances, {0: lambda _: [max(1, int(select_topk * sum(variances.varying)))]})
    return found[0][0] or math.inf


@dataclass(frozen=True)
class _Variances:
    """The blocks of the variance over the models, made from the models' blocks; of each it counts what is not zero."""

    blocks: Blocks
    varying: list[int]

    @property
    def entries(self) -> int:
        """How many entries a tensor has."""
        return entries_of(self.blocks)

    def __iter__(self) -> Iterator[list[Tensor]]:
        for place, block in enumerate(self.blocks):
            variance = _variance(block)
            if place == len(self.varying):
                self.varying.append(_count(variance))
            yield [variance]


def _count(variance: Tensor) -> int:
    import numpy as np

    return int(np.count_nonzero(array(variance)))


def _variance(deltas: Sequence[Tensor]) -> Tensor:
    """The variance over the models, times their number squared: Σ over pairs of (τᵢ − τⱼ)²; 0 where all are equal.

    In float64, then rounded: in float32, sums of the same squares in another order would come out as different numbers,
    and the threshold would fall between entries of equal variance. In runs short enough for a core's own cache, and by
    numpy, which widens on the way: all of the block at once, in float64 tensors, took five times as long.
    """
    import numpy as np
    import torch

    rows, variance = [array(delta) for delta in deltas], np.empty(deltas[0].numel(), np.float32)
    total, square = np.empty(_RUN), np.empty(_RUN)
    for start in range(0, variance.size, _RUN):
        parts = [row[start : start + _RUN] for row in rows]
        sums, squares = total[: parts[0].size], square[: parts[0].size]
        sums.fill(0)
        for one, other in combinations(parts, 2):
            np.subtract(one, other, out=squares, dtype=np.float64)
            np.add(sums, np.multiply(squares, squares, out=squares), out=sums)
        np.copyto(variance[start : start + _RUN], sums, casting="same_kind")
    return scratch("variance", deltas[0]).copy_(torch.from_numpy(variance).view(deltas[0].shape))


def _selected(deltas: Sequence[Tensor], threshold: float) -> Sequence[Tensor]:
    """The deltas with zero where the variance is below the threshold."""
    import torch

    if threshold <= 0:
        return deltas
    mask = torch.ge(_variance(deltas), threshold, out=scratch("part", deltas[0]))
    return [torch.mul(delta, mask, out=scratch(f"term {place}", delta)) for place, delta in enumerate(deltas)]


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
) -> Tensor:
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

    >>> import torch
    >>> one, other = torch.tensor([3.0, 1.0, 0.0, -2.0]), torch.tensor([1.0, 1.0, 0.0, 4.0])
    >>> sce([one, other])
    tensor([1.8750, 1.0000, 0.0000, 4.0000])
    >>> sce([one, other], select_topk=0.5)
    tensor([0., 0., 0., 4.])
    """
    found = measured or measure_sce([deltas], select_topk)
    votes = _selected(deltas, found.threshold)
    return consensus(votes, found.weights, normalize=True, gains=found.weights)


# ---- ram ------------------------------------------------------------------------------------------------------------


_RAM_PAPER = Paper(
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
    paper=_RAM_PAPER,
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


def measure_ram(blocks: Blocks, r: float, alpha: float, epsilon: float) -> tuple[float, ...]:
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
    own = [_count_ram(mask & (models == 1)) for mask in changed]
    return [(alone, _count_ram(mask) - alone) for mask, alone in zip(changed, own, strict=True)]


def _count_ram(mask: NDArray[np.bool_]) -> int:
    import numpy as np

    return int(np.count_nonzero(mask))


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
    return _merged(deltas, epsilon, measured or measure_ram([deltas], r, alpha, epsilon))


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


# ---- tall masks -----------------------------------------------------------------------------------------------------


_TALL_MASKS_PAPER = Paper(
    "Wang et al.",
    2024,
    "Localizing Task Information for Improved Model Merging and Compression",
    "https://arxiv.org/abs/2405.07813",
)


def measure_tall_masks(blocks: Blocks, density: Sequence[float]) -> tuple[float, ...]:
    """The magnitude below which an entry of each delta is trimmed, as in ties."""
    from merger.methods.steps.select import kth_magnitudes

    return kth_magnitudes(blocks, density)


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
    paper=_TALL_MASKS_PAPER,
    models=(1, None),
    measure=measure_tall_masks,
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
    thresholds = measured or measure_tall_masks([deltas], per_model(density, len(deltas)))
    trimmed = [trim(*pair, f"term {model}") for model, pair in enumerate(zip(deltas, thresholds, strict=True))]
    merged = elect_and_merge(trimmed, weights, [1.0] * len(weights), normalize, 1.0)
    terms = (scaled(delta, number) for delta, number in zip(deltas, weights, strict=True))
    return merged.mul_(_agreed(terms, merged, per_model(mask_lambda, len(deltas)), k)).mul_(lambda_)
