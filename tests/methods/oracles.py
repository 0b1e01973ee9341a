"""Each method's formula once more, straight from the page: numpy, float64, whole tensors, sorts. Shares no code with
`merger.methods`. What an oracle gives is told in `answer`; the methods of angles are in `oracles_geometry`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from .answer import Answer, Array, consensus, trimmed
from .answer import summed as _sum
from .oracles_geometry import arcee_fusion, karcher, model_stock, multislerp, nearswap, nuslerp
from .oracles_masks import MASKS
from .oracles_spectral import SPECTRAL


def linear(tensors: Sequence[Array], weight: Sequence[float], normalize: bool) -> Answer:
    total = sum(weight) if normalize else 1.0
    return _sum(tensors, [number / total for number in weight])


def passthrough(tensors: Sequence[Array], scale: Sequence[float]) -> Answer:
    return _sum(tensors, scale)


def fisher(tensors: Sequence[Array], weight: Sequence[float], statistics: Sequence[Array] = ()) -> Answer:
    given = np.reshape(weight, (-1, *[1] * tensors[0].ndim)) * np.ones_like(tensors)
    shares = given * np.asarray(statistics, float) if len(statistics) else given
    total = shares.sum(0)
    shares = np.where(total, shares, given) / np.where(total, total, sum(weight))
    return Answer(((shares * tensors).sum(0),), np.abs(tensors).sum(0))


def regmean(
    tensors: Sequence[Array], weight: Sequence[float], alpha: float, statistics: Sequence[Array] = ()
) -> Answer:
    mean = sum(number * tensor for number, tensor in zip(weight, tensors, strict=True)) / sum(weight)
    if not len(statistics):
        return Answer((mean,), np.abs(tensors).sum(0))
    grams = [number * (alpha * gram + (1 - alpha) * np.diag(np.diag(gram)))
             for number, gram in zip(weight, np.asarray(statistics, float), strict=True)]  # fmt: skip
    alive = np.flatnonzero(np.diag(np.sum(grams, axis=0)))
    inverse = np.linalg.inv(np.sum(grams, axis=0)[np.ix_(alive, alive)])
    shares = [gram[np.ix_(alive, alive)] @ inverse for gram in grams]
    right, size = mean.copy(), np.sum(np.abs(tensors), axis=0)
    right[:, alive] = sum(tensor[:, alive] @ share for tensor, share in zip(tensors, shares, strict=True))
    size[:, alive] += sum(
        np.abs(tensor[:, alive]) @ np.abs(share) for tensor, share in zip(tensors, shares, strict=True)
    )
    return Answer((right,), size + 1e-9 * np.max(size))  # what float64 leaves of an inverse times its matrix


def aim(
    deltas: Sequence[Array],
    weight: Sequence[float],
    normalize: bool,
    lambda_: float,
    omega: float,
    statistics: Sequence[Array] = (),
) -> Answer:
    whole = task_arithmetic(deltas, weight, normalize, lambda_)
    factors = [1 - (1 - omega) * np.float64(each) / max(each.max(), 1e-30) for each in statistics] or [np.ones(1)]
    return Answer(tuple(right * factors[0] for right in whole.right), whole.size)


def slerp(tensors: Sequence[Array], t: float) -> Answer:
    a, b = tensors
    na, nb = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    cosine = float(np.sum(a * b) / (na * nb)) if na * nb else 1.0
    if t in (0, 1) or cosine > 0.9995:
        return _sum(tensors, [1 - t, t])
    if cosine < -1 + 1e-6:
        norm = (1 - t) * na + t * nb
        return _sum(tensors, [norm / na, 0] if t <= 0.5 else [0, norm / nb])
    omega = np.arccos(cosine)
    return _sum(tensors, [np.sin((1 - t) * omega) / np.sin(omega), np.sin(t * omega) / np.sin(omega)])


def task_arithmetic(deltas: Sequence[Array], weight: Sequence[float], normalize: bool, lambda_: float) -> Answer:
    total = sum(weight) if normalize and sum(weight) else 1.0
    return _sum(deltas, [lambda_ * number / total for number in weight])


def metagpt(deltas: Sequence[Array], lambda_: float) -> Answer:
    shares = np.array([np.linalg.norm(delta) ** 2 for delta in deltas])
    return _sum(deltas, list(lambda_ * shares / (shares.sum() or 1.0)))


def nan(tensors: Sequence[Array], lambda_: float) -> Answer:
    norms = [np.linalg.norm(tensor) for tensor in tensors[1:]]
    inverses = np.array([1 / norm if all(norms) else 1.0 for norm in norms])
    factors = lambda_ * len(norms) / 2 * inverses / inverses.sum()
    return _sum(tensors, [1 - factors.sum(), *factors])


def _l1(whole: Array, left: Array) -> float:
    before, after = np.abs(whole).sum(), np.abs(left).sum()
    return float(before / after) if after > 1e-7 * before else 1.0


def ties(
    deltas: Sequence[Array],
    weight: Sequence[float],
    density: Sequence[float],
    normalize: bool,
    lambda_: float,
    rescale: bool,
) -> Answer:
    terms = []
    for delta, share in zip(deltas, density, strict=True):
        kept = trimmed(delta, share)
        terms.append(kept * (_l1(delta, kept) if rescale and share < 1 else 1.0))
    return consensus([w * delta for w, delta in zip(weight, terms, strict=True)], weight, normalize, lambda_)


def _dropped(
    deltas: Sequence[Array], density: Sequence[float], rescale: bool, unbiased: bool, masks: Sequence[Array]
) -> list[Array]:
    dropped = []
    for delta, share, mask in zip(deltas, density, masks, strict=True):
        if share >= 1:
            dropped.append(delta)
            continue
        factor = (1 / share if share else 1.0) if unbiased else _l1(delta, mask * delta)
        dropped.append(mask * delta * (factor if rescale else 1.0))
    return dropped


def dare_linear(
    deltas: Sequence[Array],
    weight: Sequence[float],
    density: Sequence[float],
    normalize: bool,
    lambda_: float,
    rescale: bool,
    unbiased: bool,
    masks: Sequence[Array],
) -> Answer:
    return task_arithmetic(_dropped(deltas, density, rescale, unbiased, masks), weight, normalize, lambda_)


def dare_ties(
    deltas: Sequence[Array],
    weight: Sequence[float],
    density: Sequence[float],
    normalize: bool,
    lambda_: float,
    rescale: bool,
    unbiased: bool,
    masks: Sequence[Array],
) -> Answer:
    dropped = _dropped(deltas, density, rescale, unbiased, masks)
    return consensus([w * delta for w, delta in zip(weight, dropped, strict=True)], weight, normalize, lambda_)


def _in_band(delta: Array, density: float, gamma: float, rescale: bool) -> Array:
    if density >= 1:
        return delta
    if density <= 0:
        return np.zeros_like(delta)
    descending = np.sort(np.abs(delta).ravel())[::-1]
    kept = max(1, int(density * delta.size))
    outliers = min(int(gamma * delta.size), delta.size - kept)
    high, low = descending[outliers], descending[outliers + kept - 1]
    left = np.where((np.abs(delta) >= low) & (np.abs(delta) <= high), delta, 0.0)
    return left * (_l1(delta, left) if rescale else 1.0)


def breadcrumbs(
    deltas: Sequence[Array],
    weight: Sequence[float],
    density: Sequence[float],
    gamma: Sequence[float],
    normalize: bool,
    lambda_: float,
    rescale: bool,
) -> Answer:
    left = [_in_band(*given, rescale) for given in zip(deltas, density, gamma, strict=True)]
    return task_arithmetic(left, weight, normalize, lambda_)


def breadcrumbs_ties(
    deltas: Sequence[Array],
    weight: Sequence[float],
    density: Sequence[float],
    gamma: Sequence[float],
    normalize: bool,
    lambda_: float,
    rescale: bool,
) -> Answer:
    left = [_in_band(*given, rescale) for given in zip(deltas, density, gamma, strict=True)]
    return consensus([w * delta for w, delta in zip(weight, left, strict=True)], weight, normalize, lambda_)


def della_linear(
    deltas: Sequence[Array],
    weight: Sequence[float],
    density: Sequence[float],
    epsilon: Sequence[float],
    normalize: bool,
    lambda_: float,
    rescale: bool,
    masks: Sequence[Array],
) -> Answer:
    return dare_linear(deltas, weight, density, normalize, lambda_, rescale, False, masks)


def della(
    deltas: Sequence[Array],
    weight: Sequence[float],
    density: Sequence[float],
    epsilon: Sequence[float],
    normalize: bool,
    lambda_: float,
    rescale: bool,
    masks: Sequence[Array],
) -> Answer:
    return dare_ties(deltas, weight, density, normalize, lambda_, rescale, False, masks)


def della_probability(delta: Array, density: float, epsilon: float) -> Array:
    """The probability with which DELLA keeps each entry: by its rank in its row, equals sharing their mean rank."""
    epsilon = min(epsilon, density, 1 - density)
    rows = np.abs(delta).reshape(-1, delta.shape[-1])
    below = (rows[:, None, :] < rows[:, :, None]).sum(-1)
    equal = (rows[:, None, :] == rows[:, :, None]).sum(-1) - 1
    others = rows.shape[1] - 1
    share = (below + equal / 2) / others if others else np.full(rows.shape, 0.5)
    probability: Array = (density - epsilon + 2 * epsilon * share).reshape(delta.shape)
    return probability


def sce(deltas: Sequence[Array], select_topk: float) -> Answer:
    """Variances that are one number in float32 are equal: the rule for what stands at the threshold."""
    pairs = [(one - other) ** 2 for one, other in combinations(deltas, 2)]
    variance = np.sum([np.zeros_like(deltas[0]), *pairs], axis=0).astype(np.float32)
    count = np.count_nonzero(variance)
    mask = np.ones_like(deltas[0])
    if select_topk < 1:
        wanted = max(1, int(select_topk * count))
        threshold = np.sort(variance.ravel())[-wanted] if count and select_topk > 0 else np.inf
        mask = np.asarray(variance >= threshold, np.float64)
    votes = [mask * delta for delta in deltas]
    energy = [float(np.sum(vote**2)) for vote in votes]
    whole = sum(energy)
    weights = [number / whole if whole else 1 / len(votes) for number in energy]
    terms = [weight * vote for weight, vote in zip(weights, votes, strict=True)]
    return consensus(terms, weights, True, 1.0, votes)


def ram(deltas: Sequence[Array], epsilon: float) -> Answer:
    return ramplus_tl(deltas, 0.0, 0.0, epsilon)


def ramplus_tl(deltas: Sequence[Array], r: float, alpha: float, epsilon: float) -> Answer:
    changed = np.array([np.abs(delta) > np.float32(epsilon) for delta in deltas])
    count = changed.sum(0)
    terms = []
    for delta, mask in zip(deltas, changed, strict=True):
        alone, shared = (mask & (count == 1)).sum(), (mask & (count > 1)).sum()
        factor = 1 + r * min(alpha, shared / alone if alone else np.inf)
        terms.append(delta * mask * np.where(count == 1, factor, 1 / np.maximum(count, 1)))
    return Answer((np.sum(terms, axis=0),), np.sum(np.abs(terms), axis=0) + np.sum(np.abs(deltas), axis=0))


ORACLES: Mapping[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        *(linear, fisher, regmean, aim, passthrough, slerp, task_arithmetic, metagpt, nan, ties),
        *(dare_linear, dare_ties),
        *(breadcrumbs, breadcrumbs_ties, della, della_linear, sce, ram, ramplus_tl),
        *(nuslerp, multislerp, karcher, nearswap, arcee_fusion, model_stock),
    )
} | {**MASKS, **SPECTRAL}
