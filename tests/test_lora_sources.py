"""LoRA adapters in references: a model with an adapter is what PEFT's merge_and_unload makes of both, to one rounding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import adapters
import pytest
import tiny
import torch
from torch import Tensor

from merger.cli import main

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
