"""Rows for tokens that a model lacks, by orthogonal matching pursuit on those it shares with a model that has them.

In the donor's space each such token is written as a sum of few shared tokens; the same sum of the model's own rows is
its row. Not here: which rows those are (planning.inputs.new_rows).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from merger.engine.stored import TORCH_DTYPES, Leaves, rows_of_map
from merger.planning.inputs.rows import PURSUED_ATOMS, PURSUED_ROWS, Pursuit

_NOTHING = 1e-6
"""Less than this share of a vector's length is left of it where it is a sum of the others, but for rounding."""


@dataclass(frozen=True)
class Atoms:
    """The donor's rows of the shared tokens, as stored, and their lengths."""

    rows: Tensor
    lengths: Tensor


def pursue(targets: Tensor, atoms: Atoms, k: int) -> list[tuple[Tensor, Tensor]]:
    """Each target as a sum of at most `k` atoms: their numbers and their factors.

    Orthogonal matching pursuit (Pati, Rezaiifar and Krishnaprasad 1993): the atom next to what is left of the target,
    by angle, is added, and the target projected anew on all that were chosen. To move tokens in this way was proposed
    by Goddard and Fernandes Neto 2025, Training-Free Tokenizer Transplantation via Orthogonal Matching Pursuit.

    Args:
        targets: one a row, float32.
        atoms: rows of the same width.
        k: the most atoms for a target.
    """
    turns = min(k, len(atoms.rows), targets.shape[1])
    left, basis = targets.clone(), torch.zeros(len(targets), turns, targets.shape[1])
    chosen = torch.full((len(targets), turns), -1)
    lengths = targets.norm(dim=1)
    for turn in range(turns):
        best = _nearest(left, atoms, chosen[:, :turn])
        found = _orthogonal(atoms.rows[best].float(), basis[:, :turn])
        length = found.norm(dim=1)
        new = (length > _NOTHING * atoms.lengths[best]) & (left.norm(dim=1) > _NOTHING * lengths)
        basis[:, turn] = torch.where(new[:, None], found / length.clamp_min(1e-30)[:, None], 0.0)
        left = _orthogonal(left, basis[:, turn : turn + 1])
        chosen[:, turn] = torch.where(new, best, -1)
    return [_factors(target, atoms, row[row >= 0]) for target, row in zip(targets, chosen, strict=True)]


def _nearest(left: Tensor, atoms: Atoms, taken: Tensor) -> Tensor:
    """For each row of `left` the atom of the largest cosine, of either sign, that is not taken yet."""
    scores = torch.empty(len(left), len(atoms.rows))
    step = max(1, PURSUED_ATOMS // left.shape[1])
    for start in range(0, len(atoms.rows), step):
        torch.matmul(left, atoms.rows[start : start + step].float().T, out=scores[:, start : start + step])
    scores.abs_().div_(atoms.lengths.clamp_min(1e-30))
    known = taken.clamp_min(0)
    scores.scatter_(1, known, torch.where(taken >= 0, -1.0, scores.gather(1, known)))
    return scores.argmax(dim=1)


def _orthogonal(vectors: Tensor, basis: Tensor) -> Tensor:
    """What of each vector stands at right angles to its own basis; twice, for the rounding of the first time."""
    for _ in range(2):
        vectors = vectors - torch.einsum("bk,bkd->bd", torch.einsum("bkd,bd->bk", basis, vectors), basis)
    return vectors


def _factors(target: Tensor, atoms: Atoms, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The least-squares factors of the chosen atoms."""
    if not len(chosen):
        return chosen, torch.zeros(0)
    solved = torch.linalg.lstsq(atoms.rows[chosen].double().T, target.double()[:, None], driver="gelsd")
    return chosen, solved.solution[:, 0].float()


# ---- as a source ----------------------------------------------------------------------------------------------------


def pursued(source: Pursuit, start: int, stop: int, out: Tensor, leaves: Leaves) -> Tensor:
    """The known rows, and among them those that are pursued."""
    made, width = rows_of_map(source.known, start, stop, out, leaves), source.known.width
    wanted = source.pairs.wanted
    first, last = np.searchsorted(wanted, [start // width, -(-stop // width)])
    for number in range(first, last):
        group, place = divmod(number, PURSUED_ROWS)
        rows = leaves.once((source, group), partial(_group, source, group, leaves))
        row = int(wanted[number]) * width
        begin, end = max(start, row), min(stop, row + width)
        made[begin - start : end - start] = rows[place, begin - row : end - row]
    return made


def _group(source: Pursuit, group: int, leaves: Leaves) -> Tensor:
    """Some of the wanted rows: always the same ones together, whatever block asks for one of them."""
    atoms = leaves.once((source, "atoms"), partial(_atoms, source, leaves))
    theirs = source.pairs.theirs[group * PURSUED_ROWS : (group + 1) * PURSUED_ROWS]
    targets = torch.empty(len(theirs), source.complete.shape[1])
    leaves.rows(source.complete, theirs, targets)
    found = [_sum(source, *chosen, leaves) for chosen in pursue(targets, atoms, source.k)]
    return torch.stack(found)


def _atoms(source: Pursuit, leaves: Leaves) -> Atoms:
    shared, width = source.pairs.shared, source.complete.shape[1]
    rows = torch.empty(len(shared), width, dtype=TORCH_DTYPES[source.complete.dtype])
    leaves.rows(source.complete, shared, rows)
    step = max(1, PURSUED_ATOMS // width)
    lengths = [rows[start : start + step].float().norm(dim=1) for start in range(0, len(rows), step)]
    return Atoms(rows, torch.cat(lengths))


def _sum(source: Pursuit, chosen: Tensor, factors: Tensor, leaves: Leaves) -> Tensor:
    """The sum of the model's own rows of the chosen tokens."""
    own = torch.empty(len(chosen), source.known.width)
    leaves.rows(source.known.parts[0], source.pairs.own[chosen.numpy()], own)
    return factors @ own
