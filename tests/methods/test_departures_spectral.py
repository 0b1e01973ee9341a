"""The methods on singular values, by value: known matrices, the limits (zero, low rank, one row, one column, vectors,
one model), and where they leave released code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from merger.methods.registry import methods
from merger.methods.spectral import iso_c, iso_cts, svc, tsvm
from merger.methods.steps import decompose as _spectral
from merger.methods.subspace import knots, subspace_boosting
from merger.methods.task_vectors import ties

from .test_departures import entries, normal

ALL = [tsvm, iso_c, iso_cts, knots, subspace_boosting, svc]
every_one = pytest.mark.parametrize("method", ALL, ids=lambda method: method.__name__)


def diagonal(*numbers: float) -> Tensor:
    """The square matrix with these on its diagonal."""
    return torch.diag(entries(*numbers))


def low_rank(seed: int, rows: int, columns: int, rank: int) -> Tensor:
    """A float32 matrix of this rank but for rounding, as a merged adapter's change is."""
    return normal(seed, rows, rank) @ normal(seed + 1, rank, columns)


# All of them


@every_one
@pytest.mark.parametrize("shape", [(5,), (1, 7), (7, 1), (1, 1), (6, 9), (9, 6)])
@pytest.mark.parametrize("models", [1, 3])
def test_every_shape_and_zeros_among_the_models_are_finite(
    method: Callable[..., Tensor], shape: tuple[int, ...], models: int
) -> None:
    """Vectors, one row, one column, one model, a model that did not move: finite, in the inputs' shape."""
    deltas = [normal(seed, *shape) for seed in range(models)]
    for given in (deltas, [*deltas, torch.zeros(shape)], [torch.zeros(shape)] * models):
        result = method(given)
        assert result.shape == shape
        assert result.dtype == torch.float32
        assert torch.isfinite(result).all()


@every_one
def test_signs_of_singular_vectors_do_not_matter(
    method: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With eigenvectors of other signs the result is the same but for rounding."""
    deltas = [normal(1, 12, 20), low_rank(2, 12, 20, 3), normal(5, 12, 20)]
    expected = method(deltas)
    real = _spectral.eigen

    def flipped(gram: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = real(gram)
        signs = torch.ones(len(vectors), dtype=vectors.dtype)
        signs[::2] = -1
        return values, vectors * signs

    monkeypatch.setattr(_spectral, "eigen", flipped)
    monkeypatch.setattr("merger.methods.subspace.eigen", flipped)
    assert torch.allclose(method(deltas), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", [tsvm, iso_c, knots, subspace_boosting], ids=lambda method: method.__name__)
def test_the_transpose_gives_the_transpose(method: Callable[..., Tensor]) -> None:
    """Rows and columns are treated alike, whichever Gram matrix is the smaller; Iso-CTS and SVC ask the rows."""
    deltas = [normal(seed, 8, 14) for seed in range(3)]
    turned = method([delta.T.contiguous() for delta in deltas])
    assert torch.allclose(turned.T, method(deltas), rtol=1e-5, atol=1e-5)


@every_one
def test_spectral_false_treats_a_matrix_as_a_vector(method: Callable[..., Tensor]) -> None:
    """For embeddings and heads: the same as the flat tensor, and no decomposition."""
    deltas = [normal(seed, 6, 4) for seed in range(2)]
    flat = method([delta.reshape(-1) for delta in deltas])
    assert torch.equal(method(deltas, spectral=False).reshape(-1), flat)


@pytest.mark.parametrize(("method", "name"), [(tsvm, "linear"), (iso_c, "linear"), (iso_cts, "linear")])
def test_vectors_are_averaged(method: Callable[..., Tensor], name: str) -> None:
    """Norms and biases are averaged, as in the released codes."""
    deltas: Any = [entries(1, 2), entries(3, 6)]
    assert torch.equal(method(deltas), methods()[name].function(deltas))


def test_vectors_of_the_steps_stay_as_merged() -> None:
    """Boosting and calibration leave a vector as task arithmetic makes it, and KnOTS merges it by TIES."""
    one, other = entries(1, -2), entries(3, 3)
    assert subspace_boosting([one, other], weight=[1, 0.5]).tolist() == [2.5, -0.5]
    assert svc([one, other], weight=[1, 0.5]).tolist() == [2.5, -0.5]
    assert torch.equal(knots([one, other]), ties([one, other]))


# tsvm


def test_tsvm_of_one_model_is_that_model() -> None:
    """All triples of one task are kept and already orthonormal."""
    delta = normal(1, 10, 7)
    assert torch.allclose(tsvm([delta]), delta, rtol=1e-5, atol=1e-6)


def test_tsvm_averages_what_is_smaller_than_the_number_of_models() -> None:
    """A row has one direction, three tasks would get none each: averaged, where the released code gives nothing."""
    row = normal(1, 1, 6)
    assert torch.allclose(tsvm([row, 2 * row, 3 * row]), 2 * row)


# iso


def test_iso_c_makes_singular_values_equal() -> None:
    """All are the mean of the sum's."""
    deltas = [normal(1, 9, 6), normal(2, 9, 6)]
    values = torch.linalg.svdvals((deltas[0] + deltas[1]).double())
    assert torch.allclose(torch.linalg.svdvals(iso_c(deltas).double()), values.mean().expand(6), rtol=1e-6)


def test_iso_c_leaves_null_directions_zero() -> None:
    """Of rank 2 in 4 dimensions, two directions get the mean over four; the others have no direction to be."""
    assert torch.allclose(iso_c([diagonal(6, 2, 0, 0)]), diagonal(2, 2, 0, 0), atol=1e-6)
    result = iso_c([low_rank(1, 30, 20, 4)])
    assert int((torch.linalg.svdvals(result.double()) > 1e-3).sum()) == 4


@pytest.mark.parametrize("method", [iso_c, iso_cts], ids=lambda method: method.__name__)
def test_iso_of_adapters_leaves_their_share_of_the_directions(method: Callable[..., Tensor]) -> None:
    """Of ranks of 4 together in 40 directions a tenth of the strength; a lambda of 40 / 4 gives it back."""
    deltas = [low_rank(seed, 40, 60, 2) for seed in (1, 5)]
    results = (deltas[0] + deltas[1], method(deltas), method(deltas, lambda_=10))
    given, kept, back = (float(torch.linalg.svdvals(result.double()).sum()) for result in results)
    assert (kept, back) == pytest.approx((0.1 * given, given), rel=1e-4)


def test_iso_cts_of_a_task_without_directions_of_its_own_adds_no_noise() -> None:
    """What the common part leaves of a low-rank task is rounding, and gets no singular value."""
    delta = low_rank(1, 20, 20, 3)
    result = iso_cts([delta], common=0.8)
    values = torch.linalg.svdvals(result.double())
    assert int((values > 1e-3).sum()) == 3
    assert torch.allclose(result, iso_c([delta]), atol=1e-6)


def test_iso_cts_never_takes_more_directions_than_there_are() -> None:
    """Three dimensions, two tasks, none in common: 1.5 each rounds to 2, and 1 is taken."""
    result = iso_cts([diagonal(3, 2, 1), diagonal(1, 2, 3)], common=0)
    assert torch.isfinite(result).all()


# knots


def test_knots_of_one_model_and_of_copies_is_that_model() -> None:
    """The basis turns there and back."""
    delta = normal(1, 8, 11)
    assert torch.allclose(knots([delta]), delta, atol=1e-6)
    assert torch.allclose(knots([delta] * 3), delta, atol=1e-6)


def test_knots_merges_in_the_basis_that_rows_share() -> None:
    """In the eigenvectors (1, 1) and (1, -1) the tasks do not meet, so they are added whole; by TIES they are not."""
    one, other = entries(2, 2, 2, 2).view(2, 2), entries(1, -1, -1, 1).view(2, 2)
    assert torch.allclose(knots([one, other]), one + other, atol=1e-6)
    assert not torch.allclose(ties([one, other]), one + other)


def test_knots_trims_the_coordinates_of_directions_that_exist() -> None:
    """The share counts entries of the shared basis: of rank one in eight rows, a half is of one row's entries."""
    delta = low_rank(1, 8, 10, 1)
    kept = (knots([delta], density=0.5).abs() > 1e-6).any(0)
    assert int(kept.sum()) == 5


# boosting


def test_boosting_raises_what_is_below_the_cut() -> None:
    """The first place where the sum reaches beta of all: what follows is raised to it."""
    matrix = diagonal(5, 3, 1, 1)
    assert torch.allclose(subspace_boosting([matrix], beta=0.5), diagonal(5, 5, 5, 5), atol=1e-6)
    assert torch.allclose(subspace_boosting([matrix], beta=0.51), diagonal(5, 3, 3, 3), atol=1e-6)
    assert torch.allclose(subspace_boosting([matrix], beta=0.0), diagonal(5, 5, 5, 5), atol=1e-6)
    assert torch.equal(subspace_boosting([matrix], beta=1.0), matrix)


def test_boosting_of_a_merge_is_boosting_after_it() -> None:
    """As a step: of the merge's own task vector it makes what it makes of task arithmetic's in one go."""
    deltas = [normal(1, 6, 8), normal(2, 6, 8)]
    merged = deltas[0] + 0.5 * deltas[1]
    assert torch.allclose(subspace_boosting([merged], beta=0.3), subspace_boosting(deltas, [1, 0.5], 0.3), atol=1e-5)


# svc


def test_svc_after_any_merge_takes_the_merge_first() -> None:
    """As a step: the merge, then its parents, gives what task arithmetic and the step in one give."""
    deltas = [normal(1, 6, 8), normal(2, 6, 8), normal(3, 6, 8)]
    merged = 0.3 * (deltas[0] + deltas[1] + deltas[2])
    step = svc([merged, *deltas], merged_first=True, alpha=0.3)
    assert torch.allclose(step, svc(deltas, alpha=0.3, lambda_=0.3), rtol=1e-4, atol=1e-5)


def test_svc_of_a_merge_without_parents_is_refused() -> None:
    """In the call and in the planner's check."""
    with pytest.raises(ValueError, match="name its parents"):
        svc([normal(1, 3, 3)], merged_first=True)
    check = methods()["svc"].check
    assert check is not None
    with pytest.raises(ValueError, match="name its parents"):
        check(weight=[1.0], merged_first=True)


# The decomposition


def test_spectrum_is_the_svd() -> None:
    """Values and the product, for wide, tall and square matrices."""
    for shape in ((7, 13), (13, 7), (9, 9)):
        matrix = normal(1, *shape).double()
        parts = _spectral.spectrum(matrix)
        assert torch.allclose((parts.left * parts.values) @ parts.right, matrix, atol=1e-12)
        assert torch.allclose(parts.values, torch.linalg.svdvals(matrix), rtol=1e-10)


def test_spectrum_is_accurate_far_down() -> None:
    """Singular values over five orders of magnitude: values to 1e-7, vectors orthonormal to 1e-6."""
    left, right = torch.linalg.qr(normal(1, 40, 40).double())[0], torch.linalg.qr(normal(2, 60, 40).double())[0]
    values = torch.logspace(0, -5, 40, dtype=torch.float64)
    parts = _spectral.spectrum((left * values) @ right.T)
    assert torch.allclose(parts.values, values, rtol=1e-7)
    assert torch.allclose(parts.right @ parts.right.T, torch.eye(40, dtype=torch.float64), atol=1e-6)
