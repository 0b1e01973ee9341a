"""NaN and infinities of a model are refused by the model's and the tensor's name, or kept where a recipe says so.

Not here: what methods make of finite numbers (tests/methods).
"""

from __future__ import annotations

import math
from pathlib import Path

import measured
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from merging import merged

from merger.cli import text as console
from merger.engine.execute import Observed
from merger.engine.finite import is_finite, not_finite
from merger.errors import MismatchError
from merger.methods.registry import methods
from merger.planning.geometry import load_geometry
from merger.recipe.model import ModelRef
from merger.run import pipeline as run
from merger.run import prepare as planning
from merger.run.options import Options
from merger.verification import verify

UP = "model.layers.{}.mlp.up_proj.weight"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "C64": torch.complex64,
    "I8": torch.int8, "U8": torch.uint8, "I64": torch.int64, "BOOL": torch.bool,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound ones, one with a NaN and an infinity, one with a number that float16 does not reach."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("sound", "other", "broken", "large")):
        held = tiny.tensors(seed, dtype=torch.float32 if name == "large" else torch.bfloat16)
        if name == "broken":
            held[UP.format(0)][0, 0], held[UP.format(1)][1, 2] = math.nan, math.inf
        if name == "large":
            held[UP.format(0)][0, 0] = 200_000.0
        tiny.write(root / name, held)
        for kind in measured.KINDS:
            measured.write(root / f"{name}-{kind}", root / name, kind)
    tiny.lora(root / "lora", root / "sound", rank=2)
    return root


def listed(models: Path, *names: str, parameters: str = "", kind: str | None = None) -> str:
    """The models of a recipe, with statistics of a kind."""
    told = f", parameters: {parameters}" if parameters else ""
    told += f", statistics: {models}/NAME-{kind}" if kind else ""
    return "models: [" + ", ".join(f"{{model: {models / name}{told.replace('NAME', name)}}}" for name in names) + "]\n"


def recipe_of(method: str, models: Path) -> str:
    """A recipe of sound models and the broken one, by any method."""
    found = methods()[method]
    names = ["broken"] if found.models[1] == 1 else ["other", "broken"]
    if found.models[0] == found.models[1] == 2 and found.base == "first":
        names = ["broken"]
    base = f"base_model: {models / 'sound'}\n" if found.takes_base else ""
    names += ["sound"] if found.of_base else []
    needed = {param.name: "0.5" for param in found.params if param.required}
    told = "parameters: {" + ", ".join(f"{name}: {value}" for name, value in needed.items()) + "}\n" if needed else ""
    return f"merge_method: {method}\n{base}{told}{listed(models, *names, kind=found.statistics)}"


@pytest.mark.parametrize("method", sorted(methods()))
def test_every_method_names_the_parent_and_the_tensors_once(method: str, models: Path, tmp_path: Path) -> None:
    """Also where NaN breaks what sorts or decomposes; and nothing is left."""
    with pytest.raises(MismatchError) as caught:
        merged(recipe_of(method, models), tmp_path / "out")
    assert [(problem.where, problem.what) for problem in caught.value.problems] == [
        (f"tensor {UP.format(layer)}", "1 entry of broken is NaN or infinite") for layer in (0, 1)
    ]
    assert all("allow_non_finite: true" in str(problem.hint) for problem in caught.value.problems)
    assert not (tmp_path / "out").exists()


def test_an_adapter_or_a_stage_that_is_not_finite_is_named_too(models: Path, tmp_path: Path) -> None:
    """What is added to a model is told apart from it; what a stage is made of is found."""
    broken = tiny.lora(tmp_path / "odd", models / "sound", rank=2)
    file = broken / "adapter_model.safetensors"
    held = tiny.read(broken)
    name = next(name for name in held if "up_proj.lora_B" in name)
    held[name][0, 0] = math.nan
    from safetensors.torch import save_file

    save_file(held, file, metadata={"format": "pt"})
    with pytest.raises(MismatchError, match=rf"tensor {name}: 1 entry of odd is NaN or infinite"):
        merged(f"merge_method: linear\nmodels: [{{model: {models / 'sound'}+{broken}}}]\n", tmp_path / "out")
    stages = f"name: first\nmerge_method: linear\n{listed(models, 'sound', 'broken')}---\nmerge_method: linear\n"
    with pytest.raises(MismatchError, match=r"1 entry of broken is NaN or infinite"):
        merged(f"{stages}models: [{{model: first}}, {{model: {models / 'other'}}}]\n", tmp_path / "out")


def test_what_float16_does_not_reach_is_told_from_what_a_parent_holds(models: Path, tmp_path: Path) -> None:
    """No parent is blamed."""
    text = f"merge_method: linear\ndtype: float16\n{listed(models, 'sound', 'large')}"
    with pytest.raises(MismatchError) as caught:
        merged(text, tmp_path / "out")
    (problem,) = caught.value.problems
    assert problem.what == "a value is beyond float16, which ends at 65,504, and no parent holds NaN or an infinity"
    assert (problem.where, problem.hint) == (f"tensor {UP.format(0)}", "write dtype: bfloat16 or float32")


@pytest.mark.parametrize("method", ["passthrough", "linear", "ties", "dare_ties", "slerp", "fisher"])
def test_a_recipe_may_allow_them_and_the_result_says_so(method: str, models: Path, tmp_path: Path) -> None:
    """A warning in run and card, the counts for a card that is rendered again, and a verification that passes."""
    path, out = tmp_path / "r.yaml", tmp_path / "out"
    path.write_text(f"allow_non_finite: true\n{recipe_of(method, models)}")
    options = Options(to=str(out), threads=1)
    planned, store = planning.plan(planning.read_recipe(path), options)
    done = run.merge(planned, store, options)
    told = f"2 of broken's entries are NaN or infinite, in {UP.format(0)} (1), {UP.format(1)} (1)"
    assert f"warning: {told}" in console.result_text(done)
    assert told.replace("_", "\\_") in (out / "README.md").read_text()
    odd = {
        name: found.odd
        for name, found in load_geometry((out / "merger.measured.json").read_text()).items()
        if found.odd
    }
    assert set(odd) == {UP.format(0), UP.format(1)}
    assert set(odd.values()) == {((planned.locked.index(ModelRef(str(models / "broken"))), 1),)}
    assert not torch.isfinite(tiny.read(out)[UP.format(0)].float()).all()
    for extent in (verify.Extent(), verify.Extent(everything=True)):
        report = verify.verify(str(out), Options(threads=1), extent)
        assert report.passed


def test_what_is_allowed_is_no_leave_to_overflow(models: Path, tmp_path: Path) -> None:
    """A result that no parent's entry explains is refused all the same."""
    text = f"merge_method: linear\nallow_non_finite: true\ndtype: float16\n{listed(models, 'sound', 'large')}"
    with pytest.raises(MismatchError, match="beyond float16"):
        merged(text, tmp_path / "out")


def test_the_key_changes_no_other_plan(models: Path, tmp_path: Path) -> None:
    """A recipe without it, or with false, has the plan that it always had; with it another one."""
    hashes = []
    for line in ("", "allow_non_finite: false\n", "allow_non_finite: true\n"):
        path = tmp_path / "r.yaml"
        path.write_text(f"{line}merge_method: linear\n{listed(models, 'sound', 'other')}")
        hashes.append(planning.plan(planning.read_recipe(path), Options())[0].hash)
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_copy_keeps_every_bit_of_finite_and_allowed_tensors(tmp_path: Path) -> None:
    """Of every dtype: the largest and smallest finite pattern pass the look; each odd one is counted."""
    for dtype, kind in DTYPES.items():
        every = np.arange(1 << 16, dtype=np.uint16).view(np.uint8)
        size = torch.empty(0, dtype=kind).element_size()
        raw = np.concatenate([every, np.zeros(-len(every) % size, np.uint8)]) if dtype != "BOOL" else every % 2
        entries = torch.frombuffer(bytearray(raw.tobytes()), dtype=kind)
        if dtype == "C64":
            odd = int((~torch.isfinite(torch.view_as_real(entries))).sum())
        else:
            odd = int((~torch.isfinite(entries.to(torch.float64))).sum()) if kind.is_floating_point else 0
        assert not_finite(memoryview(raw), dtype) == odd, dtype
        assert is_finite(memoryview(raw), dtype) == (odd == 0)


@given(st.sampled_from(["F32", "BF16", "F16", "F64", "F8_E4M3", "F8_E5M2"]), st.binary(min_size=0, max_size=400))
def test_the_look_agrees_with_torch(dtype: str, raw: bytes) -> None:
    """On any bytes."""
    size = torch.empty(0, dtype=DTYPES[dtype]).element_size()
    raw = raw[: len(raw) // size * size]
    entries = torch.frombuffer(bytearray(raw), dtype=DTYPES[dtype]) if raw else torch.empty(0)
    odd = int((~torch.isfinite(entries.to(torch.float64))).sum())
    assert not_finite(memoryview(raw), dtype) == odd
    assert is_finite(memoryview(raw), dtype) == (odd == 0)


def test_each_entry_that_is_allowed_is_counted_once(tmp_path: Path) -> None:
    """Of a tensor that is looked at in spans, too, before all of it is read."""
    drawn = [torch.randn(300, 700, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    drawn[1][::3] = torch.nan
    places = [tiny.write(tmp_path / str(seed), {"model.norm.w": held}) for seed, held in enumerate(drawn)]
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"merge_method: ties\nbase_model: {places[0]}\nallow_non_finite: true\nparameters: {{density: 0.5}}\n"
        f"models: [{{model: {places[1]}}}]\n"
    )
    options, seen = Options(to=str(tmp_path / "out")), list[object]()
    planned, store = planning.plan(planning.read_recipe(recipe), options)
    run.merge(planned, store, options, seen.append)
    (found,) = [event.geometry.odd for event in seen if isinstance(event, Observed)]
    assert [count for _, count in found] == [100 * 700]
