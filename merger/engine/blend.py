"""Merges the deltas of adapters: each is the product of two small matrices, and so lies in few directions.

In a space of those directions (Core Space: Panariello et al. 2025, https://arxiv.org/abs/2509.17786) a method works on
small matrices. Methods that turn with their inputs give the same there; for the others the recipe decides.
Not here: the methods (methods), and taking their result apart again (factors).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from merger.engine.adapters import Load
from merger.methods._ops import Rng
from merger.methods._spectral import TINY
from merger.methods.registry import methods
from merger.plan.products import LowRank, MergedDeltas
from merger.plan.sources import Stored, Zeros


@dataclass(frozen=True)
class Blended:
    """A merged delta: ``rows @ middle @ columns``, where a basis that is None leaves the middle as it is."""

    middle: Tensor
    rows: Tensor | None
    columns: Tensor | None

    def outside(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Directions of the middle as those of the whole."""
        return (
            left if self.rows is None else self.rows @ left,
            right if self.columns is None else right @ self.columns,
        )


def blended(source: MergedDeltas, load: Load) -> Blended:
    """What the method makes of the deltas."""
    parts = [_part(delta, load) for delta in source.deltas]
    rows = _basis([b for b, _ in parts]) if source.space in ("rows", "core") else None
    columns = _basis([a.T for _, a in parts]) if source.space in ("columns", "core") else None
    inner = [(b if rows is None else rows.T @ b, a if columns is None else a @ columns) for b, a in parts]
    given = dict(source.arguments)
    if source.random is not None:
        given["rng"] = Rng(*source.random)
    method = methods()[source.method]
    deltas = [b.float() @ a.float() if source.space == "full" else _product(b, a) for b, a in inner]
    merged: Tensor = method.function(deltas, **given)
    return Blended(merged, rows, None if columns is None else columns.T)


def _part(delta: LowRank | Zeros, load: Load) -> tuple[Tensor, Tensor]:
    """scale B, and A, in float64; without a direction where the adapter changes nothing."""
    if isinstance(delta, Zeros):
        rows, columns = delta.shape
        return torch.zeros(rows, 0, dtype=torch.float64), torch.zeros(0, columns, dtype=torch.float64)
    return _whole(delta.b, load).mul_(delta.scale), _whole(delta.a, load)


def _product(b: Tensor, a: Tensor) -> Tensor:
    """B A in a basis, where zeros come out as rounding: they are made zeros again, else they would have a vote."""
    found = b @ a
    return found.masked_fill_(found.abs() <= TINY * found.abs().max(), 0.0).float() if found.numel() else found.float()


def _basis(parts: list[Tensor]) -> Tensor:
    """The left singular vectors of all parts side by side, each with its largest entry positive."""
    basis: Tensor = torch.linalg.svd(torch.cat(parts, 1), full_matrices=False)[0]
    return basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()


def _whole(leaf: Stored, load: Load) -> Tensor:
    entries = leaf.tensor.entries
    return load(leaf, 0, entries, torch.empty(entries)).view(leaf.shape).double()
