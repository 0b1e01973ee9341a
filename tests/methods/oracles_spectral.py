"""The formulas of the methods on singular values, once more: numpy's SVD, float64. Shares no code with
`merger.methods`. Where the formula itself leaves the singular vectors open (equal singular values at a cut), or
magnifies rounding without bound, the size of the answer is infinite: anything is right."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .answer import Answer, Array, consensus, trimmed

TINY = 1e-6
EPS = 1e-16


@dataclass(frozen=True)
class Triples:
    """Singular triples, and by how much of themselves they may be wrong when computed by a Gram matrix."""

    left: Array
    values: Array
    right: Array
    error: float


def _unsure(numbers: Array, edge: float) -> bool:
    return bool(edge and np.any((numbers > edge / 3) & (numbers < edge * 3)))


def _svd(matrix: Array, top: int | None = None, noise: float = 0.0) -> Triples:
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    edge = max(noise, TINY * values[0])
    count = int((values > edge).sum())
    kept = count if top is None else min(top, count)
    error = np.inf if _unsure(values[: None if top is None else top], edge) else 0.0
    if kept:
        error += EPS * (values[0] / values[kept - 1]) ** 2
    if 0 < kept < count:
        gap = (values[kept - 1] ** 2 - values[kept] ** 2) / values[0] ** 2
        error += EPS / gap if gap > 1e-12 else np.inf
    return Triples(left[:, :kept], values[:kept], right[:kept], error)


def _isometry(factor: Array, error: float) -> tuple[Array, float]:
    """The polar factor, and its error given that of `factor`."""
    if not factor.size:
        return factor, error
    parts = _svd(factor)
    slope = parts.values[0] / parts.values[-1] if parts.values.size else 1.0
    return parts.left @ parts.right, parts.error + (error * slope if slope < 1e5 else np.inf)


def _answer(result: Array, like: Array, error: float, scale: float) -> Answer:
    unit = scale * (1 + 1e8 * error) if scale else 0.0
    return Answer((result.reshape(like.shape),), np.full(like.shape, unit))


def _matrices(deltas: Sequence[Array], weight: Sequence[float]) -> list[Array]:
    return [number * delta.reshape(len(delta), -1) for number, delta in zip(weight, deltas, strict=True)]


def _sum(deltas: Sequence[Array], factors: Sequence[float]) -> Answer:
    terms = [factor * delta for factor, delta in zip(factors, deltas, strict=True)]
    return Answer((np.sum(terms, axis=0),), np.sum(np.abs(terms), axis=0))


def _joined(parts: Sequence[Triples]) -> tuple[Array, Array, float]:
    error = sum(part.error for part in parts)
    left, left_error = _isometry(np.hstack([part.left for part in parts]), error)
    right, right_error = _isometry(np.vstack([part.right for part in parts]), error)
    return left, right, left_error + right_error


def tsvm(deltas: Sequence[Array], weight: Sequence[float], lambda_: float, spectral: bool) -> Answer:
    models = len(deltas)
    matrices = _matrices(deltas, weight)
    kept = min(matrices[0].shape) // models
    if deltas[0].ndim < 2 or not spectral or not kept:
        return _sum(deltas, [lambda_ * number / models for number in weight])
    parts = [_svd(matrix, kept) for matrix in matrices]
    left, right, error = _joined(parts)
    values = np.concatenate([part.values for part in parts])
    return _answer(lambda_ * (left * values) @ right, deltas[0], error, abs(lambda_) * float(values.sum()))


def iso_c(deltas: Sequence[Array], weight: Sequence[float], lambda_: float, spectral: bool) -> Answer:
    if deltas[0].ndim < 2 or not spectral:
        return _sum(deltas, [lambda_ * number / len(deltas) for number in weight])
    total = np.sum(_matrices(deltas, weight), axis=0)
    vectors, error = _isometry(total, EPS * _growth(_matrices(deltas, weight), total))
    mean = lambda_ * float(np.linalg.svd(total, compute_uv=False).mean())
    return _answer(mean * vectors, deltas[0], error, abs(mean))


def _growth(terms: Sequence[Array], total: Array) -> float:
    """How much larger what was added up is than the sum."""
    norm = float(np.linalg.norm(total))
    return sum(float(np.linalg.norm(term)) for term in terms) / norm if norm else 1.0


def iso_cts(deltas: Sequence[Array], weight: Sequence[float], common: float, lambda_: float, spectral: bool) -> Answer:
    models, matrices = len(deltas), _matrices(deltas, weight)
    rank = min(matrices[0].shape)
    own = min(round((rank - int(rank * common)) / models), rank // models)
    if deltas[0].ndim < 2 or not spectral or not own:
        return iso_c(deltas, weight, lambda_, spectral)
    total = np.sum(matrices, axis=0)
    shared = _svd(total, rank - models * own)
    rests = [matrix - shared.left @ (shared.left.T @ matrix) for matrix in matrices]
    noise = [TINY * float(np.linalg.norm(matrix)) for matrix in matrices]
    parts = [shared, *(_svd(rest, own, edge) for rest, edge in zip(rests, noise, strict=True))]
    left, right, error = _joined(parts)
    magnified = [n / TINY / p.values[-1] for n, p in zip(noise, parts[1:], strict=True) if p.values.size]
    error += (shared.error + EPS * _growth(matrices, total)) * sum(magnified) ** 2
    mean = lambda_ * sum(float(part.values.sum()) for part in parts) / rank
    return _answer(mean * left @ right, deltas[0], error, abs(mean))


def knots(
    deltas: Sequence[Array],
    weight: Sequence[float],
    density: Sequence[float],
    normalize: bool,
    lambda_: float,
    spectral: bool,
) -> Answer:
    if deltas[0].ndim < 2 or not spectral:
        kept = [number * trimmed(*pair) for number, pair in zip(weight, zip(deltas, density, strict=True), strict=True)]
        return consensus(kept, weight, normalize, lambda_)
    matrices = _matrices(deltas, [1.0] * len(deltas))
    tall = matrices[0].shape[0] > matrices[0].shape[1]
    matrices = [matrix.T for matrix in matrices] if tall else matrices
    parts = _svd(np.hstack(matrices))
    basis = parts.left * np.sign(parts.left[np.abs(parts.left).argmax(0), range(parts.values.size)])
    terms, doubtful = [], np.zeros(matrices[0].shape[1], bool)
    for matrix, number, share in zip(matrices, weight, density, strict=True):
        part, unsure = _coordinates(basis.T @ matrix, np.linalg.norm(matrix, axis=0), share)
        terms.append(number * part)
        doubtful |= unsure
    merged = consensus(terms, weight, normalize, lambda_)
    size = np.sum(np.abs(terms), axis=0)
    doubtful |= ((np.abs(np.sum(terms, axis=0)) < 1e-5 * size) & (size > 0)).any(0)
    error = parts.error + (EPS / _gap(parts.values) if len(deltas) > 1 or min(density) < 1 else 0.0)
    unit = np.where(doubtful, np.inf, merged.size.sum(0) * (1 + 1e8 * error)) if size.any() else 0.0 * size.sum(0)
    result, sizes = basis @ merged.right[0], np.broadcast_to(unit, matrices[0].shape).copy()
    turned = (result.T, sizes.T) if tall else (result, sizes)
    return Answer((turned[0].reshape(deltas[0].shape),), turned[1].reshape(deltas[0].shape))


def _coordinates(part: Array, lengths: Array, share: float) -> tuple[Array, Array]:
    """A task in the basis, trimmed; and the columns in which rounding decides what stays."""
    magnitudes = np.abs(part)
    noise = np.broadcast_to(TINY * lengths, part.shape)
    unsure = (magnitudes > noise / 3) & (magnitudes < 3 * noise)
    part = np.where(magnitudes <= noise, 0.0, part)
    if share <= 0 or not part.size:
        return np.zeros_like(part), unsure.any(0)
    threshold = np.sort(np.abs(part).ravel())[-max(1, int(share * part.size))]
    near = (np.abs(np.abs(part) - threshold) < 1e-5 * threshold) if share < 1 else np.zeros_like(part, bool)
    unsure |= near if near.sum() > 1 else False
    return np.where(np.abs(part) >= threshold, part, 0.0), unsure.any(0)


def _gap(values: Array) -> float:
    """The least distance of two squared singular values, against the largest."""
    if values.size < 2:
        return 1.0
    gap = float(np.min(values[:-1] ** 2 - values[1:] ** 2) / values[0] ** 2)
    return gap if gap > 1e-12 else 1e-300


def _task_arithmetic(deltas: Sequence[Array], weight: Sequence[float], normalize: bool, lambda_: float) -> Answer:
    total = sum(weight) if normalize and sum(weight) else 1.0
    return _sum(deltas, [lambda_ * number / total for number in weight])


def subspace_boosting(
    deltas: Sequence[Array], weight: Sequence[float], beta: float, normalize: bool, lambda_: float, spectral: bool
) -> Answer:
    merged = _task_arithmetic(deltas, weight, normalize, lambda_)
    if deltas[0].ndim < 2 or not spectral or beta >= 1:
        return merged
    (matrix,) = _matrices(merged.right, [1.0])
    parts = _svd(matrix)
    if not parts.values.size:
        return _answer(matrix, deltas[0], 0.0, float(merged.size.max()))
    shares = np.cumsum(parts.values) / parts.values.sum()
    cut = int(np.argmax(shares >= beta))
    error = np.inf if np.any(np.abs(shares - beta) < 1e-9) and beta else parts.error
    error += EPS * float(merged.size.max()) / parts.values[-1]
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    raised = np.where(values > TINY * values[0], np.maximum(values, values[cut]), values)
    return _answer((left * raised) @ right, deltas[0], error, float(values[0]))


def svc(
    deltas: Sequence[Array],
    weight: Sequence[float],
    alpha: float,
    merged_first: bool,
    normalize: bool,
    lambda_: float,
    spectral: bool,
) -> Answer:
    sources, tasks = (deltas[:1], deltas[1:]) if merged_first else (deltas, deltas)
    merged = _task_arithmetic(sources, weight[: len(sources)], normalize, lambda_)
    if deltas[0].ndim < 2 or not spectral:
        return merged
    (matrix,) = _matrices(merged.right, [1.0])
    parts = _svd(matrix)
    if not parts.values.size:
        return _answer(matrix, deltas[0], 0.0, float(merged.size.max()))
    error = parts.error + EPS / _gap(parts.values) + EPS * float(merged.size.max()) / parts.values[-1]
    counted, worst = np.zeros(parts.values.size), 1.0
    for task in _matrices(tasks, [1.0] * len(tasks)):
        response = parts.left.T @ task
        length = np.linalg.norm(response, axis=1)
        here = np.where(length <= TINY * parts.values, 0.0, _ratio(parts, response, length))
        counted += np.maximum(alpha, here)
        heard = length / parts.values
        error += np.inf if np.any((heard > 1e-12) & (heard < 1e-4)) else 0.0
        if heard.max() > 1e-12:
            worst = max(worst, float(np.linalg.norm(task) / length[heard > 1e-12].min()))
    error += np.inf if np.any((counted > 0) & (counted < 1e-6)) else 0.0
    factors = np.where(counted > 0, len(tasks) / np.where(counted > 0, counted, 1.0), 1.0)
    scale = float((parts.values * factors).max())
    return _answer((parts.left * factors * parts.values) @ parts.right, deltas[0], error * worst**2, scale)


def _ratio(parts: Triples, response: Array, length: Array) -> Array:
    dots = np.sum(parts.values[:, None] * parts.right * response, axis=1)
    return np.asarray(dots / np.where(length > 0, length, 1.0) ** 2)


SPECTRAL: Mapping[str, Callable[..., Any]] = {
    function.__name__: function for function in (tsvm, iso_c, iso_cts, knots, subspace_boosting, svc)
}
