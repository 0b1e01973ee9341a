"""What cannot be meant or made is refused before any tensor is read: position, sentence, next step, exit code."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import tiny
from calls import WRITER
from loopback import LoopbackHub

from merger.cli.commands import main
from merger.stores.folder import FolderReader, FolderStore
from merger.stores.ports import Located

HERE = "▸"
"""Stands in a recipe of a case where the refusal must point; not part of the recipe."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models to merge: ./one and ./two fit each other, ./wide does not."""
    root = tmp_path_factory.mktemp("models")
    tiny.model(root / "one", seed=1)
    tiny.model(root / "two", seed=2)
    tiny.model(root / "sharded", seed=3, files=2)
    tiny.model(root / "wide", seed=4, hidden=32)
    tiny.model(root / "deep", seed=5, layers=3)
    return root


@pytest.fixture(autouse=True)
def no_tensor_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a safetensors file in a folder only the header may be asked for."""
    fetch = FolderStore.fetch

    def headers_only(self: FolderStore, model: Located, file: str, start: int = 0, stop: int | None = None) -> bytes:
        if file.endswith(".safetensors"):
            length = struct.unpack("<Q", (Path(model.where) / file).read_bytes()[:8].ljust(8, b"\0"))[0]
            assert stop is not None
            assert stop <= 8 + length
        return fetch(self, model, file, start, stop)

    def never(self: FolderReader, ticket: int, offset: int, out: memoryview) -> NoReturn:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(FolderStore, "fetch", headers_only)
    monkeypatch.setattr(FolderReader, "read", never)


@pytest.fixture
def refusal(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, list[str]]]:
    """Run a recipe among the models; returns the exit code and the problems as they were printed."""
    for folder in models.iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)

    def run(recipe: str, *options: str) -> tuple[int, list[str]]:
        (tmp_path / "mine.yaml").write_text(recipe.replace(HERE, ""))
        code = main(["run", "mine.yaml", "--to", "./out", *options])
        told = capsys.readouterr()
        assert told.out == ""
        assert "Traceback" not in told.err
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.merging").exists()
        return code, re.split(r"\n(?! {4})", told.err.rstrip("\n"))

    return run


Refusal = Callable[..., tuple[int, list[str]]]


def places(recipe: str) -> list[str]:
    """``file:line:column`` of each marked place."""
    lines = recipe.split("\n")
    found = []
    for number, line in enumerate(lines, 1):
        parts = line.split(HERE)
        found += [f"mine.yaml:{number}:{sum(map(len, parts[:n])) + 1}" for n in range(1, len(parts))]
    return found


def ties(**changed: str) -> str:
    """A recipe that is right, apart from what a case changes."""
    lines = {
        "method": "merge_method: ties",
        "base": "base_model: ./one",
        "head": "models:",
        "model": "  - model: ./two",
        "parameters": "    parameters: {weight: 1.0, density: 0.5}",
    }
    return "\n".join(line for line in (lines | changed).values() if line) + "\n"


def slices(first: str, second: str = "[0, 1]") -> str:
    return f"""\
merge_method: linear
parameters: {{weight: 0.5}}
slices:
  - sources:
      - model: ./one
        layer_range: {first}
      - model: ./two
        layer_range: {second}
"""


LAUGHS = """\
merge_method: linear
a: &a [x, x, x, x, x, x, x, x, x, x]
b: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a, *a]
c: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b, *b]
d: &d [*c, *c, *c, *c, *c, *c, *c, *c, *c, *c]
e: &e [▸*d, *d, *d, *d, *d, *d, *d, *d, *d, *d]
f: &f [*e, *e, *e, *e, *e, *e, *e, *e, *e, *e]
models:
  - model: ./one
"""

RECIPES = {
    "misspelt key": (
        ties(parameters="    parameters: {weight: 1.0, ▸densty: 0.5}"), 2,
        "models[./two].parameters: unknown key 'densty'", "did you mean 'density'?",
    ),
    "misspelt key at the top": (ties(base="▸base_mode: ./one"), 2, "unknown key 'base_mode'", "'base_model'"),
    "misspelt method": (
        ties(method="merge_method: ▸teis"), 2, "there is no merge method 'teis'", "did you mean 'ties'?",
    ),
    "density 1.5": (
        ties(parameters="    parameters: {weight: 1.0, density: ▸1.5}"), 2,
        "models[./two].parameters.density: 1.5 is outside 0 to 1", "density: share of entries kept",
    ),
    "missing base_model": (ties(base="", method="merge_method: ▸ties"), 2, "ties needs a base_model", "add base_model"),
    "layer_range beyond the model": (
        slices("▸[0, 9]", "▸[0, 9]"), 2, "[0, 9] ends beyond one, which has 2 layers", "its last layer is 1",
    ),
    "negative layer_range": (slices("[▸-1, 1]", "[0, 2]"), 2, "-1 is outside 0 to 100,000", "counted from 0"),
    "empty layer_range": (slices("▸[1, 1]"), 2, "[1, 1] holds no layer", "write [start, end]"),
    "slices of unequal length": (
        slices("[0, 1]", "▸[0, 2]"), 2,
        "the sources of a slice must be equally long: ./one has 1 (layers 0-0), ./two has 2 (layers 0-1)",
        "change a layer_range",
    ),
    "missing folder": (
        ties(model="  - model: ▸./tow"), 3, "models[./tow]: there is no folder './tow'", "the working directory",
    ),
    "shapes that do not fit": (
        ties(model="  - ▸model: ./wide"), 4,
        "model.embed_tokens.weight is 40x16 in one, but 40x32 in wide", "only tensors of one shape",
    ),
    "other number of layers": (ties(base="base_model: ▸./one", model="  - model: ./deep"), 4,
        "different numbers of layers in model.layers: deep has 3, one has 2", "layer_range",
    ),
    "duplicate key": (
        ties(head="▸merge_method: linear\nmodels:"), 2,
        "the key 'merge_method' was given before, on line 1", "keep one of the two",
    ),
    "aliases that explode": (LAUGHS, 2, "the recipe holds more than 20,000 values", "fewer or smaller aliases"),
}  # fmt: skip


@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe_that_cannot_be_meant_is_refused_at_its_place(case: str, refusal: Refusal) -> None:
    """Exit code, position, sentence and next step are those of the case."""
    recipe, code, sentence, step = RECIPES[case]
    found, problems = refusal(recipe)
    assert found == code
    assert list(dict.fromkeys(problem.split(" ")[0] for problem in problems)) == [f"{at}:" for at in places(recipe)]
    said, _, hint = problems[0].partition("\n    ")
    assert sentence in said
    assert step in hint


SEVERAL = """\
merge_method: ties
base_model: ./one
models:
  - model: ./two
    parameters: {weight: 1.0, ▸densty: 0.5}
  - model: ./deep
    parameters: {weight: 1.0, density: ▸1.5}
  - ▸modle: ./wide
▸dype: float16
seed: ▸soon
"""


def test_all_problems_of_a_file_are_told_at_once_in_its_order(refusal: Refusal) -> None:
    """Nobody mends one line to be told of the next; each has its own next step."""
    code, problems = refusal(SEVERAL)
    assert code == 2
    assert list(dict.fromkeys(problem.split(" ")[0] for problem in problems)) == [f"{at}:" for at in places(SEVERAL)]
    assert all("\n    " in problem for problem in problems)


# ---- models ---------------------------------------------------------------------------------------------------------

INDEX = "model.safetensors.index.json"


def header(folder: Path, entries: dict[str, object], tail: bytes = b"") -> None:
    text = json.dumps(entries).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + tail)


def cut(folder: Path, size: int) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(size)


def index(folder: Path, file: str) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))


def only_pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def one_tensor(name: str, shape: list[int], size: int, dtype: str = "F32") -> dict[str, object]:
    return {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}


OUTSIDE = f"{INDEX} points outside the model's folder"
DAMAGED: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "pickled only": (only_pickled, "has no safetensors, only pytorch_model.bin", "save_pretrained"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "has no safetensors", "model"),
    "no config": (lambda m: (m / "config.json").unlink(), "has no config.json", "name their file"),
    "config is no JSON": (lambda m: (m / "config.json").write_text("{"), "config.json is no JSON", "again"),
    "index outside": (lambda m: index(m, "../one/model.safetensors"), OUTSIDE, "damaged"),
    "index absolute": (lambda m: index(m, "/etc/passwd"), OUTSIDE, "damaged"),
    "index with backslashes": (lambda m: index(m, "..\\\\x.safetensors"), OUTSIDE, "damaged"),
    "index of what is missing": (lambda m: index(m, "x.safetensors"), "'x.safetensors', which is not there", "damaged"),
    "index without map": (lambda m: (m / INDEX).write_text("[]"), f"{INDEX} holds no weight_map", "damaged"),
    "index of another file": (
        lambda m: (m / INDEX).write_text('{"weight_map": {"x": "model.safetensors"}}'),
        "in model.safetensors, which does not hold it", "damaged",
    ),
    "tensor name outside": (
        lambda m: header(m, one_tensor("a/../../evil", [1], 4), bytes(4)),
        "a tensor's name points outside the model: 'a/../../evil'", "damaged",
    ),
    "empty file": (lambda m: cut(m, 0), "the safetensors header is cut short (0 bytes in all)", "damaged"),
    "a few bytes": (lambda m: cut(m, 5), "the safetensors header is cut short (5 bytes in all)", "damaged"),
    "cut header": (lambda m: cut(m, 100), "the safetensors header is cut short (100 bytes in all)", "damaged"),
    "cut file": (lambda m: cut(m, 9000), "has 9,000 bytes, its header promises", "damaged"),
    "header is no JSON": (
        lambda m: (m / "model.safetensors").write_bytes(b"\x04" + bytes(7) + b"nope"),
        "the safetensors header is damaged", "damaged",
    ),
    "header of another shape": (
        lambda m: header(m, one_tensor("a", [2, 3], 4), bytes(4)), "[2, 3] of F32 does not take 4 bytes", "damaged",
    ),
    "header with a gap": (
        lambda m: header(m, {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8)),
        "a does not start where the one before ends", "damaged",
    ),
    "quantised": (
        lambda m: (m / "config.json").write_text('{"quantization_config": {}}'),
        "is quantised by an unnamed method", "the model that it was quantised from",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_a_model_that_cannot_be_read_is_refused_where_the_recipe_names_it(
    case: str, refusal: Refusal, models: Path, tmp_path: Path
) -> None:
    """Damage, tricks with paths, and files that run code when they are read: each is a sentence about that model."""
    spoil, sentence, step = DAMAGED[case]
    spoil(shutil.copytree(models / "two", tmp_path / "broken"))
    recipe = ties(model="  - model: ▸./broken")
    code, (problem,) = refusal(recipe)
    said, _, hint = problem.partition("\n    ")
    assert code == 3
    assert said.startswith(f"{places(recipe)[0]}: models[./broken]: ")
    assert sentence in said
    assert step in hint


def test_every_model_that_cannot_be_read_is_told_of(refusal: Refusal, models: Path, tmp_path: Path) -> None:
    """All at once, in the recipe's order."""
    only_pickled(shutil.copytree(models / "two", tmp_path / "pickled"))
    recipe = ties(base="base_model: ▸./absent", model="  - model: ▸./pickled")
    code, problems = refusal(recipe)
    assert code == 3
    assert [problem.split(" ")[0] for problem in problems] == [f"{at}:" for at in places(recipe)]


# ---- budgets --------------------------------------------------------------------------------------------------------


def test_too_little_memory_is_refused_with_the_number_that_is_needed(refusal: Refusal) -> None:
    """Before anything is read: exit code 5, what is needed, what is allowed, and which option to raise."""
    code, (problem,) = refusal(ties(), "--max-memory", "1MB", "--quiet")
    assert code == 5
    assert re.match(r"this merge needs [\d.]+ MB of memory, and 1\.0 MB are allowed\n    \S", problem)
    assert "--max-memory" in problem


def test_too_little_disk_is_refused_with_the_number_that_is_needed(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before anything is made: exit code 5, what is needed, what is free, and what to do."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    code, (problem,) = refusal(ties(), "--quiet")
    assert code == 5
    assert re.match(r"the result needs [\d.]+ \wB of disk, and 1\.0 kB are free where 'out' shall lie\n    \S", problem)


# ---- the Hub --------------------------------------------------------------------------------------------------------

ON_THE_HUB = """\
merge_method: linear
parameters: {weight: 1.0}
models:
  - model: org/fine
  - model: ▸org/absent
  - model: ▸other/gated
  - model: ▸org/pickled
  - model: ▸org/fine@v7
  - model: ▸org/torn
"""


def test_models_on_the_hub_are_refused_all_at_once_and_without_the_token(
    hub: LoopbackHub, command: Callable[..., subprocess.CompletedProcess[str]], models: Path, tmp_path: Path
) -> None:
    """Missing, gated, pickled, at no such revision, cut short: a sentence each, and no byte beyond a header is read."""
    files = {item.name: item.read_bytes() for item in (models / "one").iterdir()}
    raw = files["model.safetensors"]
    hub.add_model("org/fine", files)
    hub.add_model("other/gated", files, gated=True)
    hub.add_model("org/pickled", {"config.json": files["config.json"], "pytorch_model.bin": raw})
    hub.add_model("org/torn", {**files, "model.safetensors": raw[:9000]})
    (tmp_path / "mine.yaml").write_text(ON_THE_HUB.replace(HERE, ""))
    hub.clear_log()
    done = command("run", "mine.yaml", "--to", "./out", cwd=tmp_path, hub=hub)
    problems = re.split(r"\n(?! {4})", done.stderr.rstrip("\n"))
    assert (done.returncode, done.stdout) == (3, "")
    assert [problem.split(" ")[0] for problem in problems] == [f"{at}:" for at in places(ON_THE_HUB)]
    sentences = [
        "there is no model org/absent on the Hub", "other/gated is gated", "only pytorch_model.bin",
        "org/fine has no revision 'v7'", "has 9,000 bytes, its header promises",
    ]  # fmt: skip
    assert all(sentence in problem for sentence, problem in zip(sentences, problems, strict=True))
    assert all("\n    " in problem for problem in problems)
    assert WRITER not in done.stderr
    assert "Traceback" not in done.stderr
    header = 8 + int.from_bytes(raw[:8], "little")
    ends = [int(r.range.split("-")[1]) for r in hub.log if r.host == "cdn" and r.range]
    assert ends
    assert max(ends) < header
    assert sum(r.sent for r in hub.log if r.host == "cdn") == 2 * header
    assert not (tmp_path / "out").exists()


def test_a_repo_that_holds_another_model_is_refused_before_a_tensor_is_read(
    hub: LoopbackHub, command: Callable[..., subprocess.CompletedProcess[str]], models: Path, tmp_path: Path
) -> None:
    """Publishing over a model needs --force; without it nothing is read or written."""
    hub.add_model("org/taken", {"config.json": b"{}", "model.safetensors": b"x" * 99})
    head = hub.head("org/taken")
    for name in ("one", "two"):
        (tmp_path / name).symlink_to(models / name)
    (tmp_path / "mine.yaml").write_text(ties())
    done = command("run", "mine.yaml", "--to", "hf://org/taken", "--quiet", cwd=tmp_path, hub=hub)
    assert done.returncode == 6
    assert done.stderr.startswith("org/taken already holds a model (config.json)\n    ")
    assert (hub.head("org/taken"), list(hub.branches("org/taken"))) == (head, ["main"])
    assert WRITER not in done.stdout + done.stderr
