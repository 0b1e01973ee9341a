"""Runs that were killed go on from their finished shards, parts make one model, and leftovers are listed and removed.

The real command in processes of its own, against folders and against the loopback Hub.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import forks
import pytest
import tiny
from calls import WRITER, Command
from loopback import LoopbackHub, Request
from thorough import thorough_only

SHARD = ("--shard-size", "2kB")
Start = Callable[..., forks.Forked]
KILLED_AFTER = """
import os, signal, sys
from merger.cli.commands import main
from merger.engine import execute

count, real = int(sys.argv.pop(1)), execute._shard
def dying(*arguments):
    global count
    for event in real(*arguments):
        if isinstance(event, execute.ShardDone):
            count -= 1
        elif count == 0:
            sys.stderr.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        yield event
execute._shard = dying
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and two others."""
    root = tmp_path_factory.mktemp("parents")
    return tiny.models(root, "base", "one", "two")


@pytest.fixture
def local(parents: dict[str, Path], tmp_path: Path) -> Path:
    """A recipe of folders."""
    (tmp_path / "mine.yaml").write_text(tiny.TIES_RECIPE.format(**parents))
    return tmp_path


@pytest.fixture
def afar(parents: dict[str, Path], served: LoopbackHub, tmp_path: Path) -> Path:
    """A recipe of models on the Hub."""
    for name, folder in parents.items():
        if not served.exists(f"org/{name}"):
            served.add_model(f"org/{name}", folder)
    (tmp_path / "mine.yaml").write_text(tiny.TIES_RECIPE.format(**{name: f"org/{name}" for name in parents}))
    return tmp_path


@pytest.fixture
def start(served: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start the command in a process that kills itself in the middle of the shard after `after` finished ones."""
    home = tmp_path_factory.mktemp("home")
    environment = {**os.environ, **served.env(home, WRITER), "TMPDIR": str(home)}
    started: list[forks.Forked] = []

    def run(*arguments: str, cwd: Path, after: int = 10**6) -> forks.Forked:
        line = [sys.executable, "-c", KILLED_AFTER, str(after), *arguments]
        started.append(forks.start(line, cwd=cwd, env=environment))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def digests(folder: Path) -> dict[str, str]:
    return {item.name: hashlib.sha256(item.read_bytes()).hexdigest() for item in folder.glob("*.safetensors")}


def tables(folder: Path) -> list[str]:
    """The card's tables, in which stands what was seen of the parents, and the plot that shows it."""
    lines = [line for line in (folder / "README.md").read_text().splitlines() if line.startswith("| layer")]
    return [*lines, hashlib.sha256((folder / "pictures" / "movement.png").read_bytes()).hexdigest()]


def published(hub: LoopbackHub, repo: str) -> dict[str, str]:
    files = hub.files(repo)
    return {name: hashlib.sha256(raw).hexdigest() for name, raw in files.items() if name.endswith(".safetensors")}


def made(done: subprocess.CompletedProcess[str]) -> int:
    """How many shards the run made."""
    return done.stderr.count("made model-")


def staged(request: Request) -> bool:
    return request.method == "POST" and "/commit/merge-staging" in request.path


@pytest.fixture(scope="module")
def whole(
    parents: dict[str, Path], served: LoopbackHub, command: Command, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int]:
    """What an undisturbed run makes, and of how many shards."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "mine.yaml").write_text(tiny.TIES_RECIPE.format(**parents))
    return folder / "out", made(command("run", "mine.yaml", "--to", "out", *SHARD, cwd=folder, hub=served))


# Folders


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_killed_run_goes_on_from_its_finished_shards(
    after: int, local: Path, whole: tuple[Path, int], start: Start, command: Command, served: LoopbackHub
) -> None:
    """The same command makes only what is missing, and the bytes are those of an undisturbed run."""
    killed = start("run", "mine.yaml", "--to", "out", *SHARD, cwd=local, after=after)
    assert killed.wait() == -signal.SIGKILL
    assert not (local / "out").exists()
    again = command("run", "mine.yaml", "--to", "out", *SHARD, cwd=local, hub=served)
    assert again.returncode == 0, again.stderr
    assert made(again) == whole[1] - after
    assert (f"{after} of {whole[1]} files are there" in again.stderr) == (after > 0)
    assert digests(local / "out") == digests(whole[0])
    assert not (local / "out.merging").exists()


def test_a_parent_that_changed_starts_the_run_anew(
    parents: dict[str, Path], tmp_path: Path, start: Start, command: Command,
    served: LoopbackHub,
) -> None:  # fmt: skip
    """A folder of the same names and sizes but another time of change is another model: no shard of the old is kept."""
    moving = {name: tmp_path / name for name in parents}
    for seed, folder in enumerate(moving.values()):
        tiny.model(folder, seed)
    (tmp_path / "mine.yaml").write_text(tiny.TIES_RECIPE.format(**moving))
    assert start("run", "mine.yaml", "--to", "out", *SHARD, cwd=tmp_path, after=3).wait() == -signal.SIGKILL
    tiny.model(moving["two"], seed=7)
    asked = command("run", "mine.yaml", "--to", "out", *SHARD, cwd=tmp_path, hub=served)
    assert asked.returncode == 6
    assert "finished files of another merge wait in 'out.merging': model-00001-of-" in asked.stderr
    again = command("run", "mine.yaml", "--to", "out", "--force", *SHARD, cwd=tmp_path, hub=served)
    assert "are there" not in again.stderr
    whole = command("run", "mine.yaml", "--to", "whole", *SHARD, cwd=tmp_path, hub=served)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert made(again) == made(whole)


def test_a_finished_run_is_not_made_again(local: Path, command: Command, served: LoopbackHub) -> None:
    """The second run says where the model is and makes nothing; --force makes it anew."""
    command("run", "mine.yaml", "--to", "out", *SHARD, cwd=local, hub=served)
    again = command("run", "mine.yaml", "--to", "out", *SHARD, "--json", cwd=local, hub=served)
    answer = json.loads(again.stdout)
    assert (answer["new"], answer["where"], made(again)) == (False, str(local / "out"), 0)
    assert made(command("run", "mine.yaml", "--to", "out", *SHARD, "--force", cwd=local, hub=served)) > 5


def test_parts_in_a_folder_make_the_model_of_a_single_run(
    local: Path, whole: tuple[Path, int], command: Command, served: LoopbackHub
) -> None:
    """Three parts, one after the other, then publish: the same files and card; before the last part it is refused."""
    for part in ("3/3", "1/3"):
        assert not command("run", "mine.yaml", "--to", "out", "--part", part, *SHARD, cwd=local, hub=served).returncode
    early = command("publish", "mine.yaml", "--to", "out", *SHARD, cwd=local, hub=served)
    assert early.returncode == 6
    assert "shards are not there yet" in early.stderr
    last = command("run", "mine.yaml", "--to", "out", "--part", "2/3", *SHARD, cwd=local, hub=served)
    assert "part 2/3 is there" in last.stdout
    done = command("publish", "mine.yaml", "--to", "out", *SHARD, cwd=local, hub=served)
    assert (done.returncode, made(done)) == (0, 0)
    assert digests(local / "out") == digests(whole[0])
    assert tables(local / "out") == tables(whole[0]) != []


@pytest.mark.parametrize("part", ["0/3", "4/3", "1", "a/b", "1/0"])
def test_a_part_that_is_none_is_refused(part: str, local: Path, command: Command, served: LoopbackHub) -> None:
    """With an example of how it is written."""
    done = command("run", "mine.yaml", "--to", "out", "--part", part, cwd=local, hub=served)
    assert done.returncode == 2
    assert "is no part; write for example 3/8" in done.stderr


# The Hub


def test_a_killed_run_to_the_hub_goes_on_from_the_staging_branch(
    afar: Path, whole: tuple[Path, int], start: Start, command: Command, hub: LoopbackHub
) -> None:
    """Another process, with another temporary folder, uploads only what is missing; main gets one commit in the end."""
    to = ("--to", "hf://org/killed")
    killed = start("run", "mine.yaml", *to, *SHARD, cwd=afar, after=4)
    assert killed.wait() == -signal.SIGKILL
    assert not published(hub, "org/killed")
    before = len([request for request in hub.log if staged(request) and request.status == 200])
    assert before in (3, 4)  # the fourth may have been under way, or cut off
    listed = command("status", to[1], cwd=afar, hub=hub)
    assert f"{before} finished files" in listed.stdout
    hub.clear_log()
    again = command("run", "mine.yaml", *to, *SHARD, cwd=afar, hub=hub)
    assert again.returncode == 0, again.stderr
    assert made(again) == whole[1] - before == len([request for request in hub.log if staged(request)])
    assert published(hub, "org/killed") == digests(whole[0])
    assert "no unfinished run" in command("status", to[1], cwd=afar, hub=hub).stdout


def test_a_published_merge_is_not_published_again(afar: Path, command: Command, hub: LoopbackHub) -> None:
    """The second run makes no commit and names the first one's."""
    to = ("--to", "hf://org/once", *SHARD)
    first = json.loads(command("run", "mine.yaml", *to, "--json", cwd=afar, hub=hub).stdout)
    hub.clear_log()
    again = json.loads(command("run", "mine.yaml", *to, "--json", cwd=afar, hub=hub).stdout)
    assert (again["new"], again["commit"]) == (False, first["commit"])
    assert not [request for request in hub.log if request.method == "POST" and "/commit/" in request.path]


@thorough_only
def test_four_parts_at_once_make_the_model_of_a_single_run(
    afar: Path, whole: tuple[Path, int], start: Start, command: Command, hub: LoopbackHub
) -> None:
    """One of them is killed and started again; then publish makes the one commit."""
    to = ("--to", "hf://org/parts", *SHARD)
    parts = [
        start("run", "mine.yaml", *to, "--part", f"{number}/4", cwd=afar, after=1 if number == 2 else 99)
        for number in (1, 2, 3, 4)
    ]
    ended = [part.communicate() for part in parts]
    assert [part.returncode for part in parts] == [0, -signal.SIGKILL, 0, 0], ended
    early = command("publish", "mine.yaml", *to, cwd=afar, hub=hub)
    assert early.returncode == 6
    restarted = command("run", "mine.yaml", *to, "--part", "2/4", cwd=afar, hub=hub)
    assert restarted.returncode == 0, restarted.stderr
    done = command("publish", "mine.yaml", *to, cwd=afar, hub=hub)
    assert done.returncode == 0, done.stderr
    assert published(hub, "org/parts") == digests(whole[0])
    assert len([request for request in hub.log if request.path.endswith("/commit/main")]) == 1


def test_clean_removes_staging_branches_and_nothing_else(
    afar: Path, start: Start, command: Command, hub: LoopbackHub
) -> None:
    """Without --yes it only lists; the repo, main and other branches stay."""
    to = "hf://org/stale"
    start("run", "mine.yaml", "--to", to, *SHARD, cwd=afar, after=2).wait()
    assert "merge-staging/" in command("clean", to, cwd=afar, hub=hub).stdout
    assert "merge-staging/" in command("status", to, cwd=afar, hub=hub).stdout
    removed = command("clean", to, "--yes", cwd=afar, hub=hub)
    assert "removed merge-staging/" in removed.stdout
    assert "no unfinished run" in command("status", to, cwd=afar, hub=hub).stdout
    assert hub.exists("org/stale")


@pytest.mark.parametrize("name", ["status", "clean"])
def test_nothing_is_said_of_a_place_that_does_not_exist(
    name: str, tmp_path: Path, command: Command, hub: LoopbackHub
) -> None:
    """Exit code 3: what is said of a name with a slip in it would be taken for what is so of the one that was meant."""
    (tmp_path / "empty").mkdir()
    assert command(name, "empty", cwd=tmp_path, hub=hub).returncode == 0
    nowhere = command(name, "./nothing", cwd=tmp_path, hub=hub)
    assert (nowhere.returncode, nowhere.stdout) == (3, "")
    assert nowhere.stderr.startswith("there is no folder './nothing', nor a run that was to make it\n")
    missing = command(name, "hf://org/nothing", cwd=tmp_path, hub=hub)
    assert (missing.returncode, missing.stdout) == (3, "")
    assert missing.stderr.startswith("there is no repo org/nothing that we may read\n")
