"""TSV-M: the leading singular vectors of each task's matrix, made orthogonal across tasks.

Not here: the decomposition itself (`_spectral`), and TSV-C, which stores models and merges none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger.methods._ops import per_model, weighted_sum
from merger.methods._spectral import as_matrix, is_matrix, side_by_side, spectrum
from merger.methods.registry import Deltas, Paper, PerModel, merge_method

if TYPE_CHECKING:
    from torch import Tensor

_PAPER = Paper(
    "Gargiulo et al.",
    2025,
    "Task Singular Vectors: Reducing Task Interference in Model Merging",
    "https://arxiv.org/abs/2412.00081",
)


@merge_method(
    "tsvm",
    title="TSV-M",
    formula=(
        r"\theta = \theta_0 + \lambda U_\perp \Sigma V_\perp^\top,"
        r"\quad U = [U_1 \mid \dots \mid U_N], \quad w_i (\theta_i - \theta_0) \approx U_i \Sigma_i V_i^\top"
    ),
    paper=_PAPER,
    models=(1, None),
    unit="matrix",
    scratch=22,
    laws=("zero", "permutation", "scale"),
)
def tsvm(deltas: Deltas, weight: PerModel = 1.0, lambda_: float = 1.0, spectral: bool = True) -> Tensor:
    """The leading singular vectors of each task vector's matrices, decorrelated across tasks and added.

    Of each of the N matrices τᵢ = wᵢ (θᵢ − θ₀) = Uᵢ Σᵢ Vᵢᵀ the k = ⌊r / N⌋ leading triples stay, r the smaller of rows
    and columns. Side by side they are U, Σ, V; U⊥ and V⊥ are the nearest matrices with orthonormal columns (P Qᵀ of
    the SVD U = P D Qᵀ). The result is θ₀ + λ U⊥ Σ V⊥ᵀ. One model comes back whole.

    Tensors of one dimension, matrices with r < N, and tensors for which spectral is false are averaged:
    θ₀ + (λ / N) Σ τᵢ. Of a stack of experts each is a matrix; a convolution is one, its first dimension against the
    others. Embeddings and heads are matrices like all others in the paper, whose models are image encoders; with a
    vocabulary of rows they are slow, and most who use the method on language models set spectral to false for them.

    Follows the paper and its released code, which chooses λ among 0.1, 0.2, ..., 3 on validation data. Departs:
    weights; tensors of more than two dimensions are averaged there; directions whose singular value is zero but for
    rounding take no part in the orthogonalisation, where there LAPACK's arbitrary choice does; likewise a direction
    that tasks share exactly is not completed by an arbitrary one; a matrix with r < N, of which there nothing is left,
    is averaged.

    Args:
        weight: what each task vector is multiplied by.
        lambda_: what the merged task vector is multiplied by before the base is added.
        spectral: treat tensors of two or more dimensions as matrices; false averages them.

    >>> import torch
    >>> one, other = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    >>> tsvm([one])
    tensor([[3., 0.],
            [0., 1.]])
    >>> tsvm([torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])])
    tensor([[3., 0.],
            [0., 2.]])
    """
    weights = per_model(weight, len(deltas))
    like = deltas[0]
    kept = min(like.shape) // len(deltas) if is_matrix(like, spectral) else 0
    if not kept:
        return weighted_sum(deltas, [number * lambda_ / len(deltas) for number in weights])
    parts = [spectrum(as_matrix(*pair), kept) for pair in zip(deltas, weights, strict=True)]
    left, values, right = side_by_side(parts)
    return ((left * (values * lambda_)) @ right).to(like.dtype)
