"""Means on the sphere of directions: SLERP, NuSLERP and NearSwap of two models, Multi-SLERP and Karcher of any.

Each is a sum of the tensors times one number each, and those numbers follow from the dot products of the tensors with
each other: one pass measures these, and what iterates does so on a handful of numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from merger.methods.registry import Paper, PerModel, Range, Tensors, endpoints, merge_method
from merger.methods.steps.arithmetic import (
    Blocks,
    add_scaled,
    multiple,
    per_model,
    refuse_zero_sum,
    scale_lines,
    square,
    tensor_dots,
    weighted_sum,
)
from merger.methods.steps.rows import as_rows, column_dots, row_dots, whole_dots
from merger.methods.steps.step import Array, new, step

if TYPE_CHECKING:
    from merger.methods.steps.rows import Floats

# The name is that of a paper from 1990; the centre of mass is Grove's and Karcher's, and the method best told here.
_KARCHER = Paper(
    "Hermann Karcher",
    1977,
    "Riemannian center of mass and mollifier smoothing",
    "https://doi.org/10.1002/cpa.3160300502",
)

_OPPOSITE = -1 + 1e-6  # as in slerp: closer than that, the direction between two is float32's rounding
_CANCELLED = 1e-4  # a sum of unit vectors shorter than that share of its terms: its direction is rounding too
_NEAREST = 1e-7  # angles below are noise: a cosine in float64 tells no smaller ones apart
_SPECK = 1e-30  # of the largest norm; float32 could not hold the factor that would bring a smaller tensor to its size


@dataclass(frozen=True)
class Directions:
    """The tensors' norms, and the dot products of their directions; a zero tensor has none, and products of 0."""

    norms: tuple[float, ...]
    cosines: tuple[tuple[float, ...], ...]

    def along(self, vector: Sequence[float]) -> list[float]:
        """The dot products of each direction with a sum of directions, which is given by its coefficients."""
        return [math.fsum(cosine * part for cosine, part in zip(row, vector, strict=True)) for row in self.cosines]

    def length(self, vector: Sequence[float]) -> float:
        """The norm of a sum of directions."""
        products = (part * dot for part, dot in zip(vector, self.along(vector), strict=True))
        return math.sqrt(max(0.0, math.fsum(products)))

    def factors(self, vector: Sequence[float], norm: float) -> tuple[float, ...]:
        """What each tensor is multiplied by to make `norm` times a sum of their directions."""
        return tuple(norm * part / own if own else 0.0 for part, own in zip(vector, self.norms, strict=True))


def directions(blocks: Blocks) -> Directions:
    """The norms and the angles of whole tensors, in one pass."""
    dots = square(tensor_dots(blocks))
    norms = [math.sqrt(row[place]) for place, row in enumerate(dots)]
    norms = [norm if norm > _SPECK * max(norms) else 0.0 for norm in norms]
    cosines = [
        [dot / (own * other) if own and other else 0.0 for dot, other in zip(row, norms, strict=True)]
        for row, own in zip(dots, norms, strict=True)
    ]
    return Directions(tuple(norms), tuple(map(tuple, cosines)))


# Multi-SLERP


def _check(weight: Sequence[float], normalize_weights: bool) -> None:
    refuse_zero_sum(weight, "normalize_weights" if normalize_weights else None)


def measure_multislerp(
    blocks: Blocks, weight: Sequence[float], normalize_weights: bool = True, eps: float = 1e-8
) -> tuple[float, ...]:
    """What each tensor is multiplied by."""
    found = directions(blocks)
    total = math.fsum(weight) if normalize_weights else 1.0
    weights = [number / total for number in weight]
    length = found.length(weights)
    terms = math.fsum(abs(number) for number, norm in zip(weights, found.norms, strict=True) if norm)
    if length < max(eps, _CANCELLED * terms) or not length:
        return tuple(weights)
    norm = math.fsum(number * own for number, own in zip(weights, found.norms, strict=True))
    return found.factors(weights, norm / length)


@merge_method(
    "multislerp",
    title="Multi-SLERP",
    formula=(
        r"\theta = \sum_i w_i \lVert \theta_i \rVert \cdot \frac{m}{\lVert m \rVert}, \quad m = \sum_i"
        r" w_i \frac{\theta_i}{\lVert \theta_i \rVert}"
    ),
    models=(2, None),
    base="optional",
    measure=measure_multislerp,
    searches=False,
    check=_check,
    laws=("zero", "idempotent", "permutation", "scale"),
)
def multislerp(
    tensors: Tensors,
    weight: PerModel = 1.0,
    normalize_weights: bool = True,
    eps: Annotated[float, Range(0)] = 1e-8,
    *,
    measured: tuple[float, ...] | None = None,
) -> Array:
    """The weighted mean of the models' directions, with the weighted mean of their norms.

    With uᵢ = θᵢ / ‖θᵢ‖ and the weights divided by their sum if normalize_weights, the result is
    Σ wᵢ ‖θᵢ‖ · m / ‖m‖, m = Σ wᵢ uᵢ. With a base, τᵢ = θᵢ − θ₀ stand in for θᵢ, and θ₀ is added. Where ‖m‖ < eps no
    direction is left, and the result is Σ wᵢ θᵢ.

    Departs from mergekit: its step in the tangent space at m̂ = m / ‖m‖, Σ wᵢ (uᵢ − (uᵢ·m̂) m̂), is not taken, for it
    is m − (m·m̂) m̂ = 0; three models or more that cancel fall back to Σ wᵢ θᵢ as two do, where there the merge ends
    in an error, also for a tensor that no model has changed; ‖m‖ below 1e-4 Σ |wᵢ| counts as cancelled, its direction
    being rounding; eps is not added to norms, so that small task vectors keep their size; weights that sum to zero are
    an error under normalize_weights; and weight may be left out. Norms and angles are float64.

    Args:
        weight: how much each model counts, in the direction and in the norm.
        normalize_weights: divide by the sum of the weights, so that only their ratios count.
        eps: the length below which the mean of the directions is none.

    >>> import numpy as np
    >>> multislerp([np.float32([4, 0, 0, 0]), np.float32([0, 2, 0, 0])]).round(4)
    array([2.1213, 2.1213, 0.    , 0.    ], dtype=float32)
    """
    weights = per_model(weight, len(tensors))
    _check(weights, normalize_weights)
    return weighted_sum(tensors, measured or measure_multislerp([tensors], weights, normalize_weights, eps))


# Karcher mean


def measure_karcher(blocks: Blocks, max_iter: int = 10, tol: float = 1e-5) -> tuple[float, ...]:
    """What each tensor is multiplied by."""
    found = directions(blocks)
    if not any(found.norms):
        return found.norms
    return found.factors(_centre(found, max_iter, max(tol, _NEAREST)), math.fsum(found.norms) / len(found.norms))


def _centre(found: Directions, max_iter: int, tol: float) -> list[float]:
    """The centre of the directions, as the coefficients of a sum of them."""
    centre = _start(found, tol)
    for _ in range(max_iter):
        step = _step(found, centre, tol)
        length = found.length(step)
        if length < tol:
            break
        ahead = math.sin(length) / length
        moved = [math.cos(length) * here + ahead * there for here, there in zip(centre, step, strict=True)]
        norm = found.length(moved)
        centre = [part / norm for part in moved]
    return centre


def _start(found: Directions, tol: float) -> list[float]:
    """The mean of the directions, normalised; the first of them where they cancel."""
    used = [1.0 if norm else 0.0 for norm in found.norms]
    length = found.length(used)
    if length >= tol * sum(used):
        return [part / length for part in used]
    return [1.0 if place == used.index(1) else 0.0 for place in range(len(used))]


def _step(found: Directions, centre: Sequence[float], tol: float) -> list[float]:
    """The mean of the arcs from the centre to each direction, in the tangent space there."""
    dots = found.along(centre)
    used = sum(map(bool, found.norms))
    pulls = [_pull(dot, tol) / used if norm else 0.0 for dot, norm in zip(dots, found.norms, strict=True)]
    back = math.fsum(pull * dot for pull, dot in zip(pulls, dots, strict=True))
    return [pull - back * here for pull, here in zip(pulls, centre, strict=True)]


def _pull(cosine: float, tol: float) -> float:
    """ω / sin ω; 0 for a direction that is reached already, and for one so opposite that no way to it is shorter."""
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    return 0.0 if angle < tol or cosine < _OPPOSITE else angle / math.sin(angle)


@merge_method(
    "karcher",
    title="Karcher mean",
    formula=(
        r"\theta = \tfrac1N \sum_i \lVert \theta_i \rVert \cdot \arg\min_c \sum_i \angle(c, \theta_i)^2,"
        r"\quad \lVert c \rVert = 1"
    ),
    paper=_KARCHER,
    models=(2, None),
    base="included",
    measure=measure_karcher,
    searches=False,
    laws=("zero", "idempotent", "permutation", "scale"),
)
def karcher(
    tensors: Tensors,
    max_iter: Annotated[int, Range(0, 10_000)] = 10,
    tol: Annotated[float, Range(0)] = 1e-5,
    *,
    measured: tuple[float, ...] | None = None,
) -> Array:
    """The centre of mass of the models' directions on the sphere, with the mean of their norms.

    With uᵢ = θᵢ / ‖θᵢ‖ and c the mean of the uᵢ normalised (the first of them where that mean is shorter than tol),
    repeated at most max_iter times: T = mean of ωᵢ / sin ωᵢ · (uᵢ − cos ωᵢ c) over the models, ωᵢ being the angle
    between c and uᵢ, without those of ωᵢ < tol; stop where ‖T‖ < tol; c ← cos ‖T‖ c + sin ‖T‖ T / ‖T‖, normalised. The
    result is the mean of the ‖θᵢ‖ times c. Zero tensors have no direction, but count in the mean of the norms. A base
    model that the recipe names is one more model. For two models it is their slerp at 0.5, but for the norm.

    Departs from mergekit: a small tensor has a direction, where there norms of tol and less count as zero; a uᵢ that
    is opposite to c (cos ωᵢ < −1 + 1e-6) draws it nowhere, where there it is thrown to a point made of rounding; a tol
    below 1e-7 counts as 1e-7. All but the final sum is float64, whatever the dtype.

    Args:
        max_iter: how many steps at most.
        tol: the angle, in radians, that counts as none; a step shorter than that is the last.

    >>> import numpy as np
    >>> karcher([np.float32([3, 0, 0, 0]), np.float32([0, 1, 0, 0])]).round(4)
    array([1.4142, 1.4142, 0.    , 0.    ], dtype=float32)
    """
    return weighted_sum(tensors, measured or measure_karcher([tensors], max_iter, tol))


# ---- slerp ----------------------------------------------------------------------------------------------------------


_PAPER = Paper(
    "Ken Shoemake", 1985, "Animating rotation with quaternion curves", "https://dl.acm.org/doi/10.1145/325165.325242"
)

_PARALLEL = 0.9995  # mergekit's


@dataclass(frozen=True)
class Angle:
    """The two norms and the dot product of two whole tensors."""

    first: float
    second: float
    dot: float


def measure_slerp(blocks: Blocks, t: float) -> Angle | None:
    """The norms and the dot product, in float64; nothing is read where the result is an endpoint."""
    if t in (0, 1):
        return None
    first, dot, second = tensor_dots(blocks)
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
    measure=measure_slerp,
    searches=False,
    laws=("zero", "idempotent", "scale", endpoints("t")),
)
def slerp(tensors: Tensors, t: float, *, measured: Angle | None = None) -> Array:
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

    >>> import numpy as np
    >>> a, b = np.float32([1, 0, 0, 0]), np.float32([0, 1, 0, 0])
    >>> slerp([a, b], t=0.5).round(4)
    array([0.7071, 0.7071, 0.    , 0.    ], dtype=float32)
    """
    angle = measured or measure_slerp([tensors], t)
    if angle is None or t in (0, 1):
        return multiple(tensors[int(t)], 1.0)
    return weighted_sum(tensors, coefficients(t, angle))


def coefficients(t: float, angle: Angle, parallel: float = _PARALLEL) -> tuple[float, float]:
    """What the first and the second tensor are multiplied by; above the cosine `parallel`, linearly."""
    norms = angle.first * angle.second
    cosine = angle.dot / norms if norms else 1.0
    if cosine > parallel:
        return 1 - t, t
    if cosine < _OPPOSITE:
        norm = (1 - t) * angle.first + t * angle.second
        return (norm / angle.first, 0.0) if t <= 0.5 else (0.0, norm / angle.second)
    omega = math.acos(cosine)
    return math.sin((1 - t) * omega) / math.sin(omega), math.sin(t * omega) / math.sin(omega)


# ---- nuslerp --------------------------------------------------------------------------------------------------------


_NUSLERP_PARALLEL = 1 - 1e-12  # there the arc and the straight line are one in float64


def measure_nuslerp(
    blocks: Blocks, weight: Sequence[float], nuslerp_flatten: bool = True, nuslerp_row_wise: bool = False
) -> tuple[Floats, Floats] | None:
    """The factors of the whole tensors, or of their columns; nothing is read for an endpoint, or row by row."""
    t = _share(weight)
    if t in (0, 1) or not (nuslerp_flatten or nuslerp_row_wise):
        return None
    return _factors(t, whole_dots(blocks) if nuslerp_flatten else column_dots(blocks))


@merge_method(
    "nuslerp",
    title="NuSLERP",
    formula=(
        r"\theta = \frac{\sin((1 - t) \omega)}{\sin\omega} a + \frac{\sin(t \omega)}{\sin\omega} b,"
        r"\quad t = \frac{w_2}{w_1 + w_2}, \quad \cos\omega = \frac{a \cdot b}{\lVert a \rVert \lVert b \rVert}"
    ),
    models=(2, 2),
    base="optional",
    unit="rows",
    measure=measure_nuslerp,
    searches=False,
    laws=("zero", "idempotent", "permutation", "scale"),
)
def nuslerp(
    tensors: Tensors,
    weight: PerModel = 1.0,
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
    *,
    measured: tuple[Any, Any] | None = None,
) -> Array:
    """Along the arc between two models, or between their task vectors where the recipe names a base.

    With t = w₂ / (w₁ + w₂), or 0.5 where |w₁ + w₂| < 1e-6, and ω the angle between a and b, the result is
    sin((1−t) ω) / sin ω · a + sin(t ω) / sin ω · b. With a base, a and b are θ₁ − θ₀ and θ₂ − θ₀, and θ₀ is added. By
    default ω is that of whole tensors. With nuslerp_flatten false each row (along the last dimension) has its own, and
    with nuslerp_row_wise as well, each column: the name means rows of the transposed matrix. A tensor of one dimension
    is one vector throughout, and so is a matrix of one row.

    Departs from mergekit: opposite vectors (cos ω < −1 + 1e-6) do not cancel at t = 0.5, the result has the direction
    of the nearer one and the norm (1−t) ‖a‖ + t ‖b‖, as in slerp; a zero vector leaves (1−t) a + t b, where there it
    is taken as orthogonal, and norms below 1e-7 are norms; columns of a tensor of more than two dimensions run through
    all but the last one, where there they run along the first; weight may be left out. Angles are float64, t = 0 and 1
    give a and b exactly.

    Args:
        weight: how much of each model; only the ratio of the two counts.
        nuslerp_flatten: one angle for the whole tensor.
        nuslerp_row_wise: without nuslerp_flatten, an angle for each column in place of each row.

    >>> import numpy as np
    >>> a, b = np.float32([[1, 0], [2, 0]]), np.float32([[0, 1], [4, 0]])
    >>> nuslerp([a, b], weight=[1, 1], nuslerp_flatten=False).round(4)
    array([[0.7071, 0.7071],
           [3.    , 0.    ]], dtype=float32)
    """
    t = _share(per_model(weight, 2))
    if t in (0, 1):
        return multiple(tensors[int(t)], 1.0)
    rows, by_row = [as_rows(tensor) for tensor in tensors], not (nuslerp_flatten or nuslerp_row_wise)
    if by_row:
        first, second = _factors(t, row_dots(rows))
    else:
        found = measured or measure_nuslerp([rows], per_model(weight, 2), nuslerp_flatten, nuslerp_row_wise)
        assert found is not None
        first, second = found
    if len(first) == 1:
        return weighted_sum(tensors, [float(first[0]), float(second[0])])
    total = scale_lines(tensors[0], first, by_row)
    add_scaled(total, scale_lines(tensors[1], second, by_row), 1.0)
    return total


def _share(weight: Sequence[float]) -> float:
    """How far to go from the first to the second."""
    first, second = weight
    return second / (first + second) if abs(first + second) >= 1e-6 else 0.5


def _factors(t: float, dots: Floats) -> tuple[Floats, Floats]:
    """The coefficients of each arc, from its start's squared norm, the dot product, and its end's squared norm."""
    import numpy as np

    norms = np.sqrt(dots[[0, 2]]).tolist()
    arcs = zip(*norms, dots[1].tolist(), strict=True)
    first, second = zip(*(coefficients(t, Angle(*arc), _NUSLERP_PARALLEL) for arc in arcs), strict=True)
    return np.array(first), np.array(second)


# ---- nearswap -------------------------------------------------------------------------------------------------------


@step("void(float32[::1], float32[::1], float32, float32[::1])")
def clamp_near(base: Array, other: Array, most: float, out: Array) -> None:
    """The other's entry, or what is nearest to it of what is at most so far from the base's."""
    for i in range(out.size):
        low, high = base[i] - most, base[i] + most
        raised = low if low > other[i] or low != low else other[i]
        out[i] = raised if raised < high or raised != raised else high


@merge_method(
    "nearswap",
    title="NearSwap",
    formula=r"\theta = w b + (1 - w) a, \quad w = \min\left(1, \frac{t}{\lvert a - b \rvert}\right)",
    models=(2, 2),
    base="first",
    laws=("zero", "idempotent"),
)
def nearswap(tensors: Tensors, t: Annotated[float, Range(0)]) -> Array:
    """The other model's entries where they are near the base's, and a small step towards them elsewhere.

    At each entry w b + (1−w) a, with a the base's, b the other model's and w = min(1, t / |a − b|): that is b where it
    is no further than t away, else a moved by t towards b, so it is computed as b clamped to [a − t, a + t]. First
    made by alchemonaut for the model QuartetAnemoi-70B-t0.0001; there is no paper.

    Departs from mergekit: a difference below 1e-6 is not taken for 1e-6, so that a t below that still reaches b; where
    w = 1 the result is b to the bit; a negative t, which leaves the base as it is, is refused.

    Args:
        t: how far an entry may move from the base's.

    >>> import numpy as np
    >>> a, b = np.float32([1, 1, 1, 1]), np.float32([1.25, 3, -2, 1])
    >>> nearswap([a, b], t=0.5)
    array([1.25, 1.5 , 0.5 , 1.  ], dtype=float32)
    """
    base, other = tensors
    clamp_near(base, other, t, out := new(base))
    return out
