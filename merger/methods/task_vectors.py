"""Task vectors added to the base: task arithmetic, by norms too, TIES, MagMax, EMR's unified vector, and ExPO.

Not here: dropping entries first (sparsify), and masks over tasks (consensus).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from merger.methods.registry import Deltas, Paper, PerModel, Range, Tensors, full, merge_method
from merger.methods.steps.arithmetic import Blocks, divisor, l1_factors, per_model, squared_norms, weighted_sum
from merger.methods.steps.step import Array
from merger.methods.steps.votes import choice, elect_and_merge, extremes, trim

_PAPER = Paper(
    "Gabriel Ilharco, Marco Tulio Ribeiro, Mitchell Wortsman, Suchin Gururangan, Ludwig Schmidt, "
    "Hannaneh Hajishirzi, Ali Farhadi",
    2023,
    "Editing models with task arithmetic",
    "https://arxiv.org/abs/2212.04089",
)


@merge_method(
    "task_arithmetic",
    title="Task Arithmetic",
    formula=r"\theta = \theta_0 + \lambda \sum_i w_i (\theta_i - \theta_0)",
    paper=_PAPER,
    models=(1, None),
    laws=("zero", "permutation", "scale"),
)
def task_arithmetic(deltas: Deltas, weight: PerModel = 1.0, normalize: bool = False, lambda_: float = 1.0) -> Array:
    """The base plus a weighted sum of the models' task vectors.

    With τᵢ = θᵢ − θ₀ the result is θ₀ + λ Σ wᵢ τᵢ, the sum divided by Σ wᵢ if normalize. A negative weight takes a task
    away. Weights that sum to zero leave the sum undivided, as in mergekit.

    Departs from mergekit: weight may be left out; density and rescale, which it reads and does not use, are no
    parameters.


    >>> import numpy as np
    >>> one, other = np.float32([1, 0, -2, 4]), np.float32([3, 1, 2, 0])
    >>> task_arithmetic([one, other], weight=[1, 0.5], lambda_=2)
    array([ 5.,  1., -2.,  8.], dtype=float32)
    """
    weights = per_model(weight, len(deltas))
    share = lambda_ / divisor(weights, normalize)
    return weighted_sum(deltas, [number * share for number in weights])


# ---- by norms -------------------------------------------------------------------------------------------------------


_METAGPT_PAPER = Paper(
    "Yuyan Zhou, Liang Song, Bingning Wang, Weipeng Chen",
    2024,
    "MetaGPT: Merging Large Language Models Using Model Exclusive Task Arithmetic",
    "https://arxiv.org/abs/2406.11385",
)
_NAN_PAPER = Paper(
    "Chongjie Si, Kangtao Lv, Jingjing Jiang, Yadao Wang, Yongwei Wang, Xiaokang Yang, Wenbo Su, Bo Zheng, Wei Shen",
    2025,
    "NAN: A Training-Free Solution to Coefficient Estimation in Model Merging",
    "https://arxiv.org/abs/2505.16148",
)


@merge_method(
    "metagpt",
    title="MetaGPT",
    formula=(
        r"\theta = \theta_0 + \lambda \sum_i \frac{\lVert \tau_i \rVert^2}{\sum_k \lVert \tau_k \rVert^2} \tau_i,"
        r"\quad \tau_i = \theta_i - \theta_0"
    ),
    paper=_METAGPT_PAPER,
    models=(1, None),
    measure=squared_norms,
    searches=False,
    laws=("zero", "idempotent", "permutation", "scale"),
)
def metagpt(deltas: Deltas, lambda_: float = 1.0, *, measured: Sequence[float] | None = None) -> Array:
    """Task arithmetic whose weights are the shares of the task vectors in the sum of their squared norms.

    With τᵢ = θᵢ − θ₀ the result is θ₀ + λ Σ cᵢ τᵢ, cᵢ = ‖τᵢ‖² / Σ ‖τₖ‖². Where the loss is near to linear around θ₀ and
    the task vectors are orthogonal, these weights lose least against the models by themselves, so nothing is left to
    search for.

    Follows the paper. Departs: the norms are those of each tensor, where there those of the whole model; λ is not in
    the paper.

    >>> import numpy as np
    >>> one, other = np.float32([1, 1, 1, 0]), np.float32([0, 0, 0, 1])
    >>> metagpt([one, other])
    array([0.75, 0.75, 0.75, 0.25], dtype=float32)
    """
    squares = squared_norms([deltas]) if measured is None else measured
    total = math.fsum(squares) or 1.0
    return weighted_sum(deltas, [lambda_ * own / total for own in squares])


@merge_method(
    "nan",
    title="NAN",
    formula=(
        r"\theta = \theta_0 + \lambda \frac N2 \sum_i \frac{\lVert \theta_i \rVert^{-1}}"
        r"{\sum_k \lVert \theta_k \rVert^{-1}} (\theta_i - \theta_0)"
    ),
    paper=_NAN_PAPER,
    base="first",
    models=(2, None),
    measure=squared_norms,
    searches=False,
    laws=("zero", "scale"),
)
def nan(tensors: Tensors, lambda_: float = 1.0, *, measured: Sequence[float] | None = None) -> Array:
    """Task arithmetic whose weights fall with the norms of the models' tensors.

    With N models beside the base θ₀ the result is θ₀ + λ Σ cᵢ (θᵢ − θ₀), cᵢ = N/2 · ‖θᵢ‖⁻¹ / Σ ‖θₖ‖⁻¹. At λ = 2/N the
    weights sum to 1. Fine-tunes of one base hardly differ in norm: then it is task arithmetic with weights of nearly
    1/2, which of many models is too much.

    Follows the paper (weights by the inverse of the parameters' norm), the factor N/2 as a public reproduction has it;
    no code of the authors is known. Departs: the norms are those of each tensor, where there those of the whole model;
    where one of them is 0 all models count alike; λ is the strategies' own there.

    >>> import numpy as np
    >>> base, one, other = np.float32([0, 0]), np.float32([3, 0]), np.float32([0, 1])
    >>> nan([base, one, other])
    array([0.75, 0.75], dtype=float32)
    """
    squares = squared_norms([tensors]) if measured is None else measured
    own = squares[1:] if all(squares[1:]) else [1.0] * (len(squares) - 1)
    inverses = [1 / math.sqrt(each) for each in own]
    share = lambda_ * len(own) / 2 / math.fsum(inverses)
    return weighted_sum(tensors, [1 - lambda_ * len(own) / 2, *(share * each for each in inverses)])


# ---- ties -----------------------------------------------------------------------------------------------------------


_TIES_PAPER = Paper(
    "Prateek Yadav, Derek Tam, Leshem Choshen, Colin Raffel, Mohit Bansal",
    2023,
    "TIES-Merging: Resolving Interference When Merging Models",
    "https://arxiv.org/abs/2306.01708",
)


@dataclass(frozen=True)
class Trim:
    """For each model the magnitude below which an entry goes, and the factor for what stays."""

    thresholds: tuple[float, ...]
    factors: tuple[float, ...]


def measure_ties(blocks: Blocks, density: Sequence[float], rescale: bool = False) -> Trim:
    """The threshold of each whole tensor: the magnitude of the k-th largest entry, exactly."""
    from merger.methods.steps.select import kth_magnitudes

    thresholds = kth_magnitudes(blocks, density)
    if not rescale:
        return Trim(thresholds, (1.0,) * len(thresholds))
    return Trim(thresholds, l1_factors(blocks, density, lambda model, delta, _: trim(delta, thresholds[model])))


@merge_method(
    "ties",
    title="TIES",
    formula=(
        r"\theta = \theta_0 + \lambda \frac{\sum_{i \in A} w_i \hat\tau_i}{\sum_{i \in A} w_i},"
        r"\quad A = \lbrace i : \operatorname{sgn} w_i \hat\tau_i = \operatorname{sgn} \textstyle\sum_j"
        r" w_j \hat\tau_j \rbrace"
    ),
    paper=_TIES_PAPER,
    models=(1, None),
    measure=measure_ties,
    laws=("zero", "idempotent", "permutation", "scale"),
)
def ties(
    deltas: Deltas,
    weight: PerModel = 1.0,
    density: Annotated[PerModel, Range(0, 1)] = 1.0,
    normalize: bool = True,
    lambda_: float = 1.0,
    rescale: bool = False,
    *,
    measured: Trim | None = None,
) -> Array:
    """The largest entries of each task vector, merged where they agree on a sign.

    Trim: of each τᵢ = θᵢ − θ₀ the k = int(density · N) entries of largest magnitude stay, at least one; τ̂ᵢ.
    Elect: s = + where Σ wᵢ τ̂ᵢ ≥ 0, else −.
    Merge: Δ = Σ wᵢ τ̂ᵢ over the i whose wᵢ τ̂ᵢ has sign s, divided if normalize by Σ wᵢ over the same i (1 where that is
    zero). The result is θ₀ + λ Δ. Follows mergekit in weighting the votes and the mean; the paper has no weights.

    Departs from mergekit: entries equal to the threshold stand together (a sort keeps some of them, by chance); the
    rescaling is left out only where less than 1e-7 of the delta's norm is left, not for every small delta; with weights
    of both signs, a divisor that is zero but for rounding counts as zero. All in float32, whatever the dtype. Until
    mergekit 0.1.4 density 0 ends in an error there, and so does a tensor of fewer than 1 / density entries.

    Args:
        weight: how much each task vector counts, in the vote and in the mean.
        normalize: divide by the sum of the weights of the models that agree.
        rescale: multiply each trimmed task vector so that its L1 norm is that of the whole one.

    >>> import numpy as np
    >>> one, other = np.float32([4, -1, 2, 0.5]), np.float32([2, 3, -5, 0.1])
    >>> ties([one, other])
    array([ 3. ,  3. , -5. ,  0.3], dtype=float32)
    >>> ties([one, other], density=0.5)
    array([ 4.,  3., -5.,  0.], dtype=float32)
    """
    weights, densities = per_model(weight, len(deltas)), per_model(density, len(deltas))
    found = measured or measure_ties([deltas], densities, rescale)

    def keep(model: int, factor: float) -> Array:
        return trim(deltas[model], found.thresholds[model], factor)

    return elect_and_merge(keep, weights, found.factors, normalize, lambda_)


# ---- magmax ---------------------------------------------------------------------------------------------------------


_MAGMAX_PAPER = Paper(
    "Daniel Marczak, Bartłomiej Twardowski, Tomasz Trzciński, Sebastian Cygert",
    2024,
    "MagMax: Leveraging Model Merging for Seamless Continual Learning",
    "https://arxiv.org/abs/2407.06322",
)


@merge_method(
    "magmax",
    title="MagMax",
    formula=(
        r"\theta = \theta_0 + \lambda \tau_k, \quad k = \arg\max_i \lvert \tau_i \rvert,"
        r"\quad \tau_i = w_i (\theta_i - \theta_0)"
    ),
    paper=_MAGMAX_PAPER,
    models=(1, None),
    workspace=5,
    laws=("zero", "idempotent", "permutation", "scale"),
)
def magmax(deltas: Deltas, weight: PerModel = 1.0, lambda_: float = 1.0) -> Array:
    """At every entry the one task vector that moved it most.

    With τᵢ = wᵢ (θᵢ − θ₀) the result is θ₀ + λ τₖ, where k at each entry is the model of largest |τᵢ|. The paper trains
    the models one after the other, each from the last, and chooses λ on validation data; neither is needed here. Its
    released code takes λ = 0.5.

    Departs from the released code: of two opposite entries of the same magnitude the positive one stays, whatever the
    order of the models, where there the last model's does; weights are not in the paper.

    Args:
        weight: what each task vector is multiplied by, before magnitudes are compared.

    >>> import numpy as np
    >>> one, other = np.float32([4, -1, 2, 0.5]), np.float32([2, 3, -5, -0.1])
    >>> magmax([one, other])
    array([ 4. ,  3. , -5. ,  0.5], dtype=float32)
    """
    above, below = extremes(deltas, per_model(weight, len(deltas)))
    return choice(above, below, weighted_sum([above, below], [1.0, 1.0]), lambda_)


# ---- emr ------------------------------------------------------------------------------------------------------------


_EMR_PAPER = Paper(
    "Chenyu Huang, Peng Ye, Tao Chen, Tong He, Xiangyu Yue, Wanli Ouyang",
    2024,
    "EMR-Merging: Tuning-Free High-Performance Model Merging",
    "https://arxiv.org/abs/2405.17461",
)


@merge_method(
    "emr",
    title="EMR (unified)",
    formula=(
        r"\theta = \theta_0 + \lambda \gamma \max_{i : \operatorname{sgn} \tau_i = \gamma} \lvert \tau_i"
        r" \rvert,"
        r"\quad \gamma = \operatorname{sgn} \textstyle\sum_i \tau_i, \quad \tau_i = w_i (\theta_i - \theta_0)"
    ),
    paper=_EMR_PAPER,
    models=(1, None),
    workspace=6,
    laws=("zero", "idempotent", "permutation", "scale"),
)
def emr(deltas: Deltas, weight: PerModel = 1.0, lambda_: float = 1.0) -> Array:
    """The largest entry among the task vectors that have the elected sign.

    With τᵢ = wᵢ (θᵢ − θ₀): γ = the sign of Σ τᵢ; ε = the largest |τᵢ| among those of sign γ, 0 where there is none. The
    result is θ₀ + λ γ ε. No entry is averaged away, so the unified vector is mostly longer than a task's (not where the
    sign that is elected is that of the smaller entries): the paper shrinks it for each task by a mask and a rescaler,
    which belong to running the model for a known task and are not made here. As one model for all tasks a lambda below
    1 is worth a try.

    Follows the paper. Departs: a sum of exactly 0 elects plus, as in ties here, where the released code
    elects minus; weights are not in the paper.

    Args:
        weight: what each task vector is multiplied by, before the vote.

    >>> import numpy as np
    >>> one, other = np.float32([4, -1, 2, 0.5]), np.float32([2, 3, -5, 0.1])
    >>> emr([one, other])
    array([ 4. ,  3. , -5. ,  0.5], dtype=float32)
    """
    weights = per_model(weight, len(deltas))
    return choice(*extremes(deltas, weights), weighted_sum(deltas, weights), lambda_)


# ---- expo -----------------------------------------------------------------------------------------------------------


_EXPO_PAPER = Paper(
    "Chujie Zheng, Ziqi Wang, Heng Ji, Minlie Huang, Nanyun Peng",
    2024,
    "Model Extrapolation Expedites Alignment",
    "https://arxiv.org/abs/2404.16792",
)


@merge_method(
    "expo",
    title="ExPO",
    formula=r"\theta = \theta_1 + \alpha (\theta_1 - \theta_0)",
    paper=_EXPO_PAPER,
    models=(1, 1),
    workspace=1,
    laws=("zero", "scale", full("task_arithmetic", alpha=0)),
)
def expo(deltas: Deltas, alpha: float) -> Array:
    """A trained model, moved further from its starting point.

    With θ₁ the model after preference training and θ₀ (base_model) the one it started from, the result is
    θ₁ + α (θ₁ − θ₀), which is θ₀ + (1 + α) (θ₁ − θ₀). α = 0 is θ₁; a negative one goes back towards θ₀. The paper picks
    α by a reward model on held-out prompts; for published models it lies between 0.1 and 0.5.

    Follows the paper; the arithmetic is that of task_arithmetic with one model of weight 1 + α.

    Args:
        alpha: how far to go on, in lengths of the training's own change.

    >>> import numpy as np
    >>> expo([np.float32([1, -2, 0, 4])], alpha=0.5)
    array([ 1.5, -3. ,  0. ,  6. ], dtype=float32)
    """
    return weighted_sum(deltas, [1 + alpha])
