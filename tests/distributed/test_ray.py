"""Parts made, and numbers searched, by the workers of a real Ray on this machine, one of them killed at its work."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
from calls import WRITER, Command
from loopback import LoopbackHub
from places import ZOO
from postgres import running
from thorough import thorough_only
from waiting import HANGS_SECONDS, until

RECIPE = """\
merge_method: dare_linear
base_model: org/base
models:
  - model: org/one
    parameters: {weight: 0.6, density: 0.5}
publish: {license: apache-2.0}
"""
SEARCHED = """\
merge_method: linear
models:
  - {model: zoo/kjv, parameters: {weight: {search: [0, 1]}}}
  - {model: zoo/python, parameters: {weight: {search: [0, 1]}}}
search:
  trials: 48
  prune: false
  objectives: [{loss: hf://datasets/org/words@TEXTS/lines.txt}]
publish: {license: apache-2.0}
"""
WORKERS = "select count(distinct value_json) from trial_user_attributes where key = 'worker'"
"""How many workers have tried a candidate."""
DRIVER = """
import json
import sys

import ray

from merger.cli.commands import main

ray.init(
    num_cpus=4, include_dashboard=False, object_store_memory=80_000_000, log_to_driver=False,
    _node_ip_address="127.0.0.1", _temp_dir=sys.argv[1],
)
for line in sys.stdin:
    print("ended", main(json.loads(line)), flush=True)
ray.shutdown()
"""

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install -e '.[ray]'")


class Driver:
    """A process that is connected to its own Ray and runs the command in it."""

    def __init__(self, environment: Mapping[str, str], cwd: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))  # a socket's path must be short
        own = {"HOME": str(self.folder), "RAY_USAGE_STATS_ENABLED": "0"}
        with (self.folder / "said").open("w") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-c", DRIVER, str(self.folder)], cwd=cwd, env={**os.environ, **environment, **own},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True,
            )  # fmt: skip

    def start(self, *arguments: str) -> None:
        """Begin a command."""
        assert self.process.stdin is not None
        print(json.dumps(arguments), file=self.process.stdin, flush=True)

    def ended(self) -> tuple[int, str]:
        """Its exit code, once it has ended, and all that was said so far."""
        assert self.process.stdout is not None
        last = next(line for line in self.process.stdout if line.startswith("ended "))
        return int(last.split()[1]), (self.folder / "said").read_text()

    def close(self) -> None:
        """End Ray."""
        self.process.communicate(timeout=HANGS_SECONDS)
        shutil.rmtree(self.folder)


@pytest.fixture
def ray(hub: LoopbackHub, at: Path, tmp_path: Path) -> Iterator[Driver]:
    """Ray with four CPUs, on 127.0.0.1 alone; the token is in its environment, as docs/parts.md says."""
    driver = Driver(hub.env(tmp_path / "home", WRITER), at)
    yield driver
    driver.close()


@pytest.fixture
def at(hub: LoopbackHub, tmp_path: Path) -> Path:
    """A folder with a recipe whose models are on the Hub."""
    for seed, name in enumerate(("base", "one")):
        hub.add_model(f"org/{name}", tiny.model(tmp_path / name, seed, layers=6))
    (tmp_path / "mine.yaml").write_text(RECIPE)
    return tmp_path


def shards(files: Mapping[str, bytes]) -> dict[str, bytes]:
    return {name: raw for name, raw in files.items() if name.endswith(".safetensors")}


def children(process: int) -> Iterator[int]:
    """All processes below one."""
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        for child in task.read_text().split():
            yield int(child)
            yield from children(int(child))


def at_work(process: int) -> bool:
    """Whether it is a worker of Ray with a part in hand, by the title that Ray gives it."""
    return Path(f"/proc/{process}/cmdline").read_bytes().startswith(b"ray::_made_here")


def kill_one_at_work(above: int) -> bool:
    """Kill a worker in the middle of a part: it is halted first, so that it cannot end while we look."""
    for process in children(above):
        if at_work(process):
            os.kill(process, signal.SIGSTOP)
            there = at_work(process)
            os.kill(process, signal.SIGKILL if there else signal.SIGCONT)
            return there
    return False


@thorough_only
def test_a_merge_on_ray(ray: Driver, at: Path, command: Command, hub: LoopbackHub) -> None:
    """It survives a killed worker, refuses here what a part refuses there, and does not wait for a node there is not.

    One test, for Ray takes seconds to start, and tests of one file may run in several processes.
    """
    a_part_whose_worker_is_killed_is_made_anew(ray, at, command, hub)
    what_a_part_refuses_on_another_node_is_told_here(ray, hub)
    a_part_that_fits_no_node_is_refused(ray)


def a_part_whose_worker_is_killed_is_made_anew(ray: Driver, at: Path, command: Command, hub: LoopbackHub) -> None:
    """Four parts at once make the bytes of a single run, and the token is in none of Ray's files."""
    line = ("run", "mine.yaml", "--shard-size", "2kB", "--to")
    assert command(*line, "whole", cwd=at, hub=hub).returncode == 0
    hub.clear_log()
    hub.latency(0.05)
    ray.start(*line, "hf://org/ray", "--engine", "ray", "--parts", "4")
    said = (ray.folder / "said").read_text
    until(lambda: [request for request in hub.log if "/commit/merge-staging" in request.path], said)
    until(lambda: kill_one_at_work(ray.process.pid), said)
    hub.latency(0)
    code, said = ray.ended()
    assert code == 0, said
    assert [said.count(f"part {number}/4 is made: ") for number in (1, 2, 3, 4)] == [1, 1, 1, 1]
    made = shards({item.name: item.read_bytes() for item in (at / "whole").iterdir() if item.is_file()})
    assert len(made) > 8
    assert shards(hub.files("org/ray")) == made
    assert len(hub.commits("org/ray")) == 2
    logs = [item for item in ray.folder.rglob("*") if item.is_file()]
    assert len(logs) > 10
    assert not [item for item in logs if WRITER.encode() in item.read_bytes()]


def what_a_part_refuses_on_another_node_is_told_here(ray: Driver, hub: LoopbackHub) -> None:
    """As the command on that node would tell it, with the part's number and the same exit code."""
    hub.fail(lambda request: "/commit/merge-staging" in request.path, status=403, times=99)
    ray.start("run", "mine.yaml", "--shard-size", "9kB", "--to", "hf://org/refused", "--engine", "ray", "--parts", "2")
    code, said = ray.ended()
    assert code == 6, said
    for part in ("1/2", "2/2"):
        assert f"part {part}: we may not write to org/refused\n    the token needs the right" in said
    assert "Traceback" not in said


def a_part_that_fits_no_node_is_refused(ray: Driver) -> None:
    """Ray would wait for a larger node for ever."""
    ray.start("run", "mine.yaml", "--to", "hf://org/large", "--engine", "ray", "--parts", "2", "--threads", "64")
    code, said = ray.ended()
    assert code == 5
    assert "no node of the Ray cluster has room for a part (64 CPU, " in said


@thorough_only
def test_a_search_on_ray(ray: Driver, at: Path, hub: LoopbackHub) -> None:
    """A worker that is killed loses its trial only, which is tried anew; what stays on this machine is refused."""
    for name in ("kjv", "python"):
        hub.add_model(f"zoo/{name}", ZOO / name)
    texts = hub.add_model("datasets/org/words", {"lines.txt": (ZOO / "kjv" / "heldout.txt").read_bytes()[:16_000]})
    (at / "open.yaml").write_text(SEARCHED.replace("TEXTS", texts))
    with running() as postgres:
        address, said = postgres.database(), (ray.folder / "said").read_text
        ray.start("search", "open.yaml", "--engine", "ray", "--workers", "3", "--storage", address)
        until(lambda: "searching 2 numbers" in said(), said)
        until(lambda: postgres.asked(address, WORKERS) == 3, said)
        until(lambda: kill_one_at_work(ray.process.pid), said)
        code, told = ray.ended()
    assert code == 0, told
    with (at / "open.search" / "trials.csv").open() as file:
        trials = list(csv.DictReader(file))
    assert {trial["state"] for trial in trials} == {"complete"}
    assert 48 <= len(trials) <= 50, "of workers that see the last place at once each may take it"
    assert len({tuple(trial.values())[2:4] for trial in trials}) == len(trials)
    ray.start("search", "open.yaml", "--engine", "ray", "--workers", "2")
    assert ray.ended()[0] == 2
    assert "study.log is on this machine alone\n    give --storage postgresql://host/name" in said()
