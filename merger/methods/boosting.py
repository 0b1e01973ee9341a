"""Subspace boosting: raise the weak singular values of a merged matrix. Not here: the merging it follows.

It is a step after any method: that method's result is then the one model of a `subspace_boosting` recipe. With several
models it follows task arithmetic, in one recipe.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from merger.methods._ops import divisor, per_model
from merger.methods._spectral import is_matrix, matrix_sum, spectrum
from merger.methods.registry import Deltas, Paper, PerModel, Range, full, merge_method
from merger.methods.task_arithmetic import task_arithmetic

if TYPE_CHECKING:
    from torch import Tensor

_PAPER = Paper("Skorobogat et al.", 2025, "Subspace-Boosted Model Merging", "https://arxiv.org/abs/2506.16506")


@merge_method(
    "subspace_boosting",
    title="Subspace Boosting",
    formula=(
        r"\theta = \theta_0 + U \operatorname{diag}(\max(\sigma, \sigma_c)) V^\top,"
        r"\quad \lambda \sum_i w_i (\theta_i - \theta_0) = U \operatorname{diag}(\sigma) V^\top"
    ),
    paper=_PAPER,
    models=(1, None),
    unit="matrix",
    scratch=16,
    laws=("zero", "permutation", "scale", full("task_arithmetic", beta=1)),
)
def subspace_boosting(
    deltas: Deltas,
    weight: PerModel = 1.0,
    beta: Annotated[float, Range(0, 1)] = 0.01,
    normalize: bool = False,
    lambda_: float = 1.0,
    spectral: bool = True,
) -> Tensor:
    """Task arithmetic, or any merge, with the weak directions of its matrices raised.

    τ is task arithmetic's: λ Σ wᵢ (θᵢ − θ₀), divided by Σ wᵢ if normalize; for one model of weight 1 simply that
    model's change. With τ = U diag(σ) Vᵀ, σ from large to small, and c the first place where σ₁ + ... + σ_c is at least
    β Σ σ, the result is θ₀ + U diag(max(σ, σ_c)) Vᵀ. β = 0 makes all as strong as the first, β = 1 changes nothing.

    After another method: make that merge first, then name it here as the one model, with the same base_model. Tensors
    of one dimension, and those for which spectral is false, stay as merged. Of a stack of experts each is a matrix; a
    convolution is one, its first dimension against all others. The released code boosts the attention's and the MLP's
    matrices of a language model and not its embeddings: set spectral to false for them.

    Follows the paper and its released code, β = 0.01 as there. Departs: tensors of more than two dimensions stay as
    merged there; directions whose singular value is zero but for rounding stay zero, where there LAPACK's arbitrary
    vectors are raised too.

    Args:
        weight: how much of each task vector goes in.
        beta: share of the sum of the singular values that the strong ones hold; those after them are raised.
        normalize: divide by the sum of the weights, so that only their ratios count.
        lambda_: what the merged task vector is multiplied by before it is boosted.
        spectral: treat tensors of two or more dimensions as matrices; false leaves them as merged.

    >>> import torch
    >>> subspace_boosting([torch.diag(torch.tensor([6.0, 3.0, 1.0]))], beta=0.8)
    tensor([[6., 0., 0.],
            [0., 3., 0.],
            [0., 0., 3.]])
    >>> subspace_boosting([torch.diag(torch.tensor([6.0, 3.0])), torch.diag(torch.tensor([0.0, 1.0]))])
    tensor([[6., 0.],
            [0., 6.]])
    """
    if not is_matrix(deltas[0], spectral) or beta >= 1:
        return task_arithmetic(deltas, weight, normalize, lambda_)
    weights = per_model(weight, len(deltas))
    share = lambda_ / divisor(weights, normalize)
    merged = matrix_sum(deltas, [number * share for number in weights])
    return _boosted(merged, beta).to(deltas[0].dtype)


def _boosted(merged: Tensor, beta: float) -> Tensor:
    parts = spectrum(merged)
    if not parts.values.numel():
        return merged
    before = int((parts.values.cumsum(0) < beta * parts.values.sum()).sum())
    added = parts.values[min(before, parts.values.numel() - 1)] - parts.values
    weak = added > 0
    return merged.add_((parts.left[:, weak] * added[weak]) @ parts.right[weak])
