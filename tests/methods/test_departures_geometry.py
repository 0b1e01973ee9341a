"""Each place where a method of angles and distances does the right thing and mergekit another, and their limits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch

from merger.methods import averaging as stock
from merger.methods import importance as fusion
from merger.methods import spherical as arcs
from merger.methods.averaging import model_stock
from merger.methods.importance import arcee_fusion, measure_arcee_fusion
from merger.methods.registry import methods
from merger.methods.spherical import karcher, measure_karcher, measure_multislerp, multislerp, nearswap, nuslerp, slerp
from merger.methods.steps.rows import column_dots, row_dots, whole_dots
from merger.methods.steps.select import quartiles

from .test_departures import entries, normal

DIAGONAL = math.sqrt(0.5)


class Walked:
    """Blocks that count how often they are walked."""

    def __init__(self, *blocks: Sequence[torch.Tensor]) -> None:
        self.blocks, self.walks = blocks, 0

    def __iter__(self) -> Iterator[Sequence[torch.Tensor]]:
        self.walks += 1
        return iter(self.blocks)


# nuslerp


def test_nuslerp_of_whole_tensors_is_slerp() -> None:
    """With t = w₂ / (w₁ + w₂) and one angle for the tensor it is slerp, where that is not linear."""
    a, b = normal(1, 6, 7), normal(2, 6, 7)
    for t in (0.25, 0.5, 1.5):
        assert torch.allclose(nuslerp([a, b], weight=[1 - t, t]), slerp([a, b], t=t), rtol=1e-6)


def test_nuslerp_takes_the_ratio_of_the_weights() -> None:
    """Only the ratio counts; weights that sum to zero give the middle; a weight of zero gives the other to the bit."""
    a, b = normal(1, 20), normal(2, 20)
    assert torch.equal(nuslerp([a, b], weight=[3, 1]), nuslerp([a, b], weight=[6, 2]))
    assert torch.equal(nuslerp([a, b], weight=[1, -1]), nuslerp([a, b], weight=[1, 1]))
    assert torch.equal(nuslerp([a, b], weight=[2, 0]), a)
    assert torch.equal(nuslerp([a, b], weight=[0, 2]), b)
    assert nuslerp([a, b], weight=[0, 2]).data_ptr() != b.data_ptr()


def test_nuslerp_has_an_angle_for_each_row() -> None:
    """Not flattened, each row along the last dimension is an arc of its own; also in a stack of matrices."""
    a, b = normal(3, 2, 3, 5), normal(4, 2, 3, 5)
    result = nuslerp([a, b], weight=[0.7, 0.3], nuslerp_flatten=False)
    for one, other, row in zip(a.view(6, 5), b.view(6, 5), result.view(6, 5), strict=True):
        assert torch.allclose(row, nuslerp([one, other], weight=[0.7, 0.3]), rtol=1e-6)


def test_nuslerp_row_wise_has_an_angle_for_each_column() -> None:
    """What recipes call row_wise runs along the first dimension, as it does in mergekit."""
    a, b = normal(3, 6, 5), normal(4, 6, 5)
    by_columns = nuslerp([a, b], nuslerp_flatten=False, nuslerp_row_wise=True)
    by_rows = nuslerp([a.T.contiguous(), b.T.contiguous()], nuslerp_flatten=False)
    assert torch.allclose(by_columns, by_rows.T, rtol=1e-6)
    assert not torch.allclose(by_columns, nuslerp([a, b], nuslerp_flatten=False), rtol=1e-3)


def test_nuslerp_ignores_row_wise_where_it_flattens() -> None:
    """One angle for the tensor, whatever nuslerp_row_wise says."""
    a, b = normal(3, 6, 5), normal(4, 6, 5)
    assert torch.equal(nuslerp([a, b], nuslerp_row_wise=True), nuslerp([a, b]))


def test_nuslerp_of_one_dimension_is_one_vector() -> None:
    """A norm's tensor has one angle, by rows and by columns; and comes as one row."""
    a, b = normal(3, 30), normal(4, 30)
    whole = nuslerp([a, b])
    for row_wise in (False, True):
        assert torch.allclose(nuslerp([a, b], nuslerp_flatten=False, nuslerp_row_wise=row_wise), whole, rtol=1e-6)
        rows = nuslerp([a[None], b[None]], nuslerp_flatten=False, nuslerp_row_wise=row_wise)
        assert torch.allclose(rows[0], whole, rtol=1e-6)


@pytest.mark.parametrize("t", [0.25, 0.5, 0.75])
def test_nuslerp_of_opposite_vectors_does_not_collapse(t: float) -> None:
    """Rows that are opposite keep a norm between theirs, the others their arc; mergekit gives 0 in the middle."""
    a, b = torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 1.0], [-6.0, -8.0]])
    result = nuslerp([a, b], weight=[1 - t, t], nuslerp_flatten=False)
    assert torch.allclose(result[1], (1 + t) * a[1] if t <= 0.5 else (1 + t) / 2 * b[1])
    assert torch.allclose(result[0], entries(math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)))


def test_nuslerp_from_a_zero_vector_is_linear() -> None:
    """A row of zeros leaves the other times its share, where mergekit gives 0.7071 of it in the middle."""
    a, b = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    result = nuslerp([a, b], nuslerp_flatten=False)
    assert torch.allclose(result, torch.tensor([[1.5, 2.0], [DIAGONAL, DIAGONAL]]))
    assert not nuslerp([torch.zeros(4), torch.zeros(4)]).any()


def test_nuslerp_follows_the_arc_between_nearly_parallel_vectors() -> None:
    """It turns linear later than slerp: at a cosine of 0.99955 the norm is still kept."""
    a, b = entries(1, 0), entries(math.cos(0.03), math.sin(0.03))
    assert float(nuslerp([a, b]).double().norm()) == pytest.approx(1, abs=1e-7)
    assert float(slerp([a, b], t=0.5).double().norm()) == pytest.approx(1 - 0.03**2 / 8, abs=1e-7)


def test_nuslerp_reads_nothing_that_it_does_not_need() -> None:
    """Row by row, and at an endpoint, no block is asked for beforehand; else one walk."""
    assert arcs.measure_nuslerp(iter(()), [1, 0]) is None
    assert arcs.measure_nuslerp(iter(()), [1, 1], nuslerp_flatten=False) is None
    blocks = Walked([normal(1, 3, 4), normal(2, 3, 4)], [normal(3, 2, 4), normal(4, 2, 4)])
    arcs.measure_nuslerp(blocks, [1, 1])
    assert blocks.walks == 1


# multislerp


def test_multislerp_of_unnormalised_weights_grows_with_them() -> None:
    """Weights enter the norm; normalised, only their ratios count."""
    tensors = [normal(1, 9), normal(2, 9)]
    once, twice = (multislerp(tensors, weight=[w, 3 * w], normalize_weights=False) for w in (1, 2))
    assert torch.allclose(twice, 2 * once)
    assert torch.allclose(multislerp(tensors, weight=[1, 3]), once / 4)


def test_multislerp_of_what_cancels_is_linear() -> None:
    """Two opposite tensors give Σ wᵢ θᵢ, as in mergekit; so do three that cancel, where there it is an error."""
    assert torch.allclose(multislerp([entries(2, 0), entries(-1, 0)]), entries(0.5, 0))
    angles = (0, 2 * math.pi / 3, 4 * math.pi / 3)
    three = [norm * entries(math.cos(angle), math.sin(angle)) for norm, angle in zip((1, 2, 3), angles, strict=True)]
    assert torch.allclose(multislerp(three), torch.stack(three).mean(0), atol=1e-7)


def test_multislerp_makes_no_direction_of_rounding() -> None:
    """Tensors that are opposite but for the last bits give Σ wᵢ θᵢ, not those bits at full size."""
    a = normal(1, 50)
    result = multislerp([a, -a * (1 + 1e-6 * normal(2, 50))])
    assert float(result.norm()) < 1e-5 * float(a.norm())


def test_multislerp_of_small_deltas_keeps_their_size() -> None:
    """eps is not added to norms: deltas of norm 1e-9 do not shrink to a tenth."""
    a, b = entries(3, 0), entries(0, 1)
    assert torch.allclose(multislerp([a * 1e-9, b * 1e-9]) * 1e9, multislerp([a, b]))


# karcher


def test_karcher_is_the_centre_and_not_the_mean() -> None:
    """On a great circle it is the mean of the angles, which the normalised mean of the vectors is not."""
    angles = (0.0, 0.2, 1.3)
    tensors = [entries(math.cos(angle), math.sin(angle)) for angle in angles]
    assert torch.allclose(karcher(tensors), entries(math.cos(0.5), math.sin(0.5)), atol=1e-5)
    assert torch.allclose(karcher(tensors, max_iter=100, tol=1e-7), entries(math.cos(0.5), math.sin(0.5)))
    start = karcher(tensors, max_iter=0)
    assert torch.allclose(start, multislerp(tensors))
    assert not torch.allclose(start, entries(math.cos(0.5), math.sin(0.5)), atol=1e-3)


def test_karcher_of_opposite_tensors_is_the_first() -> None:
    """Two directions that cancel have no centre: the first stays, with the mean of the norms, and nothing blows up."""
    a = normal(1, 50)
    assert torch.allclose(karcher([a, -3 * a]), 2 * a)
    assert torch.allclose(karcher([-3 * a, a]), -2 * a)


def test_karcher_is_drawn_nowhere_by_an_opposite_tensor() -> None:
    """Two to one: the one that is opposite to the centre has no shortest way there, and gives no direction."""
    a = normal(1, 50)
    assert torch.allclose(karcher([a, -a, a]), a, rtol=1e-6)


def test_karcher_with_a_speck_stays_finite() -> None:
    """A tensor far below float32's reach from the others counts as zero."""
    result = karcher([entries(1e-42, 0), entries(0, 1e3)])
    assert torch.isfinite(result).all()
    assert torch.allclose(result, entries(0, 500))


def test_one_pass_measures_what_iterates() -> None:
    """However many iterations, the blocks are walked once."""
    blocks = Walked([normal(1, 30), normal(2, 30), normal(3, 30)])
    measure_karcher(blocks, max_iter=100, tol=0.0)
    measure_multislerp(blocks, [1, 1, 1])
    assert blocks.walks == 2


# nearswap


def test_nearswap_is_the_weighted_mean_of_its_formula() -> None:
    """w b + (1−w) a with w = min(1, t / |a − b|)."""
    a, b = normal(1, 100), normal(2, 100)
    w = (0.3 / (a - b).abs()).clamp(0, 1)
    assert torch.allclose(nearswap([a, b], t=0.3), w * b + (1 - w) * a, atol=1e-6)


def test_nearswap_gives_near_entries_to_the_bit() -> None:
    """Where b is within t of a the result is b itself; t = 0 is the base."""
    a, b = normal(1, 100), normal(2, 100)
    near = (a - b).abs() < 0.5
    assert torch.equal(nearswap([a, b], t=0.5)[near], b[near])
    assert torch.equal(nearswap([a, b], t=100), b)
    assert torch.equal(nearswap([a, b], t=0), a)


def test_nearswap_refuses_a_negative_t() -> None:
    """The recipe's t is 0 or more."""
    bounds = methods()["nearswap"].params[0].bounds
    assert bounds is not None
    assert bounds.holds(0)
    assert not bounds.holds(-0.1)


# arcee fusion


def importances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|b − a| times the row's KL, in float64."""
    p, q = (np.exp(rows) / np.exp(rows).sum(1, keepdims=True) + 1e-8 for rows in (b, a))
    return np.asarray(np.abs(b - a) * (p * np.log(p / q)).sum(1, keepdims=True))


def test_arcee_fusion_takes_the_quartiles_of_all_entries() -> None:
    """A tensor of 1.5 million has the threshold of a sort, not of a sample; the same however it is cut."""
    a = normal(1, 300, 5000)
    b = a + 0.01 * normal(2, 300, 5000) * torch.arange(1, 301).view(-1, 1) / 300
    ordered = np.sort(importances(a.double().numpy(), b.double().numpy()).ravel())
    low, median, high = (ordered[(ordered.size - 1) * part // 4] for part in (1, 2, 3))
    expected = median + 1.5 * (high - low)
    found = {fusion.measure_arcee_fusion([[a[:cut], b[:cut]], [a[cut:], b[cut:]]]).threshold for cut in (1, 52, 299)}
    assert len(found) == 1
    assert found.pop() == pytest.approx(expected, rel=1e-6)


def test_arcee_fusion_is_the_base_but_for_outliers() -> None:
    """Entries below the threshold stay, the others are the other model's."""
    a, b = normal(1, 40, 50), normal(1, 40, 50) + 0.1 * normal(2, 40, 50)
    result = arcee_fusion([a, b])
    taken = (result - b).abs() < (result - a).abs()
    assert torch.equal(result[~taken], a[~taken])
    assert torch.allclose(result[taken], b[taken])
    assert 0.02 < float(taken.float().mean()) < 0.2
    scores = torch.from_numpy(importances(a.double().numpy(), b.double().numpy()))
    assert scores[taken].min() > scores[~taken].max()


def test_arcee_fusion_tells_close_rows_apart() -> None:
    """Rows 1e-4 apart have a KL of 5e-9, which float32 would drown: the row that changed twice as much is taken."""
    a = 0.02 * normal(1, 8, 4096)
    step = 1e-4 * torch.sign(normal(2, 4096))
    b = a + step * torch.tensor([1.0, 1, 1, 1, 1, 1, 1, 2]).view(-1, 1)
    divergence = fusion._divergence([a, b])
    assert np.allclose(divergence[:7], 5e-9, rtol=0.02)
    assert divergence[7] == pytest.approx(2e-8, rel=0.02)
    taken = arcee_fusion([a, b]) != a
    assert taken[7].all()
    assert float(taken[:7].float().mean()) < 0.2


def test_arcee_fusion_takes_a_divergence_once_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often the importances are walked, the softmax of each block is taken once."""
    taken, real = [], fusion._divergence
    monkeypatch.setattr(fusion, "_divergence", lambda block: taken.append(block) or real(block))
    blocks = Walked(*([normal(seed, 90, 400), normal(seed + 1, 90, 400)] for seed in (1, 2)))
    measure_arcee_fusion(blocks)
    assert blocks.walks >= 2
    assert len(taken) == 2


def test_quartiles_are_entries() -> None:
    """The entry of rank ⌊q (N−1)⌋ from zero, for any N."""
    for count in (1, 2, 3, 4, 5, 8, 101):
        expected = tuple(float((count - 1) * part // 4) for part in (1, 2, 3))
        assert quartiles([[torch.arange(count, dtype=torch.float32).flip(0)]]) == expected


# model stock


def test_model_stock_goes_to_the_base_and_no_further() -> None:
    """A negative cosine gives the base, where mergekit leaves it backwards; at −1/(N−1) nothing blows up."""
    assert not model_stock([entries(1, 0.1), entries(-1, 0.2)]).any()
    angles = (0, 2 * math.pi / 3, 4 * math.pi / 3 + 1e-4)
    assert not model_stock([entries(math.cos(angle), math.sin(angle)) for angle in angles]).any()


def test_model_stock_of_small_deltas_has_their_angle() -> None:
    """Norms of 1e-4 have a product of 1e-8, which mergekit takes for 1e-6, and the deltas go to a fiftieth."""
    one, other = entries(3, 4), entries(4, 3)
    whole = model_stock([one, other])
    assert torch.allclose(model_stock([one * 2e-5, other * 2e-5]) / 2e-5, whole)
    assert torch.allclose(whole, 2 * 0.96 / 1.96 * entries(3.5, 3.5))


def test_model_stock_in_float64_finds_a_small_cosine() -> None:
    """Nearly orthogonal deltas of a million entries: a cosine of 1e-3 is found to six digits."""
    one = normal(1, 1_000_000)
    across = normal(2, 1_000_000).double()
    across -= (across @ one.double()) / (one.double() @ one.double()) * one.double()
    other = (1e-3 * one.double() / one.double().norm() + across / across.norm()).float()
    cosine = float(one.double() @ other.double() / one.double().norm() / other.double().norm())
    assert cosine == pytest.approx(1e-3, rel=1e-3)
    found = stock.measure_model_stock([[one[None], other[None]]])
    assert found == pytest.approx(2 * cosine / (1 + cosine), rel=1e-6)


def test_model_stock_filter_wise_has_a_ratio_for_each_row() -> None:
    """Each row by itself; a row that one model left alone goes to the base, the whole tensor does not."""
    one, other = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert torch.equal(model_stock([one, other], filter_wise=True), torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert model_stock([one, other])[1, 0] > 0.3


def test_model_stock_of_an_untouched_tensor_is_the_base() -> None:
    """Zero deltas, all of them or one of two, give zeros and no NaN."""
    assert not model_stock([torch.zeros(5)] * 3).any()
    assert not model_stock([normal(1, 5), torch.zeros(5)]).any()


def test_model_stock_reads_nothing_for_rows() -> None:
    """With filter_wise each block holds what it needs."""
    assert stock.measure_model_stock(iter(()), filter_wise=True) is None


# What they share


@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (1, 70_001), (300, 1), (300, 7), (40, 5000), (2, 70_000)])
def test_sums_over_rows_and_columns_do_not_depend_on_blocks(shape: tuple[int, int]) -> None:
    """However rows are put into blocks, and for any number of them, the sums have the same bits, and are right."""
    tensors = [normal(1, *shape), normal(2, *shape)]
    cuts = sorted({1, shape[0] // 3, shape[0] // 2 + 1} & set(range(1, shape[0])))
    sizes = np.diff([0, *cuts, shape[0]]).tolist()
    blocks = list(zip(*(tensor.split(sizes) for tensor in tensors), strict=True))
    rows = row_dots(tensors)
    assert np.array_equal(np.concatenate([row_dots(block) for block in blocks], axis=1), rows)
    assert np.array_equal(np.concatenate([row_dots([t[r : r + 1] for t in tensors]) for r in range(shape[0])], 1), rows)
    for sums in (column_dots, whole_dots):
        assert np.array_equal(sums(blocks), sums([tensors]))
    a, b = (tensor.double().numpy() for tensor in tensors)
    assert np.allclose(rows, [(a * a).sum(1), (a * b).sum(1), (b * b).sum(1)])
    if shape[0] > 1:
        assert np.allclose(column_dots([tensors]), [(a * a).sum(0), (a * b).sum(0), (b * b).sum(0)])
    assert np.allclose(whole_dots([tensors])[:, 0], [(a * a).sum(), (a * b).sum(), (b * b).sum()])
