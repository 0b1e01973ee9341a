"""What a step is: a small loop over arrays, compiled when it is first called, with a second body for torch's tensors.

And where the memory of what steps fill comes from. Not here: any step. Neither numpy nor numba is imported with this
file, so that the table of methods can be read without them.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Array: TypeAlias = "NDArray[np.float32]"
"""What a method is handed and what it returns: float32 entries, of numpy; of torch where a GPU computes."""

Body = TypeVar("Body", bound=Callable[..., None])

TILE = 1 << 16
"""Entries that are worked on at once: a dozen arrays of as many stay in a core's cache."""

ZERO, ONE, NONE = 0.0, 1.0, 0
"""In a step these are float32, and an integer of 32 bits: a bare 0 would widen the loop, at a third of the speed."""

wide: Any = None
"""In a step the same number in float64."""

STEPS: dict[str, Step] = {}
"""Every step by its name."""


class Step:
    """A loop over arrays of one dimension; whatever shape an array has, the loop sees its entries in one row."""

    def __init__(self, function: Callable[..., None], signature: str) -> None:
        self.function, self.signature, self.name = function, signature, function.__name__
        self.twin: Callable[..., None] | None = None

    def torch(self, twin: Body) -> Body:
        """Register the same in torch's expressions, in place of the compiled loop where the arrays are tensors."""
        self.twin = twin
        return twin

    @cached_property
    def compiled(self) -> Callable[..., None]:
        """The loop in machine code, which numba keeps on disk."""
        return _compile(self.function, self.signature)

    def __call__(self, first: Array, *others: Any) -> None:
        """Run the loop: over numpy's arrays what is compiled, over torch's tensors its twin."""
        if is_tensor(first):
            assert self.twin is not None, self.name
            self.twin(first, *others)
        else:
            self.compiled(*[x if getattr(x, "ndim", 1) == 1 else x.reshape(-1) for x in (first, *others)])


def step(signature: str) -> Callable[[Callable[..., None]], Step]:
    """Make a step of a function, whose arrays' and numbers' types the signature names, as numba writes them."""

    def make(function: Callable[..., None]) -> Step:
        made = STEPS[function.__name__] = Step(function, signature)
        return made

    return make


def compile_steps() -> None:
    """Compile every step there is: for a process that forks others, each of which then has them at once."""
    for known in STEPS.values():
        _ = known.compiled


def is_tensor(array: Any) -> bool:
    """Whether an array is torch's."""
    return type(array).__module__ == "torch"


def _compile(function: Callable[..., None], signature: str) -> Callable[..., None]:
    import numba

    assert isinstance(function, FunctionType)
    named = FunctionType(function.__code__, function.__globals__ | _words(), function.__name__)
    compiled: Any = numba.njit(nogil=True, error_model="numpy", boundscheck=False)(named)
    try:
        compiled.enable_caching()
        compiled._cache._cache_file._source_stamp = _stamp(function.__code__.co_filename)  # not the file's date
    except RuntimeError:  # nowhere to write: it is compiled for this process
        pass
    compiled.compile(signature)
    compiled.disable_compile()
    found: Callable[..., None] = compiled
    return found


@cache
def _words() -> dict[str, Any]:
    import numpy as np

    words = import_module("merger.methods.steps.intrinsics")
    return {**vars(words), "ZERO": np.float32(0), "ONE": np.float32(1), "NONE": np.uint32(0), "wide": np.float64}


@cache
def _stamp(path: str) -> str:
    sources = (Path(path), Path(__file__), Path(__file__).with_name("intrinsics.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


# ---- memory ---------------------------------------------------------------------------------------------------------


class _Arena(threading.local):
    """This thread's arrays, handed out in turn while a tile is made, and again for the next one."""

    def __init__(self) -> None:
        self.kept: list[Array] = []
        self.used, self.tiles = 0, 0

    def take(self, entries: int) -> Array:
        import numpy as np

        if self.used == len(self.kept):
            self.kept.append(np.empty(max(entries, TILE), np.float32))
        elif self.kept[self.used].size < entries:
            self.kept[self.used] = np.empty(entries, np.float32)
        self.used += 1
        return self.kept[self.used - 1][:entries]


_arena = _Arena()
_KEPT_ENTRIES = 1 << 20
"""4 MiB: what is larger comes and goes."""


@contextmanager
def tile() -> Iterator[None]:
    """Whatever is allocated inside is good until the end of it, and no longer."""
    used = _arena.used
    _arena.tiles += 1
    try:
        yield
    finally:
        _arena.used = used
        _arena.tiles -= 1


def room(nbytes: int) -> NDArray[np.uint8]:
    """Bytes with anything in them, good as long as the tile."""
    import numpy as np

    if _arena.tiles == 0 or nbytes > 4 * _KEPT_ENTRIES:
        return np.empty(nbytes, np.uint8)
    return _arena.take(-(-nbytes // 4)).view(np.uint8)[:nbytes]


def new(like: Array) -> Array:
    """An array, or a tensor, shaped like another, with anything in it: the arena's where a runner makes a tile."""
    made: Array = _new(like, double=False)
    return made


def zeros(like: Array) -> Array:
    """An array of zeros shaped like another."""
    made = new(like)
    made[...] = 0
    return made


def wide_zeros(like: Array) -> NDArray[np.float64]:
    """The same in float64."""
    made: NDArray[np.float64] = _new(like, double=True)
    made[...] = 0
    return made


def _new(like: Array, double: bool) -> Any:
    if is_tensor(like):
        import torch

        place: Any = like.device
        return torch.empty(like.shape, dtype=torch.float64 if double else torch.float32, device=place)
    import numpy as np

    entries, kind = like.size * (1 + double), np.float64 if double else np.float32
    if _arena.tiles == 0 or entries > _KEPT_ENTRIES:
        return np.empty(like.shape, kind)
    return _arena.take(entries).view(kind).reshape(like.shape)
