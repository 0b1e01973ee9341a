"""Our safetensors files, read back by the safetensors library."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, load_file

from merger.models.checkpoint import ITEM_BYTES, header_length, read_header
from merger.models.formats.safetensors import ShardWriter, WrittenShard, header, index, shard_name

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "U16": torch.uint16,
    "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip


@dataclass(frozen=True)
class Out:
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * ITEM_BYTES[self.dtype]

    @property
    def data(self) -> bytes:
        """Bytes 0 and 1, which every dtype can hold, another pattern for each name."""
        start = sum(self.name.encode())
        return bytes((start + place) * 7 % 3 % 2 for place in range(self.nbytes))


def write(path: Path, tensors: list[Out], data: list[bytes] | None = None) -> WrittenShard:
    start = header(tensors)
    size = len(start) + sum(tensor.nbytes for tensor in tensors)
    with path.open("wb", buffering=0) as file, ShardWriter(path.name, file, start, size) as writer:
        for part in [tensor.data for tensor in tensors] if data is None else data:
            writer.write(memoryview(part))
        return writer.close()


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


outs = st.lists(
    st.builds(Out, st.text(st.characters(codec="utf-8", categories=["L", "N"]), min_size=1, max_size=8),
              st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3).map(tuple)),
    max_size=6, unique_by=lambda tensor: tensor.name,
)  # fmt: skip


@given(outs)
@settings(max_examples=100, deadline=None, derandomize=True)
@example([Out(dtype, dtype, (2, 3)) for dtype in DTYPES])
@example([Out("scalar", "F32", ()), Out("empty", "BF16", (0,)), Out("hollow", "F64", (2, 0, 3))])
@example([])
def test_the_library_reads_what_we_write(tmp_path_factory: pytest.TempPathFactory, tensors: list[Out]) -> None:
    """Every name, dtype, shape and byte; the tensors begin at a multiple of eight bytes."""
    path = tmp_path_factory.mktemp("shard") / "model.safetensors"
    write(path, tensors)
    found = load_file(path)
    assert found.keys() == {tensor.name for tensor in tensors}
    for tensor in tensors:
        assert (found[tensor.name].dtype, found[tensor.name].shape) == (DTYPES[tensor.dtype], tensor.shape)
        assert raw(found[tensor.name]) == tensor.data
    content = path.read_bytes()
    length = header_length(content[:8], "f", len(content))
    assert (8 + length) % 8 == 0
    ours = read_header(content[8 : 8 + length], "f", len(content))
    assert {(tensor.name, tensor.dtype, tensor.shape) for tensor in ours} == {
        (tensor.name, tensor.dtype, tensor.shape) for tensor in tensors
    }


def test_the_file_says_that_it_is_for_pytorch(tmp_path: Path) -> None:
    """transformers refuses a file without this metadata."""
    write(tmp_path / "m.safetensors", [Out("a", "F32", (2,))])
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_header_is_known_before_any_tensor() -> None:
    """It is a function of names, dtypes and shapes alone, and the file is it and then the bytes in order."""
    tensors = [Out("b", "BF16", (3,)), Out("a", "F32", (2, 2))]
    found = load(header(tensors) + tensors[0].data + tensors[1].data)
    assert raw(found["b"]) == tensors[0].data
    assert raw(found["a"]) == tensors[1].data


def test_size_and_hash_are_those_of_the_file(tmp_path: Path) -> None:
    """However the bytes were cut into writes."""
    path = tmp_path / "m.safetensors"
    tensor = Out("a", "F32", (5, 7))
    pieces = [tensor.data[:1], b"", tensor.data[1:100], tensor.data[100:]]
    written = write(path, [tensor], pieces)
    content = path.read_bytes()
    assert written == WrittenShard("m.safetensors", len(content), hashlib.sha256(content).hexdigest())
    assert write(tmp_path / "n.safetensors", [tensor]).sha256 == written.sha256


@pytest.mark.parametrize("data", [b"", b"\0" * 7, b"\0" * 9, b"\0" * 80])
def test_too_few_or_too_many_bytes_are_our_own_fault(tmp_path: Path, data: bytes) -> None:
    """A file that breaks its header's promise is never called finished."""
    with pytest.raises(AssertionError, match="promised"):
        write(tmp_path / "m.safetensors", [Out("a", "F32", (2,))], [data])


def test_shards_are_named_as_loaders_look_for_them() -> None:
    """One file is called so; of several each says which it is, counted from one."""
    assert shard_name(1, 1) == "model.safetensors"
    assert [shard_name(number, 12) for number in (1, 12)] == [
        "model-00001-of-00012.safetensors",
        "model-00012-of-00012.safetensors",
    ]


def test_the_index_holds_the_map_and_the_size() -> None:
    """As transformers writes and reads it."""
    text = index({"a": "model-00001-of-00002.safetensors"}, 123)
    assert json.loads(text) == {
        "metadata": {"total_size": 123},
        "weight_map": {"a": "model-00001-of-00002.safetensors"},
    }
