"""LoRA on parameters that are no module's weight, experts above all: what PEFT's own merge makes of model and adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from architectures.cases import CASES as CLASSES
from architectures.cases import EXPERTS, NEXT, QWEN_IDS, QWEN_TEXT, Case, text
from torch import Tensor

from merger.cli.commands import main

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
