"""GGUF files beside a shard, written as its tensors come. Not here: how they lie in a file (models.gguf.layout)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merger.methods.steps.dtypes import HELD, load, quantise
from merger.methods.steps.step import TILE
from merger.models.checkpoint import ITEM_BYTES
from merger.models.formats.safetensors import Outlet, ShardWriter, WrittenShard
from merger.models.gguf.layout import GgufFile, GgufTensor, nbytes_of
from merger.planning.inputs.base import Job

Bytes = NDArray[np.uint8]


class GgufWriter:
    """Writes a GGUF file as the entries of its tensors come: those of the result, as they were rounded."""

    def __init__(self, file: GgufFile, outlet: Outlet, jobs: Sequence[Job]) -> None:
        self._writer = ShardWriter(file.name, outlet, file.header, file.size)
        self._tensors = {source: tensor for tensor in file.tensors for source in tensor.sources}
        self._more = [tensor for tensor in file.tensors if not tensor.sources]
        self._jobs = deque(job for job in jobs if job.nbytes)
        self._rest = np.empty(0, np.uint8)
        self._done = 0

    def write(self, data: memoryview) -> None:
        """The next bytes of the shard's tensors."""
        while len(data):
            job = self._jobs[0]
            mine, data = data[: job.nbytes - self._done], data[job.nbytes - self._done :]
            self._done += len(mine)
            if (tensor := self._tensors.get(job.name)) is not None:
                self._add(tensor, job.dtype, mine)
            if self._done == job.nbytes:
                self._jobs.popleft()
                self._done = 0
                if tensor is not None and job.name == tensor.sources[-1]:
                    self._writer.write(memoryview(bytes(tensor.gap)))

    def _add(self, tensor: GgufTensor, dtype: str, data: memoryview) -> None:
        """Write what can be rounded by itself; the rest waits for what comes after it."""
        held = np.concatenate([self._rest, np.frombuffer(data, np.uint8)])
        unit = tensor.unit * ITEM_BYTES[dtype]
        whole, step = len(held) // unit * unit, max(1, TILE // tensor.unit) * unit
        for start in range(0, whole, step):
            self._emit(tensor, dtype, held[start : min(start + step, whole)])
        self._rest = held[whole:].copy()

    def _emit(self, tensor: GgufTensor, dtype: str, raw: Bytes) -> None:
        bits = raw.view(HELD[dtype])
        x = load(bits, dtype, np.empty(bits.size, np.float32))
        if tensor.head_rows:
            x = x.reshape(-1, 2, tensor.head_rows // 2, math.prod(tensor.shape[1:])).swapaxes(1, 2).reshape(-1)
        if tensor.added:
            x = x + np.float32(tensor.added)
        out = np.empty(nbytes_of(tensor.kind, x.size), np.uint8)
        quantise(x, tensor.kind, out)
        self._writer.write(out.data)

    def close(self) -> WrittenShard:
        """The tensors that are of the config alone, and the end."""
        for tensor in self._more:
            self._writer.write(memoryview(tensor.data + bytes(tensor.gap)))
        return self._writer.close()

    def __enter__(self) -> GgufWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self._writer.__exit__(*error)
