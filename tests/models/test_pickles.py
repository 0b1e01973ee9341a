"""Models in pytorch_model.bin: read when asked, by the places of their tensors; nothing that stands in them is run."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tiny
import torch
from loopback import LoopbackHub
from merging import merged

from merger.errors import ModelError, RecipeError

if TYPE_CHECKING:
    from conftest import Command

BIN, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def pickled(folder: Path, seed: int, files: int = 1) -> Path:
    """A small Mistral as torch.save writes it, in one file or in several with an index."""
    tiny.model(folder, seed)
    (folder / "model.safetensors").unlink()
    held = tiny.tensors(seed)
    if files == 1:
        torch.save(OrderedDict(held), folder / BIN)
        return folder
    names = {f"pytorch_model-{n + 1:05d}-of-{files:05d}.bin": list(held)[n::files] for n in range(files)}
    for file, keys in names.items():
        torch.save({key: held[key] for key in keys}, folder / file)
    weight_map = {key: file for file, keys in names.items() for key in keys}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def ties(one: object, other: object, base: object) -> str:
    listed = f"[{{model: {one}}}, {{model: {other}}}]"
    return f"merge_method: ties\nbase_model: {base}\nmodels: {listed}\nparameters: {{density: 0.5}}\n"


@pytest.mark.parametrize("files", [1, 3])
def test_models_of_pickles_merge_as_the_same_in_safetensors(files: int, tmp_path: Path) -> None:
    """One file or several; with such a model for the base, too. What comes out is safetensors."""
    plain = [tiny.model(tmp_path / f"plain{seed}", seed) for seed in range(3)]
    bins = [pickled(tmp_path / f"bin{seed}", seed, files) for seed in range(3)]
    merged(ties(*plain), tmp_path / "expected")
    merged(ties(*bins), tmp_path / "out", allow_pickle=True)
    found, expected = tiny.read(tmp_path / "out"), tiny.read(tmp_path / "expected")
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert len([*(tmp_path / "out").glob("model*.safetensors")]) == files


def test_their_merge_is_verified_and_carded_when_asked(tmp_path: Path, served: LoopbackHub, command: Command) -> None:
    """As whoever made it was asked; else the sentence says what to do."""
    bins = [pickled(tmp_path / f"bin{seed}", seed) for seed in range(3)]
    out = tmp_path / "out"
    merged(ties(*bins), out, allow_pickle=True)
    for words in (["verify", str(out)], ["card", str(out), "--print"]):
        assert "let --allow-pickle look" in command(*words, cwd=tmp_path, hub=served).stderr
        assert command(*words, "--allow-pickle", cwd=tmp_path, hub=served).returncode == 0


def test_they_are_read_only_when_asked(tmp_path: Path) -> None:
    """The sentence says what to do; where there are safetensors they are taken, asked or not."""
    one = pickled(tmp_path / "one", 0)
    recipe = f"merge_method: passthrough\nmodels: [{{model: {one}}}]\n"
    with pytest.raises(ModelError, match=r"has no safetensors, only pytorch_model.bin[\s\S]*--allow-pickle"):
        merged(recipe, tmp_path / "out")
    both = tiny.model(tmp_path / "both", 5)
    torch.save({"model.norm.weight": torch.zeros(16)}, both / BIN)
    merged(recipe.replace(str(one), str(both)), tmp_path / "out", allow_pickle=True)
    assert torch.equal(tiny.read(tmp_path / "out")["model.norm.weight"], tiny.tensors(5)["model.norm.weight"])


def test_from_the_hub_only_its_tensors_and_its_directory_are_read(
    served: LoopbackHub, command: Command, tmp_path: Path
) -> None:
    """By range, with the command's option; the result is that of a folder."""
    served.add_model("org/pickled", pickled(tmp_path / "one", 3))
    (tmp_path / "mine.yaml").write_text("merge_method: passthrough\nmodels: [{model: org/pickled}]\n")
    done = command("run", "mine.yaml", "--to", "out", "--allow-pickle", cwd=tmp_path, hub=served)
    assert done.returncode == 0, done.stderr
    found = tiny.read(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in tiny.tensors(3).items())


def test_tensors_of_every_dtype_shared_or_parts_of_one_storage_are_found(tmp_path: Path) -> None:
    """Views that are runs of another tensor's numbers, two names of one tensor, parameters, single numbers, none."""
    whole = torch.arange(24.0).reshape(4, 6)
    kinds = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
             torch.uint8, torch.bool)  # fmt: skip
    held = {str(dtype): torch.ones(3, 2).to(dtype) for dtype in kinds}
    held |= {"whole": whole, "rows": whole[1:3], "again": whole, "one": torch.tensor(7.0), "none": torch.empty(0, 5),
             "parameter": torch.nn.Parameter(torch.ones(2)), "side": torch.ones(3, 1).t()}  # fmt: skip
    (tmp_path / "a").mkdir()
    torch.save(held, tmp_path / "a" / BIN)
    (tmp_path / "a/config.json").write_text('{"model_type": "any"}')
    merged(f"merge_method: passthrough\nmodels: [{{model: {tmp_path}/a}}]\n", tmp_path / "out", allow_pickle=True)
    found = tiny.read(tmp_path / "out")
    assert set(found) == set(held)
    for name, tensor in held.items():
        assert torch.equal(found[name], tensor.detach()), name
        assert found[name].dtype == tensor.dtype


# ---- what is not read ------------------------------------------------------------------------------------------------


class _Runs:
    """As loaded by pickle itself it would write a file."""

    def __init__(self, place: Path) -> None:
        self._place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self._place), "w")


def _zip(folder: Path, payload: bytes, compressed: bool = False) -> None:
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(folder / BIN, "w", kind) as archive:
        archive.writestr("archive/data.pkl", payload)


def _legacy(folder: Path) -> None:
    torch.save({"a": torch.ones(2)}, folder / BIN, _use_new_zipfile_serialization=False)


def _cut(folder: Path) -> None:
    torch.save({"a": torch.ones(200)}, folder / BIN)
    (folder / BIN).write_bytes((folder / BIN).read_bytes()[:-500])


def _beyond(folder: Path) -> None:
    torch.save({"a": torch.ones(4)}, folder / BIN)
    with zipfile.ZipFile(folder / BIN) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(folder / BIN, "w") as archive:
        for name, content in held.items():
            archive.writestr(name, content.replace(b"K\x04\x85", b"K\x40\x85"))


# pickles by hand: a call of a stub that is then told to be another
_ON_A_STUB = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}U\x08__dict__}sb."
_COPIES = pickle.dumps({"x": 1}, 2)[:-1] + b"0ccollections\nOrderedDict\n(]((U\x01aK\x01tee\x85R."

REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "code": (lambda f: torch.save({"a": _Runs(f / "ran")}, f / BIN), "asks for io.open, which is no tensor"),
    "a module": (lambda f: torch.save(torch.nn.Linear(2, 2), f / BIN), "asks for torch.nn.modules.linear.Linear"),
    "numpy": (lambda f: _zip(f, b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n."), "asks for numpy.core.multiarray"),
    "a number": (lambda f: torch.save({"a": torch.ones(2), "step": 3}, f / BIN), "holds 'step', which is no tensor"),
    "a list": (lambda f: torch.save([torch.ones(2)], f / BIN), "holds no tensors by name"),
    "a transposed view": (lambda f: torch.save({"a": torch.ones(2, 3).t()}, f / BIN), "a is a view of other numbers"),
    "spread numbers": (lambda f: torch.save({"a": torch.ones(1).expand(4)}, f / BIN), "a is a view of other numbers"),
    "numbers that are not there": (_beyond, "a reaches beyond its numbers"),
    "the old format": (_legacy, "in the format that torch wrote before 2020"),
    "no zip": (lambda f: (f / BIN).write_bytes(b"nothing"), "is damaged"),
    "an empty file": (lambda f: (f / BIN).write_bytes(b""), "is damaged"),
    "a cut file": (_cut, "is damaged"),
    "another zip": (lambda f: zipfile.ZipFile(f / BIN, "w").close(), "is no file that torch.save wrote"),
    "a compressed zip": (lambda f: _zip(f, b"\x80\x02}.", compressed=True), "is no file that torch.save wrote"),
    "changes of what stands in": (lambda f: _zip(f, _ON_A_STUB), "is damaged"),
    "copies of copies": (lambda f: _zip(f, _COPIES), "is damaged"),
    "numbers elsewhere": (lambda f: _zip(f, b"\x80\x02U\x01aQ."), "is damaged"),
    "another key": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"a": "../evil.bin"}}'), f"{INDEX} points outside",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_tensor_is_refused_and_not_run(case: str, tmp_path: Path) -> None:
    """Code, other objects, views that no run of bytes holds, damage: a sentence at the model's place in the recipe."""
    spoil, sentence = REFUSED[case]
    (tmp_path / "a").mkdir()
    (tmp_path / "a/config.json").write_text('{"model_type": "any"}')
    spoil(tmp_path / "a")
    with pytest.raises(ModelError) as caught:
        merged(f"merge_method: passthrough\nmodels: [{{model: {tmp_path}/a}}]\n", tmp_path / "out", allow_pickle=True)
    (problem,) = caught.value.problems
    assert sentence in problem.what
    assert problem.at is not None
    assert problem.hint
    assert not (tmp_path / "a/ran").exists()


def test_a_single_pickle_is_not_a_model(tmp_path: Path) -> None:
    """A recipe names the folder, where the names tell what the file is."""
    with pytest.raises(RecipeError, match=r"a\.bin is not in safetensors"):
        merged("merge_method: passthrough\nmodels: [{model: ./a.bin}]\n", tmp_path / "out", allow_pickle=True)
