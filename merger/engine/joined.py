"""Small tensors made together: one read, one task and one write for many. Not here: which are (planning.budget)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from merger.engine.runner import JobRunner, Work, blocks, total_of
from merger.engine.tensors import Block, Bytes, RunSetup
from merger.methods.steps.dtypes import Held
from merger.methods.steps.step import tile
from merger.planning.inputs.base import Job, JoinedJob, Stored


class _JoinedWork(Work):
    """Small jobs under way whose inputs are read at once, but each of which is measured and made by itself."""

    wants_preparing = False

    def make(self, block: Block, out: Bytes) -> memoryview:
        end, whole = 0, self._making
        with tile():
            held = [self.tensors.bits(source, block.start, block.stop) for source in self.job.reads]
            for job, part in self.job.parts:
                inputs = _Inputs({of: Held(all.bits[part], all.dtype) for of, all in zip(job.reads, held, strict=True)})
                making = JobRunner(job, whole.run, whole.seed, inputs, job)
                making.measure()
                for piece in blocks(job, self.method):
                    end += making.round(piece, out[end:]).nbytes
                if making.seen:
                    whole.seen[part.start] = total_of(making.seen)
        return out[:end].data


@dataclass(frozen=True)
class _Inputs:
    """The stored tensors of a job that are in memory, for its runner."""

    held: Mapping[Stored, Held]
    odd: Mapping[Any, int] = field(default_factory=dict)

    def bits(self, stored: Stored, start: int, stop: int) -> Held:
        whole = self.held[stored]
        return Held(whole.bits[start:stop], whole.dtype)

    def with_read(self, *_: object) -> _Inputs:
        return self


def start_work(job: Job, run: RunSetup, first: int) -> Work:
    """A job of the output under way, as `Work` has it."""
    method = run.table[job.method]
    apart = method.unit != "entries" or method.random or method.measure is not None
    return (_JoinedWork if apart and isinstance(job, JoinedJob) else Work)(job, run, first)
