"""The methods that mask or weigh entries, by value: each term of their formulas, and where they leave released code."""

from __future__ import annotations

import math

import pytest
import torch

from merger.methods.consensus import consensus_ta, consensus_ties
from merger.methods.importance import measure_pcb, pcb
from merger.methods.task_vectors import emr, expo, magmax

from .test_departures import entries, normal

# emr


def test_emr_takes_the_largest_of_the_elected_sign() -> None:
    """The sum elects, the largest magnitude of that sign stays, the others count for nothing."""
    assert emr([entries(5, -1), entries(-2, -1), entries(-2, 3)]).tolist() == [5, 3]
    assert emr([entries(5), entries(-3), entries(-3)]).tolist() == [-3]


def test_emr_elects_plus_on_an_exact_draw() -> None:
    """A sum of exactly 0 elects plus, where the released code elects minus."""
    assert emr([entries(2), entries(-2)]).tolist() == [2]


def test_emr_weighs_before_the_vote() -> None:
    """A weight changes the election and the magnitude; lambda comes last."""
    assert emr([entries(2), entries(-3)], weight=[2, 1], lambda_=0.5).tolist() == [2]


# magmax


def test_magmax_takes_the_largest_magnitude_whatever_its_sign() -> None:
    """Nothing is elected: the model that moved an entry most has it."""
    assert magmax([entries(1, 1), entries(1, -3), entries(2, 2)]).tolist() == [2, -3]


def test_magmax_does_not_depend_on_the_order() -> None:
    """Of two opposite entries the positive one stays, whichever comes first."""
    assert magmax([entries(2), entries(-2)]).tolist() == magmax([entries(-2), entries(2)]).tolist() == [2]


# expo


def test_expo_goes_on_and_back() -> None:
    """Alpha 1 doubles the change, alpha -1 is the base."""
    assert expo([entries(1, -2)], alpha=1).tolist() == [2, -4]
    assert not expo([entries(1, -2)], alpha=-1).any()


# consensus


def test_consensus_counts_the_masks() -> None:
    """An entry that one task needs stays for k = 1; k above the number of models leaves the base."""
    one, other = entries(4, 1), entries(0, 1)
    assert consensus_ta([one, other], k=1).tolist() == [4, 2]
    assert consensus_ta([one, other], k=2).tolist() == [0, 2]
    assert not consensus_ta([one, other], k=3).any()


def test_consensus_of_one_model_needs_k_1() -> None:
    """One model's mask holds everything, but is one: by default nothing is left."""
    assert not consensus_ta([entries(1, 2)]).any()
    assert consensus_ta([entries(1, 2)], k=1).tolist() == [1, 2]


def test_consensus_is_stricter_with_a_larger_mask_lambda() -> None:
    """|τᵢ| ≥ λᵢ |τ − τᵢ|: at 1 only the larger of two is its task's own."""
    one, other = entries(3), entries(2)
    assert consensus_ta([one, other], mask_lambda=0.6).tolist() == [5]
    assert consensus_ta([one, other], mask_lambda=1).tolist() == [0]
    assert consensus_ta([one, other], mask_lambda=[1, 0.6]).tolist() == [5]


def test_consensus_ties_masks_by_the_untrimmed_task_vectors() -> None:
    """A trimmed entry still has a mask: it is near what the others made of it, or not."""
    one, other = entries(4, 3, 1, 1), entries(4, 2, 5, 0)
    assert consensus_ties([one, other], density=0.25, k=1).tolist() == [4, 0, 5, 0]
    assert consensus_ties([one, other], density=0.25, k=2).tolist() == [4, 0, 0, 0]


# pcb


def test_pcb_weighs_by_the_softmaxes() -> None:
    """Two models of two entries, all kept: the formula written out."""
    one, other = entries(2, 1), entries(1, 3)

    def softmax(a: float, b: float) -> tuple[float, float]:
        total = math.exp(a) + math.exp(b)
        return math.exp(a) / total, math.exp(b) / total

    # norm(τ₁τ₁) = (1, 0), norm(τ₂τ₂) = (0, 1), norm(τ₁τ₂) = norm(2, 3) = (0, 1)
    first = [a * (b + c) for a, b, c in zip(softmax(2, 0), softmax(1, 0), softmax(0, 1), strict=True)]
    second = [a * (b + c) for a, b, c in zip(softmax(0, 2), softmax(0, 1), softmax(0, 1), strict=True)]
    expected = [(f * a + s * b) / (f + s) for f, s, a, b in zip(first, second, [2, 1], [1, 3], strict=True)]
    assert pcb([one, other], density=1.0).tolist() == pytest.approx(expected, rel=1e-6)


def test_pcb_keeps_the_share_of_largest_scores() -> None:
    """Of one model a density of 0.25 keeps a quarter, the largest magnitudes, at their own size."""
    delta = normal(3, 400)
    result = pcb([delta], density=0.25)
    assert int(result.count_nonzero()) == 100
    kept = result != 0
    assert torch.allclose(result[kept], delta[kept], rtol=1e-6)
    assert float(delta[kept].abs().min()) >= float(delta[~kept].abs().max())


def test_pcb_of_equal_products_is_the_mean() -> None:
    """Where norm would be 0/0 all entries score alike: the mean of the models, zeros included."""
    assert pcb([torch.full((4,), 2.0), torch.zeros(4)], density=0.5).tolist() == [1, 1, 1, 1]


def test_pcb_of_density_0_is_the_base() -> None:
    """Nothing kept is nothing divided."""
    assert not pcb([normal(1, 10), normal(2, 10)], density=0.0).any()


def test_pcb_measures_the_same_however_the_tensor_is_cut() -> None:
    """Spans are exact, means are summed in float64."""
    one, other = normal(1, 1000), normal(2, 1000)
    whole = measure_pcb([[one, other]], density=[0.1, 0.3])
    cut = measure_pcb([[one[:300], other[:300]], [one[300:], other[300:]]], density=[0.1, 0.3])
    assert whole.spans == cut.spans
    assert whole.intra == pytest.approx(cut.intra, rel=1e-15)
    assert whole.thresholds == cut.thresholds
