"""LoRA adapters in references: a model with one is what PEFT's merge_and_unload makes of both, to one rounding."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import adapters
import pytest
import tiny
import torch
import yaml
from calls import Command
from loopback import LoopbackHub
from safetensors.torch import load as load_tensors
from torch import Tensor

from merger.cli.commands import main
from merger.run.options import Options
from merger.run.prepare import plan, read_recipe

pytest.importorskip("peft")


GPT2 = {
    "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 40,
}  # fmt: skip
QWEN2 = {
    "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 40, "tie_word_embeddings": False,
}  # fmt: skip
CASES: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "plain": ({}, {}),
    "rslora": ({}, {"use_rslora": True, "r": 3}),
    "patterns": ({}, {
        "rank_pattern": {"^model.layers.0.mlp.up_proj": 5, r"layers\.1\..*_proj": 6, "q_proj": 2},  # as PEFT sorts them
        "alpha_pattern": {"mlp.down_proj": 3, r"layers\.\d+\.self_attn\.v_proj": 11},
    }),
    "dora": ({}, {"use_dora": True, "target_modules": ["q_proj", "down_proj", "k_proj"]}),
    "embedding": ({}, {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "modules to save": ({}, {"modules_to_save": ["lm_head", "norm"], "target_modules": ["q_proj"]}),
    "biases": (QWEN2, {"bias": "all", "target_modules": ["q_proj", "k_proj"]}),
    "bias of B": (QWEN2, {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}),
    "inputs first": (GPT2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "inputs first, square": (GPT2, {"target_modules": r"transformer\.h\.\d+\.attn\.c_proj", "fan_in_fan_out": True}),
    "tied embedding": (GPT2, {"target_modules": ["wte"], "fan_in_fan_out": True}),
}  # fmt: skip


def run(folder: Path, recipe: str, *options: str) -> dict[str, Tensor]:
    """The tensors of a recipe's result."""
    (folder / "mine.yaml").write_text(recipe)
    assert main(["run", str(folder / "mine.yaml"), "--to", str(folder / "out"), "--quiet", *options]) == 0
    return tiny.read(folder / "out")


def passthrough(model: str, dtype: str = "float32") -> str:
    return f"merge_method: passthrough\ndtype: {dtype}\nmodels:\n  - model: {model}\n"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_a_model_with_an_adapter_is_what_peft_makes_of_them(case: str, tmp_path: Path) -> None:
    """In float32 to a few units in the last place of the sum."""
    config, lora = CASES[case]
    base = adapters.base(tmp_path / "base", **config)
    adapter = adapters.lora(tmp_path / "lora", base, **lora)
    expected, plain = adapters.merged(base, adapter), tiny.read(base)
    found = run(tmp_path, passthrough(f"{base}+{adapter}"))
    assert found.keys() == expected.keys()
    touched = [name for name in expected if not torch.equal(expected[name], plain[name])]
    assert touched
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=4e-7, atol=4e-8)
        assert torch.equal(tensor, plain[name]) == (name not in touched), name


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model in bfloat16 and an adapter of it, whose name for its model is the folder's."""
    root = tmp_path_factory.mktemp("pair")
    base = adapters.base(root / "base", dtype=torch.bfloat16)
    return base, adapters.lora(root / "lora", base, dtype=torch.bfloat16)


@pytest.mark.filterwarnings("ignore")
def test_the_sum_is_rounded_once(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Where model, adapter and result are in bfloat16: the float32 sum of PEFT, rounded to the next bfloat16."""
    base, adapter = pair
    expected = adapters.merged(base, adapter)
    found = run(tmp_path, passthrough(f"{base}+{adapter}", "bfloat16"))
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        rounded = expected[name].bfloat16()
        assert (tensor != rounded).float().mean() < 0.01, name  # sums that lie between two, and are made in other order
        torch.testing.assert_close(tensor.float(), rounded.float(), rtol=2**-7, atol=1e-30)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "karcher"])
def test_a_model_alone_with_its_adapter_comes_out_as_passthrough_makes_it(
    pair: tuple[Path, Path], tmp_path: Path, method: str
) -> None:
    """As cards of models with a baked-in adapter are written: byte for byte, and the card calls it so."""
    one = "{}+{}".format(*pair)
    expected = run(tmp_path, passthrough(one))
    base = "" if method == "karcher" else f"base_model: {one}\n"
    recipe = (
        f"merge_method: {method}\ndtype: float32\n{base}models:\n  - {{model: {one}, parameters: {{weight: 0.3}}}}\n"
    )
    (tmp_path / "alone").mkdir()
    found = run(tmp_path / "alone", recipe)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert found.keys() == expected.keys()
    card = (tmp_path / "alone/out/README.md").read_text()
    assert "A merge of base+lora by **Passthrough**" in card.replace("\\", "")


def test_a_task_vector_may_be_an_adapter(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Base, fine-tune and the same model with several adapters, in any place of the recipe."""
    base, adapter = pair
    other = adapters.lora(tmp_path / "other", base, seed=5, target_modules=["q_proj"], r=2)
    recipe = f"""\
merge_method: task_arithmetic
base_model: {base}
dtype: float32
models:
  - model: {base}+{adapter}
    parameters: {{weight: 0.5}}
  - model: {{model: {base}, lora: {{path: {other}}}}}
    parameters: {{weight: -2}}
"""
    found, plain = run(tmp_path, recipe), tiny.read(base)
    one, two = adapters.merged(base, adapter), adapters.merged(base, other)
    for name, tensor in found.items():
        start = plain[name].float()
        expected = start + 0.5 * (one[name].float() - start) - 2 * (two[name].float() - start)
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)


def test_experts_and_the_base_of_a_mixture_may_have_adapters(tmp_path: Path) -> None:
    """What the models with their adapters make is what they make once they are written out."""
    base = adapters.base(tmp_path / "base", sliding_window=None)
    adapter = adapters.lora(tmp_path / "lora", base)
    plain = run(tmp_path, passthrough(f"{base}+{adapter}"))
    tiny.write(tmp_path / "whole", plain)
    shutil.copy(base / "config.json", tmp_path / "whole")
    mixture = "gate_mode: random\nbase_model: {0}\nexperts: [{{source_model: {0}}}, {{source_model: {1}}}]\n"
    found = run(tmp_path, mixture.format(f"{base}+{adapter}", base), "--force")
    expected = run(tmp_path, mixture.format(tmp_path / "whole", base), "--force")
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


WILD = Path(__file__).parents[1] / "recipe/wild"


@pytest.mark.parametrize("name", ["15-model-stock-lora-refs", "18-sce-lora-base"])
def test_recipes_of_the_field_that_name_adapters_run(
    name: str, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On models and adapters made to their shape, each where the recipe looks for it; and each adapter counts."""
    base, _ = pair
    monkeypatch.chdir(tmp_path)
    text = (WILD / f"{name}.yaml").read_text()
    named = dict.fromkeys(re.findall(r"[\w.-]+/[\w.-]+(?=\+|\s|$)", text.split("\n", 1)[1]))
    after_plus = set(re.findall(r"\+([\w.-]+/[\w.-]+)", text))
    for seed, ref in enumerate(named):
        if ref in after_plus:
            adapters.lora(tmp_path / ref, base, seed, target_modules=["q_proj", "down_proj"], r=2)
        else:
            adapters.base(tmp_path / ref, seed, dtype=torch.bfloat16)
    with_adapters = run(tmp_path, text)
    if name.startswith("15"):  # without adapters it is the same model seven times
        plain = tiny.read(tmp_path / "FreedomIntelligence/HuatuoGPT-o1-8B")
    else:
        (tmp_path / "without").mkdir()
        plain = run(tmp_path / "without", re.sub(r"\+[\w.-]+/[\w.-]+", "", text))
    changed = {key for key, tensor in with_adapters.items() if not torch.equal(tensor, plain[key])}
    assert changed == {key for key in plain if key.endswith(("q_proj.weight", "down_proj.weight"))}


def test_an_adapter_of_another_model_is_told(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A warning, for many an adapter goes well with a sister of its model."""
    base, adapter = pair
    sister = tmp_path / "sister"
    shutil.copytree(base, sister)
    for model in (base, sister):
        (tmp_path / "mine.yaml").write_text(passthrough(f"{model}+{adapter}"))
        assert main(["plan", str(tmp_path / "mine.yaml")]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "trained on" in line]
    assert told == [f"warning: lora was trained on {base}, and the recipe adds it to sister"]


def test_a_model_that_is_named_with_several_adapters_is_read_once(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """As often as its files hold, and the adapters' files beside."""
    base, adapter = pair
    copy = tmp_path / "copy"
    shutil.copytree(adapter, copy)
    (tmp_path / "mine.yaml").write_text(
        f"merge_method: linear\nmodels: [{{model: {base}+{adapter}}}, {{model: {base}+{copy}}}, {{model: {base}}}]\n"
        "parameters: {weight: 1}\n"
    )
    planned, _ = plan(read_recipe(tmp_path / "mine.yaml"), Options())
    assert planned.read_bytes == sum(
        tensor.nbytes for folder in (base, adapter, copy) for tensor in tiny.read(folder).values()
    )
    assert not planned.left_out


# ---- on the Hub -----------------------------------------------------------------------------------------------------

HUB_RECIPE = """\
merge_method: ties
base_model: org/base
models:
  - model: org/base+org/lora@v1
  - model: org/base+org/other
parameters: {weight: 1, density: 0.6}
publish: {repo: org/both, license: apache-2.0}
"""


def test_adapters_on_the_hub_are_pinned_read_by_range_and_named_in_card_and_lock(
    pair: tuple[Path, Path], served: LoopbackHub, command: Command, tmp_path: Path
) -> None:
    """The result is that of folders; a lock file beside the recipe holds adapters at their commits too."""
    base, adapter = pair
    other = adapters.lora(tmp_path / "other", base, seed=6)
    served.add_model("org/base", base)
    first = served.add_model("org/lora", adapter)
    served.branch("org/lora", "v1")
    served.add_model("org/other", other)
    served.commit("org/lora", other)  # main has moved on since the tag
    (tmp_path / "mine.yaml").write_text(HUB_RECIPE)
    done = command("run", "mine.yaml", cwd=tmp_path, hub=served)
    assert done.returncode == 0, done.stderr
    folders = HUB_RECIPE.replace("org/base+org/lora@v1", f"{base}+{adapter}").replace(
        "org/base+org/other", f"{base}+{other}"
    )
    expected = run(tmp_path, folders.replace("org/base", str(base)))
    found = load_tensors(served.read("org/both", "model.safetensors"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    reads = [r for r in served.log if r.host == "cdn" and r.method == "GET"]
    assert all(re.fullmatch(r"bytes=\d+-\d+", r.range or "") for r in reads)
    lock = yaml.safe_load(served.read("org/both", "merger.lock.yaml"))
    assert {item["model"]: item["commit"] for item in lock["models"]}["org/lora@v1"] == first
    card = served.read("org/both", "README.md").decode()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["base_model"] == ["org/base", "org/lora", "org/other"]
    assert card.count("| LoRA adapter |") == 2
    served.commit("org/lora", other, revision="v1")
    (tmp_path / "mine.yaml").write_text(HUB_RECIPE)
    (tmp_path / "mine.lock.yaml").write_bytes(served.read("org/both", "merger.lock.yaml"))
    planned = command("plan", "mine.yaml", "--json", cwd=tmp_path, hub=served)
    told = {item["model"]: item["commit"] for item in json.loads(planned.stdout)["models"]}
    assert told == {item["model"]: item["commit"] for item in lock["models"]}
