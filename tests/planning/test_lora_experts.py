"""LoRA on parameters that are no module's weight, experts above all: what PEFT's own merge makes of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tiny
import torch
import transformers
from architectures.cases import CASES as CLASSES
from architectures.cases import EXPERTS, NEXT, QWEN_IDS, QWEN_TEXT, Case, text
from loopback import LoopbackHub
from safetensors.torch import load_file, save_file
from torch import Tensor

from merger.cli.commands import main

if TYPE_CHECKING:
    from conftest import Command

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

TOGETHER = ("experts.gate_up_proj", "experts.down_proj")
APART = ("q_proj", "gate_proj", "up_proj", "down_proj")
SHORT = {"num_hidden_layers": 2}
GPT_OSS = Case("GptOssConfig", "GptOssForCausalLM", text, {**CLASSES["gpt-oss"].settings, **SHORT})
SQUARE = Case("GptOssConfig", "GptOssForCausalLM", text, {**GPT_OSS.settings, "intermediate_size": 16})
"""As in gpt-oss-20b: of down_proj no shape tells which way round it is."""

MIXTRAL = Case("MixtralConfig", "MixtralForCausalLM", text, {**CLASSES["Mixtral"].settings, **SHORT})
QWEN_3_5 = Case("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", text,
                {**NEXT, "layer_types": ["linear_attention", "full_attention"] * 2})  # fmt: skip
ONE_EXPERT = Case("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", text,
                  {**QWEN_3_5.settings, "num_experts": 1, "num_experts_per_tok": 1})  # fmt: skip
QWEN_3_VL = Case("Qwen3VLMoeConfig", "Qwen3VLMoeForConditionalGeneration", text, {
    "text_config": {**QWEN_TEXT, **EXPERTS},
    "vision_config": {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 4, "out_hidden_size": 16,
                      "patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    **QWEN_IDS,
})  # fmt: skip


@dataclass(frozen=True)
class Adapted:
    """What an adapter is trained on: PEFT's `target_parameters` and `target_modules`, and what else it is told."""

    of: Case
    parameters: tuple[str, ...] = TOGETHER
    modules: tuple[str, ...] = ("q_proj",)
    settings: Mapping[str, Any] = field(default_factory=dict)


ADAPTED: Mapping[str, Adapted] = {
    **{name: Adapted(CLASSES[name]) for name in ("GLM 4 MoE", "Granite MoE", "Granite 4", "Jamba", "Llama 4, text",
                                                 "OLMoE", "Phi 3.5 MoE", "Qwen 3 Next")},
    "DeepSeek V3": Adapted(CLASSES["DeepSeek V3"], modules=("kv_b_proj",)),
    "gpt-oss": Adapted(GPT_OSS),
    "gpt-oss, square": Adapted(SQUARE),
    "gpt-oss, a square alone": Adapted(SQUARE, TOGETHER[1:]),
    "gpt-oss, with the rows of biases": Adapted(GPT_OSS, (*TOGETHER, "gate_up_proj_bias", "down_proj_bias")),
    "Mixtral": Adapted(MIXTRAL, (), ("q_proj", "gate", "w1", "w2", "w3")),
    "Mixtral, one parameter": Adapted(MIXTRAL, ("down_proj",)),
    "Mixtral, of other ranks": Adapted(MIXTRAL, settings={
        "use_rslora": True, "rank_pattern": {r".*\.gate_up_proj": 3}, "alpha_pattern": {r"experts\.down_proj": 5},
    }),
    "Nemotron H": Adapted(CLASSES["Nemotron H"], ("experts.down_proj", "experts.up_proj")),
    "Qwen 2 MoE": Adapted(CLASSES["Qwen 2 MoE"], (), APART),
    "Qwen 3 MoE": Adapted(CLASSES["Qwen 3 MoE"], (), APART),
    "Qwen 3.5 MoE": Adapted(QWEN_3_5),
    "Qwen 3.5 MoE, of one expert": Adapted(ONE_EXPERT),
    "Qwen 3 VL MoE": Adapted(QWEN_3_VL),
    "no experts": Adapted(CLASSES["Qwen 2"], ("k_proj.weight", "embed_tokens.weight", "mlp.up_proj.weight")),
}  # fmt: skip


def trained(of: Adapted, folder: Path, adapter: Path) -> dict[str, Tensor]:
    """Save an adapter as PEFT does; what PEFT's own merge makes of the model."""
    from peft import LoraConfig, get_peft_model

    model = getattr(transformers, of.of.model).from_pretrained(folder)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=list(of.modules), target_parameters=list(of.parameters),
                        **of.settings)  # fmt: skip
    torch.manual_seed(2)
    peft = get_peft_model(model, config)
    for name, tensor in peft.state_dict().items():
        if "lora_" in name:
            tensor.copy_(0.1 * torch.randn(tensor.shape))
    peft.save_pretrained(adapter)
    return dict(peft.merge_and_unload().state_dict())


def run(folder: Path, *models: str, to: str = "out") -> int:
    named = "".join(f"  - model: {model}\n" for model in models)
    (folder / "mine.yaml").write_text(f"merge_method: linear\ndtype: float32\nmodels:\n{named}")
    return main(["run", str(folder / "mine.yaml"), "--to", str(folder / to), "--quiet"])


@pytest.mark.parametrize("name", ADAPTED)
def test_parameters_get_what_peft_adds_to_them(name: str, tmp_path: Path) -> None:
    """To the rounding of float32; under the names of the model's files."""
    of = ADAPTED[name]
    of.of.make(seed=1).save_pretrained(tmp_path / "base")
    expected = trained(of, tmp_path / "base", tmp_path / "lora")
    assert run(tmp_path, f"{tmp_path}/base+{tmp_path}/lora") == 0
    plain, found = tiny.read(tmp_path / "base"), tiny.read(tmp_path / "out")
    assert {name: tensor.shape for name, tensor in found.items()} == {name: of.shape for name, of in plain.items()}
    load = getattr(transformers, of.of.model).from_pretrained
    before, after = load(tmp_path / "base").state_dict(), load(tmp_path / "out").state_dict()
    touched = {name for name, tensor in expected.items() if not torch.equal(tensor, before[name])}
    assert {name.rpartition(".")[2] for name in touched} >= {name.rpartition(".")[2] for name in of.parameters}
    for name, tensor in expected.items():
        torch.testing.assert_close(after[name], tensor, rtol=4e-7, atol=4e-8)
        assert torch.equal(after[name], before[name]) == (name not in touched), name


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small Mixtral, an adapter on its experts, and another."""
    folder = tmp_path_factory.mktemp("pair")
    MIXTRAL.make(seed=1).save_pretrained(folder / "base")
    for name in ("lora", "other"):
        merged = trained(Adapted(MIXTRAL, settings={"use_rslora": name == "other"}), folder / "base", folder / name)
        save_file({key: tensor.contiguous() for key, tensor in merged.items()}, folder / f"{name}.safetensors")
    return folder


def test_two_adapters_of_one_model_are_merged_as_models(pair: Path, tmp_path: Path) -> None:
    """Their mean is the mean of what PEFT makes of each, and so is a stage of them by another name."""
    assert run(tmp_path, f"{pair}/base+{pair}/lora", f"{pair}/base+{pair}/other") == 0
    load = transformers.MixtralForCausalLM.from_pretrained
    both = [load_file(pair / f"{name}.safetensors") for name in ("lora", "other")]
    assert not torch.equal(*(of["model.layers.0.mlp.experts.down_proj"] for of in both))
    for name, tensor in load(tmp_path / "out").state_dict().items():
        torch.testing.assert_close(tensor, (both[0][name] + both[1][name]) / 2, rtol=1e-6, atol=1e-7)


def copied(pair: Path, folder: Path, **settings: Any) -> dict[str, Tensor]:
    """A copy of the adapter with other words in its config; its tensors."""
    shutil.copytree(pair / "lora", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    return load_file(folder / "adapter_model.safetensors")


LAYER = "model.layers.0.mlp.experts"
REFUSED: Mapping[str, tuple[dict[str, Any], Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "another rank": (
        {"rank_pattern": {r"experts\..*": 4}}, dict,
        f"{LAYER}: A 6x24 with B 16x6 and A 6x16 with B 48x6 do not fit the model's {LAYER}.down_proj of rank 4, "
        f"3x16x24 and {LAYER}.gate_up_proj of rank 4, 3x48x16",
    ),
    "a pair that is not there": (
        {}, lambda held: {name: tensor for name, tensor in held.items() if ".experts.lora_" not in name},
        f"{LAYER} has no pair of matrices between the first and the last",
    ),
    "more pairs than names": (
        {"target_parameters": ["experts.down_proj"]}, dict, f"{LAYER} has 2 pairs of matrices for 1 target_parameters",
    ),
    "a bias": (
        {}, lambda held: held | {f"base_model.model.{LAYER}.lora_B.bias": torch.ones(16)},
        f"{LAYER} has lora_A, lora_B, lora_bias for a parameter, which has lora_A and lora_B alone",
    ),
    "DoRA": ({"use_dora": True}, dict, "has use_dora and target_parameters: DoRA of parameters is not built"),
    "too many names": (
        {"target_parameters": [f"p{n}" for n in range(33)]}, dict,
        "target_parameters end with 33 names, and the limit is 32",
    ),
    "no names": ({"target_parameters": "all"}, dict, "adapter_config.json: target_parameters is no list of names"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(
    name: str, pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """When the files are read, with the sizes of both."""
    settings, change, sentence = REFUSED[name]
    save_file(change(copied(pair, tmp_path / "lora", **settings)), tmp_path / "lora" / "adapter_model.safetensors")
    assert run(tmp_path, f"{pair}/base+{tmp_path}/lora") == 3
    assert sentence in capsys.readouterr().err


NEMOTRON = Case("NemotronHConfig", "NemotronHForCausalLM", text,
                {**CLASSES["Nemotron H"].settings, "moe_intermediate_size": 16})  # fmt: skip
LLAMA = Case("Llama4TextConfig", "Llama4ForCausalLM", text,
             {**CLASSES["Llama 4, text"].settings, "intermediate_size": 16})  # fmt: skip
UNCLEAR: Mapping[str, tuple[Adapted, str]] = {
    "two parameters of one shape": (
        Adapted(NEMOTRON, ("experts.up_proj", "experts.down_proj")),
        "do not tell whether base_model.model.model.layers.1.mixer.experts.lora_A.weight changes "
        "model.layers.1.mixer.experts.",
    ),
    "a square, and no word of which side its inputs are on": (
        Adapted(LLAMA, ("experts.down_proj",)), "fit the model's experts either way round",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNCLEAR)
def test_what_could_be_two_things_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With both."""
    of, sentence = UNCLEAR[name]
    of.of.make(seed=1).save_pretrained(tmp_path / "base")
    trained(of, tmp_path / "base", tmp_path / "lora")
    assert run(tmp_path, f"{tmp_path}/base+{tmp_path}/lora") == 3
    assert sentence in capsys.readouterr().err


def test_two_blocks_of_experts_in_a_layer_are_told_apart_by_name_alone(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter of neither name could mean both."""
    shutil.copytree(pair / "base", tmp_path / "base")
    held = tiny.read(pair / "base")
    second = {name.replace(".block_sparse_moe.", ".vision_moe."): tensor.clone() for name, tensor in held.items()}
    save_file(held | second, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    assert run(tmp_path, f"{tmp_path}/base+{pair}/lora") == 3
    places = (f"model.layers.0.{block}.experts.down_proj" for block in ("block_sparse_moe", "vision_moe"))
    assert f"{LAYER}.down_proj is {' or '.join(places)}" in capsys.readouterr().err


def test_adapters_of_parameters_are_not_merged_with_each_other(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They can be added to their model; taking two apart again that are one tensor is not built."""
    recipe = f"merge_method: linear\nadapters:\n  - model: {pair}/lora\n  - model: {pair}/other\n"
    (tmp_path / "mine.yaml").write_text(recipe)
    assert main(["plan", str(tmp_path / "mine.yaml")]) == 4
    assert f"it changes parameters that are no module's weight, of {LAYER}" in capsys.readouterr().err


def test_of_an_adapter_on_the_hub_each_byte_travels_once(
    pair: Path, served: LoopbackHub, command: Command, tmp_path: Path
) -> None:
    """B too, which is read for each expert."""
    served.add_model("org/base", pair / "base")
    served.add_model("org/lora", pair / "lora")
    served.clear_log()
    recipe = "merge_method: passthrough\ndtype: float32\nmodels: [{model: org/base+org/lora}]\n"
    (tmp_path / "mine.yaml").write_text(recipe)
    done = command("run", "mine.yaml", "--to", "out", cwd=tmp_path, hub=served)
    assert done.returncode == 0, done.stderr
    asked = [request for request in served.log if request.host == "cdn" and "/org/lora/" in request.path]
    assert sum(request.sent for request in asked) == (pair / "lora/adapter_model.safetensors").stat().st_size
