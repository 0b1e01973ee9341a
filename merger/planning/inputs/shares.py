"""Tensors outside of a stack whose size depends on its number of layers: along one axis a share for each layer.

Gemma 3n and Gemma 4 hold a small embedding of each token for each layer in this way. Not here: putting them together
anew (jobs).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from merger.lock.locked import LockedModel
from merger.models.architecture import is_before_layers, is_embedding, is_head
from merger.models.checkpoint import TensorInfo
from merger.models.config import Sizes, sizes

_BY_LAYER = re.compile(r"(^|[._])per_layer([._]|$)")
_WEIGHTS = re.compile(r"(^|\.)layer_(weights|weight|scalars|scalar)$")


@dataclass(frozen=True)
class Shares:
    """How a tensor is divided among the layers of a stack.

    Args:
        stack: the stack's name.
        axis: the axis along which a share follows the other.
        size: entries of a share along it; None: that it depends on the layers is seen, and not how.
    """

    stack: str
    axis: int = 0
    size: int | None = None


def shares(model: LockedModel, tensor: TensorInfo) -> Shares | None:
    """How a model's tensor depends on the number of its layers; None: as far as is seen, it does not."""
    stacks = model.architecture.stacks
    for stack, count in stacks.items():
        if _common(tensor.name, stack) == max(_common(tensor.name, other) for other in stacks):
            found = _of_stack(tensor, stack, count, sizes(model.checkpoint.config, stack, stacks))
            if found is not None:
                return found
    return None


def _of_stack(tensor: TensorInfo, stack: str, count: int, said: Sizes) -> Shares | None:
    if _BY_LAYER.search(tensor.name) and tensor.shape:
        axis = len(tensor.shape) - 1 if is_before_layers(tensor.name) else 0
        size, rest = divmod(tensor.shape[axis], count)
        if rest == 0 and size in said.per_layer:
            return Shares(stack, axis, size)
    if _WEIGHTS.search(tensor.name) and tensor.shape[:1] in ((count,), (count + 1,)):
        return Shares(stack)
    if is_embedding(tensor.name) or is_head(tensor.name):
        return None
    by_head = {count * heads for heads in said.heads if heads > 1} - said.stated
    return Shares(stack) if by_head.intersection(tensor.shape) else None


def _common(name: str, stack: str) -> int:
    """With how many words both names begin."""
    pairs = zip(name.split("."), stack.split("."), strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), len(stack.split(".")))
