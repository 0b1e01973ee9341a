"""Task arithmetic: weighted task vectors added to the base. Not here: sparsifying them first (ties, dare)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger.methods._ops import divisor, per_model, weighted_sum
from merger.methods.registry import Deltas, Paper, PerModel, merge_method

if TYPE_CHECKING:
    from torch import Tensor

_PAPER = Paper("Ilharco et al.", 2023, "Editing models with task arithmetic", "https://arxiv.org/abs/2212.04089")


@merge_method(
    "task_arithmetic",
    title="Task Arithmetic",
    formula=r"\theta = \theta_0 + \lambda \sum_i w_i (\theta_i - \theta_0)",
    paper=_PAPER,
    models=(1, None),
    laws=("zero", "permutation", "scale"),
)
def task_arithmetic(deltas: Deltas, weight: PerModel = 1.0, normalize: bool = False, lambda_: float = 1.0) -> Tensor:
    """The base plus a weighted sum of the models' task vectors.

    With τᵢ = θᵢ − θ₀ the result is θ₀ + λ Σ wᵢ τᵢ, the sum divided by Σ wᵢ if normalize. A negative weight takes a task
    away. Weights that sum to zero leave the sum undivided, as in mergekit.

    Departs from mergekit: weight may be left out; density and rescale, which it reads and does not use, are no
    parameters.

    Args:
        weight: how much of each task vector goes in.
        normalize: divide by the sum of the weights, so that only their ratios count.
        lambda_: what the merged task vector is multiplied by before the base is added.

    >>> import torch
    >>> one, other = torch.tensor([1.0, 0.0, -2.0, 4.0]), torch.tensor([3.0, 1.0, 2.0, 0.0])
    >>> task_arithmetic([one, other], weight=[1, 0.5], lambda_=2)
    tensor([ 5.,  1., -2.,  8.])
    """
    weights = per_model(weight, len(deltas))
    share = lambda_ / divisor(weights, normalize)
    return weighted_sum(deltas, [number * share for number in weights])
