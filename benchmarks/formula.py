"""What the formulas give for a planned merge: the float64 oracles of tests/methods, on the tensors of its jobs.

A number is right in the output's dtype if it is the oracle's rounded once, to nearest and ties to even. Not here: what
is merged (side_by_side), and what is written about it (parity, precision).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from merger.methods.registry import methods
from merger.methods.steps.random import Rng, keep_by_rank
from merger.planning.inputs.base import Job, Operand
from merger.planning.jobs.common import arguments
from merger.planning.plan import Plan

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from methods.oracles import ORACLES

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

_FORMATS = {"BF16": (8, -126), "F16": (11, -14), "F32": (24, -126)}  # bits of the significand, least exponent
_NOISE = 1e-13  # of the size of the terms: what the oracle's own sums may be wrong by


@dataclass(frozen=True)
class Wanted:
    """What a tensor of a merge should hold.

    Args:
        job: how it is made.
        arguments: the numbers its method is called with.
        tensors: what the method is handed, as the oracle sees it.
        right: the results that the oracle calls right.
        size: at each entry the magnitude of the terms that are added up.
    """

    job: Job
    arguments: Mapping[str, Any]
    tensors: Sequence[Array]
    right: Sequence[Array]
    size: Array

    def apart(self, made: Tensor) -> Array:
        """How far each entry is from the nearest right result."""
        return np.min([np.abs(made.double().numpy() - right) for right in self.right], axis=0)

    def wrong(self, made: Tensor) -> Mask:
        """Which entries are no right result, rounded once."""
        found = made.double().numpy()
        return np.logical_and.reduce([found != rounded for rounded in self._roundings])

    def other(self, made: Tensor) -> Mask:
        """Which entries are right, but not what the oracle's first result rounds to: across a tie, or another right."""
        return ~self.wrong(made) & (made.double().numpy() != self._roundings[1])

    @cached_property
    def _roundings(self) -> Array:
        """Each right result, and each but for the oracle's noise to either side, rounded once to the output's dtype."""
        bits, least = _FORMATS[self.job.dtype]
        found = []
        for right in self.right:
            unit = np.ldexp(1.0, np.maximum(np.frexp(right)[1], least + 1) - bits)
            noise = _NOISE * np.where(np.isfinite(self.size), self.size, np.abs(right)) / unit
            found += [np.rint(right / unit + side * noise) * unit for side in (-1, 0, 1)]
        return np.array(found)


def wanted(plan: Plan) -> Iterator[Wanted]:
    """What each tensor of a merge should hold; tensors that are copied are left out."""
    for job in plan.jobs:
        if not job.is_copy:
            yield _wanted(plan, job)


def _wanted(plan: Plan, job: Job) -> Wanted:
    base = _entries(plan, job.base) if job.base else np.zeros(job.shape)
    tensors = [_entries(plan, entry) - base for entry in job.inputs]
    given = arguments(methods()[job.method], job)
    if methods()[job.method].random:
        given["masks"] = [_mask(plan, job, model, tensor, given) for model, tensor in enumerate(tensors)]
    answer = ORACLES[job.method](tensors, **given)
    return Wanted(job, given, tensors, [right + base for right in answer.right], answer.size + np.abs(base))


def _entries(plan: Plan, entry: Operand) -> Array:
    (stored,) = entry.source.stored_tensors
    file = Path(plan.locked.models[stored.model].located.where) / stored.tensor.file
    with safe_open(file, "pt") as held:
        return np.asarray(held.get_tensor(stored.tensor.name).double().numpy())


def _mask(plan: Plan, job: Job, model: int, tensor: Array, given: Mapping[str, Any]) -> Array:
    """Which entries a random method keeps of a model, as 1 and 0: by our own generator, whose draws are no formula."""
    delta, rng, density = tensor.astype(np.float32), Rng(plan.seed, job.name), given["density"][model]
    if "epsilon" not in given:
        return np.asarray(rng.mask(model, delta.size, density), np.float64).reshape(tensor.shape)
    kept = keep_by_rank(delta, model, density, given["epsilon"][model], rng)
    return np.asarray(kept, np.float64).reshape(tensor.shape)
