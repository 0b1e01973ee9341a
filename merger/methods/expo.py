"""ExPO: one aligned model, carried on beyond itself in the direction it was trained. Not here: several models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger.methods._ops import weighted_sum
from merger.methods.registry import Deltas, Paper, full, merge_method

if TYPE_CHECKING:
    from torch import Tensor

_PAPER = Paper("Zheng et al.", 2024, "Model Extrapolation Expedites Alignment", "https://arxiv.org/abs/2404.16792")


@merge_method(
    "expo",
    title="ExPO",
    formula=r"\theta = \theta_1 + \alpha (\theta_1 - \theta_0)",
    paper=_PAPER,
    models=(1, 1),
    scratch=1,
    laws=("zero", "scale", full("task_arithmetic", alpha=0)),
)
def expo(deltas: Deltas, alpha: float) -> Tensor:
    """A trained model, moved further from its starting point.

    With θ₁ the model after preference training and θ₀ (base_model) the one it started from, the result is
    θ₁ + α (θ₁ − θ₀), which is θ₀ + (1 + α) (θ₁ − θ₀). α = 0 is θ₁; a negative one goes back towards θ₀. The paper picks
    α by a reward model on held-out prompts; for published models it lies between 0.1 and 0.5.

    Follows the paper; the arithmetic is that of task_arithmetic with one model of weight 1 + α.

    Args:
        alpha: how far to go on, in lengths of the training's own change.

    >>> import torch
    >>> expo([torch.tensor([1.0, -2.0, 0.0, 4.0])], alpha=0.5)
    tensor([ 1.5000, -3.0000,  0.0000,  6.0000])
    """
    return weighted_sum(deltas, [1 + alpha])
