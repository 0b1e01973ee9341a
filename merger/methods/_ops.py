"""The pieces that merge methods are composed of: sums, trimming, sign election, norms, masks by counter.

Every elementwise step is one IEEE operation on float32 (a product and a sum, never a fused one), and every reduction
adds in one order in float64: so neither threads nor the machine's vector units change a bit. Not here: any one method,
and the search for a threshold (`_select`). torch and numpy are imported when a piece is called, so that the table of
methods can be read without them.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, TypeAlias, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

Blocks: TypeAlias = "Iterable[Sequence[Tensor]]"
"""The blocks of a whole tensor, each a list with one block a model; it may be walked several times."""

Pair = TypeVar("Pair")

CHUNK = 65_536
"""Entries that a reduction takes at a time; the engine's blocks are a multiple of it."""

_SCRATCH_LIMIT = 1 << 20  # entries; 4 MiB a slot and thread. What is larger is a direct call, and is not kept.


def per_model(value: float | Sequence[float], models: int) -> list[float]:
    """One number for each of `models`, from one for all of them or from as many."""
    if isinstance(value, (int, float)):
        return [float(value)] * models
    if len(value) != models:
        raise ValueError(f"{len(value)} numbers were given for {models} models")
    return [float(number) for number in value]


# Sums


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}


_scratch = _Scratch()


def scratch(slot: str, like: Tensor) -> Tensor:
    """This thread's buffer called `slot`, shaped like `like`, with anything in it; never a result."""
    import torch

    entries = like.numel()
    if entries > _SCRATCH_LIMIT:
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    kept = _scratch.kept.get(slot)
    if kept is None or kept.numel() < entries or kept.device != like.device or kept.dtype != like.dtype:
        kept = _scratch.kept[slot] = torch.empty(entries, dtype=like.dtype, device=like.device)
    return kept[:entries].view(like.shape)


def scaled(tensor: Tensor, factor: float | Tensor) -> Tensor:
    """The tensor times `factor` (a number, or one for each row or column), in a buffer that the next call reuses."""
    import torch

    return torch.mul(tensor, factor, out=scratch("scaled", tensor))


def weighted_sum(tensors: Iterable[Tensor], factors: Sequence[float | Tensor]) -> Tensor:
    """The sum of each tensor times its factor, as a new tensor."""
    pairs = zip(tensors, factors, strict=True)
    first, factor = next(pairs)
    total = first * factor
    for tensor, factor in pairs:
        total.add_(scaled(tensor, factor))
    return total


def divisor(weights: Sequence[float], normalize: bool) -> float:
    """What the weighted sum of task vectors is divided by: the weights' sum, or 1 where that is none."""
    total = math.fsum(weights)
    return total if normalize and abs(total) >= 1e-8 else 1.0


# Trimming and election


def trim(delta: Tensor, threshold: float) -> Tensor:
    """The delta with every entry of magnitude below `threshold` set to zero; the result may be a buffer or `delta`."""
    import torch

    if threshold <= 0:
        return delta
    return torch.hardshrink(delta, lambd=_next_below(threshold), out=scratch("trimmed", delta))


def _next_below(value: float) -> float:
    """The largest float32 below a positive one (infinity stays): hardshrink zeroes what is equal to its threshold."""
    if math.isinf(value):
        return value
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    below: float = struct.unpack("<f", struct.pack("<I", bits - 1))[0]
    return below


def consensus(terms: Iterable[Tensor], weights: Sequence[float], normalize: bool, like: Tensor) -> Tensor:
    """The sum of the terms that have the elected sign, divided if `normalize` by the sum of their weights.

    The sign elected at an entry is that of the sum of all terms (weights included); a sum of exactly 0 elects plus.
    The positive and the negative terms are summed apart, so the sum's sign is theirs to the last bit, and the election
    is a choice between two sums. A term may be a buffer: each is used up before the next is asked for.
    """
    plus, minus = _Side.empty("plus", like), _Side.empty("minus", like)
    for term, weight in zip(terms, weights, strict=True):
        plus.add(term, weight if normalize else None, min=0)
        minus.add(term, -weight if normalize else None, max=0)
    elected = _elected(plus.total, minus.total)
    total = _choose(plus.total, minus.total, elected)
    return total.div(_divisor(plus, minus, elected, weights)) if normalize else total.clone()


@dataclass(frozen=True)
class _Side:
    """The terms of one sign, summed, and the weights of those that are not zero."""

    total: Tensor
    weights: Tensor

    @classmethod
    def empty(cls, name: str, like: Tensor) -> _Side:
        return cls(scratch(f"{name} total", like).zero_(), scratch(f"{name} weights", like).zero_())

    def add(self, term: Tensor, weight: float | None, **half: float) -> None:
        """Add the half of `term` that lies above ``min=0`` or below ``max=0``."""
        import torch

        part = torch.clamp(term, out=scratch("part", term), **half)
        self.total.add_(part)
        if weight is not None:
            self.weights.add_(part.sign_().mul_(weight))


def _elected(plus: Tensor, minus: Tensor) -> Tensor:
    """1 where plus is elected, 0 where minus is: as numbers, for a product with booleans is many times slower."""
    import torch

    return torch.add(plus, minus, out=scratch("part", plus)).ge_(0)


def _choose(plus: Tensor, minus: Tensor, elected: Tensor) -> Tensor:
    """`plus` where elected, else `minus`; both are overwritten."""
    import torch

    other = torch.sub(1.0, elected, out=scratch("scaled", elected))
    return plus.mul_(elected).add_(minus.mul_(other))


def _divisor(plus: _Side, minus: _Side, elected: Tensor, weights: Sequence[float]) -> Tensor:
    """The weights of the terms that agree; 1 where there are none, or where they cancel (but for rounding)."""
    import torch

    chosen = _choose(plus.weights, minus.weights, elected)
    if min(weights) < 0 < max(weights):
        noise = 1e-6 * math.fsum(abs(weight) for weight in weights)
        chosen = torch.hardshrink(chosen, lambd=noise, out=scratch("trimmed", chosen))
    return chosen.add_(torch.eq(chosen, 0, out=scratch("part", chosen)))


# Norms


def array(tensor: Tensor) -> NDArray[np.float32]:
    """A float32 tensor's entries in one row, without a copy where that can be."""
    if str(tensor.dtype) != "torch.float32":
        raise TypeError(f"merge methods take float32 tensors, not {tensor.dtype}")
    entries: NDArray[np.float32] = tensor.detach().reshape(-1).cpu().numpy()
    return entries


def magnitude_sums(tensor: Tensor) -> list[float]:
    """The sums of the magnitudes of each chunk's entries; `math.fsum` of them all is the L1 norm."""
    import numpy as np

    return [float(np.add.reduce(np.absolute(chunk, chunk))) for (chunk,) in _chunks([tensor])]


def dot_sums(tensors: Sequence[Tensor]) -> list[list[float]]:
    """For each chunk the dot products of all pairs: first with first, first with second, ..., last with last."""
    import numpy as np

    product = np.empty(CHUNK)

    def dot(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
        return float(np.add.reduce(np.multiply(one, other, product[: one.size])))

    return [[dot(*pair) for pair in combinations_with_replacement(chunks, 2)] for chunks in _chunks(tensors)]


def _chunks(tensors: Sequence[Tensor]) -> Iterator[list[NDArray[np.float64]]]:
    """The tensors' chunks in float64, in buffers that the next chunks reuse; they may be overwritten.

    By numpy, not torch: its order of adding is the same on every machine and with any number of threads.
    """
    import numpy as np

    rows = [array(tensor) for tensor in tensors]
    buffers = [np.empty(CHUNK) for _ in rows]
    for start in range(0, max(1, rows[0].size), CHUNK):
        parts = [row[start : start + CHUNK] for row in rows]
        chunks = [buffer[: part.size] for buffer, part in zip(buffers, parts, strict=True)]
        for chunk, part in zip(chunks, parts, strict=True):
            np.copyto(chunk, part)
        yield chunks


def gram(blocks: Blocks) -> list[list[float]]:
    """The dot products of whole tensors: a square table, each tensor with each, itself included."""
    chunks = [dots for block in blocks for dots in dot_sums(block)]
    return square([math.fsum(column) for column in zip(*chunks, strict=True)])


def square(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """A symmetric table, from what stands on and above its diagonal, row by row."""
    size = math.isqrt(2 * len(pairs))
    places = list(combinations_with_replacement(range(size), 2))
    found = dict(zip(places, pairs, strict=True))
    return [[found[min(row, column), max(row, column)] for column in range(size)] for row in range(size)]


# Order


def kth_magnitudes(blocks: Blocks, density: Sequence[float]) -> tuple[float, ...]:
    """For each model the least magnitude among the ``int(density * entries)`` largest of its tensor; see `_select`."""
    from merger.methods import _select

    return _select.kth_magnitudes(blocks, density)


def quartiles(blocks: Blocks) -> tuple[float, float, float]:
    """Of the one tensor that comes in these blocks, its entries at a quarter, half and three quarters of their order.

    Exactly, and without a mean of two: the entry of rank ⌊q (N−1)⌋ from zero. They must not be negative.
    """
    from merger.methods import _select

    def rank(quarters: int) -> Callable[[int], int]:
        return lambda count: count - quarters * (count - 1) // 4

    low, middle, high = _select.ranked(blocks, [rank(1), rank(2), rank(3)])
    return low, middle, high


def l1_factors(
    blocks: Blocks, density: Sequence[float], sparsify: Callable[[int, Tensor, int], Tensor]
) -> tuple[float, ...]:
    """For each model the L1 norm of its delta over that of what `sparsify(model, delta, offset)` leaves of it."""
    sums: dict[int, tuple[list[float], list[float]]] = {
        model: ([], []) for model, share in enumerate(density) if share < 1
    }
    offset = 0
    for block in blocks if sums else ():
        for model, (whole, left) in sums.items():
            whole += magnitude_sums(block[model])
            left += magnitude_sums(sparsify(model, block[model], offset))
        offset += block[0].numel()
    return tuple(_l1_factor(*sums[model]) if model in sums else 1.0 for model in range(len(density)))


def _l1_factor(whole: Sequence[float], left: Sequence[float]) -> float:
    """Left alone where next to nothing is left: no factor makes up for it, and a huge one would overflow."""
    before, after = math.fsum(whole), math.fsum(left)
    return before / after if after > 1e-7 * before else 1.0


# Masks by counter


@dataclass(frozen=True)
class Rng:
    """Randomness by position: entry e of model m of a tensor always gets the same draw, whoever asks for it and when.

    A draw is 32 bits of Philox-4x64, keyed by a digest of (seed, tensor, model), the position being the counter. So it
    depends neither on the order of tensors or blocks, nor on threads or the machine.

    Args:
        seed: the recipe's seed.
        tensor: the output tensor's name.
        start: the entry of that tensor at which the block at hand starts.
    """

    seed: int
    tensor: str = ""
    start: int = 0

    def at(self, offset: int) -> Rng:
        """The same stream at entry `offset` of the tensor."""
        return replace(self, start=offset)

    def keep(self, model: int, like: Tensor, density: float) -> Tensor:
        """A new tensor of 1 and 0, shaped like `like`: 1 with probability `density`, for the entries from `start`."""
        import numpy as np
        import torch

        if density >= 1:
            return torch.ones_like(like)
        kept = self.draws(model, like.numel()) < np.uint32(max(0, int(density * 2**32)))
        return torch.from_numpy(kept.view(np.uint8)).to(like.device).to(like.dtype).view(like.shape)

    def draws(self, model: int, count: int) -> NDArray[np.uint32]:
        """The 32-bit draws of `count` entries from `start`."""
        import numpy as np

        step, skip = divmod(self.start, 8)  # a step of the counter gives four words, a word two draws, low half first
        key = np.frombuffer(self._digest(model), "<u8").astype(np.uint64)
        words = np.random.Philox(key=key, counter=step).random_raw(-(-(skip + count) // 2))
        draws: NDArray[np.uint32] = words.astype("<u8", copy=False).view("<u4")[skip : skip + count]
        return draws

    def _digest(self, model: int) -> bytes:
        words = json.dumps([self.seed, self.tensor, model]).encode()
        return hashlib.blake2b(words, digest_size=16, person=b"merger.rng").digest()
