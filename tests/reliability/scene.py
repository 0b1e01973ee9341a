"""The stage: a loopback Hub with parents, a nursery of runs, and what is there after a run, for a case to be judged by.

Not here: which cases there are (rows).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import tiny
from loopback import LoopbackHub, Request
from places import ROOT
from waiting import HANGS_SECONDS

TOKEN = "hf_writer_of_org"
REPO = "org/merged"
PARENTS = ("base", "one", "two")
SHARDS = ("--shard-size", "2100", "--threads", "1")
SMALL_DISK = 1 << 20

HUB, FOLDER, REPLACE, ACROSS = "hub", "folder", "replace", "across"
"""Where a run goes: Hub to Hub; folders to a folder; the same over another model; from the Hub to a folder."""


@dataclass(frozen=True)
class Ran:
    """A run that has ended: its exit code (or minus the signal), what it printed, and the requests it made."""

    code: int
    out: str
    err: str
    log: list[Request] = field(repr=False)

    @property
    def made(self) -> list[str]:
        """The shards it made."""
        return re.findall(r"^made (\S+)", self.err, re.MULTILINE)

    @property
    def changes(self) -> list[str]:
        """The changes of the file system that it told of."""
        return re.findall(r"^change: (.+)", self.err, re.MULTILINE)


@dataclass(frozen=True)
class State:
    """A destination: the files that a reader sees, and what a run has left for the next one.

    Args:
        files: by name, with their checksums.
        commits: how often something was published.
        waiting: the finished shards of an unfinished run, with their checksums.
        leftovers: staging branches, and whatever lies beside the destination or among temporary files.
    """

    files: dict[str, str]
    commits: int
    waiting: dict[str, str]
    leftovers: list[str]


class Nursery:
    """The process that forks the runs."""

    def __init__(self, hub: LoopbackHub, home: Path, first: Sequence[str]) -> None:
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        quiet = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        env = {**os.environ, **hub.env(home, TOKEN), **quiet, "PYTHONPATH": paths}
        line = [sys.executable, "-m", "reliability.nursery"]
        self._process = subprocess.Popen(line, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._child: Future[int] = Future()
        self._tell(first)

    def run(self, order: dict[str, Any]) -> int:
        """Run the command, and wait for its end."""
        assert self._process.stdout is not None
        self._child = Future()
        self._tell(order)
        self._child.set_result(int(self._process.stdout.readline()))
        return int(self._process.stdout.readline())

    def _tell(self, words: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()

    def kill(self) -> None:
        """End the run that is under way, at once."""
        os.kill(self._child.result(HANGS_SECONDS), signal.SIGKILL)

    def close(self) -> None:
        """No more runs."""
        self._process.communicate()


class Scene:
    """The destinations of one merge, and the runs to them."""

    def __init__(self, root: Path) -> None:
        self.hub = LoopbackHub(root / "hub")
        self.hub.add_user("alice", token=TOKEN, orgs=("org",))
        self.folder, self.temporary = root / "work", root / "temporary"
        for place in (self.folder, self.temporary):
            place.mkdir()
        for seed, name in enumerate(PARENTS):
            self.hub.add_model(f"org/{name}", tiny.model(root / "parents" / name, seed, layers=1))
        (root / "afar.yaml").write_text(tiny.TIES_RECIPE.format(**{name: f"org/{name}" for name in PARENTS}))
        (root / "near.yaml").write_text(tiny.TIES_RECIPE.format(**{name: root / "parents" / name for name in PARENTS}))
        self._root = root
        first = ["run", str(root / "near.yaml"), "--to", str(root / "first"), "--quiet"]
        self.nursery = Nursery(self.hub, root / "home", first)
        self.undisturbed = cache(self._undisturbed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.unmount()
        self.nursery.close()
        self.hub.close()

    def reset(self, to: str) -> None:
        """As if nothing had ever been run; to replace there must be a model."""
        self.hub.clear_faults()
        with self.hub.world.lock:
            self.hub.world.repos.pop(REPO, None)
        for place in (self.folder, self.temporary):
            for item in place.iterdir():
                shutil.rmtree(item) if item.is_dir() else item.unlink()
        if to == REPLACE:
            (self.folder / "out").mkdir()
            for name in ("config.json", "model.safetensors"):
                (self.folder / "out" / name).write_text("{}")

    def _undisturbed(self, to: str) -> tuple[Ran, State]:
        self.reset(to)
        ran = self.run(to, dies_at=-1)
        assert ran.code == 0, ran.err
        return ran, self.state(to)

    def run(self, to: str, timeout: float | None = None, dies_at: int | None = None) -> Ran:
        """Run the command, and wait for its end."""
        recipe = "afar" if to in (HUB, ACROSS) else "near"
        where = [f"hf://{REPO}" if to == HUB else "out", *(["--force"] if to == REPLACE else [])]
        line = ["run", str(self._root / f"{recipe}.yaml"), "--to", *where, *SHARDS, "--no-look"]
        out, err = self._root / "out.txt", self._root / "err.txt"
        places = {"folder": str(self.folder), "temporary": str(self.temporary), "out": str(out), "err": str(err)}
        self.hub.clear_log()
        code = self.nursery.run({"line": line, **places, "timeout": timeout, "dies_at": dies_at})
        return Ran(code, out.read_text(), err.read_text(), self.hub.log)

    # What is there

    def state(self, to: str) -> State:
        """What is at the destination now."""
        return self._repo_state() if to == HUB else self._folder_state()

    def _repo_state(self) -> State:
        temporary = sorted(os.listdir(self.temporary))
        if not self.hub.exists(REPO):
            return State({}, 0, {}, temporary)
        files = {name: entry.sha256 for name, entry in self.hub.tree(REPO).items() if name != ".gitattributes"}
        staging = [name for name in self.hub.branches(REPO) if name != "main"]
        trees = [self.hub.tree(REPO, branch).items() for branch in staging]
        waiting = {name: entry.sha256 for tree in trees for name, entry in tree if name.endswith(".safetensors")}
        return State(files, len(self.hub.commits(REPO)) - 1, waiting, [*staging, *temporary])

    def _folder_state(self) -> State:
        out, work = self.folder / "out", self.folder / "out.merging"
        done = sorted(item.name for item in (work / "done").glob("*.safetensors"))
        waiting = {name: digest(work / "new" / name) for name in done if (work / "new" / name).is_file()}
        files = {item.name: digest(item) for item in out.rglob("*") if item.is_file()} if out.is_dir() else {}
        others = sorted(item.name for item in self.folder.iterdir() if item != out)
        return State(files, int(out.is_dir()), waiting, others + sorted(os.listdir(self.temporary)))

    # A small disk

    def mount(self, place: Path) -> bool:
        """Put a disk of a megabyte in a place; False where this process may not."""
        line = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "none", str(place)]
        with suppress(OSError):
            return subprocess.run(line, check=False, capture_output=True).returncode == 0
        return False

    def unmount(self) -> None:
        """Take all such disks away."""
        for place in (self.folder, self.temporary):
            if os.path.ismount(place):
                subprocess.run(["umount", str(place)], check=True)


def fill(place: Path, left: int = 0) -> None:
    """Use up what is free on a disk, but for some bytes."""
    filler = place / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    os.truncate(filler, filler.stat().st_size - left)


def digest(path: Path) -> str:
    """A file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
