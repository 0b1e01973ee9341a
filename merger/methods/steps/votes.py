"""What entries stay, and which of them agree: trimming, bands, the elected sign, the largest and the least.

The elected sign is a sign bit, and what agrees with it is summed as magnitudes. Not here: the search for a threshold
(`select`), and any one method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from merger.methods.steps.arithmetic import add_scaled, weighted_sum
from merger.methods.steps.step import ONE, ZERO, Array, new, step, zeros

flip: Any = None
"""A word of compiled loops: `intrinsics` has it."""


# ---- what stays -----------------------------------------------------------------------------------------------------


@step("void(float32[::1], float32, float32, float32, float32[::1])")
def keep_between(x: Array, most: float, ceiling: float, factor: float, out: Array) -> None:
    """Zero where the magnitude is `most` or less, or more than the ceiling; else the entry times a number."""
    for i in range(out.size):
        size = abs(x[i])
        kept = ZERO if size <= most else x[i]
        out[i] = (kept - (x[i] if size > ceiling else ZERO)) * factor


def band(delta: Array, floor: float, ceiling: float = math.inf, factor: float = 1.0) -> Array:
    """The delta times a number, with every entry set to zero whose magnitude is below `floor` or above `ceiling`."""
    keep_between(delta, _next_below(floor), ceiling, factor, out := new(delta))
    return out


def trim(delta: Array, threshold: float, factor: float = 1.0) -> Array:
    """The delta times a number, with every entry of magnitude below `threshold` set to zero."""
    return band(delta, threshold, factor=factor)


def _next_below(value: float) -> float:
    """The largest float32 below a positive one (infinity stays, and lets none pass); below zero where all pass."""
    import numpy as np

    if value <= 0:
        return -1.0
    return value if math.isinf(value) else float(np.nextafter(np.float32(value), np.float32(0)))


# ---- election -------------------------------------------------------------------------------------------------------


@step("void(float32[::1], float32[::1], float32, float32, float32[::1], float32[::1])")
def add_agreeing(vote: Array, elected: Array, gain: float, weight: float, total: Array, share: Array) -> None:
    """Where a vote has the elected sign: its magnitude times `gain` to the total, and `weight` to the share."""
    for i in range(total.size):
        flipped = flip(vote[i], elected[i])
        agreeing = ZERO if flipped < ZERO else flipped
        total[i] += agreeing * gain
        share[i] += weight if agreeing > ZERO else ZERO


@step("void(float32[::1], float32[::1], float32[::1], float32, float32, float32[::1])")
def settle(total: Array, elected: Array, share: Array, noise: float, factor: float, out: Array) -> None:
    """The total with the elected sign, divided by a share above the noise, times a number."""
    for i in range(out.size):
        by = ONE if share[i] <= noise and share[i] >= -noise else share[i]
        out[i] = flip(total[i], elected[i]) / by * factor


def consensus(
    votes: Sequence[Array],
    weights: Sequence[float],
    normalize: bool,
    gains: Sequence[float] | None = None,
    factor: float = 1.0,
) -> Array:
    """The sum of the votes that have the elected sign, times their gains, divided if `normalize` by their weights' sum.

    The sign elected at an entry is that of the sum of all votes; a sum of exactly 0 elects plus. Where no vote agrees,
    or the weights of those that do cancel (but for rounding), nothing is divided. The result is times `factor`.
    """
    elected, total, share = weighted_sum(votes, [1.0] * len(votes)), zeros(votes[0]), zeros(votes[0])
    for vote, weight, gain in zip(votes, weights, gains or [1.0] * len(votes), strict=True):
        add_agreeing(vote, elected, gain, weight if normalize else 0.0, total, share)
    mixed = min(weights) < 0 < max(weights)
    noise = 1e-6 * math.fsum(abs(weight) for weight in weights) if mixed else 0.0
    settle(total, elected, share, noise, factor, out := new(total))
    return out


Keep: TypeAlias = "Callable[[int, float], Array]"
"""What stays of a model's delta, times a number."""


def elect_and_merge(
    keep: Keep, weights: Sequence[float], factors: Sequence[float], normalize: bool, lambda_: float
) -> Array:
    """TIES's second half: λ times the sum of those of wᵢ fᵢ kᵢ that have the elected sign, divided by their Σ wᵢ."""
    gains = [weight * factor for weight, factor in zip(weights, factors, strict=True)]
    if gains[0] > 0 and len(set(gains)) == len(set(weights)) == 1:  # one number for all: left for the end
        share = factors[0] if normalize else gains[0]
        votes = [keep(model, 1.0) for model in range(len(gains))]
        return consensus(votes, [1.0] * len(votes), normalize, factor=lambda_ * share)
    votes = [keep(model, gain) for model, gain in enumerate(gains)]
    return consensus(votes, weights, normalize, factor=lambda_)


def sum_kept(keep: Keep, factors: Sequence[float]) -> Array:
    """The sum of what stays of the deltas, each times its factor."""
    total = keep(0, factors[0])
    for model, factor in enumerate(factors[1:], 1):
        add_scaled(total, keep(model, factor), 1.0)
    return total


# ---- the largest and the least --------------------------------------------------------------------------------------


@step("void(float32[::1], float32, float32[::1], float32[::1])")
def extend(x: Array, factor: float, above: Array, below: Array) -> None:
    """Each entry times a number, where it is larger than the largest so far, or less than the least."""
    for i in range(x.size):
        term = x[i] * factor
        above[i] = above[i] if above[i] > term or above[i] != above[i] else term
        below[i] = below[i] if below[i] < term or below[i] != below[i] else term


@step("void(float32[::1], float32[::1], float32[::1], float32, float32[::1])")
def choose(above: Array, below: Array, vote: Array, factor: float, out: Array) -> None:
    """`above` where the vote is 0 or more, else `below`; times a number."""
    for i in range(out.size):
        plus = ONE if vote[i] >= ZERO else ZERO
        out[i] = (above[i] * plus + below[i] * (ONE - plus)) * factor


def extremes(deltas: Sequence[Array], factors: Sequence[float]) -> tuple[Array, Array]:
    """At each entry the largest of the deltas times their factors, or 0 where none is positive; and the least, or 0."""
    above, below = zeros(deltas[0]), zeros(deltas[0])
    for delta, factor in zip(deltas, factors, strict=True):
        extend(delta, factor, above, below)
    return above, below


def choice(above: Array, below: Array, vote: Array, factor: float) -> Array:
    """`above` where the vote is 0 or more, else `below`; times a number."""
    choose(above, below, vote, factor, out := new(vote))
    return out
