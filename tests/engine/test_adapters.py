"""A matrix with an adapter's product is read block by block: any cut gives the same bits, and the right numbers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merger.engine.readers import load_input
from merger.models.checkpoint import TensorInfo
from merger.planning.inputs import low_rank as products
from merger.planning.inputs.base import Input, Stored
from merger.planning.inputs.low_rank import Added, ExpertColumns, ExpertsLowRank, LowRank, Transposed


@dataclass
class Held:
    """Tensors in memory in the place of files, and how many entries of each were asked for at once at most."""

    tensors: dict[str, Tensor]
    most: dict[str, int] = field(default_factory=dict)

    def entries(self, leaf: Stored, start: int, stop: int, out: Tensor, step: int = 1) -> Tensor:
        name = leaf.tensor.name
        self.most[name] = max(self.most.get(name, 0), stop - start)
        found = self.tensors[name].reshape(-1)[start:stop][-start % step :: step]
        return out[: len(found)].copy_(found)

    def once(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        return make()


def stored(name: str, *shape: int) -> Stored:
    return Stored(0, TensorInfo(name, "F32", shape, "f", 0, 4 * torch.Size(shape).numel()))


def drawn(seed: int, rows: int, columns: int, rank: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"w": (rows, columns), "a": (rank, columns), "b": (rows, rank), "m": (rows,)}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def pieces(source: Input, held: Held, cuts: Sequence[int]) -> Tensor:
    """The source's entries, block by block as the cuts lie."""
    entries = torch.Size(source.shape).numel()
    places = sorted({0, entries, *(cut % (entries + 1) for cut in cuts)})
    made = [load_input(source, start, stop, torch.empty(stop - start), held) for start, stop in pairwise(places)]
    return torch.cat(made).view(source.shape)


@pytest.mark.parametrize("kind", ["plain", "turned", "dora"])
@given(
    rows=st.integers(1, 40), columns=st.integers(1, 40), rank=st.integers(1, 5), seed=st.integers(0, 99),
    cuts=st.lists(st.integers(0, 1600), max_size=6),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_blocks_of_any_size_make_the_same_sum(
    kind: str, rows: int, columns: int, rank: int, seed: int, cuts: list[int]
) -> None:
    """Bit for bit that of one block, and the sum that torch makes of whole matrices."""
    held = Held(drawn(seed, rows, columns, rank))
    w, a, b, m = (held.tensors[name] for name in "wabm")
    source = LowRank(stored("w", rows, columns), stored("a", rank, columns), stored("b", rows, rank), 0.7)
    expected = w + 0.7 * (b @ a)
    if kind == "turned":
        held.tensors |= {"a": b.T.contiguous(), "b": a.T.contiguous()}
        source = LowRank(source.of, stored("a", rank, rows), stored("b", columns, rank), 0.7, transposed=True)
    elif kind == "dora":
        source = LowRank(source.of, source.a, source.b, 0.7, magnitude=stored("m", rows))
        expected = m[:, None] * expected / expected.norm(dim=1, keepdim=True)
    saved = products.PRODUCT_ENTRIES
    products.PRODUCT_ENTRIES = 100
    try:
        whole = pieces(source, held, [])
        assert torch.equal(whole, pieces(source, held, cuts))
    finally:
        products.PRODUCT_ENTRIES = saved
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5)


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
    draw = torch.Generator().manual_seed(seed)
    sizes = {"w": (experts, rows, columns), "a": (rank * experts, inputs), "b": (outputs, rank * experts)}
    held = Held({name: torch.randn(shape, generator=draw) for name, shape in sizes.items()})
    a, b = held.tensors["a"].view(experts, rank, -1), held.tensors["b"].view(outputs, rank, experts)
    delta = torch.einsum("ore,eri->eio" if turned else "ore,eri->eoi", b, a)
    w, *small = (stored(name, *shape) for name, shape in sizes.items())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "PRODUCT_ENTRIES", chunk)
        together = ExpertsLowRank(w, *small, 0.7, turned)
        whole = pieces(together, held, [])
        assert torch.equal(whole, pieces(together, held, cuts))
        for expert in range(experts):
            held.tensors |= {"one": held.tensors["w"][expert], "own": a[expert]}
            of, own = stored("one", rows, columns), stored("own", rank, inputs)
            alone = LowRank(of, own, ExpertColumns(small[1], expert, experts), 0.7, turned)
            torch.testing.assert_close(pieces(alone, held, cuts), whole[expert], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(whole, held.tensors["w"] + 0.7 * delta, rtol=1e-4, atol=1e-5)


@given(
    rows=st.integers(1, 12), columns=st.integers(1, 12), cuts=st.lists(st.integers(0, 144), max_size=6)
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_matrix_that_is_stored_transposed_is_read_in_any_blocks(rows: int, columns: int, cuts: list[int]) -> None:
    """Its rows are the stored columns."""
    held = Held({"m": torch.arange(float(rows * columns)).view(columns, rows)})
    assert torch.equal(pieces(Transposed(stored("m", columns, rows)), held, cuts), held.tensors["m"].T)


@given(size=st.integers(1, 50), cuts=st.lists(st.integers(0, 50), max_size=3))
@settings(max_examples=20, deadline=None)
def test_what_is_added_to_a_bias_is_added_in_any_blocks(size: int, cuts: list[int]) -> None:
    """One small tensor and another, times the scale."""
    held = Held({"to": torch.arange(float(size)), "plus": torch.ones(size)})
    source = Added(stored("to", size), stored("plus", size), 0.25)
    assert pieces(source, held, cuts).tolist() == [0.25 + n for n in range(size)]


def test_a_block_reads_no_more_of_the_matrix_than_its_entries() -> None:
    """So a file is read front to back, once, and only the small matrices are kept."""
    held = Held(drawn(1, 64, 32, 2))
    source = LowRank(stored("w", 64, 32), stored("a", 2, 32), stored("b", 64, 2), 1.0)
    pieces(source, held, [500, 900])
    assert held.most["w"] == 64 * 32 - 900
    assert source.reread == (source.a, source.b)
    assert LowRank(source.of, source.a, source.b, 1.0, magnitude=stored("m", 64)).reread[0] == source.of
