"""Temporary folders: gone after the run, kept while it lives, removed by another run once it was killed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from merger import system
from merger.stores.scratch import Scratch, sweep

AT_WORK = """
import sys
from merger.stores.scratch import Scratch
folder = Scratch().folder()
(folder / "model.safetensors").write_bytes(b"half a shard")
print(folder, flush=True)
sys.stdin.read()
"""
Start = Callable[[], tuple[subprocess.Popen[str], Path]]


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of temporary files of our own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def start(temporary: Path) -> Iterator[Start]:
    """Another run that is at work in its folder."""
    started: list[subprocess.Popen[str]] = []

    def run() -> tuple[subprocess.Popen[str], Path]:
        env = {**os.environ, "TMPDIR": str(temporary)}
        line = [sys.executable, "-c", AT_WORK]
        process = subprocess.Popen(line, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        return process, Path(process.stdout.readline().strip())

    yield run
    for process in started:
        process.kill()
        process.communicate()


def test_a_folder_is_there_when_it_is_asked_for_and_gone_in_the_end(temporary: Path) -> None:
    """Not before, and with all that is in it."""
    own = Scratch()
    assert os.listdir(temporary) == []
    (own.folder() / "shard").write_bytes(b"bytes")
    assert os.listdir(temporary) == [own.folder().name]
    own.close()
    assert os.listdir(temporary) == []


def test_what_a_killed_run_left_is_removed(start: Start) -> None:
    """By the next one; a run that lives keeps its folder, and so do we."""
    own = Scratch()
    living, dead = start(), start()
    dead[0].kill()
    dead[0].wait()
    mine = own.folder()
    sweep()
    assert not dead[1].exists()
    assert (living[1] / "model.safetensors").read_bytes() == b"half a shard"
    assert mine.is_dir()
    own.close()


def test_what_is_not_ours_stays(temporary: Path, start: Start) -> None:
    """Somebody's own folder of nearly such a name, a file of such a name, and what a link of such a name points at."""
    killed, folder = start()
    killed.kill()
    killed.wait()
    elsewhere = folder.rename(temporary / "elsewhere")
    (temporary / "merger-link.scratch").symlink_to(elsewhere)
    (temporary / "merger-notes").mkdir()
    (temporary / "merger-notes.scratch").write_text("mine")
    sweep()
    assert sorted(os.listdir(temporary)) == ["elsewhere", "merger-link.scratch", "merger-notes", "merger-notes.scratch"]
    assert (elsewhere / "model.safetensors").is_file()


def test_where_nothing_can_be_locked_nothing_is_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a disk cannot tell a run that lives from one that was killed."""

    def unsupported(descriptor: int, kind: int) -> None:
        raise OSError("no locks here")

    with monkeypatch.context() as patched:
        patched.setattr(system.fcntl, "flock", unsupported)
        folder = Scratch().folder()
        sweep()
    assert folder.is_dir()


def test_a_folder_that_is_swept_before_it_is_locked_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run may see it in that moment and take it for a dead one's."""
    made: list[str] = []

    def swept(**names: str) -> str:
        made.append(real(**names))
        if len(made) == 1:
            sweep()
        return made[-1]

    real = tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "mkdtemp", swept)
    own = Scratch()
    assert str(own.folder()) == made[1]
    assert [os.path.exists(folder) for folder in made] == [False, True]
    own.close()
