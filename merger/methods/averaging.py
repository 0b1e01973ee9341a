"""Means of the models: linear, Model Stock, and passthrough, the mean of one. Not here: task vectors (task_vectors)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from merger.methods.registry import Deltas, Paper, PerModel, Tensors, merge_method
from merger.methods.steps.arithmetic import (
    Blocks,
    multiple,
    per_model,
    refuse_zero_sum,
    scale_lines,
    square,
    weighted_sum,
)
from merger.methods.steps.rows import as_rows, row_dots, whole_dots
from merger.methods.steps.step import Array

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
