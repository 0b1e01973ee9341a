"""What an oracle gives: the answers that are right, and how much rounding they allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Answer:
    """The results that are right at each entry (several where only rounding or an order decides between them), and the
    magnitude of the terms there."""

    right: tuple[Array, ...]
    size: Array


def summed(tensors: Sequence[Array], factors: Sequence[float | Array]) -> Answer:
    """The sum of each tensor times its factor."""
    terms = [factor * tensor for tensor, factor in zip(tensors, factors, strict=True)]
    return Answer((np.sum(terms, axis=0),), np.sum(np.abs(terms), axis=0))


def either(*answers: Answer) -> Answer:
    """Any of these is right."""
    rights = tuple(right for answer in answers for right in answer.right)
    return Answer(rights, np.max([answer.size for answer in answers], axis=0))
