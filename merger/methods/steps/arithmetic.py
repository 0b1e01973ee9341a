"""The pieces that merge methods are composed of: sums, trimming, sign election, norms, masks by counter.

Every elementwise step is one IEEE operation on float32 (a product and a sum, never a fused one), and every reduction
adds in one order in float64: so neither threads nor the machine's vector units change a bit. Not here: any one method,
and the search for a threshold (`select`). torch and numpy are imported when a piece is called, so that the table of
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
from functools import partial
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, TypeAlias, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

Blocks: TypeAlias = "Iterable[Sequence[Tensor]]"
"""The blocks of a whole tensor, each a list with one block a model; it may be walked several times.

They may know how many `entries` they hold, and how to read every n-th of them faster than all: see `strided`.
"""

Pair = TypeVar("Pair")

CHUNK = 1 << 18
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


def scaled(tensor: Tensor, factor: float | Tensor, slot: str = "scaled") -> Tensor:
    """The tensor times `factor` (a number, or one a row or column), in the buffer `slot`, which may be its own."""
    import torch

    return torch.mul(tensor, factor, out=scratch(slot, tensor))


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


def trim(delta: Tensor, threshold: float, slot: str = "trimmed") -> Tensor:
    """The delta with every entry of magnitude below `threshold` set to zero; the result may be a buffer or `delta`."""
    import torch

    if threshold <= 0:
        return delta
    return torch.hardshrink(delta, lambd=_next_below(threshold), out=scratch(slot, delta))


def band(delta: Tensor, floor: float, ceiling: float, slot: str = "trimmed") -> Tensor:
    """The delta with every entry set to zero whose magnitude is below `floor` or above `ceiling`."""
    import torch

    kept = trim(delta, floor, slot)
    if math.isinf(ceiling):
        return kept
    beyond = torch.hardshrink(delta, lambd=ceiling, out=scratch("part", delta))
    return torch.sub(kept, beyond, out=scratch(slot, delta))


def _next_below(value: float) -> float:
    """The largest float32 below a positive one (infinity stays): hardshrink zeroes what is equal to its threshold."""
    if math.isinf(value):
        return value
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    below: float = struct.unpack("<f", struct.pack("<I", bits - 1))[0]
    return below


def elect_and_merge(
    kept: Sequence[Tensor], weights: Sequence[float], factors: Sequence[float], normalize: bool, lambda_: float
) -> Tensor:
    """TIES's second half: λ times the sum of those of wᵢ fᵢ kᵢ that have the elected sign, divided by their Σ wᵢ."""
    gains = [weight * factor for weight, factor in zip(weights, factors, strict=True)]
    if gains[0] > 0 and len(set(gains)) == len(set(weights)) == 1:  # one number for all: left for the end
        share = factors[0] if normalize else gains[0]
        return consensus(kept, [1.0] * len(kept), normalize).mul_(lambda_ * share)
    terms = [
        scaled(tensor, gain, f"term {place}") for place, (tensor, gain) in enumerate(zip(kept, gains, strict=True))
    ]
    return consensus(terms, weights, normalize).mul_(lambda_)


def consensus(
    votes: Sequence[Tensor], weights: Sequence[float], normalize: bool, gains: Sequence[float] | None = None
) -> Tensor:
    """The sum of the votes that have the elected sign, times their gains, divided if `normalize` by their weights' sum.

    The sign elected at an entry is that of the sum of all votes; a sum of exactly 0 elects plus. A vote may be a
    buffer, but not one called "part", "sign", "total" or "divisor".
    """
    sign = _elected(votes)
    total = _agreeing(votes[0], sign, "total")
    divisor = _shares(total, weights[0], "divisor") if normalize else None
    _gained(total, gains, 0)
    for place, vote in enumerate(votes[1:], 1):
        agreeing = _agreeing(vote, sign, "part")
        if divisor is None:
            total.add_(_gained(agreeing, gains, place))
        else:
            shares = _shares(agreeing, weights[place], "scaled")
            total.add_(_gained(agreeing, gains, place))
            divisor.add_(shares)
    _flipped(total, sign, total)
    return total.clone() if divisor is None else total.div(_without_zeros(divisor, weights))


def _agreeing(vote: Tensor, sign: Tensor, slot: str) -> Tensor:
    """The vote's magnitude where it has the sign, else 0."""
    return _flipped(vote, sign, scratch(slot, sign)).clamp_min_(0)


def _shares(agreeing: Tensor, weight: float, slot: str) -> Tensor:
    """The weight where the vote agrees, else 0."""
    import torch

    return _times(torch.gt(agreeing, 0, out=scratch(slot, agreeing)), weight)


def _gained(agreeing: Tensor, gains: Sequence[float] | None, place: int) -> Tensor:
    return _times(agreeing, 1 if gains is None else gains[place])


def _elected(votes: Sequence[Tensor]) -> Tensor:
    """The sign bit of the votes' sum, alone."""
    import torch

    if len(votes) == 1:
        total = scratch("sign", votes[0]).copy_(votes[0])
    else:
        total = torch.add(votes[0], votes[1], out=scratch("sign", votes[0]))
    for vote in votes[2:]:
        total.add_(vote)
    total.view(torch.int32).bitwise_and_(-(1 << 31))
    return total


def _flipped(tensor: Tensor, sign: Tensor, out: Tensor) -> Tensor:
    """The tensor with its sign turned where `sign` has the bit: what agrees is then positive, the rest negative."""
    import torch

    torch.bitwise_xor(tensor.view(torch.int32), sign.view(torch.int32), out=out.view(torch.int32))
    return out


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else tensor.mul_(factor)


def _without_zeros(divisor: Tensor, weights: Sequence[float]) -> Tensor:
    """The divisor with another where no vote agrees, or where the weights of those that do cancel (but for rounding).

    There the sum is 0, or is not divided: so where all weights are positive, any other will do.
    """
    import torch

    if min(weights) > 0:
        return divisor.clamp_min_(min(weights))
    if min(weights) < 0 < max(weights):
        noise = 1e-6 * math.fsum(abs(weight) for weight in weights)
        divisor = torch.hardshrink(divisor, lambd=noise, out=scratch("scaled", divisor))
    return divisor.add_(torch.eq(divisor, 0, out=scratch("part", divisor)))


# Blocks


@dataclass(frozen=True)
class Mapped:
    """Blocks made of other blocks, each of one.

    Args:
        blocks: what they are made of.
        make: a block from a block of as many entries, which it may overwrite.
        entrywise: whether an entry needs none but those at its own place.
    """

    blocks: Blocks
    make: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    entrywise: bool = True

    @property
    def entries(self) -> int:
        """How many entries a tensor has."""
        return entries_of(self.blocks)

    def __iter__(self) -> Iterator[Sequence[Tensor]]:
        return map(self.make, self.blocks)

    def strided(self, step: int) -> Iterator[Sequence[Tensor]]:
        """Every `step`-th entry."""
        return map(self.make, strided(self.blocks, step)) if self.entrywise else _slices(self, step)


def entries_of(blocks: Blocks) -> int:
    """How many entries a tensor has that comes in these blocks."""
    known: int | None = getattr(blocks, "entries", None)
    return sum(block[0].numel() for block in blocks) if known is None else known


def strided(blocks: Blocks, step: int) -> Iterator[Sequence[Tensor]]:
    """Every `step`-th entry of each tensor, block by block, in one row."""
    known: Callable[[int], Iterator[Sequence[Tensor]]] = getattr(blocks, "strided", partial(_slices, blocks))
    return known(step)


def _slices(blocks: Blocks, step: int) -> Iterator[Sequence[Tensor]]:
    seen = 0
    for block in blocks:
        yield [tensor.reshape(-1)[-seen % step :: step] for tensor in block]
        seen += block[0].numel()


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

    row, buffer = array(tensor), np.empty(min(CHUNK, tensor.numel()), np.float32)
    return [
        float(np.add.reduce(np.absolute(part, buffer[: part.size]), dtype=np.float64))
        for part in (row[start : start + CHUNK] for start in range(0, max(1, row.size), CHUNK))
    ]


def square_sums(tensor: Tensor) -> list[float]:
    """The sums of the squares of each chunk's entries."""
    import numpy as np

    return [float(np.add.reduce(np.multiply(chunk, chunk, chunk))) for (chunk,) in _chunks([tensor])]


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


# At each entry


def extremes(terms: Iterable[Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """At each entry the largest of the terms, or 0 where none is positive; and the least, or 0 where none is negative.

    A term may be a buffer: each is used up before the next is asked for.
    """
    import torch

    above, below = torch.zeros_like(like), torch.zeros_like(like)
    for term in terms:
        torch.maximum(above, term, out=above)
        torch.minimum(below, term, out=below)
    return above, below


def choose(above: Tensor, below: Tensor, vote: Tensor) -> Tensor:
    """`above` where the vote is 0 or more, else `below`; all three are overwritten."""
    plus = vote.ge_(0)
    above.mul_(plus)
    return above.add_(below.mul_(plus.neg_().add_(1)))


# Order


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


def masked(delta: Tensor, kept: NDArray[np.bool_], slot: str = "trimmed") -> Tensor:
    """The delta where `kept` holds, else zero, in the buffer `slot`."""
    import numpy as np
    import torch

    mask = torch.from_numpy(kept.view(np.uint8)).view(delta.shape)
    return scratch(slot, delta).copy_(mask).mul_(delta)


_DRAWS = 65_536


def likely(share: float) -> float:
    """The probability nearest to `share` that a draw has; only 0 is never and only 1 is always."""
    return share if share <= 0 or share >= 1 else min(max(round(share * _DRAWS), 1), _DRAWS - 1) / _DRAWS


@dataclass(frozen=True)
class Rng:
    """Randomness by position: entry e of model m of a tensor always gets the same draw, whoever asks for it and when.

    A draw is one of 65,536 equally likely numbers: the entry's quarter of a word of PCG64 (O'Neill, 2014), keyed by a
    digest of (seed, tensor, model) and advanced to the entry's place. So a draw depends neither on the order of tensors
    or blocks, nor on threads or the machine; and a probability is one of the 65,535 between 0 and 1, the nearest.

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
        import torch

        (kept,) = self.below(model, like.numel(), density)
        return torch.from_numpy(kept).to(like.device).to(like.dtype).view(like.shape)

    def below(self, model: int, count: int, *shares: float) -> list[NDArray[np.bool_]]:
        """For each share whether the draws of `count` entries from `start` are below it: so with that probability."""
        import numpy as np

        draws = self.draws(model, count) if any(0 < share < 1 for share in shares) else np.zeros(count, np.uint16)
        return [
            draws < np.uint16(likely(share) * _DRAWS) if 0 < share < 1 else np.full(count, share >= 1)
            for share in shares
        ]

    def draws(self, model: int, count: int) -> NDArray[np.uint16]:
        """The draws of `count` entries from `start`."""
        import numpy as np

        step, skip = divmod(self.start, 4)
        words = np.random.PCG64(int.from_bytes(self._digest(model), "little")).advance(step)
        # The raw words, as random_raw gives them, but without holding up the other threads meanwhile.
        drawn = np.random.Generator(words).integers(0, 2**64 - 1, -(-(skip + count) // 4), np.uint64, endpoint=True)
        draws: NDArray[np.uint16] = drawn.astype("<u8", copy=False).view("<u2")[skip : skip + count]
        return draws

    def bits(self, model: int, places: NDArray[np.intp], use: str) -> NDArray[np.uint64]:
        """64 random bits for each of some entries, counted from `start`; another `use`, other bits.

        This is SplitMix64 (Steele et al., 2014), whose counter is the entry: any entry's bits without the others'.
        """
        import numpy as np

        key = int.from_bytes(self._digest(model, use)[:8], "little")
        bits = places.astype(np.uint64)
        bits += np.uint64(self.start + 1)
        bits *= np.uint64(0x9E3779B97F4A7C15)
        bits += np.uint64(key)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            bits ^= bits >> np.uint64(shift)
            bits *= np.uint64(factor)
        bits ^= bits >> np.uint64(31)
        return bits

    def _digest(self, model: int, *use: str) -> bytes:
        words = json.dumps([self.seed, self.tensor, model, *use]).encode()
        return hashlib.blake2b(words, digest_size=16, person=b"merger.rng").digest()
