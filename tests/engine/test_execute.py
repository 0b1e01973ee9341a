"""The engine makes the same bytes whatever it may use, refuses what is not finite, and leaves nothing half made."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import tiny
import torch

from merger.engine.execute import ShardDone, execute, tickets
from merger.errors import MismatchError, ModelError
from merger.methods.registry import methods
from merger.planning.jobs.blocks import join_small
from merger.run.options import Options
from merger.run.pipeline import merge
from merger.run.prepare import plan, read_recipe
from merger.stores.folder import FolderReader, FolderStore
from merger.stores.ports import Ticket
from merger.stores.results import FolderSession, ResultFolder

RECIPES = {
    "linear": "{weight: 0.6}",
    "slerp": "{t: 0.3}",
    "task_arithmetic": "{weight: 0.7, lambda: 0.9}",
    "ties": "{weight: 0.7, density: 0.4}",
    "dare_ties": "{weight: 0.7, density: 0.4}",
    "dare_linear": "{weight: 0.7, density: 0.4}",
}


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three models whose embedding takes three blocks, the last of them a short one."""
    root = tmp_path_factory.mktemp("parents")
    return [tiny.model(root / f"p{seed}", seed, hidden=512, middle=64, vocab=1100) for seed in range(3)]


def recipe(folder: Path, method: str, parents: Sequence[Path], extra: str = "") -> Path:
    """A recipe for `method` over the parents, the first of them the base."""
    others = parents[1:2] if method == "slerp" else parents[1:]
    listed = "".join(f"  - model: {parent}\n" for parent in others)
    text = f"merge_method: {method}\nbase_model: {parents[0]}\nparameters: {RECIPES[method]}\nmodels:\n{listed}{extra}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


def merged(path: Path, to: Path, **options: object) -> dict[str, str]:
    """Run the recipe; the checksum of each tensor's bytes."""
    chosen = replace(Options(to=str(to), force=True), **options)  # type: ignore[arg-type]
    planned, store = plan(read_recipe(path), chosen)
    merge(planned, store, chosen)
    return checksums(to)


def checksums(folder: Path) -> dict[str, str]:
    """The checksum of each tensor's bytes in a model folder."""
    held = tiny.read(folder)
    return {name: hashlib.sha256(t.view(torch.uint8).numpy().tobytes()).hexdigest() for name, t in held.items()}


Made = Callable[[str], dict[str, str]]


@pytest.fixture(scope="module")
def quietly(parents: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """What a method makes with one thread: the checksum of each tensor."""

    @cache
    def made(method: str) -> dict[str, str]:
        folder = tmp_path_factory.mktemp("made")
        return merged(recipe(folder, method, parents), folder / "out", threads=1)

    return made


@pytest.mark.parametrize("method", RECIPES)
def test_same_bytes_whatever_the_budget(method: str, parents: list[Path], quietly: Made, tmp_path: Path) -> None:
    """Threads, memory and shard size change no byte of any tensor."""
    path, first = recipe(tmp_path, method, parents), quietly(method)
    assert merged(path, tmp_path / "two", threads=2, max_memory=1_000_000_000) == first
    assert merged(path, tmp_path / "many", threads=3, shard_size=300_000) == first
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3


@pytest.mark.parametrize("method", RECIPES)
def test_same_bytes_on_tensors_and_in_tiles_of_another_size(
    method: str, parents: list[Path], quietly: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU is handed, torch's tensors of a whole block, gives on the processor what numpy's tiles give."""
    path, first = recipe(tmp_path, method, parents), quietly(method)
    with monkeypatch.context() as patch:
        patch.setattr("merger.engine.runner.TILE", 10_000)
        assert merged(path, tmp_path / "small") == first
    monkeypatch.setattr("merger.engine.runner.TILE", 1 << 19)
    monkeypatch.setitem(methods(), method, replace(methods()[method], needs="torch"))  # type: ignore[misc]  # a dict
    assert merged(path, tmp_path / "tensors") == first


@pytest.mark.parametrize("method", [*RECIPES, "passthrough"])
def test_small_tensors_made_as_one_are_what_each_is_alone(
    method: str, parents: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their bytes, and what was seen of each."""
    path = tmp_path / "recipe.yaml"
    path.write_text(f"merge_method: passthrough\nmodels: [{{model: {parents[0]}}}]\n")
    path = path if method == "passthrough" else recipe(tmp_path, method, parents)
    jobs = plan(read_recipe(path), Options())[0].jobs
    assert len(list(join_small(jobs))) < len(jobs)
    first = merged(path, tmp_path / "one" / "out")
    monkeypatch.setattr("merger.planning.jobs.blocks.JOINED_ENTRIES", 0)
    assert list(join_small(jobs)) == list(jobs)
    assert merged(path, tmp_path / "two" / "out") == first
    one, two = ((tmp_path / name / "out" / "merger.measured.json").read_text() for name in ("one", "two"))
    assert one == two


def test_same_bytes_whatever_the_hash_seed(parents: list[Path], tmp_path: Path) -> None:
    """Two processes with different PYTHONHASHSEED write the same files: shards, index, config, card and lock."""
    path = recipe(tmp_path, "dare_ties", parents)
    found = []
    for seed in ("1", "2"):
        to = tmp_path / seed / "out"
        command = [sys.executable, "-m", "merger", "run", path, "--to", to, "--quiet", "--shard-size", "500kB"]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": seed})
        found.append({file.name: file.read_bytes() for file in to.rglob("*") if file.is_file()})
    assert found[0] == found[1]


def test_the_seed_decides_random_methods(parents: list[Path], quietly: Made, tmp_path: Path) -> None:
    """Another seed gives other bytes; the recipe's own seed and the option of the same number give the same."""
    path = recipe(tmp_path / "a", "dare_linear", parents)
    seeded = recipe(tmp_path / "b", "dare_linear", parents, "seed: 7\n")
    assert merged(path, tmp_path / "7", seed=7) == merged(seeded, tmp_path / "own") != quietly("dare_linear")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rounded_once(dtype: str, parents: list[Path], tmp_path: Path) -> None:
    """Task arithmetic equals the float64 result rounded to the output's dtype, but for a few entries in a million."""
    merged(recipe(tmp_path, "task_arithmetic", parents, f"dtype: {dtype}\n"), tmp_path / "out")
    base, one, other = (tiny.read(parent) for parent in parents)
    wrong = total = 0
    for name, tensor in tiny.read(tmp_path / "out").items():
        deltas = (one[name].double() - base[name].double()) + (other[name].double() - base[name].double())
        expected = (base[name].double() + 0.9 * 0.7 * deltas).to(getattr(torch, dtype))
        assert tensor.dtype == expected.dtype
        torch.testing.assert_close(tensor, expected, rtol=0.01 if dtype != "float32" else 1e-6, atol=1e-6)
        wrong, total = wrong + int((tensor != expected).sum()), total + tensor.numel()
    assert dtype == "float32" or wrong / total < 1e-3


def test_an_unchanged_input_is_copied_bit_by_bit(parents: list[Path], tmp_path: Path) -> None:
    """Passthrough writes the parents' own bytes, NaN payloads included."""
    held = tiny.tensors(5)
    held["model.norm.weight"].view(torch.int16)[:2] = torch.tensor([0x7FC1, 0x7F80], dtype=torch.int16)
    parent = tiny.write(tmp_path / "parent", held)
    path = tmp_path / "r.yaml"
    path.write_text(f"merge_method: passthrough\nallow_non_finite: true\nmodels: [{{model: {parent}}}]\n")
    assert merged(path, tmp_path / "out") == checksums(parent)


def test_what_is_not_finite_is_refused(parents: list[Path], tmp_path: Path) -> None:
    """A result beyond float16 names its tensor and the way out, and leaves no folder."""
    held = tiny.tensors(5, dtype=torch.float32)
    held["model.norm.weight"][3] = 70_000.0
    parent = tiny.write(tmp_path / "parent", held)
    path = tmp_path / "r.yaml"
    path.write_text(f"merge_method: linear\ndtype: float16\nmodels: [{{model: {parent}}}]\n")
    with pytest.raises(
        MismatchError,
        match=r"model\.norm\.weight: a value is beyond float16, which ends at 65,504, and no parent[\s\S]*bfloat16",
    ):
        merged(path, tmp_path / "out")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["parent", "r.yaml"]


class Once(FolderReader):
    """A reader from afar: each byte may be asked for once, as when it comes over the network."""

    def __init__(self, tickets: Sequence[Ticket]) -> None:
        super().__init__(tickets)
        self.read_bytes = 0

    def read(self, ticket: int, offset: int, out: memoryview) -> None:
        self.read_bytes += len(out)
        super().read(ticket, offset, out)

    def repeatable(self, ticket: int) -> bool:
        return False


class Afar(FolderStore):
    """A store whose reader counts, and must not be read twice."""

    def reader(self, tickets: Sequence[Ticket], budget: int) -> Once:
        self.opened = Once(tickets)
        return self.opened


@pytest.mark.parametrize(
    ("method", "kept"), [("linear", 0), ("slerp", None), ("ties", None), ("ties", 2_000_000), ("dare_ties", 0)]
)
def test_each_byte_is_transferred_once(
    method: str, kept: int | None, parents: list[Path], quietly: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read several times waits in memory, or some of it or all on disk: the store is asked once for a byte."""
    path = recipe(tmp_path, method, parents)
    planned, _ = plan(read_recipe(path), Options(threads=2))
    planned = replace(planned, kept=planned.read_bytes if kept is None else kept)
    if kept is None:
        monkeypatch.delattr(tempfile, "TemporaryFile")
    store, session = Afar(), ResultFolder(tmp_path / "far").open(planned.hash)
    assert isinstance(session, FolderSession)
    shards = [
        event.shard
        for event in execute(planned, planned.shards, methods(), store, session)
        if isinstance(event, ShardDone)
    ]
    assert len(shards) == len(planned.shards)
    assert store.opened.read_bytes == planned.read_bytes
    assert checksums(session._work.new) == quietly(method)


@pytest.mark.parametrize(("method", "abreast"), [("linear", True), ("ties", False)])
def test_what_is_read_block_by_block_is_asked_for_side_by_side(
    method: str, abreast: bool, parents: list[Path], tmp_path: Path
) -> None:
    """A tensor's parents come in one turn, but where each is kept whole, one after the other."""
    planned, _ = plan(read_recipe(recipe(tmp_path, method, parents)), Options())
    asked = iter(tickets(planned, planned.shards, methods()))
    turns = [{next(asked).turn for _ in job.reads} for shard in planned.shards for job in shard.jobs]
    assert list(asked) == []
    assert len(set.union(*turns)) == (len(turns) if abreast else 1)
    assert all(len(turn) == 1 and (None in turn) is not abreast for turn in turns)


def test_a_file_that_shrinks_meanwhile_is_refused(parents: list[Path], tmp_path: Path) -> None:
    """A parent that is overwritten during the run ends it with a sentence, and leaves no folder."""
    parent = tiny.model(tmp_path / "parent", 9)
    path = tmp_path / "r.yaml"
    path.write_text(f"merge_method: linear\nmodels: [{{model: {parent}}}, {{model: {parents[0]}}}]\n".replace(
        str(parents[0]), str(tiny.model(tmp_path / "second", 10))))  # fmt: skip
    options = Options(to=str(tmp_path / "out"))
    planned, store = plan(read_recipe(path), options)
    os.truncate(parent / "model.safetensors", 2_000)
    with pytest.raises(ModelError, match="became shorter while it was read"):
        merge(planned, store, options)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.merging").exists()
