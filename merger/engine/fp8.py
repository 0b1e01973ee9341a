"""Shards whose matrices are in eight bits, written as their tensors come. Not here: which are (models.formats.fp8)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from merger.engine.gguf import Bytes, TensorWriter
from merger.methods.steps.dtypes import HELD, load, store, store_float8
from merger.methods.steps.step import Array
from merger.models.formats.fp8 import CHANNEL, Fp8File, Fp8Tensor
from merger.models.formats.safetensors import Outlet
from merger.planning.inputs.base import Job

_LARGEST = np.float32(448)
_EPS = {"F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}
"""compressed-tensors' scale of a row of zeros, by its dtype."""


class Fp8Writer(TensorWriter[Fp8Tensor]):
    """Writes a safetensors file in which each matrix is followed by its scales."""

    def __init__(self, file: Fp8File, outlet: Outlet, jobs: Sequence[Job]) -> None:
        super().__init__(file, outlet, jobs)
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
