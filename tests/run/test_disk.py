"""A merge much larger than what it may use stays within --max-disk and --max-memory: measured from outside, Hub to Hub.

Temporary files lie on a disk (tmpfs) that is no larger than --max-disk, so nothing that a run writes there goes unseen,
files without a name included.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
from loopback import LoopbackHub
from thorough import THOROUGH

from merger.planning.budget import KEPT_BYTES

MAX_MEMORY = 720_000_000


@dataclass(frozen=True)
class Size:
    """A model of so many layers, and the disk it shall be merged on."""

    name: str
    layers: int
    hidden: int
    middle: int
    shard: str
    max_disk: int
    kept: int
    """Bytes of memory for what is read twice."""


SIZES = [Size("30 MB, on disk", 22, 256, 704, "1.6MB", 7_300_000, 0)]
if THOROUGH:  # several times larger than --max-memory too: a minute or two
    SIZES.append(Size("3 GB, in memory", 130, 1024, 2816, "18MB", 37_000_000, KEPT_BYTES))

RECIPE = """\
merge_method: ties
base_model: org/{0}-base
models: [{{model: org/{0}-one}}, {{model: org/{0}-two}}]
parameters: {{density: 0.5}}
"""
RUN = """
import sys
import merger.planning.budget as planning
from merger.cli.commands import main
planning.KEPT_BYTES = int(sys.argv[1])
code = main(sys.argv[2:])
print(next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(code)
"""


@pytest.fixture
def small_disk(size: Size, tmp_path: Path) -> Iterator[Path]:
    """A disk of --max-disk bytes."""
    place = tmp_path / "small"
    place.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", f"size={size.max_disk}", "none", str(place)]
    try:
        done = subprocess.run(line, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"a small disk cannot be mounted here: {error}")
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


class Watch:
    """Looks every few milliseconds at how much of a disk is used."""

    def __init__(self, place: Path) -> None:
        self._place, self._over = place, threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.most = 0

    def _look(self) -> None:
        while not self._over.wait(0.003):
            found = os.statvfs(self._place)
            self.most = max(self.most, (found.f_blocks - found.f_bfree) * found.f_frsize)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
def test_a_merge_larger_than_its_disk_and_memory_stays_within_both(
    size: Size, served: LoopbackHub, small_disk: Path, tmp_path: Path
) -> None:
    """TIES reads each tensor twice: its inputs are kept, beside one file on its way and one being made."""
    parent = tiny.model(tmp_path / "parent", hidden=size.hidden, middle=size.middle, vocab=500, layers=size.layers)
    held = (parent / "model.safetensors").stat().st_size
    for name in ("base", "one", "two"):
        served.add_model(f"org/{size.layers}-{name}", parent)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(size.layers))
    limits = ["--max-disk", str(size.max_disk), "--max-memory", str(MAX_MEMORY), "--shard-size", size.shard]
    limits += ["--quiet", "--json", "--threads", "1"]
    to = f"hf://org/{size.layers}-merged"
    line = [sys.executable, "-c", RUN, str(size.kept), "run", "recipe.yaml", "--to", to, *limits]
    env = {**os.environ, **served.env(tmp_path / "home", "hf_writer_of_org"), "TMPDIR": str(small_disk)}
    with Watch(small_disk) as watch:
        done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    outcome, peak = done.stdout.splitlines()
    smallest = min(held, sum(shard["size"] for shard in json.loads(outcome)["shards"]))
    assert smallest > 4 * size.max_disk
    assert size == SIZES[0] or smallest > 4 * MAX_MEMORY
    assert int(peak) <= MAX_MEMORY
    assert size.max_disk // 2 < watch.most <= size.max_disk
    assert os.listdir(small_disk) == []
