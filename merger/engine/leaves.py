"""The stored tensors of a job, as the readings of its sources ask for them.

Not here: where their bytes come from (blocks).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from merger.engine.factors import Pairs
from merger.plan.geometry import Geometry
from merger.plan.rows import Numbers
from merger.plan.sources import Made, Routed, Stored

T = TypeVar("T")
TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
STORED_DTYPES: Mapping[str, torch.dtype] = {
    **TORCH_DTYPES,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
}
"""Those that an input may be stored in, too."""


class Leaves(Protocol):
    """The stored tensors of a job, what stages make for it, and what was computed beforehand."""

    def entries(self, leaf: Stored | Made, start: int, stop: int, out: Tensor, step: int = 1) -> Tensor:
        """The leaf's entries ``[start, stop)`` as float32, in the front of `out`.

        Of the tensor's entries only those whose number is a multiple of `step`.

        Raises:
            ModelError: the bytes cannot be had.
            MismatchError: an entry that a stage makes is not finite.
        """

    def rows(self, leaf: Stored | Made, numbers: Numbers, out: Tensor) -> None:
        """Fill `out`, of as many rows, with the leaf's rows of these numbers as float32.

        Raises:
            ModelError: the bytes cannot be had.
        """

    def router(self, source: Routed) -> Tensor:
        """A router's rows."""

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, made once a job."""

    @property
    def pairs(self) -> Pairs:
        """What two jobs of the run make together."""

    def tell(self, start: int, seen: Geometry) -> None:
        """What was seen of the block that starts there, in place of what its entries tell."""
