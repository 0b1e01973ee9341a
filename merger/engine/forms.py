"""Files of another form than safetensors as they are made, written as the tensors come: GGUF, and eight bits.

Not here: how they lie in a file (models.gguf.layout, models.formats.fp8), and the bits of rounded blocks (steps).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from merger.methods.steps.dtypes import HELD, load, quantise, store, store_float8
from merger.methods.steps.step import TILE, Array
from merger.models.checkpoint import ITEM_BYTES
from merger.models.formats.fp8 import CHANNEL, Fp8File, Fp8Tensor
from merger.models.formats.safetensors import Outlet, ShardWriter, WrittenShard
from merger.models.gguf.layout import GgufFile, GgufTensor, nbytes_of
from merger.planning.inputs.base import Job

Bytes = NDArray[np.uint8]


T = TypeVar("T", GgufTensor, Fp8Tensor)


class TensorWriter(Generic[T]):
    """Writes a file of another form as the entries of its tensors come: those of the result, as they were rounded.

    Args:
        file: what is written.
        tensors: those in it, each of which is made of some of the result's.
        outlet: where its bytes go.
        jobs: the result's tensors, in the order in which they come.
    """

    def __init__(self, file: GgufFile | Fp8File, tensors: Sequence[T], outlet: Outlet, jobs: Sequence[Job]) -> None:
        self._writer = ShardWriter(file.name, outlet, file.header, file.size)
        self._tensors: dict[str, T] = {source: tensor for tensor in tensors for source in tensor.sources}
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
                    if self._rest.size:
                        self._emit(tensor, job.dtype, self._rest)
                        self._rest = self._rest[:0]
                    self._writer.write(memoryview(self._end(tensor)))

    def _add(self, tensor: T, dtype: str, data: memoryview) -> None:
        """Write what can be rounded by itself; the rest waits for what comes after it."""
        held = np.concatenate([self._rest, np.frombuffer(data, np.uint8)])
        unit = tensor.unit * ITEM_BYTES[dtype]
        whole, step = len(held) // unit * unit, max(1, TILE // tensor.unit) * unit
        for start in range(0, whole, step):
            self._emit(tensor, dtype, held[start : min(start + step, whole)])
        self._rest = held[whole:].copy()

    def _emit(self, tensor: T, dtype: str, raw: Bytes) -> None:
        """Round whole units of a tensor, at its end what is left, and write them."""
        raise NotImplementedError

    def _end(self, tensor: T) -> bytes:
        """What follows a tensor."""
        raise NotImplementedError

    def close(self) -> WrittenShard:
        """The end of the file."""
        return self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._writer.__exit__(*error)


class GgufWriter(TensorWriter[GgufTensor]):
    """Writes a GGUF file."""

    def __init__(self, file: GgufFile, outlet: Outlet, jobs: Sequence[Job]) -> None:
        super().__init__(file, file.tensors, outlet, jobs)
        self._more = [tensor for tensor in file.tensors if not tensor.sources]

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

    def _end(self, tensor: GgufTensor) -> bytes:
        return bytes(tensor.gap)

    def close(self) -> WrittenShard:
        """The tensors that are of the config alone, and the end."""
        for tensor in self._more:
            self._writer.write(memoryview(tensor.data + bytes(tensor.gap)))
        return super().close()


_LARGEST = np.float32(448)
_EPS = {"F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}
"""compressed-tensors' scale of a row of zeros, by its dtype."""


class Fp8Writer(TensorWriter[Fp8Tensor]):
    """Writes a safetensors file in which each matrix is followed by its scales."""

    def __init__(self, file: Fp8File, outlet: Outlet, jobs: Sequence[Job]) -> None:
        super().__init__(file, file.tensors, outlet, jobs)
        self._scales: list[bytes] = []

    def _emit(self, tensor: Fp8Tensor, dtype: str, raw: Bytes) -> None:
        if tensor.kind is None:
            self._writer.write(raw.data)
            return
        bits = raw.view(HELD[dtype])
        rows = load(bits, dtype, np.empty(bits.size, np.float32)).reshape(-1, tensor.shape[1])
        scaled, scales = (by_channel if tensor.kind == CHANNEL else by_block)(rows, tensor)
        codes = np.empty(scaled.size, np.uint8)
        store_float8(scaled, codes)
        self._writer.write(codes.data)
        self._scales.append(scales.tobytes())

    def _end(self, tensor: Fp8Tensor) -> bytes:
        found = b"".join(self._scales)
        self._scales = []
        return found


def by_block(rows: Array, tensor: Fp8Tensor) -> tuple[Array, Array]:
    """Whole rows of blocks, or the last one, scaled; and the inverse of the scales, as transformers computes them."""
    height, width = tensor.block
    blocks = rows.reshape(-1, min(len(rows), height), rows.shape[1])
    largest = np.maximum.reduceat(np.abs(blocks).max(axis=1), range(0, rows.shape[1], width), axis=1)
    scales: Any = 1 / np.where(largest > 0, largest, _LARGEST) * _LARGEST  # torch divides a number by a tensor so
    scaled: Array = blocks * np.repeat(scales, width, axis=1)[:, None, : rows.shape[1]]
    return scaled, 1 / scales


def by_channel(rows: Array, tensor: Fp8Tensor) -> tuple[Array, Bytes]:
    """Rows by their scales, and these, as compressed-tensors computes them: all numbers in the tensor's dtype."""
    scales, bits = _rounded(np.abs(rows).max(axis=1, keepdims=True) / _LARGEST, tensor.dtype)
    if not scales.all():
        scales, bits = _rounded(np.where(scales == 0, np.float32(_EPS[tensor.dtype]), scales), tensor.dtype)
    return _rounded(rows / scales, tensor.dtype)[0], bits


def _rounded(x: Array, dtype: str) -> tuple[Array, Bytes]:
    """Numbers rounded to a dtype, and their bits."""
    bits = np.empty(x.size, HELD[dtype])
    store(x, dtype, bits)
    return load(bits, dtype, np.empty(x.size, np.float32)).reshape(x.shape), bits
