"""Matrices in eight bits (E4M3) with a scale for each block or row: which they are, their file, what config.json says.

By blocks as DeepSeek V3 is published and transformers writes it, by rows as compressed-tensors' "float-quantized".
Not here: rounding (engine), and models that are stored so (quantised).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from merger.models.architecture import is_embedding, is_head, parse_place
from merger.models.checkpoint import ITEM_BYTES, TensorInfo
from merger.models.formats.safetensors import Outgoing, header
from merger.models.lora.counterparts import sees_or_hears

BLOCK, CHANNEL = "block", "channel"
SIDE = 128
_DTYPES = ("F32", "F16", "BF16")
_LEFT_ALONE = re.compile(
    r"(^|\.)(gate|[\w.]*router[\w.]*|shared_expert_gate|eh_proj|weights_proj|dt_proj|\w*(embed|head|relative)\w*)\.weight$"
)
"""Of a layer's matrices those that the published ones keep: routers, what looks up, what predicts further tokens."""


@dataclass(frozen=True)
class Fp8Tensor:
    """A tensor of the result as such a file has it.

    Args:
        name, dtype, shape: of the result.
        kind: how many entries share a scale; None: it stays as it is.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: str | None

    @property
    def sources(self) -> tuple[str, ...]:
        """The tensors of the result that it is made of."""
        return (self.name,)

    @property
    def block(self) -> tuple[int, int]:
        """How many rows and columns share a scale; at the ends fewer."""
        return (1, self.shape[1]) if self.kind == CHANNEL else (SIDE, SIDE)

    @property
    def unit(self) -> int:
        """How many entries have to be there at once to be written."""
        return self.block[0] * self.shape[1] if self.kind else 1

    @property
    def scales_dtype(self) -> str:
        """compressed-tensors computes in the result's dtype, and keeps the scales in it."""
        return self.dtype if self.kind == CHANNEL else "F32"

    @property
    def item_bytes(self) -> int:
        """To how many bytes it has to be aligned: its scales come after its codes."""
        return ITEM_BYTES[self.scales_dtype if self.kind else self.dtype]

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        """The tensors of the file."""
        if self.kind is None:
            return (_stored(self.name, self.dtype, self.shape),)
        ending = "_scale" if self.kind == CHANNEL else "_scale_inv"
        counts = tuple(-(-side // of) for side, of in zip(self.shape, self.block, strict=True))
        scales = _stored(self.name + ending, self.scales_dtype, counts)
        return _stored(self.name, "F8_E4M3", self.shape), scales


def _stored(name: str, dtype: str, shape: tuple[int, ...]) -> TensorInfo:
    made = TensorInfo(name, dtype, shape, "", 0, 0)
    return TensorInfo(name, dtype, shape, "", 0, made.entries * ITEM_BYTES[dtype])


@dataclass(frozen=True)
class Fp8File:
    """A file: its name, and its tensors in their order."""

    name: str
    tensors: tuple[Fp8Tensor, ...] = field(repr=False)

    @cached_property
    def stored(self) -> tuple[TensorInfo, ...]:
        """The tensors as its header has them."""
        return tuple(stored for tensor in self.tensors for stored in tensor.stored)

    @cached_property
    def header(self) -> bytes:
        """The first bytes of the file, up to the first tensor."""
        return header(self.stored, self.name)

    @property
    def size(self) -> int:
        """The file's size in bytes."""
        return len(self.header) + sum(stored.nbytes for stored in self.stored)


def fp8_tensor(job: Outgoing, kind: str) -> Fp8Tensor:
    """What becomes of a tensor: the matrices of layers that read are brought to eight bits, but for some.

    One whose codes would end where no scale can begin is kept, too.
    """
    name, shape = job.name, job.shape
    layers = len(shape) == 2 and name.endswith(".weight") and parse_place(name).stack is not None and "/" not in name
    kept = is_embedding(name) or is_head(name) or _LEFT_ALONE.search(name) or sees_or_hears(name)
    fits = layers and job.dtype in _DTYPES and shape[0] * shape[1] % 4 == 0 and shape[0] * shape[1] > 0
    return Fp8Tensor(name, job.dtype, shape, kind if fits and not kept else None)


def with_fp8(config: Mapping[str, Any], tensors: Iterable[Fp8Tensor], kind: str) -> dict[str, Any]:
    """The config of a model with these tensors, which says how they are stored and what is not."""
    alone = [tensor.name for tensor in tensors if tensor.kind is None and len(tensor.shape) == 2]
    modules = [name.removesuffix(".weight") for name in alone if name.endswith(".weight") and not is_embedding(name)]
    kept = list(dict.fromkeys(["lm_head", *modules]))  # of a head that is the embedding no tensor tells
    said: dict[str, Any]
    if kind == BLOCK:
        said = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [SIDE, SIDE],
                "modules_to_not_convert": kept}  # fmt: skip
    else:
        said = {"config_groups": {"group_0": copy.deepcopy(_GROUP)}, "format": "float-quantized", "ignore": kept,
                "kv_cache_scheme": None, "quant_method": "compressed-tensors",
                "quantization_status": "compressed"}  # fmt: skip
    return {**config, "quantization_config": said}


_NUMBERS: Mapping[str, Any] = {
    "actorder": None, "block_structure": None, "group_size": None, "num_bits": 8, "symmetric": True, "type": "float",
    "observer_kwargs": {},
}  # fmt: skip
_GROUP: Mapping[str, Any] = {
    "format": "float-quantized",
    "input_activations": {**_NUMBERS, "dynamic": True, "observer": None, "strategy": "token"},
    "output_activations": None,
    "targets": ["Linear"],
    "weights": {**_NUMBERS, "dynamic": False, "observer": "minmax", "strategy": "channel"},
}
"""Activations are brought to eight bits token by token while the model runs."""
