"""The formulas of the methods that mask or weigh entries, once more: numpy, float64, whole tensors, sorts. Shares no
code with `merger.methods`. Where rounding decides a mask, a sign or a trim, both answers are right."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from .answer import Answer, Array, consensus, trimmed

NOISE = 3e-6


def _terms(deltas: Sequence[Array], weight: Sequence[float]) -> list[Array]:
    return [number * delta for number, delta in zip(weight, deltas, strict=True)]


def emr(deltas: Sequence[Array], weight: Sequence[float], lambda_: float) -> Answer:
    terms = np.array(_terms(deltas, weight))
    vote, size = terms.sum(0), np.abs(terms).sum(0)
    plus, minus = terms.clip(min=0).max(0), terms.clip(max=0).min(0)
    answers = [np.where(vote >= edge * NOISE * size, plus, minus) * lambda_ for edge in (-1, 1)]
    return Answer((*answers, np.where(vote >= 0, plus, minus) * lambda_), abs(lambda_) * size)


def magmax(deltas: Sequence[Array], weight: Sequence[float], lambda_: float) -> Answer:
    terms = np.array(_terms(deltas, weight))
    plus, minus, size = terms.max(0).clip(min=0), terms.min(0).clip(max=0), np.abs(terms).max(0)
    answers = [np.where(plus + minus >= edge * NOISE * size, plus, minus) * lambda_ for edge in (-1, 0, 1)]
    if len(set(weight)) == 1:  # then magnitudes are compared exactly
        answers = answers[1:2]
    return Answer(tuple(answers), abs(lambda_) * size)


def expo(deltas: Sequence[Array], alpha: float) -> Answer:
    return Answer(((1 + alpha) * deltas[0],), np.abs((1 + alpha) * deltas[0]))


def _masked(
    merged: Answer, terms: Sequence[Array], mask_lambda: Sequence[float], k: int, lambda_: float = 1.0
) -> Answer:
    size = np.sum(np.abs(terms), axis=0)
    right = []
    for total, edge in product(merged.right, (-1, 1)):
        held = [
            np.abs(term) >= strict * np.abs(total - term) + edge * NOISE * max(1, strict) * size
            for term, strict in zip(terms, mask_lambda, strict=True)
        ]
        right.append(np.where(np.sum(held, axis=0) >= k, total, 0.0) * lambda_)
    return Answer(tuple(right), np.maximum(merged.size, size) * abs(lambda_))


def consensus_ta(
    deltas: Sequence[Array], weight: Sequence[float], k: int, mask_lambda: Sequence[float], lambda_: float
) -> Answer:
    terms = _terms(deltas, [number * lambda_ for number in weight])
    merged = Answer((np.sum(terms, axis=0),), np.sum(np.abs(terms), axis=0))
    return _masked(merged, terms, mask_lambda, k)


def consensus_ties(
    deltas: Sequence[Array],
    weight: Sequence[float],
    density: Sequence[float],
    k: int,
    mask_lambda: Sequence[float],
    normalize: bool,
    lambda_: float,
) -> Answer:
    kept = [trimmed(delta, share) for delta, share in zip(deltas, density, strict=True)]
    merged = consensus(_terms(kept, weight), weight, normalize, 1.0)
    return _masked(merged, _terms(deltas, weight), mask_lambda, k, lambda_)


def _norm(products: Array) -> Array:
    way = float(np.ptp(products))
    return (products - products.min()) / way if way else np.zeros_like(products)


def _softmax(entries: Array) -> Array:
    exps = np.exp(entries)
    return np.asarray(exps / exps.sum())


def pcb(deltas: Sequence[Array], weight: Sequence[float], density: Sequence[float], lambda_: float) -> Answer:
    models = len(deltas)
    choices: list[list[Array]] = []
    for one, share in zip(deltas, density, strict=True):
        score = _softmax(models * _norm(one * one)) * np.sum([_softmax(_norm(one * other)) for other in deltas], axis=0)
        threshold = np.sort(score.ravel())[-max(1, int(share * score.size))] if share > 0 else np.inf
        choices.append([np.where(score >= threshold * (1 + edge), score, 0.0) for edge in (-NOISE, NOISE)])
    right = []
    for kept in product(*choices):
        total = np.sum(kept, axis=0)
        summed = np.sum([s * term for s, term in zip(kept, _terms(deltas, weight), strict=True)], axis=0)
        right.append(lambda_ * summed / np.where(total == 0, 1.0, total))
    return Answer(tuple(right), 3 * abs(lambda_) * np.max(np.abs(_terms(deltas, weight)), axis=0))


MASKS: Mapping[str, Callable[..., Any]] = {
    function.__name__: function for function in (emr, magmax, expo, consensus_ta, consensus_ties, pcb)
}
