"""SCE: select the entries in which the models differ most, calculate each model's weight, erase what disagrees.

Not here: the search for the variance that selects (`_select`), and the erasing (`_ops.consensus`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Annotated

from merger.methods._ops import Blocks, array, consensus, entries_of, magnitudes_at, scratch, square_sums
from merger.methods.registry import Deltas, Paper, Range, merge_method

if TYPE_CHECKING:
    from torch import Tensor

_PAPER = Paper("Wan et al.", 2024, "FuseChat: Knowledge Fusion of Chat Models", "https://arxiv.org/abs/2408.07990")


_RUN = 1 << 16  # entries


@dataclass(frozen=True)
class Selection:
    """The variance from which on an entry is selected (0: all are; infinity: none), and the weight of each model."""

    threshold: float
    weights: tuple[float, ...]


def measure(blocks: Blocks, select_topk: float) -> Selection:
    """The threshold and the weights of a whole tensor."""
    threshold = _threshold(blocks, select_topk)
    squares = [[square_sums(delta) for delta in _selected(block, threshold)] for block in blocks]
    totals = [math.fsum(number for sums in model for number in sums) for model in zip(*squares, strict=True)]
    whole = math.fsum(totals)
    return Selection(threshold, tuple(total / whole if whole else 1 / len(totals) for total in totals))


def _threshold(blocks: Blocks, select_topk: float) -> float:
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
    measure=measure,
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
    found = measured or measure([deltas], select_topk)
    votes = _selected(deltas, found.threshold)
    return consensus(votes, found.weights, normalize=True, gains=found.weights)
