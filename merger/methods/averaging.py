"""Means of the models: linear, Model Stock, by what was measured of them, and passthrough, the mean of one.

Not here: task vectors (task_vectors).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Annotated

from merger.methods.registry import Deltas, Paper, PerModel, Range, Tensors, merge_method
from merger.methods.steps.arithmetic import (
    Blocks,
    add_scaled,
    multiple,
    multiply,
    per_model,
    quotient,
    refuse_zero_sum,
    scale_lines,
    square,
    weighted_sum,
)
from merger.methods.steps.decompose import is_matrix, right_divide, to_float32
from merger.methods.steps.rows import as_rows, row_dots, whole_dots
from merger.methods.steps.step import Array, zeros

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PAPER = Paper(
    "Mitchell Wortsman, Gabriel Ilharco, Samir Ya Gadre, Rebecca Roelofs, Raphael Gontijo-Lopes, "
    "Ari S. Morcos, Hongseok Namkoong, Ali Farhadi, Yair Carmon, Simon Kornblith, Ludwig Schmidt",
    2022,
    "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time",
    "https://arxiv.org/abs/2203.05482",
)


def _check(weight: Sequence[float], normalize: bool) -> None:
    refuse_zero_sum(weight, "normalize" if normalize else None)


@merge_method(
    "linear",
    title="Linear",
    formula=r"\theta = \frac{\sum_i w_i \theta_i}{\sum_i w_i}",
    paper=_PAPER,
    models=(1, None),
    check=_check,
    laws=("zero", "idempotent", "permutation", "scale"),
)
def linear(tensors: Tensors, weight: PerModel = 1.0, normalize: bool = True) -> Array:
    """The weighted average of the models' tensors.

    The result is Σ wᵢ θᵢ, divided by Σ wᵢ if normalize. With equal weights it is the uniform soup of the paper; weights
    may be negative, which moves away from a model.

    Departs from mergekit: weights that sum to zero are an error under normalize, where there nothing finite comes
    out; and weight may be left out.

    Args:
        weight: how much of each model goes in.

    >>> import numpy as np
    >>> one, other = np.float32([1, 2, 3, 4]), np.float32([5, 2, -1, 0])
    >>> linear([one, other], weight=[3, 1])
    array([2., 2., 2., 3.], dtype=float32)
    >>> linear([one, other], weight=[3, 1], normalize=False)
    array([ 8.,  8.,  8., 12.], dtype=float32)
    """
    weights = per_model(weight, len(tensors))
    _check(weights, normalize)
    total = math.fsum(weights) if normalize else 1.0
    return weighted_sum(tensors, [number / total for number in weights])


# ---- passthrough ----------------------------------------------------------------------------------------------------


@merge_method(
    "passthrough",
    title="Passthrough",
    formula=r"\theta = \text{scale} \cdot \theta_1",
    models=(1, 1),
    laws=("zero", "idempotent", "scale"),
)
def passthrough(tensors: Tensors, scale: PerModel = 1.0) -> Array:
    """One model's tensor, unchanged or times a number.

    The result is scale · θ. It is what slices use to stack layers; a scale of 0 on a layer's output projections makes
    that layer an identity.

    Args:
        scale: what the tensor is multiplied by.

    >>> import numpy as np
    >>> passthrough([np.float32([1, -2, 3, 0.5])], scale=2)
    array([ 2., -4.,  6.,  1.], dtype=float32)
    """
    (tensor,) = tensors
    (factor,) = per_model(scale, 1)
    return multiple(tensor, factor)


# ---- model stock ----------------------------------------------------------------------------------------------------


_MODEL_STOCK_PAPER = Paper(
    "Dong-Hwan Jang, Sangdoo Yun, Dongyoon Han",
    2024,
    "Model Stock: All we need is just a few fine-tuned models",
    "https://arxiv.org/abs/2403.19522",
)


def measure_model_stock(blocks: Blocks, filter_wise: bool = False) -> float | None:
    """How far the whole tensor goes from the base to the mean; nothing is read where each row has its own."""
    return None if filter_wise else float(_ratios(whole_dots(blocks))[0])


@merge_method(
    "model_stock",
    title="Model Stock",
    formula=(
        r"\theta = \theta_0 + t \cdot \tfrac1N \sum_i \tau_i,"
        r" \quad t = \frac{N \cos\vartheta}{1 + (N - 1) \cos\vartheta},"
        r" \quad \cos\vartheta = \tfrac{2}{N (N - 1)} \sum_{i \lt j} \frac{\tau_i \cdot \tau_j}"
        r"{\lVert \tau_i \rVert \lVert \tau_j \rVert}"
    ),
    paper=_MODEL_STOCK_PAPER,
    models=(2, None),
    unit="rows",
    measure=measure_model_stock,
    searches=False,
    laws=("zero", "idempotent", "permutation", "scale"),
)
def model_stock(deltas: Deltas, filter_wise: bool = False, *, measured: float | None = None) -> Array:
    """The mean of the fine-tunes, drawn towards the base the more they point in different directions.

    With τᵢ = θᵢ − θ₀, N of them, and cos the mean of τᵢ·τⱼ / (‖τᵢ‖ ‖τⱼ‖) over all pairs, the result is
    θ₀ + t · mean(τᵢ), t = N cos / (1 + (N−1) cos): one cos for the whole tensor, or with filter_wise one for each row
    (along the last dimension). A pair with a zero delta counts with cosine 0. The mean over pairs is mergekit's, for
    more than two models; the paper takes all angles as equal.

    Departs from mergekit: a negative cos counts as 0, which gives the base, where there t is negative, and
    huge as cos nears −1 / (N−1); norms have no floor, where there a product of norms below 1e-6 counts as
    1e-6, which draws small deltas to the base. Cosines are float64.

    Args:
        filter_wise: a cosine for each row, not one for the whole tensor.

    >>> import numpy as np
    >>> one, other = np.float32([3, 4, 0, 0]), np.float32([3, 0, 4, 0])
    >>> model_stock([one, other]).round(4)
    array([1.5882, 1.0588, 1.0588, 0.    ], dtype=float32)
    """
    rows = [as_rows(delta) for delta in deltas]
    total = weighted_sum(deltas, [1.0] * len(rows))
    if filter_wise:
        return scale_lines(total, _ratios(row_dots(rows)) / len(rows), by_row=True)
    found = measure_model_stock([rows]) if measured is None else measured
    assert found is not None
    return multiple(total, found / len(rows))


def _ratios(dots: NDArray[np.float64]) -> NDArray[np.float64]:
    import numpy as np

    table = square(list(dots))
    models = len(table)
    norms = [np.sqrt(row[place]) for place, row in enumerate(table)]
    cosine = np.zeros(dots.shape[1])
    for one, other in combinations(range(models), 2):
        product = norms[one] * norms[other]
        cosine += np.divide(table[one][other], product, out=np.zeros_like(product), where=product > 0)
    mean = np.clip(cosine / (models * (models - 1) / 2), 0, 1)
    return models * mean / (1 + (models - 1) * mean)


# ---- by what was measured -------------------------------------------------------------------------------------------


_FISHER_PAPER = Paper(
    "Michael Matena, Colin Raffel",
    2021,
    "Merging Models with Fisher-Weighted Averaging",
    "https://arxiv.org/abs/2111.09832",
)
_REGMEAN_PAPER = Paper(
    "Xisen Jin, Xiang Ren, Daniel Preotiuc-Pietro, Pengxiang Cheng",
    2022,
    "Dataless Knowledge Fusion by Merging Weights of Language Models",
    "https://arxiv.org/abs/2212.09849",
)


def _check_shares(weight: Sequence[float]) -> None:
    if not any(weight):
        raise ValueError("the weights are all 0, and their sum is divided by")


def _mean_and_rest(tensors: Sequence[Array], weights: Sequence[float]) -> tuple[Array, list[Array]]:
    """The weighted mean, and what each model is beside it."""
    total = math.fsum(weights)
    mean = weighted_sum(tensors, [number / total for number in weights])
    return mean, [weighted_sum([tensor, mean], [1.0, -1.0]) for tensor in tensors]


@merge_method(
    "fisher",
    title="Fisher",
    formula=r"\theta = \frac{\sum_i w_i F_i \theta_i}{\sum_i w_i F_i}",
    paper=_FISHER_PAPER,
    models=(1, None),
    check=_check_shares,
    statistics="fisher",
    laws=("zero", "idempotent", "permutation", "scale"),
)
def fisher(tensors: Tensors, weight: Annotated[PerModel, Range(0)] = 1.0, *, statistics: Sequence[Array] = ()) -> Array:
    """The average of the models' tensors, each entry by how much the model's likelihood depends on it.

    With Fᵢ the diagonal of model i's Fisher information, which merger measure --kind fisher makes, and products entry
    by entry, the result is Σ wᵢ Fᵢ θᵢ / Σ wᵢ Fᵢ; where no model's likelihood depends on an entry, the weighted mean.

    Follows the paper's equation of Fisher-weighted averaging. Departs from the released code: there is no floor under
    Fᵢ, which would draw entries of small Fᵢ to the mean, and the models' Fᵢ are not brought to one norm.

    Args:
        weight: how much of each model goes in.

    >>> import numpy as np
    >>> one, other = np.float32([1, 1, 1]), np.float32([3, 3, 3])
    >>> fisher([one, other], statistics=[np.float32([3, 1, 0]), np.float32([1, 1, 0])])
    array([1.5, 2. , 2. ], dtype=float32)
    """
    weights = per_model(weight, len(tensors))
    _check_shares(weights)
    mean, rest = _mean_and_rest(tensors, weights)
    if not len(statistics):
        return mean
    total, shares = zeros(mean), zeros(mean)
    for number, own, importance in zip(weights, rest, statistics, strict=True):
        multiply(own, importance)
        add_scaled(total, own, number)
        add_scaled(shares, importance, number)
    add_scaled(mean, quotient(total, shares), 1.0)
    return mean


@merge_method(
    "regmean",
    title="RegMean",
    formula=(
        r"W = \left(\sum_i w_i W_i \hat G_i\right) \left(\sum_i w_i \hat G_i\right)^{-1},"
        r"\quad \hat G_i = \alpha G_i + (1 - \alpha) \operatorname{diag} G_i, \quad G_i = X_i^\top X_i"
    ),
    paper=_REGMEAN_PAPER,
    models=(1, None),
    unit="matrix",
    workspace=8,
    check=_check_shares,
    statistics="gram",
    laws=("zero", "idempotent", "permutation", "scale"),
)
def regmean(
    tensors: Tensors,
    weight: Annotated[PerModel, Range(0)] = 1.0,
    alpha: Annotated[float, Range(0, 1)] = 0.9,
    *,
    statistics: Sequence[Array] = (),
) -> Array:
    """Of linear layers the matrix whose outputs are nearest to those of all models, each on its own inputs.

    With Wᵢ of shape (outputs, inputs) and Gᵢ = XᵢᵀXᵢ of the layer's inputs in model i, in the mean over tokens, which
    merger measure --kind gram makes: Ĝᵢ = α Gᵢ + (1 − α) diag Gᵢ, and the result is (Σ wᵢ Wᵢ Ĝᵢ)(Σ wᵢ Ĝᵢ)⁻¹, by
    Cholesky's decomposition in float64. Inputs that no model has are averaged, and so is all that is no linear layer.

    Follows the paper's algorithm; α is 0.9 as there for all but T5, which takes 0.1. At α = 1 the matrices may be
    singular, as they are of fewer tokens than inputs; that is refused. With merged: true where the Gᵢ are measured, the
    layers before are the merge's own: that is RegMean++ (Nguyen et al., arXiv 2508.03121).

    Args:
        weight: how much of each model goes in.
        alpha: what is left of the products of different inputs; at 0 each input counts by itself.

    >>> import numpy as np
    >>> one, other = np.float32([[1, 0]]), np.float32([[3, 2]])
    >>> grams = np.float32([[3, 0], [0, 1]]), np.float32([[1, 0], [0, 1]])
    >>> regmean([one, other], statistics=grams)
    array([[1.5, 1. ]], dtype=float32)
    """
    weights = per_model(weight, len(tensors))
    _check_shares(weights)
    mean, rest = _mean_and_rest(tensors, weights)
    if not len(statistics) or not is_matrix(mean, True):
        return mean
    made = to_float32(right_divide(rest, statistics, weights, alpha))
    add_scaled(made.reshape(-1), mean.reshape(-1), 1.0)
    return made
