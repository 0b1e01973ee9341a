"""A matrix with an adapter's product is read block by block: any cut gives the same bits, and the right numbers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import Floats, Tables, drawn, stored

from merger.engine.inputs.decompose import decompose
from merger.engine.inputs.readers import load_input
from merger.planning.inputs import low_rank as products
from merger.planning.inputs.base import Input
from merger.planning.inputs.low_rank import Added, ExpertColumns, ExpertsLowRank, LowRank, Transposed


def pieces(source: Input, held: Any, cuts: Sequence[int]) -> Floats:
    """The source's entries, block by block as the cuts lie."""
    entries = int(np.prod(source.shape))
    places = sorted({0, entries, *(cut % (entries + 1) for cut in cuts)})
    room = np.empty(entries, np.float32)
    made = [load_input(source, start, stop, room[start:stop], held) for start, stop in pairwise(places)]
    return np.concatenate(made).reshape(source.shape)


def small_matrices(seed: int, rows: int, columns: int, rank: int) -> Tables:
    return Tables(drawn(seed, w=(rows, columns), a=(rank, columns), b=(rows, rank), m=(rows,)))


@pytest.mark.parametrize("kind", ["plain", "turned", "dora"])
@given(
    rows=st.integers(1, 40), columns=st.integers(1, 40), rank=st.integers(1, 5), seed=st.integers(0, 99),
    cuts=st.lists(st.integers(0, 1600), max_size=6),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_blocks_of_any_size_make_the_same_sum(
    kind: str, rows: int, columns: int, rank: int, seed: int, cuts: list[int]
) -> None:
    """Bit for bit that of one block, and the sum of whole matrices."""
    held = small_matrices(seed, rows, columns, rank)
    w, a, b, m = (held.tables[name] for name in "wabm")
    source = LowRank(stored("w", rows, columns), stored("a", rank, columns), stored("b", rows, rank), 0.7)
    expected = w + 0.7 * (b @ a)
    if kind == "turned":
        held.tables |= {"a": b.T.copy(), "b": a.T.copy()}
        source = LowRank(source.of, stored("a", rank, rows), stored("b", columns, rank), 0.7, transposed=True)
    elif kind == "dora":
        source = LowRank(source.of, source.a, source.b, 0.7, magnitude=stored("m", rows))
        expected = m[:, None] * expected / np.linalg.norm(expected, axis=1, keepdims=True)
    saved = products.PRODUCT_ENTRIES
    products.PRODUCT_ENTRIES = 100
    try:
        whole = pieces(source, held, [])
        assert np.array_equal(whole, pieces(source, held, cuts))
    finally:
        products.PRODUCT_ENTRIES = saved
    np.testing.assert_allclose(whole, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("turned", [False, True])
@given(
    experts=st.integers(1, 5), rows=st.integers(1, 9), columns=st.integers(1, 9), rank=st.integers(1, 4),
    seed=st.integers(0, 99), cuts=st.lists(st.integers(0, 405), max_size=6), chunk=st.integers(1, 60),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_each_expert_gets_its_own_product_in_any_blocks(
    turned: bool, experts: int, rows: int, columns: int, rank: int, seed: int, cuts: list[int], chunk: int
) -> None:
    """As PEFT multiplies: A of one expert behind that of the other, in B's rows the experts in turn; the
    same whether all experts are one tensor or each is one.
    """
    outputs, inputs = (columns, rows) if turned else (rows, columns)
    sizes = {"w": (experts, rows, columns), "a": (rank * experts, inputs), "b": (outputs, rank * experts)}
    held = Tables(drawn(seed, **sizes))
    a, b = held.tables["a"].reshape(experts, rank, -1), held.tables["b"].reshape(outputs, rank, experts)
    delta = np.einsum("ore,eri->eio" if turned else "ore,eri->eoi", b, a)
    w, *small = (stored(name, *shape) for name, shape in sizes.items())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "PRODUCT_ENTRIES", chunk)
        together = ExpertsLowRank(w, *small, 0.7, turned)
        whole = pieces(together, held, [])
        assert np.array_equal(whole, pieces(together, held, cuts))
        for expert in range(experts):
            held.tables |= {"one": held.tables["w"][expert], "own": a[expert]}
            of, own = stored("one", rows, columns), stored("own", rank, inputs)
            alone = LowRank(of, own, ExpertColumns(small[1], expert, experts), 0.7, turned)
            np.testing.assert_allclose(pieces(alone, held, cuts), whole[expert], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(whole, held.tables["w"] + 0.7 * delta, rtol=1e-4, atol=1e-5)


@given(
    rows=st.integers(1, 12), columns=st.integers(1, 12), cuts=st.lists(st.integers(0, 144), max_size=6)
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_matrix_that_is_stored_transposed_is_read_in_any_blocks(rows: int, columns: int, cuts: list[int]) -> None:
    """Its rows are the stored columns."""
    held = Tables({"m": np.arange(rows * columns, dtype=np.float32).reshape(columns, rows)})
    assert np.array_equal(pieces(Transposed(stored("m", columns, rows)), held, cuts), held.tables["m"].T)


@given(size=st.integers(1, 50), cuts=st.lists(st.integers(0, 50), max_size=3))
@settings(max_examples=20, deadline=None)
def test_what_is_added_to_a_bias_is_added_in_any_blocks(size: int, cuts: list[int]) -> None:
    """One small tensor and another, times the scale."""
    held = Tables({"to": np.arange(size, dtype=np.float32), "plus": np.ones(size, np.float32)})
    source = Added(stored("to", size), stored("plus", size), 0.25)
    assert pieces(source, held, cuts).tolist() == [0.25 + n for n in range(size)]


def test_a_block_reads_no_more_of_the_matrix_than_its_entries() -> None:
    """So a file is read front to back, once, and only the small matrices are kept."""
    held = small_matrices(1, 64, 32, 2)
    source = LowRank(stored("w", 64, 32), stored("a", 2, 32), stored("b", 64, 2), 1.0)
    pieces(source, held, [500, 900])
    assert held.most["w"] == 64 * 32 - 900
    assert source.reread == (source.a, source.b)
    assert LowRank(source.of, source.a, source.b, 1.0, magnitude=stored("m", 64)).reread[0] == source.of


# ---- taken apart ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "rank"), [((300, 40), 5), ((40, 300), 5), ((7, 5), 9), ((1, 50), 1), ((50, 1), 1)])
def test_exact_low_rank_matrices_are_taken_apart_to_rounding(shape: tuple[int, int], rank: int) -> None:
    """Of any form, read in pieces of any size."""
    kept = min(rank, *shape)
    matrix = np.matmul(*drawn(3, left=(shape[0], kept), right=(kept, shape[1])).values())
    for step in (1, 7, 1000):
        found = decompose(lambda step=step: ((n, matrix[n : n + step]) for n in range(0, shape[0], step)), shape, kept)
        again = found.left * found.values @ found.right
        assert np.linalg.norm(again - matrix) < 2e-6 * np.linalg.norm(matrix)
        assert found.square == pytest.approx(float((matrix.astype(np.float64) ** 2).sum()))
        values = np.linalg.svd(matrix, compute_uv=False)[:kept]
        np.testing.assert_allclose(found.values, values, rtol=1e-4, atol=1e-4)


def test_a_matrix_with_a_slowly_falling_spectrum_is_cut_nearly_at_best() -> None:
    """The error is within a thousandth of the best at that rank, where singular values fall like 1/n."""
    given = drawn(4, left=(400, 300), right=(300, 300))
    left, right = (np.linalg.qr(matrix).Q for matrix in given.values())
    values = (1.0 / np.arange(1, 301)).astype(np.float32)
    matrix = left * values @ right.T
    found = decompose(lambda: iter([(0, matrix)]), (400, 300), 32)
    error = np.linalg.norm(matrix - found.left * found.values @ found.right)
    assert error <= 1.001 * np.linalg.norm(values[32:])
