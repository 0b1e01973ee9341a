"""The writer's token: in the environment and on the wire to the Hub, and nowhere else, whatever a run comes to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from calls import WRITER, Command
from loopback import LoopbackHub
from watching import Watch, watching

SHARD = ("--shard-size", "20kB")
LOUD = {
    "HF_HUB_DISABLE_XET": "0", "HF_HUB_VERBOSITY": "debug", "HF_XET_LOG_DEST": "logs/", "RUST_LOG": "debug",
    "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "0",
}  # fmt: skip


@pytest.fixture
def work(hub: LoopbackHub, tmp_path: Path) -> Path:
    """A folder with a recipe of models on the Hub."""
    for seed, name in enumerate(("base", "one", "two")):
        if not hub.exists(f"org/{name}"):
            hub.add_model(f"org/{name}", tiny.model(tmp_path / "parents" / name, seed))
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "mine.yaml").write_text(tiny.TIES_RECIPE.format(base="org/base", one="org/one", two="org/two"))
    return folder


@pytest.fixture
def watched(hub: LoopbackHub, work: Path) -> Iterator[Watch]:
    """The arguments of our processes; their environment is that of the person who started them.

    What children get, test_evaluation holds, and test_act what a step of the Action and its children do.
    """
    with watching(hub, work) as watch:
        yield watch
    hub.clear_faults()


def everything(hub: LoopbackHub, repo: str, folder: Path) -> dict[str, bytes]:
    """All that a run leaves: files on this disk, and on each branch the commits and the files."""
    texts = {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    for request in hub.log:
        texts[f"the log's {request.path}"] = f"{request.path}?{request.query}".encode()
    for branch in hub.branches(repo) if hub.exists(repo) else ():
        for commit in hub.commits(repo, branch):
            texts[f"{branch}: {commit.sha}"] = f"{commit.title} {commit.message} {commit.author}".encode()
        for name, entry in hub.tree(repo, branch).items():
            blob = hub.world.blobs.path(entry.sha256)
            texts[f"{branch}: {name}"] = blob.read_bytes() if blob.is_file() else b""
    return texts


def spoil(hub: LoopbackHub, end: str) -> None:
    """Make the run end so."""
    tokens = iter(range(99))  # by the first one the Hub says that it has Xet
    match end:
        case "refused commit":
            hub.fail(lambda r: r.path.endswith("/commit/main"), status=403, times=9)
        case "refused upload":
            hub.fail(lambda r: "xet-write" in r.path and next(tokens) > 0, status=403, times=99)


@pytest.mark.parametrize(
    ("end", "option"),
    [("well", "--stream"), ("well", "--quiet"), ("refused commit", "--json"), ("refused upload", "--stream"),
     ("unknown token", "--json")],
)  # fmt: skip
def test_the_token_is_nowhere(
    end: str, option: str, work: Path, hub: LoopbackHub, command: Command, watched: Watch, tmp_path: Path
) -> None:
    """Not in what the commands print, the client's own talk included, nor in what they leave here and on the Hub."""
    repo = f"org/{(end + option).replace(' ', '-').replace('--', '-')}"
    token = "hf_that_the_hub_does_not_know" if end == "unknown token" else WRITER
    (tmp_path / "storage").mkdir()
    hub.xet(tmp_path / "storage" if option == "--stream" else None)
    spoil(hub, end)
    lines = [("run", "mine.yaml", "--to", f"hf://{repo}", *SHARD, option)]
    if option == "--quiet":
        lines += [("check", "mine.yaml"), ("plan", "mine.yaml", "--json"), ("status", f"hf://{repo}")]
    env = {**LOUD, "TMPDIR": str(work), "HF_HOME": str(work / "home")}
    ended = [command(*line, cwd=work, hub=hub, token=token, env=env, forked=False) for line in lines]
    assert (ended[0].returncode == 0) == (end == "well"), ended[0].stderr
    texts = {f"{done.args} printed": f"{done.stdout}\n{done.stderr}".encode() for done in ended}
    texts |= everything(hub, repo, work)
    hub.xet(None)
    assert [where for where, text in texts.items() if token.encode() in text] == []
    assert [process.line for process in watched.seen if token.encode() in process.line] == []
    assert any(b"org/" in text for text in texts.values())  # so we did look
    assert any(b"mine.yaml" in process.line for process in watched.seen)
