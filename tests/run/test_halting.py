"""A run that somebody ends says so and ends its children; one that would throw finished files away asks first."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import forks
import pytest
import tiny
from calls import WRITER
from loopback import LoopbackHub

from merger.errors import UploadError
from merger.models.formats.safetensors import WrittenShard
from merger.stores.results import FolderSession, ResultFolder

BEGIN = "import subprocess, sys, time\nfrom merger.runtime import halting\n"
SLEEPER = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"


def started(script: str) -> subprocess.Popen[str]:
    """A process that runs the script."""
    return subprocess.Popen(
        [sys.executable, "-c", BEGIN + script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_is_ended_says_what_is_there(number: int, code: int, hub: LoopbackHub, tmp_path: Path) -> None:
    """The same sentence for both signals, and the exit code that shells expect."""
    tiny.model(tmp_path / "a")
    (tmp_path / "r.yaml").write_text("merge_method: linear\nmodels: [{model: ./a}]\n")
    waits = hub.fail(lambda request: "/repos/create" in request.path, times=99, headers={"Retry-After": "60"})
    line = [sys.executable, "-m", "merger", "run", "r.yaml", "--to", "hf://org/away"]
    process = forks.start(line, cwd=tmp_path, env={**os.environ, **hub.env(tmp_path, WRITER)})
    while waits.left == 99:
        assert process.poll() is None
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert "interrupted: the destination is as it was" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_child_ends_with_the_process(number: int) -> None:
    """As where a result is measured: no signal from a terminal's group reaches it."""
    with started(f"with halting():\n    subprocess.run([sys.executable, '-c', {SLEEPER!r}])\n") as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.send_signal(number)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


CLEARING = """
with halting():
    try:
        print("begun", flush=True)
        time.sleep(600)
    finally:
        print("clearing", flush=True)
        time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_it_at_once(number: int) -> None:
    """Even where what is cleared up takes for ever."""
    with started(CLEARING) as process:
        assert process.stdout is not None
        for said in ("begun\n", "clearing\n"):
            assert process.stdout.readline() == said
            process.send_signal(number)
    assert process.returncode == -number


def begun(folder: Path, identity: str) -> None:
    """A run of that identity that ended with one file finished."""
    session = ResultFolder(folder).open(identity)
    assert isinstance(session, FolderSession)
    with session.open("model-00001-of-00002.safetensors") as out:  # type: ignore[attr-defined]  # of a folder it is a file
        out.write(b"finished")
    sha256 = hashlib.sha256(b"finished").hexdigest()
    session.take(WrittenShard("model-00001-of-00002.safetensors", 8, sha256))
    session.leave()


def test_finished_files_of_another_merge_are_not_thrown_away_without_a_word(tmp_path: Path) -> None:
    """They are named, and stay; the same run goes on from them; --force and clean remove them."""
    begun(tmp_path / "out", "one")
    with pytest.raises(
        UploadError, match=r"finished files .* 'out\.merging': model-00001-of-00002\.safetensors"
    ) as caught:
        ResultFolder(tmp_path / "out").open("other")
    assert "merger clean" in str(caught.value)
    same = ResultFolder(tmp_path / "out").open("one")
    assert isinstance(same, FolderSession)
    assert list(same.held()) == ["model-00001-of-00002.safetensors"]
    same.leave()
    forced = ResultFolder(tmp_path / "out", force=True).open("other")
    assert isinstance(forced, FolderSession)
    assert not forced.held()
    forced.leave()
    begun(tmp_path / "out", "one")
    place = ResultFolder(tmp_path / "out")
    for leftover in place.leftovers():
        place.clean(leftover)
    assert isinstance(place.open("other"), FolderSession)
