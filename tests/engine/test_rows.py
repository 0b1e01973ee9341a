"""Rows by a map and rows by pursuit, against straight computations in numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import Floats, Tables, drawn, stored

from merger.engine.inputs.pursuit import measure_atoms, pursue
from merger.engine.inputs.readers import load_input
from merger.methods.steps.dtypes import Held
from merger.planning.inputs.derived import Stacked
from merger.planning.inputs.rows import ALL_ROWS, Numbers, Pursuit, RowMap, RowPairs, Rows


def row_map(lists: list[list[tuple[int, int]]]) -> RowMap:
    flat = np.array([entry for entries in lists for entry in entries], dtype=np.int64).reshape(-1, 2)
    starts = np.cumsum([0, *(len(entries) for entries in lists)])
    return RowMap(starts, flat[:, 0], flat[:, 1])


def mean_of(entries: list[tuple[int, int]], tables: list[Floats], width: int) -> Floats:
    rows = [
        tables[leaf].mean(axis=0, dtype=np.float64) if row == ALL_ROWS else tables[leaf][row] for leaf, row in entries
    ]
    return np.mean(rows, axis=0, dtype=np.float64) if rows else np.zeros(width)


ENTRY = st.tuples(st.integers(0, 1), st.integers(ALL_ROWS, 4))
RUN = st.integers(0, 4).map(lambda start: [[(0, row)] for row in range(start, 5)])
LISTS = st.one_of(RUN, st.lists(st.lists(ENTRY, max_size=4), min_size=1, max_size=5))


@given(st.lists(LISTS, min_size=1, max_size=4), st.sampled_from([1, 3, 4]), st.integers(1, 9), st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_part_of_mapped_rows_is_what_the_map_says(
    maps: list[list[list[tuple[int, int]]]], width: int, chunk: int, data: st.DataObject
) -> None:
    """Rows, means of rows, means of all, zeros; from and to any entry, however small the chunks are."""
    lists = [entries for part in maps for entries in part]
    tables = drawn(0, one=(5, width), other=(5, width))
    source = Rows((stored("one", 5, width), stored("other", 5, width)), row_map(lists))
    whole = np.stack([mean_of(entries, [*tables.values()], width) for entries in lists]).reshape(-1)
    assert source.shape == (len(lists), width)
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = data.draw(st.integers(start + 1, len(whole)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("merger.engine.inputs.stored.CHUNK_ENTRIES", chunk)
        found = load_input(source, start, stop, np.empty(len(whole), np.float32), Tables(tables))
    np.testing.assert_allclose(found, whole[start:stop], rtol=1e-6, atol=1e-6)


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3)), min_size=1, max_size=5),
    st.integers(0, 1), st.integers(1, 3), st.integers(1, 20), st.data(),
)  # fmt: skip
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_part_of_a_stack_is_made_of_its_layers_shares(
    taken: list[tuple[int, int]], axis: int, share: int, chunk: int, data: st.DataObject
) -> None:
    """Of two givers of four layers each, whose shares lie along either axis."""
    shape = (4 * share, 3) if axis == 0 else (3, 4 * share)
    tables = drawn(1, one=shape, other=shape)
    pieces = [np.split(tables[name], 4, axis) for name in ("one", "other")]
    whole = np.concatenate([pieces[of][layer] for of, layer in taken], axis)
    source = Stacked((stored("one", *shape), stored("other", *shape)), tuple(taken), axis, share)
    assert source.shape == whole.shape
    start = data.draw(st.integers(0, whole.size - 1))
    stop = data.draw(st.integers(start + 1, whole.size))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("merger.engine.inputs.readers.CHUNK_ENTRIES", chunk)
        found = load_input(source, start, stop, np.empty(whole.size, np.float32), Tables(tables))
    np.testing.assert_array_equal(found, whole.reshape(-1)[start:stop])


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


def dense(found: list[tuple[Numbers, Floats]], count: int) -> np.ndarray:
    """The factors of all atoms, most of them zero."""
    made = np.zeros((len(found), count))
    for row, (chosen, factors) in zip(made, found, strict=True):
        row[chosen] = factors
    return made


@given(st.integers(1, 40), st.integers(2, 24), st.integers(1, 12), st.integers(0, 99))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_pursuit_chooses_and_weighs_as_the_textbook_does(count: int, width: int, k: int, seed: int) -> None:
    """The same few atoms with the same factors, whatever the numbers of atoms and entries."""
    atoms, targets = drawn(seed, atoms=(count, width), targets=(5, width)).values()
    found = dense(pursue(targets, measure_atoms(Held(atoms.reshape(-1), "F32"), width), k), count)
    expected = np.stack([oracle(target, atoms, k) for target in targets.astype(np.float64)])
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-4)


def test_a_pursuit_finds_a_sum_of_few_again_and_stops() -> None:
    """A target that is a sum of three of 200 is that sum, an atom is itself, and of two alike one is taken."""
    atoms = drawn(1, atoms=(200, 64))["atoms"]
    atoms[7] = atoms[6]
    wanted = np.zeros((4, 200), np.float32)
    wanted[0, [3, 50, 120]] = [1.0, -2.0, 0.5]
    wanted[1, 9], wanted[2, 6] = 3.0, 2.0
    found = dense(pursue(wanted @ atoms, measure_atoms(Held(atoms.reshape(-1), "F32"), 64), 16), 200)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("block", [5, 64, 1000])
def test_pursued_rows_stand_among_the_known_ones(block: int) -> None:
    """Each is the same sum of the model's rows as of the donor's, and the same bits in whatever blocks it is read."""
    tables = drawn(2, own=(30, 6), theirs=(200, 16))
    mixed, places = np.zeros((170, 30), np.float32), np.arange(170)
    mixed[places, places % 30] = 1.5
    mixed[places, (7 * places + 3) % 30] -= 0.5
    tables["theirs"][30:] = mixed @ tables["theirs"][:30]
    known = Rows((stored("own", 30, 6),), row_map([[(0, row)] for row in range(30)] + [[] for _ in range(170)]))
    pairs = RowPairs(np.arange(30), np.arange(30), np.arange(30, 200), np.arange(30, 200))
    source = Pursuit(known, stored("theirs", 200, 16), pairs, k=4)

    def read(block: int) -> Floats:
        held, room = Tables(tables), np.empty(1200, np.float32)
        for start in range(0, 1200, block):
            load_input(source, start, min(start + block, 1200), room[start : start + block], held)
        return room

    found = read(block).reshape(200, 6)
    assert np.array_equal(found[:30], tables["own"])
    np.testing.assert_allclose(found[30:], mixed @ tables["own"], rtol=1e-4, atol=1e-4)
    assert np.array_equal(found.reshape(-1), read(1200))
