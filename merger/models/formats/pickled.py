"""Tensors in files that torch.save wrote (``pytorch_model.bin``), found without running what stands in them.

Such a file is a zip of a pickle, which says what the tensors are called and where they are, and of their bytes as they
are. The pickle is read by the standard library's reader, which here knows a dozen names, none of which does anything
but note what it is given; any other name ends the reading. Not here: whether such files may be read at all (lock.lock).
"""

from __future__ import annotations

import io
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from merger.errors import ModelError, Problem
from merger.models.checkpoint import ITEM_BYTES, SUFFIX, TensorInfo, index_name
from merger.safety.numbers import size

Fetch = Callable[[int, int], bytes]
"""The bytes ``[start, stop)`` of the file."""

Each = Callable[[Callable[[int], int], Iterable[int]], Iterable[int]]
"""What calls a function for each of some numbers."""

SINGLE = "pytorch_model.bin"
MAX_PICKLE = 64 << 20
_MOST_SIDES = 16

_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}  # fmt: skip
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_TAIL_BYTES = 1 << 16
_SAFE_NAME = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]+")
_CONVERT = "convert the model with transformers' save_pretrained"


def is_pickled(files: Iterable[str]) -> bool:
    """Whether a model has its tensors in such files, and in no safetensors."""
    present = [name for name in files if "/" not in name]
    return not any(name.endswith(SUFFIX) for name in present) and bool({SINGLE, index_name(SINGLE)} & set(present))


@dataclass(frozen=True)
class _Storage:
    """A run of numbers that tensors are views of: its key in the zip and its dtype."""

    key: str
    dtype: str


@dataclass(frozen=True)
class _View:
    """A tensor as the pickle tells of it; `offset` and `strides` count entries."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def pickled_tensors(file: str, size: int, fetch: Fetch, each: Each) -> tuple[TensorInfo, ...]:
    """The tensors of a file, in the order of their places.

    Args:
        file: its name.
        size: its size in bytes.
        fetch: reads it.
        each: ``map``, or a pool's: the place of each tensor's bytes takes a small read of its own.

    Raises:
        ModelError: it is damaged, in the format before 2020, or asks for anything but tensors.
    """
    try:
        with zipfile.ZipFile(_Remote(size, fetch)) as archive:
            name = _pickle_name(archive)
            root = name.removesuffix("data.pkl")
            views = _views(archive.read(name))
            records = {info.filename.removeprefix(root + "data/"): info for info in archive.infolist()}
        keys = list(dict.fromkeys(view.storage.key for view in views.values()))
        headers = [records[key].header_offset for key in keys]
        starts = dict(zip(keys, each(lambda place: _start(place, fetch), headers), strict=True))
        found = [_place_tensor(name, view, file, starts, records) for name, view in views.items()]
    except _Foreign as error:
        raise ModelError(Problem(f"{file}: {error}", hint=_CONVERT)) from None
    except Exception as error:  # whatever a damaged zip or pickle makes of the readers
        what = f"{file} is damaged, or in the format that torch wrote before 2020 ({type(error).__name__})"
        raise ModelError(Problem(what, hint=f"download it again, or {_CONVERT}")) from None
    return tuple(sorted(found, key=lambda tensor: (tensor.start, tensor.stop)))


class _Foreign(ValueError):
    """The file asks for something that is not read here; the sentence says what."""


class _Remote(io.RawIOBase):
    """A file that is read by range; its end, where a zip lists what it holds, only once."""

    def __init__(self, size: int, fetch: Fetch) -> None:
        self._size, self._fetch, self._place = size, fetch, 0
        self._tail = fetch(max(0, size - _TAIL_BYTES), size)

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence])
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, count: int = -1) -> bytes:
        stop = self._size if count < 0 else min(self._size, self._place + count)
        if stop - self._place > MAX_PICKLE:
            raise _Foreign(f"what tells of its tensors is larger than {size(MAX_PICKLE)}")
        start, first = self._place, self._size - len(self._tail)
        self._place = max(start, stop)
        if start >= first:
            return self._tail[start - first : stop - first]
        return self._fetch(start, stop) if stop > start else b""


def _pickle_name(archive: zipfile.ZipFile) -> str:
    found = [info for info in archive.infolist() if info.filename.endswith("/data.pkl")]
    if len(found) != 1 or found[0].compress_type != zipfile.ZIP_STORED or found[0].file_size > MAX_PICKLE:
        raise _Foreign("is no file that torch.save wrote")
    return found[0].filename


def _start(place: int, fetch: Fetch) -> int:
    """Where the bytes of a record begin, whose header begins at `place`."""
    header = _LOCAL_HEADER.unpack(fetch(place, place + _LOCAL_HEADER.size))
    if header[0] != b"PK\x03\x04" or header[3] != zipfile.ZIP_STORED:
        raise _Foreign("holds compressed tensors")
    return int(place + _LOCAL_HEADER.size + header[9] + header[10])


def _place_tensor(
    name: str, view: _View, file: str, starts: Mapping[str, int], records: Mapping[str, zipfile.ZipInfo]
) -> TensorInfo:
    item = ITEM_BYTES[view.storage.dtype]
    nbytes = prod(view.shape) * item
    if not _is_contiguous(view):
        raise _Foreign(f"{name} is a view of other numbers, not numbers in their order")
    if view.offset < 0 or view.offset * item + nbytes > records[view.storage.key].file_size:
        raise _Foreign(f"{name} reaches beyond its numbers")
    start = starts[view.storage.key] + view.offset * item
    return TensorInfo(name, view.storage.dtype, view.shape, file, start, start + nbytes)


def _is_contiguous(view: _View) -> bool:
    """Whether the entries stand in the order of their numbers; a side of one entry may have any stride."""
    expected = 1
    for side, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
        if side != 1 and stride != expected:
            return 0 in view.shape
        expected *= side
    return True


# ---- the pickle ------------------------------------------------------------------------------------------------------


def _views(raw: bytes) -> dict[str, _View]:
    held = _Unpickler(io.BytesIO(raw)).load()
    if isinstance(held, dict) and isinstance(held.get("state_dict"), dict):
        held = held["state_dict"]
    if not isinstance(held, dict):
        raise _Foreign("holds no tensors by name")
    other = next((name for name, value in held.items() if not _is_named_view(name, value)), None)
    if other is not None:
        raise _Foreign(f"holds {other!r}, which is no tensor")
    return dict(held)


def _is_named_view(name: object, value: object) -> bool:
    sound = isinstance(value, _View) and all(type(side) is int and side >= 0 for side in (*value.shape, value.offset))
    return sound and isinstance(name, str) and _SAFE_NAME.fullmatch(name) is not None


class _Unpickler(pickle.Unpickler):
    """Reads a pickle that names nothing but tensors and what they are kept in."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        found = _NAMES.get((module, name))
        if found is None:
            raise _Foreign(f"asks for {module}.{name}, which is no tensor; it was not run")
        return found

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, _ = pid
        if kind != "storage" or dtype not in _STORAGES.values() or not isinstance(key, str):
            raise _Foreign("keeps its numbers in a way that is not read here")
        return _Storage(key, dtype)


class _Tensor:
    """Stands for torch's way to make a tensor; like the others below it has no place for anything that is put on it."""

    __slots__ = ()

    def __call__(self, storage: _Storage, offset: int, shape: Sequence[int], strides: Sequence[int], *_: Any) -> _View:
        return _View(storage, offset, _sides(shape), _sides(strides))


class _Parameter:
    """Stands for torch's way to make a tensor a parameter."""

    __slots__ = ()

    def __call__(self, view: _View, *_: Any) -> _View:
        return view


class _Size:
    """Stands for a shape."""

    __slots__ = ()

    def __call__(self, sides: Sequence[int]) -> tuple[int, ...]:
        return _sides(sides)


class _Dict:
    """Stands for a dict; it is made empty, so that no pickle can copy what it holds a million times."""

    __slots__ = ()

    def __call__(self) -> OrderedDict[Any, Any]:
        return OrderedDict()


def _sides(numbers: Sequence[int]) -> tuple[int, ...]:
    if len(numbers) > _MOST_SIDES:
        raise _Foreign("holds a tensor of too many dimensions")
    return tuple(numbers)


_NAMES: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dict(),
    ("torch", "Size"): _Size(),
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor(),
    ("torch._utils", "_rebuild_parameter"): _Parameter(),
}
