"""Headers and indexes of safetensors files: the sound ones, written by the safetensors library, and damaged ones."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from merger.errors import ModelError
from merger.models.checkpoint import (
    ITEM_BYTES,
    MAX_HEADER,
    TensorInfo,
    gather,
    header_length,
    read_header,
    stem,
    weight_files,
    weight_map,
)

lawful = settings(max_examples=150, deadline=None, derandomize=True)
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "U16": torch.uint16,
    "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip
FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
Entry = dict[str, Any]


def parsed(content: bytes, size: int | None = None) -> tuple[TensorInfo, ...]:
    """What a file's bytes promise; `size` where the file is said to be of another size."""
    size = len(content) if size is None else size
    length = header_length(content[:8], FILE, size)
    return read_header(content[8 : 8 + length], FILE, size)


def file(header: object, data: int = 0) -> bytes:
    """A file with this header, which need not make sense, and `data` bytes of tensors."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> Entry:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refusal(act: Callable[[], object]) -> str:
    """The sentence of the ModelError that `act` must raise; it names the file and gives a next step."""
    with pytest.raises(ModelError) as caught:
        act()
    (problem,) = caught.value.problems
    assert problem.hint
    str(caught.value).encode()
    return problem.what


shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
tensors = st.dictionaries(st.text(st.characters(codec="utf-8", categories=["L", "N"]), min_size=1, max_size=8),
                          st.tuples(st.sampled_from(sorted(DTYPES)), shapes), max_size=6)  # fmt: skip


@given(tensors)
@lawful
@example({"a": ("F32", ()), "b": ("BF16", (0,)), "c": ("F64", (2, 0, 3)), "d": ("I8", (1, 2, 3))})
def test_what_the_library_wrote_is_read_with_names_dtypes_shapes_and_places(
    drawn: dict[str, tuple[str, tuple[int, ...]]],
) -> None:
    """Each tensor of a library's file is found, and the bytes at its place are its own."""
    held = {
        name: torch.arange(torch.Size(shape).numel()).remainder(2).reshape(shape).to(DTYPES[dtype])
        for name, (dtype, shape) in drawn.items()
    }
    content = save(held, metadata={"format": "pt"})
    found = {tensor.name: tensor for tensor in parsed(content)}
    assert found.keys() == held.keys()
    for name, tensor in found.items():
        dtype, shape = drawn[name]
        assert (tensor.dtype, tensor.shape, tensor.file) == (dtype, shape, FILE)
        assert tensor.entries == held[name].numel()
        assert tensor.nbytes == tensor.entries * ITEM_BYTES[dtype] == held[name].nbytes
        raw = held[name].reshape(-1).view(torch.uint8).numpy().tobytes() if held[name].numel() else b""
        assert content[tensor.start : tensor.stop] == raw


def test_tensors_come_in_the_order_of_their_places() -> None:
    """The header's own order means nothing."""
    header = {"late": entry(offsets=[8, 16]), "early": entry(offsets=[0, 8])}
    assert [tensor.name for tensor in parsed(file(header, 16))] == ["early", "late"]


def test_a_file_cut_anywhere_is_refused() -> None:
    """Whether the cut is in the length, the header, before the tensors or in them: no prefix of a file is a file."""
    content = save({"a": torch.ones(2, 3), "b": torch.ones(0), "c": torch.ones(3, dtype=torch.bfloat16)})
    assert len(parsed(content)) == 3
    for size in range(len(content)):
        assert refusal(lambda size=size: parsed(content[:size])).startswith(FILE)


def test_a_file_that_is_too_long_is_refused() -> None:
    """Bytes behind the last tensor are nobody's."""
    content = save({"a": torch.ones(2)})
    size = len(content)
    assert f"has {size + 1:,} bytes, its header promises {size:,}" in refusal(lambda: parsed(content + b"\0"))


@pytest.mark.parametrize("length", [MAX_HEADER + 1, 2**62, 2**63, 2**64 - 1])
def test_a_huge_header_is_refused_by_its_length_alone(length: int) -> None:
    """Nothing is read or allocated for it, even where the file claims to be as large."""
    first = struct.pack("<Q", length)
    assert "cut short" in refusal(lambda: header_length(first, FILE, 1 << 20))
    assert "cut short" in refusal(lambda: header_length(first, FILE, 2**64 + 100))


F32 = entry()
DAMAGED: Mapping[str, tuple[object, int, str]] = {
    "a gap": ({"a": F32, "b": entry(offsets=[12, 20])}, 20, "b does not start where the one before ends"),
    "a gap at the start": ({"a": entry(offsets=[4, 12])}, 12, "a does not start where the one before ends"),
    "an overlap": ({"a": F32, "b": entry(offsets=[4, 12])}, 12, "b does not start where the one before ends"),
    "one place for two": ({"a": F32, "b": F32}, 8, "b does not start where the one before ends"),
    "a size that is not the shape's": ({"a": entry(offsets=[0, 7])}, 7, "does not take 7 bytes"),
    "a place that ends before it starts": ({"a": entry(shape=[0], offsets=[8, 0])}, 8, "does not take -8 bytes"),
    "a shape that overflows": ({"a": entry(shape=[2**40, 2**40])}, 8, "does not take 8 bytes"),
    "a negative shape": ({"a": entry(shape=[-1, -2])}, 8, "no whole number"),
    "a fraction": ({"a": entry(shape=[2.0])}, 8, "no whole number"),
    "true for one": ({"a": entry(shape=[True, 2])}, 8, "no whole number"),
    "a shape in words": ({"a": entry("F64", "", [0, 8])}, 8, "no whole number"),
    "a shape that is an object": ({"a": entry("F64", {}, [0, 8])}, 8, "no whole number"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, 8, "shape"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, 8, "dtype"),
    "no place": ({"a": {"dtype": "F32", "shape": [2]}}, 8, "data_offsets"),
    "a place of three numbers": ({"a": entry(offsets=[0, 8, 8])}, 8, "damaged"),
    "an unknown dtype": ({"a": entry("F4")}, 8, "a has dtype 'F4', which is not read here"),
    "a dtype that is a list": ({"a": entry(["F32"])}, 8, "damaged"),
    "a tensor that is a number": ({"a": 7}, 0, "damaged"),
    "a list": ([], 0, "damaged"),
    "a number": (1, 0, "damaged"),
    "null": (None, 0, "damaged"),
    "no JSON": (b"{", 0, "damaged"),
    "nothing": (b"", 0, "damaged"),
    "no UTF-8": (b'{"\xff": {}}', 0, "damaged"),
    "UTF-16": (json.dumps({"a": F32}).encode("utf-16"), 8, "damaged"),
    "brackets without end": (b'{"a":' + b"[" * 100_000, 0, "damaged"),
    "a number without end": (b'{"a": {"dtype": "F32", "shape": [' + b"9" * 9_000 + b"]}}", 0, "damaged"),
    "a name twice": (b'{"a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}, '
                     b'"a": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}}', 8, "stands twice"),
    "metadata that is a list": ({"__metadata__": ["pt"]}, 0, "its __metadata__ is no map of texts"),
    "metadata with a number": ({"__metadata__": {"format": "pt", "step": 1000}}, 0, "its __metadata__ is no map of"),
    "metadata with a list": ({"__metadata__": {"format": ["pt"]}}, 0, "its __metadata__ is no map of texts"),
    "metadata with half a letter": ({"__metadata__": {"format": "\ud800"}}, 0, "surrogates not allowed"),
    "a name with half a letter": ({"a\udc00": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, 4, "surrogates"),
    "metadata that is a text": ({"__metadata__": "pt"}, 0, "its __metadata__ is no map of texts"),
    "a number that is none": (
        b'{"a": {"x": NaN, "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', 8, "no number",
    ),
    "a number too large": (
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "x": 1e400}}', 8, "no number",
    ),
    "no names but bytes": ({}, 4, "has 14 bytes, its header promises 10"),
}  # fmt: skip


@pytest.mark.parametrize("fault", DAMAGED)
def test_a_damaged_header_is_refused_with_what_is_wrong(fault: str) -> None:
    """Each way to be damaged has its own words, after the file's name."""
    header, data, words = DAMAGED[fault]
    sentence = refusal(lambda: parsed(file(header, data)))
    assert sentence.startswith(FILE)
    assert words in sentence


@pytest.mark.parametrize("name", ["../a", "a/../b", "..", "/a", "\\a", "~a", "C:\\a", "a\\..\\b", "a\0b", "a\nb"])
def test_a_tensor_whose_name_points_outside_is_refused(name: str) -> None:
    """A name that could be a path out of the model, or that no file could hold, is no tensor's name."""
    sentence = refusal(lambda: parsed(file({name: entry()}, 8)))
    assert "a tensor's name points outside the model" in sentence


@pytest.mark.parametrize("name", ["a..b", "model.layers.0.a", "a/b", "", "Ünïcode", "a b", "..."])
def test_an_unusual_name_is_read(name: str) -> None:
    """Only names that point outside are refused."""
    assert parsed(file({name: entry()}, 8))[0].name == name


def test_an_empty_file_of_tensors_is_read() -> None:
    """A file may hold metadata alone, or tensors without entries alone."""
    assert parsed(file({"__metadata__": {"format": "pt"}})) == ()
    assert [tensor.nbytes for tensor in parsed(file({"a": entry(shape=[0, 3], offsets=[0, 0])}))] == [0]


json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
fields = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F4"]) | json_like,
        "shape": shapes.map(list) | json_like,
        "data_offsets": st.lists(st.integers(-1, 30), max_size=3) | json_like,
    },
)
headers = st.dictionaries(st.text(max_size=4), fields | json_like, max_size=3)


def read_or_refused(content: bytes, size: int | None = None) -> None:
    """Either tensors that lie within the file, or a ModelError; anything else fails the test."""
    try:
        found = parsed(content, size)
    except ModelError:
        return
    assert all(8 <= tensor.start <= tensor.stop <= (size or len(content)) for tensor in found)


@given(headers, st.integers(0, 32))
@lawful
def test_no_header_of_valid_json_raises_anything_else(header: object, data: int) -> None:
    """Whatever JSON stands there: tensors or a ModelError."""
    read_or_refused(file(header, data))


SOUND = save({"a": torch.ones(2, 3), "b": torch.tensor(1.0), "c": torch.ones(0, dtype=torch.int64)})


@given(st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)), min_size=1, max_size=4))
@lawful
def test_no_flipped_byte_raises_anything_else(changes: list[tuple[int, int]]) -> None:
    """A sound file with up to four other bytes: tensors or a ModelError."""
    content = bytearray(SOUND)
    for place, value in changes:
        content[place] = value
    read_or_refused(bytes(content))


@given(st.binary(max_size=64), st.integers(0, 2**64))
@lawful
def test_no_bytes_raise_anything_else(content: bytes, size: int) -> None:
    """Neither do bytes that were never a file, of a file that is said to have any size."""
    read_or_refused(content)
    read_or_refused(content, max(size, len(content)))


# ---- which files, and which tensor from which file ------------------------------------------------------------------


def index(**places: object) -> str:
    return json.dumps({"metadata": {"total_size": 1}, "weight_map": places})


@pytest.mark.parametrize(("files", "expected"), [
    (["config.json", FILE, "other.safetensors"], "model"),
    ([INDEX, "consolidated.safetensors", "model-00001-of-00001.safetensors"], "model"),
    (["config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"],
     "diffusion_pytorch_model"),
    (["unet.safetensors.index.json", "unet-00001-of-00001.safetensors"], "unet"),
    (["vae/x.safetensors", "any.safetensors"], "any"),
])  # fmt: skip
def test_the_files_of_a_model_are_found_by_their_names(files: list[str], expected: str) -> None:
    """Those of transformers' name, else the only ones there; variants of them do not count."""
    assert stem(files) == expected


@pytest.mark.parametrize(("files", "sentence", "step"), [
    (["a.safetensors", "b.safetensors"], "holds several models (a.safetensors, b.safetensors)", ".../a.safetensors"),
    (["x-00001-of-00002.safetensors", "x-00002-of-00002.safetensors"],
     "has shards (x-00001-of-00002.safetensors, ...) and no index of them", "again"),
    (["model_index.json", "unet/x.safetensors", "vae/x.safetensors"], "is a pipeline of several models", "unet, vae"),
    (["readme.txt", "unet/x.safetensors"], "has no safetensors", ".../unet"),
    (["readme.txt", "Q8_0/x.gguf"], "has no safetensors", ".../Q8_0"),
])  # fmt: skip
def test_files_that_are_not_one_model_are_refused(files: list[str], sentence: str, step: str) -> None:
    """With what to name in their place."""
    with pytest.raises(ModelError) as caught:
        stem(files)
    (problem,) = caught.value.problems
    assert problem.what == sentence
    assert step in (problem.hint or "")


def test_the_single_file_is_taken_where_there_is_no_index() -> None:
    """As transformers writes it, and diffusers."""
    assert weight_files(["config.json", FILE, "other.safetensors"], None) == (FILE,)
    assert weight_files(["x.safetensors"], None, "x.safetensors") == ("x.safetensors",)


def test_the_index_says_which_files_there_are() -> None:
    """Each once, in the order of their names; the others in the folder are not the model's."""
    text = index(a="model-2.safetensors", b="model-1.safetensors", c="model-2.safetensors")
    found = weight_files([FILE, "model-1.safetensors", "model-2.safetensors"], weight_map(text))
    assert found == ("model-1.safetensors", "model-2.safetensors")


@pytest.mark.parametrize(
    "outside",
    ["../m.safetensors", "/m.safetensors", "a/../../m.safetensors", "~/m", "C:\\m", "..\\m", "a\nb", "\ud800"],
)
def test_an_index_that_points_outside_the_folder_is_refused(outside: str) -> None:
    """Even where such a file is there."""
    sentence = refusal(lambda: weight_files([outside, FILE], weight_map(index(a=outside))))
    assert sentence == f"{INDEX} points outside the model's folder: {outside!r}"


def test_an_index_that_names_a_missing_file_is_refused() -> None:
    """The model was not downloaded in full."""
    text = index(a="model-1.safetensors", b="model-2.safetensors")
    sentence = refusal(lambda: weight_files(["model-1.safetensors"], weight_map(text)))
    assert sentence == f"{INDEX} names 'model-2.safetensors', which is not there"


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null", "{}", '{"weight_map": {}}', '{"weight_map": []}',
                                  '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}', '{"weight_map": null}',
                                  '{"weight_map": "a"}', "[" * 100_000])  # fmt: skip
def test_a_damaged_index_is_refused(text: str) -> None:
    """Whatever is wrong with it, the sentence names the index."""
    assert refusal(lambda: weight_files([FILE], weight_map(text))).startswith(INDEX)


@given(
    st.text(max_size=20) | json_like.map(json.dumps) | json_like.map(lambda value: json.dumps({"weight_map": value}))
)
@lawful
def test_no_index_raises_anything_else(text: str) -> None:
    """Whatever text stands there: files of the model or a ModelError."""
    with contextlib.suppress(ModelError):
        assert set(weight_files([FILE, "other"], weight_map(text))) <= {FILE, "other"}


def test_a_model_of_pickles_is_refused_with_the_way_out() -> None:
    """A .bin can run code when it is read, so it is not."""
    assert refusal(lambda: stem(["config.json", "pytorch_model.bin"])) == "has no safetensors, only pytorch_model.bin"
    assert refusal(lambda: stem(["config.json"])) == "has no safetensors"


def held(name: str, of: str) -> TensorInfo:
    return TensorInfo(name, "F32", (2,), of, 100, 108)


def test_tensors_of_all_files_are_gathered_in_order() -> None:
    """By name, file after file, even those that the index forgot."""
    found = gather([(held("b", "1"), held("a", "1")), (held("c", "2"),)], weight_map(index(a="1", b="1")))
    assert [(name, tensor.file) for name, tensor in found.items()] == [("b", "1"), ("a", "1"), ("c", "2")]


@pytest.mark.parametrize("chosen", ["1", "2"])
def test_of_two_tensors_of_one_name_the_index_chooses(chosen: str) -> None:
    """Loaders follow the weight_map, and so do we."""
    found = gather([(held("a", "1"), held("b", "1")), (held("a", "2"),)], weight_map(index(a=chosen, b="1")))
    assert found["a"].file == chosen
    assert list(found) == ["a", "b"]


def test_two_tensors_of_one_name_that_the_index_does_not_know_are_refused() -> None:
    """There is no telling which one is meant."""
    sentence = refusal(lambda: gather([(held("a", "1"), held("b", "1")), (held("a", "2"),)], weight_map(index(b="1"))))
    assert sentence == f"2 and 1 both hold a, and {INDEX} names neither"


def test_a_tensor_in_another_file_than_the_index_says_is_refused() -> None:
    """Also one that is in no file at all."""
    for text, name, file in ((index(a="2"), "a", "2"), (index(z="1"), "z", "1")):
        sentence = refusal(lambda text=text: gather([(held("a", "1"),), (held("c", "2"),)], weight_map(text)))
        assert sentence == f"{INDEX} places {name!r} in {file}, which does not hold it"


def test_a_file_of_the_library_on_disk_reads_like_one_in_memory(tmp_path: Path) -> None:
    """`save_file` and `save` are one format."""
    path = tmp_path / FILE
    save_file({"a": torch.ones(2, 3)}, path)
    (tensor,) = parsed(path.read_bytes())
    assert (tensor.name, tensor.dtype, tensor.shape, tensor.stop) == ("a", "F32", (2, 3), path.stat().st_size)
