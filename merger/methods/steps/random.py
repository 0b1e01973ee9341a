"""Randomness by position: masks by counter, and random bits to numbers: uniform, and normal by the inverse of its law.

For numbers only additions, products, quotients and square roots of float64 are used, each rounded as IEEE 754 has it,
so that every machine makes the same. Not here: which methods drop what.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from merger.methods.steps.arithmetic import LANES
from merger.methods.steps.step import ONE, ZERO, Array, is_tensor, new, room, step

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Mask = NDArray[np.bool_]
    Words = NDArray[np.uint32]

is_below: Any = None
coin: Any = None
half: Any = None
magnitude_bits: Any = None
rival: Any = None
threefry: Any = None
"""Words of compiled loops: `intrinsics` has them."""

_DRAWS, _WORD = 1 << 16, (1 << 32) - 1


def likely(share: float) -> float:
    """The probability nearest to `share` that a draw has; only 0 is never and only 1 is always."""
    return share if share <= 0 or share >= 1 else min(max(round(share * _DRAWS), 1), _DRAWS - 1) / _DRAWS


@lru_cache(maxsize=1024)
def _digest(words: str) -> bytes:
    return hashlib.blake2b(words.encode(), digest_size=16, person=b"merger.rng").digest()


@step("void(uint32[::1], uint32[::1], int64)")
def draw_words(words: Words, key: Words, first: int) -> None:
    """Threefry's words of the counters from `first` on: 16 first words, their second, third, fourth, then 16 more."""
    groups = words.reshape(words.size // (4 * LANES), 4, LANES)
    k0, k1, k2, k3 = key[0], key[1], key[2], key[3]
    for group in range(len(groups)):
        made = groups[group]
        for lane in range(LANES):
            w0, w1, w2, w3 = threefry(first + group * LANES + lane, k0, k1, k2, k3)
            made[0, lane], made[1, lane], made[2, lane], made[3, lane] = w0, w1, w2, w3


@draw_words.torch
def _(words: Any, key: Words, first: int) -> None:
    import torch

    from merger.methods.steps.intrinsics import threefry_words

    def add(x: Any, y: Any) -> Any:
        return x + y & _WORD

    def turn(x: Any, by: int) -> Any:
        return (x << by | x >> 32 - by) & _WORD

    count = torch.arange(len(words) // 4, device=words.device) + first
    found = threefry_words([count & _WORD, count >> 32, count * 0, count * 0], key.tolist(), add, operator.xor, turn)
    words.view(torch.int32).copy_(torch.stack(found).view(4, -1, LANES).transpose(0, 1).reshape(-1))


@dataclass(frozen=True)
class Rng:
    """Randomness by position: entry e of model m of a tensor always gets the same draw, whoever asks for it and when.

    A draw is one of 65,536 equally likely numbers: half a word of Threefry4x32-20 (Salmon et al., 2011), whose key is a
    digest of (seed, tensor, model) and whose counter is the entry's place. So a draw depends neither on the order of
    tensors or blocks, nor on threads or the machine; and a probability is one of the 65,535 between 0 and 1, the
    nearest.

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

    def mask(self, model: int, count: int, share: float, like: Any = None) -> Any:
        """Whether the draws of `count` entries from `start` are below a share: so with that probability."""
        drawn, most = self.draws(model, count, like), round(likely(share) * _DRAWS)
        return (drawn.int() & _DRAWS - 1) < most if is_tensor(drawn) else drawn < most

    def draws(self, model: int, count: int, like: Any = None) -> Any:
        """The draws of `count` entries from `start`, 16 bits each; where `like` is a tensor, beside it."""
        words, skip = _words(self._key(model), self.start // 2, count // 2 + 1, like), self.start % 2
        return halves(words)[skip : skip + count]

    def words(self, model: int, count: int, use: str, like: Any = None) -> Any:
        """32 random bits for each of `count` entries from `start`; another `use`, other bits."""
        return _words(self._key(model, use), self.start, count, like)

    def bits(self, model: int, places: NDArray[np.intp], use: str) -> NDArray[np.uint64]:
        """64 random bits for each of some entries, counted from `start`; another `use`, other bits.

        This is SplitMix64 (Steele et al., 2014), whose counter is the entry: any entry's bits without the others'.
        """
        import numpy as np

        bits = places.astype(np.uint64)
        bits += np.uint64(self.start + 1)
        bits *= np.uint64(0x9E3779B97F4A7C15)
        bits += np.uint64(int.from_bytes(self._key(model, use)[:8], "little"))
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            bits ^= bits >> np.uint64(shift)
            bits *= np.uint64(factor)
        bits ^= bits >> np.uint64(31)
        return bits

    def _key(self, model: int, *use: str) -> bytes:
        return _digest(json.dumps([self.seed, self.tensor, model, *use]))


def halves(words: Any) -> Any:
    """Numbers of 32 bits as twice as many of 16."""
    if is_tensor(words):
        import torch

        return words.view(torch.int16)
    return words.view("<u2")


def _words(key: bytes, first: int, count: int, like: Any) -> Any:
    """Some of the words of a key, of which those before them and after them in their group are made, too."""
    import numpy as np

    group, skip = divmod(first, 4 * LANES)
    size = -(-(skip + count) // (4 * LANES)) * 4 * LANES
    if is_tensor(like):
        import torch

        made: Any = torch.empty(size, dtype=torch.int32, device=like.device)
    else:
        made = room(4 * size).view(np.uint32)
    draw_words(made, np.frombuffer(bytearray(key), "<u4"), group * LANES)
    return made[skip : skip + count]


# ---- masks ----------------------------------------------------------------------------------------------------------


@step("void(float32[::1], boolean[::1], float32, float32[::1])")
def keep_masked(x: Array, kept: Mask, factor: float, out: Array) -> None:
    """The entry times a number where the mask holds, else a zero of its sign."""
    for i in range(out.size):
        out[i] = x[i] * (ONE if kept[i] else ZERO) * factor


def mask_out(delta: Array, kept: Mask, factor: float) -> Array:
    """The delta times a number where the mask holds, else zero."""
    keep_masked(delta, kept, factor, out := new(delta))
    return out


@step("void(float32[::1], uint16[::1], uint32[::1], int64, int64, int64, boolean[::1])")
def keep_winners(x: Array, draws: NDArray[np.uint16], words: Words, low: int, high: int, row: int, kept: Mask) -> None:
    """Below `low` a draw keeps the entry; from there to `high`, if it is larger than another one of its row.

    In loops of their own, for only the middle one is none of vectors: which other one, drawn by the words; its
    magnitude, or one more by a coin, in the words' place; and what stays.
    """
    for first in range(0, kept.size, row):
        mine, word = x[first : first + row], words[first : first + row]
        drawn, stays = draws[first : first + row], kept[first : first + row]
        for i in range(word.size):
            word[i] = rival(i, word[i], row)
        for i in range(word.size):
            word[i] = coin(magnitude_bits(mine[half(word[i])]), word[i])
        for i in range(word.size):
            stays[i] = is_below(drawn[i], low) | (is_below(drawn[i], high) & (magnitude_bits(mine[i]) >= word[i]))


@keep_winners.torch
def _(x: Any, draws: Any, words: Any, low: int, high: int, row: int, kept: Any) -> None:
    import torch

    sizes, word = x.view(torch.int32).view(-1, row).long() & _WORD >> 1, words.view(torch.int32).view(-1, row).long()
    ahead = (word >> 1 & _WORD >> 1) * (row - 1) >> 31
    others = sizes.gather(1, (torch.arange(1, row + 1, device=x.device) + ahead) % row) + (word & 1)
    drawn = draws.view(torch.int16).view(-1, row).int() & _DRAWS - 1
    kept.view(-1, row).copy_((drawn < low) | (drawn < high) & (sizes >= others))


def keep_by_rank(delta: Array, model: int, density: float, epsilon: float, rng: Rng) -> Mask:
    """Which entries stay, each with the probability density − ε + 2 ε (rank − 1) / (R − 1) by its rank in its row of R.

    With probability density − ε an entry stays, with probability 1 − density − ε it goes, and else it stays if it is
    larger than another entry of its row, drawn at random for it alone: rank − 1 of the R − 1 others are smaller, so
    that is the second term, exactly, and no row is sorted. Among equals a coin decides, which gives them their mean
    rank.
    """
    spread, entries = min(epsilon, density, 1 - density), delta.reshape(-1)
    low, high = (round(likely(share) * _DRAWS) for share in (density - spread, density + spread))
    draws = rng.draws(model, len(entries), delta)
    kept: Mask = draws > 0
    row = delta.shape[-1] if delta.ndim else 1
    keep_winners(entries, draws, rng.words(model, len(entries), "duel", delta), low, high, row, kept)
    return kept


# ---- numbers --------------------------------------------------------------------------------------------------------

# Wichura, 1988, Algorithm AS 241 (PPND16): numerators and denominators for the middle, the sides and the far sides.
# fmt: off
_MIDDLE = (
    (3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
     4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3),
    (1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
     2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3),
)
_SIDES = (
    (1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0, 3.64784832476320460504e0,
     1.27045825245236838258e0, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4),
    (1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1,
     1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9),
)
_FAR = (
    (6.65790464350110377720e0, 5.46378491116411436990e0, 1.78482653991729133580e0, 2.96560571828504891230e-1,
     2.65321895265761230930e-2, 1.24266094738807843860e-3, 2.71155556874348757815e-5, 2.01033439929228813265e-7),
    (1.0, 5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2,
     7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7, 2.04426310338993978564e-15),
)
# fmt: on
_LN2 = 0.6931471805599453
_TERMS = 12


def uniform(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Numbers between 0 and 1, neither of them among these, from 64 random bits each."""
    import numpy as np

    return ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def normal(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Numbers of the normal distribution with mean 0 and standard deviation 1, from 64 random bits each."""
    import numpy as np

    share = uniform(bits)
    centred = share - 0.5
    result = centred * _ratio(_MIDDLE, 0.180625 - centred * centred)
    outer = np.abs(centred) > 0.425
    least = np.minimum(share[outer], 1.0 - share[outer])
    distance = np.sqrt(-_logarithm(least))
    sides = np.where(distance <= 5.0, _ratio(_SIDES, distance - 1.6), _ratio(_FAR, distance - 5.0))
    result[outer] = np.where(centred[outer] < 0, -sides, sides)
    return result


def _ratio(of: tuple[Sequence[float], Sequence[float]], x: NDArray[np.float64]) -> NDArray[np.float64]:
    return _polynomial(of[0], x) / _polynomial(of[1], x)


def _polynomial(coefficients: Sequence[float], x: NDArray[np.float64]) -> NDArray[np.float64]:
    import numpy as np

    total = np.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total *= x
        total += coefficient
    return total


def _logarithm(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """By its series, as libraries round the last bit of theirs in different ways: ln m = 2 artanh((m - 1)/(m + 1))."""
    import numpy as np

    mantissa, exponent = np.frexp(x)  # in [0.5, 1)
    small = mantissa < 0.7071067811865476
    mantissa = np.where(small, 2.0 * mantissa, mantissa)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    series = _polynomial([1.0 / (2 * term + 1) for term in range(_TERMS)], s * s)
    return 2.0 * s * series + (exponent - small) * _LN2
