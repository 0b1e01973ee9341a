"""The linear merge: a weighted mean of the models' tensors. Not here: anything that needs a base (task_arithmetic)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from merger.methods._ops import per_model, weighted_sum
from merger.methods.registry import Paper, PerModel, Tensors, merge_method

if TYPE_CHECKING:
    from torch import Tensor

_PAPER = Paper(
    "Wortsman et al.",
    2022,
    "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time",
    "https://arxiv.org/abs/2203.05482",
)


def _check(weight: Sequence[float], normalize: bool) -> None:
    if normalize and abs(math.fsum(weight)) < 1e-8:
        listed = ", ".join(f"{number:g}" for number in weight)
        raise ValueError(f"the weights {listed} sum to zero, and normalize divides by their sum; set normalize: false")


@merge_method(
    "linear",
    title="Linear",
    formula=r"\theta = \frac{\sum_i w_i \theta_i}{\sum_i w_i}",
    paper=_PAPER,
    models=(1, None),
    check=_check,
    laws=("zero", "idempotent", "permutation", "scale"),
)
def linear(tensors: Tensors, weight: PerModel = 1.0, normalize: bool = True) -> Tensor:
    """The weighted average of the models' tensors.

    The result is Σ wᵢ θᵢ, divided by Σ wᵢ if normalize. With equal weights it is the uniform soup of the paper; weights
    may be negative, which moves away from a model.

    Departs from mergekit: weights that sum to zero are an error under normalize, where there nothing finite comes
    out; and weight may be left out.

    Args:
        weight: how much of each model goes in.
        normalize: divide by the sum of the weights, so that only their ratios count.

    >>> import torch
    >>> one, other = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([5.0, 2.0, -1.0, 0.0])
    >>> linear([one, other], weight=[3, 1])
    tensor([2., 2., 2., 3.])
    >>> linear([one, other], weight=[3, 1], normalize=False)
    tensor([ 8.,  8.,  8., 12.])
    """
    weights = per_model(weight, len(tensors))
    _check(weights, normalize)
    total = math.fsum(weights) if normalize else 1.0
    return weighted_sum(tensors, [number / total for number in weights])
