"""What a run reads from the Hub: each byte once, checked against the lock, and nothing that lies in the cache.

The real command in processes of its own, against the loopback Hub.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
from calls import WRITER, Command
from loopback import Client, LoopbackHub, Request

SHARD = ("--shard-size", "9kB", "--no-look")
NAMES = ("base", "one", "two")
FILES = tuple(f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
MODELS = """\
merge_method: {method}
{base}models: [{{model: org/one}}, {{model: org/two}}]
parameters: {{{parameters}}}
publish: {{license: mit}}
"""
RECIPES = {
    "linear": MODELS.format(method="linear", base="", parameters="weight: 0.5"),
    "ties": MODELS.format(method="ties", base="base_model: org/base\n", parameters="density: 0.5"),
}


@pytest.fixture(scope="module", autouse=True)
def commits(served: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base and two others of twelve layers in two files, so that numbers and names order the layers differently."""
    root = tmp_path_factory.mktemp("parents")
    folders = {name: tiny.model(root / name, seed, files=2, layers=12) for seed, name in enumerate(NAMES)}
    return {name: served.add_model(f"org/{name}", folder) for name, folder in folders.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the recipes."""
    for method, recipe in RECIPES.items():
        (tmp_path / f"{method}.yaml").write_text(recipe)
    return tmp_path


def parents(method: str) -> tuple[str, ...]:
    return tuple(f"org/{name}" for name in (NAMES if method == "ties" else NAMES[1:]))


def downloads(log: list[Request]) -> dict[str, list[tuple[int, int]]]:
    """The ranges that the second origin gave of each file."""
    found: dict[str, list[tuple[int, int]]] = {}
    for request in log:
        if request.host == "cdn" and request.method == "GET":
            start, _, last = (request.range or "").removeprefix("bytes=").partition("-")
            assert request.sent == int(last) + 1 - int(start)
            found.setdefault(request.path, []).append((int(start), int(last) + 1))
    return found


def total(found: Mapping[str, list[tuple[int, int]]]) -> int:
    return sum(stop - start for ranges in found.values() for start, stop in ranges)


def headers(hub: LoopbackHub, repos: tuple[str, ...]) -> int:
    raw = [hub.read(repo, name) for repo in repos for name in FILES]
    return sum(8 + int.from_bytes(data[:8], "little") for data in raw)


def shards(hub: LoopbackHub, repo: str, revision: str = "main") -> dict[str, bytes]:
    return {name: raw for name, raw in hub.files(repo, revision).items() if name.endswith(".safetensors")}


# Each byte once


@pytest.mark.parametrize("method", RECIPES)
def test_the_bytes_that_travel_are_those_of_the_plan(
    method: str, folder: Path, command: Command, hub: LoopbackHub
) -> None:
    """Down: the headers and what the plan names, no byte of a file twice; up: shards and pictures, once."""
    plan = json.loads(command("plan", f"{method}.yaml", "--json", cwd=folder, hub=hub).stdout)
    hub.clear_log()
    done = command("run", f"{method}.yaml", "--to", f"hf://org/bytes-{method}", *SHARD, cwd=folder, hub=hub)
    assert done.returncode == 0, done.stderr
    found = downloads(hub.log)
    assert len(found) == 2 * len(parents(method))
    assert all(one[1] <= next_one[0] for ranges in found.values() for one, next_one in pairwise(sorted(ranges)))
    assert total(found) == plan["read_bytes"] + headers(hub, parents(method))
    made = shards(hub, f"org/bytes-{method}")
    puts = [request.received for request in hub.log if request.method == "PUT" and request.host == "cdn"]
    assert len(made) > 3
    large = [raw for name, raw in hub.files(f"org/bytes-{method}").items() if name.endswith((".safetensors", ".png"))]
    assert sorted(puts) == sorted(map(len, large))


# Checked against the lock


@pytest.fixture(params=["first tensor", "last tensor", "header"])
def damaged(request: pytest.FixtureRequest, served: LoopbackHub) -> Iterator[str]:
    """One bit of a file of org/two is another than when it was uploaded; the name of the file."""
    name = FILES[1]
    blob = served.blob_path("org/two", name)
    raw = bytearray(blob.read_bytes())
    places = {"first tensor": 8 + int.from_bytes(raw[:8], "little"), "last tensor": len(raw) - 2}
    sound = bytes(raw)
    raw[places.get(request.param, raw.index(b'"pt"') + 1)] ^= 1
    blob.write_bytes(raw)
    yield name
    blob.write_bytes(sound)


@pytest.mark.parametrize("method", RECIPES)
def test_a_damaged_file_ends_the_run_and_leaves_nothing_to_go_on_from(
    method: str, damaged: str, folder: Path, command: Command, hub: LoopbackHub
) -> None:
    """Exit code 3, the file is named, main stays empty, and the shards that were made of it are taken back."""
    to = f"org/damaged-{method}-{len(hub.log)}"
    done = command("run", f"{method}.yaml", "--to", f"hf://{to}", *SHARD, cwd=folder, hub=hub)
    assert done.returncode == 3
    assert f"org/two: {damaged} came damaged: its SHA-256 is" in done.stderr
    assert hub.tree("org/two")[damaged].sha256 in done.stderr
    assert not shards(hub, to)
    assert [shards(hub, to, branch) for branch in hub.branches(to) if branch != "main"] == [{}]
    local = command("run", f"{method}.yaml", "--to", "out", *SHARD, cwd=folder, hub=hub)
    assert local.returncode == 3
    assert not list(folder.glob("out*/**/*.safetensors"))


def test_the_same_command_mends_it_once_the_file_is_sound(
    folder: Path, command: Command, hub: LoopbackHub, commits: dict[str, str]
) -> None:
    """All that was taken back is made anew: the result is that of a run without damage."""
    blob = hub.blob_path("org/one", FILES[1])
    sound = blob.read_bytes()
    blob.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    line = ("run", "linear.yaml", "--to", "hf://org/mended", *SHARD)
    spoilt = command(*line, cwd=folder, hub=hub)
    blob.write_bytes(sound)
    assert (spoilt.returncode, spoilt.stderr.count("made model-") > 0) == (3, True)
    assert command(*line, cwd=folder, hub=hub).returncode == 0
    assert command("run", "linear.yaml", "--to", "out", *SHARD, cwd=folder, hub=hub).returncode == 0
    made = {path.name: path.read_bytes() for path in (folder / "out").glob("*.safetensors")}
    assert shards(hub, "org/mended") == made


# The cache


def download(repo: str, file: str, revision: str | None = None) -> str:
    """As transformers does it."""
    from huggingface_hub import hf_hub_download

    return hf_hub_download(repo, file, revision=revision)


@pytest.fixture
def home(served: LoopbackHub, tmp_path: Path) -> Path:
    """A home with a cache that holds all of org/one, and half of org/two."""
    home = tmp_path / "home"
    with Client(served.env(home, WRITER)) as child:
        for repo, files in (("org/one", FILES), ("org/two", FILES[:1])):
            for name in files:
                child(download, repo, name)
    return home


def run(home: Path, folder: Path, command: Command, hub: LoopbackHub, *options: str, method: str = "linear") -> int:
    """Merge into a folder; how many bytes of large files were downloaded."""
    hub.clear_log()
    done = command(
        "run", f"{method}.yaml", "--to", "out", "--force", "--no-look", *options,
        cwd=folder, hub=hub, env={"HF_HOME": str(home)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return total(downloads(hub.log))


def digest(folder: Path) -> str:
    return hashlib.sha256(b"".join((folder / "out" / name).read_bytes() for name in FILES)).hexdigest()


@pytest.mark.parametrize("method", RECIPES)
def test_what_is_in_the_cache_is_not_downloaded_again(
    method: str, home: Path, folder: Path, command: Command, hub: LoopbackHub
) -> None:
    """Not even its header; a file that is not there is downloaded whole, and the result is the same."""
    whole = {name: sum(len(hub.read(name, file)) for file in FILES) for name in parents(method)}
    rest = len(hub.read("org/two", FILES[1])) + whole.get("org/base", 0)
    assert run(home, folder, command, hub, method=method) == rest
    found = digest(folder)
    assert run(home, folder, command, hub, "--no-cache", method=method) == sum(whole.values())
    assert digest(folder) == found


def test_a_cached_file_that_is_not_the_locked_one_is_not_used(
    home: Path, folder: Path, command: Command, hub: LoopbackHub
) -> None:
    """One that was cut short, one without its name, and one of another commit are downloaded."""
    cached = next((home / "hub/models--org--one/snapshots").iterdir())
    whole = sum(len(hub.read(repo, name)) for repo in parents("linear") for name in FILES)
    known = [len(hub.read("org/one", name)) for name in FILES]
    half = len(hub.read("org/two", FILES[0]))
    first, second = (cached / name for name in FILES)
    first.resolve().write_bytes(first.read_bytes()[:-1])
    assert run(home, folder, command, hub) == whole - half - known[1]
    content = second.read_bytes()
    second.unlink()
    second.write_bytes(content)
    assert run(home, folder, command, hub) == whole - half


def test_another_commit_than_the_cached_one_is_downloaded(
    home: Path, folder: Path, command: Command, hub: LoopbackHub, tmp_path: Path
) -> None:
    """The cache is asked for the locked commit only."""
    changed = tiny.model(tmp_path / "changed", 9, files=2, layers=12)
    before = hub.files("org/one")
    hub.commit("org/one", changed)
    try:
        known = len(hub.read("org/two", FILES[0]))
        whole = sum(len(hub.read(repo, name)) for repo in parents("linear") for name in FILES)
        assert run(home, folder, command, hub) == whole - known
    finally:
        hub.commit("org/one", before)
