"""Rows for tokens that a model lacks, by orthogonal matching pursuit on those it shares with a model that has them.

In its space each such token is written as a sum of few shared tokens; the same sum of the model's own rows is
its row. Not here: which rows those are (planning.inputs.new_rows).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from merger.engine.inputs.stored import StoredTensors, floats, read_rows, rows_of_map
from merger.methods.steps.dtypes import Held
from merger.methods.steps.step import Array
from merger.planning.inputs.rows import PURSUED_ATOMS, PURSUED_ROWS, Numbers, Pursuit

_NOTHING = 1e-6
"""Less than this share of a vector's length is left of it where it is a sum of the others, but for rounding."""


@dataclass(frozen=True)
class Atoms:
    """The complete tensor's rows of the shared tokens, as stored, their width and their lengths."""

    held: Held
    width: int
    lengths: Array

    def rows(self, start: int, stop: int) -> Array:
        """Some of them in float32."""
        entries = (stop - start) * self.width
        return self.held.floats(start * self.width, stop * self.width, floats(entries)).reshape(-1, self.width)

    def chosen(self, numbers: Numbers) -> Array:
        """Those of these numbers in float32."""
        bits = self.held.bits.reshape(-1, self.width)[numbers].reshape(-1)
        return Held(bits, self.held.dtype).floats(0, bits.size, floats(bits.size)).reshape(-1, self.width)


def measure_atoms(held: Held, width: int) -> Atoms:
    """Rows as stored, with their lengths."""
    count, step = held.bits.size // width, max(1, PURSUED_ATOMS // width)
    bare = Atoms(held, width, floats(0))
    parts = [_lengths(bare.rows(start, min(start + step, count))) for start in range(0, count, step)]
    return Atoms(held, width, np.concatenate(parts))


def _lengths(rows: Array) -> Array:
    found: Array = np.sqrt((rows * rows).sum(1))
    return found


def pursue(targets: Array, atoms: Atoms, k: int) -> list[tuple[Numbers, Array]]:
    """Each target as a sum of at most `k` atoms: their numbers and their factors.

    Orthogonal matching pursuit (Pati, Rezaiifar and Krishnaprasad 1993): the atom next to what is left of the target,
    by angle, is added, and the target projected anew on all that were chosen. To move tokens in this way was proposed
    by Goddard and Fernandes Neto 2025, Training-Free Tokenizer Transplantation via Orthogonal Matching Pursuit.

    Args:
        targets: one a row, float32.
        atoms: rows of the same width.
        k: the most atoms for a target.
    """
    count, width = targets.shape
    turns = min(k, len(atoms.lengths), width)
    left, basis = targets, np.zeros((count, turns, width), np.float32)
    chosen = np.full((count, turns), -1)
    lengths = _lengths(targets)
    for turn in range(turns):
        best = _nearest(left, atoms, chosen[:, :turn])
        found = _orthogonal(atoms.chosen(best), basis[:, :turn])
        length = _lengths(found)
        new = (length > _NOTHING * atoms.lengths[best]) & (_lengths(left) > _NOTHING * lengths)
        basis[new, turn] = found[new] / length[new, None]
        left = _orthogonal(left, basis[:, turn : turn + 1])
        chosen[new, turn] = best[new]
    return [_factors(target, atoms, row[row >= 0]) for target, row in zip(targets, chosen, strict=True)]


def _nearest(left: Array, atoms: Atoms, taken: Numbers) -> Numbers:
    """For each row of `left` the atom of the largest cosine, of either sign, that is not taken yet."""
    count = len(atoms.lengths)
    scores, step = floats(len(left), count), max(1, PURSUED_ATOMS // atoms.width)
    for start in range(0, count, step):
        stop = min(start + step, count)
        np.matmul(left, atoms.rows(start, stop).T, out=scores[:, start:stop])
    np.abs(scores, out=scores)
    scores /= np.maximum(atoms.lengths, np.float32(1e-30))
    rows, turns = np.nonzero(taken >= 0)
    scores[rows, taken[rows, turns]] = -1.0
    nearest: Numbers = scores.argmax(axis=1)
    return nearest


def _orthogonal(vectors: Array, basis: Array) -> Array:
    """What of each vector stands at right angles to its own basis; twice, for the rounding of the first time."""
    for _ in range(2):
        along = (basis @ vectors[:, :, None])[:, None, :, 0]
        vectors = np.subtract(vectors, (along @ basis)[:, 0])
    return vectors


def _factors(target: Array, atoms: Atoms, chosen: Numbers) -> tuple[Numbers, Array]:
    """The least-squares factors of the chosen atoms."""
    if not len(chosen):
        return chosen, floats(0)
    rows = atoms.chosen(chosen).astype(np.float64)
    return chosen, np.linalg.lstsq(rows.T, target.astype(np.float64), rcond=None)[0].astype(np.float32)


def pursue_rows(source: Pursuit, start: int, stop: int, out: Array, tensors: StoredTensors) -> Array:
    """The known rows, and among them those that are pursued."""
    made, width = rows_of_map(source.known, start, stop, out, tensors), source.known.width
    wanted = source.pairs.wanted
    first, last = np.searchsorted(wanted, [start // width, -(-stop // width)])
    for number in range(first, last):
        group, place = divmod(number, PURSUED_ROWS)
        rows = tensors.once((source, group), partial(_group, source, group, tensors))
        row = int(wanted[number]) * width
        begin, end = max(start, row), min(stop, row + width)
        made[begin - start : end - start] = rows[place, begin - row : end - row]
    return made


def _group(source: Pursuit, group: int, tensors: StoredTensors) -> Array:
    """Some of the wanted rows: always the same ones together, whatever block asks for one of them."""
    atoms = tensors.once((source, "atoms"), partial(_atoms, source, tensors))
    theirs = source.pairs.theirs[group * PURSUED_ROWS : (group + 1) * PURSUED_ROWS]
    targets = read_rows(tensors, source.complete, theirs)
    return np.stack([_sum(source, *chosen, tensors) for chosen in pursue(targets, atoms, source.k)])


def _atoms(source: Pursuit, tensors: StoredTensors) -> Atoms:
    width = source.complete.shape[1]
    return measure_atoms(tensors.rows(source.complete, source.pairs.shared, width), width)


def _sum(source: Pursuit, chosen: Numbers, factors: Array, tensors: StoredTensors) -> Array:
    """The sum of the model's own rows of the chosen tokens."""
    found: Array = factors @ read_rows(tensors, source.known.parts[0], source.pairs.own[chosen])
    return found
