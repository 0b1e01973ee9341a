"""Locks of earlier versions, kept as those versions wrote them: they still make the same bytes, and are verified.

`GOLDEN=write pytest tests/lock/test_formats.py` writes those of kinds that have none yet; one that is there is never
written again, for it stands for what somebody has published.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import adapters
import numpy as np
import pytest
import tiny
import torch
import vocabularies
import yaml
from calls import Said, called
from safetensors.torch import load_file, save_file
from torch import Tensor

from merger.lock import formats
from merger.models.side_files import MEASURED_NAME
from merger.planning import plan as plan_module
from merger.runtime import install_command

GOLDEN = Path(__file__).parents[1] / "golden" / "locks"
OF_THE_MACHINE = {"adapters", "extract", "lora"}
"""Kinds whose last bits are those of LAPACK and BLAS, which differ from machine to machine: their plan is held."""

SLICES = """\
base_model: ./a
slices:
  - sources: [{model: ./a, layer_range: [0, 1]}, {model: ./b, layer_range: [0, 1]}]
    merge_method: linear
    parameters: {weight: [{filter: self_attn, value: 0.3}, {value: 0.6}]}
  - sources: [{model: ./b, layer_range: [0, 2]}]
    merge_method: passthrough
"""
GRADIENTS = """\
merge_method: task_arithmetic
base_model: ./a
models:
  - {model: ./b, parameters: {weight: [0.2, 0.9]}}
  - {model: ./c, parameters: {weight: 0.5}}
parameters: {lambda: [1.0, 0.5]}
"""
DARE = """\
merge_method: dare_ties
base_model: ./a
models: [{model: ./b, parameters: {weight: 0.6, density: 0.5}}, {model: ./c, parameters: {weight: 0.4, density: 0.7}}]
seed: 42
"""
LORA = "merge_method: linear\nmodels: [{model: ./a+./lora}, {model: ./b}]\nparameters: {weight: 0.5}\n"
UNION = """\
merge_method: linear
models: [{model: ./words-a}, {model: ./words-b}]
parameters: {weight: 0.5}
tokenizer: {source: union}
chat_template: chatml
"""
MIXTURE = """\
base_model: ./a
gate_mode: random
dtype: bfloat16
experts: [{source_model: ./b}, {source_model: ./c}]
"""
STAGES = """\
name: both
merge_method: linear
models: [{model: ./a}, {model: ./b}]
parameters: {weight: 0.5}
dtype: float32
---
merge_method: ties
base_model: ./c
models: [{model: both}, {model: ./b}]
parameters: {density: 0.6, weight: 0.5}
"""
FP8 = "merge_method: linear\nmodels: [{model: ./fp8}, {model: ./b}]\nparameters: {weight: 0.5}\n"
MODULES = """\
merge_method: passthrough
modules:
  language_model.model.layers:
    slices:
      - sources: [{model: ./towers-a, layer_range: [0, 2]}]
      - sources: [{model: ./towers-b, layer_range: [1, 2], parameters: {scale: 0.5}}]
  vision_tower.encoder.layers:
    models: [{model: ./towers-b}]
"""
ADAPTERS = "merge_method: linear\nadapters: [{model: ./lora}, {model: ./lora-b}]\nparameters: {weight: 0.5}\n"
EXTRACT = ("extract-lora", "./b", "./a", "--rank", "3")

KINDS: Mapping[str, str | tuple[str, ...]] = {
    "slices": SLICES, "gradients": GRADIENTS, "dare": DARE, "lora": LORA, "union": UNION, "mixture": MIXTURE,
    "stages": STAGES, "fp8": FP8, "modules": MODULES, "adapters": ADAPTERS, "extract": EXTRACT,
}  # fmt: skip


# ---- parents whose bytes are the same everywhere --------------------------------------------------------------------


def drawn(name: str, like: Tensor) -> Tensor:
    """Numbers of a hash, for torch's own draws may differ in a last bit from machine to machine."""
    words = np.frombuffer(hashlib.shake_256(name.encode()).digest(2 * like.numel()), "<i2")
    return torch.from_numpy(words.astype(np.float32) / 2**17).reshape(like.shape).to(like.dtype)


def redrawn(folder: Path) -> Path:
    """The same model with drawn numbers."""
    for file in folder.glob("*.safetensors"):
        held = {name: drawn(f"{folder.name}/{name}", tensor) for name, tensor in load_file(file).items()}
        save_file(held, file, metadata={"format": "pt"})
    return folder


def adapter(folder: Path, model: Path) -> Path:
    """A LoRA of the model, with a config that is the same wherever it is made."""
    redrawn(adapters.lora(folder, model))
    said = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": list(adapters.ALL_LINEAR)}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def towers(folder: Path) -> Path:
    """A model of two stacks of layers."""
    stacks = ("language_model.model.layers", 2), ("vision_tower.encoder.layers", 3)
    names = [f"{stack}.{layer}.mlp.{role}.weight" for stack, count in stacks for layer in range(count) for role in "xy"]
    held = {name: drawn(f"{folder.name}/{name}", torch.empty(6, 4)) for name in ["embed.weight", *names]}
    inner = {"text_config": {"num_hidden_layers": 2}, "vision_config": {"num_hidden_layers": 3}}
    return tiny.write(folder, held, config=inner)


def quantised(folder: Path) -> Path:
    """A model in eight bits with a scale for each row."""
    held = dict[str, Tensor]()
    for name, tensor in tiny.tensors(5).items():
        held[name] = drawn(f"{folder.name}/{name}", tensor)
        if "_proj" in name:
            held[name] = (held[name].float() * 64).to(torch.float8_e4m3fn)
            held[f"{name}_scale"] = drawn(f"{name}/scale", torch.empty(len(tensor), 1)).abs() / 8 + 0.01
    return tiny.write(folder, held, quantization_config={"quant_method": "fbgemm_fp8"})


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the models of all recipes."""
    root = tmp_path_factory.mktemp("parents")
    for seed, name in enumerate("abc"):
        redrawn(tiny.model(root / name, seed))
    for name in ("lora", "lora-b"):
        adapter(root / name, root / "a")
    redrawn(vocabularies.model(root / "words-a", 1, ["<|im_start|>"]))
    redrawn(vocabularies.model(root / "words-b", 2, ["<|im_end|>", "<extra>"]))
    quantised(root / "fp8")
    for name in ("towers-a", "towers-b"):
        towers(root / name)
    return root


def made(kind: str, parents: Path, out: Path) -> Path:
    """The lock of this version's own merge of the kind."""
    line = KINDS[kind]
    if isinstance(line, str):
        (out.parent / "mine.yaml").write_text(line)
        line = ("run", str(out.parent / "mine.yaml"))
    done = called([*line, "--to", str(out), "--quiet"])
    assert done.code == 0, done.err
    return out / "merger.lock.yaml"


# ---- what holds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_lock_of_an_earlier_version_makes_its_bytes_and_is_verified(
    kind: str, parents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan that it names, the files that it lists; and a result that lies beside it is told to be what it says.

    Of a method whose bits are others by now, which version made it.
    """
    monkeypatch.chdir(parents)
    golden, out = GOLDEN / f"{kind}.lock.yaml", tmp_path / "out"
    if os.environ.get("GOLDEN") == "write" and not golden.exists():
        golden.write_bytes(made(kind, parents, tmp_path / "first").read_bytes())
    done = called(["run", str(golden), "--to", str(out), "--quiet"])
    if kind == "dare":  # format 1: its masks were PCG64's
        assert done.code == 7
        assert "made it (format 1)" in done.err
        assert "random masks are drawn by another generator" in done.err
        return
    assert done.code == 0, done.err
    then, now = (yaml.safe_load(path.read_text()) for path in (golden, out / "merger.lock.yaml"))
    assert then["plan"] == now["plan"]
    if kind not in OF_THE_MACHINE:
        (was,), (measured,) = (
            [file for file in lock["output"] if file["file"] == MEASURED_NAME] for lock in (then, now)
        )
        assert [file for file in then["output"] if file not in [*now["output"], was]] == []
        text = golden.read_text().replace(
            was["sha256"], measured["sha256"]
        )  # sums in another order have other last digits
        (out / "merger.lock.yaml").write_text(text.replace(f"size: {was['size']}", f"size: {measured['size']}"))
    verified = called(["verify", str(out), "--all"])
    assert verified.code == 0, verified.err


# ---- and where anything is otherwise by now -------------------------------------------------------------------------

NOW, NEXT = formats.FORMAT, formats.FORMAT + 1
LATER = formats.FormatChange(NEXT, "layers are counted from 1")
OTHER_BITS = formats.FormatChange(NEXT, "task_arithmetic rounds otherwise", frozenset({"task_arithmetic"}))
SAYS = (
    f"merger 0.1.0 made it (format {NOW}), and {{}} makes another merge of the same recipe: {{}}\n"
    f"    use the version that made it: {install_command(version='0.1.0')}"
)


@pytest.fixture
def merge(parents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A merge of today, as somebody has published it; the tests go on a version later."""
    monkeypatch.chdir(parents)
    made("gradients", parents, tmp_path / "out")
    return tmp_path / "out"


def later(monkeypatch: pytest.MonkeyPatch, change: formats.FormatChange) -> str:
    """From now on this is a version with the change; what it says of an earlier lock."""
    monkeypatch.setattr(formats, "FORMAT", NEXT)
    monkeypatch.setattr(formats, "CHANGES", (change,))
    return SAYS.format(version("hub-merger"), change.what)


def again(merge: Path, command: str) -> Said:
    """The command, told of the lock of the merge."""
    line = ["verify", str(merge), "--all"]
    return called(line if command == "verify" else ["run", str(merge / "merger.lock.yaml"), "--to", f"{merge}-again"])


both = pytest.mark.parametrize("command", ["run", "verify"])


@both
def test_a_change_that_does_not_touch_a_recipe_leaves_its_bytes(
    command: str, merge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock that is written names the format by whose meaning it was planned."""
    later(monkeypatch, LATER)
    done = again(merge, command)
    assert done.code == 0, done.err
    if command == "run":
        assert (Path(f"{merge}-again") / "merger.lock.yaml").read_bytes() == (merge / "merger.lock.yaml").read_bytes()


@both
def test_a_recipe_that_means_something_else_by_now_is_said_to_and_not_to_be_forged(
    command: str, merge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which version made it, what has changed since, and how to get that version."""
    says = later(monkeypatch, LATER)
    real = plan_module._make_jobs

    def otherwise(*given: Any) -> Any:
        making, config = real(*given)
        return making, {**config, "counted": 1}

    monkeypatch.setattr(plan_module, "_make_jobs", otherwise)
    done = again(merge, command)
    assert (done.code, done.err.strip()) == (7, says)


@both
def test_bits_that_come_out_otherwise_by_now_are_said_to_and_not_to_be_forged(
    command: str, merge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the plan is the same and the method makes other numbers of it."""
    says = later(monkeypatch, OTHER_BITS)
    shard = merge / "model.safetensors"
    held = {name: tensor * 2 for name, tensor in load_file(shard).items()}
    save_file(held, shard, metadata={"format": "pt"})
    done = again(merge, command)
    assert done.code == 7
    assert says.splitlines()[0] in done.out + done.err
    assert says.splitlines()[1] in done.out + done.err


@both
@pytest.mark.parametrize(("inner", "code"), [("mlp.up_proj.weight", 0), ("mlp.experts.down_proj", 7)])
def test_bits_that_come_out_otherwise_of_some_tensors_leave_recipes_without_them(
    command: str, inner: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of singular values only those of stacked experts are others since format 2."""
    monkeypatch.chdir(tmp_path)
    name = f"model.layers.0.{inner}"
    for model in "ab":
        tiny.write(tmp_path / model, {name: drawn(model, torch.empty((2, 4, 3) if "experts" in name else (4, 3)))})
    (tmp_path / "mine.yaml").write_text("merge_method: iso_c\nbase_model: ./a\nmodels: [{model: ./b}]\n")
    assert called(["run", "mine.yaml", "--to", "out", "--quiet"]).code == 0
    (change,) = (change for change in formats.CHANGES if "iso_c" in change.methods)
    says = later(monkeypatch, dataclasses.replace(change, format=NEXT))
    if command == "verify" and code:
        shard = tmp_path / "out" / "model.safetensors"
        save_file({name: load_file(shard)[name] * 2}, shard, metadata={"format": "pt"})
    done = again(tmp_path / "out", command)
    assert done.code == code, done.err
    assert all((line in done.out + done.err) == bool(code) for line in says.splitlines())


@both
def test_a_lock_of_a_later_version_is_refused_by_its_format(command: str, merge: Path) -> None:
    """It may say what this one cannot understand."""
    lock = merge / "merger.lock.yaml"
    text = lock.read_text().replace(f"format: {NOW}", f"format: {NEXT}")
    lock.write_text(text.replace("hub-merger: 0.1.0", "hub-merger: 0.9.0"))
    done = again(merge, command)
    assert done.code == 7
    assert f"is of format {NEXT}, and merger 0.1.0 knows {NOW} at most" in done.err
    assert install_command(version="0.9.0") in done.err
