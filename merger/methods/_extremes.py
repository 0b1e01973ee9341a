"""The largest positive and the least negative entry among several tensors, and the choice between the two.

What methods share that keep one model's entry in place of a sum (emr, magmax). Not here: sums and their election
(`_ops`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def extremes(terms: Iterable[Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """At each entry the largest of the terms, or 0 where none is positive; and the least, or 0 where none is negative.

    A term may be a buffer: each is used up before the next is asked for.
    """
    import torch

    above, below = torch.zeros_like(like), torch.zeros_like(like)
    for term in terms:
        torch.maximum(above, term, out=above)
        torch.minimum(below, term, out=below)
    return above, below


def choose(above: Tensor, below: Tensor, vote: Tensor) -> Tensor:
    """`above` where the vote is 0 or more, else `below`; all three are overwritten."""
    plus = vote.ge_(0)
    above.mul_(plus)
    return above.add_(below.mul_(plus.neg_().add_(1)))
