"""What of a merge is made again to compare it with what was published: which tensors, and which entries of each.

Drawn from a seed, in integers. Not here: making it again and comparing (proof), and what it proves (verify).
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from merger.methods.registry import Method
from merger.models.checkpoint import ITEM_BYTES
from merger.planning.budget import routers_of
from merger.planning.inputs.base import Job, Stored
from merger.planning.plan import Plan

SHARE = 0.02
"""Of all that would be read to compare everything. Headers and small files come on top; less than 3 % is promised."""

MOST_BYTES, MOST_TENSORS = 1_000_000_000, 512
_LEAST_RUN, _LONGEST_RUN = 64, 1 << 15


@dataclass(frozen=True)
class Piece:
    """Entries ``[start, stop)`` of the tensor that a job makes.

    Args:
        file: the shard that holds it.
        job: how it is made.
        start: its first entry.
        stop: the entry after its last one.
        cost: how many bytes are read for it, of the parents and of the result.
    """

    file: str
    job: Job
    start: int
    stop: int
    cost: int

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole tensor."""
        return (self.start, self.stop) == (0, self.job.entries)

    @property
    def nbytes(self) -> int:
        """How many bytes of the result it is."""
        return (self.stop - self.start) * ITEM_BYTES[self.job.dtype]


@dataclass(frozen=True)
class Sample:
    """The pieces that are compared, and the names of the tensors that would have taken too many bytes."""

    pieces: tuple[Piece, ...]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mismatch:
    """A tensor that is not what its recipe makes.

    Args:
        tensor: its name.
        file: the shard that holds it.
        entry: the first entry that differs.
        found: that number, as it was published.
        expected: what it is when it is made again.
        count: how many entries differ.
        compared: of how many that were compared.
    """

    tensor: str
    file: str
    entry: int
    found: str
    expected: str
    count: int
    compared: int


def whole_tensor(file: str, job: Job) -> Piece:
    """A tensor in full."""
    return Piece(file, job, 0, job.entries, job.nbytes + sum(stored.tensor.nbytes for stored in job.reads))


def draw(planned: Plan, table: Mapping[str, Method], seed: int, tensors: int | None = None) -> Sample:
    """So many tensors in full; or, if no number is given, as much of each as the share allows.

    A method that makes each entry from the same entry of its inputs alone is tried on a run of entries of each tensor.
    Another one has to read its inputs in full: such tensors are taken in a random order, as long as they fit. A router
    that was computed from prompts takes most of a model, so it is left out.

    Args:
        seed: another seed, another sample.
        tensors: how many are compared in full.
    """
    chance = random.Random(seed)
    pieces = [whole_tensor(shard.name, job) for shard in planned.shards for job in shard.jobs if job.entries]
    chance.shuffle(pieces)
    if tensors is not None:
        return Sample(tuple(pieces[:tensors]))
    routers = [piece.job.name for piece in pieces if routers_of([piece.job])]
    pieces = [piece for piece in pieces if piece.job.name not in routers]
    left = min(MOST_BYTES, int(SHARE * sum(piece.cost for piece in pieces)))
    allowed = left // max(1, len(pieces))
    pieces = [_run(piece, table[piece.job.method], allowed, chance) for piece in pieces]
    taken, left_out = list[Piece](), list[str]()
    for piece in sorted(pieces, key=lambda piece: piece.is_whole and piece.cost > allowed):
        if piece.cost > left or len(taken) == MOST_TENSORS:
            left_out.append(piece.job.name)
        else:
            taken.append(piece)
            left -= piece.cost
    return Sample(tuple(taken), (*left_out, *routers))


def _run(piece: Piece, method: Method, allowed: int, chance: random.Random) -> Piece:
    """A part of a tensor that costs about as many bytes as allowed; the whole, if its method needs the whole."""
    job = piece.job
    alone = job.is_copy or (method.unit == "entries" and method.measure is None)
    if not (alone and all(isinstance(source, Stored) for source in job.sources)):
        return piece  # an entry of the result takes more than that entry of each stored tensor
    of_an_entry = piece.cost // job.entries
    length = min(max(allowed // of_an_entry // _LEAST_RUN * _LEAST_RUN, _LEAST_RUN), _LONGEST_RUN)
    if length >= job.entries:
        return piece
    start = min(chance.randrange(0, job.entries, _LEAST_RUN), job.entries - length)
    return Piece(piece.file, job, start, start + length, length * of_an_entry)
