"""Names, shapes, dtypes and places of a model's tensors, read from safetensors headers and their index.

Follows the safetensors format: 8 bytes little-endian header length, that many bytes of JSON, then the tensors.
Not here: fetching those bytes (stores), and what a tensor's name means (architecture).
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from merger.errors import ModelError, Problem
from merger.models.gguf.layout import ENDING
from merger.safety.limits import HEADER, INDEX, TENSOR_NAME, excess, parse_json

ITEM_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "F8_E8M0": 1, "C64": 8,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
"""The dtypes that are merged; all others are copied or refused."""

STEM = "model"
"""What the names of a model's files begin with, as transformers writes them; diffusers has another stem."""

SUFFIX = ".safetensors"
SINGLE = STEM + SUFFIX
_INDEX_SUFFIX = ".safetensors.index.json"
MAX_HEADER = HEADER.most
_PICKLED = re.compile(r"(^|/)(pytorch_model.*\.bin|.*\.(pt|pth|ckpt))$")
_HARMLESS = re.compile(r"[\w.-]*")
_UNSAFE_NAME = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]|^[/\\~]|(^|[/\\])\.\.([/\\]|$)|^[A-Za-z]:[/\\]")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint and the bytes of its file that hold it, ``[start, stop)``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    stop: int

    def __hash__(self) -> int:
        return hash((self.name, self.start))

    def encode(self) -> dict[str, Any]:
        """Plain data that names it in a plan's hash."""
        return {
            "name": self.name, "dtype": self.dtype, "shape": self.shape, "file": self.file, "start": self.start,
            "stop": self.stop,
        }  # fmt: skip

    @property
    def entries(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes it takes in its file."""
        return self.stop - self.start

    def rows(self, first: int, last: int) -> TensorInfo:
        """Its rows ``[first, last)`` as a tensor by itself."""
        size = math.prod(self.shape[1:]) * ITEM_BYTES[self.dtype]
        start = self.start + first * size
        return replace(self, shape=(last - first, *self.shape[1:]), start=start, stop=start + (last - first) * size)


@dataclass(frozen=True)
class Checkpoint:
    """A model's tensors by name, in the order of files and places; its config.json, empty if it has none; its stem."""

    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any] = field(default_factory=dict)
    stem: str = STEM

    @property
    def nbytes(self) -> int:
        """How many bytes its tensors take."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def is_single(path: str) -> bool:
    """Whether a model is given as one file, not as a folder or a repo."""
    return path.endswith((SUFFIX, ENDING))


def is_weights(file: str) -> bool:
    """Whether a file holds tensors, by its name, or says which files do."""
    name = file.removesuffix(".index.json")
    return name.endswith(SUFFIX) or _PICKLED.search(name) is not None


def index_name(single: str = SINGLE) -> str:
    """The name of the index of a model that would be called `single` if it were in one file."""
    return f"{single}.index.json"


def stem(files: Iterable[str]) -> str:
    """What the names of a model's safetensors begin with: transformers' own name, else that of the only ones there.

    Raises:
        ModelError: there are none, or several and no index.
    """
    present = [name for name in files if "/" not in name]
    for ending in (_INDEX_SUFFIX, SUFFIX):
        found = [name.removesuffix(ending) for name in present if name.endswith(ending)]
        if STEM in found:
            return STEM
        if found:
            return _only(found, ending)
    raise ModelError(_without_safetensors(files))


def _only(found: list[str], ending: str) -> str:
    """The stem of the only model, next to which there may be variants of it such as ``.fp16``."""
    first = min(found, key=len)
    if all(name == first or name.startswith(f"{first}.") for name in found):
        return first
    if all(_SHARD.search(name) for name in found):
        raise ModelError(Problem(f"has shards ({first}{ending}, ...) and no index of them", hint=_DAMAGED))
    what = f"holds several models ({', '.join(name + ending for name in found[:_NAMES_SHOWN])})"
    raise ModelError(Problem(what, hint=f"name the file that is meant: .../{first}{SUFFIX}"))


_SHARD = re.compile(r"-[0-9]{5}-of-[0-9]{5}$")
_NAMES_SHOWN = 3
_SHOWN = 60


def weight_files(files: Iterable[str], index: Mapping[str, str] | None, single: str = SINGLE) -> tuple[str, ...]:
    """The files of a model's tensors, given its files' names and what its index says, if it has one.

    Raises:
        ModelError: the index names files which the model does not have.
    """
    present = tuple(files)
    if index is None:
        return (single,)
    shards = tuple(sorted(set(index.values())))
    for shard in shards:
        if _UNSAFE_NAME.search(shard):
            raise ModelError(
                Problem(f"{index_name(single)} points outside the model's folder: {shard!r}", hint=_DAMAGED)
            )
        if shard not in present:
            raise ModelError(Problem(f"{index_name(single)} names {shard!r}, which is not there", hint=_DAMAGED))
    return shards


_DAMAGED = "the model is incomplete or damaged: download it again, or ask its author"


def weight_map(index: str, single: str = SINGLE) -> dict[str, str]:
    """Which file holds which tensor, by the text of a model's index.

    Raises:
        ModelError: it is damaged.
    """
    try:
        found = parse_json(index, INDEX)["weight_map"]
    except (ValueError, KeyError, TypeError):
        raise ModelError(Problem(f"{index_name(single)} holds no weight_map", hint=_DAMAGED)) from None
    if not found or not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise ModelError(Problem(f"{index_name(single)}: the weight_map is no map of names to files", hint=_DAMAGED))
    return found


def _without_safetensors(present: Iterable[str]) -> Problem:
    files = tuple(present)
    pickled = [name for name in files if _PICKLED.search(name)]
    parts = sorted({name.rpartition("/")[0] for name in files if is_single(name) and "/" in name})
    if "model_index.json" in files:
        hint = f"merge it part by part: name one of its folders ({', '.join(parts[:_NAMES_SHOWN])}, ...)"
        return Problem("is a pipeline of several models", hint=hint)
    if pickled:
        return Problem(
            f"has no safetensors, only {pickled[0]}",
            hint="such files can run code when they are loaded: convert the model with transformers' save_pretrained, "
            "or let --allow-pickle look for its tensors without running it",
        )
    hint = f"name the folder that is meant: .../{parts[0]}" if parts else "is this a model that transformers can load?"
    return Problem("has no safetensors", hint=hint)


def header_length(first: bytes, file: str, size: int) -> int:
    """The length of a safetensors file's header, from the file's first 8 bytes and its size.

    Raises:
        ModelError: the file is too short for it.
    """
    length = struct.unpack("<Q", first)[0] if len(first) == 8 else size
    if 8 + length > size or length > MAX_HEADER:
        raise ModelError(Problem(f"{file}: the safetensors header is cut short ({size:,} bytes in all)", hint=_DAMAGED))
    return int(length)


def read_header(raw: bytes, file: str, size: int) -> tuple[TensorInfo, ...]:
    """The tensors that a header promises, in the order of their places.

    Args:
        raw: the header's bytes, without the 8 bytes of its length.
        size: the whole file's size in bytes.

    Raises:
        ModelError: the header is damaged, or does not fit the file's size.
    """
    try:
        text = raw.decode()
        entries = parse_json(text, object_pairs_hook=_once_each, parse_float=_fraction, parse_constant=_fraction)
        if "\\u" in text:
            json.dumps(entries, ensure_ascii=False).encode()  # half a letter, as JSON can escape it, is no text
        _check_metadata(entries.pop("__metadata__", None))
        _check_names(entries)
        first = 8 + len(raw)
        tensors = [_tensor(name, entry, file, first) for name, entry in entries.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(Problem(f"{file}: the safetensors header is damaged ({error})", hint=_DAMAGED)) from None
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    _check_places(tensors, file, first, size)
    return tuple(tensors)


def read_metadata(raw: bytes) -> Mapping[str, str]:
    """The texts in a header that could be read."""
    found: Mapping[str, str] = parse_json(raw.decode() or "{}").get("__metadata__") or {}
    return found


def _tensor(name: str, entry: Mapping[str, Any], file: str, first: int) -> TensorInfo:
    dtype, shape, places = entry["dtype"], entry["shape"], entry["data_offsets"]
    start, stop = places
    if dtype not in ITEM_BYTES:
        raise ValueError(f"{name} has dtype {str(dtype)[:_SHOWN]!r}, which is not read here")
    if type(shape) is not list or {*map(type, shape), *map(type, places)} != {int} or min(*shape, *places) < 0:
        raise ValueError(f"{name} has a shape or place that is no whole number")
    if math.prod(shape) * ITEM_BYTES[dtype] != stop - start:
        raise ValueError(f"{name}: {shape} of {dtype} does not take {stop - start:,} bytes")
    return TensorInfo(name, dtype, tuple(shape), file, first + start, first + stop)


def _check_names(names: Mapping[str, Any]) -> None:
    joined = "".join(names)
    if max(map(len, names), default=0) <= TENSOR_NAME.most and _HARMLESS.fullmatch(joined) and ".." not in joined:
        return
    for name in names:
        if problem := excess(f"the tensor {name[:_SHOWN]}…", len(name), TENSOR_NAME):
            raise ValueError(problem.what)
        if _UNSAFE_NAME.search(name):
            raise ValueError(f"a tensor's name points outside the model: {name!r}")


def _fraction(text: str) -> float:
    """A number with a point; those that JSON does not have, and those that no computer holds, are none."""
    if not math.isfinite(float(text)):
        raise ValueError(f"{text[:20]} is no number")
    return float(text)


def _check_metadata(said: Any) -> None:
    if said is not None and not (isinstance(said, dict) and all(isinstance(text, str) for text in said.values())):
        raise ValueError("its __metadata__ is no map of texts")


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict; the format forbids a key that stands twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")
    return found


def _check_places(tensors: list[TensorInfo], file: str, first: int, size: int) -> None:
    """Tensors must follow each other without gap or overlap up to the file's end, as the format demands."""
    end = first
    for tensor in tensors:
        if tensor.start != end:
            raise ModelError(Problem(f"{file}: {tensor.name} does not start where the one before ends", hint=_DAMAGED))
        end = tensor.stop
    if end != size:
        raise ModelError(Problem(f"{file}: has {size:,} bytes, its header promises {end:,}", hint=_DAMAGED))


def gather(
    headers: Iterable[tuple[TensorInfo, ...]], index: Mapping[str, str] | None, single: str = SINGLE
) -> dict[str, TensorInfo]:
    """All files' tensors by name; where two files hold one name, the index decides.

    Raises:
        ModelError: the index names a tensor that its file does not hold, or does not decide.
    """
    chosen = index or {}
    tensors: dict[str, TensorInfo] = {}
    for tensor in (tensor for header in headers for tensor in header):
        if tensor.name in tensors and tensor.name not in chosen:
            files = f"{tensor.file} and {tensors[tensor.name].file}"
            what = f"{files} both hold {tensor.name}, and {index_name(single)} names neither"
            raise ModelError(Problem(what, hint=_DAMAGED))
        if chosen.get(tensor.name, tensor.file) == tensor.file or tensor.name not in tensors:
            tensors[tensor.name] = tensor
    for name, file in chosen.items():
        if name not in tensors or tensors[name].file != file:
            raise ModelError(
                Problem(f"{index_name(single)} places {name!r} in {file}, which does not hold it", hint=_DAMAGED)
            )
    return tensors
