"""Each place where a method does the right thing and mergekit another, and the limits of each method."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from merger.methods.averaging import linear, passthrough
from merger.methods.consensus import measure_ram, measure_sce, ramplus_tl, sce
from merger.methods.registry import declared, methods
from merger.methods.sparsify import (
    breadcrumbs,
    dare_linear,
    dare_ties,
    della,
    della_linear,
)
from merger.methods.spherical import measure_slerp, slerp
from merger.methods.steps.random import Rng, keep_by_rank
from merger.methods.task_vectors import measure_ties, ties

from .oracles import della_probability


def entries(*numbers: float) -> torch.Tensor:
    """A tensor of these."""
    return torch.tensor(numbers, dtype=torch.float32)


def normal(seed: int, *shape: int) -> torch.Tensor:
    """Normal entries."""
    return torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).standard_normal(shape, np.float32))


# linear


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


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0, 1.5])
def test_slerp_from_a_zero_tensor_is_linear(t: float) -> None:
    """Zero has no direction: the other tensor is scaled by t."""
    b = normal(2, 50)
    assert torch.allclose(slerp([torch.zeros(50), b], t=t), t * b)
    assert torch.allclose(slerp([b, torch.zeros(50)], t=t), (1 - t) * b)


def test_slerp_takes_the_angle_of_whole_tensors() -> None:
    """The angle is that of all entries, not of rows or blocks."""
    a, b = normal(3, 4, 25), normal(4, 4, 25)
    assert torch.allclose(slerp([a, b], t=0.3).view(-1), slerp([a.view(-1), b.view(-1)], t=0.3))


def test_slerp_reads_nothing_for_an_endpoint() -> None:
    """Where the result is one of the tensors, no angle is measured."""
    assert measure_slerp(iter(()), t=0.0) is None
    assert measure_slerp(iter(()), t=1.0) is None


def test_slerp_gives_an_endpoint_to_the_bit_whatever_was_measured() -> None:
    """An angle measured for another t leaves t = 0 the first tensor, negative zeros too."""
    a, b = entries(1, -0.0), entries(0, 1)
    result = slerp([a, b], t=0.0, measured=measure_slerp([[a, b]], t=0.5))
    assert math.copysign(1, float(result[1])) == -1


# ties


def test_ties_keeps_exactly_k() -> None:
    """Of distinct magnitudes int(density · N) stay, for a density at which the product is not whole."""
    delta = normal(5, 1000)
    assert int(ties([delta], density=0.2345).count_nonzero()) == 234


def test_ties_of_density_0_gives_the_base() -> None:
    """Density 0 keeps nothing of that model."""
    assert not ties([normal(1, 10)], density=0.0).any()
    assert torch.equal(ties([normal(1, 10), normal(2, 10)], density=[0, 1]), normal(2, 10))


def test_ties_measures_one_pass_a_need() -> None:
    """With density 1 no block is read, whether or not it rescales."""
    trim = measure_ties(iter(()), density=[1.0, 1.0], rescale=True)
    assert trim.thresholds == (0.0, 0.0)
    assert trim.factors == (1.0, 1.0)


# dare


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


# breadcrumbs


def test_breadcrumbs_of_gamma_0_drops_no_outlier() -> None:
    """gamma 0 keeps the largest of all, as ties does, where mergekit 0.1.4 erases the whole task vector."""
    delta = normal(5, 1000)
    result = breadcrumbs([delta], density=0.25, gamma=0.0)
    assert torch.equal(result, ties([delta], density=0.25))
    assert int(result.count_nonzero()) == 250


def test_breadcrumbs_keeps_exactly_the_middle() -> None:
    """Of distinct magnitudes int(gamma · N) go at the top and int(density · N) stay below them."""
    delta = normal(5, 1000)
    order = delta.abs().argsort(descending=True)
    expected = torch.zeros(1000)
    expected[order[30:264]] = delta[order[30:264]]
    assert torch.equal(breadcrumbs([delta], density=0.2345, gamma=0.03), expected)


# della


@pytest.mark.parametrize("density", [0.5, 0.9, 0.05])
@pytest.mark.parametrize("kind", ["distinct", "equals", "zeros", "rows of one", "one row"])
def test_della_keeps_by_rank(density: float, kind: str) -> None:
    """Over seeds each entry stays as often as its rank in its row says, within five standard deviations."""
    delta = {
        "distinct": normal(3, 3, 8),
        "equals": entries(1, -2, 2, 2, 0, 1, 5, 1).view(1, 8),
        "zeros": torch.zeros(2, 3),
        "rows of one": normal(3, 12, 1),
        "one row": normal(3, 12),
    }[kind]
    seeds = 4000
    kept = np.sum([keep_by_rank(delta.numpy(), 0, density, 0.15, Rng(seed)) for seed in range(seeds)], axis=0)
    share = della_probability(delta.double().numpy(), density, 0.15).reshape(-1)
    assert (abs(kept - seeds * share) <= 5 * np.sqrt(seeds * share * (1 - share)) + 1e-9).all()


def test_della_keeps_entries_apart_from_each_other() -> None:
    """The number kept of a row varies as that of independent draws does: an entry's duel says nothing of another's."""
    delta = normal(4, 1, 64)
    counts = np.array([keep_by_rank(delta.numpy(), 0, 0.5, 0.5, Rng(seed)).sum() for seed in range(4000)])
    share = della_probability(delta.double().numpy(), 0.5, 0.5)
    variance = float((share * (1 - share)).sum())
    assert abs(counts.var() / variance - 1) < 5 * math.sqrt(2 / 4000)
    assert abs(counts.mean() - 32) < 5 * math.sqrt(variance / 4000)


def test_della_keeps_its_density() -> None:
    """The share kept of a large tensor is the density, also where epsilon does not fit beside it."""
    delta = normal(5, 400, 500)
    for density in (0.1, 0.5, 0.95):
        kept = keep_by_rank(delta.numpy(), 1, density, 0.15, Rng(2))
        assert abs(int(kept.sum()) - density * kept.size) < 5 * math.sqrt(density * (1 - density) * kept.size)


def test_della_prefers_the_large() -> None:
    """At density ± epsilon of 1 and 0 the largest entry of a row always stays, and the smallest never."""
    delta = entries(4, 1, -3, 2).view(1, 4)
    kept = np.array([keep_by_rank(delta.numpy(), 0, 0.5, 0.5, Rng(seed)) for seed in range(300)])
    assert kept[:, 0].all()
    assert not kept[:, 1].any()
    assert 0 < kept[:, 3].sum() < kept[:, 2].sum() < 300


def test_della_ranks_along_the_last_dimension() -> None:
    """Rows are ranked each for itself: the entries of a row of small ones stay as often as those of large ones."""
    delta = torch.stack([normal(1, 500) * 1e-6, normal(1, 500)])
    kept = [keep_by_rank(delta.numpy(), 0, 0.5, 0.5, Rng(seed)).reshape(2, 500).sum(1) for seed in range(40)]
    assert abs(np.mean(kept, axis=0) - 250).max() < 5 * math.sqrt(500 / 6 / 40)


def test_della_of_a_narrow_epsilon_is_dare() -> None:
    """With epsilon 0 every entry stays with the density, and by the same draws as in dare."""
    delta = normal(7, 20, 50)
    for density in (0.0, 0.3, 1.0):
        one = della_linear([delta], density=density, epsilon=0.0, rng=Rng(3, "w"))
        assert torch.equal(one, dare_linear([delta], density=density, rng=Rng(3, "w")))


def test_della_of_a_speck_of_a_tensor() -> None:
    """One entry, in one dimension or none, is a row of one: it stays with the density."""
    for delta in (entries(3.0), torch.tensor(3.0)):
        results = [della([delta], density=0.5, rescale=False, rng=Rng(seed)).item() for seed in range(60)]
        assert set(results) == {0.0, 3.0}


# sce


def test_sce_weighs_small_deltas_as_large_ones() -> None:
    """Deltas of 3e-4 and 6e-4 count 0.2 and 0.8, where mergekit counts them alike; so do deltas of 1e-12."""
    for unit in (1.0, 3e-4, 1e-12):
        one, other = torch.full((100,), unit), torch.full((100,), 2 * unit)
        weights = measure_sce([[one, other]], select_topk=1.0).weights
        assert weights == pytest.approx((0.2, 0.8), rel=1e-6)
        assert sce([one, other]).tolist() == pytest.approx([1.8 * unit] * 100, rel=1e-6)


def test_sce_selects_by_variance() -> None:
    """Of the entries that differ, int(topk · their number) of largest variance stay, ties together."""
    one, other = entries(1, 5, 0, 3, -3, 2), entries(1, 1, 0, 2, 2, 2)
    assert measure_sce([[one, other]], select_topk=0.7).threshold == 16
    assert sce([one, other], select_topk=0.4).tolist()[:4] == [0, 0, 0, 0]
    kept = [bool(number) for number in sce([one, other], select_topk=0.7).tolist()]
    assert kept == [False, True, False, False, True, False]
    one, other = entries(1, 4, -3), entries(0, 2, -5)
    assert [bool(number) for number in sce([one, other], select_topk=0.4).tolist()] == [False, True, True]


def test_sce_selects_at_least_one_entry() -> None:
    """A small share selects one; 0 selects none; where the models do not differ there is none to select."""
    one, other = entries(1, 5, 0), entries(1, 1, 0)
    assert [bool(number) for number in sce([one, other], select_topk=0.01).tolist()] == [False, True, False]
    assert sce([one, other], select_topk=0.0).tolist() == [0, 0, 0]
    assert sce([one, one], select_topk=0.5).tolist() == [0, 0, 0]
    assert sce([one, one]).tolist() == one.tolist()


def test_sce_does_not_select_equal_entries_of_three_models() -> None:
    """Three equal entries have a variance of exactly 0, whatever their mean rounds to."""
    same = normal(3, 999)
    deltas = [torch.cat([same, entries(number)]) for number in (1, 2, 3)]
    assert int(sce(deltas, select_topk=0.99).count_nonzero()) == 1


def test_sce_selects_entries_of_equal_variance_together() -> None:
    """Three numbers have one variance in whatever order the models hold them, where float32 would tell them apart."""
    numbers, draw = np.array([0.61, 0.73, 0.54], np.float32), np.random.Generator(np.random.PCG64(1))
    larger = np.stack([draw.permutation(numbers) for _ in range(60)], axis=1)
    deltas = list(torch.from_numpy(np.concatenate([larger, larger / 2], axis=1)))
    assert [bool(number) for number in sce(deltas, select_topk=0.01).tolist()] == [True] * 60 + [False] * 60


def test_sce_of_zeros_is_the_base() -> None:
    """Nothing to weigh gives equal weights, and zeros."""
    assert measure_sce([[torch.zeros(3), torch.zeros(3)]], select_topk=1.0).weights == (0.5, 0.5)
    assert not sce([torch.zeros(3), torch.zeros(3)]).any()


# ram


def test_ramplus_enlarges_by_counts_of_the_whole_tensor() -> None:
    """λ = 1 + r · min(α, shared / own) of each model: here 2 shared of 1 own, and 2 of 0."""
    one, other = entries(1, 4, 2, 0), entries(0, 2, 2, 0)
    assert ramplus_tl([one, other], r=1, alpha=5).tolist() == [3, 3, 2, 0]
    assert ramplus_tl([one, other], r=0.5, alpha=0.5).tolist() == [1.25, 3, 2, 0]
    blocks = [[part.narrow(0, start, 1) for part in (one, other)] for start in range(4)]
    assert measure_ram(blocks, r=1, alpha=5, epsilon=1e-5) == (3.0, 6.0)


# passthrough


def test_passthrough_scales() -> None:
    """Scale 1 is a copy to the bit, in memory of its own; scale 0 gives zeros."""
    tensor = normal(1, 10)
    result = passthrough([tensor])
    assert torch.equal(result, tensor)
    assert result.data_ptr() != tensor.data_ptr()
    assert not passthrough([tensor], scale=[0.0]).any()
