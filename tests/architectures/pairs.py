"""Classes of models that see, each with the class of its language model alone. Not here: merging them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from architectures.cases import CASES, QWEN_IDS, QWEN_TEXT, Case, text

QWEN_3_5 = Case("Qwen3_5Config", "Qwen3_5ForConditionalGeneration", text, {
    "text_config": {**QWEN_TEXT, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 4,
                    "linear_value_head_dim": 4, "layer_types": ["linear_attention", "full_attention"] * 2},
    "vision_config": {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 4, "out_hidden_size": 16,
                      "patch_size": 4, "num_position_embeddings": 16},
    **QWEN_IDS,
})  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A model that sees, and the class of its language model alone.

    Args:
        of: the class of the whole.
        alone: that of its language model.
        within: what the published files name otherwise than transformers saves it, and how.
    """

    of: Case
    alone: str
    within: tuple[str, str] = ("", "")

    def whole(self, folder: Path) -> nn.Module:
        """A model that sees, saved."""
        model = self.of.make(seed=1)
        model.save_pretrained(folder)
        before, after = self.within
        tensors = {name.replace(before, after) if before else name: of for name, of in tiny.read(folder).items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return model

    def spoken(self, folder: Path) -> nn.Module:
        """Another one's language model, saved by itself."""
        kind = getattr(transformers, self.alone)
        tied = getattr(transformers, self.of.config)(**self.of.settings).tie_word_embeddings
        settings = {**self.of.settings["text_config"], "tie_word_embeddings": tied}
        settings.pop("model_type", None)
        return save(kind, kind.config_class(**settings), folder)


def save(kind: Any, config: Any, folder: Path, seed: int = 2) -> nn.Module:
    """A model drawn from `seed`, saved."""
    torch.manual_seed(seed)
    model: nn.Module = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)  # type: ignore[operator]
    return model


SIGHT = ("vision_tower.", "vision_tower.vision_model.")
PAIRS: Mapping[str, Pair] = {
    "Gemma 3": Pair(CASES["Gemma 3"], "Gemma3ForCausalLM", SIGHT),
    "LLaVA": Pair(CASES["LLaVA"], "LlamaForCausalLM"),
    "Qwen2.5-VL": Pair(CASES["Qwen 2.5 VL"], "Qwen2ForCausalLM"),
    "Qwen3.5": Pair(QWEN_3_5, "Qwen3_5ForCausalLM"),
    "SmolVLM": Pair(CASES["SmolVLM"], "LlamaForCausalLM"),
    "Gemma 4": Pair(CASES["Gemma 4"], "Gemma4ForCausalLM"),
    "InternVL": Pair(CASES["InternVL"], "Qwen2ForCausalLM"),
    "Mistral 3": Pair(CASES["Mistral 3"], "MistralForCausalLM"),
    "PaliGemma": Pair(CASES["PaliGemma"], "GemmaForCausalLM"),
    "Qwen2-VL": Pair(CASES["Qwen 2 VL"], "Qwen2ForCausalLM"),
    "Qwen3-VL": Pair(CASES["Qwen 3 VL"], "Qwen3ForCausalLM"),
}
