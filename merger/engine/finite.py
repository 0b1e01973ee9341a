"""Whether the entries of a stored tensor are finite, by their bits alone; and which parent's are not.

Not here: what a run does about it (blocks, execute).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from merger.errors import MismatchError, Problem
from merger.planning.inputs.base import Job, Stored
from merger.planning.plan import Plan
from merger.stores.ports import Store, Ticket

ALLOW = "allow_non_finite: true at the top of the recipe keeps what is NaN or infinite as it is"
_SHOWN = 10
_READ_BYTES = 8 << 20


@dataclass(frozen=True)
class _Bits:
    """How a dtype tells what is not finite: patterns from `first` on, the sign left aside, or one pattern alone."""

    size: int
    first: int
    only: bool = False


_BITS: Mapping[str, _Bits] = {
    "F64": _Bits(8, 0x7FF0 << 48),
    "F32": _Bits(4, 0x7F80 << 16),
    "C64": _Bits(4, 0x7F80 << 16),
    "BF16": _Bits(2, 0x7F80),
    "F16": _Bits(2, 0x7C00),
    "F8_E5M2": _Bits(1, 0x7C),
    "F8_E4M3": _Bits(1, 0x7F),
    "F8_E8M0": _Bits(1, 0xFF, only=True),
    "F8_E4M3FNUZ": _Bits(1, 0x80, only=True),
    "F8_E5M2FNUZ": _Bits(1, 0x80, only=True),
}
"""Integers are not there: all of them are finite."""


def is_finite(raw: Any, dtype: str) -> bool:
    """Whether no entry is infinite or NaN, at the speed of reading: by the largest bit pattern of either sign.

    Args:
        raw: the bytes of whole entries.
        dtype: theirs, as safetensors writes it.
    """
    if (bits := _BITS.get(dtype)) is None or not len(raw):
        return True
    found = np.frombuffer(raw, f"<u{bits.size}")
    if bits.only:
        return bits.first not in found
    signed = found.view(f"<i{bits.size}")
    return bool(signed.max() < bits.first and found.max() < bits.first + (1 << (8 * bits.size - 1)))


def not_finite(raw: Any, dtype: str) -> int:
    """How many entries are infinite or NaN."""
    if is_finite(raw, dtype):
        return 0
    bits = _BITS[dtype]
    found = np.frombuffer(raw, f"<u{bits.size}")
    odd = found == bits.first if bits.only else (found & ((1 << (8 * bits.size - 1)) - 1)) >= bits.first
    return int(np.count_nonzero(odd))


class NotFinite(MismatchError):
    """Something was made that is not finite, or could not be made of such entries.

    Args:
        job: the output's tensor of which it is a part.
        what: what came out.
        hint: what may be to blame where no parent is.
    """

    def __init__(self, job: Job, what: str, hint: str | None = None) -> None:
        super().__init__(Problem(what, where=f"tensor {job.name}", hint=hint))
        self.job = job

    def __reduce__(self) -> Any:
        return MismatchError, (self.problems,)


def explain(found: NotFinite, plan: Plan, jobs: Sequence[Job], store: Store) -> MismatchError:
    """The refusal with the parents that hold such entries, and in which tensors; these are read once more.

    Args:
        jobs: those that were made with it: what its guilty parents give to them is looked at, too.

    Raises:
        ModelError: bytes of a model cannot be read.
    """
    counted = dict(_count(found.job.reads, plan, store))
    guilty = {stored.model for stored in counted}
    cause = found.__cause__
    if not counted and cause is not None and not type(cause).__name__.endswith("LinAlgError"):  # numpy's or torch's
        raise cause  # no entry of a model is to blame for it
    if not counted:
        told = "and no parent holds NaN or an infinity"
        return MismatchError([replace(problem, what=f"{problem.what}, {told}") for problem in found.problems])
    others = {stored: None for job in jobs for stored in job.reads if stored.model in guilty and stored not in counted}
    counted |= dict(_count(tuple(others), plan, store))
    problems = [
        Problem(f"{say(count)} of {plan.locked.models[stored.model].name} {are(count)} NaN or infinite",
                where=f"tensor {stored.tensor.name}", hint=f"take another model; or {ALLOW}")
        for stored, count in counted.items()
    ]  # fmt: skip
    more = [] if len(problems) <= _SHOWN else [Problem(f"and {len(problems) - _SHOWN} more tensors of the same")]
    return MismatchError([*problems[:_SHOWN], *more])


def say(count: int) -> str:
    """How many entries, in words."""
    return f"{count:,} {'entry' if count == 1 else 'entries'}"


def are(count: int) -> str:
    """The verb."""
    return "is" if count == 1 else "are"


def _count(leaves: Sequence[Stored], plan: Plan, store: Store) -> Iterator[tuple[Stored, int]]:
    """Those of the stored tensors that are not finite, and in how many entries."""
    looked = [stored for stored in leaves if stored.tensor.dtype in _BITS]
    models = plan.locked.models
    tickets = [Ticket(models[of.model].located, of.tensor.file, of.tensor.start, of.tensor.stop) for of in looked]
    room = memoryview(bytearray(_READ_BYTES))
    with closing(store.reader(tickets, _READ_BYTES)) as reader:
        for number, stored in enumerate(looked):
            count = 0
            for offset in range(0, stored.tensor.nbytes, _READ_BYTES):
                part = room[: min(_READ_BYTES, stored.tensor.nbytes - offset)]
                reader.read(number, offset, part)
                count += not_finite(part, stored.tensor.dtype)
            if count:
                yield stored, count
