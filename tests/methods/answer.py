"""What an oracle gives: the answers that are right, and how much rounding they allow; and the steps of TIES that
several formulas contain. Shares no code with `merger.methods`."""

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


def trimmed(delta: Array, share: float) -> Array:
    """The delta's ``int(share * entries)`` largest entries, at least one, and those equal to the least of them."""
    if share <= 0:
        return np.zeros_like(delta)
    threshold = np.sort(np.abs(delta).ravel())[-max(1, int(share * delta.size))]
    return np.where(np.abs(delta) >= threshold, delta, 0.0)


def consensus(
    terms: Sequence[Array],
    weight: Sequence[float],
    normalize: bool,
    lambda_: float,
    votes: Sequence[Array] | None = None,
) -> Answer:
    """Both elections where the sum of the votes (the terms, if not given) is zero but for float32's rounding."""
    votes = terms if votes is None else votes
    vote, size = np.sum(votes, axis=0), np.sum(np.abs(terms), axis=0)
    noise = 1e-6 * np.sum(np.abs(votes), axis=0)
    results, divisors = [], []
    for sign in (np.where(vote >= -noise, 1, -1), np.where(vote > noise, 1, -1)):
        agree = [np.sign(term) == sign for term in terms]
        divisor = np.sum([mask * number for mask, number in zip(agree, weight, strict=True)], axis=0)
        divisor = np.where(divisor == 0, 1.0, divisor) if normalize else np.ones_like(vote)
        total = np.sum([mask * term for mask, term in zip(agree, terms, strict=True)], axis=0)
        results.append(lambda_ * total / divisor)
        divisors.append(np.abs(divisor))
    return Answer(tuple(results), abs(lambda_) * size / np.minimum(*divisors))
