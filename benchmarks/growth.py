"""How the time of the loop grows with entries, tensors, models and threads.

`python benchmarks/growth.py` writes the second part of docs/speed.md, and the third, on the mean of many checkpoints.
What is made is hashed and dropped: it takes no disk. Not here: whole processes, and other programs (speed).
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import models
import numpy as np
import speed
import yaml

MARK, CHECKPOINTS = "<!-- growth -->", "<!-- checkpoints -->"
_RANDOM = 500_000_000
"""Entries of random content; a larger parent has no content at all (a sparse file), for no memory holds it."""
_MEASURE = """
import json, sys, time
from pathlib import Path
import numba
from merger.engine.execute import execute
from merger.methods.registry import methods
from merger.run.options import Options
from merger.run.prepare import plan, read_recipe
from merger.runtime import take_over

take_over()  # as the command does: malloc keeps what is freed

class Dropped:
    def open(self, name): return self
    def take(self, shard, note=""): pass
    def write(self, data): return len(data)
    def close(self): pass

def told(file, key):  # of this process alone: getrusage's peak is inherited
    return int(Path("/proc/self", file).read_text().partition(key)[2].split()[0])

before, held = time.process_time(), told("io", "rchar:")
planned, store = plan(read_recipe(Path(sys.argv[1])), Options(to="nowhere", threads=int(sys.argv[2])))
start, used = time.perf_counter(), time.process_time()
for _ in execute(planned, planned.shards, methods(), store, Dropped()):
    pass
print(json.dumps({"plan": used - before, "loop": time.perf_counter() - start, "cores": time.process_time() - used,
                  "read": told("io", "rchar:") - held, "memory": 1024 * told("status", "VmHWM:"),
                  "planned": planned.peak_memory}))
"""


def checkpoint(folder: Path, shapes: Sequence[tuple[str, tuple[int, ...]]], seed: int) -> Path:
    """A bfloat16 checkpoint of one file in these shapes, kept if it is there already."""
    file, sizes = folder / "model.safetensors", [2 * int(np.prod(shape)) for _, shape in shapes]
    if file.exists():
        return folder
    folder.mkdir(parents=True)
    stops = np.cumsum(sizes).tolist()
    header = {
        name: {"dtype": "BF16", "shape": shape, "data_offsets": [stop - size, stop]}
        for (name, shape), size, stop in zip(shapes, sizes, stops, strict=True)
    }
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(head)) + head)
        if stops[-1] > 2 * _RANDOM:
            out.truncate(out.tell() + stops[-1])
        else:
            numbers = np.random.default_rng(seed).standard_normal(stops[-1] // 2, np.float32) * np.float32(0.02)
            out.write((numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    (folder / "config.json").write_text(json.dumps({**models.CONFIG, "num_hidden_layers": 1}))
    return folder


def flat(tensors: int, entries: int) -> list[tuple[str, tuple[int, ...]]]:
    """So many tensors of equal size, `entries` in all, in rows of 1,024."""
    return [(f"model.layers.{number}.weight", (max(1, entries // tensors // 1024), 1024)) for number in range(tensors)]


def llama(billions: float) -> list[tuple[str, tuple[int, ...]]]:
    """As many layers as make this size, in the shapes of a Llama of one or of seven billion parameters."""
    hidden, middle = (2048, 5632) if billions < 1 else (4096, 11008)
    layer = [(f"{name}_proj.weight", (hidden, hidden)) for name in "kqvo"]
    layer += [("gate.weight", (middle, hidden)), ("up.weight", (middle, hidden)), ("down.weight", (hidden, middle))]
    count = round(billions * 1e9 / sum(int(np.prod(shape)) for _, shape in layer))
    return [(f"model.layers.{number}.{name}", shape) for number in range(count) for name, shape in layer]


def run(work: Path, method: str, parents: Sequence[Path], threads: int) -> Mapping[str, float]:
    """The seconds of one merge: of its plan, of its loop, and what the loop took of the cores."""
    base = [] if method in speed.WITHOUT_BASE else [parents[0]]
    made = {
        "merge_method": method,
        "models": [{"model": str(parent)} for parent in parents[1:]],
        "dtype": "bfloat16",
        "parameters": dict(speed.SETTINGS[method]),
        **({"base_model": str(base[0])} if base else {}),
    }
    return measure(work, made, threads)


def measure(work: Path, made: Mapping[str, Any], threads: int) -> Mapping[str, float]:
    """The same of any recipe."""
    (work / "growth.yaml").write_text(yaml.safe_dump(made, sort_keys=False))
    command = [sys.executable, "-c", _MEASURE, str(work / "growth.yaml"), str(threads)]
    found: Mapping[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def family(work: Path, name: str, shapes: Sequence[tuple[str, tuple[int, ...]]], count: int) -> list[Path]:
    """A base and `count` fine-tunes; only four of them differ in content, the others are links."""
    held = [checkpoint(work / f"{name}-{seed}", shapes, seed) for seed in range(min(count + 1, 4))]
    for number in range(4, count + 1):
        folder = work / f"{name}-{number}"
        folder.mkdir(exist_ok=True)
        for file in held[1 + number % 3].iterdir():
            (folder / file.name).unlink(missing_ok=True)
            os.link(file, folder / file.name)
        held.append(folder)
    return held


def rows(work: Path) -> Iterator[str]:
    """The tables, one measured line after the other."""
    cores = os.cpu_count() or 1

    def line(
        what: str, method: str, name: str, shapes: Sequence[tuple[str, tuple[int, ...]]], count: int, by: int
    ) -> str:
        entries, tensors = sum(int(np.prod(shape)) for _, shape in shapes), len(shapes)
        found = run(work, method, family(work, name, shapes, count), by)
        each = 1e9 * found["cores"] / entries
        return (
            f"| {what} | {method} | {entries / 1e9:.2f} | {tensors} | {count} | {by} | {found['plan']:.2f} s "
            f"| {found['loop']:.2f} s | {found['cores']:.2f} s | {each:.1f} ns | {each / count:.1f} ns "
            f"| {1e3 * found['cores'] / tensors:.2f} ms |"
        )

    for method in ("linear", "ties"):
        for billions in (0.1, 0.2, 0.4):
            yield line("entries", method, f"b{billions}", llama(billions), 3, cores)
    yield line("entries", "linear", "b7", llama(7), 3, cores)
    for tensors in (300, 3_000, 45_000):
        yield line("tensors", "linear", f"t{tensors}", flat(tensors, 92_160_000), 2, cores)
    for method in ("linear", "ties"):
        for count in (2, 4, 8, 16):
            yield line("models", method, "b0.1", llama(0.1), count, cores)
        for threads in (1, cores):
            yield line("threads", method, "b0.1", llama(0.1), 3, threads)


def checkpoint_rows(work: Path) -> Iterator[str]:
    """The table of means, one measured line after the other: the last so many checkpoints of one run."""
    shapes = list(models.shapes(**{key: size for key, size in models.BILLIONS["0.5B"].items() if key != "heads"}))
    entries, cores = sum(int(np.prod(shape)) for _, shape in shapes), os.cpu_count() or 1
    family(work, "run/checkpoint", shapes, 63)
    for average, count in (("uniform", 2), ("uniform", 16), ("uniform", 64), ("wsm-cosine", 64)):
        mean = {"model": f"{work}/run/checkpoint-*", "revisions": {"last": count}, "average": average}
        found = measure(work, {"merge_method": "linear", "dtype": "bfloat16", "models": [mean]}, cores)
        yield (
            f"| {average} | {count} | {entries / 1e9:.2f} | {found['read'] / 1e9:.1f} GB | {found['plan']:.2f} s "
            f"| {found['loop']:.1f} s | {found['cores']:.1f} s | {1e9 * found['cores'] / entries / count:.1f} ns "
            f"| {found['memory'] / 1e9:.2f} GB |"
        )


def replace_part(mark: str, lines: Sequence[str]) -> None:
    """Put what was measured in the place of what stands between a mark and the next one."""
    before, _, rest = speed.PAGE.read_text("utf-8").partition(mark)
    _, following, after = rest.partition("<!--")
    text = "\n".join([before.rstrip("\n"), "", mark, "", *lines, ""])
    speed.PAGE.write_text(f"{text}\n{following}{after}" if following else text, "utf-8")


def main() -> int:
    """Measure and write the page's second part, and the third."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=speed.ROOT / "benchmarks" / ".work", help="where checkpoints are kept"
    )
    parser.add_argument("--only", choices=PARTS, help="the one part to measure; the other stays")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for mark, head, measured in [PARTS[options.only]] if options.only else PARTS.values():
        load, lines = os.getloadavg()[0], []
        for row in measured(options.work):
            print(row, flush=True)
            lines.append(row)
        replace_part(mark, [head.format(load=load), *lines])
    return 0


HEAD = """## How the cost grows

Generated by `python benchmarks/growth.py` on the same kind of machine, single runs, the load {load:.1f} before: the
loop of a merge to bfloat16 whose result is hashed and dropped. *cores*: seconds of all threads together, then per entry
of the result, per entry and model, and per tensor. The parents of 7 billion entries have no content (all entries are
zero); the others are random numbers.

A line is straight where what it costs is a start and so much each. *entries*: half a second of the cores, then 4 ns
an entry for linear and 14 for TIES; of entries that are all zero 3 ns. *models*: 0.9 ns an entry and model for linear,
3.3 for TIES. *tensors*: 0.1 ms each where they are many, for small ones that lie side by side are made as one; the plan
takes 0.15 ms each. *threads*: the second one gains nothing for linear, which reading, hashing and writing bound, and a
fifth for TIES: [performance.md](performance.md) says why.

| grows | method | entries, 10⁹ | tensors | models | threads | plan | loop | cores | an entry | and model | a tensor |
|---|---|---|---|---|---|---|---|---|---|---|---|"""
CHECKPOINTS_HEAD = """## Many checkpoints of one run

Generated by `python benchmarks/growth.py --only checkpoints` on the same kind of machine, single runs, the load
{load:.1f} before: their mean in bfloat16, hashed and dropped. *memory*: the process's peak resident size, imports
included. Each checkpoint is read once, from the page cache (four of them differ, the others are links to those), and no
more memory is taken by 64 than by two.

| average | checkpoints | entries, 10⁹ | read | plan | loop | cores | an entry and checkpoint | memory |
|---|---|---|---|---|---|---|---|---|"""
PARTS = {"growth": (MARK, HEAD, rows), "checkpoints": (CHECKPOINTS, CHECKPOINTS_HEAD, checkpoint_rows)}

if __name__ == "__main__":
    raise SystemExit(main())
