"""Small models of the families that GGUF is written and read of, with their tokenizers.

Not here: what is made of them.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = "the cat sat on the mat and the dog sat by the cat in the sun; then 12 dogs ran after it, as dogs do."
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 200,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
LLAMA_3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 64}  # fmt: skip
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [1.5] * 8}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"rope_parameters": LLAMA_3, "attention_bias": True},
    "Mistral": {"sliding_window": 128, "head_dim": 32},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 32, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
    "Gemma2": GEMMA,
    "Gemma3": GEMMA | {"num_hidden_layers": 7},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "Qwen2Moe": {**MOE, "shared_expert_intermediate_size": 64},
    "Qwen3Moe": {**MOE, "head_dim": 32, "norm_topk_prob": True},
    "Phi3": {"original_max_position_embeddings": 256, "max_position_embeddings": 512, "rope_parameters": LONG},
}


@cache
def of_bytes() -> Tokenizer:
    """A BPE of bytes as Qwen 2 cuts text."""
    from merger.models.gguf.tokens import SPLITS

    pattern = next(pattern for pattern, name in SPLITS.items() if name == "qwen2")
    found = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    found.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["<s>", "</s>", "<pad>"])
    found.train_from_iterator([TEXT] * 3, trainer)
    return found


@cache
def of_pieces() -> Tokenizer:
    """One as it is made from SentencePiece: any two pieces that are a piece together are joined, in one order."""
    letters = [*"abcdefghijklmnopqrstuvwxyz", *"0123456789;,.", "\u2581"]
    words = ["th", "he", "the", "\u2581t", "\u2581th", "\u2581the", "at", "og", "do", "dog", "\u2581d", "\u2581do"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(128)]
    vocabulary = {
        token: number for number, token in enumerate(["<s>", "</s>", "<pad>", "<unk>", *bytes_, *letters, *words])
    }
    merges = [(word[:cut], word[cut:]) for word in words for cut in range(1, len(word))
              if word[:cut] in vocabulary and word[cut:] in vocabulary]  # fmt: skip
    found = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    found.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    found.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    found.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    found.add_special_tokens(["<s>", "</s>", "<pad>", "<unk>"])
    return found


def model(folder: Path, family: str, tokenizer: Tokenizer | None = None, fused: bool = False, **more: Any) -> Path:
    """A small model of a family that transformers makes, in bfloat16, with norms that are not all alike."""
    named = family if family != "Gemma3" else "Gemma3Text"
    torch.manual_seed(0)
    config = getattr(transformers, f"{named}Config")(**SIZES | FAMILIES[family] | more)
    made = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(
                torch.randn(parameter.shape) * (0.3 if parameter.ndim == 1 else 0.15)
                + (parameter.ndim == 1) * (parameter.mean())
            )
    made.bfloat16().save_pretrained(folder, save_original_format=not fused)
    (tokenizer or of_bytes()).save(str(folder / "tokenizer.json"))
    said = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder


def recipe(of: Path, *kinds: str) -> str:
    models = f"[{{model: {of}, parameters: {{weight: 1}}}}]"
    return f"merge_method: linear\nmodels: {models}\npublish: {{gguf: [{', '.join(kinds)}]}}\n"
