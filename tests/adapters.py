"""Small LoRA adapters for tests, made and merged by PEFT itself. Not here: adapters that are refused."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def base(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """A tiny model of transformers, a Mistral unless `config` says otherwise, written to `folder`."""
    shape = {
        "model_type": "mistral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 40, "max_position_embeddings": 64,
    }  # fmt: skip
    settled = {**shape, **config} if "model_type" not in config else dict(config)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settled.pop("model_type"), **settled))
    for number, tensor in enumerate(model.state_dict().values()):
        tensor.add_(0.01 * (number + 1) * torch.randn(tensor.shape))  # norms and biases of 1 and 0 would hide mistakes
    model.to(dtype).save_pretrained(folder)
    return folder


def load(folder: Path) -> PreTrainedModel:
    """A model in float32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def lora(folder: Path, model: Path, seed: int = 1, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """An adapter of a model as PEFT saves it, all of its numbers drawn from `seed`."""
    from peft import LoraConfig, get_peft_model

    settled = {"target_modules": list(ALL_LINEAR), "r": 4, "lora_alpha": 6, **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        peft = get_peft_model(load(model), LoraConfig(**settled))
        for name, tensor in peft.state_dict().items():
            if "lora_" in name or "modules_to_save" in name or (settled.get("bias") == "all" and name.endswith("bias")):
                fresh = torch.randn(tensor.shape) * 0.1
                tensor.copy_(fresh.abs() + 0.5 if "magnitude" in name else fresh)
            if dtype != torch.float32 and "lora_" in name:
                tensor.copy_(tensor.to(dtype))
        peft.save_pretrained(folder)
    return folder


def merged(model: Path, adapter: Path) -> Mapping[str, Tensor]:
    """What PEFT makes of both in float32: the tensors as transformers saves them."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = PeftModel.from_pretrained(load(model), str(adapter)).merge_and_unload()
        folder = adapter.parent / f"{adapter.name}-merged"
        found.save_pretrained(folder)
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")
