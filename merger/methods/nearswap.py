"""NearSwap: another model's entries where they are near the base's. Not here: interpolation by angle (slerp)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from merger.methods._ops import scratch
from merger.methods.registry import Range, Tensors, merge_method

if TYPE_CHECKING:
    from torch import Tensor


@merge_method(
    "nearswap",
    title="NearSwap",
    formula=r"\theta = w b + (1 - w) a, \quad w = \min\left(1, \frac{t}{\lvert a - b \rvert}\right)",
    models=(2, 2),
    base="first",
    laws=("zero", "idempotent"),
)
def nearswap(tensors: Tensors, t: Annotated[float, Range(0)]) -> Tensor:
    """The other model's entries where they are near the base's, and a small step towards them elsewhere.

    At each entry w b + (1−w) a, with a the base's, b the other model's and w = min(1, t / |a − b|): that is b where it
    is no further than t away, else a moved by t towards b, so it is computed as b clamped to [a − t, a + t]. First
    made by alchemonaut for the model QuartetAnemoi-70B-t0.0001; there is no paper.

    Departs from mergekit: a difference below 1e-6 is not taken for 1e-6, so that a t below that still reaches b; where
    w = 1 the result is b to the bit; a negative t, which leaves the base as it is, is refused.

    Args:
        t: how far an entry may move from the base's.

    >>> import torch
    >>> a, b = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([1.25, 3.0, -2.0, 1.0])
    >>> nearswap([a, b], t=0.5)
    tensor([1.2500, 1.5000, 0.5000, 1.0000])
    """
    import torch

    base, other = tensors
    result = torch.sub(base, t)
    torch.maximum(result, other, out=result)
    return torch.minimum(result, torch.add(base, t, out=scratch("scaled", base)), out=result)
