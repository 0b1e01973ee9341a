"""What an oracle gives, and the steps of TIES that several formulas contain. Shares no code with `merger.methods`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Answer:
    """The results that are right at each entry, and the magnitude of the terms there."""

    right: tuple[Array, ...]
    size: Array


def trimmed(delta: Array, share: float) -> Array:
    """The delta's ``int(share * entries)`` largest entries, at least one, and those equal to the least of them."""
    if share <= 0:
        return np.zeros_like(delta)
    threshold = np.sort(np.abs(delta).ravel())[-max(1, int(share * delta.size))]
    return np.where(np.abs(delta) >= threshold, delta, 0.0)


def consensus(terms: Sequence[Array], weight: Sequence[float], normalize: bool, lambda_: float) -> Answer:
    """Both elections where the sum is zero but for float32's rounding."""
    vote, size = np.sum(terms, axis=0), np.sum(np.abs(terms), axis=0)
    noise = 1e-6 * size
    results, divisors = [], []
    for sign in (np.where(vote >= -noise, 1, -1), np.where(vote > noise, 1, -1)):
        agree = [np.sign(term) == sign for term in terms]
        divisor = np.sum([mask * number for mask, number in zip(agree, weight, strict=True)], axis=0)
        divisor = np.where(divisor == 0, 1.0, divisor) if normalize else np.ones_like(vote)
        total = np.sum([mask * term for mask, term in zip(agree, terms, strict=True)], axis=0)
        results.append(lambda_ * total / divisor)
        divisors.append(np.abs(divisor))
    return Answer(tuple(results), abs(lambda_) * size / np.minimum(*divisors))
