"""Methods that weigh entries: PCB by how each competes, Arcee Fusion by its importance, AIM by what it is fed.

Not here: the search of the top entries (steps.select), and the evolutionary search for coefficients that PCB's paper
adds for those who have data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, Annotated, Any

from merger.methods.registry import Deltas, Paper, PerModel, Range, Tensors, full, merge_method
from merger.methods.steps.arithmetic import (
    Blocks,
    Mapped,
    add_scaled,
    array,
    entry_count,
    magnitude_sum,
    multiple,
    multiply,
    per_model,
    quotient,
    scale_lines,
    square,
    weighted_sum,
)
from merger.methods.steps.rows import as_rows, row_chunks
from merger.methods.steps.step import ONE, ZERO, Array, new, step, zeros
from merger.methods.steps.votes import trim
from merger.methods.task_vectors import task_arithmetic

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PAPER = Paper(
    "Guodong Du, Junlin Lee, Jing Li, Runhua Jiang, Yifei Guo, Shuyang Yu, Hanting Liu, "
    "Sim Kuan Goh, Ho-Kin Tang, Daojing He, Min Zhang",
    2024,
    "Parameter Competition Balancing for Model Merging",
    "https://arxiv.org/abs/2410.02396",
)

_TERMS = 11  # of e's series for 0 to 1: the next is 1/12!, a fiftieth of float32's last bit

Pair = tuple[int, int]


@dataclass(frozen=True)
class ProductRange:
    """The least product of a pair of deltas over the whole tensor, and 1 over the way to the largest (0: no way)."""

    least: float
    inverse: float

    def exp(self, one: Array, other: Array) -> Array:
        """e to the pair's products, scaled to 0 to 1: by sums and products, for a library's exp is its machine's."""
        exp_products(one, other, _series(), self.least, self.inverse, out := new(one))
        return out


@cache
def _series() -> Array:
    """The coefficients of e's series, the last one first."""
    import numpy as np

    return np.array([1 / math.factorial(term) for term in reversed(range(_TERMS + 1))], np.float32)


@step("void(float32[::1], float32[::1], float32[::1], float32, float32, float32[::1])")
def exp_products(x: Array, y: Array, series: Array, least: float, factor: float, out: Array) -> None:
    """The products, less a number, times a number, in a series of 12 terms."""
    for i in range(out.size):
        power = (x[i] * y[i] - least) * factor
        total = series[0]
        for term in range(1, 12):
            total = total * power + series[term]
        out[i] = total


@exp_products.torch
def _(x: Any, y: Any, series: Array, least: float, factor: float, out: Any) -> None:
    power = x.mul(y).sub_(least).mul_(factor)
    out.fill_(float(series[0]))
    for coefficient in series[1:].tolist():
        out.mul_(power).add_(coefficient)


@dataclass(frozen=True)
class Balance:
    """What the scores need from the whole tensor: the pairs' spans, the softmaxes' means, the models' thresholds."""

    spans: Mapping[Pair, ProductRange]
    intra: tuple[float, ...]
    inter: tuple[float, ...]
    thresholds: tuple[float, ...] = ()

    def scores(self, _: int, block: Sequence[Array]) -> list[Array]:
        """Of each model the intra-balancing times the inter-balancing, times the square of the number of entries."""
        exps = square([span.exp(block[one], block[other]) for (one, other), span in self.spans.items()])
        shares = square([1 / mean for mean in self.inter])
        return [self._score(exps[model], shares[model], model) for model in range(len(block))]

    def _score(self, exps: Sequence[Array], shares: Sequence[float], model: int) -> Array:
        total = weighted_sum(exps, shares)
        multiply(total, multiple(_power(exps[model], len(exps)), 1 / self.intra[model]))
        return total


def _power(base: Array, exponent: int) -> Array:
    total = multiple(base, 1.0)
    for _ in range(exponent - 1):
        multiply(total, base)
    return total


def measure_pcb(blocks: Blocks, density: Sequence[float]) -> Balance:
    """The spans, then the softmaxes' means, then each model's threshold: three passes or more."""
    from merger.methods.steps.select import kth_magnitudes

    spans = _spans(blocks, len(density))
    balance = Balance(spans, *_means(blocks, spans, len(density)))
    thresholds = kth_magnitudes(Mapped(blocks, balance.scores, entrywise=True), density)
    return Balance(balance.spans, balance.intra, balance.inter, thresholds)


def _spans(blocks: Blocks, models: int) -> Mapping[Pair, ProductRange]:
    bounds = dict.fromkeys(combinations_with_replacement(range(models), 2), (math.inf, -math.inf))
    for block in blocks:
        for (one, other), (least, most) in bounds.items():
            multiply(products := multiple(block[one], 1.0), block[other])
            bounds[one, other] = min(least, float(products.min())), max(most, float(products.max()))
    return {
        pair: ProductRange(least, 1 / (most - least) if most > least else 0.0) for pair, (least, most) in bounds.items()
    }


def _means(
    blocks: Blocks, spans: Mapping[Pair, ProductRange], models: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The means of e^(N norm) for each model, and of e^norm for each pair."""
    intra: list[list[float]] = [[] for _ in range(models)]
    inter: dict[Pair, list[float]] = {pair: [] for pair in spans}
    entries = 0
    for block in blocks:
        entries += entry_count(block[0])
        for (one, other), span in spans.items():
            exp = span.exp(block[one], block[other])
            inter[one, other].append(magnitude_sum(exp))
            if one == other:
                intra[one].append(magnitude_sum(_power(exp, models)))
    return (
        tuple(math.fsum(sums) / entries for sums in intra),
        tuple(math.fsum(sums) / entries for sums in inter.values()),
    )


@merge_method(
    "pcb",
    title="PCB",
    formula=(
        r"\theta = \theta_0 + \lambda \frac{\sum_i \hat s_i w_i \tau_i}{\sum_i \hat s_i},"
        r"\quad s_i = \operatorname{softmax}(N \operatorname{norm} \tau_i^2) \sum_j"
        r" \operatorname{softmax}(\operatorname{norm} \tau_i \tau_j)"
    ),
    paper=_PAPER,
    models=(1, None),
    measure=measure_pcb,
    workspace=96,
    laws=("zero", "permutation", "scale"),
)
def pcb(
    deltas: Deltas,
    weight: PerModel = 1.0,
    density: Annotated[PerModel, Range(0, 1)] = 0.1,
    lambda_: float = 1.0,
    *,
    measured: Balance | None = None,
) -> Array:
    """The mean of the task vectors, each entry weighed by how it stands in its task and among the tasks.

    With τᵢ = θᵢ − θ₀, N models, and softmax and norm over a tensor's entries, norm(x) = (x − min) / (max − min):
    intra-balancing βᵢ = softmax(N norm(τᵢ τᵢ)), inter-balancing βᵢ' = Σⱼ softmax(norm(τᵢ τⱼ)), score sᵢ = βᵢ βᵢ'. In
    each task vector the density of entries of largest score stays, at least one; ŝᵢ is 0 elsewhere. The result is
    θ₀ + λ Σ ŝᵢ wᵢ τᵢ / Σ ŝᵢ, the products entry by entry; θ₀ where no model's entry stays. The wᵢ are the paper's
    λᵢ: they are in the sum, not in the scores.

    Follows the paper's equations of the two balancings, the mask and the mean; density is its r, 0.1 as there. It does
    not spell out norm: that is the released code's. For the rest that code departs from the paper
    (e^(N norm(|τ|)²) tanh(τᵢ Στ) for the score, its threshold subtracted, outliers clamped) and is not followed; nor
    is the search for the λᵢ, which needs data. Departs from both: scores are those of a tensor, not of the model as one
    vector; entries equal to the threshold stay together; where all products are equal norm is 0, not 0/0. Products are
    float32's, so task vectors below 1e-19 count as zero.

    Args:
        weight: what each task vector is multiplied by in the mean.
        density: share of entries kept in each task vector, by score.

    >>> import numpy as np
    >>> one, other = np.float32([4, 1, 2, 0.5]), np.float32([2, 1, -5, 0.1])
    >>> pcb([one, other], density=0.5).round(4)
    array([ 3.7667,  0.    , -4.2267,  0.    ], dtype=float32)
    """
    weights, densities = per_model(weight, len(deltas)), per_model(density, len(deltas))
    balance = measured or measure_pcb([deltas], densities)
    total, scores = zeros(deltas[0]), zeros(deltas[0])
    found = balance.scores(0, deltas)
    for delta, number, score, threshold in zip(deltas, weights, found, balance.thresholds, strict=True):
        kept = trim(score, threshold)
        add_scaled(scores, kept, 1.0)
        multiply(term := multiple(delta, number), kept)
        add_scaled(total, term, 1.0)
    return quotient(total, scores, lambda_)


# ---- arcee fusion ---------------------------------------------------------------------------------------------------


_EPS = 1e-8


@dataclass(frozen=True)
class Outliers:
    """From which importance on an entry is taken, and the divergence of each row of the whole tensor."""

    threshold: float
    divergences: NDArray[np.float32] = field(repr=False)


def measure_arcee_fusion(blocks: Blocks) -> Outliers:
    """The threshold of the whole tensor's importances, and what costs more than all the rest."""
    import numpy as np

    from merger.methods.steps.select import quartiles

    divergences: list[NDArray[np.float32]] = []

    def importances(place: int, block: Sequence[Array]) -> list[Array]:
        if place == len(divergences):
            divergences.append(_divergence(block))
        return [_importance(block[0], block[1], divergences[place])]

    low, median, high = quartiles(Mapped(blocks, importances))
    return Outliers(float(np.float32(median + 1.5 * (high - low))), np.concatenate(divergences))


@merge_method(
    "arcee_fusion",
    title="Arcee Fusion",
    formula=(
        r"\theta = b \text{ where } d \ge Q_2 + \tfrac32 (Q_3 - Q_1), \text{ else } a,"
        r"\quad d = \lvert b - a \rvert \cdot \operatorname{KL}(\operatorname{softmax} b \parallel"
        r" \operatorname{softmax} a)"
    ),
    models=(2, 2),
    base="first",
    unit="rows",
    measure=measure_arcee_fusion,
    workspace=192,  # three searches at once, for two inputs
    laws=("zero", "idempotent"),
)
def arcee_fusion(tensors: Tensors, *, start: int = 0, measured: Outliers | None = None) -> Array:
    """The base, with the other model's entries where they differ most, in rows that differ most.

    The importance of an entry is |b − a| · KL(p ‖ q), with a the base's tensor, b the other's, p and q the softmax of
    its row (along the last dimension) of b and of a, 1e-8 added to each of their entries. Where the importance reaches
    median + 1.5 (Q₃ − Q₁) of the importances of the whole tensor, the entry is b's, else a's. Quartiles are entries of
    the tensor, the lower one of two. There is no paper.

    Departs from mergekit: the quartiles are those of all entries, where there those of a tensor of more than a
    million are estimated from a random sample; softmax and KL are float64, for in float32 the KL of two rows that are
    close is mostly rounding, and a negative one counts as 0.

    >>> import numpy as np
    >>> a, b = np.float32([1, 2, 3, 4]), np.float32([1.1, 1.9, 3, 6])
    >>> arcee_fusion([a, b])
    array([1., 2., 3., 6.], dtype=float32)
    """
    base, other = (as_rows(tensor) for tensor in tensors)
    found = measured or measure_arcee_fusion([[base, other]])
    row = start // max(1, base.shape[1])
    importance = _importance(base, other, found.divergences[row : row + len(base)])
    take_important(base, other, importance, found.threshold, out := new(tensors[0]))
    return out


@step("void(float32[::1], float32[::1], float32[::1])")
def measure_distance(x: Array, y: Array, out: Array) -> None:
    """The magnitude of each difference."""
    for i in range(out.size):
        out[i] = abs(y[i] - x[i])


def _importance(base: Array, other: Array, divergence: NDArray[np.float32]) -> Array:
    """The magnitude of each difference, times its row's divergence."""
    measure_distance(base, other, distance := new(base))
    return scale_lines(distance, divergence, by_row=True)


@step("void(float32[::1], float32[::1], float32[::1], float32, float32[::1])")
def take_important(base: Array, other: Array, importance: Array, least: float, out: Array) -> None:
    """The other's entry where the importance is `least` or more, else the base's."""
    for i in range(out.size):
        out[i] = (other[i] - base[i]) * (ONE if importance[i] >= least else ZERO) + base[i]


def _divergence(block: Sequence[Array]) -> NDArray[np.float32]:
    """KL(p ‖ q) of each row.

    Another machine's exponential may differ in the last bit of float64. That is the only place here where one could
    tell, and only in an entry whose importance lies within some 1e-8 of the threshold.
    """
    import numpy as np

    sums = []
    for base, other in row_chunks(block):
        p, q = _softmax(other), _softmax(base)
        ratio = np.log(np.divide(p, q, out=q), out=q)
        sums.append(np.add.reduce(np.multiply(p, ratio, out=p), axis=1))
    divergences: NDArray[np.float32] = np.maximum(np.concatenate(sums), 0).astype(np.float32)
    return divergences


def _softmax(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each row, in its place, with 1e-8 added."""
    import numpy as np

    rows -= np.max(rows, axis=1, keepdims=True)
    np.exp(rows, out=rows)
    rows /= np.add.reduce(rows, axis=1, keepdims=True)
    rows += _EPS
    return rows


# ---- aim ------------------------------------------------------------------------------------------------------------


_AIM_PAPER = Paper(
    "Amin Heyrani Nobari, Kaveh Alim, Ali ArjomandBigdeli, Akash Srivastava, Faez Ahmed, Navid Azizan",
    2025,
    "Activation-Informed Merging of Large Language Models",
    "https://arxiv.org/abs/2502.02421",
)


@merge_method(
    "aim",
    title="AIM",
    formula=(
        r"W = W_0 + \lambda \left(\sum_i w_i (W_i - W_0)\right) \left(I - (1 - \omega) \operatorname{diag} s\right),"
        r"\quad s = \frac{a}{\max a}, \quad a = \operatorname{mean} \lvert x_0 \rvert"
    ),
    paper=_AIM_PAPER,
    models=(1, None),
    unit="rows",
    workspace=3,
    statistics="activations",
    of_base=True,
    laws=("zero", "permutation", "scale", full("task_arithmetic", omega=1)),
)
def aim(
    deltas: Deltas,
    weight: PerModel = 1.0,
    normalize: bool = False,
    lambda_: float = 1.0,
    omega: Annotated[float, Range(0, 1)] = 0.4,
    *,
    statistics: Sequence[Array] = (),
) -> Array:
    """Task arithmetic that changes weights less, the larger the inputs are that the base model feeds them.

    With a the mean magnitudes of a linear layer's inputs in the base model, which merger measure --kind activations
    makes, s = a / max a, and Δ the result of task arithmetic: column j of Δ is multiplied by 1 − sⱼ (1 − ω). What is no
    linear layer is task arithmetic's.

    It keeps what the base model can do, and goes on top of any merge: a stage that merges by another method, then aim
    with that one model and weight 1. The paper takes texts of no task for the base, and ω of 0.2 to 0.6.

    Follows the released code, with ω 0.4 as there. Departs from it: it scales norms by their inputs, too, which are not
    measured here; its task vectors have a weight of 0.2, and where nothing but zeros comes in it divides by zero.

    Args:
        omega: what is left of the change where the base model's input is the largest; at 1 all of it.

    >>> import numpy as np
    >>> aim([np.float32([[4, 4, 4]])], omega=0.5, statistics=[np.float32([2, 1, 0])])
    array([[2., 3., 4.]], dtype=float32)
    """
    total = task_arithmetic(deltas, weight, normalize, lambda_)
    if not len(statistics):
        return total
    (magnitudes,) = (array(each).astype("float64") for each in statistics)
    return scale_lines(total, 1 - magnitudes * ((1 - omega) / (magnitudes.max() or 1)), by_row=False)
