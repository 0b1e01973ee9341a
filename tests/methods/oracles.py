"""Each method's formula once more, straight from the page: numpy, float64, whole tensors, sorts. Shares no code with
`merger.methods`. What an oracle gives is told in `answer`; the methods of angles are in `oracles_geometry`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


ORACLES: Mapping[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        *(linear, passthrough, slerp, task_arithmetic, ties, dare_linear, dare_ties),
        *(nuslerp, multislerp, karcher, nearswap, arcee_fusion, model_stock),
    )
} | {**MASKS, **SPECTRAL}
