"""The pieces that merge methods are composed of: sums, products, norms, and the blocks that a measure walks.

Every entry's steps are IEEE operations on float32 (a product and a sum, never a fused one), and every reduction adds in
one order in float64: so neither threads nor the machine's vector units change a bit. A piece allocates what it returns
and calls one or two steps. Not here: votes (`votes`), masks by counter (`random`), the search for a threshold
(`select`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from merger.methods.steps.dtypes import Tile
from merger.methods.steps.step import ONE, ZERO, Array, is_tensor, new, step, wide

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Blocks: TypeAlias = "Iterable[Sequence[Array]]"
"""The blocks of a whole tensor, each a list with one block a model; it may be walked several times.

They may know how many `entries` they hold, and how to read `spans` of them alone.
"""
Spans: TypeAlias = "Sequence[tuple[int, int]]"
"""Parts of a tensor, each from one entry to another, in order."""

Pair = TypeVar("Pair")


def per_model(value: float | Sequence[float], models: int) -> list[float]:
    """One number for each of `models`, from one for all of them or from as many."""
    if isinstance(value, (int, float)):
        return [float(value)] * models
    if len(value) != models:
        raise ValueError(f"{len(value)} numbers were given for {models} models")
    return [float(number) for number in value]


def refuse_zero_sum(weights: Sequence[float], setting: str | None) -> None:
    """Raise ValueError for weights whose sum is zero, where a setting says that it is divided by."""
    if setting and abs(math.fsum(weights)) < 1e-8:
        listed = ", ".join(f"{number:g}" for number in weights)
        raise ValueError(f"the weights {listed} sum to zero, and {setting} divides by their sum; set {setting}: false")


# ---- sums -----------------------------------------------------------------------------------------------------------


@step("void(float32[::1], float32, float32[::1])")
def scale(x: Array, factor: float, out: Array) -> None:
    """Each entry times a number."""
    for i in range(out.size):
        out[i] = x[i] * factor


@step("void(float32[::1], float32[::1], float32)")
def add_scaled(total: Array, x: Array, factor: float) -> None:
    """To each entry another one times a number."""
    for i in range(total.size):
        total[i] += x[i] * factor


@step("void(float32[::1], float32[::1])")
def multiply(total: Array, x: Array) -> None:
    """Each entry times another one."""
    for i in range(total.size):
        total[i] *= x[i]


@step("void(float32[::1], float32[::1], float32, float32[::1])")
def divide(x: Array, by: Array, factor: float, out: Array) -> None:
    """Each entry divided by another one (by 1 where that is zero), then times a number."""
    for i in range(out.size):
        out[i] = x[i] / (ONE if by[i] == ZERO else by[i]) * factor


def multiple(x: Array, factor: float) -> Array:
    """The tensor times a number."""
    out = new(x)
    scale(x, factor, out)
    return out


def scale_lines(x: Array, factors: NDArray[Any], by_row: bool) -> Array:
    """Each row, or each column, times its own number."""
    import numpy as np

    lines = x.reshape((len(factors), -1) if by_row else (-1, len(factors)))
    numbers: Any = np.asarray(factors, np.float32)[:, None] if by_row else np.asarray(factors, np.float32)
    if is_tensor(x):
        found: Array = (lines * _beside(numbers, x)).reshape(x.shape)
        return found
    np.multiply(lines, numbers, out=(out := new(x)).reshape(lines.shape))
    return out


def _beside(numbers: Any, x: Any) -> Any:
    """Numbers that were computed here, where a tensor is."""
    import torch

    return torch.from_numpy(numbers).to(x.device)


def weighted_sum(tensors: Iterable[Array], factors: Sequence[float]) -> Array:
    """The sum of each tensor times its factor."""
    if isinstance(tensors, Tile) and (found := tensors.weighted_sum(factors)) is not None:
        return found
    pairs = zip(tensors, factors, strict=True)
    total = multiple(*next(pairs))
    for tensor, factor in pairs:
        add_scaled(total, tensor, factor)
    return total


def divisor(weights: Sequence[float], normalize: bool) -> float:
    """What the weighted sum of task vectors is divided by: the weights' sum, or 1 where that is none."""
    total = math.fsum(weights)
    return total if normalize and abs(total) >= 1e-8 else 1.0


def quotient(x: Array, by: Array, factor: float = 1.0) -> Array:
    """Each entry divided by another one (by 1 where that is zero), then times a number."""
    out = new(x)
    divide(x, by, factor, out)
    return out


# ---- norms ----------------------------------------------------------------------------------------------------------

LANES, DEEP = 16, 8
"""Sums run in as many lanes, each over every 16th entry, in float64: an order that vectors have, too. A lane is in a
register for so many entries; in memory it would wait for itself each time."""


@step("void(float32[::1], float64[::1])")
def sum_magnitudes(x: Array, lanes: NDArray[np.float64]) -> None:
    """To each lane the magnitudes of its entries."""
    whole = x.size // (DEEP * LANES)
    blocks, rest = x[: whole * DEEP * LANES].reshape(whole, DEEP, LANES), x[whole * DEEP * LANES :]
    for block in range(whole):
        for lane in range(LANES):
            total = lanes[lane]
            for row in range(DEEP):
                total += abs(blocks[block, row, lane])
            lanes[lane] = total
    for start in range(0, rest.size, LANES):
        few = rest[start : start + LANES]
        for lane in range(few.size):
            lanes[lane] += abs(few[lane])


@sum_magnitudes.torch
def _(x: Any, lanes: Any) -> None:
    """One row of entries after the other, as a loop adds them."""
    import torch

    row = torch.nn.functional.pad(x.double().abs().reshape(-1), (0, -x.numel() % LANES)).view(-1, LANES)
    lanes[...] = torch.cat([_beside(lanes, row)[None], row]).cumsum(0)[-1].cpu().numpy()


@step("void(float32[::1], float32[::1], float64[::1], float64[::1])")
def sum_products(x: Array, y: Array, lanes: NDArray[np.float64], out: NDArray[np.float64]) -> None:
    """For each row, of as many as `out` has room for, the sum of the products, which float64 holds exactly."""
    width = x.size // max(1, out.size)
    whole = width // (DEEP * LANES)
    for place in range(out.size):
        one, other = x[place * width : (place + 1) * width], y[place * width : (place + 1) * width]
        ones = one[: whole * DEEP * LANES].reshape(whole, DEEP, LANES)
        others = other[: whole * DEEP * LANES].reshape(whole, DEEP, LANES)
        lanes[:] = 0
        for block in range(whole):
            for lane in range(LANES):
                total = lanes[lane]
                for row in range(DEEP):
                    total += wide(ones[block, row, lane]) * wide(others[block, row, lane])
                lanes[lane] = total
        for start in range(whole * DEEP * LANES, width, LANES):
            few, fews = one[start : start + LANES], other[start : start + LANES]
            for lane in range(few.size):
                lanes[lane] += wide(few[lane]) * wide(fews[lane])
        for lane in range(1, LANES):
            lanes[0] += lanes[lane]
        out[place] = lanes[0]


@sum_products.torch
def _(x: Any, y: Any, lanes: Any, out: Any) -> None:
    import torch

    terms = (x.double() * y.double()).view(len(out), -1)
    padded = torch.nn.functional.pad(terms, (0, -terms.shape[1] % LANES)).view(len(out), -1, LANES)
    out[...] = padded.cumsum(1)[:, -1].cumsum(1)[:, -1].cpu().numpy() if padded.numel() else 0


def magnitude_sum(x: Array) -> float:
    """The sum of the magnitudes."""
    import numpy as np

    sum_magnitudes(x, lanes := np.zeros(LANES))
    return math.fsum(lanes)


def dot(x: Array, y: Array) -> float:
    """The sum of the products."""
    import numpy as np

    sum_products(x, y, np.empty(LANES), out := np.empty(1))
    return float(out[0])


def dots(tensors: Sequence[Array]) -> list[float]:
    """The dot products of all pairs: first with first, first with second, ..., last with last."""
    return [dot(*pair) for pair in combinations_with_replacement(tensors, 2)]


def tensor_dots(blocks: Blocks) -> list[float]:
    """The dot products of all pairs of whole tensors; of blocks that remember, summed once for all settings."""

    def summed() -> list[float]:
        return [math.fsum(column) for column in zip(*map(dots, blocks), strict=True)]

    once: Callable[[str, Callable[[], list[float]]], list[float]] | None = getattr(blocks, "once", None)
    return summed() if once is None else once("dots", summed)


def squared_norms(blocks: Blocks) -> list[float]:
    """Of each whole tensor the square of its norm."""
    sums = ([dot(tensor, tensor) for tensor in block] for block in blocks)
    return [math.fsum(column) for column in zip(*sums, strict=True)]


def square(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """A symmetric table, from what stands on and above its diagonal, row by row."""
    size = math.isqrt(2 * len(pairs))
    places = list(combinations_with_replacement(range(size), 2))
    found = dict(zip(places, pairs, strict=True))
    return [[found[min(row, column), max(row, column)] for column in range(size)] for row in range(size)]


def l1_factors(
    blocks: Blocks, density: Sequence[float], sparsify: Callable[[int, Array, int], Array]
) -> tuple[float, ...]:
    """For each model the L1 norm of its delta over that of what `sparsify(model, delta, offset)` leaves of it."""
    sums: dict[int, tuple[list[float], list[float]]] = {
        model: ([], []) for model, share in enumerate(density) if share < 1
    }
    offset = 0
    for block in blocks if sums else ():
        for model, (whole, left) in sums.items():
            whole.append(magnitude_sum(block[model]))
            left.append(magnitude_sum(sparsify(model, block[model], offset)))
        offset += entry_count(block[0])
    return tuple(_l1_factor(*sums[model]) if model in sums else 1.0 for model in range(len(density)))


def _l1_factor(whole: Sequence[float], left: Sequence[float]) -> float:
    """Left alone where next to nothing is left: no factor makes up for it, and a huge one would overflow."""
    before, after = math.fsum(whole), math.fsum(left)
    return before / after if after > 1e-7 * before else 1.0


# ---- blocks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mapped:
    """Blocks made of other blocks, each of one.

    Args:
        blocks: what they are made of.
        make: a block from the number of a block, and it.
        entrywise: whether an entry needs none but those at its own place.
    """

    blocks: Blocks
    make: Callable[[int, Sequence[Array]], Sequence[Array]]
    entrywise: bool = False

    @property
    def entries(self) -> int:
        """How many entries a tensor has."""
        return entries_of(self.blocks)

    def __iter__(self) -> Iterator[Sequence[Array]]:
        for place, block in enumerate(self.blocks):
            yield self.make(place, block)

    def spans(self, spans: Spans) -> Iterator[Sequence[Array]]:
        """The entries of some spans."""
        if not self.entrywise:
            return _cut(self, spans)
        return (self.make(place, block) for place, block in enumerate(read_spans(self.blocks, spans)))


def entry_count(x: Array) -> int:
    """How many entries a tensor has, whichever library's it is."""
    return math.prod(x.shape)


def entries_of(blocks: Blocks) -> int:
    """How many entries a tensor has that comes in these blocks."""
    known: int | None = getattr(blocks, "entries", None)
    return sum(entry_count(block[0]) for block in blocks) if known is None else known


def read_spans(blocks: Blocks, spans: Spans) -> Iterator[Sequence[Array]]:
    """The entries of each tensor from a start to a stop, for spans that are in order, in one row or in pieces of it."""
    known: Callable[[Spans], Iterator[Sequence[Array]]] = getattr(blocks, "spans", partial(_cut, blocks))
    return known(spans)


def _cut(blocks: Blocks, spans: Spans) -> Iterator[Sequence[Array]]:
    begin = 0
    for block in blocks:
        end = begin + entry_count(block[0])
        for start, stop in spans:
            if start < end and stop > begin:
                yield [tensor.reshape(-1)[max(start, begin) - begin : stop - begin] for tensor in block]
        begin = end


def array(tensor: Array) -> Array:
    """The entries in one row, as numpy's, without a copy where that can be.

    Raises:
        TypeError: they are not float32.
    """
    row: Any = tensor.reshape(-1)
    found: Array = row.detach().cpu().numpy() if is_tensor(tensor) else row
    if found.dtype != "float32":
        raise TypeError(f"merge methods take float32 tensors, not {found.dtype}")
    return found
