"""Passthrough: one model's tensor as it is, for stacks of layers. Not here: which layer goes where (slices)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger.methods._ops import per_model
from merger.methods.registry import PerModel, Tensors, merge_method

if TYPE_CHECKING:
    from torch import Tensor


@merge_method(
    "passthrough",
    title="Passthrough",
    formula=r"\theta = \text{scale} \cdot \theta_1",
    models=(1, 1),
    laws=("zero", "idempotent", "scale"),
)
def passthrough(tensors: Tensors, scale: PerModel = 1.0) -> Tensor:
    """One model's tensor, unchanged or times a number.

    The result is scale · θ. It is what slices use to stack layers; a scale of 0 on a layer's output projections makes
    that layer an identity.

    Args:
        scale: what the tensor is multiplied by.

    >>> import torch
    >>> passthrough([torch.tensor([1.0, -2.0, 3.0, 0.5])], scale=2)
    tensor([ 2., -4.,  6.,  1.])
    """
    (tensor,) = tensors
    (factor,) = per_model(scale, 1)
    return tensor * factor
