"""SLERP: from one model's tensor to another's along the arc between them. Not here: more than two models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from merger.methods._ops import Blocks, dot_sums, weighted_sum
from merger.methods.registry import Paper, Tensors, endpoints, merge_method

if TYPE_CHECKING:
    from torch import Tensor

_PAPER = Paper(
    "Shoemake", 1985, "Animating rotation with quaternion curves", "https://dl.acm.org/doi/10.1145/325165.325242"
)

_PARALLEL = 0.9995  # mergekit's
_OPPOSITE = -1 + 1e-6  # closer than that, sin ω < 0.0015 would make noise of float32's rounding


@dataclass(frozen=True)
class Angle:
    """The two norms and the dot product of two whole tensors."""

    first: float
    second: float
    dot: float


def measure(blocks: Blocks, t: float) -> Angle | None:
    """The norms and the dot product, in float64; nothing is read where the result is an endpoint."""
    if t in (0, 1):
        return None
    chunks = [dots for block in blocks for dots in dot_sums(block)]
    first, dot, second = (math.fsum(column) for column in zip(*chunks, strict=True))
    return Angle(math.sqrt(first), math.sqrt(second), dot)


@merge_method(
    "slerp",
    title="SLERP",
    formula=(
        r"\theta = \frac{\sin((1 - t) \omega)}{\sin\omega} a + \frac{\sin(t \omega)}{\sin\omega} b,"
        r"\quad \cos\omega = \frac{a \cdot b}{\lVert a \rVert \lVert b \rVert}"
    ),
    paper=_PAPER,
    models=(2, 2),
    base="first",
    measure=measure,
    laws=("zero", "idempotent", "scale", endpoints("t")),
)
def slerp(tensors: Tensors, t: float, *, measured: Angle | None = None) -> Tensor:
    """From the base's tensor to the other's along the arc between their directions.

    With ω the angle between a and b as vectors, cos ω = a·b / (‖a‖ ‖b‖), the result is
    sin((1−t) ω) / sin ω · a + sin(t ω) / sin ω · b: the endpoints keep their own norms. Where cos ω > 0.9995 or a
    tensor is zero, (1−t) a + t b. A t outside 0 to 1 goes on along the arc.

    Departs from mergekit: the arc is followed as long as a and b define it, and for opposite tensors
    (cos ω < −1 + 1e-6) the result has the direction of the nearer one and the norm (1−t) ‖a‖ + t ‖b‖; there, where
    cos ω < −0.9995, the interpolation is linear, so that opposite tensors cancel at t = 0.5. A zero tensor there is
    taken as orthogonal, which gives 0.707 of the other at t = 0.5. Norms, dot product and angle are float64; t = 0 and
    1 give a and b exactly.

    Args:
        t: how far to go: 0 is the base, 1 the other model.

    >>> import torch
    >>> a, b = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0, 0.0])
    >>> slerp([a, b], t=0.5)
    tensor([0.7071, 0.7071, 0.0000, 0.0000])
    """
    angle = measured or measure([tensors], t)
    if angle is None or t in (0, 1):
        return tensors[int(t)].clone()
    return weighted_sum(tensors, coefficients(t, angle))


def coefficients(t: float, angle: Angle, parallel: float = _PARALLEL) -> tuple[float, float]:
    """What the first and the second tensor are multiplied by; above the cosine `parallel`, linearly."""
    norms = angle.first * angle.second
    cosine = angle.dot / norms if norms else 1.0
    if cosine > parallel:
        return 1 - t, t
    if cosine < _OPPOSITE:
        return _nearer(t, angle)
    omega = math.acos(cosine)
    return math.sin((1 - t) * omega) / math.sin(omega), math.sin(t * omega) / math.sin(omega)


def _nearer(t: float, angle: Angle) -> tuple[float, float]:
    norm = (1 - t) * angle.first + t * angle.second
    return (norm / angle.first, 0.0) if t <= 0.5 else (0.0, norm / angle.second)
