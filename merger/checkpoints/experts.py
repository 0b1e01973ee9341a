"""Two layouts of one mixture of experts: a layer's experts in one tensor, as transformers 5 holds them in memory, or
a tensor for each, as it writes them and other programs read them.

A fused tensor is experts end to end, so one expert is a run of its bytes: splitting costs nothing. Not here: experts
that are stored in one tensor by all models of their kind, which stay so, and the making of mixtures (plan).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from merger.checkpoints.checkpoint import ITEM_BYTES, TensorInfo

Tensors = Mapping[str, TensorInfo]

_FUSED = re.compile(r"^(?P<block>.+)\.experts\.(?P<role>gate_up_proj|down_proj)$")
_ROUTER = re.compile(r"^(?P<block>.+)\.(gate|router)\.weight$")


@dataclass(frozen=True)
class _Style:
    """How a kind of model names the tensors of one expert, and the block that they are in (None: as in memory)."""

    gate: str
    up: str
    down: str
    block: str | None = None


_STYLES = (_Style("gate_proj", "up_proj", "down_proj"), _Style("w1", "w3", "w2", "block_sparse_moe"))


def are_fused(tensors: Tensors) -> bool:
    """Whether all experts of a layer are in one tensor, gate and up as halves of one."""
    return any(_FUSED.match(name) for name in tensors)


def split(tensors: Tensors, like: Tensors) -> Tensors:
    """The tensors with one for each expert, under the names that another model of that kind has for them.

    They stay as they are where that model's are in one tensor too, or have other shapes.
    """
    style = next((style for style in _STYLES if any(_first(name, style) for name in like)), None)
    if style is None or not _alike(tensors, like, style):
        return tensors
    blocks = {match["block"] for name in tensors if (match := _FUSED.match(name))}
    found = [part for tensor in tensors.values() for part in _parts(tensor, blocks, style)]
    return {tensor.name: tensor for tensor in found}


def _first(name: str, style: _Style) -> bool:
    return name.endswith(f".experts.0.{style.gate}.weight")


def _alike(tensors: Tensors, like: Tensors, style: _Style) -> bool:
    """Whether a fused tensor's halves have the shape that the other model's gates have."""
    gate = next(tensor for name, tensor in like.items() if _first(name, style))
    fused = next(tensor for name, tensor in tensors.items() if name.endswith(".experts.gate_up_proj"))
    return len(fused.shape) == 3 and (fused.shape[1], fused.shape[2]) == (2 * gate.shape[0], gate.shape[1])


def _parts(tensor: TensorInfo, blocks: set[str], style: _Style) -> Iterator[TensorInfo]:
    """A tensor, or of a fused one what belongs to each expert."""
    match, router = _FUSED.match(tensor.name), _ROUTER.match(tensor.name)
    if match is None:
        routes = router is not None and router["block"] in blocks and style.block is not None
        name = f"{_block(router['block'], style)}.gate.weight" if router is not None and routes else tensor.name
        yield replace(tensor, name=name)
        return
    experts, rows, columns = tensor.shape
    roles = (style.gate, style.up) if match["role"] == "gate_up_proj" else (style.down,)
    shape = (rows // len(roles), columns)
    for number in range(experts * len(roles)):
        expert, role = divmod(number, len(roles))
        name = f"{_block(match['block'], style)}.experts.{expert}.{roles[role]}.weight"
        size = math.prod(shape) * ITEM_BYTES[tensor.dtype]
        start = tensor.start + number * size
        yield TensorInfo(name, tensor.dtype, shape, tensor.file, start, start + size)


def _block(block: str, style: _Style) -> str:
    return block if style.block is None else f"{block.rpartition('.')[0]}.{style.block}"
