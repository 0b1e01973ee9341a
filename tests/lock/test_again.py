"""A merge made again from its lock: the same bytes in another process, whatever its threads, memory and parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import yaml
from calls import Command, Said, called
from loopback import Client, LoopbackHub
from places import ZOO

RECIPE = """\
# drawn at random, so that the seed counts
merge_method: dare_ties
base_model: again/base
models:
  - model: again/kjv
    parameters: {weight: 0.6, density: 0.6}
  - model: again/python@main
    parameters: {weight: 0.5, density: 0.4}
seed: 5
"""


@pytest.fixture(scope="module")
def first(served: LoopbackHub, command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the published lock of a merge of the zoo, made with a seed and a shard size of its own."""
    for name in ("base", "kjv", "python"):
        served.add_model(f"again/{name}", ZOO / name)
    folder = tmp_path_factory.mktemp("work")
    (folder / "mine.yaml").write_text(RECIPE)
    done = command(
        "run", "mine.yaml", "--to", "hf://org/first", "--shard-size", "500kB", "--seed", "11", "--threads", "1",
        cwd=folder, hub=served,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder / "merger.lock.yaml").write_bytes(served.read("org/first", "merger.lock.yaml"))
    return folder


def shards(hub: LoopbackHub, repo: str) -> dict[str, str]:
    """The checksums of a repo's shards."""
    return {name: entry.sha256 for name, entry in hub.tree(repo).items() if name.endswith(".safetensors")}


def test_a_lock_makes_the_same_bytes_with_other_threads_and_memory(
    first: Path, served: LoopbackHub, command: Command
) -> None:
    """Its seed and shard size are taken from it; all files are the same but the card, which names it."""
    done = command(
        "run", "merger.lock.yaml", "--to", "hf://org/second", "--threads", "3", "--max-memory", "900MB", "--no-cache",
        cwd=first, hub=served,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(shards(served, "org/first")) > 4
    assert shards(served, "org/second") == shards(served, "org/first")
    one, other = served.files("org/first"), served.files("org/second")
    named = {"README.md", "pictures/lineage.svg"}  # and lineage.png, but that forked commands draw none
    assert {name for name in one | other if one.get(name) != other.get(name)} == named


def test_a_lock_makes_the_same_bytes_from_parts_in_another_order(
    first: Path, served: LoopbackHub, command: Command
) -> None:
    """Each part in a process of its own, the last one first."""
    for part in ("2/2", "1/2"):
        done = command(
            "run", "merger.lock.yaml", "--to", "hf://org/parts", "--part", part, "--threads", part[0],
            cwd=first, hub=served,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    done = command("publish", "merger.lock.yaml", "--to", "hf://org/parts", cwd=first, hub=served)
    assert done.returncode == 0, done.stderr
    assert shards(served, "org/parts") == shards(served, "org/first")
    assert served.read("org/parts", "merger.lock.yaml") == served.read("org/first", "merger.lock.yaml")


def test_the_lock_says_what_every_file_is(first: Path, served: LoopbackHub) -> None:
    """Each file of the repo but card and lock with its size and checksum; and of each parent those that were read."""
    lock = yaml.safe_load((first / "merger.lock.yaml").read_text())
    tree = served.tree("org/first")
    told = {item["file"]: (item["size"], item["sha256"]) for item in lock["output"]}
    card = {name for name in tree if name == "README.md" or name.startswith("pictures/")}
    kept = tree.keys() - card - {"merger.lock.yaml", ".gitattributes"}
    assert told == {name: (tree[name].size, tree[name].sha256) for name in kept}
    assert (lock["seed"], lock["shard_size"], lock["recipe"]) == (11, 500_000, RECIPE)
    for model in lock["models"]:
        repo = model["model"].removesuffix("@main")
        assert model["commit"] == served.head(repo)
        held = served.tree(repo)
        files = {item["file"]: (item["size"], item["sha256"]) for item in model["files"]}
        assert {"config.json", "model.safetensors"} < files.keys()
        assert files == {name: (held[name].size, held[name].sha256) for name in files}


@pytest.mark.parametrize("option", ["--shard-size=1MB", "--seed=5"])
def test_another_shard_size_or_seed_is_refused(option: str, first: Path, served: LoopbackHub, client: Client) -> None:
    """They would make another merge; what the lock itself says may be said again."""
    done = client(called, ["plan", str(first / "merger.lock.yaml"), option])
    assert done.code == 2
    assert "makes another merge than the lock's, which has" in done.err
    same = client(called, ["plan", str(first / "merger.lock.yaml"), "--shard-size=500kB", "--seed=11", "--json"])
    assert same.code == 0, same.err
    assert json.loads(same.out)["hash"] == yaml.safe_load((first / "merger.lock.yaml").read_text())["plan"]


def test_other_machines_get_no_lock(first: Path, client: Client) -> None:
    """They are handed the recipe's text alone, so an engine is refused before it starts anything."""
    line = ["run", str(first / "merger.lock.yaml"), "--to", "hf://org/spread", "--engine", "jobs", "--parts", "2"]
    done = client(called, line)
    assert done.code == 2
    assert "a lock file stays here, the other machines get the recipe" in done.err


def test_the_locked_commits_are_read_when_the_parents_have_moved_on(
    first: Path, served: LoopbackHub, client: Client
) -> None:
    """The recipe alone would merge what is there now."""
    was = shards(served, "org/first")
    served.commit("again/kjv", {"model.safetensors": ZOO / "python/model.safetensors"})
    done = client(called, ["run", str(first / "merger.lock.yaml"), "--to", str(first / "later")])
    assert done.code == 0, done.err
    lock = yaml.safe_load((first / "later/merger.lock.yaml").read_text())
    assert {item["file"]: item["sha256"] for item in lock["output"] if item["file"] in was} == was


def test_a_commit_that_is_gone_is_told(first: Path, served: LoopbackHub, client: Client) -> None:
    """With exit code 3 and the model's name, at the recipe's line; nothing is made."""
    text = (first / "merger.lock.yaml").read_text()
    commit = next(item["commit"] for item in yaml.safe_load(text)["models"] if item["model"] == "again/kjv")
    (first / "gone.lock.yaml").write_text(text.replace(commit, "de" * 20))
    done = client(called, ["run", str(first / "gone.lock.yaml"), "--to", str(first / "gone")])
    assert done.code == 3
    where = f"{first}/gone.lock.yaml (recipe):5:12: models[again/kjv]"
    assert done.err.startswith(f"{where}: again/kjv has no revision '{'de' * 20}'")
    assert not (first / "gone").exists()


def test_a_commit_that_was_changed_in_the_lock_is_told(first: Path, served: LoopbackHub, client: Client) -> None:
    """By its files where they are others, by the plan where only the commit is."""
    text = (first / "merger.lock.yaml").read_text()
    then = next(item["commit"] for item in yaml.safe_load(text)["models"] if item["model"] == "again/base")
    same = served.commit("again/base", {"README.md": b"moved on"})
    (first / "same.lock.yaml").write_text(text.replace(then, same))
    done = client(called, ["run", str(first / "same.lock.yaml"), "--to", str(first / "same")])
    assert done.code == 7
    assert "but its recipe, commits, seed and shard size make the plan" in done.err
    other = served.commit("again/base", {"model.safetensors": ZOO / "python/model.safetensors"})
    (first / "other.lock.yaml").write_text(text.replace(then, other))
    done = client(called, ["run", str(first / "other.lock.yaml"), "--to", str(first / "other")])
    assert done.code == 3
    assert f"again/base at commit {other}: model.safetensors is another file: its SHA-256 is" in done.err


def test_a_local_parent_that_is_another_one_is_told(tmp_path: Path, client: Client) -> None:
    """Its size is the same, its bytes are not: exit code 3, before anything is made."""
    tiny.models(tmp_path, "one", "two")
    (tmp_path / "mine.yaml").write_text(
        f"merge_method: linear\nmodels: [{{model: {tmp_path}/one}}, {{model: {tmp_path}/two}}]\n"
        "parameters: {weight: 0.5}\n"
    )
    done: Said = client(called, ["run", str(tmp_path / "mine.yaml"), "--to", str(tmp_path / "out")])
    assert done.code == 0, done.err
    lock = str(tmp_path / "out/merger.lock.yaml")
    again = client(called, ["run", lock, "--to", str(tmp_path / "again"), "--threads", "1"])
    assert again.code == 0, again.err
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
    tiny.model(tmp_path / "two", seed=9)
    done = client(called, ["run", lock, "--to", str(tmp_path / "third")])
    assert done.code == 3
    assert "two: model.safetensors is another file: its SHA-256 is" in done.err
    assert f"bring back the model as it was: {tmp_path}/two" in done.err
    assert not (tmp_path / "third").exists()
