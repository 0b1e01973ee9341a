"""Hidden states of every sequence between the layers, in a file: memory holds those that are computed with.

Not here: what makes them (inputs, gradients).
"""

from __future__ import annotations

from pathlib import Path
from threading import Lock

import numpy as np

from merger.methods.steps.step import Array


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
