"""What methods make of a few numbers: each term of their formulas, and where mergekit and released code go wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from merger.methods.averaging import linear, model_stock
from merger.methods.consensus import consensus_ta, consensus_ties, ram, sce
from merger.methods.importance import measure_pcb, pcb
from merger.methods.registry import methods
from merger.methods.sparsify import breadcrumbs, breadcrumbs_ties, dare_linear, della, della_linear
from merger.methods.spectral import iso_cts, svc, tsvm
from merger.methods.spherical import karcher, multislerp, nearswap, nuslerp, slerp
from merger.methods.steps.random import Rng
from merger.methods.subspace import subspace_boosting
from merger.methods.task_vectors import emr, expo, magmax, metagpt, nan, task_arithmetic, ties

from .test_departures import entries, normal

Method = Callable[..., Tensor]
Row = tuple[Method, Sequence[Sequence[float]], dict[str, Any], Any]
R = math.sqrt(0.5)


def near(*numbers: float, abs: float = 1e-8) -> Any:
    """These, but for float32's rounding."""
    return pytest.approx(numbers, rel=1e-5, abs=abs)


def at(*angles: float) -> list[tuple[float, float]]:
    """Vectors of length 1 that point there."""
    return [(math.cos(angle), math.sin(angle)) for angle in angles]


ROWS: dict[str, Sequence[Row]] = {
    "linear extrapolates by weights of 2 and -1": [(linear, [[3, 1], [1, 1]], {"weight": [2, -1]}, [5, 1])],
    "slerp at 179 degrees follows the arc: its middle is at right angles to the rest": [
        (slerp, at(0, math.radians(179)), {"t": 0.5}, near(*at(math.radians(89.5))[0], abs=2e-5))],
    "slerp takes norms of 1e-20 for norms": [
        (slerp, [[1e-20, 0], [0, 1e-20]], {"t": 0.5}, near(R * 1e-20, R * 1e-20, abs=1e-28))],
    "slerp does not normalise its ends": [
        (slerp, [[2, 0], [0, 8]], {"t": 2 / 3}, near(math.sin(math.pi / 6) * 2, math.sin(math.pi / 3) * 8))],
    "slerp is linear beyond a cosine of 0.9995": [
        (slerp, [[1, 0], [1, 0.03]], {"t": 0.25}, pytest.approx([1, 0.0075], rel=2e-7))],
    "slerp at t = 2 has the other in the middle of the arc": [
        (slerp, [[1, 0], [0, 1]], {"t": 2}, near(-1, 0, abs=1e-6))],
    "task arithmetic leaves a zero sum of weights undivided: the difference of two tasks": [
        (task_arithmetic, [[3], [1]], {"weight": [1, -1], "normalize": True}, [2])],
    "task arithmetic multiplies the mean by lambda": [
        (task_arithmetic, [[3], [1]], {"weight": [1, 3], "normalize": True, "lambda_": 2}, [3])],
    "metagpt weighs by squared norms, 25 : 144 : 0, as a public implementation does; none of zeros": [
        (metagpt, [[3, 4, 0], [0, 0, 12], [0, 0, 0]], {}, near(75 / 169, 100 / 169, 12 * 144 / 169)),
        (metagpt, [[0, 0]] * 2, {}, [0, 0])],
    "nan weighs by inverse norms, 3/2 shared out as 2 : 6 : 1, as a public implementation does": [
        (nan, [[0, 0], [3, 0], [0, 1], [6, 0]], {}, near(2, 1))],
    "nan of a model that is zero counts all alike: an inverse would be infinite": [
        (nan, [[1, 1], [0, 0], [3, 5]], {}, [1.5, 2.5])],
    "nan at a lambda of 2 / N is a mean: the base does not count": [
        (nan, [[9, 9], [3, 4], [4, 3]], {}, near(3.5, 3.5))],
    "ties keeps at least one entry, where mergekit 0.1.4 fails": [
        (ties, [[1, -3, 2]], {"density": 0.1}, [0, -3, 0])],
    "ties keeps all entries that equal the threshold": [
        (ties, [[1, -2, 2, 2, 5]], {"density": 0.4}, [0, -2, 2, 2, 5])],
    "ties leaves zeros out of the mean": [(ties, [[4, 0, 1], [2, 6, 0]], {}, [3, 6, 1])],
    "ties elects by Σ w τ and divides by Σ w of those that agree": [
        (ties, [[3], [-2], [-1]], {"weight": [1, 2, 4]}, pytest.approx([-8 / 6])),
        (ties, [[3], [-2]], {"weight": [1, 1]}, [3])],
    "ties elects plus on an exact draw": [(ties, [[-2], [2]], {}, [2])],
    "ties has a model of negative weight vote against its own delta; where weights cancel nothing is divided": [
        (ties, [[2, 2], [-3, 3]], {"weight": [1, -1]}, [5, 3]),
        (ties, [[1]] * 3, {"weight": [0.1, 0.2, -0.3]}, pytest.approx([1.0]))],
    "ties takes a divisor that is float32's rounding for zero": [
        (ties, [[1], [1], [1], [-1]], {"weight": [0.1, 0.2, 0.4, -0.7]}, pytest.approx([1.4]))],
    "ties applies lambda last": [(ties, [[2], [4]], {"lambda_": 0.5}, [1.5])],
    "breadcrumbs drops no outlier of fewer than 1 / gamma entries": [
        (breadcrumbs, [[4, -3, 2, 1]], {"density": 0.5}, [4, -3, 0, 0])],
    "breadcrumbs drops fewer outliers for the density": [
        (breadcrumbs, [[5, 4, 3, 2, 1]], {"density": 0.6, "gamma": 0.8}, [0, 0, 3, 2, 1]),
        (breadcrumbs, [[5, 4, 3, 2, 1]], {"density": 0.9, "gamma": 0.8}, [0, 4, 3, 2, 1])],
    "breadcrumbs treats entries alike that equal the largest or the least that stays": [
        (breadcrumbs, [[5, -5, 3, 2, -2, 1]], {"density": 0.5, "gamma": 0.2}, [5, -5, 3, 2, -2, 0]),
        (breadcrumbs, [[9, 5, 3, 2, -2, 1]], {"density": 0.5, "gamma": 0.2}, [0, 5, 3, 2, -2, 0]),
        (breadcrumbs, [[2, -2, 2, 2, 2]], {"density": 0.4, "gamma": 0.2}, [2, -2, 2, 2, 2])],
    "breadcrumbs keeps one entry for a small density, none for 0, and one of density 1 untouched": [
        (breadcrumbs, [[1, -3, 2]], {"density": 0.1}, [0, -3, 0]),
        (breadcrumbs, [[7]], {"density": 0.1, "gamma": 1.0}, [7]),
        (breadcrumbs, [[1, -3], [1, 9]], {"density": [0.0, 1.0], "gamma": 0.5}, [1, 9])],
    "breadcrumbs has one gamma a model": [
        (breadcrumbs, [[9, 3, 2, 1]] * 2, {"density": 0.5, "gamma": [0.25, 0], "weight": [1, 10]}, [90, 33, 2, 0])],
    "breadcrumbs_ties gives an outlier no vote": [
        (breadcrumbs_ties, [[-9, 3, 2, 1], [2, 4, 9, -3]], {"density": 0.5, "gamma": 0.25, "normalize": True},
         [0, 3.5, 2, -3])],
    "della normalises and della_linear does not, as in mergekit": [
        (della, [[2], [4]], {"rng": Rng(1)}, [3]), (della_linear, [[2], [4]], {"rng": Rng(1)}, [6])],
    "sce elects by Σ τ, not by Σ c τ: the heavier model is outvoted": [
        (sce, [[-3, 9], [2, 0], [2, 0]], {}, [2, 9])],
    "ram takes a change of one model whole, of two as their mean, and up to epsilon not at all": [
        (ram, [[1, 4, 0.5, 0, -3], [0, 2, 0.5, 0, 1], [0, 0, 0.5, 0, 0]], {"epsilon": 0.5}, [1, 3, 0, 0, -1])],
    "emr elects by the sum and takes the largest of that sign": [
        (emr, [[5, -1], [-2, -1], [-2, 3]], {}, [5, 3]), (emr, [[5], [-3], [-3]], {}, [-3])],
    "emr elects plus on an exact draw, where the released code elects minus": [(emr, [[2], [-2]], {}, [2])],
    "emr weighs before the vote, and lambda comes last": [
        (emr, [[2], [-3]], {"weight": [2, 1], "lambda_": 0.5}, [2])],
    "magmax takes the largest magnitude whatever its sign": [(magmax, [[1, 1], [1, -3], [2, 2]], {}, [2, -3])],
    "magmax takes the positive of two opposite entries in any order": [
        (magmax, [[2], [-2]], {}, [2]), (magmax, [[-2], [2]], {}, [2])],
    "expo doubles the change by alpha 1, and is the base at -1": [
        (expo, [[1, -2]], {"alpha": 1}, [2, -4]), (expo, [[1, -2]], {"alpha": -1}, [0, 0])],
    "consensus counts masks: what one task needs stays for k = 1, nothing for k above the number of models": [
        (consensus_ta, [[4, 1], [0, 1]], {"k": 1}, [4, 2]), (consensus_ta, [[4, 1], [0, 1]], {"k": 2}, [0, 2]),
        (consensus_ta, [[4, 1], [0, 1]], {"k": 3}, [0, 0])],
    "consensus of one model needs k = 1": [
        (consensus_ta, [[1, 2]], {}, [0, 0]), (consensus_ta, [[1, 2]], {"k": 1}, [1, 2])],
    "consensus is stricter with a larger mask_lambda: at 1 only the larger of two is its task's own": [
        (consensus_ta, [[3], [2]], {"mask_lambda": 0.6}, [5]), (consensus_ta, [[3], [2]], {"mask_lambda": 1}, [0]),
        (consensus_ta, [[3], [2]], {"mask_lambda": [1, 0.6]}, [5])],
    "consensus_ties masks by the task vectors before they are trimmed": [
        (consensus_ties, [[4, 3, 1, 1], [4, 2, 5, 0]], {"density": 0.25, "k": 1}, [4, 0, 5, 0]),
        (consensus_ties, [[4, 3, 1, 1], [4, 2, 5, 0]], {"density": 0.25, "k": 2}, [4, 0, 0, 0])],
    "pcb of equal products, where norm would be 0/0, is the mean of the models": [
        (pcb, [[2] * 4, [0] * 4], {"density": 0.5}, [1] * 4)],
    "nuslerp takes norms of 1e-9 for norms, where mergekit takes 1e-7 in their place": [
        (nuslerp, [[1e-9, 0], [R * 1e-9, R * 1e-9]], {},
         near(1e-9 * math.cos(math.pi / 8), 1e-9 * math.sin(math.pi / 8), abs=1e-17))],
    "multislerp has the mean direction and the mean norm": [
        (multislerp, [[2, 0, 0], [0, 4, 0], [0, 0, 8]], {"weight": [2, 1, 1]},
         near(*(4 * number / math.sqrt(6) for number in (2, 1, 1))))],
    "multislerp of deltas that are zero is zero": [
        (multislerp, [[0] * 5] * 3, {}, [0] * 5), (multislerp, [[0] * 5] * 3, {"weight": [1, -2, 4]}, [0] * 5)],
    "multislerp counts a zero delta in the norm alone": [(multislerp, [[3, 4], [0, 0]], {}, near(1.5, 2))],
    "multislerp takes a mean shorter than eps for no direction": [
        (multislerp, [[1, 0.01], [-1, 0.01]], {"eps": 0.1}, near(0, 0.01)),
        (multislerp, [[1, 0.01], [-1, 0.01]], {}, near(0, math.hypot(1, 0.01), abs=1e-5))],
    "karcher of two is the middle of the arc, with the mean of the norms": [
        (karcher, [(3, 0), *at(2)], {}, near(2 * math.cos(1), 2 * math.sin(1)))],
    "karcher leaves zeros out of the direction and in the norm": [
        (karcher, [[4, 0], [0, 0], [0, 2]], {}, near(2 * R, 2 * R)), (karcher, [[0] * 4] * 2, {}, [0] * 4)],
    "karcher gives small tensors a direction: mergekit leaves out a norm of 1e-6": [
        (karcher, [[1, 0], [0, 1e-6]], {}, near(0.5 * R, 0.5 * R, abs=1e-6)),
        (karcher, [[1e-7, 0], [0, 1e-7]], {}, near(R * 1e-7, R * 1e-7, abs=1e-15))],
    "nearswap has no floor under differences: mergekit goes a tenth of the way": [
        (nearswap, [[0, 0], [1e-8, 1e-6]], {"t": 1e-7}, near(1e-8, 1e-7, abs=0))],
    "model_stock is the paper's t = N cos / (1 + (N−1) cos) of the mean, for two and for three at one angle": [
        (model_stock, [[1, 0, 0], [0.5, math.sqrt(0.75), 0]], {}, near(0.5, math.sqrt(0.75) / 3, 0)),
        (model_stock, [[1, 1, 0], [1, 0, 1], [0, 1, 1]], {}, near(0.5, 0.5, 0.5))],
}  # fmt: skip
"""Vectors of each model, options, and the entries of the result."""

DIAGONALS: dict[str, Sequence[Row]] = {
    "tsvm adds tasks whose directions do not meet, each with its r / N strongest": [
        (tsvm, [[5, 2, 0, 0], [0, 0, 4, 1]], {}, [5, 2, 4, 1])],
    "tsvm keeps two triples a task of rank 4 and two tasks": [
        (tsvm, [[5, 4, 0.5, 0], [0, 0, 0.5, 3]], {}, [5, 4, 0.5, 3]),
        (tsvm, [[5, 4, 1, 1], [0, 0, 0, 0]], {}, [5, 4, 0, 0])],
    "tsvm of copies is the leading share of one: no arbitrary vector completes it": [
        (tsvm, [[4, 3, 2, 1]] * 2, {}, [4, 3, 0, 0])],
    "iso_cts adds one direction of each task to the common one, all equally strong": [
        (iso_cts, [[4, 1, 0], [4, 0, 2]], {"common": 1 / 3}, [11 / 3] * 3)],
    "boosting invents no direction that the merge does not have": [
        (subspace_boosting, [[5, 3, 0]], {"beta": 0.5}, [5, 5, 0])],
    "svc halves what both tasks do at alpha 1": [(svc, [[3, 1, 0], [3, 0, 2]], {}, [3, 1, 2])],
    "svc restores what an average weakened: s = 1/2 there, so 2 / (1/2 + 1/2)": [
        (svc, [[3, 1, 0], [3, 0, 2]], {"normalize": True, "alpha": 0.5}, [3, 1, 2])],
    "svc leaves a direction where no task counts": [
        (svc, [[1, 2], [-1, -2]], {"merged_first": True, "alpha": 0.0}, [1, 2])],
}  # fmt: skip
"""Diagonals of each model's matrix, options, and the diagonal of the result."""


@pytest.mark.parametrize("what", ROWS)
def test_a_method_makes_these_numbers(what: str) -> None:
    """Exactly, but where float32 rounds."""
    for method, given, options, expected in ROWS[what]:
        assert method([entries(*numbers) for numbers in given], **options).tolist() == expected


@pytest.mark.parametrize("what", DIAGONALS)
def test_a_method_makes_these_singular_values(what: str) -> None:
    """And no entry beside the diagonal."""
    for method, given, options, expected in DIAGONALS[what]:
        result = method([torch.diag(entries(*numbers)) for numbers in given], **options)
        assert torch.allclose(result, torch.diag(entries(*expected)), atol=1e-6)


@pytest.mark.parametrize(("name", "method", "option", "weight"), [
    (name, method, option, weight) for name, method, option in (("linear", linear, "normalize"),
                                                                ("multislerp", multislerp, "normalize_weights"))
    for weight in ([1, -1], [0.1, 0.2, -0.3], [0, 0])
])  # fmt: skip
def test_weights_that_sum_to_zero_are_refused(name: str, method: Method, option: str, weight: list[float]) -> None:
    """Where they are normalised, with the weights, in the call and in the planner's check; else they are a sum."""
    tensors, check = [entries(seed, 2, 1) for seed, _ in enumerate(weight)], methods()[name].check
    with pytest.raises(ValueError, match=rf"sum to zero.*{option}: false"):
        method(tensors, weight=weight)
    assert check is not None
    with pytest.raises(ValueError, match=f"weights {weight[0]:g}, "):
        check(weight=weight, **{option: True})
    assert torch.isfinite(method(tensors, weight=weight, **{option: False})).all()


@pytest.mark.parametrize(("method", "options"), [
    (ties, {"density": 0.1, "rescale": True}), (dare_linear, {"density": 0.1, "rng": Rng(1)}),
    (breadcrumbs, {"density": 0.1, "gamma": 0.1, "rescale": True}), (della, {"density": 0.3, "rng": Rng(1)}),
])  # fmt: skip
@pytest.mark.parametrize("unit", [1.0, 1e-9, 1e-12])
def test_what_stays_is_rescaled_to_the_l1_norm_of_the_whole(method: Method, options: Any, unit: float) -> None:
    """As in mergekit; also where the deltas are small."""
    delta = normal(7, 10, 100) * unit
    result = method([delta], **options)
    assert math.isclose(float(result.double().abs().sum()), float(delta.double().abs().sum()), rel_tol=1e-6)


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
