"""The law over the table of steps: what is compiled and what torch makes are the same bits; and their memory."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thorough import THOROUGH

from merger.methods.registry import methods
from merger.methods.steps import dtypes, select
from merger.methods.steps.arithmetic import LANES, multiple, weighted_sum
from merger.methods.steps.step import STEPS, TILE, Step, new, tile

methods()
assert select.sift.name in STEPS  # what is imported when it is first needed
TWINS = {name: step for name, step in STEPS.items() if step.twin is not None}
assert set(STEPS) - set(TWINS) <= {"sift", "compare_rows"}  # which see numpy's arrays alone
ODD = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-39, 3.4e38, -3.4e38, 65_519.0, 65_520.0, 6e-8, np.inf, -np.inf, np.nan]
SIZES = {
    "sum_magnitudes": {1: "lanes"},
    "sum_products": {2: "room", 3: "rows"},
    "sum_column_products": {2: "columns"},
    "exp_products": {2: "series"},
    "draw_words": {0: "words", 1: "key"},
    "keep_winners": {2: "spent"},
    **{f"store_{kind.lower()}": {1: kind} for kind, (entries, _) in dtypes.BLOCKS.items() if entries > 1},
}
"""Which arguments of a step have not as many entries as the others; what is room alone holds nothing afterwards."""
TENSORS = ("all", "words", "spent", *dtypes.BLOCKS)
SPENT = ("room", "spent")


def values(kind: str, size: int, draw: np.random.Generator) -> np.ndarray[Any, Any]:
    """Entries of a kind, some of them odd ones."""
    if kind == "boolean":
        return draw.random(size) < 0.5
    if kind.startswith("uint"):
        return draw.integers(0, np.iinfo(kind).max, size, kind, endpoint=True)
    normal = draw.standard_normal(size) * 10.0 ** draw.integers(-3, 3)
    if kind == "float64":  # sums, which are never a negative zero
        return normal
    drawn = np.where(draw.random(size) < 0.3, draw.choice(ODD, size), normal)
    return (drawn if draw.random() < 0.7 else normal.round()).astype(kind)


@pytest.mark.parametrize("name", TWINS)
@settings(max_examples=400 if THOROUGH else 40, deadline=None, derandomize=not THOROUGH)
@given(
    rows=st.sampled_from([1, 2, 7, 33]),
    columns=st.sampled_from([1, 3, 16, 61, 700]),
    numbers=st.lists(st.floats(-4, 4, width=32), min_size=4, max_size=4),
    seed=st.integers(0, 2**20),
)
def test_both_bodies_of_a_step_give_the_same_bits(
    name: str, rows: int, columns: int, numbers: list[float], seed: int
) -> None:
    """For any sizes and values, infinities, denormals and signed zeros included; any NaN is as good as another."""
    step, draw = TWINS[name], np.random.default_rng(seed)
    sizes = {"rows": rows, "columns": columns, "lanes": LANES, "room": LANES, "series": 12, "key": 4}
    sizes |= {"all": rows * columns, "spent": rows * columns, "words": rows * 4 * LANES}
    sizes |= {kind: rows * columns // entries * nbytes for kind, (entries, nbytes) in dtypes.BLOCKS.items()}
    whole = iter([20_000, 45_000, columns] if name == "keep_winners" else [2**35 + seed])
    kinds = re.findall(r"(\w+)(\[::1\])?[,)]", step.signature)
    arguments: list[Any] = []
    for place, (kind, is_array) in enumerate(kinds):
        size = sizes[SIZES.get(name, {}).get(place, "all")]
        number = next(whole) if kind == "int64" else numbers[place % 4]
        arguments.append(values(kind, size, draw) if is_array else number)
    with np.errstate(all="ignore"):
        here, there = ([np.copy(x) if isinstance(x, np.ndarray) else x for x in arguments] for _ in range(2))
        step.compiled(*here)
        assert step.twin is not None
        step.twin(*[_handed(name, place, x) for place, x in enumerate(there)])
    for place, (one, other) in enumerate(zip(here, there, strict=True)):
        if isinstance(one, np.ndarray) and SIZES.get(name, {}).get(place) not in SPENT:
            np.testing.assert_array_equal(_bits(name, one), _bits(name, other))


def _handed(name: str, place: int, x: Any) -> Any:
    """Entries as tensors; lanes, keys and numbers of rows stay numpy's, as methods hand them over."""
    is_entries = SIZES.get(name, {}).get(place, "all") in TENSORS
    return torch.from_numpy(x) if isinstance(x, np.ndarray) and is_entries else x


def _bits(name: str, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The bit patterns, of NaN one for all."""
    if x.dtype == np.uint16 and name.startswith("store"):
        first = 0x7F80 if "bfloat16" in name else 0x7C00
        return np.where(x & 0x7FFF > first, np.uint16(0x7FFF), x)
    return np.where(x != x, np.nan, x).view(f"u{x.itemsize}") if x.dtype.kind == "f" else x


@pytest.mark.parametrize("kind", dtypes.BLOCKS)
@settings(max_examples=400 if THOROUGH else 40, deadline=None, derandomize=not THOROUGH)
@given(
    blocks=st.integers(1, 40),
    size=st.sampled_from([1e-30, 1e-3, 1.0, 3e4]),
    spread=st.sampled_from(["normal", "zeros", "ties", "whole"]),
    seed=st.integers(0, 2**20),
)
def test_a_type_of_gguf_has_the_bits_of_its_own_library(
    kind: str, blocks: int, size: float, spread: str, seed: int
) -> None:
    """Blocks of zeros, several largest entries and halves between two codes included."""
    draw = np.random.default_rng(seed)
    x = draw.standard_normal(32 * blocks).astype(np.float32)
    if spread != "normal":
        x = {"zeros": x * (draw.random(x.size) < 0.02), "ties": np.sign(x), "whole": (x * 40).round() * 0.5}[spread]
    x = (x * size).astype(np.float32)
    entries, nbytes = dtypes.BLOCKS[kind]
    out = np.empty(x.size // entries * nbytes, np.uint8)
    dtypes.quantise(x, kind, out)
    with np.errstate(all="ignore"):
        expected = gguf.quants.quantize(x.reshape(1, -1), gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(out, expected.reshape(-1).view(np.uint8))


@pytest.mark.parametrize(("dtype", "kind"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_every_bit_pattern_of_two_bytes_is_loaded(dtype: str, kind: torch.dtype) -> None:
    """All 65,536 numbers of a dtype are torch's, and stored again they are themselves."""
    raw = np.arange(1 << 16, dtype=np.uint16)
    found, back = np.empty(raw.size, np.float32), np.empty_like(raw)
    dtypes.load(raw, dtype, found)
    np.testing.assert_array_equal(found, torch.from_numpy(raw.view(np.int16)).view(kind).float().numpy())
    dtypes.store(found, dtype, back)
    assert np.array_equal(back[~np.isnan(found)], raw[~np.isnan(found)])


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2), ("F8_E8M0", torch.float8_e8m0fnu)],
)
def test_every_bit_pattern_of_one_byte_is_loaded(dtype: str, kind: torch.dtype) -> None:
    """All 256 numbers of a dtype are torch's."""
    raw = np.arange(256, dtype=np.uint8)
    found = dtypes.load(raw, dtype, np.empty(256, np.float32))
    np.testing.assert_array_equal(found, torch.from_numpy(raw).view(kind).float().numpy())


def test_loops_with_a_branch_less_choice_are_vectors() -> None:
    """A step takes no more than a few tenths of a nanosecond an entry of its thread's time: LLVM made vectors of it."""
    import time

    x, out = np.ones(TILE, np.float32), np.empty(TILE, np.float32)
    step: Step = STEPS["keep_between"]
    step(x, 0.5, np.inf, 2.0, out)
    start = time.thread_time()
    for _ in range(200):
        step(x, 0.5, np.inf, 2.0, out)
    assert (time.thread_time() - start) / 200 / TILE < 1.5e-9  # 0.1 ns; without vectors 2 and more


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_outside_of_a_tile_memory_is_numpys_own() -> None:
    """Two results never share memory, and stay as they are."""
    x = np.ones(5, np.float32)
    one, other = multiple(x, 2.0), multiple(x, 3.0)
    assert one.tolist() == [2.0] * 5
    assert other.tolist() == [3.0] * 5


def test_inside_of_a_tile_two_results_never_share_memory() -> None:
    """However deep tiles lie in each other, and however large one is; when a tile ends its memory serves the next."""
    x = np.ones((3, 4), np.float32)
    with tile():
        first = multiple(x, 2.0)
        with tile():
            second = multiple(x, 3.0)
        third, large = multiple(x, 4.0), new(np.empty(TILE * 40, np.float32))
        assert first.shape == (3, 4)
        assert (first == 2).all()
        assert np.shares_memory(second, third)
        assert not np.shares_memory(first, third)
        assert large.size == TILE * 40
    with tile():
        assert np.shares_memory(multiple(x, 5.0), first)


def test_threads_have_memory_of_their_own() -> None:
    """Many at once make what one makes."""

    def made(number: int) -> float:
        x = np.full(5000, number, np.float32)
        with tile():
            return float(weighted_sum([x, x], [1.0, 2.0]).sum())

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(made, range(200))) == [number * 15_000.0 for number in range(200)]


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_a_step_is_compiled_when_it_is_first_called() -> None:
    """Neither numba nor numpy is imported with the table of methods."""
    assert run_python(
        "import sys; from merger.methods.registry import methods; methods(); print('numba' in sys.modules)\n"
        "import numpy as np; from merger.methods.steps.arithmetic import multiple\n"
        "print(multiple(np.ones(2, np.float32), 3.0).tolist(), 'torch' in sys.modules)"
    ).split("\n")[:2] == ["False", "[3.0, 3.0] False"]


def test_steps_run_where_nothing_can_be_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Without a place for compiled code a step is compiled for this process."""
    from numba.core import caching

    def nowhere(*_: object) -> Callable[..., None]:
        raise RuntimeError("no locator available")

    monkeypatch.setattr(caching.CacheImpl, "__init__", nowhere)
    step = Step(STEPS["scale"].function, STEPS["scale"].signature)
    out = np.empty(3, np.float32)
    step(np.ones(3, np.float32), 2.0, out)
    assert out.tolist() == [2.0] * 3


@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize("kinds", ["BF16", "BF16 F16 BF16"])
def test_a_sum_of_stored_entries_is_that_of_their_floats(kinds: str, based: bool) -> None:
    """Bit for bit, whatever bits the entries have, of any part of a tensor; and so is what is rounded with the base."""
    draw, dtyped = np.random.default_rng(0), (kinds.split() * 3)[:3]
    held = [dtypes.Held(values("uint16", 1009, draw), dtype) for dtype in dtyped]
    held[0].bits[5:9], held[-1].bits[5:9] = [0, 0x8000, 0, 0x8000], [0, 0, 0x8000, 0x8000]
    floats = [each.floats(5, 900, np.empty(895, np.float32)) for each in held]
    base, factors = (floats.pop() if based else None), [0.3, -1.7, 0.0][: 3 - based]
    with np.errstate(all="ignore"):
        wanted = weighted_sum([each - base if base is not None else each for each in floats], factors)
        with tile():
            found = dtypes.Tile(held, based, 5, 900, lambda row: row.reshape(5, -1))
            assert (len(found), found[0].shape, len(found[:1])) == (len(floats), (5, 179), 1)
            total = weighted_sum(found, factors)
            assert total.shape == (5, 179)
            same = (total.reshape(-1).view(np.uint32) == wanted.view(np.uint32)) | np.isnan(wanted)
            assert same.all()
            assert np.isnan(total.reshape(-1)[np.isnan(wanted)]).all()
            dtypes.store_sum(total.reshape(-1), found.based, "BF16", stored := np.empty(895, np.uint16))
        dtypes.store(wanted if base is None else wanted + base, "BF16", expected := np.empty(895, np.uint16))
    assert stored.tobytes() == expected.tobytes()
