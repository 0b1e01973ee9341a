"""A model walked through a layer at a time, by all sequences, which wait in a file between the layers.

Each sequence is run by one thread, so that no number of threads changes a bit. Not here: what is summed up on the way
(inputs, gradients).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import closing
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from merger.engine.inputs.layers import EMBEDDING_FACTOR, LayerModel, ModelTensors
from merger.methods.steps.step import Array
from merger.planning.inputs.base import Job
from merger.statistics.plan import Measurement, StatisticsShard

Write = Callable[[StatisticsShard, Mapping[str, Array]], None]


class States:
    """States of shape (length, width) by boundary and sequence; threads may read and write at once.

    Args:
        path: the file.
        sequences: how many there are at each boundary.
        shape: of one sequence's.
    """

    def __init__(self, path: Path, sequences: int, shape: tuple[int, int]) -> None:
        self._file, self._lock = path.open("w+b"), Lock()
        self._sequences, self._shape = sequences, shape

    def read(self, sequence: int, boundary: int = 0) -> Array:
        """What was written last."""
        found = np.empty(self._shape, np.float32)
        with self._lock:
            self._file.seek((boundary * self._sequences + sequence) * found.nbytes)
            self._file.readinto(found.data)
        return found

    def write(self, sequence: int, states: Array, boundary: int = 0) -> None:
        """Keep them."""
        with self._lock:
            self._file.seek((boundary * self._sequences + sequence) * states.nbytes)
            self._file.write(np.ascontiguousarray(states).data)

    def close(self) -> None:
        """No more are asked for."""
        self._file.close()


class Walk:
    """What every kind of measuring has in common.

    Args:
        planned: what is measured.
        tensors: where weights come from.
        states: where states wait.
        pool: runs sequences.
        write: takes the numbers of a file that is measured.
    """

    def __init__(
        self, planned: Measurement, tensors: ModelTensors, states: States, pool: Executor, write: Write
    ) -> None:
        self.planned, self.states, self.pool, self.write = planned, states, pool, write
        self._tensors, self._decoder = tensors, LayerModel(planned.locked.config_model.checkpoint.config)

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's."""
        return self.planned.locked.config_model.checkpoint.config

    def batches(self, size: int) -> Iterator[range]:
        """The sequences' numbers, a few at a time."""
        count = len(self.planned.tokens)
        return (range(start, min(start + size, count)) for start in range(0, count, size))

    def embed(self, table: Array | None = None) -> None:
        """Keep the states before the first layer; `table`: the embedding, if that is not the model's own."""
        ids, places = np.unique(self.planned.tokens, return_inverse=True)
        rows = self._tensors.rows(ids.tolist()) if table is None else table[ids]
        rows *= np.float32(self.config.get(EMBEDDING_FACTOR, 1.0))
        for sequence, mine in enumerate(places.reshape(self.planned.tokens.shape)):
            self.states.write(sequence, rows[mine])

    def loaded(self, order: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Each of these layers in turn, and the module that holds it alone."""
        jobs = [self.planned.layers[layer] for layer in order]
        with closing(self._tensors.weights(jobs)) as weights:
            for layer, held in zip(order, weights, strict=True):
                yield layer, self._decoder.loaded(layer, held)
                self._decoder.empty()

    def runner(self, model: Any) -> Callable[[Array], Array]:
        """What runs a sequence's states through such a module."""
        return partial(self._decoder.run, model)

    def forward(self, run: Callable[[Array], Array], before: int = 0, after: int = 0) -> None:
        """All sequences, from one boundary to the next."""
        for batch in self.batches(self.planned.threads):
            made = self.pool.map(run, [self.states.read(sequence, before) for sequence in batch])
            for sequence, state in zip(batch, made, strict=True):
                self.states.write(sequence, state, after)

    def norm(self) -> tuple[str, Any]:
        """The last norm's weight by name, and the module; a layer has been loaded before."""
        import torch

        (job,) = (self.planned.outside[name] for name in self.planned.outside if name not in self.planned.tables)
        norm = self._decoder.norm
        norm.load_state_dict({"weight": torch.from_numpy(self.whole(job))}, assign=True)
        return job.name, norm

    def whole(self, job: Job) -> Array:
        """A tensor."""
        with closing(self._tensors.weights([[job]])) as weights:
            (made,) = next(weights).values()
        return made

    def role(self, tensor: str) -> str:
        """What a tensor is called within its layer."""
        return self.planned.locked.config_model.architecture.place(tensor).role
