"""Methods on the singular values of the merged matrices: Iso-C, Iso-CTS, TSV-M, SVC.

Not here: the decomposition (steps.decompose).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from merger.methods.registry import Deltas, Paper, PerModel, Range, full, merge_method
from merger.methods.steps.arithmetic import divisor, per_model, weighted_sum
from merger.methods.steps.decompose import (
    TINY,
    Matrix,
    Spectrum,
    as_matrix,
    is_matrix,
    isometry,
    matrix_sum,
    namespace,
    side_by_side,
    spectrum,
    squares,
    to_float32,
)
from merger.methods.steps.step import Array

_PAPER = Paper(
    "Daniel Marczak, Simone Magistri, Sebastian Cygert, Bartłomiej Twardowski, Andrew D. Bagdanov, Joost van de Weijer",
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
    workspace=12,
    laws=("zero", "permutation", "scale"),
    spreads=True,
)
def iso_c(deltas: Deltas, weight: PerModel = 1.0, lambda_: float = 1.0, spectral: bool = True) -> Array:
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
        spectral: treat tensors of two or more dimensions as matrices; false averages them.

    >>> import numpy as np
    >>> iso_c([np.float32([[3, 0], [0, 1]]), np.float32([[0, 0], [0, 1]])]).round(4)
    array([[2.5, 0. ],
           [0. , 2.5]], dtype=float32)
    >>> iso_c([np.float32([3, 1]), np.float32([1, 1])]).round(4)
    array([2., 1.], dtype=float32)
    """
    weights = per_model(weight, len(deltas))
    if not is_matrix(deltas[0], spectral):
        return _mean(deltas, weights, lambda_)
    vectors, values = isometry(matrix_sum(deltas, weights))
    return to_float32(vectors * (values.mean() * lambda_))


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
    workspace=22,
    laws=("zero", "permutation", "scale", full("iso_c", common=1)),
    spreads=True,
)
def iso_cts(
    deltas: Deltas,
    weight: PerModel = 1.0,
    common: Annotated[float, Range(0, 1)] = 0.8,
    lambda_: float = 1.0,
    spectral: bool = True,
) -> Array:
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
        spectral: treat tensors of two or more dimensions as matrices; false averages them.

    >>> import numpy as np
    >>> one, other = np.diag(np.float32([4, 1, 0])), np.diag(np.float32([4, 0, 2]))
    >>> iso_cts([one, other], common=0.4).round(4)
    array([[3.6667, 0.    , 0.    ],
           [0.    , 3.6667, 0.    ],
           [0.    , 0.    , 3.6667]], dtype=float32)
    """
    like, weights = deltas[0], per_model(weight, len(deltas))
    rank = min(like.shape) if is_matrix(like, spectral) else 0
    own = _directions_a_task(rank, common, len(deltas))
    if not own:
        return iso_c(deltas, weight, lambda_, spectral)
    shared = spectrum(matrix_sum(deltas, weights), rank - own * len(deltas))
    parts = [shared, *(_rest(as_matrix(*pair), shared, own) for pair in zip(deltas, weights, strict=True))]
    left, values, right = side_by_side(parts)
    return to_float32((left * (values.sum() * (lambda_ / rank))) @ right)


def _directions_a_task(rank: int, common: float, models: int) -> int:
    return min(round((rank - int(rank * common)) / models), rank // models)


def _rest(matrix: Matrix, shared: Spectrum, top: int) -> Spectrum:
    """The leading triples of what the common directions leave of a task; rounding of the matrix is no direction."""
    noise = TINY * float(squares(matrix).sum() ** 0.5)
    return spectrum(matrix - shared.left @ (shared.left.T @ matrix), top, noise)


def _mean(deltas: Sequence[Array], weights: Sequence[float], factor: float) -> Array:
    return weighted_sum(deltas, [number * factor / len(deltas) for number in weights])


# ---- tsvm -----------------------------------------------------------------------------------------------------------


_TSVM_PAPER = Paper(
    "Antonio Andrea Gargiulo, Donato Crisostomi, Maria Sofia Bucarelli, Simone Scardapane, "
    "Fabrizio Silvestri, Emanuele Rodolà",
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
    paper=_TSVM_PAPER,
    models=(1, None),
    unit="matrix",
    workspace=22,
    laws=("zero", "permutation", "scale"),
)
def tsvm(deltas: Deltas, weight: PerModel = 1.0, lambda_: float = 1.0, spectral: bool = True) -> Array:
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
        spectral: treat tensors of two or more dimensions as matrices; false averages them.

    >>> import numpy as np
    >>> one, other = np.float32([[3, 0], [0, 1]]), np.float32([[0, 1], [0, 2]])
    >>> tsvm([one]).round(4)
    array([[3., 0.],
           [0., 1.]], dtype=float32)
    >>> tsvm([np.float32([[3, 0], [0, 1]]), np.float32([[1, 0], [0, 2]])]).round(4)
    array([[3., 0.],
           [0., 2.]], dtype=float32)
    """
    weights = per_model(weight, len(deltas))
    like = deltas[0]
    kept = min(like.shape) // len(deltas) if is_matrix(like, spectral) else 0
    if not kept:
        return _mean(deltas, weights, lambda_)
    parts = [spectrum(as_matrix(*pair), kept) for pair in zip(deltas, weights, strict=True)]
    left, values, right = side_by_side(parts)
    return to_float32((left * (values * lambda_)) @ right)


# ---- svc ------------------------------------------------------------------------------------------------------------


_SVC_PAPER = Paper(
    "Yayuan Li, Ze Peng, Jian Zhang, Jintao Guo, Yue Duan, Yinghuan Shi",
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
    paper=_SVC_PAPER,
    models=(1, None),
    check=_check,
    unit="matrix",
    workspace=16,
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
) -> Array:
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
        lambda_: what the merged task vector is multiplied by before it is calibrated.
        spectral: treat tensors of two or more dimensions as matrices; false leaves them as merged.

    >>> import numpy as np
    >>> one, other = np.diag(np.float32([3, 1])), np.diag(np.float32([3, 0]))
    >>> svc([one, other]).round(4)
    array([[3., 0.],
           [0., 1.]], dtype=float32)
    >>> svc([one + other, one, other], merged_first=True, alpha=0.25).round(4)
    array([[3. , 0. ],
           [0. , 1.6]], dtype=float32)
    """
    weights = per_model(weight, len(deltas))
    _check(weights, merged_first)
    sources, tasks = (deltas[:1], deltas[1:]) if merged_first else (deltas, deltas)
    share = lambda_ / divisor(weights[: len(sources)], normalize)
    factors = [number * share for number in weights[: len(sources)]]
    if not is_matrix(deltas[0], spectral):
        return weighted_sum(sources, factors)
    return to_float32(_calibrate(matrix_sum(sources, factors), tasks, alpha))


def _calibrate(merged: Matrix, tasks: Sequence[Array], alpha: float) -> Matrix:
    parts, where = spectrum(merged), namespace(merged).where
    rows, counted = parts.right * parts.values[:, None], parts.values * 0
    for task in tasks:
        counted = counted + _times(rows, parts.left.T @ as_matrix(task)).clip(min=alpha)
    calibrated: Matrix = (parts.left * (len(tasks) / where(counted == 0, float(len(tasks)), counted))) @ rows
    return calibrated


def _times(merged: Matrix, task: Matrix) -> Matrix:
    """For each row how many times the merge holds what the task does there."""
    lengths, where = squares(task), namespace(merged).where
    none = lengths <= TINY**2 * squares(merged)
    times: Matrix = where(none, 0.0, (merged * task).sum(1) / where(none, 1.0, lengths))
    return times
