"""Parts made by the workers of a real Ray on this machine, one of them killed in the middle of its work."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
from loopback import LoopbackHub

WRITER = "hf_writer_of_org"
Command = Callable[..., subprocess.CompletedProcess[str]]
RECIPE = """\
merge_method: dare_linear
base_model: org/base
models:
  - model: org/one
    parameters: {weight: 0.6, density: 0.5}
publish: {license: apache-2.0}
"""
DRIVER = """
import json
import sys

import ray

from merger.cli import main

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
        self.process.communicate(timeout=30)
        shutil.rmtree(self.folder)


@pytest.fixture(scope="module")
def ray(served: LoopbackHub, at: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """Ray with four CPUs, on 127.0.0.1 alone; the token is in its environment, as docs/parts.md says."""
    driver = Driver(served.env(tmp_path_factory.mktemp("home"), WRITER), at)
    yield driver
    driver.close()


@pytest.fixture(scope="module")
def at(served: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe whose models are on the Hub."""
    root = tmp_path_factory.mktemp("ray")
    for seed, name in enumerate(("base", "one")):
        served.add_model(f"org/{name}", tiny.model(root / name, seed, layers=6))
    (root / "mine.yaml").write_text(RECIPE)
    return root


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


def test_a_part_whose_worker_is_killed_is_made_anew_by_ray(
    ray: Driver, at: Path, command: Command, hub: LoopbackHub
) -> None:
    """Four parts at once make the bytes of a single run, and the token is in none of Ray's files."""
    line = ("run", "mine.yaml", "--shard-size", "2kB", "--to")
    assert command(*line, "whole", cwd=at, hub=hub).returncode == 0
    hub.clear_log()
    hub.latency(0.05)
    ray.start(*line, "hf://org/ray", "--engine", "ray", "--parts", "4")
    end = time.monotonic() + 60
    while not [request for request in hub.log if "/commit/merge-staging" in request.path]:
        assert time.monotonic() < end, (ray.folder / "said").read_text()
        time.sleep(0.05)
    while not kill_one_at_work(ray.process.pid):
        assert time.monotonic() < end
    hub.latency(0)
    code, said = ray.ended()
    assert code == 0, said
    assert [said.count(f"part {number}/4 is made: ") for number in (1, 2, 3, 4)] == [1, 1, 1, 1]
    made = shards({item.name: item.read_bytes() for item in (at / "whole").iterdir()})
    assert len(made) > 8
    assert shards(hub.files("org/ray")) == made
    assert len(hub.commits("org/ray")) == 2
    logs = [item for item in ray.folder.rglob("*") if item.is_file()]
    assert len(logs) > 10
    assert not [item for item in logs if WRITER.encode() in item.read_bytes()]


def test_what_a_part_refuses_on_another_node_is_told_here(ray: Driver, hub: LoopbackHub) -> None:
    """As the command on that node would tell it, with the part's number and the same exit code."""
    hub.fail(lambda request: "/commit/merge-staging" in request.path, status=403, times=99)
    ray.start("run", "mine.yaml", "--shard-size", "9kB", "--to", "hf://org/refused", "--engine", "ray", "--parts", "2")
    code, said = ray.ended()
    assert code == 6, said
    for part in ("1/2", "2/2"):
        assert f"part {part}: we may not write to org/refused\n    the token needs the right" in said
    assert "Traceback" not in said
