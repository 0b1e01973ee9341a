"""Methods in a basis that matrices share or have: KnOTS, and subspace boosting after another method.

Not here: the decomposition (steps.decompose).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Annotated

from merger.methods.registry import Deltas, Paper, PerModel, Range, full, merge_method
from merger.methods.steps.arithmetic import divisor, multiple, per_model
from merger.methods.steps.decompose import (
    TINY,
    Matrix,
    as_matrix,
    eigen,
    is_matrix,
    matrix_sum,
    namespace,
    spectrum,
    squares,
    to_float32,
)
from merger.methods.steps.step import Array
from merger.methods.steps.votes import elect_and_merge, trim
from merger.methods.task_vectors import task_arithmetic, ties

_PAPER = Paper(
    "George Stoica, Pratik Ramesh, Boglarka Ecsedi, Leshem Choshen, Judy Hoffman",
    2025,
    "Model merging with SVD to tie the Knots",
    "https://arxiv.org/abs/2410.19735",
)


@merge_method(
    "knots",
    title="KnOTS-TIES",
    formula=(
        r"\theta = \theta_0 + \lambda U \operatorname{TIES}(C_1, \dots, C_N),"
        r"\quad C_i = U^\top (\theta_i - \theta_0), \quad [\tau_1 \mid \dots \mid \tau_N] = U \Sigma V^\top"
    ),
    paper=_PAPER,
    models=(1, None),
    unit="matrix",
    workspace=20,
    laws=("zero", "permutation", "scale"),
)
def knots(
    deltas: Deltas,
    weight: PerModel = 1.0,
    density: Annotated[PerModel, Range(0, 1)] = 1.0,
    normalize: bool = True,
    lambda_: float = 1.0,
    spectral: bool = True,
) -> Array:
    """The task vectors' matrices, turned into a basis they share, merged there as by TIES, and turned back.

    With τᵢ = θᵢ − θ₀ and the SVD [τ₁ … τₙ] = U Σ [V₁ … Vₙ], task i is Cᵢ = Σ Vᵢ = Uᵀ τᵢ in the basis U. C is what ties
    makes of the Cᵢ: the density of entries of largest magnitude stays in each, a sign is elected by Σ wᵢ Cᵢ, and those
    that agree are summed, divided by Σ wᵢ over the same i if normalize. The result is θ₀ + λ U C. U are the
    eigenvectors of Σ τᵢ τᵢᵀ, each with its largest entry positive, so that a vote of exactly 0 has one outcome.

    Tensors of one dimension, and those for which spectral is false, are merged by ties as they are. Of a stack of
    experts each is a matrix, and merged by itself; a convolution is one, its first dimension against all others. The
    paper merges adapters of attention matrices and no embeddings; set spectral to false for them.

    Follows the paper and its released code (Σ on V; its settings for Llama 3 8B keep all entries, with λ = 0.5; those
    for CLIP's ViT-B/32 a fifth, with 0.6). Departs: a matrix of more rows than columns is taken on its side, the basis
    being that of its inputs (the code's concat_across_output: false), for else the basis of a 14336 x 4096 matrix would
    have 12288 directions at three models; an entry of Cᵢ below 1e-6 of its column's length is zero; directions are
    dropped below 1e-6 of the largest singular value, not below 1e-5; trimmed for each tensor, not over the model as a
    whole; of d entries int(K d) stay at a density of K, as in the paper, where the code keeps int(K d) + 1; a bias is
    no column of its matrix.

    Args:
        weight: how much each task vector counts, in the vote and in the mean.
        density: share of entries kept in each task vector, by magnitude in the shared basis.
        normalize: divide by the sum of the weights of the models that agree.
        spectral: treat tensors of two or more dimensions as matrices; false merges them by ties.

    >>> import numpy as np
    >>> one, other = np.float32([[2, 2], [2, 2]]), np.float32([[1, -1], [-1, 1]])
    >>> knots([one, other]).round(4)
    array([[3., 1.],
           [1., 3.]], dtype=float32)
    >>> knots([one, other], density=0.25).round(4)
    array([[3., 1.],
           [1., 3.]], dtype=float32)
    """
    if not is_matrix(deltas[0], spectral):
        return ties(deltas, weight, density, normalize, lambda_)
    weights, densities = per_model(weight, len(deltas)), per_model(density, len(deltas))
    basis = _basis(deltas)
    parts = [_trim_along(_wider(delta), basis, share) for delta, share in zip(deltas, densities, strict=True)]

    def keep(model: int, factor: float) -> Array:
        return multiple(parts[model], factor)

    merged = elect_and_merge(keep, weights, [1.0] * len(weights), normalize, 1.0)
    return multiple(_restore(basis @ as_matrix(merged), deltas[0]), lambda_)


def _wider(tensor: Array) -> Matrix:
    """The tensor as a matrix with no more rows than columns."""
    matrix = as_matrix(tensor)
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix


def _restore(matrix: Matrix, like: Array) -> Array:
    return to_float32(matrix.T if like.shape[0] > like.shape[1] else matrix)


def _basis(deltas: Sequence[Array]) -> Matrix:
    """The left singular vectors of all matrices side by side, as columns, each with its largest entry positive."""
    values, vectors = eigen(reduce(add, (matrix @ matrix.T for matrix in map(_wider, deltas))))
    vectors = vectors[:, values > TINY * values[-1]]
    if not vectors.shape[1]:
        return vectors
    largest = abs(vectors).argmax(0)
    turned: Matrix = vectors * namespace(vectors).sign(vectors[largest, range(len(largest))])
    return turned


def _trim_along(matrix: Matrix, basis: Matrix, density: float) -> Array:
    from merger.methods.steps.select import kth_magnitudes

    along = basis.T @ matrix
    # a zero but for rounding would vote and be counted
    part = to_float32(along * (abs(along) > TINY * squares(matrix.T) ** 0.5))
    (threshold,) = kth_magnitudes([[part]], [density]) if part.shape[0] else (0.0,)
    return trim(part, threshold)


# ---- boosting -------------------------------------------------------------------------------------------------------


_BOOSTING_PAPER = Paper(
    "Ronald Skorobogat, Karsten Roth, Mariana-Iuliana Georgescu",
    2025,
    "Subspace-Boosted Model Merging",
    "https://arxiv.org/abs/2506.16506",
)


@merge_method(
    "subspace_boosting",
    title="Subspace Boosting",
    formula=(
        r"\theta = \theta_0 + U \operatorname{diag}(\max(\sigma, \sigma_c)) V^\top,"
        r"\quad \lambda \sum_i w_i (\theta_i - \theta_0) = U \operatorname{diag}(\sigma) V^\top"
    ),
    paper=_BOOSTING_PAPER,
    models=(1, None),
    unit="matrix",
    workspace=16,
    laws=("zero", "permutation", "scale", full("task_arithmetic", beta=1)),
)
def subspace_boosting(
    deltas: Deltas,
    weight: PerModel = 1.0,
    beta: Annotated[float, Range(0, 1)] = 0.01,
    normalize: bool = False,
    lambda_: float = 1.0,
    spectral: bool = True,
) -> Array:
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
        beta: share of the sum of the singular values that the strong ones hold; those after them are raised.
        lambda_: what the merged task vector is multiplied by before it is boosted.
        spectral: treat tensors of two or more dimensions as matrices; false leaves them as merged.

    >>> import numpy as np
    >>> subspace_boosting([np.diag(np.float32([6, 3, 1]))], beta=0.8).round(4)
    array([[6., 0., 0.],
           [0., 3., 0.],
           [0., 0., 3.]], dtype=float32)
    >>> subspace_boosting([np.diag(np.float32([6, 3])), np.diag(np.float32([0, 1]))]).round(4)
    array([[6., 0.],
           [0., 6.]], dtype=float32)
    """
    if not is_matrix(deltas[0], spectral) or beta >= 1:
        return task_arithmetic(deltas, weight, normalize, lambda_)
    weights = per_model(weight, len(deltas))
    share = lambda_ / divisor(weights, normalize)
    merged = matrix_sum(deltas, [number * share for number in weights])
    return to_float32(_boost(merged, beta))


def _boost(merged: Matrix, beta: float) -> Matrix:
    parts = spectrum(merged)
    if not parts.values.shape[0]:
        return merged
    before = int((parts.values.cumsum(0) < beta * parts.values.sum()).sum())
    added = parts.values[min(before, len(parts.values) - 1)] - parts.values
    weak = added > 0
    boosted: Matrix = merged + (parts.left[:, weak] * added[weak]) @ parts.right[weak]
    return boosted
