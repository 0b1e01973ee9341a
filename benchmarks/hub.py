"""The same merge from Hub to Hub and from folder to folder: what the network's part of a run costs.

`python benchmarks/hub.py` makes checkpoints of half a billion parameters or more, serves them from the loopback Hub of
the tests in a process of its own, and merges three of them with the real command: between folders, and over links of
several rates, which all connections share, each way apart. The *link's time* of a run is what its bytes take if nothing
else did: those downloaded or those uploaded, whichever is more; both go on at once. Where the rest went is told by the
log of the link's wider way: the seconds before it carried its first byte, those in between in which it stood still, and
those after its last byte. Not here: the real Hub.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from operator import itemgetter
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from loopback import LoopbackHub  # noqa: E402  a room of the tests

TOKEN = "hf_benchmark"


@dataclass(frozen=True)
class Traffic:
    """What travelled during one run: how many requests, and the moment and the size of what passed each way."""

    requests: int
    down: Sequence[tuple[float, int]]
    up: Sequence[tuple[float, int]]

    @property
    def wider(self) -> Sequence[tuple[float, int]]:
        """The way that more bytes went."""
        return max(self.down, self.up, key=nbytes)


def nbytes(way: Sequence[tuple[float, int]]) -> int:
    """How many bytes went that way."""
    return sum(size for _, size in way)


def serve(link: Connection, root: Path, parents: Sequence[Path]) -> None:
    """A Hub with the parents; each message sets latency and rate, each answer is the traffic since the last one."""
    with LoopbackHub(root / "served") as hub:
        hub.add_user("someone", token=TOKEN)
        for parent in parents:
            hub.add_model(f"someone/{parent.name}", parent)
        link.send(hub.env(root / "home", TOKEN))
        while (order := link.recv()) is not None:
            link.send(Traffic(len(hub.log), hub.context.down.log, hub.context.up.log))
            hub.latency(order[0])
            hub.rate(order[1])
            hub.clear_log()


def recipe(path: Path, method: str, models: Sequence[str]) -> Path:
    """The first model is the base, where the method has one."""
    based = method not in ("linear", "karcher")
    listed = ", ".join(f"{{model: {model}, parameters: {{weight: 0.3}}}}" for model in models[1:])
    base = f"base_model: {models[0]}\n" if based else ""
    path.write_text(f"merge_method: {method}\n{base}models: [{listed}]\ndtype: bfloat16\n")
    return path


def merge(recipe: Path, to: str, shard: str, env: Mapping[str, str]) -> tuple[float, float]:
    """When the whole command began and ended."""
    command = [sys.executable, "-m", "merger", "run", str(recipe), "--to", to, "--shard-size", shard, "--quiet"]
    start = time.monotonic()
    subprocess.run(command, check=True, env={**os.environ, **env}, stdout=subprocess.DEVNULL)
    return start, time.monotonic()


def measure(
    method: str, parents: Sequence[Path], link: Connection, env: Mapping[str, str], given: argparse.Namespace
) -> None:
    """One method: a row for the folders, then one for each link."""
    work: Path = given.work
    local = recipe(work / f"{method}-folders.yaml", method, [str(parent) for parent in parents])
    remote = recipe(work / f"{method}-hub.yaml", method, [f"someone/{parent.name}" for parent in parents])
    folders = []
    for _ in range(given.runs):
        shutil.rmtree(work / "merged", ignore_errors=True)
        start, end = merge(local, str(work / "merged"), given.shard, {})
        folders.append(end - start)
    print(f"| {method} | folders | {median(folders):.1f} s | | | | | | | |", flush=True)
    for rate in given.rates:
        runs = []
        for run in range(given.runs):
            link.send((given.latency / 1e3, rate * 1e6))
            link.recv()
            start, end = merge(remote, f"hf://someone/{method}-{rate}-{run}", given.shard, {**env, "TMPDIR": str(work)})
            link.send((0.0, None))
            runs.append((end - start, start, link.recv()))
        print(row(method, rate, *sorted(runs, key=itemgetter(0))[len(runs) // 2]), flush=True)


def row(method: str, rate: int, seconds: float, start: float, seen: Traffic) -> str:
    """A line of the table."""
    least = nbytes(seen.wider) / rate / 1e6
    first, last = seen.wider[0][0], seen.wider[-1][0]
    idle = f"{first - start:.1f} s | {last - first - least:.1f} s | {start + seconds - last:.1f} s"
    travelled = f"{nbytes(seen.down) / 1e9:.2f} GB, {nbytes(seen.up) / 1e9:.2f} GB | {seen.requests}"
    return (
        f"| {method} | {rate} MB/s | {seconds:.1f} s | {least:.1f} s | {seconds / least:.2f} | {idle} | {travelled} |"
    )


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks" / ".work", help="where checkpoints are kept")
    parser.add_argument("--methods", nargs="*", default=["linear", "ties"])
    parser.add_argument("--size", default="0.5B", choices=("0.5B", "1.2B"), help="how large the models are")
    parser.add_argument("--shard", default="250MB", help="the size of a file of the result")
    parser.add_argument("--latency", type=float, default=50, help="of each request, in milliseconds")
    parser.add_argument("--rates", type=int, nargs="*", default=[50, 100, 400], help="of the links, in MB a second")
    parser.add_argument("--runs", type=int, default=1, help="of which the median counts")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    # In a process of its own: what it held would stay with this one.
    made = f"import models, pathlib; models.family(pathlib.Path({str(given.work)!r}), '{given.size}', 3)"
    subprocess.run([sys.executable, "-c", made], check=True, cwd=Path(__file__).parent)
    parents = [given.work / f"{given.size}-{number}" for number in range(4)]
    context = multiprocessing.get_context("spawn")
    link, other = context.Pipe()
    server = context.Process(target=serve, args=(other, given.work, parents))
    server.start()
    env = link.recv()
    print("| method | link | seconds | the link's time | ratio | before | idle | after | down, up | requests |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    try:
        for method in given.methods:
            measure(method, parents, link, env, given)
    finally:
        link.send(None)
        server.join()
        shutil.rmtree(given.work / "served")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
