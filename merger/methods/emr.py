"""EMR's unified task vector: elect a sign at every entry, keep the largest magnitude that has it.

Not here: the masks and rescalers that EMR keeps for each task and applies when the model runs; a checkpoint holds one
set of tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger.methods._extremes import choose, extremes
from merger.methods._ops import per_model, scaled, weighted_sum
from merger.methods.registry import Deltas, Paper, PerModel, merge_method

if TYPE_CHECKING:
    from torch import Tensor

_PAPER = Paper(
    "Huang et al.", 2024, "EMR-Merging: Tuning-Free High-Performance Model Merging", "https://arxiv.org/abs/2405.17461"
)


@merge_method(
    "emr",
    title="EMR (unified)",
    formula=(
        r"\theta = \theta_0 + \lambda \gamma \max_{i : \operatorname{sgn} \tau_i = \gamma} \lvert \tau_i"
        r" \rvert,"
        r"\quad \gamma = \operatorname{sgn} \textstyle\sum_i \tau_i, \quad \tau_i = w_i (\theta_i - \theta_0)"
    ),
    paper=_PAPER,
    models=(1, None),
    scratch=6,
    laws=("zero", "idempotent", "permutation", "scale"),
)
def emr(deltas: Deltas, weight: PerModel = 1.0, lambda_: float = 1.0) -> Tensor:
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
        lambda_: what the merged task vector is multiplied by before the base is added.

    >>> import torch
    >>> one, other = torch.tensor([4.0, -1.0, 2.0, 0.5]), torch.tensor([2.0, 3.0, -5.0, 0.1])
    >>> emr([one, other])
    tensor([ 4.0000,  3.0000, -5.0000,  0.5000])
    """
    weights = per_model(weight, len(deltas))
    terms = (scaled(delta, number) for delta, number in zip(deltas, weights, strict=True))
    above, below = extremes(terms, like=deltas[0])
    return choose(above, below, vote=weighted_sum(deltas, weights)).mul_(lambda_)
