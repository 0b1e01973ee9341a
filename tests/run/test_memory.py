"""Peak memory is planned, kept, and does not grow with the model: measured from the process itself (VmHWM)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import measured as statistics
import pytest
import tiny
from loopback import LoopbackHub
from thorough import THOROUGH, thorough_only

METHODS = {"linear": "{}", "slerp": "{t: 0.5}", "ties": "{density: 0.5}", "dare_ties": "{density: 0.5}"}
STAGES = [("iso_c", "ties"), ("slerp", "ties"), ("ties", "linear")]
RUN = """
import json, sys
from merger.cli.commands import main
from merger.run.options import Options
from merger.run.prepare import plan, read_recipe as read
from pathlib import Path
recipe, to, memory, *more = sys.argv[1:]
planned, _ = plan(read(Path(recipe)), Options(to=to, threads=2, max_memory=int(memory) or None))
allowed = ["--max-memory", memory] if int(memory) else []
code = main(["run", recipe, "--to", to, "--quiet", "--threads", "2", *allowed, *more])
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"code": code, "peak": peak, "planned": planned.peak_memory, "threads": planned.threads}))
"""


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Three models of 24 MB each and three of 120 MB."""
    root = tmp_path_factory.mktemp("memory")
    shapes = {"small": {"layers": 2, "vocab": 8000}, "large": {"layers": 12, "vocab": 32000}}
    return {
        size: [tiny.model(root / f"{size}{seed}", seed, hidden=512, middle=1408, **shape) for seed in range(3)]
        for size, shape in shapes.items()
    }


def measured(
    method: str,
    models: Sequence[Path | str],
    folder: Path,
    memory: int = 0,
    to: str = "",
    env: Mapping[str, str] = os.environ,
    more: Sequence[str] = (),
) -> dict[str, int]:
    """Run a merge in a process of its own; its peak memory and what was planned."""
    listed = ", ".join(f"{{model: {model}}}" for model in (models[1:2] if method == "slerp" else models[1:]))
    text = f"merge_method: {method}\nbase_model: {models[0]}\nmodels: [{listed}]\nparameters: {METHODS[method]}\n"
    return measured_of(text, folder, memory, to, env, more)


def measured_of(
    text: str,
    folder: Path,
    memory: int = 0,
    to: str = "",
    env: Mapping[str, str] = os.environ,
    more: Sequence[str] = (),
) -> dict[str, int]:
    """The same for a recipe as it is written."""
    folder.mkdir()
    recipe = folder / "recipe.yaml"
    recipe.write_text(text)
    command = [sys.executable, "-c", RUN, str(recipe), to or str(folder / "out"), str(memory), *more]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    answer: dict[str, int] = json.loads(done.stdout)
    return answer


@pytest.mark.parametrize("method", METHODS if THOROUGH else ["dare_ties"])
def test_memory_is_planned_and_does_not_grow(method: str, parents: dict[str, list[Path]], tmp_path: Path) -> None:
    """A model five times as large takes the same memory, which is no more than the plan says, nor much less."""
    small = measured(method, parents["small"], tmp_path / "small")
    large = measured(method, parents["large"], tmp_path / "large")
    for found in (small, large):
        assert found["code"] == 0
        assert found["peak"] <= found["planned"] < 2.5 * found["peak"]
    assert large["peak"] < 1.15 * small["peak"]
    assert large["planned"] < 1.02 * small["planned"]


@thorough_only
@pytest.mark.parametrize(("stage", "result"), STAGES)
def test_the_memory_of_stages_is_planned(
    stage: str, result: str, parents: dict[str, list[Path]], tmp_path: Path
) -> None:
    """Stages that are computed on the way, kept on disk or made of whole matrices take no more than the plan says."""
    base, one, two = parents["small"]
    needs = {"slerp": "parameters: {t: 0.5}\n"}.get(stage, "")
    listed = f"[{{model: {one}}}]" if stage == "slerp" else f"[{{model: {one}}}, {{model: {two}}}]"
    found = measured_of(
        f"name: first\nmerge_method: {stage}\nbase_model: {base}\nmodels: {listed}\n{needs}---\n"
        f"merge_method: {result}\nbase_model: {base}\nmodels: [{{model: first}}, {{model: {two}}}]\n",
        tmp_path / "stages",
    )
    assert found["code"] == 0
    assert found["peak"] <= found["planned"] < 2.5 * found["peak"]


@thorough_only
def test_a_smaller_allowance_is_kept(parents: dict[str, list[Path]], tmp_path: Path) -> None:
    """--max-memory below what two threads would take is met with fewer threads."""
    free = measured("ties", parents["small"], tmp_path / "free")
    kept = measured("ties", parents["small"], tmp_path / "kept", memory=free["planned"] - 1)
    assert kept["code"] == 0
    assert kept["threads"] < free["threads"]
    assert kept["peak"] <= kept["planned"] < free["planned"]


@thorough_only
def test_memory_is_kept_from_hub_to_hub(served: LoopbackHub, parents: dict[str, list[Path]], tmp_path: Path) -> None:
    """Read ahead and upload are in the plan too: models read from the Hub and the merge published there."""
    models = [f"org/ties-{number}" for number in range(3)]
    for name, folder in zip(models, parents["large"], strict=True):
        served.add_model(name, folder)
    env = {**os.environ, **served.env(tmp_path / "home", "hf_writer_of_org")}
    found = measured("ties", models, tmp_path / "hub", to="hf://org/ties", env=env)
    assert found["code"] == 0
    assert found["peak"] <= found["planned"] < 3 * found["peak"]


@pytest.fixture(scope="module")
def loras(parents: dict[str, list[Path]]) -> dict[str, list[Path]]:
    """An adapter of rank 64 for each of them but the base."""
    return {
        size: [tiny.lora(of.parent / f"{of.name}-lora", of) for of in models[1:]] for size, models in parents.items()
    }


@thorough_only
def test_memory_is_kept_with_adapters(
    parents: dict[str, list[Path]], loras: dict[str, list[Path]], tmp_path: Path
) -> None:
    """A model with an adapter is never held as a whole: a larger one takes the same memory."""
    found = {}
    for size, (base, *others) in parents.items():
        models = [str(base), *(f"{model}+{lora}" for model, lora in zip(others, loras[size], strict=True))]
        found[size] = measured("ties", models, tmp_path / size)
        assert found[size]["code"] == 0
        assert found[size]["peak"] <= found[size]["planned"] < 2.5 * found[size]["peak"]
    assert found["large"]["peak"] < 1.15 * found["small"]["peak"]


@thorough_only
def test_memory_is_kept_with_adapters_from_the_hub(
    served: LoopbackHub, parents: dict[str, list[Path]], loras: dict[str, list[Path]], tmp_path: Path
) -> None:
    """There the small matrices wait on disk, for each block needs one of them whole."""
    base, *others = parents["large"]
    named = {"org/lora-base": base, **{f"org/lora-{n}": model for n, model in enumerate(others)}}
    for name, folder in {**named, **{f"org/lora-{n}-lora": lora for n, lora in enumerate(loras["large"])}}.items():
        served.add_model(name, folder)
    models = ["org/lora-base", *(f"org/lora-{n}+org/lora-{n}-lora" for n in range(len(others)))]
    env = {**os.environ, **served.env(tmp_path / "home", "hf_writer_of_org")}
    found = measured("linear", models, tmp_path / "hub", to="hf://org/lora-merged", env=env)
    assert found["code"] == 0
    assert found["peak"] <= found["planned"] < 3 * found["peak"]


@thorough_only
def test_memory_is_kept_while_matrices_are_taken_apart(parents: dict[str, list[Path]], tmp_path: Path) -> None:
    """Not even a matrix is held: an embedding of 16 million entries takes little more than one of 4 million."""
    found = {}
    for size, (base, one, _) in parents.items():
        settings = {"model": str(one), "base_model": str(base), "rank": 32, "embeddings": True}
        settings["include"] = r"embed|layers\.0\."
        (tmp_path / f"{size}.yaml").write_text(json.dumps({"extract_lora": settings}))
        command = [sys.executable, "-c", RUN, str(tmp_path / f"{size}.yaml"), str(tmp_path / f"{size}-out"), "0"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[size] = json.loads(done.stdout)
        assert found[size]["code"] == 0
        assert found[size]["peak"] <= found[size]["planned"] < 2.5 * found[size]["peak"]
    assert found["large"]["peak"] - found["small"]["peak"] < 100 << 20


@thorough_only
@pytest.mark.parametrize("option", ["--stream", "--quiet"] if THOROUGH else ["--stream"])
def test_memory_is_kept_when_xet_sends(
    option: str, served: LoopbackHub, parents: dict[str, list[Path]], tmp_path: Path
) -> None:
    """Xet holds much more of a file than LFS does, from a file or a stream."""
    served.xet(tmp_path)
    env = {**os.environ, **served.env(tmp_path / "home", "hf_writer_of_org"), "HF_HUB_DISABLE_XET": "0"}
    to = f"hf://org/xet{option.strip('-')}"
    found = measured("linear", parents["large"], tmp_path / "xet", to=to, env=env, more=[option])
    served.xet(None)
    assert found["code"] == 0
    assert found["peak"] <= found["planned"] < 2.5 * found["peak"]


@thorough_only
def test_the_memory_of_statistics_is_planned(parents: dict[str, list[Path]], tmp_path: Path) -> None:
    """RegMean holds one Gram matrix at a time, and sum and factor in float64: no more than the plan says."""
    for number, model in enumerate(parents["small"]):
        statistics.write(tmp_path / f"{number}-gram", model, "gram", number)
    listed = ", ".join(
        f"{{model: {model}, statistics: {tmp_path}/{number}-gram}}" for number, model in enumerate(parents["small"])
    )
    found = measured_of(f"merge_method: regmean\nmodels: [{listed}]\n", tmp_path / "regmean")
    assert found["code"] == 0
    assert found["peak"] <= found["planned"] < 2.5 * found["peak"], found
