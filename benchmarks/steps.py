"""Nanoseconds an entry of every step, and of methods on tiles as the runner makes them: the tables of docs/steps.md.

`python benchmarks/steps.py` counts one thread's own time, the least of several runs, so that a busy machine disturbs it
little. Not here: reading, hashing and writing (stages), and whole merges (speed).
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import speed
from numpy.typing import NDArray

from merger.methods.registry import Method, declared, methods
from merger.methods.steps import select
from merger.methods.steps.arithmetic import Spans
from merger.methods.steps.dtypes import load, store
from merger.methods.steps.random import Rng
from merger.methods.steps.step import STEPS, TILE, Array, Step, room, tile

sys.path.insert(0, str(speed.ROOT / "tests"))
from methods.test_steps import SIZES

PAGE = speed.ROOT / "docs" / "steps.md"
MARK = "<!-- measured -->"
SIDE = 2048
BLOCK = 1 << 19
FURTHER = ("magmax", "emr", "consensus_ta", "consensus_ties", "pcb")
assert select.sift.name in STEPS


def nanoseconds(run: Callable[[], object], entries: int, times: int) -> float:
    """The least of five runs, of this thread's own time, an entry."""
    with np.errstate(all="ignore"):
        run()
        found = []
        for _ in range(5):
            start = time.thread_time()
            for _ in range(times):
                run()
            found.append((time.thread_time() - start) / times / entries * 1e9)
    return min(found)


def step_time(step: Step) -> float:
    """Of a step, on arrays of a tile in rows of 4,096."""
    draw, sizes = np.random.default_rng(0), {"rows": TILE // 4096, "columns": 4096, "lanes": 16, "series": 12, "key": 4}
    whole = iter([0x3F000000, 0x3F028000, 0x3F000001, 0x3F028000] if step.name == "sift" else [26_000, 39_000, 4096])
    given: list[Any] = []
    for place, (kind, is_array) in enumerate(re.findall(r"(\w+)(\[::1\])?[,)]", step.signature)):
        size = 16 if (special := SIZES.get(step.name, {}).get(place)) == "room" else sizes.get(special or "", TILE)
        if step.name == "sift" and place > 4:
            given.append(np.zeros(4, np.int64) if place == 5 else np.empty(1 << 22, np.uint32))
        elif is_array:
            drawn = draw.integers(0, 1 << 16, size) if kind.startswith("uint") else draw.standard_normal(size)
            given.append((drawn > 0) if kind == "boolean" else drawn.astype(kind))
        else:
            given.append(next(whole) if "int" in kind else 0.5)

    def run() -> None:
        if step.name == "sift":
            given[5][:] = 0
        step(*given)

    return nanoseconds(run, TILE, 40)


@dataclass(frozen=True)
class Tiles:
    """The tiles of some matrices of bfloat16, as a method's `measure` walks them."""

    method: Method
    models: Sequence[NDArray[np.uint16]]
    base: NDArray[np.uint16] | None

    @property
    def entries(self) -> int:
        """Of each."""
        return self.models[0].size

    def handed(self, start: int, stop: int) -> tuple[list[Array], Array | None]:
        """What a method is handed of the entries there, and the base that was subtracted."""
        held = [*self.models] if self.base is None else [*self.models, self.base]
        floats = [load(bits[start:stop], "BF16", room(4 * (stop - start)).view(np.float32)) for bits in held]
        base = None if self.base is None else floats.pop()
        for entries in floats if base is not None else ():
            np.subtract(entries, base, out=entries)
        return [x if self.method.unit == "entries" else x.reshape(-1, SIDE) for x in floats], base

    def __iter__(self) -> Iterator[list[Array]]:
        for start in range(0, self.entries, TILE):
            with tile():
                yield self.handed(start, start + TILE)[0]

    def spans(self, spans: Spans) -> Iterator[list[Array]]:
        """Some entries."""
        for start, stop in spans:
            with tile():
                yield [x.reshape(-1) for x in self.handed(start, stop)[0]]


def method_times(method: Method, parents: Sequence[NDArray[np.uint16]]) -> tuple[float, float]:
    """Of a method on a base and three fine-tunes (as many as it takes): measuring, and merging."""
    count = 1 if method.name in speed.ONE_MODEL else 2 if method.name in speed.TWO_MODELS else 3
    models, base = [*parents[1 : 1 + count]], None if method.name in speed.WITHOUT_BASE else parents[0]
    if method.base == "first":
        models, base = [parents[0], *models], None
    settings = {param.argument: param.default for param in method.params} | dict(speed.SETTINGS.get(method.name, {}))
    settings |= {param.argument: [settings[param.argument]] * len(models) for param in method.params if param.per_model}
    tiles, out = Tiles(method, models, base), np.empty(parents[0].size, np.uint16)
    given = dict(settings)

    def measure() -> None:
        if method.measure is not None:
            offered = {**settings, "rng": Rng(0, "w")}
            given["measured"] = method.measure(tiles, **declared(method.measure, offered))

    def merge() -> None:
        for start in range(0, tiles.entries, TILE):
            with tile():
                inputs, base = tiles.handed(start, start + TILE)
                if method.random:
                    given["rng"] = Rng(0, "w", start)
                if method.placed:
                    given["start"] = start
                merged = method.function(inputs, **given).reshape(-1)
                store(merged if base is None else np.add(merged, base, out=merged), "BF16", out[start : start + TILE])

    return (nanoseconds(measure, out.size, 1) if method.measure else 0.0), nanoseconds(merge, out.size, 1)


def family() -> list[NDArray[np.uint16]]:
    """A base and three fine-tunes of it, of SIDE times SIDE entries."""
    draw = np.random.default_rng(0)
    base = draw.standard_normal(SIDE * SIDE) * 0.02
    made = []
    for number in range(4):
        delta = draw.standard_normal(SIDE * SIDE) * (number > 0)
        store((base + 0.001 * delta * abs(delta)).astype(np.float32), "BF16", bits := np.empty(SIDE * SIDE, np.uint16))
        made.append(bits)
    return made


def main() -> int:
    """Measure, and write the tables behind the mark of the page."""
    lines = ["| step | ns | | step | ns | | step | ns |", "|---|---|---|---|---|---|---|---|"]
    steps = [f"`{name}` | {step_time(step):.2f}" for name, step in sorted(STEPS.items()) if name != "compare_rows"]
    third = -(-len(steps) // 3)
    steps += [" | "] * (3 * third - len(steps))
    lines += [f"| {' | | '.join(steps[row::third])} |" for row in range(third)]
    lines += ["", "| method | measuring | merging |", "|---|---|---|"]
    parents = family()
    for name in (*speed.SETTINGS, *FURTHER):
        measuring, merging = method_times(methods()[name], parents)
        lines.append(f"| {name} | {f'{measuring:.1f}' if measuring else ''} | {merging:.1f} |")
        print(lines[-1], flush=True)
    text = PAGE.read_text("utf-8").split(MARK)[0]
    PAGE.write_text(f"{text}{MARK}\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
