"""Arcee Fusion: take over from another model the entries that changed most. Not here: trimming task vectors (ties)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from merger.methods._ops import Blocks, entries_of, quartiles, scratch
from merger.methods._rows import as_rows, row_chunks
from merger.methods.registry import Tensors, merge_method

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

_EPS = 1e-8


def measure(blocks: Blocks) -> float:
    """The threshold of the whole tensor's importances."""
    import numpy as np

    low, median, high = quartiles(_Importances(blocks))
    return float(np.float32(median + 1.5 * (high - low)))


@merge_method(
    "arcee_fusion",
    title="Arcee Fusion",
    formula=(
        r"\theta = b \text{ where } d \ge Q_2 + \tfrac32 (Q_3 - Q_1), \text{ else } a,"
        r"\quad d = \lvert b - a \rvert \cdot \operatorname{KL}(\operatorname{softmax} b \parallel"
        r" \operatorname{softmax} a)"
    ),
    models=(2, 2),
    base="first",
    unit="rows",
    measure=measure,
    scratch=24,  # three searches at once, for two inputs
    laws=("zero", "idempotent"),
)
def arcee_fusion(tensors: Tensors, *, measured: float | None = None) -> Tensor:
    """The base, with the other model's entries where they differ most, in rows that differ most.

    The importance of an entry is |b − a| · KL(p ‖ q), with a the base's tensor, b the other's, p and q the softmax of
    its row (along the last dimension) of b and of a, 1e-8 added to each of their entries. Where the importance reaches
    median + 1.5 (Q₃ − Q₁) of the importances of the whole tensor, the entry is b's, else a's. Quartiles are entries of
    the tensor, the lower one of two. There is no paper.

    Departs from mergekit: the quartiles are those of all entries, where there those of a tensor of more than a
    million are estimated from a random sample; softmax and KL are float64, for in float32 the KL of two rows that are
    close is mostly rounding, and a negative one counts as 0.

    >>> import torch
    >>> a, b = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.1, 1.9, 3.0, 6.0])
    >>> arcee_fusion([a, b])
    tensor([1., 2., 3., 6.])
    """
    import torch

    base, other = (as_rows(tensor) for tensor in tensors)
    threshold = measure([[base, other]]) if measured is None else measured
    mask = _importance([base, other], _divergence([base, other])).ge_(threshold)
    return torch.sub(other, base).mul_(mask).add_(base).view(tensors[0].shape)


@dataclass(frozen=True)
class _Importances:
    """The importances of a tensor's entries, block by block, as often as they are walked."""

    blocks: Blocks
    divergences: list[NDArray[np.float32]] = field(default_factory=list)  # kept: they cost more than all the rest

    @property
    def entries(self) -> int:
        """How many entries the tensor has."""
        return entries_of(self.blocks)

    def __iter__(self) -> Iterator[Sequence[Tensor]]:
        for place, block in enumerate(self.blocks):
            if place == len(self.divergences):
                self.divergences.append(_divergence(block))
            yield [_importance(block, self.divergences[place])]


def _importance(block: Sequence[Tensor], divergence: NDArray[np.float32]) -> Tensor:
    """In a buffer that the next call reuses."""
    import torch

    base, other = block
    difference = torch.sub(other, base, out=scratch("part", base)).abs_()
    return difference.mul_(torch.from_numpy(divergence).to(base.device).view(-1, 1))


def _divergence(block: Sequence[Tensor]) -> NDArray[np.float32]:
    """KL(p ‖ q) of each row.

    Another machine's exponential may differ in the last bit of float64. That is the only place here where one could
    tell, and only in an entry whose importance lies within some 1e-8 of the threshold.
    """
    import numpy as np

    sums = []
    for base, other in row_chunks(block):
        p, q = _softmax(other), _softmax(base)
        ratio = np.log(np.divide(p, q, out=q), out=q)
        sums.append(np.add.reduce(np.multiply(p, ratio, out=p), axis=1))
    divergences: NDArray[np.float32] = np.maximum(np.concatenate(sums), 0).astype(np.float32)
    return divergences


def _softmax(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each row, in its place, with 1e-8 added."""
    import numpy as np

    rows -= np.max(rows, axis=1, keepdims=True)
    np.exp(rows, out=rows)
    rows /= np.add.reduce(rows, axis=1, keepdims=True)
    rows += _EPS
    return rows
