"""What a step is: a small loop over arrays, compiled when it is first called, with a second body for torch's tensors.

That of a loop which looks at one entry at a time is made of its source: `x[i]` is the whole tensor, a choice `where`.

And where the memory of what steps fill comes from. Not here: any step. Neither numpy nor numba is imported with this
file, so that the table of methods can be read without them.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
import threading
from collections.abc import Callable
from contextlib import suppress
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

TILE = 1 << 17
"""Entries that are worked on at once: a dozen arrays of as many stay in a cache, and Python is no tenth of the time."""

ZERO, ONE, NONE = 0.0, 1.0, 0
"""In a step these are float32, and an integer of 32 bits: a bare 0 would widen the loop, at a third of the speed."""

wide: Any = None
"""In a step the same number in float64."""

single: Any = None
"""In a step a literal as float32."""

STEPS: dict[str, Step] = {}
"""Every step by its name."""


class Step:
    """A loop over arrays of one dimension; whatever shape an array has, the loop sees its entries in one row."""

    def __init__(self, function: Callable[..., None], signature: str) -> None:
        self.function, self.signature, self.name = function, signature, function.__name__
        self._arrays = [place for place, kind in enumerate(signature.split(", ")) if "[" in kind]

    def torch(self, twin: Body) -> Body:
        """Register the same in torch's expressions, of a loop that looks at more than an entry at a time."""
        self.twin = twin
        return twin

    @cached_property
    def twin(self) -> Callable[..., None] | None:
        """What is called in place of the compiled loop where the arrays are tensors; None: it is called with none."""
        return _derive_twin(self.function)

    @cached_property
    def compiled(self) -> Callable[..., None]:
        """The loop in machine code, which numba keeps on disk."""
        return _compile(self.function, self.signature)

    def __call__(self, first: Array, *others: Any) -> None:
        """Run the loop: over numpy's arrays what is compiled, over torch's tensors its twin."""
        handed = [first, *others]
        for place in self._arrays:
            if handed[place].ndim != 1:
                handed[place] = handed[place].reshape(-1)
        run = self.twin if is_tensor(first) else self.compiled
        assert run is not None, self.name
        run(*handed)


def step(signature: str) -> Callable[[Callable[..., None]], Step]:
    """Make a step of a function, whose arrays' and numbers' types the signature names, as numba writes them."""

    def make(function: Callable[..., None]) -> Step:
        made = STEPS[function.__name__] = Step(function, signature)
        return made

    return make


def compile_steps() -> None:
    """Compile every step there is: for a process that forks others, each of which then has them at once."""
    _words()  # has steps of its own
    for known in STEPS.values():
        _ = known.compiled


def kept_steps() -> int | None:
    """How many of the steps are compiled already and kept for the next process; None: nothing can be kept here."""
    _words()
    places = [getattr(_dispatcher(step.function)._cache, "_cache_file", None) for step in STEPS.values()]
    return sum(bool(place._load_index()) for place in places if place) if all(places) else None


def is_tensor(array: Any) -> bool:
    """Whether an array is torch's."""
    return type(array).__module__ == "torch"


def _compile(function: Callable[..., None], signature: str) -> Callable[..., None]:
    compiled = _dispatcher(function)
    compiled.compile(signature)
    compiled.disable_compile()
    found: Callable[..., None] = compiled
    return found


def _dispatcher(function: Callable[..., None]) -> Any:
    """Numba's, with its place on disk if there is one: else it is compiled for this process alone."""
    import numba

    assert isinstance(function, FunctionType)
    named = FunctionType(function.__code__, function.__globals__ | _words(), function.__name__)
    made: Any = numba.njit(nogil=True, error_model="numpy", boundscheck=False)(named)
    with suppress(RuntimeError):  # nowhere to write
        made.enable_caching()
        made._cache._cache_file._source_stamp = _stamp(function.__code__.co_filename)  # not the file's date
    return made


@cache
def _words() -> dict[str, Any]:
    import numpy as np

    words = import_module("merger.methods.steps.intrinsics")
    return {**vars(words), "ZERO": np.float32(0), "ONE": np.float32(1), "NONE": np.uint32(0)} | {
        "wide": np.float64, "single": np.float32,
    }  # fmt: skip


@cache
def _stamp(path: str) -> str:
    sources = (Path(path), Path(__file__), Path(__file__).with_name("intrinsics.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


# ---- the second body ------------------------------------------------------------------------------------------------


def _derive_twin(function: Callable[..., None]) -> Callable[..., None] | None:
    """The same expressions over whole tensors; None where the step is no loop over entries."""
    assert isinstance(function, FunctionType)
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(definition, ast.FunctionDef)
    loop = definition.body[-1]
    if len(definition.body) > 2 or not isinstance(loop, ast.For) or any(isinstance(x, ast.For) for x in loop.body):
        return None
    assert isinstance(loop.target, ast.Name)
    definition.decorator_list, definition.returns = [], None
    for argument in definition.args.args:
        argument.annotation = None
    definition.body = [_Whole(loop.target.id).visit(statement) for statement in loop.body]
    module = ast.fix_missing_locations(ast.Module([definition], []))
    names = dict(function.__globals__ | _torch_words())
    exec(compile(module, function.__code__.co_filename, "exec"), names)
    found: Callable[..., None] = names[function.__name__]
    return found


class _Whole(ast.NodeTransformer):
    """Expressions of an entry to expressions of all of them."""

    def __init__(self, index: str) -> None:
        self._index = index

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        if not (isinstance(node.slice, ast.Name) and node.slice.id == self._index):
            return self.generic_visit(node)
        return node.value if isinstance(node.ctx, ast.Load) else ast.Subscript(node.value, ast.Constant(...), node.ctx)

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        parts = [self.visit(part) for part in (node.test, node.body, node.orelse)]
        return ast.Call(ast.Name("where", ast.Load()), parts, [])

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        one, other = (self.visit(value) for value in node.values)
        return ast.BinOp(one, ast.BitAnd() if isinstance(node.op, ast.And) else ast.BitOr(), other)


@cache
def _torch_words() -> dict[str, Any]:
    """The words of compiled loops, for tensors."""
    import torch

    def flip(x: Any, like: Any) -> Any:
        return (x.view(torch.int32) ^ like.view(torch.int32) & -(1 << 31)).view(torch.float32)

    return {
        "where": torch.where,
        "flip": flip,
        "wide": lambda x: x.double(),
        "from_bfloat16": lambda bits: bits.view(torch.bfloat16).float(),
        "to_bfloat16": lambda x: x.bfloat16().view(torch.uint16),
        "from_float16": lambda bits: bits.view(torch.float16).float(),
        "to_float16": lambda x: x.half().view(torch.uint16),
        "to_float8": lambda x: x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8),
    }


# ---- memory ---------------------------------------------------------------------------------------------------------


class _Arena(threading.local):
    """This thread's arrays, handed out in turn while a tile is made, and again for the next one."""

    def __init__(self) -> None:
        self.kept: list[Array] = []
        self.used, self.tiles = 0, 0

    def take(self, entries: int) -> Array:
        used = self.used
        if self.tiles and entries <= _KEPT_ENTRIES:
            self.used += 1
            if used < len(self.kept) and entries <= self.kept[used].size:
                return self.kept[used][:entries]
        import numpy as np

        made = np.empty(entries if self.used == used else max(entries, TILE), np.float32)
        if self.used > used:
            self.kept[used : used + 1] = [made]
        return made[:entries]


_arena = _Arena()
_KEPT_ENTRIES = 1 << 20
"""4 MiB: what is larger comes and goes."""


class tile:
    """Whatever is allocated inside is good until the end of it, and no longer."""

    def __enter__(self) -> None:
        self._used = _arena.used
        _arena.tiles += 1

    def __exit__(self, *_: object) -> None:
        _arena.used = self._used
        _arena.tiles -= 1


def room(nbytes: int) -> NDArray[np.uint8]:
    """Bytes with anything in them, good as long as the tile."""
    found: NDArray[np.uint8] = _arena.take(-(-nbytes // 4)).view("u1")[:nbytes]
    return found


def new(like: Array) -> Array:
    """An array, or a tensor, shaped like another, with anything in it: the arena's where a runner makes a tile."""
    made: Array = _new(like, "float32")
    return made


def zeros(like: Array) -> Array:
    """An array of zeros shaped like another."""
    made = new(like)
    made[...] = 0
    return made


def wide_zeros(like: Array) -> NDArray[np.float64]:
    """The same in float64."""
    made: NDArray[np.float64] = _new(like, "float64")
    made[...] = 0
    return made


def _new(like: Array, kind: str) -> Any:
    if is_tensor(like):
        import torch

        place: Any = like.device
        return torch.empty(like.shape, dtype=getattr(torch, kind), device=place)
    made = _arena.take(like.size) if kind == "float32" else _arena.take(2 * like.size).view(kind)
    return made if like.ndim == 1 else made.reshape(like.shape)
