"""MagMax: at every entry the task vector of largest magnitude. Not here: an election of signs first (emr, ties)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger.methods._extremes import choose, extremes
from merger.methods._ops import per_model, scaled
from merger.methods.registry import Deltas, Paper, PerModel, merge_method

if TYPE_CHECKING:
    from torch import Tensor

_PAPER = Paper(
    "Marczak et al.",
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
    paper=_PAPER,
    models=(1, None),
    scratch=5,
    laws=("zero", "idempotent", "permutation", "scale"),
)
def magmax(deltas: Deltas, weight: PerModel = 1.0, lambda_: float = 1.0) -> Tensor:
    """At every entry the one task vector that moved it most.

    With τᵢ = wᵢ (θᵢ − θ₀) the result is θ₀ + λ τₖ, where k at each entry is the model of largest |τᵢ|. The paper trains
    the models one after the other, each from the last, and chooses λ on validation data; neither is needed here. Its
    released code takes λ = 0.5.

    Departs from the released code: of two opposite entries of the same magnitude the positive one stays, whatever the
    order of the models, where there the last model's does; weights are not in the paper.

    Args:
        weight: what each task vector is multiplied by, before magnitudes are compared.
        lambda_: what the merged task vector is multiplied by before the base is added.

    >>> import torch
    >>> one, other = torch.tensor([4.0, -1.0, 2.0, 0.5]), torch.tensor([2.0, 3.0, -5.0, -0.1])
    >>> magmax([one, other])
    tensor([ 4.0000,  3.0000, -5.0000,  0.5000])
    """
    weights = per_model(weight, len(deltas))
    terms = (scaled(delta, number) for delta, number in zip(deltas, weights, strict=True))
    above, below = extremes(terms, like=deltas[0])
    return choose(above, below, vote=above + below).mul_(lambda_)
