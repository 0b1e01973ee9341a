"""SVC: calibrate the singular values of a merged matrix by what its tasks do in each direction.

It is a step after any method: that method's result is then the first model of an `svc` recipe, and its parents follow
(merged_first). Otherwise it follows task arithmetic, in one recipe. Not here: the merging it follows, and the
decomposition.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from merger.methods._ops import divisor, per_model, weighted_sum
from merger.methods._spectral import TINY, as_matrix, is_matrix, matrix_sum, spectrum
from merger.methods.registry import Deltas, Paper, PerModel, Range, merge_method

if TYPE_CHECKING:
    from torch import Tensor

_PAPER = Paper(
    "Li et al.",
    2026,
    "When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging",
    "https://arxiv.org/abs/2602.05536",
)


def _check(weight: Sequence[float], merged_first: bool) -> None:
    if merged_first and len(weight) < 2:
        raise ValueError("merged_first says that the first model is a merge; name its parents after it")


@merge_method(
    "svc",
    title="SVC",
    formula=(
        r"\theta = \theta_0 + \sum_r \gamma_r \sigma_r u_r v_r^\top,"
        r"\quad \gamma_r = \frac{K}{\sum_i \max(\alpha, s_{r,i})}, \quad s_{r,i} = \frac{\langle u_r^\top"
        r" \tau, u_r^\top \tau_i \rangle}{\lVert u_r^\top \tau_i \rVert^2}"
    ),
    paper=_PAPER,
    models=(1, None),
    check=_check,
    unit="matrix",
    scratch=16,
    laws=("zero", "scale"),
)
def svc(
    deltas: Deltas,
    weight: PerModel = 1.0,
    alpha: Annotated[float, Range(0)] = 1.0,
    merged_first: bool = False,
    normalize: bool = False,
    lambda_: float = 1.0,
    spectral: bool = True,
) -> Tensor:
    """Task arithmetic, or any merge, without counting what its tasks share several times.

    τ is task arithmetic's: λ Σ wᵢ τᵢ with τᵢ = θᵢ − θ₀, divided by Σ wᵢ if normalize; with merged_first it is λ w₁ τ₁
    of the first model alone, and the tasks are the others. With τ = Σ σᵣ uᵣ vᵣᵀ and K tasks: aᵣ = uᵣᵀ τ is what the
    merge does along uᵣ, aᵣⁱ = uᵣᵀ τᵢ what task i does, and sᵣⁱ = ⟨aᵣ, aᵣⁱ⟩ / ‖aᵣⁱ‖² how many times the merge holds it.
    The result is θ₀ + Σ γᵣ σᵣ uᵣ vᵣᵀ with γᵣ = K / Σᵢ max(α, sᵣⁱ). At α = 1 directions only shrink; below, those that
    the merge weakened grow again, at most by 1 / α.

    After another method: make that merge first, then name it here first, its parents after it, with the same
    base_model. Tensors of one dimension, and those for which spectral is false, stay as merged. Of a stack of
    experts each is a matrix; a convolution is one, its first dimension against all others. The released code leaves
    embeddings out: set spectral to false for them.

    Follows the paper (its equations 4 and 8 and algorithm 1) and its released code as corrected in March 2026, which
    takes α = 1 / K after task arithmetic with λ = 0.3, and 1 after TSV-M. Departs: tensors of more than two dimensions
    stay as merged there; a task whose part along uᵣ is 1e-6 of the merge's or less has sᵣⁱ = 0; where the sum is 0
    (only at α = 0) γᵣ is 1; directions whose singular value is zero but for rounding stay zero. Equal singular values
    leave uᵣ, and with it the result, open.

    Args:
        weight: how much of each task vector goes into the merge.
        alpha: the least that a task counts in a direction; smaller raises what the merge weakened.
        merged_first: the first model is the merge to be calibrated, the others are its parents.
        normalize: divide by the sum of the weights, so that only their ratios count.
        lambda_: what the merged task vector is multiplied by before it is calibrated.
        spectral: treat tensors of two or more dimensions as matrices; false leaves them as merged.

    >>> import torch
    >>> one, other = torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([3.0, 0.0]))
    >>> svc([one, other])
    tensor([[3., 0.],
            [0., 1.]])
    >>> svc([one + other, one, other], merged_first=True, alpha=0.25)
    tensor([[3.0000, 0.0000],
            [0.0000, 1.6000]])
    """
    weights = per_model(weight, len(deltas))
    _check(weights, merged_first)
    sources, tasks = (deltas[:1], deltas[1:]) if merged_first else (deltas, deltas)
    share = lambda_ / divisor(weights[: len(sources)], normalize)
    factors = [number * share for number in weights[: len(sources)]]
    if not is_matrix(deltas[0], spectral):
        return weighted_sum(sources, factors)
    return _calibrated(matrix_sum(sources, factors), tasks, alpha).to(deltas[0].dtype)


def _calibrated(merged: Tensor, tasks: Sequence[Tensor], alpha: float) -> Tensor:
    parts = spectrum(merged)
    rows = parts.right * parts.values[:, None]
    counted = parts.values.new_zeros(parts.values.shape)
    for task in tasks:
        counted.add_(_times(rows, parts.left.T @ as_matrix(task)).clamp_(min=alpha))
    factors = counted.reciprocal_().mul_(len(tasks)).nan_to_num_(posinf=1.0)
    return (parts.left * factors) @ rows


def _times(merged: Tensor, task: Tensor) -> Tensor:
    """For each row how many times the merge holds what the task does there."""
    squares, dots = task.square().sum(1), (merged * task).sum(1)
    return dots.div_(squares).masked_fill_(squares <= TINY**2 * merged.square().sum(1), 0.0)
