"""`--stream` from the command to the Hub: the same files with none on this disk, resumed, or refused in a sentence."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import forks
import pytest
import tiny
from calls import WRITER, Command
from loopback import LoopbackHub
from test_resume import KILLED_AFTER

SHARD = ("--shard-size", "2kB")
XET = {"HF_HUB_DISABLE_XET": "0"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of folders, and its merge in a folder beside it."""
    root = tmp_path_factory.mktemp("recipe")
    parents = tiny.models(root, "base", "one", "two")
    (root / "mine.yaml").write_text(tiny.TIES_RECIPE.format(**parents))
    return root


@pytest.fixture(scope="module")
def whole(recipe: Path, command: Command, served: LoopbackHub) -> dict[str, str]:
    """The SHA-256 of each file of tensors, as a run to a folder makes them."""
    done = command("run", "mine.yaml", "--to", "whole", *SHARD, cwd=recipe, hub=served)
    assert done.returncode == 0, done.stderr
    files = (recipe / "whole").glob("*.safetensors")
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture
def xet(hub: LoopbackHub, tmp_path: Path) -> Iterator[LoopbackHub]:
    """A Hub that has Xet."""
    hub.xet(tmp_path)
    yield hub
    hub.xet(None)


def published(hub: LoopbackHub, repo: str) -> dict[str, str]:
    return {name: entry.sha256 for name, entry in hub.tree(repo).items() if name.endswith(".safetensors")}


def test_a_stream_makes_the_files_of_any_run_and_needs_no_disk(
    recipe: Path, whole: dict[str, str], command: Command, xet: LoopbackHub
) -> None:
    """What would not fit on the disk as files fits as a stream."""
    line = ("run", "mine.yaml", "--to", "hf://org/streamed", *SHARD, "--max-disk", "1kB", "--json")
    refused = command(*line, cwd=recipe, hub=xet, env=XET)
    assert refused.returncode == 5
    assert "or use --stream" in refused.stderr
    done = command(*line, "--stream", cwd=recipe, hub=xet, env=XET)
    assert done.returncode == 0, done.stderr
    assert {shard["name"]: shard["sha256"] for shard in json.loads(done.stdout)["shards"]} == whole
    assert published(xet, "org/streamed") == whole
    assert len(xet.commits("org/streamed")) == 2


def test_a_killed_stream_goes_on_from_what_was_taken(
    recipe: Path, whole: dict[str, str], command: Command, xet: LoopbackHub, tmp_path: Path
) -> None:
    """SIGKILL in the middle of the fourth shard: those that the branch has are not made again."""
    line = ("run", "mine.yaml", "--to", "hf://org/killed", *SHARD, "--stream")
    env = {**os.environ, **xet.env(tmp_path, WRITER), **XET, "TMPDIR": str(tmp_path)}
    killed = forks.run([sys.executable, "-c", KILLED_AFTER, "3", *line], cwd=recipe, env=env)
    assert killed.returncode == -signal.SIGKILL
    assert published(xet, "org/killed") == {}
    again = command(*line, cwd=recipe, hub=xet, env=XET)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("made model-") in (len(whole) - 2, len(whole) - 3)  # the third may have been under way
    assert published(xet, "org/killed") == whole


@pytest.mark.parametrize(("to", "env", "code", "words"), [
    ("out", XET, 2, "--stream is for the Hub, and 'out' is a folder"),
    ("hf://org/refused", XET, 6, "--stream cannot be kept: this Hub has no Xet storage"),
    ("hf://org/refused", {}, 6, "--stream cannot be kept: Xet is switched off or not installed"),
], ids=["folder", "no Xet there", "no Xet here"])  # fmt: skip
def test_a_stream_that_cannot_be_is_refused(
    to: str, env: dict[str, str], code: int, words: str, recipe: Path, command: Command, hub: LoopbackHub
) -> None:
    """In a sentence with a next step, before a file is made."""
    done = command("run", "mine.yaml", "--to", to, "--stream", cwd=recipe, hub=hub, env=env)
    assert done.returncode == code
    assert words in done.stderr
    assert "    " in done.stderr.splitlines()[-1]
    assert "leave out --stream" in done.stderr
    assert "made model" not in done.stderr
    assert not (recipe / "out").exists()
