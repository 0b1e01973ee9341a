"""NuSLERP: along the arc between two tensors or task vectors, as wholes, row by row or column by column.

Not here: the arc itself (slerp), and more than two models (spherical).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from merger.methods._ops import Blocks, per_model, weighted_sum
from merger.methods._rows import as_rows, column_dots, row_dots, whole_dots
from merger.methods.registry import PerModel, Tensors, merge_method
from merger.methods.slerp import Angle, coefficients

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

_PARALLEL = 1 - 1e-12  # there the arc and the straight line are one in float64


@dataclass(frozen=True, eq=False)
class Factors:
    """What the first and the second tensor are multiplied by: one number for all of it, or for each column or row."""

    first: NDArray[np.float32]
    second: NDArray[np.float32]

    def tensors(self, like: Tensor) -> list[Tensor]:
        """The same, where `like` is."""
        import torch

        return [torch.from_numpy(numbers).to(like.device) for numbers in (self.first, self.second)]


def measure(
    blocks: Blocks, weight: Sequence[float], nuslerp_flatten: bool = True, nuslerp_row_wise: bool = False
) -> Factors | None:
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
    measure=measure,
    laws=("zero", "idempotent", "permutation", "scale"),
)
def nuslerp(
    tensors: Tensors,
    weight: PerModel = 1.0,
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
    *,
    measured: Factors | None = None,
) -> Tensor:
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

    >>> import torch
    >>> a, b = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 1.0], [4.0, 0.0]])
    >>> nuslerp([a, b], weight=[1, 1], nuslerp_flatten=False)
    tensor([[0.7071, 0.7071],
            [3.0000, 0.0000]])
    """
    t = _share(per_model(weight, 2))
    if t in (0, 1):
        return tensors[int(t)].clone()
    rows = [as_rows(tensor) for tensor in tensors]
    if nuslerp_flatten or nuslerp_row_wise:
        found = measured or measure([rows], per_model(weight, 2), nuslerp_flatten, nuslerp_row_wise)
        assert found is not None
        factors = found.tensors(rows[0])
    else:
        factors = [numbers.view(-1, 1) for numbers in _factors(t, row_dots(rows)).tensors(rows[0])]
    return weighted_sum(rows, factors).view(tensors[0].shape)


def _share(weight: Sequence[float]) -> float:
    """How far to go from the first to the second."""
    first, second = weight
    return second / (first + second) if abs(first + second) >= 1e-6 else 0.5


def _factors(t: float, dots: NDArray[np.float64]) -> Factors:
    """The coefficients of each arc, from its start's squared norm, the dot product, and its end's squared norm."""
    import numpy as np

    norms = np.sqrt(dots[[0, 2]]).tolist()
    arcs = zip(*norms, dots[1].tolist(), strict=True)
    first, second = zip(*(coefficients(t, Angle(*arc), _PARALLEL) for arc in arcs), strict=True)
    return Factors(np.array(first, np.float32), np.array(second, np.float32))
