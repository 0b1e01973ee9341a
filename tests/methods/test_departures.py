"""Each place where a method does the right thing and mergekit another, and the limits of each method."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from merger.methods._ops import Rng
from merger.methods.dare import dare_linear, dare_ties
from merger.methods.linear import linear
from merger.methods.passthrough import passthrough
from merger.methods.registry import declared, methods
from merger.methods.slerp import measure as measure_angle
from merger.methods.slerp import slerp
from merger.methods.task_arithmetic import task_arithmetic
from merger.methods.ties import measure as measure_trim
from merger.methods.ties import ties


def entries(*numbers: float) -> torch.Tensor:
    """A tensor of these."""
    return torch.tensor(numbers, dtype=torch.float32)


def normal(seed: int, *shape: int) -> torch.Tensor:
    """Normal entries."""
    return torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).standard_normal(shape, np.float32))


# linear


@pytest.mark.parametrize("weight", [[1, -1], [0, 0], [0.1, 0.2, -0.3]])
def test_linear_refuses_weights_that_sum_to_zero(weight: list[float]) -> None:
    """A sum of zero under normalize is an error with the weights in it, in the call and in the planner's check."""
    with pytest.raises(ValueError, match=r"sum to zero.*normalize: false"):
        linear([entries(1)] * len(weight), weight=weight)
    check = methods()["linear"].check
    assert check is not None
    with pytest.raises(ValueError, match=f"weights {weight[0]:g}, "):
        check(weight=weight, normalize=True)
    assert torch.isfinite(linear([entries(1)] * len(weight), weight=weight, normalize=False)).all()


def test_linear_normalises_negative_weights() -> None:
    """Weights 2 and -1 extrapolate."""
    assert linear([entries(3, 1), entries(1, 1)], weight=[2, -1]).tolist() == [5, 1]


def test_linear_of_one_model_is_that_model() -> None:
    """One model of any weight, normalised, comes back to the bit."""
    tensor = normal(1, 100)
    assert torch.equal(linear([tensor], weight=0.3), tensor)


# slerp


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_slerp_of_opposite_tensors_does_not_collapse(t: float) -> None:
    """Opposite tensors give the nearer one's direction and a norm between theirs."""
    a = normal(1, 50)
    result = slerp([a, -3 * a], t=t)
    norm = (1 + 2 * t) * float(a.norm())
    assert math.isclose(float(result.norm()), norm, rel_tol=1e-6)
    assert math.isclose(float(result @ a), norm * float(a.norm()) * (1 if t <= 0.5 else -1), rel_tol=1e-6)


def test_slerp_follows_the_arc_between_nearly_opposite_tensors() -> None:
    """Where the plane is defined the arc is followed: at 179 degrees the middle is at right angles to the rest."""
    angle = math.radians(179)
    a, b = entries(1, 0), entries(math.cos(angle), math.sin(angle))
    middle = slerp([a, b], t=0.5)
    assert torch.allclose(middle, entries(math.cos(angle / 2), math.sin(angle / 2)), atol=2e-5)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0, 1.5])
def test_slerp_from_a_zero_tensor_is_linear(t: float) -> None:
    """Zero has no direction: the other tensor is scaled by t."""
    b = normal(2, 50)
    assert torch.allclose(slerp([torch.zeros(50), b], t=t), t * b)
    assert torch.allclose(slerp([b, torch.zeros(50)], t=t), (1 - t) * b)


def test_slerp_of_tiny_tensors_has_their_angle() -> None:
    """Norms of 1e-20 are norms, not zeros."""
    a, b = entries(1e-20, 0), entries(0, 1e-20)
    assert torch.allclose(slerp([a, b], t=0.5) * 1e20, entries(math.sqrt(0.5), math.sqrt(0.5)))


def test_slerp_keeps_the_endpoints_norms() -> None:
    """The endpoints are not normalised: sin((1−t)ω)/sin ω · a + sin(tω)/sin ω · b."""
    expected = entries(math.sin(math.pi / 6) * 2, math.sin(math.pi / 3) * 8)
    assert torch.allclose(slerp([entries(2, 0), entries(0, 8)], t=2 / 3), expected)


def test_slerp_is_linear_between_nearly_parallel_tensors() -> None:
    """Beyond a cosine of 0.9995 the result is (1−t) a + t b."""
    a, b = entries(1, 0), entries(1, 0.03)
    assert torch.allclose(slerp([a, b], t=0.25), 0.75 * a + 0.25 * b, rtol=1e-7)


def test_slerp_extrapolates() -> None:
    """At t = 2 the other tensor is the middle of the arc."""
    assert torch.allclose(slerp([entries(1, 0), entries(0, 1)], t=2), entries(-1, 0), atol=1e-6)


def test_slerp_takes_the_angle_of_whole_tensors() -> None:
    """The angle is that of all entries, not of rows or blocks."""
    a, b = normal(3, 4, 25), normal(4, 4, 25)
    assert torch.allclose(slerp([a, b], t=0.3).view(-1), slerp([a.view(-1), b.view(-1)], t=0.3))


def test_slerp_reads_nothing_for_an_endpoint() -> None:
    """Where the result is one of the tensors, no angle is measured."""
    assert measure_angle(iter(()), t=0.0) is None
    assert measure_angle(iter(()), t=1.0) is None


def test_slerp_gives_an_endpoint_to_the_bit_whatever_was_measured() -> None:
    """An angle measured for another t leaves t = 0 the first tensor, negative zeros too."""
    a, b = entries(1, -0.0), entries(0, 1)
    result = slerp([a, b], t=0.0, measured=measure_angle([[a, b]], t=0.5))
    assert math.copysign(1, float(result[1])) == -1


# task arithmetic


def test_task_arithmetic_leaves_a_zero_sum_undivided() -> None:
    """Weights that sum to zero are not normalised: the difference of two tasks."""
    assert task_arithmetic([entries(3), entries(1)], weight=[1, -1], normalize=True).tolist() == [2]


def test_task_arithmetic_normalises_before_lambda() -> None:
    """lambda multiplies the mean."""
    assert task_arithmetic([entries(3), entries(1)], weight=[1, 3], normalize=True, lambda_=2).tolist() == [3]


# ties


def test_ties_keeps_exactly_k() -> None:
    """Of distinct magnitudes int(density · N) stay, for a density at which the product is not whole."""
    delta = normal(5, 1000)
    assert int(ties([delta], density=0.2345).count_nonzero()) == 234


def test_ties_keeps_at_least_one_entry() -> None:
    """A small tensor and a small density leave the largest entry, where mergekit fails."""
    assert ties([entries(1, -3, 2)], density=0.1).tolist() == [0, -3, 0]


def test_ties_of_density_0_gives_the_base() -> None:
    """Density 0 keeps nothing of that model."""
    assert not ties([normal(1, 10)], density=0.0).any()
    assert torch.equal(ties([normal(1, 10), normal(2, 10)], density=[0, 1]), normal(2, 10))


def test_ties_treats_equal_magnitudes_alike() -> None:
    """Entries equal to the threshold stay together, whatever their place."""
    assert ties([entries(1, -2, 2, 2, 5)], density=0.4).tolist() == [0, -2, 2, 2, 5]


def test_ties_leaves_zeros_out_of_the_mean() -> None:
    """An entry that was trimmed or is zero counts in no divisor."""
    assert ties([entries(4, 0, 1), entries(2, 6, 0)]).tolist() == [3, 6, 1]


def test_ties_weights_the_vote_and_the_mean() -> None:
    """The sign is that of Σ w τ, and the divisor Σ w of those that agree."""
    assert ties([entries(3.0), entries(-2.0), entries(-1.0)], weight=[1, 2, 4]).tolist() == pytest.approx([-8 / 6])
    assert ties([entries(3.0), entries(-2.0)], weight=[1, 1]).tolist() == [3]


def test_ties_counts_an_exact_draw_as_plus() -> None:
    """A sum of exactly 0 elects plus."""
    assert ties([entries(-2), entries(2)]).tolist() == [2]


def test_ties_with_negative_weights_votes_by_the_weighted_delta() -> None:
    """A model of negative weight votes against its own delta; where the weights cancel nothing is divided."""
    assert ties([entries(2, 2), entries(-3, 3)], weight=[1, -1]).tolist() == [5, 3]
    assert ties([entries(1)] * 3, weight=[0.1, 0.2, -0.3]).tolist() == pytest.approx([1.0])


def test_ties_divisor_that_is_rounding_counts_as_zero() -> None:
    """Weights that cancel but for float32's rounding do not blow an entry up."""
    result = ties([entries(1), entries(1), entries(1), entries(-1)], weight=[0.1, 0.2, 0.4, -0.7])
    assert float(result) == pytest.approx(1.4)


def test_ties_rescales_by_l1_norms() -> None:
    """With rescale the trimmed delta has the L1 norm of the whole one; also when the deltas are small."""
    delta = normal(6, 1000)
    for unit in (1.0, 1e-12):
        whole = float((delta * unit).abs().double().sum())
        result = ties([delta * unit], density=0.1, rescale=True)
        assert math.isclose(float(result.abs().double().sum()), whole, rel_tol=1e-6)


def test_ties_measures_one_pass_a_need() -> None:
    """With density 1 no block is read, whether or not it rescales."""
    trim = measure_trim(iter(()), density=[1.0, 1.0], rescale=True)
    assert trim.thresholds == (0.0, 0.0)
    assert trim.factors == (1.0, 1.0)


def test_ties_applies_lambda_last() -> None:
    """lambda multiplies the normalised sum."""
    assert ties([entries(2), entries(4)], lambda_=0.5).tolist() == [1.5]


# dare


def test_dare_rescales_by_l1_norms() -> None:
    """What is kept has the L1 norm of the whole delta, as in mergekit; also when the deltas are small."""
    delta = normal(7, 1000)
    for unit in (1.0, 1e-12):
        result = dare_linear([delta * unit], density=0.1, rng=Rng(1))
        assert math.isclose(
            float(result.abs().double().sum()), float((delta * unit).abs().double().sum()), rel_tol=1e-6
        )


def test_dare_unbiased_is_the_papers() -> None:
    """With unbiased what is kept is divided by the density, and the mean over seeds is the delta."""
    delta = normal(8, 40)
    results = torch.stack([dare_linear([delta], density=0.5, unbiased=True, rng=Rng(seed)) for seed in range(2000)])
    assert all(torch.all((row == 0) | (row == 2 * delta)) for row in results[:10])
    assert torch.allclose(results.mean(0), delta, atol=5 * float(delta.abs().max()) / math.sqrt(2000))


def test_dare_unbiased_without_rescale_is_refused() -> None:
    """The two contradict each other, in the call and in the planner's check."""
    for method in (dare_linear, dare_ties):
        with pytest.raises(ValueError, match="unbiased"):
            method([entries(1)], rescale=False, unbiased=True, rng=Rng(1))
    check = methods()["dare_ties"].check
    assert check is not None
    arguments = {"weight": [1.0], "density": [1.0], "rescale": False, "unbiased": True}
    with pytest.raises(ValueError, match="unbiased"):
        check(**declared(check, arguments))


def test_dare_of_density_1_is_untouched() -> None:
    """Density 1 drops and rescales nothing, for the models that have it."""
    one, other = normal(1, 100), normal(2, 100)
    result = dare_linear([one, other], density=[1, 0], rng=Rng(1))
    assert torch.equal(result, one)


def test_dare_that_keeps_nothing_gives_the_base() -> None:
    """A one-entry tensor whose entry is dropped gives zero, not NaN."""
    results = [dare_ties([entries(3)], density=0.5, rng=Rng(seed)).item() for seed in range(20)]
    assert set(results) == {0.0, 3.0}


def test_dare_leaves_a_speck_as_it_is() -> None:
    """Where next to nothing of the norm is kept no factor is applied, so nothing overflows."""
    delta = entries(1e30, 1e-30)
    results = [dare_linear([delta], density=0.5, rng=Rng(seed)) for seed in range(20)]
    assert all(torch.isfinite(result).all() and result[1] in (0, float(delta[1])) for result in results)


def test_dare_masks_belong_to_a_tensor_and_a_model() -> None:
    """Two models of one delta, or one model under two tensor names, lose different entries."""
    delta = torch.ones(1000)
    one = dare_linear([delta], density=0.5, rescale=False, rng=Rng(1, "a"))
    other = dare_linear([delta], density=0.5, rescale=False, rng=Rng(1, "b"))
    both = dare_linear([delta, delta], density=0.5, rescale=False, rng=Rng(1, "a"))
    assert not torch.equal(one, other)
    assert set(both.tolist()) == {0.0, 1.0, 2.0}


def test_dare_ties_elects_after_dropping() -> None:
    """Where one of two contrary entries is dropped, the other one stands."""
    one, other = torch.full((1000,), 2.0), torch.full((1000,), -1.0)
    result = dare_ties([one, other], density=0.5, rescale=False, rng=Rng(1))
    assert set(result.tolist()) == {2.0, -1.0, 0.0}


# passthrough


def test_passthrough_scales() -> None:
    """Scale 1 is a copy to the bit, in memory of its own; scale 0 gives zeros."""
    tensor = normal(1, 10)
    result = passthrough([tensor])
    assert torch.equal(result, tensor)
    assert result.data_ptr() != tensor.data_ptr()
    assert not passthrough([tensor], scale=[0.0]).any()
