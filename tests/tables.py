"""Stored tensors that are at hand, in place of a job's. Not here: files."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merger.methods.steps.dtypes import Held
from merger.models.checkpoint import TensorInfo
from merger.planning.inputs.base import Stored

Floats = NDArray[np.float32]


class Tables:
    """Tensors in float32 by name, and how many entries of each were asked for at once at most."""

    def __init__(self, tables: Mapping[str, Floats]) -> None:
        self.tables, self.most, self._made = dict(tables), dict[str, int](), dict[Hashable, Any]()

    def bits(self, leaf: Stored, start: int, stop: int) -> Held:
        name = leaf.tensor.name
        self.most[name] = max(self.most.get(name, 0), stop - start)
        return Held(self.tables[name].reshape(-1)[start:stop], "F32")

    def rows(self, leaf: Stored, numbers: NDArray[np.intp], width: int) -> Held:
        return Held(self.tables[leaf.tensor.name][numbers].reshape(-1), "F32")

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def stored(name: str, *shape: int) -> Stored:
    """One of them as a source."""
    return Stored(0, TensorInfo(name, "F32", shape, "f", 0, 4 * int(np.prod(shape))))


def drawn(seed: int, **shapes: tuple[int, ...]) -> dict[str, Floats]:
    """Normal numbers in these shapes."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
