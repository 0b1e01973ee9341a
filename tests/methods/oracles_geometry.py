"""The formulas of the methods that go by angles and distances, as `oracles` has those of the others.

Vectors are handled as vectors here, in float64: no dot products are kept in place of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .answer import Answer, Array, either, summed


def _rows(tensor: Array) -> Array:
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim > 1 else tensor.reshape(1, -1)


def _arc(t: float, a: Array, b: Array) -> Answer:
    """The arc between two vectors; half way between opposite ones either direction is right."""
    na, nb = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    cosine = float(np.sum(a * b) / (na * nb)) if na * nb else 1.0
    if t in (0, 1) or cosine > 1 - 1e-12:
        return summed([a, b], [1 - t, t])
    if cosine < -1 + 1e-6:
        norm = (1 - t) * na + t * nb
        first, second = summed([a, b], [norm / na, 0]), summed([a, b], [0, norm / nb])
        return either(first, second) if t == 0.5 else first if t < 0.5 else second
    omega = np.arccos(cosine)
    return summed([a, b], [np.sin((1 - t) * omega) / np.sin(omega), np.sin(t * omega) / np.sin(omega)])


def nuslerp(tensors: Sequence[Array], weight: Sequence[float], nuslerp_flatten: bool, nuslerp_row_wise: bool) -> Answer:
    first, second = weight
    t = second / (first + second) if abs(first + second) >= 1e-6 else 0.5
    a, b = (_rows(tensor) for tensor in tensors)
    if nuslerp_flatten or (nuslerp_row_wise and len(a) == 1):
        parts = [_arc(t, a.ravel(), b.ravel())]
    elif nuslerp_row_wise:
        parts = [_arc(t, *columns) for columns in zip(a.T, b.T, strict=True)]
    else:
        parts = [_arc(t, *rows) for rows in zip(a, b, strict=True)]
    sizes = np.concatenate([part.size for part in parts])
    rights = [np.concatenate([part.right[place % len(part.right)] for part in parts]) for place in (0, 1)]
    by_columns = nuslerp_row_wise and not nuslerp_flatten and len(a) > 1
    shape = a.T.shape if by_columns else a.shape

    def placed(entries: Array) -> Array:
        table = entries.reshape(shape)
        return (table.T if by_columns else table).reshape(tensors[0].shape)

    return Answer((placed(rights[0]), placed(rights[1])), placed(sizes))


def multislerp(tensors: Sequence[Array], weight: Sequence[float], normalize_weights: bool, eps: float) -> Answer:
    """mergekit's formula with its step in the tangent space, which turns out to be none."""
    weights = [number / (sum(weight) if normalize_weights else 1.0) for number in weight]
    norms = [float(np.linalg.norm(tensor)) for tensor in tensors]
    units = [tensor / norm if norm else tensor for tensor, norm in zip(tensors, norms, strict=True)]
    mean = np.sum([number * unit for number, unit in zip(weights, units, strict=True)], axis=0)
    length = float(np.linalg.norm(mean))
    terms = sum(abs(number) for number, norm in zip(weights, norms, strict=True) if norm)
    if length < max(eps, 1e-4 * terms) or not length:
        return summed(tensors, weights)
    m = mean / length
    tangents = [unit - np.sum(unit * m) * m for unit in units]
    v = np.sum([number * tangent for number, tangent in zip(weights, tangents, strict=True)], axis=0)
    turn = float(np.linalg.norm(v)) + 1e-8
    norm = sum(number * own for number, own in zip(weights, norms, strict=True))
    result = (np.cos(turn) * m + v * np.sin(turn) / turn) * norm
    size = summed(units, [abs(norm) / length * number for number in weights]).size
    return Answer((result,), size)


def karcher(tensors: Sequence[Array], max_iter: int, tol: float) -> Answer:
    """Where the mean of the directions is none, each of them is a start that is right."""
    tol = max(tol, 1e-7)
    norms = [float(np.linalg.norm(tensor)) for tensor in tensors]
    units = [tensor / norm for tensor, norm in zip(tensors, norms, strict=True) if norm]
    size = np.sum(np.abs([np.mean(norms) * unit for unit in units] or [tensors[0]]), axis=0)
    if not units:
        return Answer((np.zeros_like(tensors[0]),), size)
    mean = np.mean(units, axis=0)
    length = float(np.linalg.norm(mean))
    starts = units if length < tol else [mean / length]
    rights = tuple(np.mean(norms) * _settled(start, units, max_iter, tol) for start in starts)
    return Answer(rights, np.maximum(size, np.max(np.abs(rights), axis=0)))


def _settled(u: Array, units: Sequence[Array], max_iter: int, tol: float) -> Array:
    for _ in range(max_iter):
        step = np.mean([_towards(u, unit, tol) for unit in units], axis=0)
        length = float(np.linalg.norm(step))
        if length < tol:
            break
        u = np.cos(length) * u + np.sin(length) * step / length
        u = u / np.linalg.norm(u)
    return u


def _towards(u: Array, unit: Array, tol: float) -> Array:
    cosine = float(np.clip(np.sum(u * unit), -1, 1))
    omega = np.arccos(cosine)
    if omega < tol or cosine < -1 + 1e-6:
        return np.zeros_like(u)
    return np.asarray(omega / np.sin(omega) * (unit - cosine * u))


def nearswap(tensors: Sequence[Array], t: float) -> Answer:
    a, b = tensors
    distance = np.abs(a - b)
    w = np.clip(np.divide(t, distance, out=np.ones_like(a), where=distance > 0), 0, 1)
    return Answer((w * b + (1 - w) * a,), np.abs(a) + np.abs(b))


def arcee_fusion(tensors: Sequence[Array]) -> Answer:
    """Either entry where the importance equals the threshold but for float32's rounding."""
    a, b = (_rows(tensor) for tensor in tensors)
    p, q = (np.exp(rows - rows.max(1, keepdims=True)) for rows in (b, a))
    p, q = (rows / rows.sum(1, keepdims=True) + 1e-8 for rows in (p, q))
    importance = np.abs(b - a) * np.maximum((p * np.log(p / q)).sum(1, keepdims=True), 0)
    ordered = np.sort(importance.ravel())
    low, median, high = (ordered[int(share * (ordered.size - 1))] for share in (0.25, 0.5, 0.75))
    threshold = median + 1.5 * (high - low)
    rights = [np.where(importance >= threshold * share, b, a) for share in (1 - 1e-6, 1 + 1e-6)]
    shape = tensors[0].shape
    return Answer(tuple(right.reshape(shape) for right in rights), (np.abs(a) + np.abs(b)).reshape(shape))


def model_stock(deltas: Sequence[Array], filter_wise: bool) -> Answer:
    count = len(deltas)
    vectors = [_rows(delta) if filter_wise else delta.reshape(1, -1) for delta in deltas]
    cosines = [_cosines(vectors[i], vectors[j]) for i in range(count) for j in range(i)]
    cosine = np.maximum(np.mean(cosines, axis=0), 0)
    t = count * cosine / (1 + (count - 1) * cosine)
    answer = summed(vectors, [t[:, None] / count] * count)
    shape = deltas[0].shape
    return Answer(tuple(right.reshape(shape) for right in answer.right), answer.size.reshape(shape))


def _cosines(one: Array, other: Array) -> Array:
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return np.divide(np.sum(one * other, axis=1), norms, out=np.zeros_like(norms), where=norms > 0)
