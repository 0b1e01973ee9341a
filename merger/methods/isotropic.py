"""Iso-C and Iso-CTS: a merged matrix whose singular values are all equal. Not here: the decomposition (`_spectral`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from merger.methods._ops import per_model, weighted_sum
from merger.methods._spectral import TINY, Spectrum, as_matrix, is_matrix, isometry, matrix_sum, side_by_side, spectrum
from merger.methods.registry import Deltas, Paper, PerModel, Range, full, merge_method

if TYPE_CHECKING:
    from torch import Tensor

_PAPER = Paper(
    "Marczak et al.",
    2025,
    "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces",
    "https://arxiv.org/abs/2502.04959",
)


@merge_method(
    "iso_c",
    title="Iso-C",
    formula=(
        r"\theta = \theta_0 + \lambda \frac{\sum_r \sigma_r}{R} U V^\top,"
        r"\quad \sum_i w_i (\theta_i - \theta_0) = U \operatorname{diag}(\sigma) V^\top"
    ),
    paper=_PAPER,
    models=(1, None),
    unit="matrix",
    scratch=12,
    laws=("zero", "permutation", "scale"),
    spreads=True,
)
def iso_c(deltas: Deltas, weight: PerModel = 1.0, lambda_: float = 1.0, spectral: bool = True) -> Tensor:
    """The sum of the task vectors' matrices, with all singular values made equal.

    With Σ wᵢ (θᵢ − θ₀) = U diag(σ) Vᵀ and r the smaller of rows and columns, the result is θ₀ + λ (Σ σ / r) U Vᵀ: what
    few strong directions hold is spread evenly over all of them.

    Directions that the sum does not have get nothing, and so the result is short where it has few: of adapters whose
    ranks are k together k / r of the strength is left, at λ = 1 hardly more than the base. λ = r / k gives it back.
    In models that were rounded after adapters were added, rounding is a direction like all others, and made as strong.

    Tensors of one dimension, and those for which spectral is false, are averaged: θ₀ + (λ / N) Σ wᵢ (θᵢ − θ₀). Of a
    stack of experts each is a matrix; a convolution is one, its first dimension against all others. The released code
    takes embeddings as matrices; those who use it on language models leave embeddings and head out (spectral: false).

    Follows section 4 of the paper and its released code: the matrices are summed, everything else averaged; λ (the
    paper's α) is chosen on validation data, in the code among 0.1, 0.2, ..., 3. Departs: weights; tensors of more than
    two dimensions are averaged there; directions whose singular value is zero but for rounding stay zero (they count in
    r), where there LAPACK's arbitrary vectors get the mean too.

    Args:
        weight: what each task vector is multiplied by.
        lambda_: what the merged task vector is multiplied by before the base is added.
        spectral: treat tensors of two or more dimensions as matrices; false averages them.

    >>> import torch
    >>> iso_c([torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])])
    tensor([[2.5000, 0.0000],
            [0.0000, 2.5000]])
    >>> iso_c([torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0])])
    tensor([2., 1.])
    """
    weights = per_model(weight, len(deltas))
    if not is_matrix(deltas[0], spectral):
        return _mean(deltas, weights, lambda_)
    vectors, values = isometry(matrix_sum(deltas, weights))
    return vectors.mul(values.mean() * lambda_).to(deltas[0].dtype)


@merge_method(
    "iso_cts",
    title="Iso-CTS",
    formula=(
        r"\theta = \theta_0 + \lambda \frac{\sum_r \sigma_r}{R} U_\perp V_\perp^\top,"
        r"\quad U = [U_k \mid U_1 \mid \dots \mid U_N], \quad V = [V_k \mid V_1 \mid \dots \mid V_N]"
    ),
    paper=_PAPER,
    models=(1, None),
    unit="matrix",
    scratch=22,
    laws=("zero", "permutation", "scale", full("iso_c", common=1)),
    spreads=True,
)
def iso_cts(
    deltas: Deltas,
    weight: PerModel = 1.0,
    common: Annotated[float, Range(0, 1)] = 0.8,
    lambda_: float = 1.0,
    spectral: bool = True,
) -> Tensor:
    """The common directions of the task vectors' matrices and those of each task alone, all equally strong.

    With τᵢ = wᵢ (θᵢ − θ₀), N models and r the smaller of rows and columns: s = round((r − ⌊common r⌋) / N) directions a
    task, and k = r − N s common ones. The common ones are the k leading singular triples of Σ τᵢ, Uₖ their left
    vectors; each task adds the s leading triples of τᵢ − Uₖ Uₖᵀ τᵢ. Side by side these are U, σ, V; U⊥ and V⊥ are the
    nearest matrices with orthonormal columns. The result is θ₀ + λ (Σ σ / r) U⊥ V⊥ᵀ. Where s is 0 that is iso_c.

    Other tensors, stacks of experts, embeddings, and adapters as in iso_c.

    Follows section 4 of the paper and its released code, common 0.8 as there; round takes a half to the even number.
    Departs as iso_c; what is left of a task after the common part is zero where it is rounding; and N s is at most r,
    which the rounding exceeds for small matrices.

    Args:
        weight: what each task vector is multiplied by.
        common: share of the directions that is taken from the sum of the task vectors.
        lambda_: what the merged task vector is multiplied by before the base is added.
        spectral: treat tensors of two or more dimensions as matrices; false averages them.

    >>> import torch
    >>> one, other = torch.diag(torch.tensor([4.0, 1.0, 0.0])), torch.diag(torch.tensor([4.0, 0.0, 2.0]))
    >>> iso_cts([one, other], common=0.4)
    tensor([[3.6667, 0.0000, 0.0000],
            [0.0000, 3.6667, 0.0000],
            [0.0000, 0.0000, 3.6667]])
    """
    like, weights = deltas[0], per_model(weight, len(deltas))
    rank = min(like.shape) if is_matrix(like, spectral) else 0
    own = _directions_a_task(rank, common, len(deltas))
    if not own:
        return iso_c(deltas, weight, lambda_, spectral)
    shared = spectrum(matrix_sum(deltas, weights), rank - own * len(deltas))
    parts = [shared, *(_rest(as_matrix(*pair), shared, own) for pair in zip(deltas, weights, strict=True))]
    left, values, right = side_by_side(parts)
    return (left.mul_(values.sum() * (lambda_ / rank)) @ right).to(like.dtype)


def _directions_a_task(rank: int, common: float, models: int) -> int:
    return min(round((rank - int(rank * common)) / models), rank // models)


def _rest(matrix: Tensor, shared: Spectrum, top: int) -> Spectrum:
    """The leading triples of what the common directions leave of a task; rounding of the matrix is no direction."""
    noise = TINY * float(matrix.norm())
    return spectrum(matrix.sub_(shared.left @ (shared.left.T @ matrix)), top, noise)


def _mean(deltas: Sequence[Tensor], weights: Sequence[float], factor: float) -> Tensor:
    return weighted_sum(deltas, [number * factor / len(deltas) for number in weights])
