"""Rows by a map and rows by pursuit, against straight computations in numpy."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merger.engine.pursuit import Atoms, pursue
from merger.engine.readers import load_input
from merger.models.checkpoint import TensorInfo
from merger.planning.inputs.base import Stored
from merger.planning.inputs.rows import ALL_ROWS, Numbers, Pursuit, RowMap, RowPairs, Rows


class Tables:
    """Stored tensors that are at hand, in place of a job's."""

    def __init__(self, *tables: Tensor) -> None:
        self.stored = [Stored(number, _info(table)) for number, table in enumerate(tables)]
        self._tables = dict(zip(self.stored, tables, strict=True))
        self._made: dict[Hashable, Any] = {}

    def entries(self, leaf: Stored, start: int, stop: int, out: Tensor, step: int = 1) -> Tensor:
        found = self._tables[leaf].reshape(-1)[start:stop][-start % step :: step]
        return out[: len(found)].copy_(found)

    def rows(self, leaf: Stored, numbers: Numbers, out: Tensor) -> None:
        out.copy_(self._tables[leaf][torch.from_numpy(numbers)].reshape(out.shape))

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def _info(table: Tensor) -> TensorInfo:
    return TensorInfo("table", "F32", tuple(table.shape), "model.safetensors", 0, table.nbytes)


def row_map(lists: list[list[tuple[int, int]]]) -> RowMap:
    flat = np.array([entry for entries in lists for entry in entries], dtype=np.int64).reshape(-1, 2)
    starts = np.cumsum([0, *(len(entries) for entries in lists)])
    return RowMap(starts, flat[:, 0], flat[:, 1])


def mean_of(entries: list[tuple[int, int]], tables: list[Tensor], width: int) -> Tensor:
    rows = [
        tables[leaf].double().mean(dim=0) if row == ALL_ROWS else tables[leaf][row].double() for leaf, row in entries
    ]
    return torch.stack(rows).mean(dim=0).float() if rows else torch.zeros(width)


ENTRY = st.tuples(st.integers(0, 1), st.integers(ALL_ROWS, 4))
RUN = st.integers(0, 4).map(lambda start: [[(0, row)] for row in range(start, 5)])
LISTS = st.one_of(RUN, st.lists(st.lists(ENTRY, max_size=4), min_size=1, max_size=5))


@given(st.lists(LISTS, min_size=1, max_size=4), st.sampled_from([1, 3, 4]), st.integers(1, 9), st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_part_of_mapped_rows_is_what_the_map_says(
    drawn: list[list[list[tuple[int, int]]]], width: int, chunk: int, data: st.DataObject
) -> None:
    """Rows, means of rows, means of all, zeros; from and to any entry, every so many, however small the chunks are."""
    lists = [entries for part in drawn for entries in part]
    draw = torch.Generator().manual_seed(0)
    tables = [torch.randn(5, width, generator=draw) for _ in range(2)]
    held = Tables(*tables)
    source = Rows(tuple(held.stored), row_map(lists))
    whole = torch.stack([mean_of(entries, tables, width) for entries in lists]).reshape(-1)
    assert source.shape == (len(lists), width)
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = data.draw(st.integers(start + 1, len(whole)))
    step = data.draw(st.integers(1, 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("merger.engine.stored.CHUNK_ENTRIES", chunk)
        found = load_input(source, start, stop, torch.empty(len(whole)), held, step)
    torch.testing.assert_close(found, whole[start:stop][-start % step :: step], rtol=1e-6, atol=1e-6)


def test_maps_are_equal_by_what_they_say() -> None:
    """And a number that moves from one list to the next makes another one."""
    one, same = row_map([[(0, 1)], [(1, 2)]]), row_map([[(0, 1)], [(1, 2)]])
    other = RowMap(one.starts, one.rows, one.tensors)
    assert (one == same, hash(one) == hash(same), one == other, str(one) == str(other)) == (True, True, False, False)
    assert row_map([[(3, 0)], [(3, 1)]]).is_identity(3)
    assert not row_map([[(3, 0)], [(3, 2)]]).is_identity(3)


# ---- pursuit --------------------------------------------------------------------------------------------------------


def oracle(target: np.ndarray, atoms: np.ndarray, k: int) -> np.ndarray:
    """Orthogonal matching pursuit as the textbook has it: choose, solve anew, look at what is left."""
    chosen: list[int] = []
    factors, left = np.zeros(0), target
    for _ in range(min(k, len(atoms), atoms.shape[1])):
        if np.linalg.norm(left) <= 1e-6 * np.linalg.norm(target):
            break
        scores = np.abs(atoms @ left) / np.linalg.norm(atoms, axis=1)
        scores[chosen] = -1
        chosen.append(int(scores.argmax()))
        factors = np.linalg.lstsq(atoms[chosen].T, target, rcond=None)[0]
        left = target - factors @ atoms[chosen]
    found = np.zeros(len(atoms))
    found[chosen] = factors
    return found


def dense(found: list[tuple[Tensor, Tensor]], count: int) -> np.ndarray:
    """The factors of all atoms, most of them zero."""
    made = np.zeros((len(found), count))
    for row, (chosen, factors) in zip(made, found, strict=True):
        row[chosen.numpy()] = factors.numpy()
    return made


@given(st.integers(1, 40), st.integers(2, 24), st.integers(1, 12), st.integers(0, 99))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_pursuit_chooses_and_weighs_as_the_textbook_does(count: int, width: int, k: int, seed: int) -> None:
    """The same few atoms with the same factors, whatever the numbers of atoms and entries."""
    draw = torch.Generator().manual_seed(seed)
    atoms, targets = torch.randn(count, width, generator=draw), torch.randn(5, width, generator=draw)
    found = dense(pursue(targets, Atoms(atoms, atoms.norm(dim=1)), k), count)
    expected = np.stack([oracle(target.double().numpy(), atoms.double().numpy(), k) for target in targets])
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-4)


def test_a_pursuit_finds_a_sum_of_few_again_and_stops() -> None:
    """A target that is a sum of three of 200 is that sum, an atom is itself, and of two alike one is taken."""
    atoms = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    atoms[7] = atoms[6]
    wanted = torch.zeros(4, 200)
    wanted[0, [3, 50, 120]] = torch.tensor([1.0, -2.0, 0.5])
    wanted[1, 9], wanted[2, 6] = 3.0, 2.0
    found = dense(pursue(wanted @ atoms, Atoms(atoms, atoms.norm(dim=1)), 16), 200)
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)


@pytest.mark.parametrize("block", [5, 64, 1000])
def test_pursued_rows_stand_among_the_known_ones(block: int) -> None:
    """Each is the same sum of the model's rows as of the donor's, and the same bits in whatever blocks it is read."""
    draw = torch.Generator().manual_seed(2)
    own, theirs = torch.randn(30, 6, generator=draw), torch.randn(200, 16, generator=draw)
    mixed = torch.zeros(170, 30)
    mixed[torch.arange(170), torch.arange(170) % 30] = 1.5
    mixed[torch.arange(170), (7 * torch.arange(170) + 3) % 30] -= 0.5
    theirs[30:] = mixed @ theirs[:30]
    held = Tables(own, theirs)
    known = Rows((held.stored[0],), row_map([[(0, row)] for row in range(30)] + [[] for _ in range(170)]))
    pairs = RowPairs(np.arange(30), np.arange(30), np.arange(30, 200), np.arange(30, 200))
    source = Pursuit(known, held.stored[1], pairs, k=4)
    parts = [
        load_input(source, start, min(start + block, 1200), torch.empty(block), held).clone()
        for start in range(0, 1200, block)
    ]
    found = torch.cat(parts).view(200, 6)
    torch.testing.assert_close(found[:30], own, rtol=0, atol=0)
    torch.testing.assert_close(found[30:], mixed @ own, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.reshape(-1), load_input(source, 0, 1200, torch.empty(1200), Tables(own, theirs)))
