"""The same merge from Hub to Hub and from folder to folder: what the network's part of a run costs.

`python benchmarks/hub.py` makes checkpoints of half a billion parameters or more, serves them from the loopback Hub of
the tests in a process of its own, and merges three of them with the real command: between folders, over the bare
loopback, and over a link with a latency for each request and a rate for each connection. The *link's time* of a run is
what its bytes take if nothing else did: those downloaded on all connections that a reader uses, or those uploaded on
one, whichever is longer; both go on at once. (Two files may go up at once: then it is half.) Not here: the real Hub.
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
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from loopback import LoopbackHub  # noqa: E402  a room of the tests

from merger.stores.hub.ranges import CONNECTIONS  # noqa: E402

TOKEN = "hf_benchmark"


@dataclass(frozen=True)
class Traffic:
    """What travelled during one run."""

    requests: int
    down: int
    up: int

    def link_seconds(self, rate: float) -> float:
        """The least time for these bytes at a rate for each connection."""
        return max(self.down / (CONNECTIONS * rate), self.up / rate)


def serve(link: Connection, root: Path, parents: Sequence[Path]) -> None:
    """A Hub with the parents; each message sets latency and rate, each answer is the traffic since the last one."""
    with LoopbackHub(root / "served") as hub:
        hub.add_user("someone", token=TOKEN)
        for parent in parents:
            hub.add_model(f"someone/{parent.name}", parent)
        link.send(hub.env(root / "home", TOKEN))
        while (order := link.recv()) is not None:
            large = [request for request in hub.log if request.host == "cdn"]
            down = sum(request.sent for request in large if request.method == "GET")
            up = sum(request.received for request in large if request.method == "PUT")
            link.send(Traffic(len(hub.log), down, up))
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


def merge(recipe: Path, to: str, shard: str, env: Mapping[str, str]) -> float:
    """Seconds of the whole command."""
    command = [
        sys.executable,
        "-m",
        "merger",
        "run",
        str(recipe),
        "--to",
        to,
        "--shard-size",
        shard,
        "--json",
        "--quiet",
    ]
    start = time.perf_counter()
    subprocess.run(command, check=True, env={**os.environ, **env}, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def measure(
    method: str, parents: Sequence[Path], link: Connection, env: Mapping[str, str], given: argparse.Namespace
) -> None:
    """One method: a row for the folders, then one for each link."""
    work: Path = given.work
    local = recipe(work / f"{method}-folders.yaml", method, [str(parent) for parent in parents])
    afar = recipe(work / f"{method}-hub.yaml", method, [f"someone/{parent.name}" for parent in parents])
    folders = []
    for _ in range(given.runs):
        shutil.rmtree(work / "merged", ignore_errors=True)
        folders.append(merge(local, str(work / "merged"), given.shard, {}))
    print(f"| {method} | folders | {median(folders):.1f} s | | | | | |", flush=True)
    link_name = f"{given.latency:g} ms, {given.rate:g} MB/s a connection"
    links = {"loopback": (0.0, None), link_name: (given.latency / 1e3, given.rate * 1e6)}
    for number, (name, (latency, rate)) in enumerate(links.items()):
        seconds = []
        for run in range(given.runs):
            link.send((latency, rate))
            link.recv()
            to = f"hf://someone/{method}-{number}-{run}"
            seconds.append(merge(afar, to, given.shard, {**env, "TMPDIR": str(work)}))
        link.send((0.0, None))
        print(row(method, name, rate, median(seconds), median(folders), link.recv()), flush=True)


def row(method: str, name: str, rate: float | None, seconds: float, folders: float, seen: Traffic) -> str:
    """A line of the table."""
    least = "|" if rate is None else f"{seen.link_seconds(rate):.1f} s | {seconds / seen.link_seconds(rate):.2f}x"
    travelled = f"{seen.down / 1e9:.2f} GB, {seen.up / 1e9:.2f} GB | {seen.requests}"
    return f"| {method} | {name} | {seconds:.1f} s | {seconds / folders:.2f}x | {least} | {travelled} |"


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks" / ".work", help="where checkpoints are kept")
    parser.add_argument("--methods", nargs="*", default=["linear", "ties"])
    parser.add_argument("--size", default="0.5B", choices=("0.5B", "1.2B"), help="how large the models are")
    parser.add_argument("--shard", default="250MB", help="the size of a file of the result")
    parser.add_argument("--latency", type=float, default=50, help="of the slower link, in milliseconds")
    parser.add_argument("--rate", type=float, default=100, help="of each of its connections, in MB a second")
    parser.add_argument("--runs", type=int, default=3, help="of which the median counts")
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
    print("| method | from and to | seconds | of folders | the link's time | of it | down, up | requests |")
    print("|---|---|---|---|---|---|---|---|")
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
