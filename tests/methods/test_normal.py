"""Random bits as numbers: the right distributions, from arithmetic that every machine rounds alike."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

from merger.methods.steps.random import Rng, normal, uniform

ENDS = np.array([0, 2**64 - 1, 2**63, 2**63 - 1, 1 << 12], np.uint64)


def bits(count: int) -> np.ndarray:
    return Rng(1, "a").bits(0, np.arange(count), "test")


def test_uniform_numbers_lie_between_zero_and_one() -> None:
    """Even the outermost bits give a number inside, and halves of them are halves of the distance."""
    ends = uniform(ENDS)
    assert ends.min() == 2.0**-53
    assert ends.max() == 1 - 2.0**-53
    drawn = np.sort(uniform(bits(100_000)))
    assert np.abs(drawn - (np.arange(100_000) + 0.5) / 100_000).max() < 0.006


def test_normal_numbers_are_the_inverse_of_the_distribution() -> None:
    """As Python's own statistics has it, in the middle and far out."""
    drawn = np.concatenate([bits(2_000), ENDS, (np.float64(2.0) ** np.arange(12, 64)).astype(np.uint64)])
    expected = [NormalDist().inv_cdf(share) for share in uniform(drawn)]
    assert np.allclose(normal(drawn), expected, rtol=1e-12, atol=1e-15)


def test_normal_numbers_have_the_moments_of_the_distribution() -> None:
    """Mean 0, deviation 1, fourth moment 3, within what so many draws allow."""
    drawn = normal(bits(400_000))
    assert abs(drawn.mean()) < 5 / math.sqrt(400_000)
    assert abs(drawn.var() - 1) < 5 * math.sqrt(2 / 400_000)
    assert abs((drawn**4).mean() - 3) < 5 * math.sqrt(96 / 400_000)


def test_normal_numbers_are_these() -> None:
    """To the last bit: a change of them changes published models."""
    found = [float(number).hex() for number in normal(bits(4))]
    assert found == ["-0x1.a03faf38efc57p-2", "0x1.883a9621f9ce2p+0", "-0x1.25b721808a9dfp+1", "0x1.1bed99964aa70p-2"]
