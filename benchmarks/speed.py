"""Time and memory of whole merges, side by side with mergekit, beside the floor of reading and writing the same bytes.

`python benchmarks/speed.py` makes bfloat16 checkpoints of 0.5 and 1.2 billion parameters (a base and three fine-tunes),
merges them by each method with both programs in turn, and writes docs/speed.md. Not here: whether they agree (parity).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import mergekit_env
import models
import yaml

from merger.methods.registry import methods

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "speed.md"
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "linear": {"weight": 0.4},
    "slerp": {"t": 0.4},
    "nuslerp": {"weight": 0.5},
    "multislerp": {"weight": 0.4},
    "karcher": {},
    "task_arithmetic": {"weight": 0.4},
    "ties": {"weight": 0.4, "density": 0.4},
    "dare_ties": {"weight": 0.4, "density": 0.4},
    "dare_linear": {"weight": 0.4, "density": 0.4},
    "breadcrumbs": {"weight": 0.4, "density": 0.8, "gamma": 0.01},
    "breadcrumbs_ties": {"weight": 0.4, "density": 0.8, "gamma": 0.01},
    "della": {"weight": 0.4, "density": 0.5, "epsilon": 0.1},
    "della_linear": {"weight": 0.4, "density": 0.5, "epsilon": 0.1},
    "sce": {"select_topk": 0.5},
    "ram": {},
    "ramplus_tl": {},
    "model_stock": {},
    "nearswap": {"t": 0.001},
    "arcee_fusion": {},
    "passthrough": {},
}
ROWS = "rows.jsonl"
GOALS: Mapping[str, int] = {
    **dict.fromkeys(("linear", "slerp", "task_arithmetic", "multislerp"), 5),
    **dict.fromkeys(("ties", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear", "sce"), 25),
    **dict.fromkeys(("dare_ties", "dare_linear"), 12),
    **dict.fromkeys(("ram", "ramplus_tl", "arcee_fusion"), 8),
    "karcher": 15,
}
"""How many times faster than mergekit a whole process is meant to be."""
FLOORS: Mapping[str, int] = {"passthrough": 2, "nearswap": 2, "nuslerp": 3, "model_stock": 3}
"""How many times the floor the loop may take, where reading and writing leave no room for a ratio."""
WITHOUT_BASE = ("linear", "nuslerp", "multislerp", "karcher", "passthrough")
ONE_MODEL = ("slerp", "nearswap", "arcee_fusion", "passthrough")
TWO_MODELS = ("nuslerp",)
_LOOP = """
import json, sys, time
from pathlib import Path
from merger.run.options import Options
from merger.run.prepare import plan, read_recipe as read
from merger.run.pipeline import merge
options = Options(to=sys.argv[2], threads=int(sys.argv[3]), force=True)
planned, store = plan(read(Path(sys.argv[1])), options)
import merger.engine.execute
start = time.perf_counter()
merge(planned, store, options)
print(json.dumps({"loop": time.perf_counter() - start}))
"""


@dataclass(frozen=True)
class Run:
    """One whole process: wall seconds, peak resident bytes, what it printed."""

    wall: float
    peak: int
    printed: str


def timed(command: Sequence[str]) -> Run:
    """Run a command and take the system's own account of it."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    printed = process.stdout.read() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return Run(time.perf_counter() - start, usage.ru_maxrss * 1024, printed)


def recipe(method: str, parents: Sequence[Path], path: Path) -> list[Path]:
    """Write the recipe that both programs are given; the models it reads."""
    count = 1 if method in ONE_MODEL else 2 if method in TWO_MODELS else 3
    base = [] if method in WITHOUT_BASE else [parents[0]]
    made: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(parent)} for parent in parents[1 : 1 + count]],
        "dtype": "bfloat16",
    }
    if base:
        made["base_model"] = str(base[0])
    if SETTINGS[method]:
        made["parameters"] = dict(SETTINGS[method])
    path.write_text(yaml.safe_dump(made, sort_keys=False))
    return [*base, *parents[1 : 1 + count]]


def floor(read: Sequence[Path], out: Path) -> float:
    """Seconds to read all files of the models once, and to hash and write a file as large as one of them."""
    start = time.perf_counter()
    buffer = memoryview(bytearray(8 << 20))
    sizes = []
    for folder in read:
        sizes.append(0)
        for file in sorted(folder.glob("*.safetensors")):
            with file.open("rb", buffering=0) as source:
                while got := source.readinto(buffer):
                    sizes[-1] += got
    digest = hashlib.sha256()
    with out.open("wb", buffering=0) as target:
        for _ in range(sizes[0] // len(buffer)):
            target.write(buffer)
            digest.update(buffer)
    out.unlink()
    return time.perf_counter() - start


def measure(method: str, size: str, parents: Sequence[Path], work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One method at one size: medians over the runs of floor, our loop, our process, and mergekit's process."""
    path, ours, theirs = work / "recipe.yaml", work / "ours", work / "theirs"
    read = recipe(method, parents, path)
    command = [sys.executable, "-m", "merger", "run", str(path), "--to", str(ours), "--force", "--quiet"]
    found: dict[str, list[float]] = {
        name: [] for name in ("floor", "loop", "one", "wall", "peak", "mk_wall", "mk_peak")
    }
    for _ in range(options.runs):
        shutil.rmtree(ours, ignore_errors=True)
        whole = timed(command)
        found["peak"].append(whole.peak)
        if not options.memory_only:
            found["wall"].append(whole.wall)
            found["floor"].append(floor(read, work / "floor"))
            for name, threads in (("loop", os.cpu_count() or 1), ("one", 1)):
                shutil.rmtree(ours)
                run = timed([sys.executable, "-c", _LOOP, str(path), str(ours), str(threads)])
                found[name].append(json.loads(run.printed)["loop"])
    if options.mergekit and not options.memory_only:
        run = timed(mergekit_env.arguments(path, theirs))
        found["mk_wall"].append(run.wall)
        found["mk_peak"].append(run.peak)
        shutil.rmtree(theirs)
    row = {"method": method, "size": size, **{name: median(values) for name, values in found.items() if values}}
    with (work / ROWS).open("a", encoding="utf-8") as kept:
        kept.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)
    return row


def rows_of(work: Path) -> list[dict[str, Any]]:
    """The newest figures of each method and size that were measured with these checkpoints, in the page's order."""
    rows = [json.loads(line) for line in (work / ROWS).read_text("utf-8").splitlines()]
    newest: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:  # one without mergekit's figures keeps those of before
        place = row["size"], row["method"]
        newest[place] = newest.get(place, {}) | row
    places = [(size, method) for size in models.BILLIONS for method in SETTINGS]
    return [newest[place] for place in places if place in newest]


COLUMNS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "method": lambda row: row["method"],
    "size": lambda row: row["size"],
    "floor": lambda row: f"{row['floor']:.1f} s",
    "loop": lambda row: f"{row['loop']:.1f} s",
    "of the floor": lambda row: f"{row['loop'] / row['floor']:.1f}x",
    "1 thread": lambda row: f"{row['one']:.1f} s",
    "2 threads faster": lambda row: f"{row['one'] / row['loop']:.2f}x",
    "whole process": lambda row: f"{row['wall']:.1f} s",
    "memory": lambda row: f"{row['peak'] / 1e9:.2f} GB",
    "mergekit": lambda row: f"{row['mk_wall']:.1f} s",
    "its memory": lambda row: f"{row['mk_peak'] / 1e9:.1f} GB",
    "faster": lambda row: f"{row['mk_wall'] / row['wall']:.1f}x",
    "goal": lambda row: _goal(row) if "mk_wall" in row else "",
}


def _goal(row: Mapping[str, Any]) -> str:
    method, faster, floors = row["method"], row["mk_wall"] / row["wall"], row["loop"] / row["floor"]
    if method in FLOORS:
        return f"{FLOORS[method]}x the floor{'' if floors <= FLOORS[method] else ', missed'}"
    return f"{GOALS[method]}x{'' if faster >= GOALS[method] else ', missed' if floors > 2 else ': within 2x the floor'}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table for people; what was not measured is left empty."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(cell(row, tell) for tell in COLUMNS.values())} |" for row in rows)])


def cell(row: Mapping[str, Any], tell: Callable[[Mapping[str, Any]], str]) -> str:
    """What one column says of a row."""
    try:
        return tell(row)
    except KeyError:
        return ""


def main() -> int:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks" / ".work", help="where checkpoints are kept")
    parser.add_argument("--sizes", nargs="*", default=list(models.BILLIONS), choices=models.BILLIONS)
    parser.add_argument("--only", nargs="*", help="methods to measure; the others keep their rows")
    parser.add_argument("--runs", type=int, default=3, help="runs of ours, of which the median counts")
    parser.add_argument("--no-mergekit", dest="mergekit", action="store_false", help="leave mergekit out")
    parser.add_argument("--memory-only", action="store_true", help="measure our memory alone: a busy machine will do")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]
    built = [name for name in SETTINGS if name in methods() and (not options.only or name in options.only)]
    for size in options.sizes:
        # In a process of its own: the system counts this one's largest size against every command it starts.
        made = f"import models, pathlib; models.family(pathlib.Path({str(options.work)!r}), {size!r}, 3)"
        subprocess.run([sys.executable, "-c", made], check=True, cwd=Path(__file__).parent)
        parents = [options.work / f"{size}-{number}" for number in range(4)]
        for method in built:
            measure(method, size, parents, options.work, options)
    text = table(rows_of(options.work))
    print(text)
    head = HEAD.format(machine=machine(), before=load, after=os.getloadavg()[0])
    _, mark, rest = PAGE.read_text("utf-8").partition("<!-- growth -->")  # growth.py's
    PAGE.write_text(f"{head}\n{text}\n\n{mark}{rest}", encoding="utf-8")
    return 0


def machine() -> str:
    """What this machine has, in words."""
    with open("/proc/meminfo", encoding="utf-8") as memory:
        total = int(memory.readline().split()[1]) / 1e6
    return f"{os.cpu_count()} cores ({platform.machine()}), {total:.0f} GB of memory"


HEAD = f"""# Speed and memory, side by side

Generated by `python benchmarks/speed.py` on a machine with {{machine}}, no GPU. Medians of our runs, and one run of
mergekit {mergekit_env.VERSION}, on the same recipe and the same bfloat16 checkpoints: a base and three fine-tunes, in
memory (a tmpfs, or the page cache). *floor*: reading all inputs once, hashing and writing a file as large as the
output, one after the other. *loop*: from the first byte read to the finished folder, with a thread for each core.
*whole process*: the command, with its imports. *memory*: the process's peak resident size. *goal*: how many times
faster than mergekit, or at most how many times the floor the loop takes. The system's load was {{before:.1f}} before
and {{after:.1f}} after, of which 1 to 2 are these processes' own: figures of a busy machine are too large, on both
sides. What bounds it: [performance.md](performance.md).
"""

if __name__ == "__main__":
    raise SystemExit(main())
